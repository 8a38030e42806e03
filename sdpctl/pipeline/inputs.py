"""From a recipe to what the engine works with."""

import torch

from sdpctl.data.loader import DataSettings, ImageData
from sdpctl.errors import DataError
from sdpctl.pipeline.context import Context
from sdpctl.recipe.schema import Recipe
from sdpctl.untrusted import printable_path


def data_settings(recipe: Recipe) -> DataSettings:
    """Return what a recipe says of its data and of how an image becomes the network's input."""
    data = recipe.data
    return DataSettings(
        dataset=data.dataset,
        root=data.folder,
        image_size=data.image_size,
        in_channels=recipe.model.in_channels,
        augment=data.augment,
        batch_size=data.batch_size,
        holdout=data.holdout,
        seed=recipe.seed,
        workers=data.workers,
        mean=data.mean,
        std=data.std,
        resize=data.resize,
        interpolation=data.interpolation or "bilinear",
    )


def open_data(recipe: Recipe, device: torch.device, context: Context) -> ImageData:
    """Open a recipe's data: the files that were looked at for its fingerprint.

    Raises:
        DataError: where the data does not hold what the recipe promises.
    """
    located = context.workspace.seen(recipe).located
    if located.classes:  # official files have the classes of the catalog, which the recipe was held against
        _check_classes(recipe, len(located.classes))
    return ImageData(data_settings(recipe), located, device)


def _check_classes(recipe: Recipe, there: int) -> None:
    data = recipe.data
    if there != recipe.model.num_classes:
        both = "; classes are numbered by the sorted names of the folders in train and val together"
        raise DataError(
            f"{printable_path(data.folder)}: {data.dataset} has {there} classes there, model.num_classes promises "
            f"{recipe.model.num_classes}; set model.num_classes={there} or point data.root elsewhere"
            f"{both if data.partial else ''}"
        )
