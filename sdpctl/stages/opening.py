"""Open what the engine works with, from a recipe and a checkpoint: the network, the images, and batches with progress."""

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from sdpctl.engine.distributed import ALONE, Ranks
from sdpctl.errors import DataError
from sdpctl.recipe.schema import Recipe
from sdpctl.stages.context import Context
from sdpctl.stages.layers import read_model
from sdpctl.stages.shared import SharedNetwork
from sdpctl.store import Artifact
from sdpctl.untrusted import printable_path

if TYPE_CHECKING:
    import torch

    from sdpctl.data.loader import Batch, ImageData
    from sdpctl.models.chain import Chain


def open_model(checkpoint: Artifact, recipe: Recipe, context: Context, *, images: int) -> "tuple[Chain, torch.device]":
    """Return a checkpoint's network in evaluation mode on the recipe's device, and that device.

    Args:
        checkpoint: the artifact with the weights.
        recipe: names the network and the device.
        context: gives the store.
        images: number of images per batch; the number of threads depends on it.

    Raises:
        IntegrityError: if the weights do not fit the network.
        ResourceError: if the machine has no such device.
    """
    from sdpctl.engine.device import pick_device
    from sdpctl.engine.threads import choose_threads

    device = pick_device(recipe.device)
    model = read_model(context.store, checkpoint, recipe.model)
    choose_threads(model, recipe.model.in_channels, recipe.scored_size, images)
    return model.to(device).channels_last().eval(), device


def open_data(
    recipe: Recipe,
    device: "torch.device",
    context: Context,
    *,
    scored_size: int | None = None,
    stoppable: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ranks: Ranks = ALONE,
) -> "ImageData":
    """Open a recipe's data: the same files that the fingerprint was computed from.

    Args:
        recipe: names the data.
        device: device of the batches.
        context: gives the store.
        scored_size: height and width of a test image and of a held-out image, in pixels; those of an evaluation by default.
        stoppable: yields items, and may raise an interruption before each; for the time in which a cache of images is made.
        ranks: the processes that share the images; by default this process has all images.

    Raises:
        DataError: if the data does not match the recipe.
    """
    from sdpctl.data.cache import Cache
    from sdpctl.data.loader import ImageData

    seen = context.workspace.seen(recipe)
    located = seen.located
    if located.classes:  # for official files, the recipe was already checked against the catalog's number of classes
        _check_classes(recipe, len(located.classes))
    size = scored_size or recipe.scored_size
    cache = None
    if recipe.data.cache != "none":
        folder = context.path / "cache" if recipe.data.cache == "disk" else None
        cache = Cache(folder, seen.fingerprint, watch=partial(_resizing, context, stoppable), note=context.note_once)
    return ImageData(
        recipe.data,
        located,
        device,
        in_channels=recipe.model.in_channels,
        seed=recipe.seed,
        scored_size=size,
        cache=cache,
        rank=ranks.rank,
        ranks=ranks.size,
    )


def open_network(checkpoint: Artifact, recipe: Recipe, context: Context, *, images: int) -> SharedNetwork:
    """Open a checkpoint's network and its data on every rank; see `open_model` and `open_data`."""
    model, device = open_model(checkpoint, recipe, context, images=images)
    data = open_data(recipe, device, context, ranks=context.ranks)
    shared = SharedNetwork(model, data, recipe, context.workspace.seen(recipe).located, context.ranks)
    shared.send_weights(images=images)
    return shared


def _resizing(
    context: Context, stoppable: Callable[[Iterable[Any]], Iterable[Any]], batches: Iterable[Any], total: int
) -> Iterator[Any]:
    """Yield batches of images that are resized for a cache, and show the progress."""
    with context.report.progress("resizing the images once", total) as bar:
        for batch in stoppable(batches):
            yield batch
            bar.advance()


def _check_classes(recipe: Recipe, there: int) -> None:
    data = recipe.data
    if there != recipe.model.num_classes:
        both = "; classes are numbered by the sorted names of the folders in train and val together"
        raise DataError(
            f"{printable_path(data.folder)}: {data.dataset} has {there} classes in this folder, but model.num_classes is "
            f"{recipe.model.num_classes}; set model.num_classes={there}, or set data.root to a different folder"
            f"{both if data.partial else ''}"
        )


def timed(batches: "Iterable[Batch]", total: int, text: str, tag: str, context: Context, *, images: int) -> "Iterator[Batch]":
    """Yield batches with a progress bar; afterwards report and log how long they took.

    Args:
        batches: (x_NCHW, labels_N), those of this rank.
        total: number of batches of this rank.
        text: description of the work, for the progress bar and the log.
        tag: name of the log.
        context: gives the log and the reporter.
        images: number of images of all ranks.
    """
    began = time.monotonic()
    with context.report.progress(text, total) as bar:
        for batch in batches:
            yield batch
            bar.advance()
    seconds = time.monotonic() - began
    context.report.detail(f"{text}: {seconds:.1f} s, {images / seconds:,.0f} images/s")
    context.workspace.log(tag, event=text, images=images, seconds=seconds, images_per_second=images / seconds)
