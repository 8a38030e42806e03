"""Networks of torchvision and timm as chains, cut from the libraries' own graphs.

Parameters are named as the library names them, so that its checkpoints load. The points are the ends of the network's blocks,
named by the modules of the blocks.
"""

from functools import cache, partial
from typing import TYPE_CHECKING, Any, Protocol, Self

from torch import Tensor, nn

from sdpctl.errors import ModelError
from sdpctl.models.chain import Chain, Norm, Segment, average_shrink
from sdpctl.models.libraries import LIBRARIES, Library
from sdpctl.models.meta import OnMeta
from sdpctl.models.registry import TracedArchitecture
from sdpctl.models.tracing import Piece, Traced, trace, unable
from sdpctl.table import load

if TYPE_CHECKING:
    from sdpctl.models.pretrained import Pretrained


class Networks(Protocol):
    """The networks of a library."""

    def build(self, name: str, *, num_classes: int, in_channels: int) -> nn.Module:
        """Build a network with fresh weights, on the current default device."""

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


def _empty(arch: TracedArchitecture, num_classes: int = 1000) -> nn.Module:
    """Build a library's network on the meta device."""
    with OnMeta():
        built = networks(LIBRARIES[arch.family]).build(arch.network, num_classes=num_classes, in_channels=3)
        return built.to("meta").eval()


@cache
def _head_names(arch: TracedArchitecture) -> tuple[str, ...]:
    """Return the names of the parameters whose shape depends on the number of classes, those of the classifier first."""
    classifier = f"{traced(arch).classifier}."
    many, few = (dict(_empty(arch, classes).named_parameters()) for classes in (1000, 10))
    differing = [name for name, parameter in many.items() if parameter.shape != few[name].shape]
    return tuple(sorted(differing, key=lambda name: not name.startswith(classifier)))


@cache
def traced(arch: TracedArchitecture) -> Traced:
    """Trace an architecture, and try each of its points on shapes.

    Raises:
        ModelError: if the library cannot be imported, or the network cannot be run at several costs.
    """
    library = networks(LIBRARIES[arch.family])
    size = library.image_size(arch.network)
    try:
        return trace(_empty(arch), library.leaves(), library.functions(), (3, size, size))
    except ModelError as error:
        raise ModelError(f"{arch.name}: {error}") from error


class TracedNetwork(Chain):
    """A network of torchvision or timm.

    Args:
        arch: the architecture.
        num_classes: number of classes, K.
        in_channels: channels of an image.

    Raises:
        ModelError: if the network cannot be run at several costs.
    """

    draws_in_training = True
    arch: TracedArchitecture
    network: nn.Module
    pieces: tuple[Piece, ...]

    def __init__(self, arch: TracedArchitecture, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        parts = traced(arch)
        network = networks(LIBRARIES[arch.family]).build(arch.network, num_classes=num_classes, in_channels=in_channels)
        for name in parts.overwriting:
            network.get_submodule(name).inplace = True  # type: ignore[assignment]
        # The pieces call the modules of the library's network. It shares its tables of weights with this chain, and is not a
        # submodule, so that the names have no prefix.
        self.__dict__["network"] = network
        for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[table] = network.__dict__[table]
        self.__dict__.update(pieces=parts.pieces, classifier=parts.classifier, input_conv=parts.input_conv)
        self.__dict__.update(arch=arch, name_aliases=networks(LIBRARIES[arch.family]).old_names(arch.network))

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
        networks(LIBRARIES[self.arch.family]).renew_head(self.network)

    def train(self, mode: bool = True) -> Self:
        """Switch to training, or to evaluation."""
        super().train(mode)
        self.network.training = mode
        return self

    def get_submodule(self, target: str) -> nn.Module:
        """Return a module by the library's name, which may also be the name of an attribute of this class."""
        return self.network.get_submodule(target) if target else self

    def segments(self) -> tuple[Segment, ...]:
        """Return stem, blocks and head."""
        return tuple(
            Segment(
                name=piece.name,
                modules=piece.layers,
                body=partial(self._body, number),
                point=piece.point,
                shrink=None if piece.point is None else average_shrink,
                weights=piece.weights,
            )
            for number, piece in enumerate(self.pieces)
        )

    def _body(self, number: int, state: Tensor, norm: Norm) -> Tensor:
        piece = self.pieces[number]
        return (piece.training if self.training else piece.evaluation)(self.network, state, norm)


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
def refused_size(arch: TracedArchitecture, size: int, ratios: tuple[float, ...]) -> str | None:
    """Return why a network cannot take images of a size, or cannot shrink one of its points then; None if it can.

    Args:
        arch: the architecture.
        size: height and width of an image, in pixels.
        ratios: the ratios to try at each point.

    Raises:
        ModelError: if the library cannot be imported, or the network cannot be run at several costs.
    """
    pieces, usual = traced(arch).pieces, image_size(arch)
    try:
        misfits = unable([piece.evaluation for piece in pieces], _empty(arch), (3, size, size), ratios)
    except ModelError as error:
        return f"{arch.name} cannot take images of {size} px ({error}); it is meant for {usual} px"
    for number, reason in misfits.items():
        if (point := pieces[number].point) is not None:
            return (
                f"at {size} px, the map after {point} of {arch.name} cannot shrink by {' or '.join(map(str, ratios))} "
                f"({reason}); use larger images, such as {usual} px"
            )
    return None
