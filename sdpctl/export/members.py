"""The graphs of a cascade's members, which hand the states that they share from one graph to the next."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from sdpctl.engine.cascade import Place, begins
from sdpctl.export.description import CascadeOption
from sdpctl.export.format import Source
from sdpctl.export.network import INPUT, OUTPUT, OneInstance, example, normalisation
from sdpctl.models.chain import batch_norm
from sdpctl.models.state import State, copied, tensors

Write = Callable[["Member", list[Tensor], list[str], list[str]], str]
"""Writes the graph of a member, given example inputs and the names of inputs and outputs; returns the name of its file."""


class Member(nn.Module):
    """One member: from images or from an earlier member's state to logits and the states that later members need.

    Args:
        one: the member as a network of its own.
        begin: number of the segment whose result, before any shrinking, the member takes; None if it takes images.
        spec: structure of what the member takes.
        kept: numbers of the segments whose results, before any shrinking, later members need.
    """

    def __init__(self, one: OneInstance, begin: int | None, spec: TreeSpec, kept: tuple[int, ...]) -> None:
        super().__init__()
        self.one, self.begin, self.spec, self.kept = one, begin, spec, kept

    def passed(self, state: State) -> tuple[Tensor, dict[int, State]]:
        """Return the logits, and the states that later members need, by segment."""
        kept: dict[int, State] = {}
        if self.begin is None:
            state = self.one.network.begun(self.one.normalised(state))
        for level, segment in enumerate(self.one.network.segments()):
            if self.begin is not None and level < self.begin:
                continue
            if level != self.begin:
                state = segment.body(state, batch_norm)
            if level in self.kept:
                kept[level] = copied(state)  # the shrink may modify it in place
            if segment.shrink is not None and segment.point is not None:
                state = segment.shrink(state, self.one.instance.ratio(segment.point))
        assert isinstance(state, Tensor)
        return state, kept

    def forward(self, taken: list[Tensor]) -> list[Tensor]:
        """Return the logits, and the tensors of the states that later members need."""
        logits_NK, kept = self.passed(tree_unflatten(taken, self.spec))
        return [logits_NK, *(tensor for level in self.kept for tensor in tensors(kept[level]))]


def member_graphs(source: Source, option: CascadeOption, write: Write) -> list[dict[str, Any]]:
    """Write the graph of each member of a cascade.

    The first graph takes images. A later graph takes the state that an earlier graph hands out as an additional output, so that
    what two members share is computed once.

    Args:
        source: the network, and statistics that cover all members.
        option: the cascade and its figures.
        write: writes one graph.

    Returns:
        The entry of each member in a table that `run_folder.run_cascade` reads.
    """
    model, description, cascade = source.model, source.description, option.cascade
    places = [None, *begins(cascade, model)]
    # The states that are handed out, each of two images, with the names of their tensors, by member and segment.
    states: dict[Place | None, tuple[State, list[str]]] = {None: (example(description), [INPUT])}
    members = []
    for number, (instance, begin) in enumerate(zip(cascade.members, places, strict=True)):
        kept = tuple(sorted({place.level for place in places if place is not None and place.member == number}))
        one = OneInstance(model, instance, source.statistics, normalisation(description))
        taken, inputs = states[begin]
        leaves, spec = tree_flatten(taken)
        member = Member(one, None if begin is None else begin.level, spec, kept).eval()
        outputs = [OUTPUT]
        with torch.no_grad():
            handed_out = member.passed(copied(taken))[1]
        for level, state in handed_out.items():
            point = model.segments()[level].point
            names = [f"state{number}.{point}.{leaf}" for leaf in range(len(tensors(state)))]
            states[Place(number, level)] = state, names
            outputs += names
        members.append(
            {
                "file": write(member, leaves, inputs, outputs),
                "instance": str(instance),
                "inputs": inputs,
                "outputs": outputs,
                "threshold": (*cascade.thresholds, None)[number],
                "temperature": cascade.temperatures[number],
                "macs": option.member_macs[number],
            }
        )
    return members
