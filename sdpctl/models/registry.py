"""The architectures as plain data: what they are made of and where their points are. Needs no torch."""

from dataclasses import dataclass
from typing import Literal, get_args

from sdpctl.table import Table

Stem = Literal["imagenet", "small"]
Masks = Literal["nested", "random"]
Shortcut = Literal["padding", "padding-centred", "projection"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A residual network.

    Args:
        name: what a recipe calls it.
        family: where the activation stands: after the addition (`resnet`) or before the convolutions (`preresnet`).
        block: `basic` (two 3x3) or `bottleneck` (1x1, 3x3, 1x1, expansion 4).
        depths: blocks a stage.
        widths: channels a stage, before the expansion.
        groups: groups of the 3x3 convolution (ResNeXt's cardinality).
        base_width: channels a group at width 64 (ResNeXt).
        shortcut: where the shape changes, the one that is used where none is asked for: `projection` (1x1 convolution;
            option B of He et al. 2016, section 3.3), `padding` (parameter-free: every second pixel, zero channels added
            after the others; option A) or `padding-centred` (the same, with half of the zero channels before the others).
        stem: the stem that is used where none is asked for.
    """

    name: str
    family: Literal["resnet", "preresnet"]
    block: Literal["basic", "bottleneck"]
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
        """Return how many times smaller the last map is than the image, a side."""
        return (4 if (stem or self.stem) == "imagenet" else 1) * (1 << (len(self.depths) - 1))

    @property
    def shortcuts(self) -> tuple[Shortcut, ...]:
        """The shortcuts that may be asked for; none where the family has only its own."""
        return get_args(Shortcut) if self.family == "resnet" else ()


@dataclass(frozen=True, kw_only=True)
class TwoPipeArchitecture:
    """A chain of 3x3 convolutions whose channels live at full or at half resolution.

    Args:
        name: what a recipe calls it.
        widths: output channels of the convolutions, where no others are asked for.
    """

    name: str
    widths: tuple[int, ...] = (96, 152, 256, 256, 512)
    family: Literal["twopipe"] = "twopipe"
    block: Literal["plain"] = "plain"
    stem: Stem = "small"
    shortcut: None = None
    shortcuts: tuple[Shortcut, ...] = ()

    def points(self, stem: Stem | None = None) -> tuple[str, ...]:  # noqa: ARG002  there is but one
        """Return the points in network order: every convolution but the last."""
        return tuple(f"conv{i}" for i in range(1, len(self.widths)))

    def reduction(self, stem: Stem | None = None) -> int:  # noqa: ARG002  there is but one
        """Return how many times smaller the last map is than the image, a side."""
        return 4


def _imagenet(family: Literal["resnet", "preresnet"], depth: int) -> Architecture:
    depths = {
        18: (2, 2, 2, 2),
        34: (3, 4, 6, 3),
        50: (3, 4, 6, 3),
        101: (3, 4, 23, 3),
        152: (3, 8, 36, 3),
        200: (3, 24, 36, 3),
    }
    block: Literal["basic", "bottleneck"] = "basic" if depth < 50 else "bottleneck"
    return Architecture(name=f"{family}{depth}", family=family, block=block, depths=depths[depth])


def _resnext(*depths: int) -> Architecture:
    name = f"resnext{3 * sum(depths) + 2}"
    return Architecture(name=name, family="resnet", block="bottleneck", depths=depths, groups=32, base_width=4)


def _cifar(depth: int) -> Architecture:
    return Architecture(
        name=f"resnet{depth}",
        family="resnet",
        block="basic",
        depths=((depth - 2) // 6,) * 3,
        widths=(16, 32, 64),
        shortcut="padding",
        stem="small",
    )


ARCHITECTURES: Table[Architecture | TwoPipeArchitecture] = Table(
    "architecture",
    [
        *(_imagenet("resnet", depth) for depth in (18, 34, 50, 101, 152)),
        *(_imagenet("preresnet", depth) for depth in (18, 34, 50, 101, 152, 200)),
        *(_resnext(*depths) for depths in ((3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3))),
        *(_cifar(depth) for depth in (20, 32, 44, 56, 110)),
        TwoPipeArchitecture(name="twopipe"),
    ],
    listed_by="sdpctl models",
)


def list_models() -> list[str]:
    """Return the names of the architectures."""
    return list(ARCHITECTURES)


def architecture(name: str) -> Architecture | TwoPipeArchitecture:
    """Look an architecture up.

    Raises:
        UsageError: with the nearest name, where there is none.
    """
    return ARCHITECTURES.find(name)
