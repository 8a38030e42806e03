"""The description of an export: its network, input, classes and instances, and the weights they were made from."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, get_args

from sdpctl import fields
from sdpctl.cascade import MOST_MEMBERS, Cascade, cascade_text
from sdpctl.data.catalog import Interpolation
from sdpctl.errors import BudgetError, InstanceError
from sdpctl.export.catalog import FORMATS, OPSETS, RUNTIME_NAMES
from sdpctl.export.precision import check_accuracies
from sdpctl.instance import MOST_INSTANCES, Instance, instance_text
from sdpctl.models.registry import ARCHITECTURES, Masks, Shortcut, Stem, architecture, refused_options
from sdpctl.models.settings import ModelSettings

SCHEMA = "sdpctl.export/1"

PIXELS = 8192
"""The largest side of an image, in pixels, that an untrusted description may ask for: images are scaled to it."""

MOST_CASCADES = 500
"""Maximum number of cascades in a description."""

TEMPERATURES = (1e-3, 1e3)
"""Least and greatest temperature of a cascade in a description; with any other, probabilities may not be finite."""

CONSISTENT = 1e-3
"""Maximum difference of a mean number of MACs from the one that the shares give, as a fraction of the worst case."""

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

_SHARES = fields.listed(fields.number(0, 100), 2, MOST_MEMBERS)

_SCORED = {
    "cascade": cascade_text,
    "macs": fields.whole(1),
    "relative": fields.number(0, 1e6),
    "worst_macs": fields.whole(1),
    "member_macs": fields.listed(fields.whole(0), 2, MOST_MEMBERS),
    "left": _SHARES,
    "top1": fields.number(0, 100),
    "loss": fields.number(0, 1e30),
}
_HELDOUT = {"heldout_top1": fields.number(0, 100), "heldout_macs": fields.whole(1), "heldout_left": _SHARES}


def _cascade(required: Mapping[str, fields.Check], absent: Mapping[str, fields.Check] | None = None) -> fields.Check:
    """Accept an object with certain keys, whose lists have a number for each member of its cascade."""
    section = fields.section(required, absent)

    def check(value: Any, place: str) -> None:
        section(value, place)
        members = len(Cascade.parse(value["cascade"]).members)
        for key in ("member_macs", "left", "heldout_left"):
            if (found := len(value.get(key, range(members)))) != members:
                raise ValueError(f"{place}.{key}: expected a number for each of {members} members, found {found}")

    return check


evaluated_cascade = _cascade(_SCORED | {"params": fields.whole(1)}, {"top5": fields.number(0, 100)})
"""Check the row of a cascade in the table of an evaluation."""

chosen_cascade = _cascade(_SCORED | _HELDOUT)
"""Check the row of a chosen cascade, with its results on the held-out images."""

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
    },
    {"cascades": fields.listed(chosen_cascade, 1, MOST_CASCADES)},
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
class CascadeOption:
    """One cascade with its cost and accuracy.

    Args:
        cascade: the cascade.
        macs: mean MACs per test image.
        relative: `macs` as a fraction of the MACs of `full`.
        worst_macs: MACs of an image that all members see.
        member_macs: MACs that each member adds for an image that it sees; a shared prefix is counted once.
        left: share of the test images that each member answers, in per cent.
        top1: top-1 accuracy on the test images, in per cent.
        loss: mean cross-entropy on the test images, in nats.
        heldout_top1: top-1 accuracy on the held-out images, in per cent, on which the cascade was chosen.
        heldout_macs: mean MACs per held-out image, to which a budget refers.
        heldout_left: share of the held-out images that each member answers, in per cent.
    """

    cascade: Cascade
    macs: int
    relative: float
    worst_macs: int
    member_macs: tuple[int, ...]
    left: tuple[float, ...]
    top1: float
    loss: float
    heldout_top1: float
    heldout_macs: int
    heldout_left: tuple[float, ...]

    def document(self) -> dict[str, Any]:
        """Return it as plain data."""
        plain: dict[str, Any] = {key: getattr(self, key) for key in self.__dataclass_fields__}
        return plain | {"cascade": str(self.cascade)}

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> "CascadeOption":
        """Read plain data whose keys were checked; the inverse of `document`."""
        return cls(**_tuples(document) | {"cascade": Cascade.parse(document["cascade"])})

    def check(self, macs: Mapping[Instance, int]) -> None:
        """Check that the figures are consistent with one another and with the members' costs.

        Args:
            macs: MACs of each instance that may be a member.

        Raises:
            ValueError: if they are not; the message names the key.
        """
        members = self.cascade.members
        for member in members:
            if member not in macs:
                raise ValueError(f"cascade: {member} is not among the options")
        low, high = TEMPERATURES
        for temperature in self.cascade.temperatures:
            if not low <= temperature <= high:
                raise ValueError(f"cascade: expected temperatures from {low:g} to {high:g}, found {temperature:g}")
        if self.member_macs[0] != macs[members[0]]:
            raise ValueError(f"member_macs[0]: {members[0]} has {macs[members[0]]:,} MACs, found {self.member_macs[0]:,}")
        for number, (member, added) in enumerate(zip(members, self.member_macs, strict=True)):
            if added > macs[member]:
                raise ValueError(f"member_macs[{number}]: {member} has {macs[member]:,} MACs, found {added:,}")
        if self.worst_macs != sum(self.member_macs):
            raise ValueError(f"worst_macs: the members add up to {sum(self.member_macs):,}, found {self.worst_macs:,}")
        for key, shares, mean in (("", self.left, self.macs), ("heldout_", self.heldout_left, self.heldout_macs)):
            if abs(sum(shares) - 100) > 100 * CONSISTENT:
                raise ValueError(f"{key}left: expected shares that add up to 100, found {sum(shares):g}")
            if abs(_mean(self.member_macs, shares) - mean) > 1 + CONSISTENT * self.worst_macs:
                raise ValueError(f"{key}macs: by {key}left it is {_mean(self.member_macs, shares):,.0f}, found {mean:,}")


def most_accurate(cascades: Sequence[CascadeOption], limit: int) -> CascadeOption:
    """Return the most accurate cascade on held-out images whose mean MACs there are within a limit; of equals the cheapest.

    Args:
        cascades: at least one cascade, the cheapest on held-out images first.
        limit: maximum MACs per held-out image on average.

    Raises:
        BudgetError: if no cascade is within the limit; the message names the cheapest.
    """
    within = [option for option in cascades if option.heldout_macs <= limit]
    if not within:
        least = cascades[0]
        raise BudgetError(
            f"no cascade is within {limit:,} MACs on average; the cheapest, {least.cascade}, takes "
            f"{least.heldout_macs:,} MACs on average"
        )
    return max(within, key=lambda option: (option.heldout_top1, -option.heldout_macs))


def _mean(member_macs: Sequence[int], shares: Sequence[float]) -> float:
    """Return the mean MACs of an image, given the share of the images that each member answers, in per cent."""
    return sum(share / 100 * spent for share, spent in zip(shares, accumulate(member_macs), strict=True))


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
        heldout_images: number of images on which the `heldout_top1` of the options was measured; 0 if it was not.
        cascades: cascades of the options, the cheapest on held-out images first.
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
    cascades: tuple[CascadeOption, ...] = ()

    def document(self) -> dict[str, Any]:
        """Return it as plain data; without cascades, their key is left out."""
        parts = {"network": self.network.plain, "input": self.input.document(), "options": [o.document() for o in self.options]}
        plain = {"schema": SCHEMA} | asdict(self) | parts
        del plain["cascades"]
        return plain | ({"cascades": [c.document() for c in self.cascades]} if self.cascades else {})

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
        plain["cascades"] = tuple(CascadeOption.parse(row) for row in plain.get("cascades") or ())
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
        self._check_cascades(arch.points(self.network.stem))
        return self

    def _check_cascades(self, points: Sequence[str]) -> None:
        """Check that the cascades are different, in order, and consistent with the options.

        Raises:
            ValueError: if they are not; the message names the key.
        """
        macs = {option.instance: option.macs for option in self.options}
        seen: set[Cascade] = set()
        for number, option in enumerate(self.cascades):
            place = f"cascades[{number}]"
            try:
                option.check(macs)
                option.cascade.check(points)
            except InstanceError as error:
                raise ValueError(f"{place}.cascade: {error}") from error
            except ValueError as error:
                raise ValueError(f"{place}.{error}") from error
            if option.cascade in seen:
                raise ValueError(f"{place}.cascade: {option.cascade} occurs twice")
            seen.add(option.cascade)
            if number and option.heldout_macs < self.cascades[number - 1].heldout_macs:
                raise ValueError(f"{place}.heldout_macs: the cheapest cascade comes first")


def _tuples(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()}


def check_export(document: Any, place: str) -> None:
    """Check the document of an export in the store: the description, its format, and how it was written and checked.

    Raises:
        ValueError: if a value is not valid; the message names its key.
    """
    _EXPORT(document, place)
    description = Description.parse({key: value for key, value in document.items() if key not in _WRITTEN})
    if FORMATS[document["format"]].holds_cascade and len(description.cascades) != 1:
        raise ValueError(f"cascades: the format {document['format']} holds one cascade, found {len(description.cascades)}")


_WRITTEN: dict[str, fields.Check] = {
    "format": fields.one_of(FORMATS),
    "opset": fields.whole(OPSETS[0], OPSETS[-1]),
    "precision": check_accuracies,
    "check": fields.one_of(RUNTIME_NAMES),
}
"""The keys of an export that are not part of its description."""

_EXPORT = fields.section({"format": _WRITTEN["format"]}, _WRITTEN, closed=False)
