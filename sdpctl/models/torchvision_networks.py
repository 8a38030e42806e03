"""The networks of torchvision."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import DropBlock2d, StochasticDepth

from sdpctl.errors import ModelError
from sdpctl.models.pretrained import OLD_DENSENET, Preprocessing, Pretrained

_SCALED = ("googlenet", "inception_v3")
"""Networks whose pretrained weights want pixels in [-1, 1]; torchvision's modules convert normalised images themselves."""


class TorchvisionNetworks:
    """The networks of torchvision that classify images."""

    def build(
        self, name: str, *, num_classes: int, in_channels: int, dropout: float | None = None, drop_path: float | None = None
    ) -> nn.Module:
        """Build a network with fresh weights, on the current default device."""
        # These two warn unless they are told how to draw their weights.
        options = {"init_weights": True} if name in _SCALED else {}
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

    def old_names(self, name: str) -> tuple[tuple[str, str], ...]:
        """Return parts of parameter names in old checkpoints of a network, each with the part that replaced it."""
        return OLD_DENSENET if name.startswith("densenet") else ()

    def renew_head(self, network: nn.Module) -> None:
        """Keep the classifier that the network was built with, since torchvision has no means to renew it."""

    def weights(self, name: str) -> tuple[str, ...]:
        """Return the names of the weights of a network, the default first."""
        known = torchvision.models.get_model_weights(name)
        default = known.__members__.get("DEFAULT")
        return tuple(sorted((entry.name for entry in known), key=lambda entry: default is None or entry != default.name))

    def pretrained(self, name: str, weights: str) -> Pretrained:
        """Return weights of a network by their name. Nothing is fetched."""
        found = torchvision.models.get_model_weights(name)[weights]
        transforms = found.transforms()
        size = int(transforms.crop_size[0])
        return Pretrained(
            library="torchvision",
            network=name,
            weights=weights,
            source=found.url,
            preprocessing=Preprocessing(
                image_size=size,
                test_size=size,
                resize=int(transforms.resize_size[0]),
                mean=(0.5, 0.5, 0.5) if name in _SCALED else tuple(transforms.mean),
                std=(0.5, 0.5, 0.5) if name in _SCALED else tuple(transforms.std),
                interpolation=transforms.interpolation.value,
            ),
            classes=tuple(found.meta["categories"] or ()),
            load=lambda: _state(found.url),
        )


def _state(url: str) -> Mapping[str, Tensor]:
    """Return weights from torch's hub folder; fetch them first if they are not there. Pickled code is not run."""
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        digits = path.stem.rpartition("-")[2]  # the first digits of the file's SHA-256, which torch checks
        torch.hub.download_url_to_file(url, str(path), digits, progress=False)
    state: Mapping[str, Tensor] = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    return state


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
