"""Weights from elsewhere become a checkpoint like any other."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdpctl.errors import UsageError
from sdpctl.models import architecture
from sdpctl.pipeline.artifacts import HISTORY, IMPORTED, MODEL, RECIPE, empty_model
from sdpctl.pipeline.context import Context, recipe_layer, short, stage_key
from sdpctl.pipeline.workspace import with_classes
from sdpctl.recipe.load import dump_yaml, parse_recipe
from sdpctl.store import Artifact
from sdpctl.store.layout import canonical


def import_weights(
    file: Path | None, context: Context, *, arch: str, torchvision: str | None = None, overrides: Sequence[str] = ()
) -> Artifact | None:
    """Commit weights as a checkpoint, with a recipe that says what they are for.

    Classes, channels and stem are those of the weights, and the path of `full` keeps their running statistics; the tag is the
    file's name, or the architecture's. Overrides win. Where they name data it is looked at.

    Args:
        file: a state dict: `.pth`, `.pth.tar`, `.safetensors`.
        context: where, and who is told.
        arch: an architecture.
        torchvision: instead of a file: the name of torchvision's weights.
        overrides: of the recipe.

    Returns:
        The checkpoint; None on a dry run.

    Raises:
        DataError: where the file holds no plain tensors, the weights cannot be fetched, or the data is not there.
        RecipeError: where the recipe does not hold with the overrides.
        UsageError: with a line for every tensor that does not fit; or for both a file and torchvision's, or neither.
    """
    import torch

    from sdpctl.engine.tensors import tensors_to_bytes
    from sdpctl.engine.weights import misfits, read_weights, shape_of, torchvision_weights

    known = architecture(arch)
    if file is not None and torchvision is None:
        called = file.name
        weights = read_weights(file)
        source = {"from": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    elif file is None and torchvision is not None:
        called = f"torchvision's {torchvision}"
        weights, url = torchvision_weights(arch, torchvision)
        source = {"from": url}
    else:
        raise UsageError("give a file of weights or --torchvision NAME, one of them")
    classes, channels, stem = shape_of(weights)
    augment, size = ("crop-flip", 32) if (stem or known.stem) == "small" else ("resized-crop", 224)
    shape = {"num_classes": classes, "in_channels": channels, "stem": stem}
    defaults: dict[str, Any] = {
        "name": _tag(file.name if file else arch),
        "model": {"arch": arch} | {key: value for key, value in shape.items() if value is not None},
        "data": {"dataset": "imagefolder", "augment": augment, "image_size": size},
        "train": {"epochs": 0},
        "calibrate": {"keep": "full"},
    }
    recipe = parse_recipe(dump_yaml(defaults), f"recipe of {called}", overrides)
    recipe = with_classes(recipe)
    model = empty_model(recipe.model)
    if lines := misfits(weights, model):
        section = recipe.model
        lines.append(
            f"{len(lines)} tensors do not fit {arch} with {section.num_classes} classes and the {section.stem or known.stem} "
            "stem; is --arch right?"
        )
        raise UsageError(*(f"{called}: {line}" for line in lines))
    context.prepare()
    given = {override.partition("=")[0] for override in overrides}
    if given & {"data", "data.dataset", "data.root"}:
        recipe = context.workspace.fingerprint(recipe)
    if context.dry_run:
        context.report.note(f"{recipe.name}: would import {len(weights)} tensors of {called}")
        return None
    counters = {name: torch.zeros((), dtype=torch.long) for name in model.state_dict() if name not in weights}
    content = tensors_to_bytes(weights | counters)
    key = stage_key("checkpoint", imported=hashlib.sha256(content).hexdigest(), recipe=recipe.identity())
    there = context.tagged(recipe.name)
    if there is not None and there.key != key and "name" not in given:
        raise UsageError(f"there is another checkpoint {recipe.name} already; give this one a name, --set name=NAME")
    layers = {MODEL: content, HISTORY: b"", IMPORTED: canonical(source), RECIPE: recipe_layer(recipe)}
    artifact = context.store.commit("checkpoint", layers, key=key, tag=recipe.name)
    context.report.note(f"{recipe.name}: imported {called} as {arch}, {short(artifact)}")
    if recipe.data.fingerprint is None:
        context.report.note(
            f"{recipe.name}: no data was named; later commands need it, for example --set data.dataset=imagefolder "
            "--set data.root=FOLDER, or import again with that"
        )
    return artifact


def _tag(file: str) -> str:
    stem = re.sub(r"(\.(pth|pt|tar|bin|ckpt|safetensors))+$", "", file)
    return re.sub(r"[^A-Za-z0-9]+", "-", stem)[:80].strip("-") or "imported"
