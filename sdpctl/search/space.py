"""The space of a search: its networks and the exact MACs of each.

Because sizes are rounded, many instances are the same network: two instances are the same network if every point outputs maps
of the same size. A network is written as its *canonical* instance, which has at each point the largest ratio that leads to this
size.

A walk through a space goes from position to position; walks that arrive at a point with maps of one size share the position.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

import torch
from torch import nn

from sdpctl.engine.cost import Costs
from sdpctl.errors import BudgetError, InstanceError, UsageError, did_you_mean
from sdpctl.instance import FULL, Instance
from sdpctl.models import create_model
from sdpctl.models.chain import Chain
from sdpctl.models.state import Shape


@dataclass(frozen=True)
class Layers:
    """The convolutions between two points; a linear layer counts as a 1x1 convolution.

    Args:
        sides: longest side of the kernel of each layer.
        channels: output channels of each layer.
    """

    sides: tuple[int, ...]
    channels: tuple[int, ...]

    @property
    def kernel(self) -> int:
        """The longest side of a kernel; 1 if there are no layers."""
        return max(self.sides, default=1)


@dataclass(frozen=True, eq=False)
class Position:
    """A position of a walk: at a point, after the body of its segment and before its downsampling; or after the last point.

    Args:
        number: number of the point; the number of points after the last one.
        map: (C, H, W) of the map at the point; of several maps, the first; empty after the last point.
        macs: MACs since the previous point.
        onward: the next position for each ratio of the point; ratios that lead to maps of the same size share it.
        least: minimum MACs after this position.
        most: maximum MACs after this position.
    """

    number: int
    map: tuple[int, ...]
    macs: int
    onward: tuple["Position", ...]
    least: int
    most: int


class Space:
    """The networks that have one of several ratios at each of some points.

    Args:
        costs: costs of the chain at one image size.
        ratios: the ratios of each point that may downsample; 1 must be among them.

    Raises:
        InstanceError: if the chain lacks a point.
        UsageError: if a ratio is outside (0, 1], or if 1 is not among them.
    """

    def __init__(self, costs: Costs, ratios: Mapping[str, Sequence[float]]) -> None:
        known = costs.model.points
        for point, choices in ratios.items():
            if point not in known:
                raise InstanceError(
                    f"the network has no point {point!r}{did_you_mean(point, known)}; it has {', '.join(known)}"
                )
            if 1 not in choices or not all(0 < ratio <= 1 for ratio in choices):
                raise UsageError(f"{point}: ratios are above 0 and at most 1, and 1 is among them; got {list(choices)}")
        self.costs = costs
        self.points = tuple(point for point in known if point in ratios)
        self.ratios = {point: tuple(sorted(set(map(float, ratios[point])), reverse=True)) for point in self.points}
        self.actions = max((len(choices) for choices in self.ratios.values()), default=1)
        """Number of actions at a point; a point with fewer ratios allows only the first few."""
        segments = costs.segments
        self._at = [i for i, segment in enumerate(segments) if segment.point in ratios]
        self._positions: dict[tuple[int, Shape], Position] = {}
        self._known: dict[Instance, int] = {}
        self.start = self._position(0, costs.image_shape)
        """The position at the first point."""
        self.least = self.start.macs + self.start.least
        """MACs of the cheapest network."""
        self.full = self.cost(FULL)
        """MACs of the network without downsampling."""
        ends = [-1, *self._at, len(segments) - 1]
        self.layers = tuple(self._layers(range(a + 1, b + 1)) for a, b in pairwise(ends))
        """The layers before each point, and the layers after the last point."""

    @classmethod
    def of(
        cls,
        network: str | Chain,
        image_shape: Sequence[int],
        ratios: Sequence[float] = (1.0, 0.75, 0.5),
        points: Sequence[str] | None = None,
        *,
        num_classes: int = 1000,
    ) -> "Space":
        """Return the space of a network that has the same ratios at each of its points.

        Args:
            network: a chain, or the name of an architecture, whose image channels then follow from the images.
            image_shape: shape of one image, (C, H, W).
            ratios: the ratios of every point.
            points: the points that may downsample; all by default.
            num_classes: number of classes of an architecture given by its name.

        Raises:
            InstanceError: if the network lacks a point.
            UsageError: if there is no such architecture, or a ratio is outside (0, 1], or 1 is not among them.
        """
        if isinstance(network, str):
            with torch.device("meta"):
                network = create_model(network, num_classes=num_classes, in_channels=image_shape[0])
        return cls(Costs(network, image_shape), dict.fromkeys(network.points if points is None else points, ratios))

    def _layers(self, indices: range) -> Layers:
        sides, channels = [], []
        names = (name for i in indices for name in self.costs.segments[i].modules)
        for module in (module for name in names for module in self.costs.model.get_submodule(name).modules()):
            if isinstance(module, nn.Conv2d):
                sides.append(max(module.kernel_size))
                channels.append(module.out_channels)
            elif isinstance(module, nn.Linear):
                sides.append(1)
                channels.append(module.out_features)
        return Layers(tuple(sides), tuple(channels))

    def _position(self, number: int, shape: Shape) -> Position:
        """Return the position at a point, or after the last one, given the shape of the previous point's output."""
        if (number, shape) not in self._positions:
            first = self._at[number - 1] + 1 if number else 0
            last = self._at[number] if number < len(self._at) else len(self.costs.segments)
            macs, here = 0, shape
            for index in range(first, last):
                macs += self.costs.body(index, here)[0]
                here = self.costs.shrunk(index, here, 1.0)
            size: tuple[int, ...] = ()
            onward: list[Position] = []
            if number < len(self._at):
                macs += self.costs.body(last, here)[0]
                size = self.costs.shrunk(last, here, 1.0).maps[0]
                ratios = self.ratios[self.points[number]]
                onward = [self._position(number + 1, self.costs.shrunk(last, here, ratio)) for ratio in ratios]
            self._positions[number, shape] = Position(
                number,
                size,
                macs,
                tuple(onward),
                min((after.macs + after.least for after in onward), default=0),
                max((after.macs + after.most for after in onward), default=0),
            )
        return self._positions[number, shape]

    def require(self, budget: int) -> None:
        """Check that a network is within a budget.

        Raises:
            BudgetError: if no network is; the message names the MACs of the cheapest.
        """
        if budget < self.least:
            share = 100 * self.least / self.full
            raise BudgetError(
                f"no network of this space costs at most {budget:,} MACs: the cheapest costs {self.least:,} ({share:.1f} % of "
                f"`full`); raise --max-macs, or add points or smaller ratios"
            )

    def cost(self, instance: Instance) -> int:
        """Return the MACs of an instance, which may name points and ratios outside the space."""
        if instance not in self._known:
            self._known[instance] = self.macs({point: instance.ratio(point) for point in self.costs.model.points})
        return self._known[instance]

    def macs(self, ratios: Mapping[str, float]) -> int:
        """Return the MACs of the network with these ratios; the ratio of other points is 1."""
        macs, shape = 0, self.costs.image_shape
        for index, segment in enumerate(self.costs.segments):
            macs += self.costs.body(index, shape)[0]
            shape = self.costs.shrunk(index, shape, ratios.get(segment.point or "", 1.0))
        return macs

    def lowered(self, random: Random, target: int) -> Iterator[tuple[dict[str, float], int]]:
        """Yield `full`, then lower the ratio of a random point, step by step, until a network costs at most the target.

        Args:
            random: the random generator.
            target: MACs, at least those of the cheapest network.

        Yields:
            The ratios below 1 and the MACs of each network on the way.
        """
        left = {point: list(ratios[1:]) for point, ratios in self.ratios.items()}
        ratios: dict[str, float] = {}
        macs = self.full
        yield ratios, macs
        while macs > target:
            point = random.choice([point for point, lower in left.items() if lower])
            ratios = {**ratios, point: left[point].pop(0)}
            macs = self.macs(ratios)
            yield ratios, macs

    def canonical(self, instance: Instance) -> Instance:
        """Return the canonical instance of the same network: at each point the largest ratio that leads to the same size."""
        shape, kept = self.costs.image_shape, []
        for index, segment in enumerate(self.costs.segments):
            ratio = 1.0 if segment.point is None else instance.ratio(segment.point)
            handed_on = self.costs.shrunk(index, shape, ratio)
            if segment.point is not None and ratio != 1:
                known = (1.0, *self.ratios.get(segment.point, ()))
                same = [r for r in known if self.costs.shrunk(index, shape, r) == handed_on]
                kept.append((segment.point, max(same, default=ratio)))
            shape = handed_on
        return Instance(tuple(kept))

    def networks(self, budget: int) -> Iterator[Instance]:
        """Yield each network within a budget once, larger ratios first."""
        for choices in self._from(self.start, budget - self.start.macs):
            yield Instance(choices)

    def _from(self, position: Position, left: int) -> Iterator[tuple[tuple[str, float], ...]]:
        if position.number == len(self.points):
            yield ()
            return
        point = self.points[position.number]
        for place, after in enumerate(position.onward):
            if after not in position.onward[:place] and after.macs + after.least <= left:
                for rest in self._from(after, left - after.macs):
                    yield ((point, self.ratios[point][place]), *rest)

    def count(self) -> int:
        """Return the number of networks, regardless of a budget."""
        ways: dict[Position, int] = {self.start: 1}
        for _ in self.points:
            onward: dict[Position, int] = {}
            for position, paths in ways.items():
                for after in set(position.onward):
                    onward[after] = onward.get(after, 0) + paths
            ways = onward
        return sum(ways.values())
