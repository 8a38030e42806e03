"""The space of a search: its networks and the exact MACs of each.

Because sizes are rounded, many instances are the same network: two instances are the same network if every point outputs maps
of the same size. A network is written as its *canonical* instance, which has at each point the largest ratio that leads to this
size.

A walk through a space is at a point after the body of the point's segment and before its downsampling. Its position is the
number of the point and the input shape of that segment.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from torch import nn

from sdpctl.engine.cost import Costs
from sdpctl.errors import BudgetError, InstanceError, UsageError, did_you_mean
from sdpctl.instance import FULL, Instance
from sdpctl.models.state import Shape


@dataclass(frozen=True)
class Layers:
    """The layers between two points.

    Args:
        kernel: longest side of a kernel.
        kernels: output channels, summed over the convolutions; a linear layer counts as a 1x1 convolution.
        stride: product of the strides of all layers.
    """

    kernel: int
    kernels: int
    stride: int


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
        segments = costs.segments
        self._at = [i for i, segment in enumerate(segments) if segment.point in ratios]
        self._legs: dict[tuple[int, Shape], tuple[int, Shape]] = {}
        self._bounds: dict[tuple[int, Shape], tuple[int, int]] = {}
        self.start = self.leg(0, costs.image_shape)
        """MACs before the first point, and the input shape of its segment."""
        self.least = self.start[0] + self.bounds(0, self.start[1])[0]
        """MACs of the cheapest network."""
        self.full = self.cost(FULL)
        """MACs of the network without downsampling."""
        ends = [-1, *self._at, len(segments) - 1]
        self.layers = tuple(self._layers(range(a + 1, b + 1)) for a, b in pairwise(ends))
        """The layers before each point, and the layers after the last point."""

    def _layers(self, indices: range) -> Layers:
        kernel, kernels, stride = 1, 0, 1
        for names in (self.costs.segments[i].modules for i in indices):
            modules = [module for name in names for module in self.costs.model.get_submodule(name).modules()]
            convs = [module for module in modules if isinstance(module, nn.Conv2d)]
            kernel = max([kernel, *(side for conv in convs for side in conv.kernel_size)])
            kernels += sum(conv.out_channels for conv in convs)
            kernels += sum(module.out_features for module in modules if isinstance(module, nn.Linear))
            stride *= max([1, *(side for conv in convs for side in conv.stride)])
        return Layers(kernel, kernels, stride)

    def leg(self, number: int, shape: Shape) -> tuple[int, Shape]:
        """Go from the output of the previous point to a point, or to the end if `number` is the number of points.

        Returns:
            The MACs on the way, and the input shape of the point's segment (at the end, the shape of the logits).
        """
        if (number, shape) not in self._legs:
            first = self._at[number - 1] + 1 if number else 0
            last = self._at[number] if number < len(self._at) else len(self.costs.segments)
            macs, here = 0, shape
            for index in range(first, last):
                macs += self.costs.body(index, here)[0]
                here = self.costs.shrunk(index, here, 1.0)
            if number < len(self._at):
                macs += self.costs.body(last, here)[0]
            self._legs[number, shape] = macs, here
        return self._legs[number, shape]

    def choices(self, number: int, shape: Shape) -> tuple[Shape, ...]:
        """Return the output shape of a point at each of its ratios, given the input shape of its segment."""
        return tuple(self.costs.shrunk(self._at[number], shape, ratio) for ratio in self.ratios[self.points[number]])

    def bounds(self, number: int, shape: Shape) -> tuple[int, int]:
        """Return the minimum and maximum MACs after a point's body, over all remaining choices."""
        if number == len(self.points):
            return 0, 0
        if (number, shape) not in self._bounds:
            ways = []
            for handed_on in set(self.choices(number, shape)):
                macs, there = self.leg(number + 1, handed_on)
                least, most = self.bounds(number + 1, there)
                ways.append((macs + least, macs + most))
            self._bounds[number, shape] = min(w[0] for w in ways), max(w[1] for w in ways)
        return self._bounds[number, shape]

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

    def allowed(self, number: int, shape: Shape, spent: int, budget: int) -> tuple[bool, ...]:
        """Return for each ratio of a point whether the budget can still be met after it.

        Args:
            number: number of the point.
            shape: input shape of its segment.
            spent: MACs so far, including the point's body.
            budget: maximum MACs of the whole network.
        """

        def dearest_to_save(handed_on: Shape) -> int:
            macs, there = self.leg(number + 1, handed_on)
            return macs + self.bounds(number + 1, there)[0]

        return tuple(spent + dearest_to_save(shape) <= budget for shape in self.choices(number, shape))

    def cost(self, instance: Instance) -> int:
        """Return the MACs of an instance, which may name points and ratios outside the space."""
        return self.macs({point: instance.ratio(point) for point in self.costs.model.points})

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
        macs, shape = self.start
        for choices in self._from(0, shape, macs, budget):
            yield Instance(choices)

    def _from(self, number: int, shape: Shape, spent: int, budget: int) -> Iterator[tuple[tuple[str, float], ...]]:
        if number == len(self.points):
            yield ()
            return
        seen = set()
        point, choices = self.points[number], self.choices(number, shape)
        for ratio, handed_on, within in zip(
            self.ratios[point], choices, self.allowed(number, shape, spent, budget), strict=True
        ):
            if within and handed_on not in seen:
                seen.add(handed_on)
                macs, there = self.leg(number + 1, handed_on)
                for rest in self._from(number + 1, there, spent + macs, budget):
                    yield ((point, ratio), *rest)

    def count(self) -> int:
        """Return the number of networks, regardless of a budget."""
        ways: dict[Shape, int] = {self.start[1]: 1}
        for number in range(len(self.points)):
            onward: dict[Shape, int] = {}
            for shape, paths in ways.items():
                for handed_on in set(self.choices(number, shape)):
                    there = self.leg(number + 1, handed_on)[1]
                    onward[there] = onward.get(there, 0) + paths
            ways = onward
        return sum(ways.values())
