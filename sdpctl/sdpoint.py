"""SDPoint, the public method (Kuen et al., CVPR 2018): its grid of instances, and the instance of each training step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

from pydantic import Field

from sdpctl.instance import FULL, Instance
from sdpctl.randomness import stream
from sdpctl.section import Points, Ratios, Section


@dataclass(frozen=True, kw_only=True)
class SdpointSettings(Section):
    """Which instance a training step draws.

    Args:
        ratios: ratios of the instances.
        points: points that shrink.
        draw: `single`, at most one point shrinks, as in the public method; `independent`, each point shrinks with probability
            `p`; `listed`, one of `instances`.
        p: of `independent`: the probability that a point shrinks.
        instances: of `listed`: a step draws one of them, to fine-tune chosen instances.
    """

    ratios: Ratios = (0.5, 0.75)
    points: Points = None
    draw: Literal["single", "independent", "listed"] = "single"
    p: Annotated[float, Field(gt=0, le=1)] = 0.5
    instances: Annotated[tuple[str, ...], Field(min_length=1)] | None = None


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


Draw = Callable[[int], Instance]


def draw_single(points: Sequence[str], ratios: Sequence[float], seed: int) -> Draw:
    """Draw as the public method does: uniformly no point or one of them, then uniformly one of the ratios.

    Returns:
        A pure function from the training step to its instance (Kuen et al. 2018, section 3.2).
    """

    def draw(step: int) -> Instance:
        random = stream(seed, "draw", step)
        chosen = random.randrange(len(points) + 1)
        return FULL if chosen == len(points) else Instance(((points[chosen], random.choice(ratios)),))

    return draw


def draw_independent(points: Sequence[str], ratios: Sequence[float], seed: int, p: float) -> Draw:
    """Shrink each point with probability `p`, by a ratio drawn uniformly: for networks that will be searched.

    Returns:
        A pure function from the training step to its instance.
    """

    def draw(step: int) -> Instance:
        random = stream(seed, "draw", step)
        return Instance(tuple((point, random.choice(ratios)) for point in points if random.random() < p))

    return draw


def draw_listed(instances: Sequence[Instance], seed: int) -> Draw:
    """Draw uniformly among some instances: to fine-tune chosen instances.

    Returns:
        A pure function from the training step to its instance.
    """

    def draw(step: int) -> Instance:
        return stream(seed, "draw", step).choice(instances)

    return draw
