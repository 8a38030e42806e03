"""Networks as chains of segments, one module per family. Importing this package needs no torch."""

from dataclasses import replace
from typing import TYPE_CHECKING

from sdpctl.errors import UsageError
from sdpctl.models.registry import ARCHITECTURES, Masks, Shortcut, Stem, TwoPipeArchitecture, architecture, list_models

if TYPE_CHECKING:
    from sdpctl.models.chain import Chain
    from sdpctl.models.settings import ModelSettings

__all__ = ["ARCHITECTURES", "Stem", "architecture", "create_model", "empty_model", "list_models"]


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    stem: Stem | None = None,
    widths: tuple[int, ...] | None = None,
    masks: Masks = "nested",
    shortcut: Shortcut | None = None,
) -> "Chain":
    """Build a network with fresh weights, drawn from torch's global generator.

    Args:
        name: an architecture, as `list_models` names it.
        num_classes: K, the length of a row of logits.
        in_channels: channels of an image.
        stem: `imagenet` (7x7/2 and max-pool) or `small` (3x3, for images up to 64 px); the architecture's own by default.
        widths: of `twopipe`: output channels of its five convolutions.
        masks: of `twopipe`: which channels stay at full resolution in training, `nested` (the first) or `random`.
        shortcut: of ResNet and ResNeXt, where the shape changes: `padding`, `padding-centred` or `projection`; the
            architecture's own by default.

    Raises:
        UsageError: for an unknown architecture, or a shortcut that it cannot have.
    """
    from sdpctl.models.preresnet import PreResNet
    from sdpctl.models.resnet import ResNet

    arch = architecture(name)
    if shortcut is not None and shortcut not in arch.shortcuts:
        has = f"choose {', '.join(arch.shortcuts)}" if arch.shortcuts else "leave this out"
        raise UsageError(f"{name} has no shortcut {shortcut!r}; {has}")
    if isinstance(arch, TwoPipeArchitecture):
        from sdpctl.models.twopipe import TwoPipe

        return TwoPipe(num_classes=num_classes, in_channels=in_channels, widths=widths or arch.widths, masks=masks)
    arch = replace(arch, shortcut=shortcut or arch.shortcut)
    family = {"resnet": ResNet, "preresnet": PreResNet}[arch.family]
    return family(arch, num_classes=num_classes, in_channels=in_channels, stem=stem or arch.stem)


def empty_model(settings: "ModelSettings") -> "Chain":
    """Build a network on the meta device: shapes without memory."""
    import torch

    with torch.device("meta"):
        return create_model(settings.arch, **settings.arguments)
