"""Classify images by the most accurate instance, or cascade of instances, within a budget."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from sdpctl.data.files import IMAGE_SUFFIXES, bad_images, images_in, undecodable, unreadable
from sdpctl.errors import DataError
from sdpctl.loading import open_bundle
from sdpctl.stages.context import Context
from sdpctl.uncertainty import choice_notes
from sdpctl.untrusted import printable_path

if TYPE_CHECKING:
    from torch import Tensor

    from sdpctl.export.description import CascadeOption
    from sdpctl.runtime import Runtime

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
    cascade: bool = False,
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
        max_latency_ms: maximum latency in milliseconds per image; the instances are measured
            first, unless the bundle has a table of latencies that `sdpctl latency` measured on this machine.
        cascade: whether to run the most accurate cascade whose mean MACs per held-out image are within `max_macs`.
        calibrates: whether missing statistics may be gathered.

    Returns:
        The instance or cascade, its cost, milliseconds per image, and for each image its classes with their probabilities. The
        cost of a cascade is the mean over these images; each image has the instance that answered it, and its own cost.

    Raises:
        BudgetError: if no instance or cascade is within the budget.
        DataError: if files are not images, with a line for each of them; or if a folder contains no image.
        NotFoundError: if a cascade is asked for and there is none.
        UsageError: if a cascade is asked for together with an instance or a latency.
    """
    from sdpctl.runtime import Runtime, check_cascade

    if cascade:
        check_cascade(True, max_macs, max_latency_ms, instance)
    files = _files(images)
    opened = open_bundle(
        ref, context, overrides, instance=instance, chosen=instance is None, cascade=cascade, calibrates=calibrates
    )
    model = Runtime(opened)
    if cascade:
        return _by_cascade(model, model.pick(max_macs=max_macs, cascade=True), files)
    if max_latency_ms is not None and not model.knows_latency(1):
        if model.refused_latencies is not None:
            context.report.note(f"{ref}: {model.refused_latencies}; measuring here")
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
    logits_NK, milliseconds = _timed(model, files, size, lambda x_NCHW: (model(x_NCHW, instance=option.instance),))
    return {
        "instance": str(option.instance),
        "macs": option.macs,
        "relative": option.relative,
        "milliseconds": milliseconds,
        "images": [{"file": str(path), "top": top} for path, top in zip(files, _likeliest(model, *logits_NK), strict=True)],
    }


def _by_cascade(model: "Runtime", option: "CascadeOption", files: Sequence[Path]) -> dict[str, Any]:
    """Return the five most likely classes of each image by a cascade, and what each image cost."""
    (log_probabilities_NK, left_N), milliseconds = _timed(
        model, files, BATCH, lambda x_NCHW: model.run_cascade(x_NCHW, option.cascade)
    )
    spent = list(accumulate(option.member_macs))
    left = left_N.tolist()
    mean = sum(spent[number] for number in left) / len(files)
    return {
        "cascade": str(option.cascade),
        "macs": round(mean),
        "relative": mean / model.description.full_macs,
        "milliseconds": milliseconds,
        "images": [
            {"file": str(path), "instance": str(option.cascade.members[number]), "macs": spent[number], "top": top}
            for path, number, top in zip(files, left, _likeliest(model, log_probabilities_NK), strict=True)
        ],
    }


def _timed(
    model: "Runtime", files: Sequence[Path], size: int, run: "Callable[[Tensor], tuple[Tensor, ...]]"
) -> "tuple[tuple[Tensor, ...], float]":
    """Run a function on the images of files, batch by batch.

    Returns:
        What the function returned, each tensor for all images, on the CPU; and milliseconds per image.
    """
    import torch

    results, seconds = [], 0.0
    for start in range(0, len(files), size):
        x_NCHW = torch.cat([model.preprocess(path) for path in files[start : start + size]])
        if not start:
            run(x_NCHW)  # the first call is slower, so it is not timed
        began = perf_counter()
        results.append([tensor.cpu() for tensor in run(x_NCHW)])
        seconds += perf_counter() - began
    return tuple(torch.cat(tensors) for tensors in zip(*results, strict=True)), 1000 * seconds / len(files)


def _likeliest(model: "Runtime", logits_NK: "Tensor") -> list[list[dict[str, Any]]]:
    """Return the five most likely classes of each image, given logits or log-probabilities."""
    top = logits_NK.softmax(1).topk(min(5, len(model.classes)))
    return [
        [{"class": model.classes[k], "probability": p} for k, p in zip(classes, shares, strict=True)]
        for classes, shares in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


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
