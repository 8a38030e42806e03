"""The networks of timm."""

from typing import Any

import timm
from timm.layers._fx import get_notrace_functions, get_notrace_modules
from timm.layers.drop import DropBlock2d, DropPath
from torch import nn

from sdpctl.errors import ModelError


class TimmNetworks:
    """The networks of timm that classify images."""

    def build(
        self, name: str, *, num_classes: int, in_channels: int, dropout: float | None = None, drop_path: float | None = None
    ) -> nn.Module:
        """Build a network with fresh weights, on the current default device."""
        rates = {"drop_rate": dropout, "drop_path_rate": drop_path}
        given: dict[str, Any] = {option: rate for option, rate in rates.items() if rate is not None}
        try:
            network: nn.Module = timm.create_model(name, num_classes=num_classes, in_chans=in_channels, **given)
        except TypeError as error:
            if (refused := next((option for option in given if option in str(error)), None)) is None:
                raise
            key = {"drop_rate": "dropout", "drop_path_rate": "drop_path"}[refused]
            raise ModelError(f"timm's {name} takes no {key}; leave model.{key} out") from error
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
