"""What an export says of itself: what comes in, what comes out, which instances, from which weights."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, get_args

from sdpctl import fields
from sdpctl.data.catalog import Interpolation
from sdpctl.errors import InstanceError
from sdpctl.instance import MOST_INSTANCES, Instance, instance_text
from sdpctl.models import create_model
from sdpctl.models.registry import ARCHITECTURES, Masks, Shortcut, Stem, architecture, refused_options

if TYPE_CHECKING:
    from sdpctl.models.chain import Chain

SCHEMA = "sdpctl.export/1"

FILES = {"onnx": "model.onnx", "torch-export": "model.pt2"}
"""What the file of one instance is called, by format."""

BUNDLE = "bundle.json"
"""The file by which a bundle's folder is known."""

WEIGHTS = "model.safetensors"
STATISTICS = "statistics.safetensors"
CARD = "card.md"
SUMS = "SHA256SUMS"
FOLDER = (BUNDLE, CARD, STATISTICS, WEIGHTS, SUMS)
"""The files of a bundle."""

PIXELS = 8192
"""The largest side of an image that a network of others may ask for: what comes in is scaled to it."""

_NETWORK = fields.section(
    {
        "arch": lambda value, place: fields.one_of(ARCHITECTURES)(value, place),  # also those added later
        "num_classes": fields.whole(1, 2**24),
        "in_channels": fields.one_of((1, 3)),
        "stem": fields.one_of(get_args(Stem)),
    },
    {
        "widths": fields.listed(fields.whole(1, 2**16), 5, 5),
        "masks": fields.one_of(get_args(Masks)),
        "shortcut": fields.one_of(get_args(Shortcut)),
    },
)

_INPUT = fields.section(
    {
        "size": fields.whole(1, PIXELS),
        "resize": fields.whole(1, PIXELS),
        "mean": fields.listed(fields.number(-1e4, 1e4), 1, 3),
        "std": fields.listed(fields.number(1e-6, 1e4), 1, 3),
    },
    {"raw": fields.truth, "interpolation": fields.one_of(get_args(Interpolation))},
)

_OPTION = fields.section(
    {
        "instance": instance_text,
        "macs": fields.whole(1),
        "params": fields.whole(1),
        "relative": fields.number(0, 1e6),
        "top1": fields.number(0, 100),
        "loss": fields.number(0, 1e30),
    },
    {"top5": fields.number(0, 100), "heldout_top1": fields.number(0, 100)},
)

_DESCRIPTION = fields.section(
    {
        "schema": fields.one_of((SCHEMA,)),
        "name": fields.name,
        "network": _NETWORK,
        "input": _INPUT,
        "classes": fields.listed(fields.text(), 1, 2**24),
        "options": fields.listed(_OPTION, 1, MOST_INSTANCES),
        "full_macs": fields.whole(1),
        "checkpoint": fields.text(),
        "statistics": fields.text(),
        "test_images": fields.whole(0),
        "heldout_images": fields.whole(0),
    }
)
"""What each key of a description holds."""


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

    def on_meta(self) -> "Chain":
        """Build the network on the meta device: shapes without memory."""
        import torch

        with torch.device("meta"):
            return create_model(self.arch, **self.arguments)


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
            ValueError: naming the key that does not hold what it should.
        """
        _DESCRIPTION(document, "")
        plain: dict[str, Any] = {key: value for key, value in document.items() if key != "schema"}
        plain["network"] = Network(**_tuples(plain["network"]))
        plain["input"] = Input(**_tuples(plain["input"]))
        plain["classes"] = tuple(plain["classes"])
        rows = [{"top5": None} | row | {"instance": Instance.parse(row["instance"])} for row in plain["options"]]
        plain["options"] = tuple(Option(**row) for row in rows)
        return cls(**plain).check()

    def check(self) -> "Description":
        """Return the description itself, once what has to hold between keys does.

        Raises:
            ValueError: naming the key where it does not.
        """
        takes, options = self.input, self.options
        arch = architecture(self.network.arch)
        for key, reason in refused_options(arch.name, self.network.arguments):
            raise ValueError(f"network.{key}: {reason}")
        if len(self.classes) != self.network.num_classes:
            raise ValueError(f"classes: {len(self.classes):,} names, but network.num_classes is {self.network.num_classes:,}")
        for key, values in (("input.mean", takes.mean), ("input.std", takes.std)):
            if len(values) != self.network.in_channels:
                raise ValueError(f"{key}: {len(values)} numbers, but network.in_channels is {self.network.in_channels}")
        if takes.size < (least := arch.reduction(self.network.stem)):
            raise ValueError(f"input.size: {takes.size} is smaller than {least}, by which {self.network.arch} divides it")
        if takes.resize < takes.size:
            raise ValueError(f"input.resize: {takes.resize} is smaller than input.size, {takes.size}")
        seen: set[Instance] = set()
        for number, option in enumerate(options):
            try:
                option.instance.check(arch.points(self.network.stem))
            except InstanceError as error:
                raise ValueError(f"options[{number}].instance: {error}") from error
            if option.instance in seen:
                raise ValueError(f"options[{number}].instance: {option.instance} is there twice")
            seen.add(option.instance)
            if number and option.macs < options[number - 1].macs:
                raise ValueError(f"options[{number}].macs: the cheapest instance comes first")
            if (option.heldout_top1 is None) != (self.heldout_images == 0):
                raise ValueError(f"options[{number}].heldout_top1: it is there where heldout_images is above 0, and only there")
            if (option.top5 is None) != (options[0].top5 is None):
                raise ValueError(f"options[{number}].top5: all instances have it, or none")
        return self


def _tuples(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()}


def check_export(document: Any, place: str) -> None:
    """Accept what an export's own layer says: the description, and its format.

    Raises:
        ValueError: naming the key that does not hold what it should.
    """
    _EXPORT(document, place)
    Description.parse({key: value for key, value in document.items() if key != "format"})


_EXPORT = fields.section({"format": fields.one_of((*FILES, "bundle"))}, closed=False)
