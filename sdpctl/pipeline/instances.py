"""The stages that look at instances: calibrate, evaluate, profile."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from sdpctl.errors import DataError, NotFoundError, UsageError
from sdpctl.instance import FULL, Instance
from sdpctl.models import empty_model
from sdpctl.models.settings import ModelSettings
from sdpctl.pipeline.artifacts import (
    COSTS,
    RECIPE,
    RESULTS,
    read_document,
    read_model,
    read_statistics,
    statistics_layers,
)
from sdpctl.pipeline.context import Context, Opened, counted, grid, named, recipe_layer, recipe_of, short, stage_key
from sdpctl.recipe.schema import Recipe
from sdpctl.store import Artifact
from sdpctl.store.layout import canonical

if TYPE_CHECKING:
    import torch

    from sdpctl.data.loader import Batch
    from sdpctl.engine.calibrate import Statistics
    from sdpctl.engine.cost import Cost
    from sdpctl.models.chain import Chain

Row = dict[str, Any]
Split = Literal["test", "holdout"]


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
    if opened.other_data:
        opened = context.fingerprinted(opened)
    key = calibrate_key(opened, wanted)
    moves = context.moves(tag, opened.checkpoint, whole=wanted == grid(opened.recipe))
    if (found := context.known(key, tag, moves=moves)) is not None:
        return found
    context.prepare()
    opened = context.fingerprinted(opened)
    if context.dry_run:
        context.report.note(f"{tag}: would calibrate {counted(wanted)} on {opened.recipe.calibrate.batches} batches")
        return None
    from sdpctl.pipeline.inputs import open_data

    recipe = opened.recipe
    model, device = load_model(opened, context, images=recipe.data.batch_size)
    data = open_data(recipe, device, context)
    total = min(recipe.calibrate.batches, data.steps_per_epoch)
    batches = watched(data.calibration(total), total, f"calibrating {counted(wanted)}", tag, context)
    statistics = gather(model, wanted, batches, recipe)
    layers = statistics_layers(statistics) | {RECIPE: recipe_layer(recipe)}
    artifact = context.store.commit("bn-statistics", layers, subject=opened.checkpoint, key=key, tag=tag if moves else None)
    context.report.note(f"{tag}: {counted(wanted)} on {statistics.images:,} images, {short(artifact)}")
    return artifact


def gather(model: "Chain", instances: Sequence[Instance], batches: "Iterable[Batch]", recipe: Recipe) -> "Statistics":
    """Gather the BatchNorm statistics of instances as a recipe's section `calibrate` says.

    Args:
        model: the network, on its device.
        instances: whose statistics.
        batches: (x_NCHW, labels_N) on the same device: training images, augmented as in training.
        recipe: says how.
    """
    from sdpctl.engine.calibrate import calibrate

    return calibrate(model, instances, batches, recipe.calibration)


def evaluate(
    opened: Opened, context: Context, instances: Sequence[str] | None = None, split: Split = "test"
) -> Artifact | None:
    """Score instances, calibrating first where nothing did, and commit the table as `<name>.eval` or `<name>.holdout`.

    `<name>.bn` moves to the statistics that a table of the test split is of, so that both tags belong together.

    Args:
        opened: the checkpoint, or statistics.
        context: where, and who is told.
        instances: their texts; by default those of the statistics that were meant, or the SDPoint grid.
        split: `test`, which only reports, or `holdout`, the held-out images, which may be chosen on.

    Returns:
        The evaluation; None on a dry run that would have evaluated.

    Raises:
        DataError: where the data is not there, not what was promised, or nothing is held out.
        DivergedError: where the loss of an instance is not finite.
        InstanceError: where an instance does not parse, or names a point the network lacks.
        UsageError: where another share is held out than in the training.
    """
    tag = f"{opened.name}.{'eval' if split == 'test' else 'holdout'}"
    if split == "holdout":
        check_holdout(opened, context)
    if opened.other_data:
        opened = context.fingerprinted(opened)
    if instances:
        wanted = named(instances, opened.recipe.model.points)
    elif opened.statistics is not None:
        wanted = calibrated_instances(opened.statistics, context)
    else:
        wanted = grid(opened.recipe)
    # The statistics get their tag with the table: an evaluation that fails leaves both tags where they are.
    statistics = statistics_for(opened, replace(context, aside=True), wanted)
    if statistics is None:
        context.report.note(f"{tag}: would evaluate {counted(wanted)}")
        return None
    calibrated_as = recipe_of(statistics, context).calibrate
    opened = replace(opened, recipe=opened.recipe.changed(calibrate=calibrated_as))
    identity = opened.recipe.identity()
    parts = {part: identity[part] for part in ("seed", "data", "evaluate")}
    key = stage_key("evaluation", statistics=statistics.digest, recipe=parts, instances=[str(i) for i in wanted], split=split)
    main = context.tagged(f"{opened.name}.bn")
    whole = main is not None and main.digest == statistics.digest and wanted == calibrated_instances(statistics, context)
    moves = context.moves(tag, opened.checkpoint, whole=whole)
    if (found := context.known(key, tag, moves=moves)) is not None:
        _tag_along(statistics, split, opened, context)
        return found
    context.prepare()
    opened = context.fingerprinted(opened)
    if context.dry_run:
        context.report.note(f"{tag}: would evaluate {counted(wanted)}")
        return None
    from sdpctl.engine.evaluate import evaluate as score
    from sdpctl.pipeline.inputs import open_data

    recipe = opened.recipe
    section = recipe.evaluate
    model, device = load_model(opened, context, images=section.batch_size)
    data = open_data(recipe, device, context)
    size = data.test_size if split == "test" else len(data.holdout_indices)
    if not size:
        raise DataError(f"data.holdout={100 * recipe.data.holdout:g}% of each class is no image to choose on; name an instance")
    if split == "test":
        batches = data.test(section.batch_size, section.batches)
    elif section.batches:
        batches = data.holdout_part(0, section.batches * section.batch_size, section.batch_size)
    else:
        batches = data.holdout(section.batch_size)
    total = -(-size // section.batch_size)
    total = min(total, section.batches or total)
    batches = watched(batches, total, f"evaluating {counted(wanted)}", tag, context)
    gathered = read_statistics(context.store, statistics, model)
    scores = score(model, wanted, batches, gathered, recipe.evaluation)
    costs = profile_model(recipe.model, recipe.data.image_size, wanted)
    rows = [
        row | {"top1": scores[instance].top1, "top5": scores[instance].top5, "loss": scores[instance].loss}
        for instance, row in zip(wanted, cost_rows(costs, wanted), strict=True)
    ]
    results = {"classes": data.classes, "images": scores[wanted[0]].images, "rows": rows, "split": split}
    layers = {RESULTS: canonical(results), RECIPE: recipe_layer(recipe)}
    artifact = context.store.commit("evaluation", layers, subject=statistics, key=key, tag=tag if moves else None)
    _tag_along(statistics, split, opened, context)
    context.report.note(f"{tag}: {counted(wanted)} on {results['images']:,} images, {short(artifact)}")
    return artifact


def _tag_along(statistics: Artifact, split: Split, opened: Opened, context: Context) -> None:
    """Let `<name>.bn` point at the statistics of the table that a user asked for as `<name>.eval`."""
    if split != "test" or context.aside or context.dry_run:
        return
    tag = f"{opened.name}.bn"
    there = context.tagged(tag)
    if there is None or there.digest != statistics.digest:
        context.store.tag(statistics, tag)


def evaluated(opened: Opened, context: Context, instances: Sequence[Instance], split: Split = "test") -> dict[str, Any] | None:
    """Return the table of an evaluation that holds instances: at `<name>.eval` or `<name>.holdout`, or a new one.

    Returns:
        The document; None on a dry run that would have evaluated.
    """
    statistics = statistics_for(opened, context, instances)
    tagged = context.tagged(f"{opened.name}.{'eval' if split == 'test' else 'holdout'}")
    wanted = {str(instance) for instance in instances}
    if tagged is not None and tagged.kind != "evaluation":
        tagged = None
    if tagged is not None and statistics is not None and tagged.subject is not None and not context.force:
        same = _scored_alike(recipe_of(tagged, context).identity(), opened.recipe.identity())
        if same and tagged.subject.digest == statistics.digest:
            results = document(tagged, context)
            named_classes = "classes" in results  # which the first evaluations lacked
            if named_classes and wanted <= {row["instance"] for row in results["rows"]}:
                return results
    artifact = evaluate(replace(opened, statistics=statistics), context, [str(i) for i in instances], split)
    return None if artifact is None else document(artifact, context)


def _scored_alike(there: dict[str, Any], here: dict[str, Any]) -> bool:
    """Say whether two recipes score the same images alike: where all are scored, the batch size does not matter."""
    if any(there[part] != here[part] for part in ("seed", "data")):
        return False
    whole = "batches" not in there["evaluate"] and "batches" not in here["evaluate"]
    kept = [{k: v for k, v in each["evaluate"].items() if not (whole and k == "batch_size")} for each in (there, here)]
    return kept[0] == kept[1]


def check_holdout(opened: Opened, context: Context) -> None:
    """Refuse another holdout than that of the training: images that were trained on would be chosen on.

    Raises:
        UsageError: where it is another.
    """
    trained = recipe_of(opened.checkpoint, context)
    if (there := opened.recipe.data.holdout) != (then := trained.data.holdout):
        raise UsageError(
            f"--set data.holdout={there:g}: the training held out {then:g}; with another share one would choose on "
            "images that were trained on; leave it out"
        )


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
        context.report.note(f"{tag}: would count {counted(instances)}")
        return None
    rows = cost_rows(profile_model(recipe.model, size, instances), instances, per_segment=True)
    costs = {"image_size": size, "model": model, "rows": rows}
    artifact = context.store.commit("profile", {COSTS: canonical(costs)}, key=key, tag=tag)
    context.report.note(f"{tag}: {counted(instances)}, {short(artifact)}")
    return artifact


def document(artifact: Artifact, context: Context) -> dict[str, Any]:
    """Return what an artifact holds beside tensors: the table, the nodes, what was exported."""
    return read_document(context.store, artifact)


def profile_model(model: ModelSettings, image_size: int, instances: Iterable[Instance]) -> "dict[Instance, Cost]":
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


def calibrated_instances(statistics: Artifact, context: Context) -> list[Instance]:
    """Return the instances that statistics suffice for."""
    return [Instance.parse(text) for text in document(statistics, context)["instances"]]


def statistics_for(opened: Opened, context: Context, wanted: Sequence[Instance]) -> Artifact | None:
    """Return statistics that suffice: those meant, those at `<name>.bn`, those of the whole grid, or new ones.

    Raises:
        NotFoundError: where there are none and none may be gathered.
    """
    found = known_statistics(opened, context, wanted)
    if found is None and not context.calibrates:
        lacking = ", ".join(map(str, wanted)) if len(wanted) < 4 else counted(wanted)
        raise NotFoundError(
            f"{opened.name}: no BatchNorm statistics of {lacking}; leave --no-calibrate out, or run `sdpctl calibrate-bn` first"
        )
    return found or calibrate(opened, context, [str(instance) for instance in wanted])


def known_statistics(opened: Opened, context: Context, wanted: Sequence[Instance] = ()) -> Artifact | None:
    """Return statistics that suffice and are there: those meant, those at `<name>.bn`, or those of the whole grid."""
    for statistics in (opened.statistics, _tagged_statistics(opened, context)):
        if statistics is not None and set(wanted) <= set(calibrated_instances(statistics, context)):
            return statistics
    whole = grid(opened.recipe)
    if set(wanted) <= set(whole) and not context.force:
        return context.store.find(calibrate_key(opened, whole))
    return None


def _tagged_statistics(opened: Opened, context: Context) -> Artifact | None:
    """Return what `<name>.bn` points at, if it is of this checkpoint and of this very data, as the network sees it."""
    tagged = context.tagged(f"{opened.name}.bn")
    if tagged is None or tagged.kind != "bn-statistics" or tagged.subject is None or "calibrate" in opened.given:
        return None
    same_data = recipe_of(tagged, context).identity()["data"] == opened.recipe.identity()["data"]
    return tagged if same_data and tagged.subject.digest == opened.checkpoint.digest else None


def load_model(opened: Opened, context: Context, *, images: int) -> "tuple[Chain, torch.device]":
    """Return the network with its weights, in evaluation mode on the recipe's device, and that device.

    Args:
        opened: the checkpoint.
        context: where.
        images: of a batch, by which the number of threads is chosen.
    """
    import torch

    from sdpctl.engine.device import pick_device
    from sdpctl.engine.threads import choose_threads

    device = pick_device(opened.recipe.device)
    model = read_model(context.store, opened.checkpoint, opened.recipe.model)
    choose_threads(model, opened.recipe.model.in_channels, opened.recipe.data.image_size, images)
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
