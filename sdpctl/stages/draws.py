"""The instances that each training step trains, and what the steps of a training cost."""

from collections import Counter
from statistics import fmean
from typing import TYPE_CHECKING

from sdpctl.instance import FULL, Instance
from sdpctl.models import empty_model
from sdpctl.models.settings import ModelSettings
from sdpctl.recipe.schema import Recipe
from sdpctl.sdpoint import Draw, SdpointSettings, draw_beside, draw_independent, draw_listed, draw_single
from sdpctl.stages.network import grid, named

if TYPE_CHECKING:
    from sdpctl.engine.cost import Costs

COUNTED = 2000
"""Maximum number of steps whose instances are counted one by one."""

BACKWARD = 2
"""MACs of a backward pass as a multiple of the forward pass: the gradients of the maps, and those of the weights."""


def make_draw(recipe: Recipe) -> Draw:
    """Return the function that draws the instances of each training step, as the recipe specifies."""
    section, seed = recipe.sdpoint, recipe.seed
    if section is None:
        return lambda _: (FULL,)
    if section.instances is not None:
        return draw_listed(named(section.instances, recipe.model.points), seed)
    if section.draw == "independent":
        return draw_independent(recipe.points, recipe.ratios, seed, section.p)
    if section.several:
        always = (FULL, _cheapest(recipe)) if section.draw == "sandwich" else (FULL,)
        return draw_beside(always, recipe.grid_points, recipe.ratios, seed, section.number_drawn, _weights(recipe, section))
    if recipe.model.together:
        return draw_listed(grid(recipe), seed)
    return draw_single(recipe.points, recipe.ratios, seed, _weights(recipe, section))


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
