"""Weights from elsewhere become a checkpoint like any other."""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdpctl.errors import DivergedError, UsageError
from sdpctl.instance import FULL
from sdpctl.models import architecture, empty_model
from sdpctl.models.registry import Shortcut
from sdpctl.pipeline.artifacts import HISTORY, IMPORTED, MODEL, RECIPE, initial_model, read_origin
from sdpctl.pipeline.context import Context, recipe_layer, short, stage_key
from sdpctl.pipeline.workspace import with_classes
from sdpctl.recipe.load import dump_yaml, parse_recipe
from sdpctl.recipe.schema import Recipe
from sdpctl.store import Artifact
from sdpctl.store.layout import canonical
from sdpctl.untrusted import printable, read_regular

if TYPE_CHECKING:
    from sdpctl.data.loader import ImageData
    from sdpctl.engine.evaluate import Score
    from sdpctl.engine.weights import Weights

SCORED = 10_000
"""Test images that an imported network is scored on at most."""

LITTLE = 50.0
"""Top-1, in per cent, below which trained weights are taken for misunderstood."""


@dataclass(frozen=True)
class Import:
    """A checkpoint of weights from elsewhere.

    Args:
        artifact: the checkpoint.
        score: how well `full` does on test images with its own running statistics; None where no data was named, or where the
            classifier is new.
        warning: what is suspicious about the score, and what to do; None where nothing is.
    """

    artifact: Artifact
    score: "Score | None" = None
    warning: str | None = None


def import_weights(
    file: Path | None,
    context: Context,
    *,
    arch: str,
    torchvision: str | None = None,
    ema: bool = False,
    overrides: Sequence[str] = (),
) -> Import | None:
    """Commit weights as a checkpoint, with a recipe that says what they are for.

    Classes, channels, stem and the kind of shortcut are those of the weights, and the path of `full` keeps their running
    statistics; the tag is the file's name, or the architecture's. torchvision's weights bring their preprocessing. Overrides
    win. Where they name data, `full` is scored on its test split.

    Args:
        file: a state dict: `.pth`, `.pth.tar`, `.safetensors`.
        context: where, and who is told.
        arch: an architecture.
        torchvision: instead of a file: the name of torchvision's weights.
        ema: take the exponential moving average of the weights that the file holds.
        overrides: of the recipe.

    Returns:
        The checkpoint and its score; None on a dry run.

    Raises:
        DataError: where the file holds no plain tensors, the weights cannot be fetched, or the data is not there.
        RecipeError: where the recipe does not hold with the overrides.
        UsageError: where the weights do not fit, there is no moving average, or the classes of a new classifier are not known;
            or for both a file and torchvision's, or neither.
    """
    from sdpctl.engine.tensors import tensors_to_bytes
    from sdpctl.engine.weights import few, find_weights, fitted, misfits, read_file, torchvision_weights

    known = architecture(arch)
    preprocessing: dict[str, Any] = {}
    if file is not None and torchvision is None:
        called = printable(file.name)
        loaded = read_file(file)
        source = {"from": called, "sha256": hashlib.sha256(read_regular(file)).hexdigest()}
    elif file is None and torchvision is not None:
        called = f"torchvision's {torchvision}"
        loaded, url, preprocessing = torchvision_weights(arch, torchvision)
        source = {"from": url}
    else:
        raise UsageError("give a file of weights or --torchvision NAME, one of them")
    defaults: dict[str, Any] = {"name": _tag(file.name if file else arch), "model": {"arch": arch}}
    network = _shapes(arch)
    found = find_weights(loaded, network, called, ema=ema)
    told = network.options_in(found.weights)
    classes, stem = told.get("num_classes"), told.get("stem")
    if classes is not None and classes < 2:
        raise UsageError(f"{called}: its classifier has {classes} class{'es' * (classes != 1)}; a network here has two or more")
    defaults["model"] |= told
    augment, size = ("crop-flip", 32) if (stem or known.stem) == "small" else ("resized-crop", 224)
    defaults |= {
        "data": {"dataset": "imagefolder", "augment": augment, "image_size": preprocessing.get("image_size", size)},
        "train": {"epochs": 0},
        "calibrate": {"keep": "full"},
    }
    recipe = _preprocessed(parse_recipe(dump_yaml(defaults), f"recipe of {called}", overrides), preprocessing)
    given = {override.partition("=")[0] for override in overrides}
    names_data = bool(given & {"data", "data.dataset", "data.root"})
    if recipe.model.num_classes is None:
        if not names_data:
            raise UsageError(
                f"{called} holds no classifier ({network.head_names[0]}): a new one will be drawn from the seed; say for how "
                "many classes with --set model.num_classes=N, or name the data"
            )
        recipe = with_classes(recipe)
    section = recipe.model
    model = empty_model(section)
    weights = found.weights if found.head else found.weights | _new_head(recipe)
    if lines := misfits(weights, model):
        few_lines = few(lines)
        few_lines.append(
            f"{len(lines)} tensors do not fit {arch} with {section.num_classes} classes and the {section.stem or known.stem} "
            "stem; is --arch right?"
        )
        raise UsageError(*(f"{called}: {line}" for line in few_lines))
    remarks = [*found.remarks]
    if not found.head:
        remarks.append(f"there is no classifier: a new one for {section.num_classes} classes is drawn from the seed")
    if remarks:
        context.report.note(f"{called}: {'; '.join(remarks)}")
    context.prepare()
    if names_data:
        recipe = context.workspace.fingerprint(recipe)
    if context.dry_run:
        context.report.note(f"{recipe.name}: would import {len(found.weights)} tensors of {called}")
        return None
    data = _opened(recipe, context) if recipe.data.fingerprint is not None else None
    zero = {name: tensor.new_zeros((), device="cpu") for name, tensor in model.state_dict().items() if name not in weights}
    content = tensors_to_bytes(fitted(weights, model) | zero)
    key = stage_key("checkpoint", imported=hashlib.sha256(content).hexdigest(), recipe=recipe.identity())
    there = context.tagged(recipe.name)
    if there is not None and there.key != key and "name" not in given and not _is_from(there, source, context):
        raise UsageError(f"there is another checkpoint {recipe.name} already; give this one a name, --set name=NAME")
    origin = canonical(source | ({"ema": True} if ema else {}))
    layers = {MODEL: content, HISTORY: b"", IMPORTED: origin, RECIPE: recipe_layer(recipe)}
    artifact = context.store.commit("checkpoint", layers, key=key, tag=recipe.name)
    context.report.note(f"{recipe.name}: imported {called} as {arch}, {short(artifact)}")
    if data is None:
        context.report.note(
            f"{recipe.name}: no data was named; later commands need it, for example --set data.dataset=imagefolder "
            "--set data.root=FOLDER, or import again with that"
        )
        return Import(artifact)
    return _scored(artifact, recipe, weights, data, context) if found.head else Import(artifact)


def _shapes(arch: str) -> Any:
    import torch

    from sdpctl.models import create_model

    with torch.device("meta"):
        return create_model(arch)


def _preprocessed(recipe: Recipe, wanted: Mapping[str, Any]) -> Recipe:
    """Return a recipe with the preprocessing that weights want, as far as the recipe does not say it."""
    if not wanted:
        return recipe
    data = recipe.data
    mean, std = data.normalisation(recipe.model.in_channels)
    now: dict[str, Any] = {"mean": mean, "std": std, "interpolation": data.resampling}
    if data.image_size == wanted["image_size"]:  # a `resize` belongs to its own image size
        now["resize"] = data.test_side
    update = {key: wanted[key] for key in now if getattr(data, key) is None and wanted[key] != now[key]}
    return recipe.changed(data=update)


def _new_head(recipe: Recipe) -> "Weights":
    network = initial_model(recipe)
    state = network.state_dict()
    return {name: state[name] for name in network.head_names}


def _opened(recipe: Recipe, context: Context) -> "ImageData":
    from sdpctl.engine.device import pick_device
    from sdpctl.pipeline.inputs import open_data

    return open_data(recipe, pick_device(recipe.device), context)


def _is_from(checkpoint: Artifact, source: Mapping[str, str], context: Context) -> bool:
    """Say whether a checkpoint was imported from this very source, perhaps with different settings."""
    if IMPORTED not in checkpoint.layers:
        return False
    theirs = read_origin(context.store, checkpoint)
    return all(theirs.get(key) == value for key, value in source.items())


def _scored(artifact: Artifact, recipe: Recipe, weights: "Weights", data: "ImageData", context: Context) -> Import:
    """Score an imported network on test images, with every shortcut that its shapes leave open, and say how well it does."""
    name, dataset = recipe.name, recipe.data.dataset
    open_choice = recipe.model.shortcut is None and recipe.model.shape_change == "padding"
    choices: tuple[Shortcut | None, ...] = ("padding", "padding-centred") if open_choice else (None,)
    try:
        scores = [_score(recipe, choice, weights, data, context) for choice in choices]
    except DivergedError as error:
        diverged = f"{name}: warning: {error}"
        context.report.note(diverged)
        return Import(artifact, warning=diverged)
    score, best = scores[0], max(scores, key=lambda score: score.top1)
    chance = 100 / len(data.classes)
    line = f"{name}: `full` scores {score.top1:.2f} % on {score.images:,} test images (chance is {chance:.3g} %)"
    if recipe.data.mean is None or recipe.data.std is None:
        line += f", normalised as {dataset} usually is; data.mean and data.std set what the weights were trained with"
    context.report.note(line)
    noise = 300 * math.sqrt(0.5 / score.images)  # three standard errors of a difference
    warning: str | None = None
    if best.top1 > score.top1 + noise:
        warning = (
            f"{name}: warning: model.shortcut=padding, which this was imported with, scores {score.top1:.2f} %, and "
            f"padding-centred {best.top1:.2f} %; import it again with --set model.shortcut=padding-centred"
        )
    elif score.top1 < LITTLE or score.top1 <= chance + 300 * math.sqrt(chance / 100 * (1 - chance / 100) / score.images):
        little = "is at chance" if score.top1 <= chance + noise else "is little for trained weights"
        warning = (
            f"{name}: warning: {score.top1:.2f} % {little}: the weights may want a different data.mean, data.std, "
            f"data.image_size or model.shortcut, or their classes stand in a different order than those of {dataset}"
        )
    if warning is not None:
        context.report.note(warning)
    return Import(artifact, score, warning)


def _score(recipe: Recipe, shortcut: Shortcut | None, weights: "Weights", data: "ImageData", context: Context) -> "Score":
    """Score `full` with its own running statistics on test images.

    Raises:
        DivergedError: where the loss is not finite.
    """
    import torch

    from sdpctl.engine.calibrate import running_statistics
    from sdpctl.engine.evaluate import evaluate
    from sdpctl.engine.weights import fill
    from sdpctl.pipeline.instances import watched

    section = recipe.evaluate
    model = empty_model(replace(recipe.model, shortcut=shortcut or recipe.model.shortcut))
    fill(model.to_empty(device="cpu"), weights)
    model = model.to(data.device).to(memory_format=torch.channels_last).eval()
    most = math.ceil(SCORED / section.batch_size)
    most = min(section.batches or most, most)
    total = min(math.ceil(data.test_size / section.batch_size), most)
    batches = watched(data.test(section.batch_size, most), total, "scoring full", recipe.name, context)
    statistics = running_statistics(model)
    return evaluate(model, [FULL], batches, statistics, recipe.evaluation)[FULL]


def _tag(file: str) -> str:
    stem = re.sub(r"(\.(pth|pt|th|tar|bin|ckpt|safetensors))+$", "", file)
    return re.sub(r"[^A-Za-z0-9]+", "-", stem)[:80].strip("-") or "imported"
