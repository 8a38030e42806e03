"""What is on some images, by the most accurate instance within a budget."""

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from sdpctl.data.files import IMAGE_SUFFIXES, bad_images, images_in, undecodable, unreadable
from sdpctl.errors import DataError
from sdpctl.pipeline.context import Context
from sdpctl.pipeline.loading import open_bundle
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
) -> dict[str, Any]:
    """Return the five likeliest classes of each image.

    Args:
        ref: a bundle, or what a store has.
        images: files, and folders: all images in them and below, those with hidden names left out.
        context: where, and who is told.
        overrides: of the recipe.
        instance: the one to run.
        max_macs: of one image.
        max_latency_ms: of one image, measured here first.

    Returns:
        The instance, what it costs, milliseconds an image, and for each image its classes with their probabilities.

    Raises:
        BudgetError: where no instance is within the budget.
        DataError: with a line for every file that is not an image; or where a folder holds none.
    """
    import torch

    from sdpctl.runtime import Runtime

    files = _files(images)
    model = Runtime(open_bundle(ref, context, overrides, instance=instance, chosen=instance is None))
    if max_latency_ms is not None:
        model.measure_latency(1)
    size = BATCH if max_latency_ms is None else 1
    budget = max_macs is not None or max_latency_ms is not None
    if instance is None and not budget and any(option.heldout_top1 is None for option in model.instances):
        instance = "full"
        context.report.note(f"{ref}: running `full`: no accuracy on held-out images is known to choose an instance by")
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
            model(x_NCHW, instance=option.instance)  # the first call prepares
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
    """Return the image files that paths mean, after a look at each.

    Raises:
        DataError: with a line for every one that cannot be used.
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
