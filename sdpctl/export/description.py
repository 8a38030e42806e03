"""What an export says of itself: what comes in, what comes out, which instances, from which weights."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

from sdpctl.data.catalog import Interpolation
from sdpctl.instance import Instance
from sdpctl.models.registry import Masks, Shortcut, Stem

SCHEMA = "sdpctl.export/1"

FILES = {"onnx": "model.onnx", "torch-export": "model.pt2"}
"""What the file of one instance is called, by format."""

BUNDLE = "bundle.json"
"""The file by which a bundle's folder is known."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """What `create_model` needs.

    Args:
        arch: an architecture.
        num_classes: K.
        in_channels: C.
        stem: `imagenet` or `small`.
        widths: of `twopipe`; None elsewhere.
        masks: of `twopipe`, in its training; None elsewhere.
        shortcut: where the shape changes; None for the architecture's own.
    """

    arch: str
    num_classes: int
    in_channels: int
    stem: Stem
    widths: tuple[int, ...] | None = None
    masks: Masks | None = None
    shortcut: Shortcut | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """What `create_model` takes beside the architecture."""
        return {key: value for key, value in asdict(self).items() if key != "arch" and value is not None}


@dataclass(frozen=True, kw_only=True)
class Input:
    """What comes in, and how an image becomes that.

    Args:
        size: height and width, in pixels.
        resize: the shorter side of an image before its central part is taken.
        mean: of each channel, in [0, 1].
        std: likewise.
        raw: whether uint8 pixels come in, which the network normalises itself.
        interpolation: of scaling.
    """

    size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    raw: bool = False
    interpolation: Interpolation = "bilinear"

    def document(self) -> dict[str, Any]:
        """Return it as plain data; the usual interpolation is not said."""
        plain = asdict(self)
        if self.interpolation == "bilinear":
            del plain["interpolation"]
        return plain


@dataclass(frozen=True, kw_only=True)
class Option:
    """One instance: what it costs, and how well it does.

    Args:
        instance: which.
        macs: of one image.
        params: of the network; every instance has the same.
        relative: MACs in relation to `full`.
        top1: per cent of the test images.
        top5: likewise; None with fewer than six classes.
        loss: mean cross-entropy of the test images, in nats.
        heldout_top1: per cent of the held-out images, which one may choose on; None where they were not looked at.
    """

    instance: Instance
    macs: int
    params: int
    relative: float
    top1: float
    top5: float | None
    loss: float
    heldout_top1: float | None = None

    def document(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self) | {"instance": str(self.instance)}


@dataclass(frozen=True, kw_only=True)
class Description:
    """What an export says of itself.

    Args:
        name: of the training.
        network: its architecture.
        input: what comes in.
        classes: names, in the order of the logits.
        options: the instances in it, the cheapest first.
        full_macs: what `full` costs, whether it is in it or not.
        checkpoint: digest of the weights.
        statistics: digest of the BatchNorm statistics.
        test_images: how many images `top1` was measured on.
        heldout_images: how many images `heldout_top1` was measured on; 0 where it was not.
    """

    name: str
    network: Network
    input: Input
    classes: tuple[str, ...]
    options: tuple[Option, ...]
    full_macs: int
    checkpoint: str
    statistics: str
    test_images: int
    heldout_images: int

    def document(self) -> dict[str, Any]:
        """Return it as plain data."""
        network = {"arch": self.network.arch} | self.network.arguments
        parts = {"network": network, "input": self.input.document(), "options": [o.document() for o in self.options]}
        return {"schema": SCHEMA} | asdict(self) | parts

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> "Description":
        """Read plain data; the inverse of `document`.

        Raises:
            ValueError, KeyError or TypeError: where it is something else.
        """
        plain = dict(document)
        if (schema := plain.pop("schema")) != SCHEMA:
            raise ValueError(f"its schema is {schema}, not {SCHEMA}")
        options = (Option(**option | {"instance": Instance.parse(option["instance"])}) for option in plain.pop("options"))
        size = plain.pop("input")
        size |= {key: tuple(size[key]) for key in ("mean", "std")}
        if (interpolation := size.get("interpolation", "bilinear")) not in get_args(Interpolation):
            raise ValueError(f"its interpolation is {interpolation!r}")
        network, classes = plain.pop("network"), tuple(plain.pop("classes"))
        network = Network(**network | {"widths": tuple(network["widths"])} if "widths" in network else network)
        return cls(network=network, input=Input(**size), classes=classes, options=tuple(options), **plain)
