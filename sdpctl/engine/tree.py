"""The tree: one walk for many instances.

The instances of a chain form a prefix tree: two share a path as far as their ratios agree. A *node* is an instance
restricted to the points before a segment, and the segment's body runs once per node, not once per instance. The walk
goes level by level: the nodes of one segment whose states have one shape pass its body as one concatenated batch, since
they share its weights and differ in their batch norms alone. Where a level does not fit the memory it is split into parts,
each walked to the end before the next begins; a part of one node is depth first.

Names of tensors: B branches (nodes) in one batch, N images of each, so that a state is (B*N, C, H, W).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

from torch import Tensor

from sdpctl.instance import Instance
from sdpctl.models.chain import Chain, Norm, Segment, State, join, shape_of, size_of, split

LEVEL_BYTES = 256 * 2**20
"""What the states of one level may take before the level is split: the working memory of a body is a few times that."""

NodeNorm = Callable[[Sequence[Instance]], Norm]
"""Makes the norm of a concatenated batch, given the node of each branch in it."""

Branch = tuple[Instance, State]


class Tree:
    """The prefix tree of some instances of a chain.

    Args:
        model: the chain.
        instances: at least one; doubles count once.
        level_bytes: what the states of one level may take.

    Raises:
        InstanceError: where an instance names a point the network lacks.
    """

    def __init__(self, model: Chain, instances: Iterable[Instance], *, level_bytes: int = LEVEL_BYTES) -> None:
        self.model = model
        self.segments = model.segments()
        self.instances = tuple(dict.fromkeys(instance.check(model.points) for instance in instances))
        self.level_bytes = level_bytes
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

    def walk(self, x_NCHW: Tensor, norm: NodeNorm) -> dict[Instance, Tensor]:
        """Run all instances on one batch.

        Args:
            x_NCHW: normalised images.
            norm: makes the norm of a concatenated batch from its nodes.

        Returns:
            For each instance its logits, (N, K).
        """
        logits: dict[Instance, Tensor] = {}
        self._descend(0, [(Instance(), x_NCHW)], norm, logits)
        return {instance: logits[instance.among(self.model.points)] for instance in self.instances}

    def _descend(self, level: int, branches: list[Branch], norm: NodeNorm, logits: dict[Instance, Tensor]) -> None:
        if level == len(self.segments):
            logits.update((instance, state) for instance, state in branches if isinstance(state, Tensor))
            return
        for part in self._parts(branches):
            states: list[Branch] = []
            by_shape = sorted(part, key=lambda branch: shape_of(branch[1]))
            for _, group in groupby(by_shape, key=lambda branch: shape_of(branch[1])):
                states.extend(self._advance(level, list(group), norm))
            self._descend(level + 1, states, norm, logits)

    def _parts(self, branches: list[Branch]) -> Iterator[list[Branch]]:
        part: list[Branch] = []
        size = 0
        for branch in branches:
            if part and size + size_of(branch[1]) > self.level_bytes:
                yield part
                part, size = [], 0
            part.append(branch)
            size += size_of(branch[1])
        yield part

    def _advance(self, level: int, group: list[Branch], norm: NodeNorm) -> Iterator[Branch]:
        segment = self.segments[level]
        nodes = [node for node, _ in group]
        out = segment.body(join([state for _, state in group]), norm(nodes))
        for node, state in zip(nodes, split(out, len(nodes)), strict=True):
            for ratio, child in self.children[level][node].items():
                yield child, state if segment.shrink is None else segment.shrink(state, ratio)
