"""Profiling: count the cost of instances, without data or weights."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdpctl.engine.settings import ProfileSettings
from sdpctl.errors import IntegrityError, NotFoundError, UsageError
from sdpctl.instance import FULL, Instance
from sdpctl.kinds import COSTS, PROFILE
from sdpctl.models import empty_model
from sdpctl.models.registry import ARCHITECTURES, Stem, architecture
from sdpctl.models.settings import ModelSettings
from sdpctl.recipe.load import load_recipe
from sdpctl.recipe.schema import Recipe
from sdpctl.sdpoint import sdpoint_instances
from sdpctl.stages.context import Context
from sdpctl.stages.network import TrainedNetwork, counted, grid, named, open_network
from sdpctl.stages.optional import OptionalStage
from sdpctl.stages.stage import Job, Made, Steps, key_of
from sdpctl.stages.workspace import with_classes
from sdpctl.store.layout import canonical

if TYPE_CHECKING:
    from sdpctl.engine.cost import Cost, Costs


class Profile(OptionalStage):
    """Count the cost of instances of a recipe's network.

    Args:
        recipe: names the network and the image size.
        name: first part of the tag.
        instances: the instances to count.
    """

    kind = PROFILE

    def __init__(self, recipe: Recipe, name: str, instances: Sequence[Instance]) -> None:
        self.recipe = recipe
        self.name = name
        self.instances = instances

    @classmethod
    def of(cls, network: TrainedNetwork) -> "Profile":
        """Return the profile of a network's grid, at the ratios of the recipe's section `profile`."""
        section = network.recipe.profile or ProfileSettings()
        return cls(network.recipe, network.name, grid(network.recipe, section.ratios))

    @property
    def tag(self) -> str:
        """`NAME.profile`."""
        return f"{self.name}.profile"

    def steps(self, context: Context) -> Steps:  # noqa: ARG002
        """Return the job; a profile needs no other stage."""
        yield from ()
        texts = [str(instance) for instance in self.instances]
        model, size = self.recipe.identity()["model"], self.recipe.scored_size
        return Job(key=key_of(self.kind, model=model, image_size=size, instances=texts), make=self._count)

    def task(self, context: Context) -> str:  # noqa: ARG002
        """Return the number of instances to count."""
        return f"count the cost of {counted(self.instances)}"

    def _count(self) -> Made:
        model, size = self.recipe.model, self.recipe.scored_size
        rows = cost_rows(count_costs(model, size, self.instances), self.instances, per_segment=True)
        costs = {"image_size": size, "model": self.recipe.identity()["model"], "rows": rows}
        return Made({COSTS: canonical(costs)}, counted(self.instances))


def network_costs(model: ModelSettings, image_size: int) -> "Costs":
    """Return the costs of a network's segments, which are counted when they are asked for."""
    from sdpctl.engine.cost import Costs

    return Costs(empty_model(model), (model.in_channels, image_size, image_size))


def count_costs(model: ModelSettings, image_size: int, instances: Iterable[Instance]) -> "dict[Instance, Cost]":
    """Count the cost of instances of a network, `full` included."""
    from sdpctl.engine.cost import profile

    shape = (model.in_channels, image_size, image_size)
    return profile(empty_model(model), dict.fromkeys([FULL, *instances]), shape)


def cost_rows(
    costs: "dict[Instance, Cost]", instances: Iterable[Instance], *, per_segment: bool = False
) -> list[dict[str, Any]]:
    """Return a row for each instance; `relative` is its MACs divided by those of `full`."""
    rows = []
    for instance in instances:
        cost = costs[instance]
        row: dict[str, Any] = {
            "instance": str(instance),
            "macs": cost.macs,
            "params": cost.params,
            "relative": cost.macs / costs[FULL].macs,
        }
        if per_segment:
            row["segments"] = [
                {"name": s.name, "in": list(s.in_shape), "out": list(s.out_shape), "macs": s.macs, "params": s.params}
                for s in cost.segments
            ]
        rows.append(row)
    return rows


def published_costs(
    arch: str,
    image_size: int | None,
    num_classes: int | None,
    stem: Stem | None,
    instances: Sequence[str] | None,
    ratios: tuple[float, ...] | None,
) -> dict[str, Any]:
    """Count the costs of an architecture, by default with the published image size and number of classes.

    The published networks have 1000 classes and images of 224 px; those with the small stem have 10 classes and 32 px.

    Args:
        arch: the architecture.
        image_size: height and width in pixels.
        num_classes: number of classes.
        stem: the stem; the architecture's own by default.
        instances: texts of instances; by default the SDPoint grid at `ratios`.
        ratios: ratios of the grid; 0.5 and 0.75 by default.

    Returns:
        The document of a profile.

    Raises:
        InstanceError: if an instance cannot be parsed, or names a point that the network does not have.
        UsageError: if the image is too small.
    """
    model, size = _published(arch, image_size, num_classes, stem)
    listed = named(instances, model.points) if instances else sdpoint_instances(model, ratios or (0.5, 0.75))
    rows = cost_rows(count_costs(model, size, listed), listed, per_segment=True)
    return {"image_size": size, "model": model.plain, "rows": rows}


def point_costs(arch: str, image_size: int | None) -> dict[str, Any]:
    """Count the MACs of an architecture up to each of its points.

    Args:
        arch: the architecture, with its default stem and the published number of classes.
        image_size: height and width in pixels; the published ones by default.

    Returns:
        A document with the MACs of the whole network and a row for each point.

    Raises:
        UsageError: if the image is too small.
    """
    from sdpctl.engine.cost import Costs

    model, size = _published(arch, image_size, None, None)
    costs = Costs(empty_model(model), (model.in_channels, size, size))
    whole, rows, macs = costs.of(FULL), [], 0
    for segment, cost in zip(costs.segments, whole.segments, strict=True):
        macs += cost.macs
        if segment.point is not None:
            rows.append({"point": segment.point, "map": list(cost.out_shape), "macs": macs, "relative": macs / whole.macs})
    return {"arch": arch, "image_size": size, "macs": whole.macs, "params": whole.params, "rows": rows}


def _published(arch: str, image_size: int | None, num_classes: int | None, stem: Stem | None) -> tuple[ModelSettings, int]:
    """Return an architecture's settings and image size, by default the published ones.

    Raises:
        UsageError: if the network cannot take images of the size.
    """
    plain = architecture(arch)
    stem = stem or plain.stem
    size = image_size or plain.image_size(stem)
    if (reason := plain.refused_size(size, stem)) is not None:
        raise UsageError(f"--image-size {size}: {reason}")
    return ModelSettings(arch=arch, num_classes=num_classes or (1000 if stem == "imagenet" else 10), stem=stem), size


def open_profile(
    what: str,
    is_recipe: bool,
    overrides: Sequence[str],
    instances: Sequence[str] | None,
    ratios: tuple[float, ...] | None,
    context: Context,
) -> Profile:
    """Return the profile of a recipe's or an artifact's network.

    Args:
        what: path of a recipe, or reference of an artifact.
        is_recipe: whether `what` is the path of a recipe.
        overrides: overrides of the recipe.
        instances: texts of instances; by default the grid at `ratios`.
        ratios: ratios of the grid; those of the recipe by default.
        context: gives the store.

    Raises:
        IntegrityError: if there is no store, or the artifact is damaged.
        NotFoundError: if there is no such artifact.
    """
    if is_recipe:
        recipe = with_classes(load_recipe(Path(what), overrides))
        name = recipe.name
    else:
        try:
            network = open_network(what, context, overrides)
        except (IntegrityError, NotFoundError) as error:
            hint = ARCHITECTURES.hint(what)
            raise type(error)(f"{what} is neither an architecture{hint} nor a recipe file; as an artifact: {error}") from error
        recipe, name = network.recipe, network.name
    ratios = ratios or (recipe.profile.ratios if recipe.profile else None)
    return Profile(recipe, name, named(instances, recipe.model.points) if instances else grid(recipe, ratios))
