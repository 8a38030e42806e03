"""The tree: one walk for many instances.

The instances of a chain form a prefix tree: two instances share a path up to the first point at which their ratios differ. A
*node* is an instance restricted to the points before a segment. A segment's body runs once for each node, not once for each
instance. The walk goes level by level: the nodes of one segment whose states have one shape pass its body as one concatenated
batch, since they share its weights and differ only in their batch norms. If the states of a level do not fit the memory,
`memory_plan.py` decides which of them wait.

Names of tensors: B branches (nodes) in one batch, N images of each, so that a map is (B*N, C, H, W).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sdpctl.engine.footprint import footprints
from sdpctl.engine.memory_plan import MemoryPlan, Room, batches, images_in_part
from sdpctl.errors import ResourceError
from sdpctl.instance import FULL, Instance
from sdpctl.models.chain import Chain, Norm, Segment
from sdpctl.models.state import Shape, State, copied, join, numel, split, state_shape

NodeNorm = Callable[[Sequence[Instance]], Norm]
"""Makes the norm of a concatenated batch, given the node of each branch in it."""

Heads = Mapping[Instance, Callable[[State, Norm], State]]
"""The body of the last segment, for nodes with a classifier of their own."""


class NormsAndHeads(ABC):
    """The norms of a walk in which some nodes have a classifier of their own."""

    heads: Heads

    @abstractmethod
    def __call__(self, nodes: Sequence[Instance]) -> Norm:
        """Return the norm of a concatenated batch of these nodes."""


@dataclass(frozen=True, eq=False)
class _Group:
    """Branches whose states are one tensor (or pytree)."""

    nodes: tuple[Instance, ...]
    state: State

    @cached_property
    def shape(self) -> Shape:
        """The shape of one image's state."""
        return state_shape(self.state)

    @cached_property
    def elements(self) -> int:
        """Number of elements of the whole state."""
        return numel(self.state)

    def branches(self) -> "list[_Group]":
        """Return each branch as a group that shares this group's memory."""
        parts = split(self.state, len(self.nodes))
        return [_Group((node,), state) for node, state in zip(self.nodes, parts, strict=True)]


class Tree:
    """The prefix tree of some instances of a chain.

    Args:
        model: the chain.
        instances: the instances, at least one; duplicates count once.
        memory: bytes that the maps of a walk may take, without the weights; by default `MOST` times those of `full`.

    Raises:
        InstanceError: if an instance names a point that the network lacks.
    """

    def __init__(self, model: Chain, instances: Iterable[Instance], *, memory: int | None = None) -> None:
        self.model = model
        self.segments = model.segments()
        self.instances = tuple(dict.fromkeys(instance.check(model.points) for instance in instances))
        self.memory = memory
        self._plans: dict[tuple[Shape, torch.dtype], MemoryPlan] = {}
        self.children: list[dict[Instance, dict[float, Instance]]] = []
        """For each segment and each of its nodes: the ratios taken at the segment's point, and the node that each leads to."""
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
        """Yield every segment with each of its nodes: one pair for each run of a body."""
        for segment, level in zip(self.segments, self.children, strict=True):
            for node in level:
                yield segment, node

    def needs(self, x_NCHW: Tensor) -> int:
        """Return the minimum memory, in bytes, that a walk of these images needs."""
        return self._plan(x_NCHW).needs(len(x_NCHW)) * _dtype(x_NCHW).itemsize

    def _plan(self, x_NCHW: Tensor) -> MemoryPlan:
        key = state_shape(x_NCHW), _dtype(x_NCHW)
        if key not in self._plans:
            self._plans[key] = MemoryPlan(self.children, footprints(self.model, key[1]), key[0])
        return self._plans[key]

    def _room(self, x_NCHW: Tensor) -> Room | None:
        """Return what a walk of these images may allocate; None for a single instance without a limit, which never waits."""
        if self.memory is None and len(self.instances) == 1:
            return None
        images, itemsize = len(x_NCHW), _dtype(x_NCHW).itemsize
        alone = 0 if self.memory is not None else self._full._plan(x_NCHW).needs(images)
        return self._plan(x_NCHW).room(images, itemsize, memory=self.memory, alone=alone, cache=_cache(x_NCHW.device))

    @cached_property
    def _full(self) -> "Tree":
        return Tree(self.model, [FULL])

    def parts(self, x_NCHW: Tensor) -> Sequence[Tensor]:
        """Split a batch into parts whose maps fit the memory; for evaluation, where images do not influence each other.

        Without a limit a part is large enough to be fast and takes at most `memory_plan.PART_BYTES`.
        """
        images = images_in_part(self.needs(x_NCHW[:1]), self.memory)
        return x_NCHW.chunk(-(-len(x_NCHW) // images))

    def walk(self, x_NCHW: Tensor, norm: NodeNorm) -> dict[Instance, Tensor]:
        """Run all instances on one batch.

        Args:
            x_NCHW: normalised images.
            norm: makes the norm of a concatenated batch from its nodes; it may have heads for some of them.

        Returns:
            The logits of each instance, (N, K).

        Raises:
            ResourceError: if the batch needs more memory than the limit.
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
                logits.update((*branch.nodes, branch.state) for group in groups for branch in group.branches())
                continue
            if room is not None:
                waiting = sum(group.elements for _, others in levels for group in others)
                if later := self._plan(x_NCHW).hold_back(level, groups, waiting, room, _copied_branches):
                    levels.append((level, later))
            joined = 0 if room is None else room.joined
            passed = [group for batch in batches(groups, joined) for group in self._passed(level, batch, norm)]
            passed.sort(key=self._size, reverse=True)
            levels.append((level + 1, passed))
        return {instance: logits[instance.among(self.model.points)] for instance in self.instances}

    def _size(self, group: _Group) -> tuple[int, tuple[int, ...]]:
        """Return what groups are sorted by: the size of a branch, then its shape, so that equal shapes are neighbours."""
        return group.elements // len(group.nodes), self.model.recorded(group.shape)

    def _passed(self, level: int, batch: list[_Group], norm: NodeNorm) -> list[_Group]:
        """Pass a batch of groups through a segment; empty the batch so that its states are freed.

        The ratios are taken in rising order: the last, largest one may overwrite the body's result.
        """
        segment = self.segments[level]
        nodes = tuple(node for group in batch for node in group.nodes)
        state = join([group.state for group in batch])
        batch.clear()
        heads = norm.heads if level == len(self.segments) - 1 and isinstance(norm, NormsAndHeads) else {}
        headed = any(node in heads for node in nodes)
        out = _headed(segment, state, nodes, norm, heads) if headed else segment.body(state, norm(nodes))
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
                    same = state_shape(shrunk) == state_shape(state)  # perhaps in place, in memory that all branches share
                    made.append(_Group((ratios[ratio],), copied(shrunk) if same else shrunk))
        return made


def _headed(segment: Segment, state: State, nodes: Sequence[Instance], norm: NodeNorm, heads: Heads) -> State:
    """Run the last segment. A branch with its own classifier uses it.

    The results of the other branches do not depend on such branches: they stay in one batch with all branches, since a matrix
    product of fewer rows may differ in the last bits.
    """
    states = split(state, len(nodes))
    shared = not all(node in heads for node in nodes)
    outs = split(segment.body(state, norm(nodes)), len(nodes)) if shared else states
    own = [heads[node](part, norm((node,))) if node in heads else None for node, part in zip(nodes, states, strict=True)]
    return join([out if mine is None else mine for out, mine in zip(outs, own, strict=True)])


def _copied_branches(group: _Group) -> list[_Group]:
    """Return each branch as a group with its own memory."""
    return [_Group(branch.nodes, copied(branch.state)) for branch in group.branches()]


def _cache(device: torch.device) -> int:
    """Return the bytes of a GPU's L2 cache; 0 for a CPU."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0


def _dtype(x_NCHW: Tensor) -> torch.dtype:
    device = x_NCHW.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_NCHW.dtype
