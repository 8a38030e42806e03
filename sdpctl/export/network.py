"""One instance as a separate network, traced by torch.export; the formats of one instance share this module.

Height and width are fixed; the batch size is not.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_map

from sdpctl.data.loader import Normalise
from sdpctl.engine.calibrate import Statistics
from sdpctl.engine.tree import Tree
from sdpctl.export.description import Description
from sdpctl.export.format import Source
from sdpctl.instance import Instance
from sdpctl.models.chain import Chain
from sdpctl.models.state import State

INPUT, OUTPUT = "images", "logits"


class OneInstance(nn.Module):
    """A chain that runs one instance; batch norms and classifier have what belongs to this instance.

    Args:
        model: the chain, on the CPU; it is not changed.
        instance: the instance.
        statistics: BatchNorm statistics that cover this instance.
        normalise: normalisation of images that are uint8 pixels; None for images that are normalised already.

    Raises:
        NotFoundError: if the instance has no statistics.
    """

    def __init__(self, model: Chain, instance: Instance, statistics: Statistics, normalise: Normalise | None = None) -> None:
        super().__init__()
        self.network = copy.deepcopy(model).to(memory_format=torch.contiguous_format).eval()
        self.instance = instance
        for segment, node in Tree(self.network, [instance]).nodes():
            for name, bn in self.network.norms(segment).items():
                bn.running_mean, bn.running_var = (tensor.clone() for tensor in statistics.at(node, name))
                for side in ("weight", "bias"):
                    self._take(statistics, node, f"{name}.{side}")
        for name in self.network.classifier_names:
            self._take(statistics, instance.among(self.network.points), name)
        self.normalise = normalise

    def normalised(self, images: Tensor) -> Tensor:
        """Return normalised images, given images as the export takes them."""
        return images if self.normalise is None else images.float() * self.normalise.scale + self.normalise.shift

    def _take(self, statistics: Statistics, node: Instance, name: str) -> None:
        """Replace a parameter of the copy by that of a node, if it was fine-tuned there."""
        if (values := statistics.tuned.get((node, name))) is not None:
            self.network.get_parameter(name).data = values.clone()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (N, K), of normalised images or of uint8 pixels, (N, C, H, W)."""
        logits_NK: Tensor = self.network(self.normalised(images), self.instance)
        return logits_NK


def one_instance(source: Source) -> OneInstance:
    """Build the network of an export that holds one instance."""
    (option,) = source.description.options
    return OneInstance(source.model, option.instance, source.statistics, normalisation(source.description))


def normalisation(description: Description) -> Normalise | None:
    """Return how an export normalises uint8 pixels; None if it takes normalised images."""
    takes = description.input
    return Normalise(takes.mean, takes.std, torch.device("cpu")) if takes.raw else None


def example(description: Description) -> Tensor:
    """Return two blank images as an export takes them, (2, C, H, W)."""
    takes, channels = description.input, description.network.in_channels
    return torch.zeros(2, channels, takes.size, takes.size, dtype=torch.uint8 if takes.raw else torch.float32)


def trace(network: nn.Module, arguments: tuple[State, ...]) -> ExportedProgram:
    """Trace a network for inputs of one size and any number of images.

    Args:
        network: a network on the CPU, in evaluation mode.
        arguments: example inputs of two images, each a pytree of tensors.
    """
    batch = Dim("batch", min=1)
    with torch.no_grad():
        return torch.export.export(network, arguments, dynamic_shapes=tree_map(lambda _: {0: batch}, arguments), strict=False)


def metadata(description: Description) -> dict[str, Any]:
    """Return the description of an export that holds one instance, flat, as plain data."""
    document = description.document()
    (option,) = document.pop("options")
    return {**document, **option}
