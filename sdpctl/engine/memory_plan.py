"""The memory of a walk: which branches may pass a segment together so that their maps fit.

A branch is one node of the prefix tree with the state of its images. A group is branches whose states are one tensor (or
pytree). At every segment the walk asks `MemoryPlan.hold_back` which groups must wait. The groups that wait pass later, when the
others have reached the end. With one branch at a time the walk is depth first, which needs the least memory: `least`.

Everything here is arithmetic on numbers of elements. Nothing is allocated and no network is needed, only its footprints.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

from sdpctl.engine.footprint import Footprint
from sdpctl.instance import Instance
from sdpctl.models.state import Shape

JOINED_BYTES = 8 * 2**20
"""Maximum bytes of a joined batch on a CPU: joining speeds up small convolutions; large ones only pay for the copy."""

JOINED_CACHES = 8
"""Maximum bytes of a joined batch on a GPU, as a multiple of its L2 cache: fewer branches at a time do not keep it busy."""

PART_BYTES = 2**30
"""Maximum bytes of the maps of a part of an evaluation batch: larger parts are not faster."""

MOST = 2.2
"""Memory of a walk without a limit, as a multiple of what `full` alone needs."""

Level = Mapping[Instance, Mapping[float, Instance]]
"""For each node of a segment: the ratios taken at the segment's point, and the node that each leads to."""


class Steps(Protocol):
    """The footprints of a chain's steps."""

    def body(self, level: int, shape: Shape, /) -> Footprint:
        """Return the footprint of a segment's body, given the shape of its input."""

    def shrink(self, level: int, ratio: float, shape: Shape, /) -> Footprint:
        """Return the footprint of a segment's shrink, given the shape of the body's result."""


class Group(Protocol):
    """Branches whose states are one tensor (or pytree)."""

    @property
    def nodes(self) -> Sequence[Instance]:
        """The node of each branch."""

    @property
    def shape(self) -> Shape:
        """The shape of one image's state."""

    @property
    def elements(self) -> int:
        """Number of elements of the whole state: of all branches and images."""


AnyGroup = TypeVar("AnyGroup", bound=Group)


class Room(NamedTuple):
    """What the walk of one batch may allocate.

    Args:
        images: number of images in each branch.
        limit: maximum number of elements at the peak.
        joined: maximum number of elements of a joined batch.
    """

    images: int
    limit: int
    joined: int


class MemoryPlan:
    """The memory that the walk of a tree needs.

    Args:
        levels: the nodes of each segment, with their children.
        steps: footprints of the segments.
        shape: shape of one image.
    """

    def __init__(self, levels: Sequence[Level], steps: Steps, shape: Shape) -> None:
        self.levels, self.steps = levels, steps
        self.least: dict[tuple[int, Instance], int] = {}
        """Minimum number of elements per image needed to finish from (level, node)."""
        self._fill_least(0, Instance(), shape)

    def _fill_least(self, level: int, node: Instance, shape: Shape) -> int:
        """Compute the minimum for a node and all nodes below it: one branch after another, the smallest first."""
        if level == len(self.levels):
            return self.least.setdefault((level, node), shape.elements)
        body = self.steps.body(level, shape)
        peak, made, children = shape.elements + body.held, body.shape.elements, []
        for ratio, child in sorted(self.levels[level][node].items()):
            shrunk = self.steps.shrink(level, ratio, body.shape)
            size = shrunk.shape.elements
            children.append((size, self._fill_least(level + 1, child, shrunk.shape)))
            peak = max(peak, made + shrunk.held)
            made += size if shrunk.held else 0
        return self.least.setdefault((level, node), max(peak, peak_in_turn(children)))

    def needs(self, images: int) -> int:
        """Return the minimum number of elements that the walk of some images needs."""
        return self.least[0, Instance()] * images

    def room(self, images: int, itemsize: int, *, memory: int | None, alone: int, cache: int = 0) -> Room:
        """Return what the walk of a batch may allocate.

        Args:
            images: number of images in the batch.
            itemsize: bytes per element.
            memory: maximum bytes of the maps, at least as many as `needs` returns elements for; None for `MOST` times what
                `full` needs.
            alone: number of elements that `full` alone needs; used only if `memory` is None.
            cache: bytes of a GPU's L2 cache; 0 for a CPU.
        """
        needs = self.needs(images) * itemsize
        most = JOINED_CACHES * cache or JOINED_BYTES
        if memory is None:
            joined = most if cache else min(most, alone * itemsize // 8)
            limit = max(int(MOST * alone * itemsize), needs) + (joined if cache else 0)
        else:  # a copy of the joined batch, or of branches that are taken apart, needs memory as well
            joined = min(most, memory - needs)
            limit = memory - joined
        return Room(images, limit // itemsize, joined // itemsize)

    def hold_back(
        self,
        level: int,
        groups: list[AnyGroup],
        waiting: int,
        room: Room,
        take_apart: Callable[[AnyGroup], Iterable[AnyGroup]],
    ) -> list[AnyGroup]:
        """Remove from the list the groups that must wait, and return them.

        The larger half waits until the others fit. A single group that does not fit is split into its branches. A single branch
        passes even if it does not fit, since `room` allows at least the elements that `needs` returns.

        Args:
            level: the segment to pass.
            groups: the largest states first; the groups that may pass together remain.
            waiting: number of elements of the groups that wait at other levels.
            room: the memory that the walk may allocate.
            take_apart: returns the branches of a group as groups.
        """
        first = 0
        while waiting + self.peak(level, groups, first, room) > room.limit:
            if first < len(groups) - 1:
                first += (len(groups) - first + 1) // 2
            elif len(groups[first].nodes) > 1:
                groups.extend(take_apart(groups.pop()))
            else:
                break
        later = groups[:first]
        del groups[:first]
        return later

    def peak(self, level: int, groups: Sequence[Group], first: int, room: Room) -> int:
        """Return the peak number of elements if the groups from index `first` on pass a segment together.

        It is the peak while they pass, and afterwards if they finish one branch after another. All groups count from the start.
        """
        waiting = sum(group.elements for group in groups[:first])
        held = peak = sum(group.elements for group in groups)
        passed: list[tuple[int, int]] = []
        for batch in batches(list(groups[first:]), room.joined):
            came = sum(group.elements for group in batch)
            nodes = [node for group in batch for node in group.nodes]
            body = self.steps.body(level, batch[0].shape)
            during, made = came + body.held * len(nodes) * room.images, body.shape.elements * len(nodes) * room.images
            peak = max(peak, held + came * (len(batch) > 1), held - came + during)
            held -= came
            times = Counter(ratio for node in nodes for ratio in self.levels[level][node])
            shrunk = {ratio: self.steps.shrink(level, ratio, body.shape) for ratio in times}
            for ratio, count in times.items():
                # Branches that do not all take a ratio are shrunk one by one, and copied where shrinking is in place.
                copies = shrunk[ratio].shape.elements if count < len(nodes) else 0
                made += max(shrunk[ratio].held, copies) * count * room.images
            peak = max(peak, held + made)
            held += sum(shrunk[ratio].shape.elements * count for ratio, count in times.items()) * room.images
            passed += [
                (shrunk[ratio].shape.elements * room.images, self.least[level + 1, child] * room.images)
                for node in nodes
                for ratio, child in self.levels[level][node].items()
            ]
        return max(peak, waiting + peak_in_turn(passed))


def images_in_part(needs: int, memory: int | None) -> int:
    """Return how many images an evaluation batch may take through a walk at once, at least one.

    Args:
        needs: bytes that the walk of one image needs.
        memory: bytes that the maps may take; at most `PART_BYTES` are used.
    """
    return max(1, (PART_BYTES if memory is None else min(memory, PART_BYTES)) // needs)


def batches(groups: list[AnyGroup], joined: int) -> Iterator[list[AnyGroup]]:
    """Take groups off the end of a list, in batches of one shape with at most `joined` elements (or one group)."""
    while groups:
        batch = [groups.pop()]
        size = batch[0].elements
        while groups and groups[-1].shape == batch[0].shape and size + groups[-1].elements <= joined:
            batch.append(groups.pop())
            size += batch[-1].elements
        yield batch


def peak_in_turn(branches: Iterable[tuple[int, int]]) -> int:
    """Return the peak number of elements when branches finish one after another, the smallest first.

    Args:
        branches: for each branch, the elements of its state, and the elements needed to finish it, including its state.
    """
    branches = sorted(branches)
    waiting = peak = sum(size for size, _ in branches)
    for size, needed in branches:
        waiting -= size
        peak = max(peak, waiting + needed)
    return peak
