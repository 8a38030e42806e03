"""Networks as chains of segments, one module per family. Importing this package needs no torch."""

from typing import TYPE_CHECKING

from sdpctl.errors import UsageError
from sdpctl.models.registry import (
    ARCHITECTURES,
    FAMILIES,
    Architecture,
    Family,
    Masks,
    Shortcut,
    Stem,
    architecture,
    family_of,
    list_models,
    refused_options,
)
from sdpctl.table import load

if TYPE_CHECKING:
    from sdpctl.models.chain import Chain
    from sdpctl.models.settings import ModelSettings

__all__ = [
    "ARCHITECTURES",
    "FAMILIES",
    "Architecture",
    "Family",
    "Stem",
    "architecture",
    "create_model",
    "empty_model",
    "list_models",
]


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    stem: Stem | None = None,
    width: float | None = None,
    widths: tuple[int, ...] | None = None,
    masks: Masks | None = None,
    shortcut: Shortcut | None = None,
    dropout: float | None = None,
    drop_path: float | None = None,
) -> "Chain":
    """Build a network with fresh weights, drawn from torch's global generator.

    Args:
        name: an architecture, as `list_models` names it: `resnet50`, or `timm/NAME` or `torchvision/NAME`.
        num_classes: K, the length of a row of logits.
        in_channels: channels of an image.
        stem: `imagenet` (7x7/2 and max-pool) or `small` (3x3, for images up to 64 px); the architecture's own by default.
        width: of the residual networks: factor on the channels of every stage, rounded to whole channels; 1 by default.
        widths: of `twopipe`: output channels of its five convolutions.
        masks: of `twopipe`: which channels stay at full resolution in training, `nested` (the first, the default) or `random`.
        shortcut: of ResNet and ResNeXt, where the shape changes: `padding`, `padding-centred` or `projection`; the
            architecture's own by default.
        dropout: of timm's and torchvision's networks: rate of the dropout before the classifier; the network's own by default.
        drop_path: of timm's and torchvision's networks: rate at which the last block's residual branch is left out in
            training, from 0 at the first block (stochastic depth); the network's own by default.

    Raises:
        ModelError: if a network of timm or torchvision cannot be run at several costs.
        UsageError: if the architecture is unknown, or does not accept one of the options.
    """
    given = {
        "stem": stem,
        "width": width,
        "widths": widths,
        "masks": masks,
        "shortcut": shortcut,
        "dropout": dropout,
        "drop_path": drop_path,
    }
    for _, reason in refused_options(name, given):
        raise UsageError(reason)
    family = family_of(name)
    options = {option: given[option] for option in family.options if given[option] is not None}
    network: Chain = load(family.network)(architecture(name), num_classes=num_classes, in_channels=in_channels, **options)
    return network


def empty_model(settings: "ModelSettings") -> "Chain":
    """Build a network on the meta device: shapes without memory."""
    from sdpctl.models.meta import OnMeta

    with OnMeta():
        return create_model(settings.arch, **settings.arguments).to("meta")
