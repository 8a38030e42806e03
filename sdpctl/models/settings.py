"""The section `model` of a recipe; a bundle describes its network by the same settings."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from sdpctl.bounds import MOST_CLASSES
from sdpctl.instance import ALL
from sdpctl.models.registry import ARCHITECTURES, Masks, Shortcut, Stem, architecture, family_of
from sdpctl.section import NameIn, Section, one_is_none, without_truth


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Section):
    """The network.

    Args:
        arch: the architecture; `sdpctl models` lists them.
        num_classes: length of a row of logits; by default that of the data set: for an image folder the number of its class
            folders.
        in_channels: channels of an image; colour becomes grey, and grey becomes colour, as needed.
        stem: `imagenet` (7x7 convolution of stride 2 and max-pool) or `small` (3x3 convolution); the architecture's own by
            default.
        width: of ResNet, PreResNet and ResNeXt: factor on the channels of every stage, rounded to whole channels; 1 by default.
        widths: of twopipe: output channels of its five convolutions.
        masks: of twopipe: which channels stay at full resolution in training, the first (the default) or randomly drawn ones.
        shortcut: of ResNet and ResNeXt, where the shape changes: zero channels after the others, zero channels on both sides,
            or a 1x1 convolution; the architecture's own by default.
        dropout: of timm's and torchvision's networks: rate of the dropout before the classifier; the network's own by default.
        drop_path: of timm's and torchvision's networks: rate at which the residual branch of the last block is left out in
            training; it rises linearly from the first block (stochastic depth); the network's own by default.
    """

    arch: Annotated[str, NameIn(ARCHITECTURES)]
    num_classes: Annotated[int, Field(ge=2, le=MOST_CLASSES)] | None = None
    in_channels: Annotated[Literal[1, 3], BeforeValidator(without_truth)] = 3
    stem: Stem | None = None
    width: Annotated[Annotated[float, Field(ge=0.05, le=8)] | None, BeforeValidator(one_is_none)] = None
    widths: Annotated[tuple[Annotated[int, Field(ge=1, le=2**16)], ...], Field(min_length=5, max_length=5)] | None = None
    masks: Masks | None = None
    shortcut: Shortcut | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    drop_path: Annotated[float, Field(ge=0, lt=1)] | None = None

    @property
    def points(self) -> tuple[str, ...]:
        """The network's points, in network order."""
        return architecture(self.arch).points(self.stem)

    @property
    def together(self) -> bool:
        """Whether the grid of instances shrinks all points together."""
        return family_of(self.arch).together

    @property
    def grid_points(self) -> tuple[str, ...]:
        """The points of the grid of instances: every point, or `all` if all points shrink together."""
        return (ALL,) if self.together else self.points

    @property
    def shape_change(self) -> Shortcut | None:
        """The shortcut where the shape changes: the chosen one, or the architecture's own; None without shortcuts."""
        return self.shortcut or architecture(self.arch).shortcut

    @property
    def plain(self) -> dict[str, Any]:
        """The settings as plain data, without the keys that are None."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `create_model`."""
        return {key: value for key, value in self.plain.items() if key != "arch"}
