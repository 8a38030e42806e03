"""The tree: one walk for many instances.

The instances of a chain form a prefix tree: two share a path as far as their ratios agree. A *node* is an instance
restricted to the points before a segment, and the segment's body runs once per node, not once per instance. The walk
goes level by level: the nodes of one segment whose states have one shape pass its body as one concatenated batch, since
they share its weights and differ in their batch norms alone. Where a level does not fit the memory, the smaller half of it
is walked to the end first; a part of one node is depth first.

Names of tensors: B branches (nodes) in one batch, N images of each, so that a state is (B*N, C, H, W).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sdpctl.engine.footprint import Footprints, footprints
from sdpctl.errors import ResourceError
from sdpctl.instance import FULL, Instance
from sdpctl.models.chain import Chain, Norm, Segment, Shape, State, copied, join, numel, shape_of, split

JOINED_BYTES = 8 * 2**20
"""Branches are joined up to here: a small convolution is slow by itself, a large one gains nothing and costs a copy."""

PART_BYTES = 2**30
"""What the maps of a part of an evaluation batch take at most: larger parts are no faster."""

MOST = 2.2
"""What is held at most unless the memory is limited, as a multiple of what `full` holds by itself."""

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


class _Room(NamedTuple):
    """What a walk may hold.

    Args:
        footprints: of the chain's steps.
        least: elements that an image takes at least from each level and node on.
        images: in a branch.
        limit: elements that are held at once at most.
        joined: elements of a joined batch at most.
    """

    footprints: Footprints
    least: dict[tuple[int, Instance], int]
    images: int
    limit: int
    joined: int


class Tree:
    """The prefix tree of some instances of a chain.

    Args:
        model: the chain.
        instances: at least one; doubles count once.
        memory: bytes that the maps of a walk may take, beside weights; by default `MOST` times those of `full`.

    Raises:
        InstanceError: where an instance names a point the network lacks.
    """

    def __init__(self, model: Chain, instances: Iterable[Instance], *, memory: int | None = None) -> None:
        self.model = model
        self.segments = model.segments()
        self.instances = tuple(dict.fromkeys(instance.check(model.points) for instance in instances))
        self.memory = memory
        self._least: dict[tuple[Shape, torch.dtype], dict[tuple[int, Instance], int]] = {}
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
        return self._least_of(x_NCHW)[0, Instance()] * len(x_NCHW) * _dtype(x_NCHW).itemsize

    def _least_of(self, x_NCHW: Tensor) -> dict[tuple[int, Instance], int]:
        """Return the elements that an image takes at least from each level and node on."""
        dtype, shape = _dtype(x_NCHW), shape_of(x_NCHW)
        if (shape, dtype) not in self._least:
            least = self._least[shape, dtype] = {}
            self._walk_depth_first(footprints(self.model, dtype), 0, Instance(), shape, x_NCHW[:1].numel(), least)
        return self._least[shape, dtype]

    def _walk_depth_first(
        self, known: Footprints, level: int, node: Instance, shape: Shape, size: int, least: dict[tuple[int, Instance], int]
    ) -> None:
        """Note what a node and all below it take, one branch after another, the smallest first."""
        if level == len(self.segments):
            least[level, node] = size
            return
        body = known.body(level, shape)
        peak, made, children = size + body.held, body.size, []
        for ratio, child in sorted(self.children[level][node].items()):
            shrunk = known.shrink(level, ratio, body.shape)
            self._walk_depth_first(known, level + 1, child, shrunk.shape, shrunk.size, least)
            peak = max(peak, made + shrunk.held)
            made += shrunk.size if shrunk.held else 0
            children.append((shrunk.size, least[level + 1, child]))
        least[level, node] = max(peak, _in_turn(children))

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
        room = self._room(x_NCHW)
        logits: dict[Instance, Tensor] = {}
        levels: list[tuple[int, list[_Group]]] = [(0, [_Group((Instance(),), x_NCHW)])]
        while levels:
            level, groups = levels.pop()
            if level == len(self.segments):
                logits.update(
                    (node, state) for group in groups for (node,), state in _apart(group) if isinstance(state, Tensor)
                )
                continue
            if room is not None:
                waiting = sum(numel(group.state) for _, others in levels for group in others)
                if later := self._later(level, groups, waiting, room):
                    levels.append((level, later))
            joined = 0 if room is None else room.joined
            passed = [group for batch in _batches(groups, joined) for group in self._passed(level, batch, norm)]
            passed.sort(key=lambda group: (group.branch, shape_of(group.state)), reverse=True)
            levels.append((level + 1, passed))
        return {instance: logits[instance.among(self.model.points)] for instance in self.instances}

    def _later(self, level: int, groups: list[_Group], waiting: int, room: _Room) -> list[_Group]:
        """Take off the groups those that must wait, so that the others, the smaller ones, may pass a segment together."""
        first = 0
        while waiting + self._peak(level, groups, first, room) > room.limit:
            if first < len(groups) - 1:
                first += (len(groups) - first + 1) // 2
            elif len(groups[first].nodes) > 1:
                groups.extend(_Group(group.nodes, copied(group.state)) for group in _apart(groups.pop()))
            else:
                break
        later = groups[:first]
        del groups[:first]
        return later

    def _room(self, x_NCHW: Tensor) -> _Room | None:
        """Return what a walk of these images may hold; None where one branch, which never waits, has all it needs."""
        if self.memory is None and len(self.instances) == 1:
            return None
        dtype, needs = _dtype(x_NCHW), self.needs(x_NCHW)
        if self.memory is None:
            alone = self._alone.needs(x_NCHW)
            joined = min(JOINED_BYTES, alone // 8)
            limit = max(int(MOST * alone), needs)
        else:  # the copy of branches that are taken apart needs room, too
            joined = min(JOINED_BYTES, self.memory - needs)
            limit = self.memory - joined
        known, least = footprints(self.model, dtype), self._least_of(x_NCHW)
        return _Room(known, least, len(x_NCHW), limit // dtype.itemsize, joined // dtype.itemsize)

    @cached_property
    def _alone(self) -> "Tree":
        return Tree(self.model, [FULL])

    def _peak(self, level: int, groups: list[_Group], first: int, room: _Room) -> int:
        """Return the elements that are held, at most, if the groups from the first on pass a segment together.

        That is while they do, and afterwards where they go on depth first.
        """
        waiting = sum(numel(group.state) for group in groups[:first])
        held = peak = sum(numel(group.state) for group in groups)
        passed: list[tuple[int, int]] = []
        for batch in _batches(groups[first:], room.joined):
            came = sum(numel(group.state) for group in batch)
            nodes = [node for group in batch for node in group.nodes]
            body = room.footprints.body(level, shape_of(batch[0].state))
            during, made = came + body.held * len(nodes) * room.images, body.size * len(nodes) * room.images
            peak = max(peak, held + came * (len(batch) > 1), held - came + during)
            held -= came
            times = Counter(ratio for node in nodes for ratio in self.children[level][node])
            shrunk = {ratio: room.footprints.shrink(level, ratio, body.shape) for ratio in times}
            for ratio, count in times.items():
                made += max(shrunk[ratio].held, shrunk[ratio].size if count < len(nodes) else 0) * count * room.images
            peak = max(peak, held + made)
            held += sum(shrunk[ratio].size * count for ratio, count in times.items()) * room.images
            passed += [
                (shrunk[ratio].size * room.images, room.least[level + 1, child] * room.images)
                for node in nodes
                for ratio, child in self.children[level][node].items()
            ]
        return max(peak, waiting + _in_turn(passed))

    def _passed(self, level: int, batch: list[_Group], norm: NodeNorm) -> list[_Group]:
        """Take a batch of groups through a segment, which uses them up; the last ratio, the largest, may overwrite the sum."""
        segment = self.segments[level]
        nodes = tuple(node for group in batch for node in group.nodes)
        state = join([group.state for group in batch])
        batch.clear()
        out = segment.body(state, norm(nodes))
        del state
        children, made = [self.children[level][node] for node in nodes], []
        for ratio in sorted({ratio for ratios in children for ratio in ratios}):
            taken = tuple(ratios[ratio] for ratios in children if ratio in ratios)
            if len(taken) == len(nodes):
                made.append(_Group(taken, out if segment.shrink is None else segment.shrink(out, ratio)))
                continue
            assert segment.shrink is not None  # without a point there is one ratio
            for ratios, state in zip(children, split(out, len(nodes)), strict=True):
                if ratio in ratios:
                    shrunk = segment.shrink(state, ratio)
                    made.append(_Group((ratios[ratio],), copied(shrunk) if shape_of(shrunk) == shape_of(state) else shrunk))
        return made


def _batches(groups: list[_Group], joined: int) -> Iterator[list[_Group]]:
    """Take groups off a list, the smallest first: those of one shape together, up to so many elements."""
    while groups:
        batch = [groups.pop()]
        size = numel(batch[0].state)
        while groups and shape_of(groups[-1].state) == shape_of(batch[0].state) and size + numel(groups[-1].state) <= joined:
            batch.append(groups.pop())
            size += numel(batch[-1].state)
        yield batch


def _in_turn(branches: list[tuple[int, int]]) -> int:
    """Return what is held where branches of a size, which take so much each, are used up, the smallest first."""
    waiting = sum(size for size, _ in branches)
    peak = waiting
    for size, takes in sorted(branches):
        waiting -= size
        peak = max(peak, waiting + takes)
    return peak


def _apart(group: _Group) -> list[_Group]:
    """Return the branches of a group, each by itself."""
    return [_Group((node,), state) for node, state in zip(group.nodes, split(group.state, len(group.nodes)), strict=True)]


def _dtype(x_NCHW: Tensor) -> torch.dtype:
    device = x_NCHW.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_NCHW.dtype
