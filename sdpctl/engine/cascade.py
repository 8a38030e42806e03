"""Run a cascade: each member sees the images that no earlier member answered, and continues what was computed before.

Two members are the same network up to the first point at which their ratios differ. So a member starts from the state that the
earlier member with the longest shared prefix computed in the segment of this point, restricted to the images that remain.

Names of tensors: M members, N images, K classes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from sdpctl.cascade import Cascade
from sdpctl.engine.calibrate import CalibratedNorms
from sdpctl.engine.cost import Costs
from sdpctl.instance import Instance
from sdpctl.models.chain import Chain, Norm, Segment
from sdpctl.models.state import State, copied

ROUNDING = 1e-3
"""Maximum change of a confidence's log-odds by rounding, if a different program runs the same network in fp32."""


@dataclass(frozen=True)
class _Step:
    """A segment as one member runs it."""

    segment: Segment
    body: Callable[[State, Norm], State]
    norm: Norm
    ratio: float


class Place(NamedTuple):
    """A state that later members continue from: the result of a segment's body, computed by a member.

    Args:
        member: number of the member.
        level: number of the segment.
    """

    member: int
    level: int


def begins(cascade: Cascade, model: Chain) -> list[Place]:
    """Return where each member except the first begins.

    Raises:
        InstanceError: if the network lacks a point, or two members are the same network.
    """
    levels = {segment.point: level for level, segment in enumerate(model.segments())}
    return [Place(branch.earlier, levels[branch.point]) for branch in cascade.check(model.points).branches(model.points)]


class CascadeRun:
    """A cascade of a network's instances, ready to run.

    A call changes nothing, so threads may call one object at the same time. The caller sets inference mode and autocast.

    Args:
        model: the chain, in evaluation mode.
        cascade: the cascade.
        norms: the norms of statistics that cover all members.

    Raises:
        InstanceError: if the network lacks a point, or two members are the same network.
    """

    def __init__(self, model: Chain, cascade: Cascade, norms: CalibratedNorms) -> None:
        self.cascade = cascade
        self._begins = begins(cascade, model)
        """Where each member except the first begins."""
        segments = model.segments()
        self._steps: list[list[_Step]] = []
        for member in cascade.members:
            passed: list[str] = []
            steps = []
            for segment in segments:
                ratio = 1.0 if segment.point is None else member.ratio(segment.point)
                node = member.among(passed)
                body = norms.heads.get(node, segment.body) if segment is segments[-1] else segment.body
                steps.append(_Step(segment, body, norms([node]), ratio))
                passed += [] if segment.point is None else [segment.point]
            self._steps.append(steps)

    def __call__(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Answer a batch of images.

        Args:
            x_NCHW: normalised images.

        Returns:
            Log-probabilities of each image's answer, (N, K), in at least fp32, and the number of the member that answered each
            image, int64 (N,).
        """
        rows_N = torch.arange(len(x_NCHW), device=x_NCHW.device)
        answers, answered = [], []
        kept: dict[Place, State] = {}
        total_NK = None
        for number in range(len(self._steps)):
            logits_NK = self._logits(number, x_NCHW, kept)
            answer_NK, total_NK = _answer(self.cascade, number, logits_NK, total_NK)
            leaves_N = _leaves(self.cascade, number, answer_NK)
            answers.append(answer_NK[leaves_N])
            answered.append(rows_N[leaves_N])
            stays_N = (~leaves_N).nonzero()[:, 0]
            if not len(stays_N):
                break
            if len(stays_N) < len(rows_N):
                rows_N, total_NK = rows_N[stays_N], total_NK[stays_N]
                for place in kept:
                    kept[place] = tree_map(lambda tensor: tensor[stays_N], kept[place])  # noqa: B023  called at once
        order_N = torch.cat(answered).argsort()
        left = [torch.full_like(rows, number) for number, rows in enumerate(answered)]
        dtype = torch.promote_types(logits_NK.dtype, torch.float32)
        return torch.cat(answers)[order_N].to(dtype), torch.cat(left)[order_N]

    def _logits(self, number: int, x_NCHW: Tensor, kept: dict[Place, State]) -> Tensor:
        """Run a member on the images that remain; keep what later members begin with, and free what no later member needs."""
        later = set(self._begins[number:])
        state, begin = x_NCHW, None
        if number:
            begin = self._begins[number - 1]
            state = kept[begin] if begin in later else kept.pop(begin)
        for level, step in enumerate(self._steps[number]):
            if begin is not None and level < begin.level:
                continue
            place = begin
            if begin is None or level > begin.level:
                state, place = step.body(state, step.norm), Place(number, level)
            if place in later:
                kept[place] = state
                state = copied(state)  # the shrink may modify it in place
            if step.segment.shrink is not None:
                state = step.segment.shrink(state, step.ratio)
        assert isinstance(state, Tensor)
        return state


def _answer(cascade: Cascade, number: int, logits_NK: Tensor, total_NK: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of a member's answer, and the logarithm of the sum of its and all earlier probabilities.

    Both are float64, so that an image leaves at the same member wherever the cascade runs.
    """
    own_NK = torch.log_softmax(logits_NK.double() / cascade.temperatures[number], dim=1)
    if not cascade.averaged or total_NK is None:
        return own_NK, own_NK
    total_NK = torch.logaddexp(total_NK, own_NK)
    return total_NK - math.log(number + 1), total_NK


def _leaves(cascade: Cascade, number: int, answer_NK: Tensor) -> Tensor:
    """Return which images a member answers, bool (N,): those with enough confidence, or all at the last member."""
    if number == len(cascade.thresholds):
        return torch.ones(len(answer_NK), dtype=torch.bool, device=answer_NK.device)
    return answer_NK.amax(1).exp() >= cascade.thresholds[number]


def answers(cascade: Cascade, logits_MNK: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Answer images from the logits of all members.

    Args:
        cascade: the cascade.
        logits_MNK: the logits of each member on all images.

    Returns:
        Log-probabilities of each image's answer, (N, K), in at least fp32, and the number of the member that answered each
        image, int64 (N,).
    """
    total_NK, found, leaves = None, [], []
    for number, logits_NK in enumerate(logits_MNK):
        answer_NK, total_NK = _answer(cascade, number, logits_NK, total_NK)
        found.append(answer_NK)
        leaves.append(_leaves(cascade, number, answer_NK))
    left_N = torch.stack(leaves).int().argmax(0)  # the first that is true
    answers_NK = torch.stack(found)[left_N, torch.arange(len(left_N), device=left_N.device)]
    return answers_NK.to(torch.promote_types(logits_MNK[0].dtype, torch.float32)), left_N


def settled(cascade: Cascade, logits_MNK: Tensor | Sequence[Tensor]) -> Tensor:
    """Return whether rounding cannot send an image to a different member, bool (N,).

    An image is settled if the same member answers it with the log-odds of all thresholds lowered and raised by `ROUNDING`. A
    threshold of 1 stays 1.

    Args:
        cascade: the cascade.
        logits_MNK: the logits of each member on all images.
    """
    low_N, high_N = (
        answers(replace(cascade, thresholds=tuple(_shifted(p, change) for p in cascade.thresholds)), logits_MNK)[1]
        for change in (-ROUNDING, ROUNDING)
    )
    return low_N == high_N


def _shifted(probability: float, change: float) -> float:
    """Return a probability with its log-odds changed."""
    scaled = probability * math.exp(change)
    return scaled / (scaled + 1 - probability)


def added_macs(cascade: Cascade, costs: Costs) -> tuple[int, ...]:
    """Return the MACs that each member adds for an image that reaches it; a shared prefix is counted once.

    Args:
        cascade: the cascade.
        costs: the costs of the network's segments.

    Raises:
        InstanceError: if the network lacks a point, or two members are the same network.
    """
    first = [0, *(place.level + 1 for place in begins(cascade, costs.model))]
    members = zip(cascade.members, first, strict=True)
    return tuple(sum(segment.macs for segment in costs.of(member).segments[level:]) for member, level in members)


def shared_macs(instances: Sequence[Instance], costs: Costs) -> list[list[int]]:
    """Return the MACs of the prefix that each two instances share, a row for each instance.

    Args:
        instances: instances of the network.
        costs: the costs of the network's segments.

    Raises:
        InstanceError: if the network lacks a point.
    """
    upto = [list(accumulate(segment.macs for segment in costs.of(instance).segments)) for instance in instances]
    ratios = [[1.0 if s.point is None else i.ratio(s.point) for s in costs.segments] for i in instances]
    last = len(costs.segments) - 1
    return [
        [macs[next((k for k in range(last) if own[k] != other[k]), last)] for other in ratios]
        for own, macs in zip(ratios, upto, strict=True)
    ]
