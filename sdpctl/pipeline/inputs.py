"""From a recipe to what the engine works with."""

import torch

from sdpctl.data.loader import ImageData
from sdpctl.errors import DataError
from sdpctl.pipeline.context import Context
from sdpctl.recipe.schema import Recipe
from sdpctl.untrusted import printable_path


def open_data(recipe: Recipe, device: torch.device, context: Context) -> ImageData:
    """Open a recipe's data: the files that were looked at for its fingerprint.

    Raises:
        DataError: where the data does not hold what the recipe promises.
    """
    located = context.workspace.seen(recipe).located
    if located.classes:  # official files have the classes of the catalog, which the recipe was held against
        _check_classes(recipe, len(located.classes))
    return ImageData(recipe.data, located, device, in_channels=recipe.model.in_channels, seed=recipe.seed)


def _check_classes(recipe: Recipe, there: int) -> None:
    data = recipe.data
    if there != recipe.model.num_classes:
        both = "; classes are numbered by the sorted names of the folders in train and val together"
        raise DataError(
            f"{printable_path(data.folder)}: {data.dataset} has {there} classes there, model.num_classes promises "
            f"{recipe.model.num_classes}; set model.num_classes={there} or point data.root elsewhere"
            f"{both if data.partial else ''}"
        )
