"""From a recipe to what the engine works with."""

import torch

from sdpctl.data.loader import DataSettings, ImageData
from sdpctl.recipe.schema import Recipe


def data_settings(recipe: Recipe) -> DataSettings:
    """Return what a recipe says of its data and of how an image becomes the network's input."""
    data = recipe.data
    return DataSettings(
        dataset=data.dataset,
        root=data.folder,
        image_size=data.image_size,
        in_channels=recipe.model.in_channels,
        num_classes=recipe.model.num_classes,
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


def open_data(recipe: Recipe, device: torch.device) -> ImageData:
    """Open a recipe's data.

    Raises:
        DataError: where the data does not hold what the recipe promises.
    """
    return ImageData(data_settings(recipe), device)
