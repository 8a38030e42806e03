"""What a recipe may say. Every section is frozen and refuses unknown keys."""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, PlainSerializer, WithJsonSchema

from sdpctl.budget import Budget
from sdpctl.data.catalog import DATASETS, Augment, DatasetName, Interpolation
from sdpctl.errors import InstanceError, UsageError, did_you_mean, shortened, shown
from sdpctl.instance import ALL, Instance
from sdpctl.models.registry import ARCHITECTURES, Shortcut, architecture

Location = tuple[str | int, ...]
Problem = tuple[Location, str]

LOCAL_KEYS = (
    ("device",),
    ("memory",),
    ("data", "root"),
    ("data", "workers"),
    ("data", "download"),
    ("data", "skip_unreadable"),
    ("train", "checkpoint"),
)
"""Keys that cannot change a result: they are in no artifact and no key, but remembered for the data they were used with."""

UNRECORDED_KEYS = (("search", "storage"), ("search", "study"))
"""Keys that cannot change a result, and that are not remembered either: a storage's address may be a secret."""

StrategyName = Literal["surrogate", "dqn", "ppo", "random", "uniform", "tpe", "nsga2", "greedy", "exhaustive"]

MOST = 10**9
"""The largest count that a recipe may name."""

LARGEST_IMAGE = 2**14
"""Pixels a side."""

MOST_CLASSES = 10**6

SEVERAL = ("all", "pareto")
"""What stands for a list of instances of a bundle: those calibrated, and the best of them."""

NAME_PATTERN = r"^[A-Za-z0-9]+([_-][A-Za-z0-9]+)*$"


def _known_architecture(name: object) -> object:
    if isinstance(name, str) and name not in ARCHITECTURES:
        raise ValueError(
            f"there is no architecture {shown(name)}{did_you_mean(name, ARCHITECTURES)}; `sdpctl models` lists them"
        )
    return name


def _known_dataset(name: object) -> object:
    if isinstance(name, str) and name not in DATASETS:
        raise ValueError(f"there is no data set {shown(name)}{did_you_mean(name, DATASETS)}; there are {', '.join(DATASETS)}")
    return name


def _share(value: object) -> object:
    if isinstance(value, str) and value.endswith("%"):
        if not re.fullmatch(r"\s*[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?\s*%", value, re.IGNORECASE):
            raise ValueError(f"{shown(value)} is no share; write 10% or 0.1")
        return float(value[:-1]) / 100
    if isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value < 100:
        raise ValueError(f"this should be less than 1, got {value:g}; write {value:g}% or {value / 100:g}")
    return value


def _existing_home(root: str) -> str:
    try:
        folder = Path(root).expanduser()
    except RuntimeError:
        user = Path(root).parts[0]
        raise ValueError(
            f"{shortened(user)} is not a user's home here; write ./{shortened(root)} for a folder of that name"
        ) from None
    name, path = (os.pathconf("/", key) for key in ("PC_NAME_MAX", "PC_PATH_MAX"))
    if len(os.fsencode(folder)) >= path or any(len(os.fsencode(part)) > name for part in folder.parts):
        raise ValueError(f"{shortened(root)} is longer than a path may be")
    return root


def _no_truth(value: object) -> object:
    if isinstance(value, bool):  # which a literal takes for 1
        raise ValueError(f"this should be a number, got {str(value).lower()}")
    return value


def _size(value: object) -> object:
    if isinstance(value, str) and not re.fullmatch(r"\s*[0-9]{0,30}(?:\.[0-9]{1,30}|[0-9])\s*[A-Za-z]{0,5}\s*", value):
        raise ValueError(f"{shown(value)} is no size: use 2GiB, 512MB or a number of bytes")
    return value


def _ratio(value: object) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool) and not 0 < value < 1:
        raise ValueError(f"a ratio is the size kept, above 0 and below 1, for example 0.5; got {value:g}")
    return value


def _search_ratio(value: object) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool) and not 0 < value <= 1:
        raise ValueError(f"a ratio is the size kept, above 0 and at most 1; got {value:g}")
    return value


def _one_among(ratios: tuple[float, ...]) -> tuple[float, ...]:
    if 1 not in ratios or len(ratios) < 2:
        raise ValueError(
            f"1, no downsampling, must be among them, and another: [1, 0.75, 0.5]; got {shortened(str(list(ratios)), 200)}"
        )
    return ratios


def _budget(value: object) -> object:
    if value == "none":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("write a share of `full` as 50%, MACs as 1.2G, 350M or a number, or none")
    try:
        return Budget.parse(value).text
    except UsageError as error:
        raise ValueError(str(error)) from None


def _without_password(storage: object) -> object:
    if isinstance(storage, str) and re.match(r"(?!sqlite)[^/:]+://([^@]*:.*@|.*password=)", storage):
        raise ValueError("a password does not belong here; leave it to the environment (PGPASSWORD, or SDPCTL_STORAGE)")
    return storage


def _all_is_none(value: object) -> object:
    return None if value == "all" else value


def _several(value: object) -> object:
    if isinstance(value, str) and value not in SEVERAL:
        raise ValueError(f"write all, pareto, or a list of instances; got {shown(value)}")
    return (value,) if isinstance(value, str) else value


def _off_is_none(value: object) -> object:
    if value is None or (isinstance(value, str) and value != "off"):
        raise ValueError("write `off` to train the plain network, or a section with ratios, points and draw")
    return None if value == "off" else value


def _each_once(values: tuple[object, ...] | None) -> tuple[object, ...] | None:
    if values is not None and len(set(values)) < len(values):
        raise ValueError(f"each may stand here once, got {shortened(', '.join(map(str, values)), 200)}")
    return values


Ratios = Annotated[
    tuple[Annotated[float, BeforeValidator(_ratio)], ...],
    Field(min_length=1, max_length=100, json_schema_extra={"uniqueItems": True}),
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
SearchRatios = Annotated[
    tuple[Annotated[float, BeforeValidator(_search_ratio)], ...],
    Field(max_length=100, json_schema_extra={"uniqueItems": True}),
    AfterValidator(_each_once),
    AfterValidator(_one_among),
]
MaxMacs = Annotated[
    str | None,
    BeforeValidator(_budget),
    PlainSerializer(lambda budget: "none" if budget is None else budget),
    WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string"}]}),
]
Several = Annotated[
    tuple[str, ...],
    Field(min_length=1),
    AfterValidator(_each_once),
    BeforeValidator(_several),
    PlainSerializer(lambda texts: texts[0] if texts[0] in SEVERAL else texts),
    WithJsonSchema({"anyOf": [{"enum": ["all", "pareto"]}, {"type": "array", "items": {"type": "string"}}]}),
]
PrecisionName = Literal["fp32", "bf16"]
FormatName = Literal["onnx", "torch-export", "bundle"]


def _without_none(plain: Any) -> Any:
    return {k: _without_none(v) for k, v in plain.items() if v is not None} if isinstance(plain, dict) else plain


class Section(BaseModel):
    """A part of a recipe: frozen, strict, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """The network."""

    arch: Annotated[str, BeforeValidator(_known_architecture), WithJsonSchema({"enum": list(ARCHITECTURES)})]
    num_classes: int | None = Field(
        None,
        ge=2,
        le=MOST_CLASSES,
        description="that of the data set by default: for an image folder the number of its class folders",
    )
    in_channels: Annotated[Literal[1, 3], BeforeValidator(_no_truth)] = 3
    stem: Literal["imagenet", "small"] | None = Field(None, description="the architecture's own by default")
    widths: Annotated[tuple[Annotated[int, Field(ge=1, le=2**16)], ...], Field(min_length=5, max_length=5)] | None = Field(
        None, description="of twopipe: output channels of its five convolutions"
    )
    masks: Literal["nested", "random"] | None = Field(
        None, description="of twopipe: which channels stay full in training, the first (the default) or drawn ones"
    )
    shortcut: Shortcut | None = Field(
        None,
        description="of ResNet and ResNeXt, where the shape changes: zero channels after the others, on both sides, or a 1x1 "
        "convolution; the architecture's own by default",
    )

    @property
    def points(self) -> tuple[str, ...]:
        """The network's points, in order."""
        return architecture(self.arch).points(self.stem)

    @property
    def grid_points(self) -> tuple[str, ...]:
        """What the grid of instances is made over: every point, or `all` where they go together."""
        return (ALL,) if self.together else self.points

    @property
    def arguments(self) -> dict[str, Any]:
        """What `create_model` takes beside the architecture."""
        return self.model_dump(exclude={"arch"}, exclude_none=True)

    @property
    def shape_change(self) -> Shortcut | None:
        """The shortcut where the shape changes: the one chosen, or the architecture's own; None without shortcuts."""
        return self.shortcut or architecture(self.arch).shortcut

    @property
    def together(self) -> bool:
        """Whether the grid of instances shrinks all points together."""
        return architecture(self.arch).family == "twopipe"


class DataSection(Section):
    """The images."""

    dataset: Annotated[DatasetName, BeforeValidator(_known_dataset)]
    root: Annotated[str, AfterValidator(_existing_home)] = Field(
        "data", description="the folder the files are in; not part of a result"
    )
    image_size: int = Field(32, ge=1, le=LARGEST_IMAGE)
    augment: Augment = "none"
    batch_size: int = Field(64, ge=2, le=MOST, description="of training and calibration: BatchNorm needs two images or more")
    workers: int = Field(2, ge=0, le=1024, description="processes that decode and augment; not part of a result")
    download: bool = Field(False, description="fetch what is missing; not part of a result")
    skip_unreadable: bool = Field(
        False, description="leave out images that cannot be decoded; the fingerprint is of the others; not part of a result"
    )
    partial: bool | None = Field(
        None, description="of an image folder: a class may lack images in train or in val; classes are those of both"
    )
    holdout: Share = Field(0.1, description="of each class, kept out of training to choose on")
    mean: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None = Field(
        None, description="of each channel, in [0, 1], subtracted from the pixels; the data set's own by default"
    )
    std: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = Field(
        None, description="of each channel, in [0, 1], by which the pixels are divided; the data set's own by default"
    )
    resize: int | None = Field(
        None,
        ge=1,
        le=LARGEST_IMAGE,
        description="shorter side of a test image before its central part is taken; by default image_size, or 256/224 of it "
        "with `augment: resized-crop`",
    )
    interpolation: Interpolation | None = Field(None, description="of resizing; bilinear by default")
    fingerprint: str | None = Field(None, description="hash of classes and files; where it is given, the data must match")

    @property
    def folder(self) -> Path:
        """The root as a path, `~` resolved."""
        return Path(self.root).expanduser()


class SdpointSection(Section):
    """What a training step draws."""

    ratios: Ratios = (0.5, 0.75)
    points: Points = None
    draw: Literal["single", "independent", "listed"] = "single"
    p: float = Field(0.5, gt=0, le=1, description="of `independent`: the probability that a point shrinks")
    instances: tuple[str, ...] | None = Field(
        None, min_length=1, description="of `listed`: a step draws one of them, to fine-tune what was chosen"
    )


class ValidateSection(Section):
    """Validation on the holdout while training; statistics are calibrated anew each time."""

    every: int = Field(1, ge=0, le=MOST, description="epochs; 0 is never")
    instances: tuple[str, ...] = Field(("full",), min_length=1)
    batches: int = Field(8, ge=1, le=MOST, description="of calibration")


class CheckpointSection(Section):
    """How often a training saves what it needs to go on; not part of a result."""

    epochs: int = Field(1, ge=1, le=MOST)
    minutes: float = Field(10, gt=0)


class TrainSection(Section):
    """SGD."""

    epochs: int = Field(10, ge=0, le=MOST, description="0 commits the initial weights")
    lr: float = Field(0.1, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)
    schedule: Literal["step", "cosine"] = "step"
    milestones: tuple[Annotated[int, Field(ge=1, le=MOST)], ...] = Field((), max_length=100)
    gamma: float = Field(0.1, gt=0, le=1000)
    warmup_epochs: float = Field(0.0, ge=0, le=MOST)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    precision: PrecisionName = "fp32"
    channels_last: bool = True
    init: str | None = Field(None, description="a checkpoint to begin with, by tag or digest; its digest is what is recorded")
    validation: ValidateSection = Field(ValidateSection(), alias="validate")
    checkpoint: CheckpointSection = CheckpointSection()


class CalibrateSection(Section):
    """BatchNorm statistics of the instances."""

    batches: int = Field(32, ge=1, le=MOST, description="of data.batch_size training images")
    estimator: Literal["cumulative", "ema"] = "cumulative"
    keep: Literal["full"] | None = Field(
        None, description="full: its path keeps the network's own running statistics, right for weights from a plain training"
    )
    precision: PrecisionName = "fp32"


class EvaluateSection(Section):
    """Scores on the test split."""

    batch_size: int = Field(256, ge=1, le=MOST)
    batches: int | None = Field(None, ge=1, le=MOST, description="of images drawn from the seed; every image by default")
    precision: PrecisionName = "fp32"


class ProfileSection(Section):
    """An optional stage: the costs of the instances as an artifact of their own."""

    ratios: Ratios | None = Field(None, description="those of `sdpoint` by default")


class SearchSection(Section):
    """An optional stage: the best ratio for every point, under a budget."""

    strategy: StrategyName = "surrogate"
    compare: tuple[StrategyName, ...] = Field((), description="several strategies instead, in one table")
    seeds: int = Field(1, ge=1, le=1000, description="how often each strategy is run")
    evaluations: int = Field(100, ge=2, le=10**6, description="networks that each run of a strategy may score")
    points: Points = Field(None, description="where the map may shrink; all are those of `sdpoint`")
    ratios: SearchRatios = Field((1.0, 0.75, 0.5), description="to choose from at every point")
    ratios_at: dict[str, SearchRatios] = Field({}, description="others at some points, by name")
    max_macs: MaxMacs = Field("50%", description="of an image: a share of `full`, or a number as 1.2G; or none")
    reward: Literal["accuracy", "amc", "branch"] = Field(
        "accuracy", description="top-1; -error * log(MACs); or top-1 less `weight` for each GMAC"
    )
    weight: float = Field(1.0, ge=0, le=10**6, description="of `branch`: points of top-1 that a GMAC must bring")
    images: int = Field(1000, ge=1, le=MOST, description="held-out images that score a network; at most half of them")
    calibration_batches: int = Field(4, ge=1, le=MOST, description="that calibrate a network to be scored")
    rescore: int = Field(8, ge=1, le=10**6, description="the best of a strategy that are scored on more images")
    rescore_images: int = Field(3000, ge=1, le=MOST, description="how many more held-out images, as far as there are")
    precision: PrecisionName | None = Field(None, description="of scoring; that of `train` by default")
    storage: Annotated[str | None, BeforeValidator(_without_password)] = Field(
        None, description="an Optuna storage that processes and machines share; in the store by default; not part of a result"
    )
    study: str | None = Field(None, min_length=1, description="a name in the storage; not part of a result")


class ExportSection(Section):
    """An optional stage: one instance, or many in a bundle, for use elsewhere."""

    format: FormatName = "onnx"
    instance: str | None = Field(None, description="`full` by default")
    max_macs: MaxMacs = Field(None, description="instead: the most accurate instance within, on held-out images")
    from_search: bool = Field(False, description="instead: the best of the recipe's search; in a bundle its Pareto front too")
    instances: Several = Field(("all",), description="of a bundle: all that are calibrated, pareto, or a list")
    raw_input: bool = Field(False, description="uint8 pixels come in; the graph normalises them")


class Recipe(Section):
    """Everything about a run. Sections and keys that are not named have the defaults."""

    model_config = ConfigDict(json_schema_extra={"patternProperties": {"^x-": {"description": "holds anchors; is not read"}}})

    name: str = Field(pattern=NAME_PATTERN, max_length=80, description="also the tag")
    seed: int = Field(0, ge=0, lt=2**64)
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)$", description="cuda:1 too; not part of a result")
    memory: Annotated[ByteSize, Field(gt=0, lt=2**63), BeforeValidator(_size)] | None = Field(
        None, description="what the maps of instances may take at a time beside weights, as 2GiB; not part of a result"
    )
    model: ModelSection
    data: DataSection
    sdpoint: Annotated[
        SdpointSection | None, BeforeValidator(_off_is_none), PlainSerializer(lambda s: "off" if s is None else s.model_dump())
    ] = SdpointSection()
    train: TrainSection = TrainSection()
    calibrate: CalibrateSection = CalibrateSection()
    evaluate: EvaluateSection = EvaluateSection()
    profile: ProfileSection | None = None
    search: SearchSection | None = None
    export: ExportSection | None = None

    @property
    def ratios(self) -> tuple[float, ...]:
        """The ratios of the instances: those trained with, or the default where SDPoint is off."""
        return (self.sdpoint or SdpointSection()).ratios

    @property
    def points(self) -> tuple[str, ...]:
        """The points instances may shrink at, in network order."""
        chosen = self.sdpoint.points if self.sdpoint else None
        return tuple(point for point in self.model.points if chosen is None or point in chosen)

    @property
    def grid_points(self) -> tuple[str, ...]:
        """What the grid of instances is made over: those points, or `all` where they go together."""
        return self.model.grid_points if self.model.together else self.points

    def with_classes(self, count: int) -> "Recipe":
        """Return the recipe for a number of classes."""
        return self.model_copy(update={"model": self.model.model_copy(update={"num_classes": count})})

    def complete(self) -> dict[str, Any]:
        """Return the recipe as plain data, every default filled in."""
        plain: dict[str, Any] = _without_none(self.model_dump(mode="json", by_alias=True))
        plain["model"]["stem"] = self.model.stem or architecture(self.model.arch).stem
        return plain

    def identity(self) -> dict[str, Any]:
        """Return the same without the keys that cannot change a result."""
        plain = self.complete()
        for *sections, key in LOCAL_KEYS + UNRECORDED_KEYS:
            part = plain
            for section in sections:
                part = part.get(section, {})
            part.pop(key, None)
        return plain

    def problems(self) -> Iterator[Problem]:
        """Yield what does not hold between keys, each with the location to mend."""
        arch, points = architecture(self.model.arch), self.model.points
        for i, point in enumerate((self.sdpoint.points or ()) if self.sdpoint else ()):
            if point not in points:
                hint = did_you_mean(point, points)
                yield (
                    ("sdpoint", "points", i),
                    f"{self.model.arch} has no point {shown(point)}{hint}; it has {', '.join(points)}",
                )
        for key in ("widths", "masks"):
            if getattr(self.model, key) is not None and not self.model.together:
                yield ("model", key), f"{self.model.arch} has no {key}; remove this key, or use arch: twopipe"
        if self.model.shortcut is not None and self.model.shortcut not in arch.shortcuts:
            yield ("model", "shortcut"), f"{self.model.arch} has no shortcut to choose; remove this key"
        for key in ("mean", "std"):
            values = getattr(self.data, key)
            if values is not None and len(values) != self.model.in_channels:
                needed = f"give {self.model.in_channels}, one for each of model.in_channels={self.model.in_channels}"
                yield ("data", key), f"{len(values)} number{'' if len(values) == 1 else 's'}; {needed}"
        if self.data.resize is not None and self.data.resize < self.data.image_size:
            yield (
                ("data", "resize"),
                f"{self.data.resize} px is less than the {self.data.image_size} of data.image_size, which are taken from the "
                f"middle: use {self.data.image_size} or more",
            )
        if self.model.together and self.model.stem == "imagenet":
            yield ("model", "stem"), f"{self.model.arch} has no stem to choose; remove this key"
        if self.model.together and self.sdpoint and self.sdpoint.points is not None:
            yield ("sdpoint", "points"), f"the convolutions of {self.model.arch} go together; remove this key"
        if self.sdpoint and (self.sdpoint.draw == "listed") != (self.sdpoint.instances is not None):
            yield ("sdpoint", "instances"), "`draw: listed` and a list of instances belong together; give both or neither"
        for location, text in self._instances():
            try:
                Instance.parse(text).check(points)
            except InstanceError as error:
                yield location, str(error)
        if self.export is not None:
            yield from self._export_problems(self.export)
        if self.search is not None:
            yield from self._search_problems(self.search)
        if self.data.image_size < (least := arch.reduction(self.model.stem)):
            stem = self.model.stem or arch.stem
            small = "; or set model.stem=small" if stem == "imagenet" else ""
            yield (
                ("data", "image_size"),
                f"{self.data.image_size} px is too small for {self.model.arch} with the {stem} stem, which divides the size by "
                f"{least}: use {least} or more{small}",
            )
        info = DATASETS[self.data.dataset]
        if None not in (info.num_classes, self.model.num_classes) and info.num_classes != self.model.num_classes:
            yield ("model", "num_classes"), f"{self.data.dataset} has {info.num_classes} classes, not {self.model.num_classes}"
        if self.data.partial is not None and not info.classes_from_folders:
            yield ("data", "partial"), f"{self.data.dataset} is always whole; remove this key, or use dataset: imagefolder"
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

    def _instances(self) -> Iterator[tuple[Location, str]]:
        lists: dict[Location, tuple[str, ...] | None] = {("train", "validate", "instances"): self.train.validation.instances}
        if self.sdpoint is not None:
            lists["sdpoint", "instances"] = self.sdpoint.instances
        if self.export is not None:
            lists["export", "instances"] = None if self.export.instances[0] in SEVERAL else self.export.instances
            if self.export.instance is not None:
                yield ("export", "instance"), self.export.instance
        for location, texts in lists.items():
            yield from (((*location, i), text) for i, text in enumerate(texts or ()))

    def _export_problems(self, export: ExportSection) -> Iterator[Problem]:
        ways = [key for key in ("instance", "max_macs", "from_search") if getattr(export, key)]
        if len(ways) > 1:
            yield ("export", ways[1]), f"`{ways[0]}` and `{ways[1]}` exclude each other; give one"
        if export.format == "bundle":
            for key in ("instance", "max_macs", "raw_input"):
                if getattr(export, key):
                    yield ("export", key), f"a bundle has no `{key}`; it picks among its `instances` when it runs"
        elif export.instances != ("all",):
            yield ("export", "instances"), "only a bundle holds several; name one `instance`, or set format: bundle"
        if export.from_search and export.instances != ("all",):
            yield ("export", "instances"), "`from_search` says which instances; leave one of them out"
        if export.from_search and self.search is None:
            yield ("export", "from_search"), "the recipe has no search; add a section `search`"
        if self.data.holdout == 0 and (export.max_macs or export.instances == ("pareto",)):
            yield ("data", "holdout"), "a budget is met by choosing on the holdout: use 10%, or more"

    def _search_problems(self, search: SearchSection) -> Iterator[Problem]:
        points = self.model.points
        named: list[tuple[Location, str]] = [(("search", "points", i), point) for i, point in enumerate(search.points or ())]
        named += [(("search", "ratios_at", point), point) for point in search.ratios_at]
        for location, point in named:
            if point not in points:
                hint = did_you_mean(point, points)
                yield location, f"{self.model.arch} has no point {shown(point)}{hint}; it has {', '.join(points)}"
            elif point not in (search.points or self.points):
                yield location, f"{point} is not among the points that are searched; add it to search.points"
        if search.max_macs is None and search.reward == "accuracy":
            message = "without a budget the most accurate is wanted, whatever it costs; set one, or another search.reward"
            yield ("search", "max_macs"), message
        if self.data.holdout == 0:
            yield ("data", "holdout"), "a search chooses on the holdout: use 10%, or more"
