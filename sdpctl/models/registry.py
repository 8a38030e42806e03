"""Families and architectures as plain data: the parts, the options and the points of each network. Needs no torch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sdpctl.table import Table, load

Stem = Literal["imagenet", "small"]
Masks = Literal["nested", "random"]
Shortcut = Literal["padding", "padding-centred", "projection"]
Option = Literal["stem", "widths", "masks", "shortcut"]


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


FAMILIES: Table[Family] = Table(
    "family",
    [
        Family(name="resnet", network="sdpctl.models.resnet:ResNet", options=("stem", "shortcut")),
        Family(name="preresnet", network="sdpctl.models.preresnet:PreResNet", options=("stem",)),
        Family(
            name="twopipe",
            network="sdpctl.models.twopipe:TwoPipe",
            options=("widths", "masks"),
            together=True,
            shape_text="sdpctl.models.twopipe:shape_text",
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


ARCHITECTURES: Table[Architecture] = Table(
    "architecture",
    [
        *(_imagenet("resnet", depth) for depth in (18, 34, 50, 101, 152)),
        *(_imagenet("preresnet", depth) for depth in (18, 34, 50, 101, 152, 200)),
        _resnext(3, 4, 6, 3, torchvision="resnext50_32x4d"),
        _resnext(3, 4, 23, 3),
        _resnext(3, 8, 36, 3),
        *(_cifar(depth) for depth in (20, 32, 44, 56, 110)),
        Architecture(name="twopipe", family="twopipe", fixed_points=("conv1", "conv2", "conv3", "conv4"), divides_by=4),
    ],
    listed_by="sdpctl models",
)


def list_models() -> list[str]:
    """Return the names of the architectures."""
    return list(ARCHITECTURES)


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
