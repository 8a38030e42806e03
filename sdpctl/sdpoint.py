"""SDPoint (Kuen et al., CVPR 2018): its grid of instances, and the instances that a training step trains."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

from pydantic import BeforeValidator, Field

from sdpctl.errors import UsageError, shown
from sdpctl.instance import FULL, Instance
from sdpctl.randomness import stream
from sdpctl.section import MacsRange, Points, Ratios, Section, one_is_none

HIGHEST_WEIGHT = 1e6
"""Maximum of a weight in a recipe."""


def _weights(value: object) -> object:
    if isinstance(value, Mapping):
        for name, weight in value.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= HIGHEST_WEIGHT:
                raise ValueError(f"{shown(name)}: a weight is a number from 0 to {HIGHEST_WEIGHT:,.0f}, got {shown(weight)}")
        return {name: float(weight) for name, weight in value.items()} or None
    if value not in (None, "uniform", "cost"):
        raise ValueError(f"write uniform, cost, or a number for each point, such as {{stem: 3}}; got {shown(value)}")
    return None if value == "uniform" else value  # one spelling of a recipe has one key


Weights = Annotated[Literal["cost"] | dict[str, float] | None, BeforeValidator(_weights)]
"""How often each point is drawn."""


@dataclass(frozen=True, kw_only=True)
class SdpointSettings(Section):
    """Which instances a training step trains.

    Args:
        ratios: ratios of the instances.
        points: points that shrink.
        draw: `single`, at most one point shrinks, as in the public method; `independent`, each point shrinks with probability
            `p`; `budgeted`, any number of points shrink, and the MACs are uniform over `budgets`; `listed`, one of
            `instances`; `pair`, `full` and `drawn` instances with one point; `sandwich`, `full`, the cheapest instance, and
            `drawn` instances with one point (Yu & Huang 2019). The instances of a step share what they have in common, and
            their losses are added.
        p: of `independent`: the probability that a point shrinks.
        budgets: of `budgeted`: the range of the MACs, as shares of `full` or as MACs; from the cheapest network of the points
            and ratios to `full` by default.
        instances: of `listed`: a step draws one of them, to fine-tune chosen instances.
        drawn: of `pair` and `sandwich`: the number of instances that a step draws; 1 by default.
        weights: of `single`, `pair` and `sandwich`: how often each point is drawn, compared with the others; equally often
            by default. `cost`, in inverse proportion to the MACs of its instances, so that each point gets equally many MACs of
            training; or a number by point, where `full` stands for no point, and 1 is the number of every other point.
    """

    ratios: Ratios = (0.5, 0.75)
    points: Points = None
    draw: Literal["single", "independent", "budgeted", "listed", "pair", "sandwich"] = "single"
    p: Annotated[float, Field(gt=0, le=1)] = 0.5
    budgets: MacsRange | None = None
    instances: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    drawn: Annotated[Annotated[int, Field(ge=1, le=16)] | None, BeforeValidator(one_is_none)] = None
    weights: Weights = None

    @property
    def several(self) -> bool:
        """Whether a step trains several instances, `full` among them."""
        return self.draw in ("pair", "sandwich")

    @property
    def many_points(self) -> bool:
        """Whether any number of points may shrink in a step, which gives maps of many sizes."""
        return self.draw in ("independent", "budgeted")

    @property
    def number_drawn(self) -> int:
        """The number of instances that a step draws."""
        return self.drawn or 1


class HasPoints(Protocol):
    """An object with points in network order, such as a model or a recipe."""

    @property
    def grid_points(self) -> Sequence[str]:
        """The names of the points, or `all` if all points shrink together."""


def sdpoint_instances(model: HasPoints, ratios: Sequence[float] = (0.5, 0.75)) -> list[Instance]:
    """List the instances of the grid: `full`, then each point alone, or all points together, at each ratio.

    Args:
        model: a model, or the settings of one.
        ratios: sizes kept, in (0, 1).
    """
    return [FULL, *(Instance(((point, ratio),)) for point in model.grid_points for ratio in ratios)]


Draw = Callable[[int], tuple[Instance, ...]]
"""Maps a training step to the instances that it trains: a pure function."""


def draw_single(points: Sequence[str], ratios: Sequence[float], seed: int, weights: Mapping[str, float] | None = None) -> Draw:
    """Draw as the public method does: no point or one of them, then a ratio, uniformly (Kuen et al. 2018, section 3.2).

    Args:
        points: the points.
        ratios: sizes kept, in (0, 1).
        seed: seed of the recipe.
        weights: how often each point is drawn, and `full` for no point; equally often by default.
    """

    def draw(step: int) -> tuple[Instance, ...]:
        random = stream(seed, "draw", step)
        if weights is None:
            chosen = random.randrange(len(points) + 1)
        else:
            chosen = random.choices(range(len(points) + 1), [weights[point] for point in (*points, str(FULL))])[0]
        return (FULL,) if chosen == len(points) else (Instance(((points[chosen], random.choice(ratios)),)),)

    return draw


def draw_independent(points: Sequence[str], ratios: Sequence[float], seed: int, p: float) -> Draw:
    """Shrink each point with probability `p`, by a ratio drawn uniformly: for networks that will be searched."""

    def draw(step: int) -> tuple[Instance, ...]:
        random = stream(seed, "draw", step)
        return (Instance(tuple((point, random.choice(ratios)) for point in points if random.random() < p)),)

    return draw


def draw_listed(instances: Sequence[Instance], seed: int) -> Draw:
    """Draw uniformly among some instances: to fine-tune chosen instances."""

    def draw(step: int) -> tuple[Instance, ...]:
        return (stream(seed, "draw", step).choice(instances),)

    return draw


def draw_beside(
    always: Sequence[Instance],
    points: Sequence[str],
    ratios: Sequence[float],
    seed: int,
    drawn: int,
    weights: Mapping[str, float] | None = None,
) -> Draw:
    """Train some instances in every step, and beside them a number of different instances with one point.

    With `full`, the cheapest instance and drawn ones this is the sandwich rule (Yu & Huang 2019, section 3.2).

    Args:
        always: the instances of every step.
        points: the points of the drawn instances.
        ratios: sizes kept, in (0, 1).
        seed: seed of the recipe.
        drawn: number of drawn instances.
        weights: how often each point is drawn; equally often by default. A point of weight 0 is not drawn.

    Raises:
        UsageError: if there are fewer instances to draw.
    """
    numbers = dict.fromkeys(points, 1.0) if weights is None else weights
    grid = [Instance(((point, ratio),)) for point in points if numbers[point] > 0 for ratio in ratios]
    drawable = [instance for instance in grid if instance not in always]
    if drawn > len(drawable):
        raise UsageError(
            f"a step draws {drawn} of the instances that are not in every step, and there are {len(drawable)}: lower "
            "sdpoint.drawn, or give more points or ratios"
        )
    often = [numbers[instance.choices[0][0]] for instance in drawable]

    def draw(step: int) -> tuple[Instance, ...]:
        random, left, chosen = stream(seed, "draw", step), list(range(len(drawable))), list[int]()
        for _ in range(drawn):
            (number,) = random.choices(left, [often[k] for k in left])
            left.remove(number)
            chosen.append(number)
        return (*always, *(drawable[number] for number in sorted(chosen)))

    return draw
