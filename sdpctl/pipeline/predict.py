"""What is on some images, by the most accurate instance within a budget."""

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from sdpctl.pipeline.context import Context
from sdpctl.pipeline.loading import open_bundle

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
        images: files.
        context: where, and who is told.
        overrides: of the recipe.
        instance: the one to run.
        max_macs: of one image.
        max_latency_ms: of one image, measured here first.

    Returns:
        The instance, what it costs, milliseconds an image, and for each image its classes with their probabilities.

    Raises:
        BudgetError: where no instance is within the budget.
        DataError: where a file is no image.
    """
    import torch

    from sdpctl.runtime import Runtime

    model = Runtime(open_bundle(ref, context, overrides, instance=instance, chosen=instance is None))
    inputs = [model.preprocess(path) for path in images]
    if max_latency_ms is not None:
        model.measure_latency(1)
    size = BATCH if max_latency_ms is None else 1
    option = model.pick(instance=instance, max_macs=max_macs, max_latency_ms=max_latency_ms)
    model(inputs[0], instance=option.instance)  # the first call prepares
    began = perf_counter()
    parts = [model(chunk, instance=option.instance).cpu() for chunk in torch.split(torch.cat(inputs), size)]
    milliseconds = 1000 * (perf_counter() - began) / len(images)
    shares = torch.cat(parts).softmax(1).topk(min(5, len(model.classes)))
    return {
        "instance": str(option.instance),
        "macs": option.macs,
        "relative": option.relative,
        "milliseconds": milliseconds,
        "images": [
            {"file": str(path), "top": [{"class": model.classes[k], "probability": p} for k, p in zip(ks, ps, strict=True)]}
            for path, ks, ps in zip(images, shares.indices.tolist(), shares.values.tolist(), strict=True)
        ],
    }
