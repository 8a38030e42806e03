"""What a recipe may say. Every section is frozen and refuses unknown keys."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema

from sdpctl.data.catalog import DATASETS, Augment, DatasetName
from sdpctl.errors import InstanceError, did_you_mean
from sdpctl.instance import Instance
from sdpctl.models.registry import ARCHITECTURES, architecture

Location = tuple[str | int, ...]
Problem = tuple[Location, str]

LOCAL_KEYS = (("device",), ("data", "root"), ("data", "workers"), ("data", "download"), ("train", "checkpoint"))
"""Keys that cannot change a result: they are in no artifact and no key."""

NAME_PATTERN = r"^[A-Za-z0-9]+([_-][A-Za-z0-9]+)*$"


def _known_architecture(name: object) -> object:
    if isinstance(name, str) and name not in ARCHITECTURES:
        raise ValueError(f"there is no architecture {name!r}{did_you_mean(name, ARCHITECTURES)}; `sdpctl models` lists them")
    return name


def _known_dataset(name: object) -> object:
    if isinstance(name, str) and name not in DATASETS:
        raise ValueError(f"there is no data set {name!r}{did_you_mean(name, DATASETS)}; there are {', '.join(DATASETS)}")
    return name


def _share(value: object) -> object:
    if isinstance(value, str) and value.endswith("%"):
        try:
            return float(value[:-1]) / 100
        except ValueError:
            raise ValueError(f"{value!r} is no share; write 10% or 0.1") from None
    return value


def _ratio(value: object) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool) and not 0 < value < 1:
        raise ValueError(f"a ratio is the size kept, above 0 and below 1, for example 0.5; got {value:g}")
    return value


def _all_is_none(value: object) -> object:
    return None if value == "all" else value


def _off_is_none(value: object) -> object:
    if value is None or (isinstance(value, str) and value != "off"):
        raise ValueError("write `off` to train the plain network, or a section with ratios, points and draw")
    return None if value == "off" else value


def _each_once(values: tuple[object, ...] | None) -> tuple[object, ...] | None:
    if values is not None and len(set(values)) < len(values):
        raise ValueError(f"each may stand here once, got {', '.join(map(str, values))}")
    return values


Ratios = Annotated[
    tuple[Annotated[float, BeforeValidator(_ratio)], ...],
    Field(min_length=1, json_schema_extra={"uniqueItems": True}),
    AfterValidator(_each_once),
]
Share = Annotated[
    float,
    BeforeValidator(_share),
    Field(ge=0, lt=1),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0, "exclusiveMaximum": 1}, {"type": "string", "pattern": "%$"}]}),
]
Points = Annotated[
    Annotated[tuple[str, ...], Field(min_length=1)] | None,
    AfterValidator(_each_once),
    BeforeValidator(_all_is_none),
    PlainSerializer(lambda points: "all" if points is None else points),
    WithJsonSchema({"anyOf": [{"const": "all"}, {"type": "array", "items": {"type": "string"}}]}),
]
PrecisionName = Literal["fp32", "bf16"]


def _without_none(plain: Any) -> Any:
    return {k: _without_none(v) for k, v in plain.items() if v is not None} if isinstance(plain, dict) else plain


class Section(BaseModel):
    """A part of a recipe: frozen, strict, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """The network."""

    arch: Annotated[str, BeforeValidator(_known_architecture), WithJsonSchema({"enum": list(ARCHITECTURES)})]
    num_classes: int = Field(10, ge=2)
    in_channels: Literal[1, 3] = 3
    stem: Literal["imagenet", "small"] | None = Field(None, description="the architecture's own by default")

    @property
    def points(self) -> tuple[str, ...]:
        """The network's points, in order."""
        return architecture(self.arch).points(self.stem)


class DataSection(Section):
    """The images."""

    dataset: Annotated[DatasetName, BeforeValidator(_known_dataset)]
    root: str = Field("data", description="the folder the files are in; not part of a result")
    image_size: int = Field(32, ge=1)
    augment: Augment = "none"
    batch_size: int = Field(64, ge=2, description="of training and calibration: BatchNorm needs two images or more")
    workers: int = Field(2, ge=0, description="processes that decode and augment; not part of a result")
    download: bool = Field(False, description="fetch what is missing; not part of a result")
    holdout: Share = Field(0.1, description="of each class, kept out of training to choose on")
    fingerprint: str | None = Field(None, description="hash of classes and files; where it is given, the data must match")

    @property
    def folder(self) -> Path:
        """The root as a path, `~` resolved."""
        return Path(self.root).expanduser()


class SdpointSection(Section):
    """What a training step draws."""

    ratios: Ratios = (0.5, 0.75)
    points: Points = None
    draw: Literal["single", "independent"] = "single"
    p: float = Field(0.5, gt=0, le=1, description="of `independent`: the probability that a point shrinks")


class ValidateSection(Section):
    """Validation on the holdout while training; statistics are calibrated anew each time."""

    every: int = Field(1, ge=0, description="epochs; 0 is never")
    instances: tuple[str, ...] = Field(("full",), min_length=1)
    batches: int = Field(8, ge=1, description="of calibration")


class CheckpointSection(Section):
    """How often a training saves what it needs to go on; not part of a result."""

    epochs: int = Field(1, ge=1)
    minutes: float = Field(10, gt=0)


class TrainSection(Section):
    """SGD."""

    epochs: int = Field(10, ge=0, description="0 commits the initial weights")
    lr: float = Field(0.1, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)
    schedule: Literal["step", "cosine"] = "step"
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = ()
    gamma: float = Field(0.1, gt=0)
    warmup_epochs: float = Field(0.0, ge=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    precision: PrecisionName = "fp32"
    channels_last: bool = True
    validation: ValidateSection = Field(ValidateSection(), alias="validate")
    checkpoint: CheckpointSection = CheckpointSection()


class CalibrateSection(Section):
    """BatchNorm statistics of the instances."""

    batches: int = Field(32, ge=1, description="of data.batch_size training images")
    estimator: Literal["cumulative", "ema"] = "cumulative"
    precision: PrecisionName = "fp32"


class EvaluateSection(Section):
    """Scores on the test split."""

    batch_size: int = Field(256, ge=1)
    batches: int | None = Field(None, ge=1, description="of images drawn from the seed; every image by default")
    precision: PrecisionName = "fp32"


class ProfileSection(Section):
    """An optional stage: the costs of the instances as an artifact of their own."""

    ratios: Ratios | None = Field(None, description="those of `sdpoint` by default")


class Recipe(Section):
    """Everything about a run. Sections and keys that are not named have the defaults."""

    name: str = Field(pattern=NAME_PATTERN, max_length=80, description="also the tag")
    seed: int = Field(0, ge=0)
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="cuda:1 too; not part of a result")
    model: ModelSection
    data: DataSection
    sdpoint: Annotated[
        SdpointSection | None, BeforeValidator(_off_is_none), PlainSerializer(lambda s: "off" if s is None else s.model_dump())
    ] = SdpointSection()
    train: TrainSection = TrainSection()
    calibrate: CalibrateSection = CalibrateSection()
    evaluate: EvaluateSection = EvaluateSection()
    profile: ProfileSection | None = None

    @property
    def ratios(self) -> tuple[float, ...]:
        """The ratios of the instances: those trained with, or the default where SDPoint is off."""
        return (self.sdpoint or SdpointSection()).ratios

    @property
    def points(self) -> tuple[str, ...]:
        """The points instances may shrink at, in network order."""
        chosen = self.sdpoint.points if self.sdpoint else None
        return tuple(point for point in self.model.points if chosen is None or point in chosen)

    def complete(self) -> dict[str, Any]:
        """Return the recipe as plain data, every default filled in."""
        plain: dict[str, Any] = _without_none(self.model_dump(mode="json", by_alias=True))
        plain["model"]["stem"] = self.model.stem or architecture(self.model.arch).stem
        return plain

    def identity(self) -> dict[str, Any]:
        """Return the same without the keys that cannot change a result."""
        plain = self.complete()
        for *sections, key in LOCAL_KEYS:
            part = plain
            for section in sections:
                part = part[section]
            del part[key]
        return plain

    def problems(self) -> Iterator[Problem]:
        """Yield what does not hold between keys, each with the location to mend."""
        arch, points = architecture(self.model.arch), self.model.points
        for i, point in enumerate((self.sdpoint.points or ()) if self.sdpoint else ()):
            if point not in points:
                hint = did_you_mean(point, points)
                yield ("sdpoint", "points", i), f"{self.model.arch} has no point {point!r}{hint}; it has {', '.join(points)}"
        for i, text in enumerate(self.train.validation.instances):
            try:
                Instance.parse(text).check(points)
            except InstanceError as error:
                yield ("train", "validate", "instances", i), str(error)
        if self.data.image_size < (least := arch.reduction(self.model.stem)):
            stem = self.model.stem or arch.stem
            small = "; or set model.stem=small" if stem == "imagenet" else ""
            yield (
                ("data", "image_size"),
                f"{self.data.image_size} px is too small for {self.model.arch} with the {stem} stem, which divides the size by "
                f"{least}: use {least} or more{small}",
            )
        info = DATASETS[self.data.dataset]
        if info.num_classes not in (None, self.model.num_classes):
            yield ("model", "num_classes"), f"{self.data.dataset} has {info.num_classes} classes, not {self.model.num_classes}"
        if self.data.download and not info.downloadable:
            yield ("data", "download"), f"{self.data.dataset} is not downloaded; remove this key"
        if self.data.holdout == 0 and self.train.validation.every and self.train.epochs:
            yield ("data", "holdout"), "validation needs a holdout: use 10%, or set train.validate.every=0"
        if list(self.train.milestones) != sorted(set(self.train.milestones)):
            yield ("train", "milestones"), f"milestones are epochs that rise, got {list(self.train.milestones)}"
        if self.train.milestones and self.train.schedule == "cosine":
            yield ("train", "milestones"), "milestones belong to `schedule: step`; a cosine has none"
        if math.ceil(self.train.warmup_epochs) > min(self.train.milestones, default=math.inf):
            yield ("train", "warmup_epochs"), "the warm-up must end before the first milestone"
