"""The stages that look at instances: calibrate, evaluate, profile."""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sdpctl.instance import FULL, Instance
from sdpctl.pipeline.artifacts import (
    COSTS,
    NODES,
    RECIPE,
    RESULT,
    RESULTS,
    empty_model,
    read_model,
    read_statistics,
    statistics_layers,
)
from sdpctl.pipeline.context import Context, Opened, grid, named, recipe_layer, short, stage_key
from sdpctl.recipe.load import parse_recipe
from sdpctl.recipe.schema import ModelSection, Recipe
from sdpctl.store import Artifact
from sdpctl.store.layout import canonical

if TYPE_CHECKING:
    import torch

    from sdpctl.data.loader import Batch
    from sdpctl.engine.cost import Cost
    from sdpctl.models.chain import Chain

Row = dict[str, Any]


def calibrate_key(opened: Opened, instances: Sequence[Instance]) -> str:
    """Return the key of a calibration."""
    identity = opened.recipe.identity()
    parts = {part: identity[part] for part in ("seed", "data", "calibrate")}
    return stage_key("bn-statistics", checkpoint=opened.checkpoint.digest, recipe=parts, instances=[str(i) for i in instances])


def calibrate(opened: Opened, context: Context, instances: Sequence[str] | None = None) -> Artifact | None:
    """Gather the BatchNorm statistics of instances, and commit them as `<name>.bn`.

    Args:
        opened: the checkpoint.
        context: where, and who is told.
        instances: their texts; the SDPoint grid by default.

    Returns:
        The statistics; None on a dry run that would have calibrated.

    Raises:
        DataError: where the data is not there, not what was promised, or less than one batch.
        InstanceError: where an instance does not parse, or names a point the network lacks.
    """
    wanted = named(instances, opened.recipe.model.points) if instances else grid(opened.recipe)
    tag = f"{opened.name}.bn"
    if "data" in opened.given:
        opened = context.fingerprinted(opened)
    key = calibrate_key(opened, wanted)
    if (found := context.known(key, tag)) is not None:
        return found
    context.prepare()
    opened = context.fingerprinted(opened)
    if context.dry_run:
        context.report.note(f"{tag}: would calibrate {len(wanted)} instances on {opened.recipe.calibrate.batches} batches")
        return None
    from sdpctl.engine.calibrate import calibrate as gather
    from sdpctl.pipeline.inputs import open_data

    recipe = opened.recipe
    model, device = load_model(opened, context)
    data = open_data(recipe, device)
    total = min(recipe.calibrate.batches, data.steps_per_epoch)
    batches = watched(data.calibration(total), total, f"calibrating {len(wanted)} instances", tag, context)
    section = recipe.calibrate
    statistics = gather(model, wanted, batches, estimator=section.estimator, precision=section.precision)
    layers = statistics_layers(statistics) | {RECIPE: recipe_layer(recipe)}
    artifact = context.store.commit("bn-statistics", layers, subject=opened.checkpoint, key=key, tag=tag)
    context.report.note(f"{tag}: {len(wanted)} instances on {statistics.images:,} images, {short(artifact)}")
    return artifact


def evaluate(opened: Opened, context: Context, instances: Sequence[str] | None = None) -> Artifact | None:
    """Score instances on the test split, calibrating first where nothing did, and commit the table as `<name>.eval`.

    Args:
        opened: the checkpoint, or statistics.
        context: where, and who is told.
        instances: their texts; by default those of the statistics that were meant, or the SDPoint grid.

    Returns:
        The evaluation; None on a dry run that would have evaluated.

    Raises:
        DataError: where the data is not there, or not what was promised.
        DivergedError: where the loss of an instance is not finite.
        InstanceError: where an instance does not parse, or names a point the network lacks.
    """
    tag = f"{opened.name}.eval"
    if "data" in opened.given:
        opened = context.fingerprinted(opened)
    if instances:
        wanted = named(instances, opened.recipe.model.points)
    elif opened.statistics is not None:
        wanted = [Instance.parse(text) for text in document(opened.statistics, context)["instances"]]
    else:
        wanted = grid(opened.recipe)
    statistics = _statistics_for(opened, context, wanted)
    if statistics is None:
        context.report.note(f"{tag}: would evaluate {len(wanted)} instances")
        return None
    calibrated_as = recipe_of(statistics, context).calibrate
    opened = replace(opened, recipe=opened.recipe.model_copy(update={"calibrate": calibrated_as}))
    identity = opened.recipe.identity()
    parts = {part: identity[part] for part in ("seed", "data", "evaluate")}
    key = stage_key("evaluation", statistics=statistics.digest, recipe=parts, instances=[str(i) for i in wanted])
    if (found := context.known(key, tag)) is not None:
        return found
    context.prepare()
    opened = context.fingerprinted(opened)
    if context.dry_run:
        context.report.note(f"{tag}: would evaluate {len(wanted)} instances")
        return None
    from sdpctl.engine.evaluate import evaluate as score
    from sdpctl.pipeline.inputs import open_data

    recipe = opened.recipe
    section = recipe.evaluate
    model, device = load_model(opened, context)
    data = open_data(recipe, device)
    total = -(-data.test_size // section.batch_size)
    total = min(total, section.batches or total)
    batches = data.test(section.batch_size, section.batches)
    batches = watched(batches, total, f"evaluating {len(wanted)} instances", tag, context)
    scores = score(model, wanted, batches, read_statistics(context.store, statistics), precision=section.precision)
    costs = profile_model(recipe.model, recipe.data.image_size, wanted)
    rows = [
        row | {"top1": scores[instance].top1, "top5": scores[instance].top5, "loss": scores[instance].loss}
        for instance, row in zip(wanted, cost_rows(costs, wanted), strict=True)
    ]
    results = {"images": scores[wanted[0]].images, "rows": rows, "split": "test"}
    layers = {RESULTS: canonical(results), RECIPE: recipe_layer(recipe)}
    artifact = context.store.commit("evaluation", layers, subject=statistics, key=key, tag=tag)
    context.report.note(f"{tag}: {len(wanted)} instances on {results['images']:,} images, {short(artifact)}")
    return artifact


def profile(recipe: Recipe, context: Context, instances: Sequence[Instance], name: str) -> Artifact | None:
    """Count the cost of instances, and commit it as `<name>.profile`.

    Args:
        recipe: whose network and image size.
        context: where, and who is told.
        instances: what to count.
        name: what the tag begins with.

    Returns:
        The profile; None on a dry run that would have counted.
    """
    tag = f"{name}.profile"
    model, size = recipe.identity()["model"], recipe.data.image_size
    key = stage_key("profile", model=model, image_size=size, instances=[str(i) for i in instances])
    if (found := context.known(key, tag)) is not None:
        return found
    context.prepare()
    if context.dry_run:
        context.report.note(f"{tag}: would count {len(instances)} instances")
        return None
    rows = cost_rows(profile_model(recipe.model, size, instances), instances, per_segment=True)
    counted = {"image_size": size, "model": model, "rows": rows}
    artifact = context.store.commit("profile", {COSTS: canonical(counted)}, key=key, tag=tag)
    context.report.note(f"{tag}: {len(instances)} instances, {short(artifact)}")
    return artifact


def document(artifact: Artifact, context: Context) -> dict[str, Any]:
    """Return what an evaluation, a profile, a search or statistics hold beside tensors: the table, or the nodes."""
    title = {"evaluation": RESULTS, "profile": COSTS, "bn-statistics": NODES, "search": RESULT}[artifact.kind]
    loaded: dict[str, Any] = json.loads(context.store.read(artifact, title))
    return loaded


def profile_model(model: ModelSection, image_size: int, instances: Iterable[Instance]) -> "dict[Instance, Cost]":
    """Count the cost of instances of a network, `full` among them."""
    from sdpctl.engine.cost import profile as count

    shape = (model.in_channels, image_size, image_size)
    return count(empty_model(model), dict.fromkeys([FULL, *instances]), shape)


def cost_rows(costs: "dict[Instance, Cost]", instances: Iterable[Instance], *, per_segment: bool = False) -> list[Row]:
    """Return a row for each instance; relative cost is to `full`."""
    rows = []
    for instance in instances:
        cost = costs[instance]
        row: Row = {
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


def _statistics_for(opened: Opened, context: Context, wanted: list[Instance]) -> Artifact | None:
    """Return statistics that suffice: those meant, those at `<name>.bn`, those of the whole grid, or new ones."""
    for statistics in (opened.statistics, _tagged_statistics(opened, context)):
        if statistics is not None and set(map(str, wanted)) <= set(document(statistics, context)["instances"]):
            return statistics
    whole = grid(opened.recipe)
    if set(wanted) <= set(whole) and not context.force:
        found = context.store.find(calibrate_key(opened, whole))
        if found is not None:
            return found
    return calibrate(opened, context, [str(instance) for instance in wanted])


def _tagged_statistics(opened: Opened, context: Context) -> Artifact | None:
    """Return what `<name>.bn` points at, if it is of this checkpoint and of this very data, as the network sees it."""
    tagged = context.tagged(f"{opened.name}.bn")
    if tagged is None or tagged.subject is None or "calibrate" in opened.given:
        return None
    same_data = recipe_of(tagged, context).identity()["data"] == opened.recipe.identity()["data"]
    return tagged if same_data and tagged.subject.digest == opened.checkpoint.digest else None


def recipe_of(artifact: Artifact, context: Context) -> Recipe:
    """Return the recipe an artifact was made by."""
    return parse_recipe(context.store.read(artifact, RECIPE).decode(), f"recipe of {short(artifact)}")


def load_model(opened: Opened, context: Context) -> "tuple[Chain, torch.device]":
    """Return the network with its weights, in evaluation mode on the recipe's device, and that device."""
    import torch

    from sdpctl.engine.device import pick_device

    device = pick_device(opened.recipe.device)
    model = read_model(context.store, opened.checkpoint, opened.recipe.model)
    return model.to(device).to(memory_format=torch.channels_last).eval(), device


def watched(batches: "Iterable[Batch]", total: int, text: str, tag: str, context: Context) -> "Iterator[Batch]":
    """Yield batches, showing how far it is, and saying and logging how long it took."""
    began, images = time.monotonic(), 0
    with context.report.progress(text, total) as bar:
        for x_NCHW, labels_N in batches:
            images += len(labels_N)
            yield x_NCHW, labels_N
            bar.advance()
    seconds = time.monotonic() - began
    context.report.detail(f"{text}: {seconds:.1f} s, {images / seconds:,.0f} images/s")
    context.workspace.log(tag, event=text, images=images, seconds=seconds, images_per_second=images / seconds)
