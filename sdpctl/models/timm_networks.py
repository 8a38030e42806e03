"""The networks of timm."""

from typing import Any

import timm
from timm.layers._fx import get_notrace_functions, get_notrace_modules
from timm.layers.drop import DropBlock2d, DropPath
from torch import nn


class TimmNetworks:
    """The networks of timm that classify images."""

    def build(self, name: str, *, num_classes: int, in_channels: int) -> nn.Module:
        """Build a network with fresh weights, on the current default device."""
        network: nn.Module = timm.create_model(name, num_classes=num_classes, in_chans=in_channels)
        return network

    def leaves(self) -> tuple[type[nn.Module], ...]:
        """Return the types of modules that are recorded as one operation: timm's list, and those that draw random numbers."""
        return (*get_notrace_modules(), DropPath, DropBlock2d)  # type: ignore[no-untyped-call]

    def functions(self) -> tuple[Any, ...]:
        """Return the functions that are recorded as one operation: timm's list."""
        return tuple(get_notrace_functions())  # type: ignore[no-untyped-call]

    def image_size(self, name: str) -> int:
        """Return the height and width of the images that a network is meant for, in pixels."""
        config = timm.get_pretrained_cfg(name)
        return 224 if config is None else int(config.input_size[1])
