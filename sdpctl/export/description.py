"""The description of an export: its network, input, classes and instances, and the weights they were made from."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

from sdpctl import fields
from sdpctl.data.catalog import Interpolation
from sdpctl.errors import InstanceError
from sdpctl.export.catalog import FORMATS
from sdpctl.instance import MOST_INSTANCES, Instance, instance_text
from sdpctl.models.registry import ARCHITECTURES, Masks, Shortcut, Stem, architecture, refused_options
from sdpctl.models.settings import ModelSettings

SCHEMA = "sdpctl.export/1"

PIXELS = 8192
"""The largest side of an image, in pixels, that an untrusted description may ask for: images are scaled to it."""

_NETWORK = fields.section(
    {
        "arch": fields.name_in(ARCHITECTURES, "an architecture"),
        "num_classes": fields.whole(1, 2**24),
        "in_channels": fields.one_of((1, 3)),
        "stem": fields.one_of(get_args(Stem)),
    },
    {
        "width": fields.number(0.05, 8),
        "widths": fields.listed(fields.whole(1, 2**16), 5, 5),
        "masks": fields.one_of(get_args(Masks)),
        "shortcut": fields.one_of(get_args(Shortcut)),
        "dropout": fields.number(0, 1),
        "drop_path": fields.number(0, 1),
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
"""The keys of a description, and what each must hold."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """The input of the network, and how an image is turned into it.

    Args:
        size: height and width, in pixels.
        resize: length of the shorter side, in pixels, to which an image is scaled before its centre is cropped.
        mean: mean of each channel, in [0, 1].
        std: standard deviation of each channel, in [0, 1].
        raw: whether the input is uint8 pixels, which the network normalises itself.
        interpolation: interpolation used for scaling.
    """

    size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    raw: bool = False
    interpolation: Interpolation = "bilinear"

    def document(self) -> dict[str, Any]:
        """Return the input as plain data; bilinear interpolation is left out."""
        plain = asdict(self)
        if self.interpolation == "bilinear":
            del plain["interpolation"]
        return plain


@dataclass(frozen=True, kw_only=True)
class Option:
    """One instance with its cost and accuracy.

    Args:
        instance: the instance.
        macs: MACs per image.
        params: parameters of the network, the same for every instance.
        relative: MACs as a fraction of those of `full`.
        top1: top-1 accuracy on the test images, in per cent.
        top5: top-5 accuracy on the test images, in per cent; None with fewer than six classes.
        loss: mean cross-entropy on the test images, in nats.
        heldout_top1: top-1 accuracy on the held-out images, in per cent, which a choice may rely on; None if not measured.
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
    """The description of an export.

    Args:
        name: name of the recipe.
        network: the network.
        input: the input.
        classes: names of the classes, in the order of the logits.
        options: the instances, the cheapest first.
        full_macs: MACs of `full`, which need not be among the options.
        checkpoint: digest of the checkpoint.
        statistics: digest of the BatchNorm statistics.
        test_images: number of images on which `top1` was measured.
        heldout_images: number of images on which `heldout_top1` was measured; 0 if it was not.
    """

    name: str
    network: ModelSettings
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
        parts = {"network": self.network.plain, "input": self.input.document(), "options": [o.document() for o in self.options]}
        return {"schema": SCHEMA} | asdict(self) | parts

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> "Description":
        """Read plain data; the inverse of `document`.

        Raises:
            ValueError: if a value is not valid; the message names its key.
        """
        _DESCRIPTION(document, "")
        plain: dict[str, Any] = {key: value for key, value in document.items() if key != "schema"}
        plain["network"] = ModelSettings(**_tuples(plain["network"]))
        plain["input"] = Input(**_tuples(plain["input"]))
        plain["classes"] = tuple(plain["classes"])
        rows = [{"top5": None} | row | {"instance": Instance.parse(row["instance"])} for row in plain["options"]]
        plain["options"] = tuple(Option(**row) for row in rows)
        return cls(**plain).check()

    def check(self) -> "Description":
        """Check that the keys are consistent with one another, and return the description itself.

        Raises:
            ValueError: if they are not; the message names the key.
        """
        takes, options = self.input, self.options
        arch = architecture(self.network.arch)
        for key, reason in refused_options(arch.name, self.network.arguments):
            raise ValueError(f"network.{key}: {reason}")
        if len(self.classes) != self.network.num_classes:
            raise ValueError(f"classes: {len(self.classes):,} names, but network.num_classes is {self.network.num_classes}")
        for key, values in (("input.mean", takes.mean), ("input.std", takes.std)):
            if len(values) != self.network.in_channels:
                raise ValueError(f"{key}: {len(values)} numbers, but network.in_channels is {self.network.in_channels}")
        if (refused := arch.refused_size(takes.size, self.network.stem)) is not None:
            raise ValueError(f"input.size: {refused}")
        if takes.resize < takes.size:
            raise ValueError(f"input.resize: {takes.resize} is smaller than input.size, {takes.size}")
        seen: set[Instance] = set()
        for number, option in enumerate(options):
            try:
                option.instance.check(arch.points(self.network.stem))
            except InstanceError as error:
                raise ValueError(f"options[{number}].instance: {error}") from error
            if option.instance in seen:
                raise ValueError(f"options[{number}].instance: {option.instance} occurs twice")
            seen.add(option.instance)
            if number and option.macs < options[number - 1].macs:
                raise ValueError(f"options[{number}].macs: the cheapest instance comes first")
            if (option.heldout_top1 is None) != (self.heldout_images == 0):
                raise ValueError(f"options[{number}].heldout_top1: expected if and only if heldout_images is above 0")
            if (option.top5 is None) != (options[0].top5 is None):
                raise ValueError(f"options[{number}].top5: either all instances have a top5 or none")
        return self


def _tuples(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()}


def check_export(document: Any, place: str) -> None:
    """Check the document of an export in the store: the description and its format.

    Raises:
        ValueError: if a value is not valid; the message names its key.
    """
    _EXPORT(document, place)
    Description.parse({key: value for key, value in document.items() if key != "format"})


_EXPORT = fields.section({"format": fields.one_of(FORMATS)}, closed=False)
