"""The networks of torchvision."""

from typing import Any

import torchvision
from torch import nn
from torchvision.ops import DropBlock2d, StochasticDepth

from sdpctl.errors import ModelError


class TorchvisionNetworks:
    """The networks of torchvision that classify images."""

    def build(
        self, name: str, *, num_classes: int, in_channels: int, dropout: float | None = None, drop_path: float | None = None
    ) -> nn.Module:
        """Build a network with fresh weights, on the current default device."""
        # These two warn unless they are told how to draw their weights.
        options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        rates = {"dropout": dropout, "stochastic_depth_prob": drop_path}
        given: dict[str, Any] = {option: rate for option, rate in rates.items() if rate is not None}
        try:
            network: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options, **given)
        except TypeError as error:
            if (refused := next((option for option in given if option in str(error)), None)) is None:
                raise
            key = {"dropout": "dropout", "stochastic_depth_prob": "drop_path"}[refused]
            raise ModelError(f"torchvision's {name} takes no {key}; leave model.{key} out") from error
        if in_channels != 3:
            _take_channels(network, in_channels)
        return network

    def leaves(self) -> tuple[type[nn.Module], ...]:
        """Return the types of modules that are recorded as one operation: those that draw random numbers."""
        return DropBlock2d, StochasticDepth

    def functions(self) -> tuple[Any, ...]:
        """Return the functions that are recorded as one operation."""
        return ()

    def image_size(self, name: str) -> int:
        """Return the height and width of the images that a network is meant for, in pixels."""
        weights = torchvision.models.get_model_weights(name)
        return min(int(entry.transforms().crop_size[0]) for entry in weights) if len(weights) else 224


def _take_channels(network: nn.Module, in_channels: int) -> None:
    """Replace the first convolution of a network by one for a different number of channels."""
    name, conv = next((name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d))
    parent, _, attribute = name.rpartition(".")
    fresh = nn.Conv2d(
        in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        bias=conv.bias is not None,
    )
    setattr(network.get_submodule(parent), attribute, fresh)
