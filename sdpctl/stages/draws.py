"""The instances that each training step trains, and what the steps of a training cost."""

from collections import Counter
from random import Random
from statistics import fmean
from typing import TYPE_CHECKING

from sdpctl.budget import BudgetRange
from sdpctl.errors import BudgetError
from sdpctl.instance import FULL, Instance
from sdpctl.models import empty_model
from sdpctl.models.settings import ModelSettings
from sdpctl.randomness import stream
from sdpctl.recipe.schema import Recipe
from sdpctl.sdpoint import Draw, SdpointSettings, draw_beside, draw_independent, draw_listed, draw_single
from sdpctl.stages.network import grid, named

if TYPE_CHECKING:
    from sdpctl.engine.cost import Costs
    from sdpctl.search.space import Space

COUNTED = 2000
"""Maximum number of steps whose instances are counted one by one."""

BACKWARD = 2
"""MACs of a backward pass as a multiple of the forward pass: the gradients of the maps, and those of the weights."""

CLOSE = 0.02
"""Of budgeted draws: the MACs are close to those that a step aims at if they differ by at most this share of `full`."""

TRIES = 100
"""Of budgeted draws: maximum number of walks of a step; after them, the network nearest to the aim is taken."""

TRIES_AT_ALL = 1000
"""Of budgeted draws: maximum number of walks that look for a network within the range before the training begins."""


def make_draw(recipe: Recipe) -> Draw:
    """Return the function that draws the instances of each training step, as the recipe specifies.

    Raises:
        BudgetError: if no network of a budgeted draw is within the range.
        UsageError: if the ends of the range of a budgeted draw are in the wrong order for this network.
    """
    section, seed = recipe.sdpoint, recipe.seed
    if section is None:
        return lambda _: (FULL,)
    if section.instances is not None:
        return draw_listed(named(section.instances, recipe.model.points), seed)
    if section.draw == "independent":
        return draw_independent(recipe.points, recipe.ratios, seed, section.p)
    if section.draw == "budgeted":
        from sdpctl.search.space import Space

        space = Space(_costs(recipe, recipe.model), dict.fromkeys(recipe.points, (1.0, *recipe.ratios)))
        return draw_budgeted(space, seed, None if section.budgets is None else BudgetRange.parse(section.budgets))
    if section.several:
        always = (FULL, _cheapest(recipe)) if section.draw == "sandwich" else (FULL,)
        return draw_beside(always, recipe.grid_points, recipe.ratios, seed, section.number_drawn, _weights(recipe, section))
    if recipe.model.together:
        return draw_listed(grid(recipe), seed)
    return draw_single(recipe.points, recipe.ratios, seed, _weights(recipe, section))


def draw_budgeted(space: "Space", seed: int, budgets: BudgetRange | None = None) -> Draw:
    """Draw networks with any number of points, whose MACs are uniform over a range.

    A step draws the MACs to aim at. It then walks from `full` down to them and lowers the ratio of a random point at a time,
    until a network within the range is close to the aim. Ranges of a few per cent of `full` are respected, but the MACs are not
    uniform within them.

    Args:
        space: the points and ratios, and their MACs.
        seed: seed of the recipe.
        budgets: the range of the MACs; by default from the cheapest network to `full`.

    Raises:
        BudgetError: if no network within the range is found.
        UsageError: if the ends of the range are in the wrong order for this network.
    """
    lowest, highest = (space.least, space.full) if budgets is None else budgets.macs(space.full)
    within = range(max(lowest, space.least), min(highest, space.full) + 1)
    any_network = _nearest(space, stream(seed, "draw", "any"), within[0], within, space.full, TRIES_AT_ALL) if within else None
    if any_network is None:
        raise BudgetError(
            f"sdpoint.budgets={budgets}: no network with {lowest:,} to {highest:,} MACs was found; the networks of these "
            f"points and ratios have {space.least:,} to {space.full:,} MACs: change the range, or give more points or ratios"
        )
    close = int(CLOSE * space.full)

    def draw(step: int) -> tuple[Instance, ...]:
        random = stream(seed, "draw", step)
        aim = random.randint(within[0], within[-1])
        return (_nearest(space, random, aim, within, close, TRIES) or any_network,)

    return draw


def _nearest(space: "Space", random: Random, aim: int, within: range, close: int, tries: int) -> Instance | None:
    """Return the first network on random walks whose MACs are close to the aim, or else the nearest; None if none is within."""
    best: dict[str, float] | None = None
    distance = space.full
    for ratios, macs in (network for _ in range(tries) for network in space.lowered(random, aim)):
        if macs in within and (best is None or abs(macs - aim) < distance):
            best, distance = ratios, abs(macs - aim)
            if distance <= close:
                break
    return None if best is None else space.canonical(Instance(tuple(best.items())))


def training_macs(recipe: Recipe, steps: int, teacher: ModelSettings | None = None) -> int:
    """Return the MACs of one image in all steps of a training, forward and backward passes.

    The convolutions and matrix products of a backward pass take twice the MACs of the forward pass. What the instances of a
    step share is counted once. A teacher from a checkpoint has a forward pass only. Of a training with more than `COUNTED`
    steps, these are counted, and stand for the others.

    Args:
        recipe: the recipe; its network has a number of classes.
        steps: number of steps.
        teacher: the network of a checkpoint that teaches.
    """
    draw, costs, counted = make_draw(recipe), _costs(recipe, recipe.model), min(steps, COUNTED)
    drawn = Counter(draw(step) for step in range(counted))
    macs = (1 + BACKWARD) * sum(times * costs.together(instances) for instances, times in drawn.items())
    taught = 0 if teacher is None else steps * _costs(recipe, teacher).of(FULL).macs
    return (macs if counted == steps else round(macs * steps / counted)) + taught


def _costs(recipe: Recipe, model: ModelSettings) -> "Costs":
    """Return the costs of a network at the size of the training images."""
    from sdpctl.engine.cost import Costs

    size = recipe.data.image_size
    return Costs(empty_model(model), (model.in_channels, size, size))


def _cheapest(recipe: Recipe) -> Instance:
    costs = _costs(recipe, recipe.model)
    return min(grid(recipe), key=lambda instance: costs.of(instance).macs)


def _weights(recipe: Recipe, section: SdpointSettings) -> dict[str, float] | None:
    """Return how often each point, and `full`, is drawn; None if all are drawn equally often."""
    names = (str(FULL), *recipe.grid_points)
    if section.weights is None:
        return None
    if isinstance(section.weights, dict):
        return {name: section.weights.get(name, 1.0) for name in names}
    costs = _costs(recipe, recipe.model)

    def macs(name: str) -> float:
        instances = [FULL] if name == str(FULL) else [Instance(((name, ratio),)) for ratio in recipe.ratios]
        return fmean(costs.of(instance).macs for instance in instances)

    return {name: 1 / macs(name) for name in names}
