"""Families and architectures as plain data: the parts, the options and the points of each network. Needs no torch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import version
from typing import Any, Literal, get_args

from sdpctl.errors import did_you_mean, shown
from sdpctl.models.facts import find_out
from sdpctl.models.libraries import LIBRARIES
from sdpctl.table import Table, load

Stem = Literal["imagenet", "small"]
Masks = Literal["nested", "random"]
Shortcut = Literal["padding", "padding-centred", "projection"]
Option = Literal["stem", "width", "widths", "masks", "shortcut", "dropout", "drop_path"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of networks: one module that builds them.

    Args:
        name: name of the family in an architecture's entry.
        network: the subclass of `Chain`, as `module:attribute`. It is called with the architecture, `num_classes` and
            `in_channels`, and with those of the `options` that a user gave.
        options: the options of `create_model` that the network takes.
        together: whether all points shrink together, in the grid (`all@0.5`) and in the draw of a training step.
        shape_text: `module:attribute` of a function that writes the recorded shape of a state for a table; needed if
            `network.recorded` returns anything but the sizes of the maps.
    """

    name: str
    network: str
    options: tuple[Option, ...] = ()
    together: bool = False
    shape_text: str | None = None


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """An architecture of any family.

    Args:
        name: name of the architecture in recipes.
        family: name of an entry of `FAMILIES`.
        block: kind of its blocks, for the list of architectures.
        stem: the default stem.
        shortcut: the default shortcut where the shape changes; None without shortcuts.
        fixed_points: the points in network order, if no option changes them.
        divides_by: how many times smaller a side of the last map is than a side of the image, if no option changes this.
        torchvision: torchvision's name of the architecture; None if torchvision has no weights of it.
    """

    name: str
    family: str
    block: str = "plain"
    stem: Stem = "small"
    shortcut: Shortcut | None = None
    fixed_points: tuple[str, ...] = ()
    divides_by: int = 1
    torchvision: str | None = None

    def points(self, stem: Stem | None = None) -> tuple[str, ...]:  # noqa: ARG002  for architectures with several stems
        """Return the points in network order."""
        return self.fixed_points

    def reduction(self, stem: Stem | None = None) -> int:  # noqa: ARG002  for architectures with several stems
        """Return how many times smaller a side of the last map is than a side of the image."""
        return self.divides_by

    def image_size(self, stem: Stem | None = None) -> int:
        """Return the usual height and width of an image, in pixels: 224, or 32 with the small stem."""
        return 224 if (stem or self.stem) == "imagenet" else 32

    def refused_size(self, size: int, stem: Stem | None = None) -> str | None:
        """Return why the network cannot take images of a size; None if it can.

        Args:
            size: height and width of an image, in pixels.
            stem: the stem; the architecture's own by default.
        """
        stem = stem or self.stem
        if size >= (least := self.reduction(stem)):
            return None
        divides = f"{self.name} with the {stem} stem, which divides the size by {least}"
        return f"{size} px is too small for {divides}: use {least} or more"


@dataclass(frozen=True, kw_only=True)
class ResidualArchitecture(Architecture):
    """A residual network.

    Args:
        name: name of the architecture in recipes.
        family: `resnet`, with the activation after the addition, or `preresnet`, with the activation before the convolutions.
        block: `basic` (two 3x3) or `bottleneck` (1x1, 3x3, 1x1, expansion 4).
        depths: blocks per stage.
        widths: channels per stage, before the expansion.
        groups: groups of the 3x3 convolution (ResNeXt's cardinality).
        base_width: channels per group at width 64 (ResNeXt).
        shortcut: the default shortcut where the shape changes: `projection` (1x1 convolution; option B of He et al. 2016,
            section 3.3), `padding` (parameter-free: every second pixel, zero channels added after the others; option A) or
            `padding-centred` (the same, with half of the zero channels before the others).
        stem: the default stem.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...] = (64, 128, 256, 512)
    groups: int = 1
    base_width: int = 64
    shortcut: Shortcut = "projection"
    stem: Stem = "imagenet"

    def points(self, stem: Stem | None = None) -> tuple[str, ...]:
        """Return the points in network order: the stem's, then every block."""
        first = "maxpool" if (stem or self.stem) == "imagenet" else "stem"
        return (first, *(f"layer{i}.{j}" for i, depth in enumerate(self.depths, 1) for j in range(depth)))

    def reduction(self, stem: Stem | None = None) -> int:
        """Return how many times smaller a side of the last map is than a side of the image."""
        return (4 if (stem or self.stem) == "imagenet" else 1) * (1 << (len(self.depths) - 1))


@dataclass(frozen=True, kw_only=True)
class TracedArchitecture(Architecture):
    """An architecture that a library defines. What is known only after it was traced is computed on first use.

    Args:
        name: name of the architecture in recipes: the library, a slash, and the library's name of the network.
        family: name of the library, which is an entry of `LIBRARIES`.
        network: the library's name of the network.
    """

    network: str
    block: str = "traced"
    stem: Stem = "imagenet"

    def points(self, stem: Stem | None = None) -> tuple[str, ...]:  # noqa: ARG002
        """Return the points in network order.

        Raises:
            ModelError: if the library cannot be imported, or the network cannot be run at several costs.
        """
        return tuple(find_out("points", self))

    def image_size(self, stem: Stem | None = None) -> int:  # noqa: ARG002
        """Return the height and width of the images that the network is meant for, in pixels."""
        return int(find_out("image_size", self))

    def refused_size(self, size: int, stem: Stem | None = None) -> str | None:  # noqa: ARG002
        """Return why the network cannot take images of a size; None if it can."""
        reason: str | None = find_out("refused_size", self, size)
        return reason


class Architectures(Table[Architecture]):
    """The architectures of this package, which an iteration yields, and those of the libraries, which are found by name."""

    pattern = f"^({'|'.join(LIBRARIES)})/"

    def __getitem__(self, name: str) -> Architecture:
        library, slash, network = name.partition("/")
        if slash and library in LIBRARIES:
            known = LIBRARIES[library]
            network = known.renamed.get(network, network)
            if network in known.networks:
                return TracedArchitecture(name=name, family=library, network=network)
        return super().__getitem__(name)

    def unknown(self, name: str) -> str:
        """Return the message for a name that neither this package nor a library has."""
        library, slash, network = name.partition("/")
        if not slash or library not in LIBRARIES:
            return f"there is no {self.noun} {shown(name)}{self.hint(name)}; `{self.listed_by}` lists them"
        known = LIBRARIES[library].networks
        if not known:
            return f"{library} is not installed, so its networks are not known; `pip install {library}` installs it"
        plain, dot, _ = network.partition(".")
        if dot and plain in known:
            return (
                f"{shown(name)} names weights; the architecture is {library}/{plain}, and `sdpctl import --{library}` or "
                "train.init takes weights"
            )
        near = did_you_mean(network, known)
        return f"{library} {version(library)} has no network {shown(network)}{near}; `sdpctl models {library}` lists them"

    def hint(self, name: str) -> str:
        """Return ` (did you mean 'timm/x'?)` for a name without its library; otherwise the nearest name of this package."""
        network = name.rpartition("/")[2]
        theirs = [f"{library.name}/{network}" for library in LIBRARIES.values() if network in library.networks]
        return f" (did you mean {' or '.join(map(repr, theirs))}?)" if theirs else did_you_mean(name, self)

    def matching(self, pattern: str) -> list[Architecture]:
        """Return the architectures whose name matches a pattern in which `*` stands for any text, in order."""
        names = [*self, *(f"{library.name}/{network}" for library in LIBRARIES.values() for network in library.networks)]
        return [self[name] for name in names if fnmatchcase(name, pattern)]


FAMILIES: Table[Family] = Table(
    "family",
    [
        Family(name="resnet", network="sdpctl.models.resnet:ResNet", options=("stem", "width", "shortcut")),
        Family(name="preresnet", network="sdpctl.models.preresnet:PreResNet", options=("stem", "width")),
        Family(
            name="twopipe",
            network="sdpctl.models.twopipe:TwoPipe",
            options=("widths", "masks"),
            together=True,
            shape_text="sdpctl.models.twopipe:shape_text",
        ),
        *(
            Family(name=library, network="sdpctl.models.traced:TracedNetwork", options=("dropout", "drop_path"))
            for library in LIBRARIES
        ),
    ],
)


def _imagenet(family: str, depth: int) -> ResidualArchitecture:
    depths = {
        18: (2, 2, 2, 2),
        34: (3, 4, 6, 3),
        50: (3, 4, 6, 3),
        101: (3, 4, 23, 3),
        152: (3, 8, 36, 3),
        200: (3, 24, 36, 3),
    }
    block = "basic" if depth < 50 else "bottleneck"
    name = f"{family}{depth}"
    theirs = name if family == "resnet" else None
    return ResidualArchitecture(name=name, family=family, block=block, depths=depths[depth], torchvision=theirs)


def _resnext(*depths: int, torchvision: str | None = None) -> ResidualArchitecture:
    return ResidualArchitecture(
        name=f"resnext{3 * sum(depths) + 2}",
        family="resnet",
        block="bottleneck",
        depths=depths,
        groups=32,
        base_width=4,
        torchvision=torchvision,
    )


def _cifar(depth: int) -> ResidualArchitecture:
    return ResidualArchitecture(
        name=f"resnet{depth}",
        family="resnet",
        block="basic",
        depths=((depth - 2) // 6,) * 3,
        widths=(16, 32, 64),
        shortcut="padding",
        stem="small",
    )


ARCHITECTURES = Architectures(
    "architecture",
    [
        *(_imagenet("resnet", depth) for depth in (18, 34, 50, 101, 152)),
        *(_imagenet("preresnet", depth) for depth in (18, 34, 50, 101, 152, 200)),
        _resnext(3, 4, 6, 3, torchvision="resnext50_32x4d"),
        _resnext(3, 4, 23, 3),
        _resnext(3, 8, 36, 3),
        *(_cifar(depth) for depth in (8, 14, 20, 32, 44, 56, 110)),
        Architecture(name="twopipe", family="twopipe", fixed_points=("conv1", "conv2", "conv3", "conv4"), divides_by=4),
    ],
    listed_by="sdpctl models",
)


def list_models(pattern: str | None = None) -> list[str]:
    """Return the names of this package's architectures; with a pattern, all matching names, those of the libraries included.

    Args:
        pattern: for example `timm/*mobilenet*`; `*` stands for any text.
    """
    return list(ARCHITECTURES) if pattern is None else [arch.name for arch in ARCHITECTURES.matching(pattern)]


def architecture(name: str) -> Architecture:
    """Return the architecture of a name.

    Raises:
        UsageError: if the name is unknown; the message suggests the nearest name.
    """
    return ARCHITECTURES.find(name)


def family_of(name: str) -> Family:
    """Return the family of an architecture.

    Raises:
        UsageError: if the architecture is unknown.
    """
    return FAMILIES[architecture(name).family]


def refused_options(name: str, options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each option that an architecture does not accept, with the reason and a remedy.

    An option that is None was not given. An architecture without a choice of stems accepts its own stem.

    Args:
        name: an architecture.
        options: values by name; only the keys that are an `Option` are checked.
    """
    arch, taken = architecture(name), family_of(name).options
    for option in get_args(Option):
        value = options.get(option)
        if value is None or (option == "stem" and value == arch.stem):
            continue
        if option not in taken:
            yield option, f"{name} has no {option} {value!r}; leave this out"
        elif option == "shortcut" and value not in get_args(Shortcut):
            yield option, f"{name} has no {option} {value!r}; choose {', '.join(get_args(Shortcut))}"


def shape_text(name: str, recorded: Sequence[int]) -> str:
    """Return the recorded shape of a state as text: `64x8x8`, or `96x32x32+56x16x16` if the state has two maps.

    Args:
        name: an architecture.
        recorded: the result of `Chain.recorded`.
    """
    place = family_of(name).shape_text
    if place is not None:
        return str(load(place)(recorded))
    return "+".join("x".join(map(str, recorded[i : i + 3])) for i in range(0, len(recorded), 3))
