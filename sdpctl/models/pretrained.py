"""Weights that a library offers for its networks: what they are called, how to fetch them, and the images that suit them."""

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from sdpctl.errors import DataError, UsageError, did_you_mean, shown
from sdpctl.models.libraries import LIBRARIES
from sdpctl.models.registry import ARCHITECTURES
from sdpctl.models.traced import networks

OLD_DENSENET = tuple((f".{part}.{number}.", f".{part}{number}.") for part in ("norm", "conv") for number in (1, 2))
"""Parts of parameter names in checkpoints of DenseNets from before torchvision 0.3, each with the part that replaced it."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How images are prepared for weights.

    Args:
        image_size: height and width of a training image, in pixels.
        test_size: height and width of a test image, in pixels.
        resize: shorter side of a test image, in pixels, before its central part is taken.
        mean: mean of each channel, in [0, 1], which is subtracted from the pixels.
        std: standard deviation of each channel, in [0, 1], by which the pixels are divided.
        interpolation: interpolation of resizing.
    """

    image_size: int
    test_size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Weights that a library offers for one of its networks.

    Args:
        library: name of the library.
        network: the library's name of the network.
        weights: the library's name of the weights.
        source: address of the weights.
        preprocessing: how images are prepared for the weights.
        classes: names of the classes, in the order of the logits; empty if the library does not know them.
        load: returns the tensors by the library's names, from the library's cache or from the network.
    """

    library: str
    network: str
    weights: str
    source: str
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    load: Callable[[], Mapping[str, Tensor]] = field(repr=False)

    @property
    def name(self) -> str:
        """The name in `train.init`: library, network and weights."""
        return f"{self.library}/{self.network}.{self.weights}"

    def fetch(self) -> Mapping[str, Tensor]:
        """Return the tensors by the library's names; fetch them unless the library's cache has them.

        Raises:
            DataError: if the weights cannot be fetched, or the file in the cache is damaged.
        """
        try:
            return self.load()
        except (OSError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"{self.source}: these weights could not be fetched ({reason}); fetch the file elsewhere and import it with "
                f"`sdpctl import FILE --arch {self.library}/{self.network}`"
            ) from error


def pretrained(library: str, name: str) -> Pretrained:
    """Look up weights by name. Nothing is fetched.

    Args:
        library: name of a library.
        name: the library's name of a network, a dot, and the name of the weights, such as `resnet50.a1_in1k`; of a network
            alone, the library's default weights are meant.

    Raises:
        ModelError: if the library cannot be imported.
        UsageError: if the library has no such network or weights.
    """
    network, _, weights = name.partition(".")
    known = LIBRARIES[library].networks
    theirs: Any = networks(LIBRARIES[library])  # raises if the library is not installed, so that no names are known
    if network not in known:
        now = LIBRARIES[library].renamed.get(network)
        called = f"{library} now calls {network} {now}; name weights of {now}"
        raise UsageError(ARCHITECTURES.unknown(f"{library}/{network}") if now is None else called)
    offered = theirs.weights(network)
    if not offered:
        raise UsageError(f"{library} has no weights of {network}; import a file with --arch {library}/{network}")
    if weights and weights not in offered:
        raise UsageError(
            f"{library} has no weights {shown(weights)} of {network}{did_you_mean(weights, offered)}; it has "
            f"{', '.join(offered)}"
        )
    found: Pretrained = theirs.pretrained(network, weights or offered[0])
    return found
