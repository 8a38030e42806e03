"""The tree: one walk for many instances.

The instances of a chain form a prefix tree: two share a path as far as their ratios agree. A *node* is an instance
restricted to the points before a segment, and the segment's body runs once per node, not once per instance. The walk
goes level by level: the nodes of one segment whose states have one shape pass its body as one concatenated batch, since
they share its weights and differ in their batch norms alone. Where a level does not fit the memory, the smaller half of it
is walked to the end first; a part of one node is depth first.

Names of tensors: B branches (nodes) in one batch, N images of each, so that a state is (B*N, C, H, W).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdpctl.errors import ResourceError
from sdpctl.instance import FULL, Instance
from sdpctl.models.chain import WHOLE, Chain, Norm, Part, Segment, Shape, State, blank, join, numel, shape_of, split

JOINED_BYTES = 8 * 2**20
"""Branches are joined up to here: a small convolution is slow by itself, a large one gains nothing and costs a copy."""

TIGHT = 0.25
"""How much of that where the memory is limited: of a joined batch nothing is given back before all of it is used."""

HELD = 3
"""Maps as large as the largest that a body holds at once, beside what came in: a convolution's two sides, and a shortcut."""

PART_BYTES = 2**30
"""What the maps of a part of an evaluation batch take at most: larger parts are no faster."""

MOST = 7.5
"""What is held at most unless the memory is limited, in maps as large as the largest of one instance, which holds 2 or 3."""

NodeNorm = Callable[[Sequence[Instance]], Norm]
"""Makes the norm of a concatenated batch, given the node of each branch in it."""


class _Group(NamedTuple):
    """Branches whose states are one tensor (or pair)."""

    nodes: tuple[Instance, ...]
    state: State

    @property
    def branch(self) -> int:
        """Elements of one branch's state."""
        return numel(self.state) // len(self.nodes)


@dataclass(frozen=True)
class _Sizes:
    """How large the maps of `full` are.

    Args:
        widest: elements of the largest map of an image.
        inside: for each segment the largest map of its body, in states that come in.
        out: for each segment what its body hands on, likewise.
    """

    widest: int
    inside: tuple[float, ...]
    out: tuple[float, ...]


class Tree:
    """The prefix tree of some instances of a chain.

    Args:
        model: the chain.
        instances: at least one; doubles count once.
        memory: bytes that the maps of a walk may take, beside weights; by default about three times those of one instance.

    Raises:
        InstanceError: where an instance names a point the network lacks.
    """

    def __init__(self, model: Chain, instances: Iterable[Instance], *, memory: int | None = None) -> None:
        self.model = model
        self.segments = model.segments()
        self.instances = tuple(dict.fromkeys(instance.check(model.points) for instance in instances))
        self.memory = memory
        self._sizes: dict[Shape, _Sizes] = {}
        self.children: list[dict[Instance, dict[float, Instance]]] = []
        """For each segment and each of its nodes: the ratios taken at the segment's point, and the nodes they lead to."""
        passed: list[str] = []
        for segment in self.segments:
            level: dict[Instance, dict[float, Instance]] = {}
            before = tuple(passed)
            if segment.point is not None:
                passed.append(segment.point)
            for instance in self.instances:
                ratio = instance.ratio(segment.point) if segment.point is not None else 1.0
                level.setdefault(instance.among(before), {})[ratio] = instance.among(passed)
            self.children.append(level)

    def nodes(self) -> Iterator[tuple[Segment, Instance]]:
        """Yield every segment with each of its nodes: one run of a body each."""
        for segment, level in zip(self.segments, self.children, strict=True):
            for node in level:
                yield segment, node

    def needs(self, x_NCHW: Tensor) -> int:
        """Return the least memory, in bytes, that a walk of these images takes."""
        ratios = sorted({ratio for level in self.children for ratios in level.values() for ratio in ratios})
        # Depth first, a state s waits while one shrunk by r is walked to the end: w(s) = sum of larger siblings + w(r^2 s).
        waiting = max((sum(r**2 for r in ratios if r > ratio) / (1 - ratio**2) for ratio in ratios if ratio < 1), default=0)
        return math.ceil((HELD + 1 + waiting) * self._of(x_NCHW).widest) * len(x_NCHW) * _itemsize(x_NCHW)

    def parts(self, x_NCHW: Tensor) -> Sequence[Tensor]:
        """Return a batch in parts whose maps fit the memory, where each image stands for itself.

        Unless the memory is limited they are as many images as are no slower alone, and take no more than `PART_BYTES`.
        """
        memory = PART_BYTES if self.memory is None else min(self.memory, PART_BYTES)
        images = max(1, memory // self.needs(x_NCHW[:1]))
        return x_NCHW.chunk(-(-len(x_NCHW) // images))

    def walk(self, x_NCHW: Tensor, norm: NodeNorm) -> dict[Instance, Tensor]:
        """Run all instances on one batch.

        Args:
            x_NCHW: normalised images.
            norm: makes the norm of a concatenated batch from its nodes.

        Returns:
            For each instance its logits, (N, K).

        Raises:
            ResourceError: where the batch needs more memory than there may be.
        """
        if self.memory is not None and (least := self.needs(x_NCHW)) > self.memory:
            raise ResourceError(
                f"memory={self.memory / 2**20:,.0f}MiB does not hold the maps of a batch of {len(x_NCHW)} images, which take "
                f"{least / 2**20:,.0f} MiB; lower the batch size, or raise memory"
            )
        itemsize = _itemsize(x_NCHW)
        alone = len(self.instances) == 1  # one branch is never joined and never waits
        sizes = _Sizes(0, *((1.0,) * len(self.segments),) * 2) if alone else self._of(x_NCHW)
        widest = sizes.widest * len(x_NCHW)
        limit = MOST * widest if self.memory is None else self.memory // itemsize
        logits: dict[Instance, Tensor] = {}
        levels: list[tuple[int, list[_Group]]] = [(0, [_Group((Instance(),), x_NCHW)])]
        while levels:
            level, groups = levels.pop()
            if level == len(self.segments):
                logits.update(
                    (node, state) for group in groups for (node,), state in _apart(group) if isinstance(state, Tensor)
                )
                continue
            joined = int(min(JOINED_BYTES // itemsize, widest / sizes.inside[level]) * (1 if self.memory is None else TIGHT))
            waiting = sum(numel(group.state) for _, others in levels for group in others)
            first = 0
            while waiting + self._peak(level, groups, first, sizes, joined) > limit:
                if first < len(groups) - 1:
                    first += (len(groups) - first + 1) // 2
                elif len(groups[first].nodes) > 1:
                    groups[first:] = _apart(groups[first])
                else:
                    break
            if first:
                levels.append((level, groups[:first]))
            part = groups[first:]
            del groups
            children = [
                child for nodes, out in self._bodies(level, part, joined, norm) for child in self._shrunk(level, nodes, out)
            ]
            levels.append((level + 1, sorted(children, key=lambda group: (group.branch, shape_of(group.state)), reverse=True)))
        return {instance: logits[instance.among(self.model.points)] for instance in self.instances}

    def _peak(self, level: int, groups: list[_Group], first: int, sizes: _Sizes, joined: int) -> float:
        """Elements that are held, at most, while the groups from the first on pass a segment."""
        children = self.children[level]
        states = sum(numel(group.state) for group in groups)
        after = sum(group.branch * len(children[node]) for group in groups[first:] for node in group.nodes)
        largest = max(joined, *(numel(group.state) for group in groups[first:]))
        return states + after * sizes.out[level] + HELD * largest * sizes.inside[level]

    def _bodies(
        self, level: int, part: list[_Group], joined: int, norm: NodeNorm
    ) -> Iterator[tuple[tuple[Instance, ...], State]]:
        """Run a segment's body on the groups, the smallest first, which are used up; those of one shape are joined."""
        while part:
            nodes, state = part.pop()
            size, states = numel(state), [state]
            while part and shape_of(part[-1].state) == shape_of(state) and size + numel(part[-1].state) <= joined:
                more, other = part.pop()
                nodes, size = nodes + more, size + numel(other)
                states.append(other)
            state = join(states)
            states.clear()
            yield nodes, self.segments[level].body(state, norm(nodes))

    def _shrunk(self, level: int, nodes: tuple[Instance, ...], out: State) -> Iterator[_Group]:
        """Shrink what a body made, by the smallest ratio first: the last may overwrite it."""
        shrink, children = self.segments[level].shrink, [self.children[level][node] for node in nodes]
        for ratio in sorted({ratio for ratios in children for ratio in ratios}):
            taken = [ratios[ratio] for ratios in children if ratio in ratios]
            if len(taken) == len(nodes):
                yield _Group(tuple(taken), out if shrink is None else shrink(out, ratio))
                continue
            for ratios, state in zip(children, split(out, len(nodes)), strict=True):
                if ratio in ratios:
                    yield _Group((ratios[ratio],), state if shrink is None else shrink(state, ratio))

    def _of(self, x_NCHW: Tensor) -> _Sizes:
        shape = tuple(x_NCHW.shape[1:])
        if shape not in self._sizes:
            self._sizes[shape] = _measured(self.model, shape)
        return self._sizes[shape]


def _apart(group: _Group) -> list[_Group]:
    """Return the branches of a group, each by itself."""
    return [_Group((node,), state) for node, state in zip(group.nodes, split(group.state, len(group.nodes)), strict=True)]


def _itemsize(x_NCHW: Tensor) -> int:
    device = x_NCHW.device.type
    return torch.get_autocast_dtype(device).itemsize if torch.is_autocast_enabled(device) else x_NCHW.element_size()


def _measured(model: Chain, image_shape: Shape) -> _Sizes:
    """Measure the maps of `full` on the meta device: what batch norms see, and what bodies hand on."""
    seen: list[int] = []

    def norm(_: nn.BatchNorm2d, x_NCHW: Tensor, part: Part = WHOLE, *, own: bool = False) -> Tensor:  # noqa: ARG001
        seen.append(x_NCHW.numel())
        return x_NCHW

    state, widest, inside, out = blank(image_shape), 0, [], []
    for segment in model.on_meta().to(torch.get_default_dtype()).segments():
        came = numel(state)
        with torch.inference_mode():
            state = segment.body(state, norm)
            seen.append(numel(state))
            widest = max(widest, *seen)
            inside.append(max(seen) / came)
            out.append(numel(state) / came)
            state = (
                state if segment.shrink is None or segment.point is None else segment.shrink(state, FULL.ratio(segment.point))
            )
        seen.clear()
    return _Sizes(widest, tuple(inside), tuple(out))
