"""Networks of torchvision and timm as chains, cut from the libraries' own graphs.

Parameters are named as the library names them, so that its checkpoints load. The points are the ends of the network's blocks,
named by the modules of the blocks.
"""

import copy
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sdpctl.errors import ModelError
from sdpctl.models.chain import Chain, Norm, Segment, average_shrink
from sdpctl.models.graph import IMAGES
from sdpctl.models.libraries import LIBRARIES, Library
from sdpctl.models.meta import OnMeta
from sdpctl.models.registry import TracedArchitecture
from sdpctl.models.tracing import Piece, Rest, Traced, trace
from sdpctl.table import load

if TYPE_CHECKING:
    from sdpctl.models.pretrained import Pretrained

SMALL = 64
"""Height and width of the images by which a network is verified, in pixels, if the network can take them."""


class Networks(Protocol):
    """The networks of a library."""

    def build(
        self, name: str, *, num_classes: int, in_channels: int, dropout: float | None = None, drop_path: float | None = None
    ) -> nn.Module:
        """Build a network with fresh weights, on the current default device.

        Args:
            name: the library's name of the network.
            num_classes: number of classes, K.
            in_channels: channels of an image.
            dropout: rate of the dropout before the classifier; the network's own by default.
            drop_path: rate of stochastic depth at the last block; the network's own by default.

        Raises:
            ModelError: if the network does not take one of the rates.
        """

    def leaves(self) -> tuple[type[nn.Module], ...]:
        """Return the types of modules that are recorded as one operation, besides torch's own."""

    def functions(self) -> tuple[Any, ...]:
        """Return the functions that are recorded as one operation."""

    def image_size(self, name: str) -> int:
        """Return the height and width of the images that a network is meant for, in pixels."""

    def old_names(self, name: str) -> tuple[tuple[str, str], ...]:
        """Return parts of parameter names in old checkpoints of a network, each with the part that replaced it."""

    def renew_head(self, network: nn.Module) -> None:
        """Draw a new classifier from torch's global generator, as the library does for pretrained networks."""

    def weights(self, name: str) -> tuple[str, ...]:
        """Return the names of the weights of a network, the default first."""

    def pretrained(self, name: str, weights: str) -> "Pretrained":
        """Return weights of a network by their name. Nothing is fetched."""


def networks(library: Library) -> Networks:
    """Return the networks of a library.

    Raises:
        ModelError: if the library cannot be imported.
    """
    try:
        found: Networks = load(library.code)()
    except ImportError as error:
        raise ModelError(
            f"{library.name} cannot be imported ({error}); install it with `pip install {library.name}`"
        ) from error
    return found


def _empty(arch: TracedArchitecture, num_classes: int = 1000, **rates: float | None) -> nn.Module:
    """Build a library's network on the meta device.

    Raises:
        ModelError: if the library cannot be imported, or the network needs values of its weights while it is built.
    """
    library = networks(LIBRARIES[arch.family])
    try:
        with OnMeta():
            return library.build(arch.network, num_classes=num_classes, in_channels=3, **rates).to("meta").eval()
    except RuntimeError as error:
        raise ModelError(f"it computes with its weights while it is built ({' '.join(str(error).split())})") from error


@cache
def _head_names(arch: TracedArchitecture) -> tuple[str, ...]:
    """Return the names of the parameters whose shape depends on the number of classes, those of the classifier first."""
    classifier = f"{traced(arch).classifier}."
    many, few = (dict(_empty(arch, classes).named_parameters()) for classes in (1000, 10))
    differing = [name for name, parameter in many.items() if parameter.shape != few[name].shape]
    return tuple(sorted(differing, key=lambda name: not name.startswith(classifier)))


def traced(arch: TracedArchitecture, dropout: float | None = None, drop_path: float | None = None) -> Traced:
    """Trace an architecture, and try each of its points on shapes.

    Args:
        arch: the architecture.
        dropout: rate of the dropout before the classifier; the network's own by default.
        drop_path: rate of stochastic depth at the last block; the network's own by default.

    Raises:
        ModelError: if the library cannot be imported, the network does not take one of the rates, or the network cannot be run
            at several costs.
    """
    return _traced(arch, dropout, drop_path)


@cache
def _traced(arch: TracedArchitecture, dropout: float | None, drop_path: float | None) -> Traced:
    library = networks(LIBRARIES[arch.family])
    size = library.image_size(arch.network)
    try:
        return trace(_empty(arch, dropout=dropout, drop_path=drop_path), library.leaves(), library.functions(), (3, size, size))
    except ModelError as error:
        raise ModelError(f"{arch.name} cannot be run at several costs: {error}; choose a different network") from error


class TracedNetwork(Chain):
    """A network of torchvision or timm.

    Args:
        arch: the architecture.
        num_classes: number of classes, K.
        in_channels: channels of an image.
        dropout: rate of the dropout before the classifier; the network's own by default.
        drop_path: rate of stochastic depth at the last block; the network's own by default.

    Raises:
        ModelError: if the network does not take one of the rates, or cannot be run at several costs.
    """

    draws_in_training = True
    draws_for_each_image = True
    arch: TracedArchitecture
    library_network: nn.Module
    pieces: tuple[Piece, ...]

    def __init__(
        self,
        arch: TracedArchitecture,
        *,
        num_classes: int,
        in_channels: int,
        dropout: float | None = None,
        drop_path: float | None = None,
    ) -> None:
        super().__init__()
        parts = traced(arch, dropout, drop_path)
        network = networks(LIBRARIES[arch.family]).build(
            arch.network, num_classes=num_classes, in_channels=in_channels, dropout=dropout, drop_path=drop_path
        )
        for name in parts.overwriting:
            network.get_submodule(name).inplace = True  # type: ignore[assignment]
        # The pieces call the modules of the library's network. It shares its tables of weights with this chain, and is not a
        # submodule, so that the names have no prefix.
        self.__dict__["library_network"] = network
        for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[table] = network.__dict__[table]
        if clash := sorted(network._modules.keys() & {*dir(type(self)), *self.__dict__}):
            raise ModelError(f"{arch.name}: its module {clash[0]} has the name of an attribute of a chain")
        self.arch, self.name_aliases = arch, networks(LIBRARIES[arch.family]).old_names(arch.network)
        self.pieces, self.classifier_name, self.input_conv_name = parts.pieces, parts.classifier, parts.input_conv
        if not any(parameter.is_meta for parameter in self.parameters()):
            _verify(arch, self, parts)

    @property
    def head_names(self) -> tuple[str, ...]:
        """The names of the parameters whose shape depends on the number of classes, those of the classifier first."""
        return _head_names(self.arch)

    @property
    def unused_names(self) -> frozenset[str]:
        """The names of the parameters and buffers that no segment uses: those of auxiliary classifiers."""
        used = {name for piece in self.pieces for name in (*piece.layers, *piece.weights)}

        def above(name: str) -> set[str]:
            parts = name.split(".")
            return {".".join(parts[:end]) for end in range(1, len(parts) + 1)}

        return frozenset(name for name in self.state_dict() if not above(name) & used)

    def renew_head(self) -> None:
        """Draw a new classifier from torch's global generator, to be trained on top of pretrained weights."""
        networks(LIBRARIES[self.arch.family]).renew_head(self.library_network)

    def train(self, mode: bool = True) -> Self:
        """Switch to training, or to evaluation."""
        super().train(mode)
        self.library_network.training = mode
        return self

    def segments(self) -> tuple[Segment, ...]:
        """Return stem, blocks and head."""
        return tuple(
            Segment(
                name=piece.name,
                modules=piece.layers,
                body=partial(self._body, number),
                point=piece.point,
                shrink=None if piece.point is None else partial(average_shrink, least=piece.least),
                weights=piece.weights,
            )
            for number, piece in enumerate(self.pieces)
        )

    def _body(self, number: int, state: Tensor, norm: Norm) -> Tensor:
        piece = self.pieces[number]
        return (piece.training if self.training else piece.evaluation)(self.library_network, state, norm)


_VERIFIED: set[Traced] = set()


def _verify(arch: TracedArchitecture, chain: TracedNetwork, parts: Traced) -> None:
    """Compare the logits of a network's segments with those of the library's module, once for each graph.

    The copy that is compared has random scales, since libraries let many residual branches begin with a scale of 0.

    Raises:
        ModelError: if the logits differ.
    """
    if parts in _VERIFIED:
        return
    in_channels = chain.get_parameter(f"{chain.input_conv_name}.weight").shape[1]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        copied = copy.deepcopy(chain).cpu().double()  # batch norms of few pixels amplify the rounding of float32
        for parameter in copied.parameters():
            if parameter.numel() == max(parameter.shape, default=1):
                parameter.uniform_(0.5, 1.5)
        size = SMALL if refused_size(arch, SMALL) is None else image_size(arch)
        images = torch.randn(IMAGES, in_channels, size, size, dtype=torch.float64)
        for training in (True, False):
            for module in copied.train(training).modules():
                if not isinstance(module, nn.BatchNorm2d) and not any(module.children()):
                    module.training = False  # an auxiliary classifier would draw random numbers that the segments do not
            torch.manual_seed(0)
            expected = tree_leaves(copied.library_network(images))[0]  # without the results of auxiliary classifiers
            torch.manual_seed(0)
            if not torch.allclose(copied(images), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max())):
                mode = "training" if training else "evaluation"
                raise ModelError(f"{arch.name}: its segments do not give the result of the whole network in {mode}")
    _VERIFIED.add(parts)


def points(arch: TracedArchitecture) -> tuple[str, ...]:
    """Return the points of an architecture, in network order.

    Raises:
        ModelError: if the library cannot be imported, or the network cannot be run at several costs.
    """
    return tuple(piece.point for piece in traced(arch).pieces if piece.point is not None)


def image_size(arch: TracedArchitecture) -> int:
    """Return the height and width of the images that an architecture is meant for, in pixels.

    Raises:
        ModelError: if the library cannot be imported.
    """
    return networks(LIBRARIES[arch.family]).image_size(arch.network)


@cache
def refused_size(arch: TracedArchitecture, size: int) -> str | None:
    """Return why a network cannot take images of a size; None if it can.

    Args:
        arch: the architecture.
        size: height and width of an image, in pixels.

    Raises:
        ModelError: if the library cannot be imported, or the network cannot be run at several costs.
    """
    pieces = traced(arch).pieces
    try:
        Rest([piece.evaluation for piece in pieces], _empty(arch)).maps((3, size, size))
    except ModelError as error:
        reason = str(error).rsplit(". ", 1)[-1]
        return f"{arch.name} cannot take images of {size} px ({reason}); it is meant for {image_size(arch)} px"
    return None
