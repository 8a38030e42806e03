"""Classify images by the most accurate instance within a budget."""

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from sdpctl.data.files import IMAGE_SUFFIXES, bad_images, images_in, undecodable, unreadable
from sdpctl.errors import DataError
from sdpctl.loading import open_bundle
from sdpctl.stages.context import Context
from sdpctl.uncertainty import choice_notes
from sdpctl.untrusted import printable_path

BATCH = 32


def predict(
    ref: str,
    images: Sequence[Path],
    context: Context,
    overrides: Sequence[str] = (),
    *,
    instance: str | None = None,
    max_macs: str | None = None,
    max_latency_ms: float | None = None,
    calibrates: bool = True,
) -> dict[str, Any]:
    """Return the five most likely classes of each image.

    Args:
        ref: the folder of a bundle, or a tag or digest in the store.
        images: image files and folders; of a folder, all images at any depth are used except hidden ones.
        context: gives the store and the reporter.
        overrides: overrides of the recipe.
        instance: the instance to run; by default the most accurate one within the budgets.
        max_macs: maximum MACs per image.
        max_latency_ms: maximum latency in milliseconds per image; the latency of the instances is measured first.
        calibrates: whether missing statistics may be gathered.

    Returns:
        The instance, its cost, milliseconds per image, and for each image its classes with their probabilities.

    Raises:
        BudgetError: if no instance is within the budget.
        DataError: if files are not images, with a line for each of them; or if a folder contains no image.
    """
    import torch

    from sdpctl.runtime import Runtime

    files = _files(images)
    model = Runtime(open_bundle(ref, context, overrides, instance=instance, chosen=instance is None, calibrates=calibrates))
    if max_latency_ms is not None:
        model.measure_latency(1)
    size = BATCH if max_latency_ms is None else 1
    budget = max_macs is not None or max_latency_ms is not None
    if instance is None and not budget and any(option.heldout_top1 is None for option in model.instances):
        instance = "full"
        context.report.note(f"{ref}: running `full`, since no accuracy on held-out images is known to choose an instance by")
    option = model.pick(instance=instance, max_macs=max_macs, max_latency_ms=max_latency_ms)
    if instance is None and option.heldout_top1 is not None:
        scores = [other.heldout_top1 or 0 for other in model.instances]
        for line in choice_notes(scores, option.heldout_top1, model.description.heldout_images):
            context.report.note(f"{ref}: {line}")
    found: list[list[dict[str, Any]]] = []
    seconds = 0.0
    for start in range(0, len(files), size):
        x_NCHW = torch.cat([model.preprocess(path) for path in files[start : start + size]])
        if not start:
            model(x_NCHW, instance=option.instance)  # the first call is slower, so it is not timed
        began = perf_counter()
        logits_NK = model(x_NCHW, instance=option.instance).cpu()
        seconds += perf_counter() - began
        top = logits_NK.softmax(1).topk(min(5, len(model.classes)))
        for classes, shares in zip(top.indices.tolist(), top.values.tolist(), strict=True):
            found.append([{"class": model.classes[k], "probability": p} for k, p in zip(classes, shares, strict=True)])
    return {
        "instance": str(option.instance),
        "macs": option.macs,
        "relative": option.relative,
        "milliseconds": 1000 * seconds / len(files),
        "images": [{"file": str(path), "top": top} for path, top in zip(files, found, strict=True)],
    }


def _files(paths: Sequence[Path]) -> list[Path]:
    """Return the image files that paths name; decode each file once to check it.

    Raises:
        DataError: if files cannot be used, with a line for each of them.
    """
    files: list[Path] = []
    for path in paths:
        try:
            inside = images_in(path) if path.is_dir() else [path]
        except OSError as error:
            raise unreadable(error) from error
        if not inside:
            raise DataError(f"{printable_path(path)}: no image in this folder ({', '.join(IMAGE_SUFFIXES)})")
        files += inside
    if bad := undecodable(files):
        raise bad_images(bad, len(files), "leave {} out")
    return files
