"""The recipe: its sections, which are defined in the packages that use them, and the conditions between their keys."""

import inspect
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    WrapSerializer,
    create_model,
)
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from sdpctl.data.catalog import DATASETS
from sdpctl.data.settings import DataSettings, Preparation
from sdpctl.engine.settings import CalibrateSettings, EvaluateSettings, ProfileSettings, TrainSettings, WalkSettings
from sdpctl.errors import InstanceError, ModelError, did_you_mean, shown
from sdpctl.export.catalog import FORMATS
from sdpctl.export.settings import SEVERAL, ExportSettings
from sdpctl.instance import FULL, Instance
from sdpctl.kinds import KINDS
from sdpctl.models.libraries import LIBRARIES
from sdpctl.models.registry import ARCHITECTURES, FAMILIES, architecture, refused_options
from sdpctl.models.settings import ModelSettings
from sdpctl.report.settings import ReportSettings
from sdpctl.sdpoint import SdpointSettings
from sdpctl.search.catalog import AGENT, REWARDS, STRATEGIES
from sdpctl.search.settings import CascadeSettings, SearchSettings
from sdpctl.section import Section
from sdpctl.table import load

Location = tuple[str | int, ...]
Problem = tuple[Location, str]

LOCAL_KEYS = (
    ("device",),
    ("memory",),
    ("data", "root"),
    ("data", "workers"),
    ("data", "cache"),
    ("data", "download"),
    ("data", "skip_unreadable"),
    ("train", "checkpoint"),
    ("train", "compile"),
    ("train", "track"),
)
"""Keys that cannot change more of a result than its last digits. They are part of no artifact and no key; the store remembers
the last values for each data set."""

UNRECORDED_KEYS = (("search", "storage"), ("search", "study"))
"""Keys that cannot change a result and are not remembered either: a storage's address may be a secret."""

STORED_DEFAULTS = {"data.decoder": "pil", "data.presize": False}
"""The values of keys that a stored recipe lacks: earlier versions had only these values, and they are still not recorded."""

EXPORT_DEFAULTS = {"precision": "fp32", "max_drop": 1.0, "calibration_images": 256}
"""Values of keys of the section `export` that are not recorded: recipes of versions without these keys keep their digests."""

NAME_PATTERN = r"^[A-Za-z0-9]+([_-][A-Za-z0-9]+)*$"


def _size(value: object) -> object:
    if isinstance(value, str) and not re.fullmatch(r"\s*[0-9]{0,30}(?:\.[0-9]{1,30}|[0-9])\s*[A-Za-z]{0,5}\s*", value):
        raise ValueError(f"{shown(value)} is not a size: use 2GiB, 512MB or a number of bytes")
    return value


def _off_is_none(value: object) -> object:
    if value is None or (isinstance(value, str) and value != "off"):
        raise ValueError("write `off` to train the plain network, or a section with ratios, points and draw")
    return None if value == "off" else value


def _none_is_off(value: SdpointSettings | None, write: SerializerFunctionWrapHandler) -> Any:
    return "off" if value is None else write(value)


def _without_none(plain: Any) -> Any:
    return {k: _without_none(v) for k, v in plain.items() if v is not None} if isinstance(plain, dict) else plain


class Recipe(BaseModel):
    """Everything about a run. Sections and keys that are not named have their defaults.

    Args:
        name: the name, which becomes the tag.
        seed: seed of everything random.
        device: `auto` (CUDA if it is available), cpu, cuda or cuda:1; not part of a result.
        memory: maximum memory of the feature maps of instances, without the weights, such as 2GiB; not part of a result.
        model: the network.
        data: the images.
        sdpoint: which instance a training step draws; `off` trains the plain network.
        train: stochastic gradient descent.
        calibrate: BatchNorm statistics of the instances.
        evaluate: scores on the test split.
        profile: an optional stage: the costs of the instances.
        search: an optional stage: the best ratio for every point within a budget.
        cascade: an optional stage: the best cascade of instances within a budget.
        export: an optional stage: a file or folder for other programs.
        report: an optional stage: a page of the results, for a browser.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        json_schema_extra={"patternProperties": {"^x-": {"description": "holds anchors; is not read"}}},
    )

    name: str = Field(pattern=NAME_PATTERN, max_length=80)
    seed: int = Field(0, ge=0, lt=2**64)
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)$")
    memory: Annotated[ByteSize, Field(gt=0, lt=2**63), BeforeValidator(_size)] | None = None
    model: ModelSettings
    data: DataSettings
    sdpoint: Annotated[SdpointSettings | None, BeforeValidator(_off_is_none), WrapSerializer(_none_is_off)] = SdpointSettings()
    train: TrainSettings = TrainSettings()
    calibrate: CalibrateSettings = CalibrateSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    profile: ProfileSettings | None = None
    search: SearchSettings | None = None
    cascade: CascadeSettings | None = None
    export: ExportSettings | None = None
    report: ReportSettings | None = None

    @property
    def ratios(self) -> tuple[float, ...]:
        """The ratios of the instances: those of the training, or the default ratios if SDPoint is off."""
        return (self.sdpoint or SdpointSettings()).ratios

    @property
    def scored_size(self) -> int:
        """Height and width of an image that is scored, in pixels; MACs are counted at this size."""
        return self.evaluate.image_size or self.data.image_size

    @property
    def points(self) -> tuple[str, ...]:
        """The points instances may shrink at, in network order."""
        chosen = self.sdpoint.points if self.sdpoint else None
        return tuple(point for point in self.model.points if chosen is None or point in chosen)

    @property
    def grid_points(self) -> tuple[str, ...]:
        """The points of the grid of instances: `points`, or `all` if the points shrink together."""
        return self.model.grid_points if self.model.together else self.points

    def optional(self, section: str) -> object | None:
        """Return the settings of an optional stage's section; None if the recipe does not have it."""
        settings: object | None = getattr(self, section, None)
        return settings

    @property
    def calibration(self) -> WalkSettings:
        """How instances are run to calibrate them."""
        section = self.calibrate
        keep_full = section.keep == "full"
        return WalkSettings(precision=section.precision, memory=self.memory, estimator=section.estimator, keep_full=keep_full)

    @property
    def preparation(self) -> Preparation:
        """How training images become the batches of a calibration."""
        section = self.calibrate
        return Preparation(
            batch_size=section.batch_size or self.data.batch_size,
            image_size=section.image_size or self.data.image_size,
            augmented=section.augment is None,
        )

    @property
    def evaluation(self) -> WalkSettings:
        """How instances are run to evaluate them."""
        return WalkSettings(precision=self.evaluate.precision, memory=self.memory)

    @property
    def validation(self) -> WalkSettings:
        """How instances are run in the validation of a training."""
        return WalkSettings(precision=self.train.precision, memory=self.memory)

    @property
    def scoring(self) -> WalkSettings:
        """How a search runs the networks that it scores, to calibrate and to evaluate them."""
        precision = (self.search.precision if self.search else None) or self.train.precision
        return WalkSettings(precision=precision, memory=self.memory, keep_full=self.calibrate.keep == "full")

    def changed(self, **values: Any) -> "Recipe":
        """Return the recipe with some of its values changed.

        Args:
            values: new values by name; for a section, a mapping with only the keys that change, as in
                `changed(data={"fingerprint": found})`.
        """
        return self.model_copy(
            update={
                name: replace(getattr(self, name), **value) if isinstance(value, Mapping) else value
                for name, value in values.items()
            }
        )

    def complete(self) -> dict[str, Any]:
        """Return the recipe as plain data, with every default filled in."""
        plain: dict[str, Any] = _without_none(self.model_dump(mode="json"))
        if not self.train.sync_bn:  # recipes of versions without this key keep their digests
            del plain["train"]["sync_bn"]
        if not self.evaluate.predictions:
            del plain["evaluate"]["predictions"]
        plain["model"]["stem"] = self.model.stem or architecture(self.model.arch).stem
        return plain

    def identity(self) -> dict[str, Any]:
        """Return the complete recipe as plain data, without the keys that cannot change a result."""
        plain = self.complete()
        if self.data.identify == "content":  # absent, as in recipes that are older than this key
            del plain["data"]["identify"]
        for key, value in EXPORT_DEFAULTS.items():  # for the same reason
            if self.export is not None and getattr(self.export, key) == value:
                del plain["export"][key]
        for *sections, key in LOCAL_KEYS + UNRECORDED_KEYS:
            part = plain
            for section in sections:
                part = part.get(section, {})
            part.pop(key, None)
        data, files = plain["data"], DATASETS[self.data.dataset].image_files
        if self.data.decoder == "pil" or not files:  # see STORED_DEFAULTS
            del data["decoder"]
        data.pop("presize", None)
        if self.data.presizes and files:
            data["presize"] = True
        return plain

    def problems(self) -> Iterator[Problem]:
        """Yield the conflicts between keys, each with the location of the key to correct."""
        arch = architecture(self.model.arch)
        try:
            points = self.model.points
        except ModelError as error:
            yield ("model", "arch"), str(error)
            return
        for i, point in enumerate((self.sdpoint.points or ()) if self.sdpoint else ()):
            if point not in points:
                hint = did_you_mean(point, points)
                yield (
                    ("sdpoint", "points", i),
                    f"{self.model.arch} has no point {shown(point)}{hint}; it has {', '.join(points)}",
                )
        for option, _ in refused_options(self.model.arch, self.model.arguments):
            families = " or ".join(family.name for family in FAMILIES.values() if option in family.options)
            remedy = f"remove this key, or use a network of the family {families}"
            yield ("model", option), f"{self.model.arch} has no {option} to choose; {remedy}"
        for key in ("mean", "std"):
            values = getattr(self.data, key)
            if values is not None and len(values) != self.model.in_channels:
                needed = f"give {self.model.in_channels}, one for each of model.in_channels={self.model.in_channels}"
                yield ("data", key), f"{len(values)} number{'' if len(values) == 1 else 's'}; {needed}"
        if self.data.resize is not None and self.data.resize < self.scored_size:
            key = "data.image_size" if self.evaluate.image_size is None else "evaluate.image_size"
            yield (
                ("data", "resize"),
                f"{self.data.resize} px is less than the {self.scored_size} of {key}, which are taken from the middle: use "
                f"{self.scored_size} or more",
            )
        if self.model.together and self.sdpoint and self.sdpoint.points is not None:
            yield ("sdpoint", "points"), f"the points of {self.model.arch} go together; remove this key"
        if self.sdpoint and (self.sdpoint.draw == "listed") != (self.sdpoint.instances is not None):
            yield ("sdpoint", "instances"), "`draw: listed` and a list of instances belong together; give both or neither"
        if self.sdpoint is not None:
            yield from self._draw_problems(self.sdpoint)
        distill = self.train.distill
        if distill is not None and distill.teacher == "self" and not (self.sdpoint and self.sdpoint.several):
            wrong = "`self` is the `full` of the same step: use sdpoint.draw=pair or sandwich, or name a checkpoint"
            yield ("train", "distill", "teacher"), wrong
        if distill is not None and distill.teacher == self.name:
            wrong = f"{self.name} would learn from its own earlier training; give this training a different name"
            yield ("train", "distill", "teacher"), wrong
        for location, text in self._instances():
            try:
                Instance.parse(text).check(points)
            except InstanceError as error:
                yield location, str(error)
        if self.export is not None:
            yield from self._export_problems(self.export)
        if self.search is not None:
            yield from self._search_problems(self.search)
        if self.cascade is not None and self.data.holdout == 0:
            yield ("data", "holdout"), "a cascade is chosen on the holdout: use 10%, or more"
        for section in ("data", "calibrate", "evaluate"):
            size = getattr(self, section).image_size
            if size is not None and (reason := arch.refused_size(size, self.model.stem)) is not None:
                has_stems = "stem" in FAMILIES[arch.family].options and (self.model.stem or arch.stem) == "imagenet"
                yield (section, "image_size"), reason + "; or set model.stem=small" * has_stems
        info = DATASETS[self.data.dataset]
        if None not in (info.num_classes, self.model.num_classes) and info.num_classes != self.model.num_classes:
            yield ("model", "num_classes"), f"{self.data.dataset} has {info.num_classes} classes, not {self.model.num_classes}"
        if self.data.partial is not None and not info.classes_from_folders:
            yield ("data", "partial"), f"{self.data.dataset} is always whole; remove this key, or use dataset: imagefolder"
        for key in ("folders", "test_share"):
            if getattr(self.data, key) is not None and not info.classes_from_folders:
                yield ("data", key), f"{self.data.dataset} has its own folders; remove this key, or use dataset: imagefolder"
        if self.data.folders is not None and self.data.test_share is not None:
            yield ("data", "test_share"), "`folders` names the test images, so no share is chosen; leave one of them out"
        if self.data.folders is not None and len(set(self.data.folders)) == 1:
            yield ("data", "folders"), "the same folder for training and test images; name two, or use `test_share: 20%`"
        if self.data.identify == "stat" and not info.image_files:
            reason = f"{self.data.dataset} has no image files to tell apart by their sizes; remove this key"
            yield ("data", "identify"), reason
        if self.data.identify == "stat" and self.data.skip_unreadable:
            advice = "use data.skip_unreadable=false or data.identify=content"
            yield ("data", "skip_unreadable"), f"`identify: stat` decodes no image, so it finds none to leave out; {advice}"
        if self.data.download and not info.downloadable:
            yield ("data", "download"), f"{self.data.dataset} is not downloaded; remove this key"
        if self.data.decoder == "nvjpeg" and info.image_files:
            for key in ("auto_augment", "random_erasing"):
                if getattr(self.data, key) is not None:
                    yield ("data", key), "`decoder: nvjpeg` decodes after the workers, which do this; use decoder: torchvision"
            if self.data.presize:
                yield ("data", "presize"), "`decoder: nvjpeg` resizes each image once; use decoder: torchvision"
            if self.data.cache != "none":
                yield (
                    ("data", "cache"),
                    "`decoder: nvjpeg` decodes each batch anew and has no cache; leave one of them out",
                )
        finetunes = self.calibrate.finetune
        if finetunes is not None and self.calibrate.keep == "full" and "full" in finetunes.instances:
            reason = "`keep: full` and a fine-tuning of `full` exclude each other; leave one of them out"
            yield ("calibrate", "finetune", "instances"), reason
        if self.data.holdout == 0 and self.train.validate.every and self.train.epochs:
            yield ("data", "holdout"), "validation needs a holdout: use 10%, or set train.validate.every=0"
        if (reason := _refused_init(self.train.init or "")) is not None:
            yield ("train", "init"), reason
        if list(self.train.milestones) != sorted(set(self.train.milestones)):
            yield ("train", "milestones"), f"milestones are epochs that rise, got {list(self.train.milestones)}"
        if self.train.milestones and self.train.schedule == "cosine":
            yield ("train", "milestones"), "milestones belong to `schedule: step`; a cosine has none"
        if self.train.lr_body is not None and self.train.layer_decay is not None:
            yield ("train", "layer_decay"), "`lr_body` and `layer_decay` exclude each other; give one"
        if math.ceil(self.train.warmup_epochs) > min(self.train.milestones, default=math.inf):
            yield ("train", "warmup_epochs"), "the warm-up must end before the first milestone"

    def _draw_problems(self, section: SdpointSettings) -> Iterator[Problem]:
        if section.drawn is not None and not section.several:
            reason = f"`draw: {section.draw}` draws one instance a step; remove this key, or use draw: pair or sandwich"
            yield ("sdpoint", "drawn"), reason
        if section.budgets is not None and section.draw != "budgeted":
            yield ("sdpoint", "budgets"), f"`draw: {section.draw}` has no budgets; remove this key, or use draw: budgeted"
        points, weights = self.grid_points, section.weights
        numbers = weights if isinstance(weights, dict) else {}
        if weights is not None and (section.many_points or section.draw == "listed" or self.model.together):
            reason = "weights belong to points that shrink alone: use draw: single, pair or sandwich"
            if self.model.together:
                reason = f"the points of {self.model.arch} go together; remove this key"
            yield ("sdpoint", "weights"), reason
            return
        for name in numbers:
            if name == str(FULL) and section.several:
                yield ("sdpoint", "weights", name), f"`draw: {section.draw}` trains full in every step; remove this weight"
            elif name not in (str(FULL), *points):
                hint = did_you_mean(name, points)
                wrong = f"there is no point {shown(name)} to draw{hint}; the points are {', '.join(points)}"
                yield ("sdpoint", "weights", name), wrong
        drawable = sum(numbers.get(point, 1) > 0 for point in points) * len(self.ratios)
        cheapest = section.draw == "sandwich" and all(numbers.get(point, 1) > 0 for point in points)
        if section.several and section.number_drawn > drawable - cheapest:
            wrong = f"a step draws {section.number_drawn} of the instances that are not in every step, and there are "
            remedy = ": lower it, or give more points or ratios" if section.drawn else ": give more points or ratios"
            yield ("sdpoint", "drawn" if section.drawn else "draw"), f"{wrong}{drawable - cheapest}{remedy}"
        if section.draw == "single" and not any(numbers.get(name, 1) > 0 for name in (*points, str(FULL))):
            yield ("sdpoint", "weights"), "every weight is 0; give at least one point a weight above 0"

    def _instances(self) -> Iterator[tuple[Location, str]]:
        lists: dict[Location, tuple[str, ...] | None] = {("train", "validate", "instances"): self.train.validate.instances}
        if self.cascade is not None:
            lists["cascade", "instances"] = self.cascade.instances
        if self.calibrate.finetune is not None:
            lists["calibrate", "finetune", "instances"] = self.calibrate.finetune.instances
        if self.sdpoint is not None:
            lists["sdpoint", "instances"] = self.sdpoint.instances
        if self.export is not None:
            lists["export", "instances"] = None if self.export.instances[0] in SEVERAL else self.export.instances
            if self.export.instance is not None:
                yield ("export", "instance"), self.export.instance
        for location, texts in lists.items():
            yield from (((*location, i), text) for i, text in enumerate(texts or ()))

    def _export_problems(self, export: ExportSettings) -> Iterator[Problem]:
        ways = [key for key in ("instance", "max_macs", "from_search") if getattr(export, key)]
        if len(ways) > 1:
            yield ("export", ways[1]), f"`{ways[0]}` and `{ways[1]}` exclude each other; give one"
        form = FORMATS.find(export.format)
        if form.several:
            for key in ("instance", "max_macs"):
                if getattr(export, key):
                    message = f"the format {form.name} has no `{key}`; it chooses among its `instances` when it runs"
                    yield ("export", key), message
        elif form.holds_cascade:
            given = {"instance": export.instance, "from_search": export.from_search, "instances": export.instances != ("all",)}
            for key in (key for key, value in given.items() if value):
                yield ("export", key), f"the format {form.name} holds a cascade; remove this key"
        elif export.instances != ("all",):
            several = " or ".join(name for name, other in FORMATS.items() if other.several)
            message = f"the format {form.name} holds one instance; name one `instance`, or set format: {several}"
            yield ("export", "instances"), message
        if export.raw_input and not form.raw_input:
            yield ("export", "raw_input"), f"the format {form.name} does not take raw pixels; remove this key"
        if export.precision not in form.precisions:
            fitting = " or ".join(name for name, other in FORMATS.items() if export.precision in other.precisions)
            message = f"the format {form.name} is not written in {export.precision}; remove this key, or set format: {fitting}"
            yield ("export", "precision"), message
        for key, needed in (("max_drop", ("fp16", "int8")), ("calibration_images", ("int8",))):
            if getattr(export, key) != EXPORT_DEFAULTS[key] and export.precision not in needed:
                message = f"this key belongs to the precision {' or '.join(needed)}; set export.precision, or remove this key"
                yield ("export", key), message
        if export.opset is not None and not form.opset:
            yield ("export", "opset"), f"the format {form.name} has no ONNX operators; remove this key"
        if export.check is not None and export.check not in form.checks:
            yield ("export", "check"), f"the format {form.name} cannot be run in {export.check}; remove this key"
        if export.from_search and export.instances != ("all",):
            yield ("export", "instances"), "`from_search` says which instances; leave one of them out"
        if export.from_search and self.search is None:
            yield ("export", "from_search"), "the recipe has no search; add a section `search`"
        if export.from_search and self.search is not None and self.search.budgets is not None:
            yield ("export", "from_search"), "the search of this recipe trains an agent; remove search.budgets, or this key"
        if self.data.holdout == 0 and (export.max_macs or export.instances == ("pareto",)):
            yield ("data", "holdout"), "a budget is met by choosing on the holdout: use 10%, or more"

    def _search_problems(self, search: SearchSettings) -> Iterator[Problem]:
        points = self.model.points
        named: list[tuple[Location, str]] = [(("search", "points", i), point) for i, point in enumerate(search.points or ())]
        named += [(("search", "ratios_at", point), point) for point in search.ratios_at]
        for location, point in named:
            if point not in points:
                hint = did_you_mean(point, points)
                yield location, f"{self.model.arch} has no point {shown(point)}{hint}; it has {', '.join(points)}"
            elif point not in (search.points or self.points):
                yield location, f"{point} is not among the points that are searched; add it to search.points"
        yield from _agent_problems(search)
        reward = REWARDS[search.reward]
        classes = self.model.num_classes or DATASETS[self.data.dataset].num_classes
        if (refused := reward.refused(classes)) is not None:
            yield ("search", "reward"), refused
        if search.max_macs is None and not reward.weighs_costs:
            message = (
                "without a budget the most accurate is wanted, whatever it costs; set one, or choose a different search.reward"
            )
            yield ("search", "max_macs"), message
        if self.data.holdout == 0:
            yield ("data", "holdout"), "a search chooses on the holdout: use 10%, or more"


def _agent_problems(search: SearchSettings) -> Iterator[Problem]:
    """Yield what is wrong with the keys of a search that train an agent or use one."""
    asked = search.strategies
    *others, last = (name for name, strategy in STRATEGIES.items() if strategy.learns)
    if search.policy is None and AGENT in asked:
        yield ("search", "policy"), f"the strategy {AGENT} takes the proposals of a trained agent; name one, by its tag"
    if search.policy is not None and AGENT not in asked:
        yield ("search", "policy"), f"only the strategy {AGENT} has a policy; set search.strategy={AGENT}, or remove this key"
    if search.evaluations < 2 and asked != (AGENT,):
        yield ("search", "evaluations"), f"{search.evaluations} is too few; the strategy {asked[0]} scores at least 2 networks"
    if search.budgets is not None:
        if search.compare or not STRATEGIES[search.strategy].learns:
            yield (
                ("search", "budgets"),
                f"an agent learns a range of budgets; set search.strategy to {', '.join(others)} or {last}",
            )
        if search.seeds > 1:
            yield ("search", "seeds"), "one agent is trained for a range of budgets; set 1, and change `seed` for another one"


def _refused_init(init: str) -> str | None:
    """Return why a training cannot begin with weights of a library; None if it can, or if the text names a checkpoint."""
    library, slash, weights = init.partition("/")
    if not slash:
        return None
    if library not in LIBRARIES:
        return (
            f"{shown(init)} is neither a tag nor weights of {' or '.join(LIBRARIES)}; write for example timm/resnet50.a1_in1k"
        )
    network = f"{library}/{weights.partition('.')[0]}"
    return None if network in ARCHITECTURES else ARCHITECTURES.unknown(network)


class _Schema(GenerateJsonSchema):
    """Describes the keys of a section by the `Args:` of its docstring."""

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> JsonSchemaValue:
        """Return the schema of a section."""
        return _described(super().dataclass_schema(schema), schema["cls"])

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        """Return the schema of the recipe."""
        return _described(super().model_schema(schema), schema["cls"])

    def get_default_value(self, schema: core_schema.WithDefaultSchema) -> Any:
        """Return the default of a key, also one that a section makes anew each time, such as an empty mapping."""
        factory: Any = schema.get("default_factory")
        return super().get_default_value(schema) if factory is None else factory()

    def encode_default(self, dft: Any) -> Any:
        """Return a default as a recipe writes it: `all` for every point."""
        return TypeAdapter(type(dft)).dump_python(dft, mode="json") if isinstance(dft, Section) else super().encode_default(dft)


def _described(schema: JsonSchemaValue, section: type) -> JsonSchemaValue:
    about, _, arguments = inspect.getdoc(section).partition("\n\nArgs:\n")  # type: ignore[union-attr]  # tests hold it
    schema["description"] = " ".join(about.split())
    _, *parts = re.split(r"^    (\w+): ", arguments, flags=re.MULTILINE)
    for key, text in zip(parts[::2], parts[1::2], strict=True):
        schema["properties"][key]["description"] = " ".join(text.split())
    return schema


def recipe_type() -> type[Recipe]:
    """Return the recipe type with a section for each optional stage in the table of kinds, which other code may add to."""
    kinds = [kind for kind in KINDS.values() if kind.section is not None and kind.section not in Recipe.model_fields]
    if not kinds:
        return Recipe
    sections: dict[str, Any] = {str(kind.section): (load(str(kind.settings)) | None, None) for kind in kinds}
    return create_model("Recipe", __base__=Recipe, **sections)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes."""
    return recipe_type().model_json_schema(schema_generator=_Schema)
