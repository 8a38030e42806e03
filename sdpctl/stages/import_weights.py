"""Import: make a checkpoint from weights that other tools trained."""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdpctl.errors import DivergedError, UsageError
from sdpctl.instance import FULL
from sdpctl.kinds import CHECKPOINT, HISTORY, IMPORTED, MODEL, RECIPE
from sdpctl.models import architecture, empty_model
from sdpctl.models.libraries import LIBRARIES
from sdpctl.models.registry import ARCHITECTURES, Shortcut, TracedArchitecture
from sdpctl.models.settings import ModelSettings
from sdpctl.recipe.load import dump_yaml, parse_recipe
from sdpctl.recipe.resolved import Resolved
from sdpctl.recipe.schema import Recipe
from sdpctl.stages.context import Context
from sdpctl.stages.layers import initial_model, read_origin, renew_head
from sdpctl.stages.network import recipe_layer
from sdpctl.stages.opening import open_data, timed
from sdpctl.stages.stage import Job, Made, Stage, Steps, key_of
from sdpctl.stages.workspace import with_classes
from sdpctl.store import Artifact
from sdpctl.store.layout import canonical
from sdpctl.untrusted import printable, read_regular

if TYPE_CHECKING:
    from sdpctl.data.loader import ImageData
    from sdpctl.engine.evaluate import Score
    from sdpctl.engine.weights import Weights
    from sdpctl.models.chain import Chain
    from sdpctl.models.pretrained import Preprocessing, Pretrained

SCORED = 10_000
"""Maximum number of test images that an imported network is scored on."""

LITTLE = 50.0
"""Top-1 in per cent below which the preprocessing or the class order of trained weights is probably wrong."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """Weights to import, and the recipe of their network.

    Args:
        called: name of the weights in messages.
        source: source of the weights, as the checkpoint records it.
        weights: every tensor of the network by name, including a new classifier.
        model: the network on the meta device.
        resolved: the recipe.
        has_head: whether the imported weights have a classifier; if not, a new one is drawn from the seed.
        named: whether the user chose the name of the recipe.
    """

    called: str
    source: dict[str, Any]
    weights: "Weights"
    model: "Chain"
    resolved: Resolved
    has_head: bool
    named: bool


def read_weights(
    file: Path | None,
    context: Context,
    *,
    arch: str | None = None,
    timm: str | None = None,
    torchvision: str | None = None,
    ema: bool = False,
    overrides: Sequence[str] = (),
) -> Found:
    """Read the weights of a file or of a library, and make a recipe for their network.

    The number of classes, the channels, the stem and the kind of shortcut are inferred from the weights, and the path of `full`
    keeps their running statistics. The name is that of the file, of the library's weights or of the architecture. For weights
    of a library, the recipe has their preprocessing. Overrides take precedence.

    Args:
        file: a state dict: `.pth`, `.pth.tar`, `.safetensors`.
        context: gives the store and the reporter.
        arch: an architecture; by default that of the library's weights.
        timm: name of weights of timm, instead of a file.
        torchvision: name of weights of torchvision, instead of a file; with an architecture, the name of the network may be
            left out.
        ema: use the exponential moving average of the weights in the file.
        overrides: overrides of the recipe.

    Raises:
        DataError: if the file does not consist of plain tensors, the weights cannot be fetched, or the data is missing.
        RecipeError: if the recipe is not valid with the overrides.
        UsageError: if the weights do not fit, there is no moving average, or the number of classes of a new classifier is not
            known; or if not exactly one of a file, weights of timm and weights of torchvision is given.
    """
    from sdpctl.engine.weights import find_weights, read_file

    if sum(given is not None for given in (file, timm, torchvision)) != 1:
        raise UsageError("give a file of weights, --timm NAME or --torchvision NAME, one of them")
    preprocessing: Preprocessing | None = None
    source: dict[str, Any]
    if file is not None:
        if arch is None:
            raise UsageError("--arch is missing: name the architecture of the weights; `sdpctl models` lists them")
        called, name = printable(file.name), _name(file.name)
        known = architecture(arch)
        loaded = read_file(file)
        source = {"from": called, "sha256": hashlib.sha256(read_regular(file)).hexdigest()}
    else:
        offered = _offered_by_timm(timm) if timm is not None else _offered_by_torchvision(str(torchvision), arch)
        arch = arch or f"{offered.library}/{offered.network}"
        known = architecture(arch)
        called = f"{offered.library}'s {offered.network}.{offered.weights}"
        name = _name(f"{offered.network}.{offered.weights}" if "/" in arch else arch)
        empty_model(ModelSettings(arch=arch))  # before the weights are fetched
        context.report.note(f"{called}: fetching {offered.source}, unless {offered.library}'s cache has it")
        loaded, preprocessing = offered.fetch(), offered.preprocessing
        source = {"from": offered.source, "weights": offered.name}
        if offered.classes:
            source["classes"] = list(offered.classes)
    network = empty_model(ModelSettings(arch=arch))
    found = find_weights(loaded, network, called, ema=ema)
    told = network.options_in(found.weights)
    classes, stem = told.get("num_classes"), told.get("stem")
    if classes is not None and classes < 2:
        raise UsageError(f"{called}: its classifier has {classes} class{'es' * (classes != 1)}; a network here has two or more")
    size = known.image_size(stem) if preprocessing is None else preprocessing.image_size
    defaults: dict[str, Any] = {
        "name": name,
        "model": {"arch": arch} | told,
        "data": {
            "dataset": "imagefolder",
            "augment": "crop-flip" if (stem or known.stem) == "small" else "resized-crop",
            "image_size": size,
        },
        "train": {"epochs": 0},
        "calibrate": {"keep": "full"},
    }
    recipe = parse_recipe(dump_yaml(defaults), f"recipe of {called}", overrides)
    if preprocessing is not None:
        recipe = _preprocessed(recipe, preprocessing)
    given = {override.partition("=")[0] for override in overrides}
    names_data = bool(given & {"data", "data.dataset", "data.root"})
    if recipe.model.num_classes is None:
        if not names_data:
            raise UsageError(
                f"{called} has no classifier ({network.head_names[0]}): a new one will be drawn from the seed; set its number "
                "of classes with --set model.num_classes=N, or name the data"
            )
        recipe = with_classes(recipe)
    model = empty_model(recipe.model)
    weights = found.weights if found.head else found.weights | _new_head(recipe)
    _require_fit(weights, model, recipe, called, context)
    remarks = [*found.remarks]
    if not found.head:
        remarks.append(f"there is no classifier: a new one for {recipe.model.num_classes} classes is drawn from the seed")
    if remarks:
        context.report.note(f"{called}: {'; '.join(remarks)}")
    context.require_writable()
    return Found(
        called=called,
        source=source | ({"ema": True} if ema else {}),
        weights=weights,
        model=model,
        resolved=context.workspace.resolve(recipe) if names_data else Resolved(recipe),
        has_head=found.head,
        named="name" in given,
    )


def _offered_by_timm(name: str) -> "Pretrained":
    """Return the weights that `--timm` names.

    Raises:
        UsageError: if timm does not have them.
    """
    from sdpctl.models.pretrained import pretrained

    try:
        return pretrained("timm", name.removeprefix("timm/"))
    except UsageError as error:
        raise type(error)(f"--timm {printable(name)}: {error}") from error


def _offered_by_torchvision(name: str, arch: str | None) -> "Pretrained":
    """Return the weights that `--torchvision` names; with an architecture, the name of its network may be left out.

    Raises:
        UsageError: if torchvision does not have them.
    """
    from sdpctl.models.pretrained import pretrained

    full = name.removeprefix("torchvision/")
    if full.partition(".")[0] not in LIBRARIES["torchvision"].networks:
        if arch is None:
            raise UsageError(
                f"--torchvision {printable(name)}: name the network too, as in resnet50.IMAGENET1K_V2, or give --arch"
            )
        known = architecture(arch)
        network = known.network if isinstance(known, TracedArchitecture) else known.torchvision
        if network is None or (isinstance(known, TracedArchitecture) and known.family != "torchvision"):
            theirs = [entry.name for entry in ARCHITECTURES.values() if entry.torchvision is not None]
            raise UsageError(
                f"--torchvision: torchvision has no weights of {arch}; it has those of {', '.join(theirs)} and of its own "
                "networks, torchvision/NAME"
            )
        full = f"{network}.{full}"
    try:
        return pretrained("torchvision", full)
    except UsageError as error:
        raise type(error)(f"--torchvision {printable(name)}: {error}") from error


def _require_fit(weights: "Weights", model: "Chain", recipe: Recipe, called: str, context: Context) -> None:
    """Refuse weights that do not fit a network.

    Raises:
        UsageError: if tensors do not fit, with a line for each of the first; `--verbose` shows all of them.
    """
    from sdpctl.engine.weights import few, misfits

    if lines := misfits(weights, model):
        section, known = recipe.model, architecture(recipe.model.arch)
        few_lines = few(lines)
        cut = len(few_lines) < len(lines)
        if cut:
            for line in lines:
                context.report.detail(f"{called}: {line}")
        stem = "" if isinstance(known, TracedArchitecture) else f" and the {section.stem or known.stem} stem"
        few_lines.append(
            f"{len(lines)} tensors do not fit {section.arch} with {section.num_classes} classes{stem}; is --arch right?"
            f"{' --verbose lists all of them' if cut else ''}"
        )
        raise UsageError(*(f"{called}: {line}" for line in few_lines))


@dataclass(frozen=True)
class ImportScore:
    """The score of imported weights.

    Args:
        full: score of `full` on test images with its own running statistics; None if the loss was not finite.
        warning: what is suspicious about the score, and what to do; None if the score is not suspicious.
    """

    full: "Score | None"
    warning: str | None = None


class ImportWeights(Stage):
    """Store imported weights as a checkpoint.

    Args:
        found: the weights, and the recipe of their network.

    Raises:
        UsageError: if a different checkpoint has the name already, and the user did not choose the name.
    """

    kind = CHECKPOINT

    def __init__(self, found: Found) -> None:
        self.found = found
        self._data: ImageData | None = None

    @property
    def tag(self) -> str:
        """`NAME`."""
        return self.found.resolved.recipe.name

    def steps(self, context: Context) -> Steps:
        """Return the job; an import needs no other stage."""
        yield from ()
        found = self.found
        key = key_of(self.kind, imported=hashlib.sha256(self._content).hexdigest(), recipe=found.resolved.identity())
        there = context.tagged(self.tag)
        if there is not None and there.key != key and not found.named and not _is_from(there, found.source, context):
            raise UsageError(f"a different checkpoint has the tag {self.tag}; give this one a name with --set name=NAME")

        def make() -> Made:
            if found.resolved.fingerprint is not None:
                self._opened(context)  # if the data does not fit, raise before the checkpoint is committed
            return Made(self.layers(), f"imported {found.called} as {found.resolved.recipe.model.arch}")

        return Job(key=key, make=make)

    def task(self, context: Context) -> str:  # noqa: ARG002
        """Return what would be imported."""
        return f"import {len(self.found.weights)} tensors of {self.found.called}"

    def score(self, context: Context) -> ImportScore | None:
        """Score imported weights on test images with every kind of shortcut that fits their shapes, and report the score.

        Returns:
            The score; None if no data was named, or the classifier is new.
        """
        found, recipe = self.found, self.found.resolved.recipe
        if found.resolved.fingerprint is None:
            context.report.note(
                f"{recipe.name}: no data was named; later commands need it, for example --set data.dataset=imagefolder "
                "--set data.root=FOLDER, or import again with these options"
            )
            return None
        if not found.has_head:
            return None
        data = self._opened(context)
        name, dataset = recipe.name, recipe.data.dataset
        open_choice = recipe.model.shortcut is None and recipe.model.shape_change == "padding"
        choices: tuple[Shortcut | None, ...] = ("padding", "padding-centred") if open_choice else (None,)
        try:
            scores = [_score(recipe, choice, found.weights, data, context) for choice in choices]
        except DivergedError as error:
            diverged = f"{name}: warning: {error}"
            context.report.note(diverged)
            return ImportScore(None, diverged)
        score, best = scores[0], max(scores, key=lambda score: score.top1)
        chance = 100 / len(data.classes)
        line = f"{name}: `full` scores {score.top1:.2f} % on {score.images:,} test images (chance is {chance:.3g} %)"
        if recipe.data.mean is None or recipe.data.std is None:
            line += f", with the usual normalisation of {dataset}; data.mean and data.std set that of the weights' training"
        context.report.note(line)
        noise = 300 * math.sqrt(0.5 / score.images)  # three standard errors of a difference
        warning: str | None = None
        if best.top1 > score.top1 + noise:
            warning = (
                f"{name}: warning: model.shortcut=padding, which this was imported with, scores {score.top1:.2f} %, and "
                f"padding-centred {best.top1:.2f} %; import it again with --set model.shortcut=padding-centred"
            )
        elif score.top1 < LITTLE or score.top1 <= chance + 300 * math.sqrt(chance / 100 * (1 - chance / 100) / score.images):
            little = "is at chance" if score.top1 <= chance + noise else "is little for trained weights"
            warning = (
                f"{name}: warning: {score.top1:.2f} % {little}: the weights may need a different data.mean, data.std, "
                f"data.image_size or model.shortcut, or their classes may be in a different order than those of {dataset}"
            )
        if warning is not None:
            context.report.note(warning)
        return ImportScore(score, warning)

    def _opened(self, context: Context) -> "ImageData":
        from sdpctl.engine.device import pick_device

        recipe = self.found.resolved.recipe
        if self._data is None:
            self._data = open_data(recipe, pick_device(recipe.device), context)
        return self._data

    def layers(self) -> dict[str, bytes]:
        """Return the layers of the checkpoint."""
        found = self.found
        return {
            MODEL: self._content,
            HISTORY: b"",
            IMPORTED: canonical(found.source),
            RECIPE: recipe_layer(found.resolved),
        }

    @cached_property
    def _content(self) -> bytes:
        import torch

        from sdpctl.engine.tensors import tensors_to_bytes
        from sdpctl.engine.weights import fitted

        weights, state = self.found.weights, self.found.model.state_dict()
        zero = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in state.items() if name not in weights}
        return tensors_to_bytes(fitted(weights, self.found.model) | zero)


def _preprocessed(recipe: Recipe, wanted: "Preprocessing") -> Recipe:
    """Add the preprocessing of the weights' training to a recipe, except for keys that the recipe sets."""
    if recipe.evaluate.image_size is None and recipe.data.image_size == wanted.image_size < wanted.test_size:
        recipe = recipe.changed(evaluate={"image_size": wanted.test_size})
    data = recipe.data
    mean, std = data.normalisation(recipe.model.in_channels)
    now: dict[str, Any] = {"mean": mean, "std": std, "interpolation": data.resampling}
    if recipe.scored_size == wanted.test_size:  # `resize` only suits the image size that it came with
        now["resize"] = data.side_of(recipe.scored_size)
    update = {key: value for key, was in now.items() if getattr(data, key) is None and (value := getattr(wanted, key)) != was}
    return recipe.changed(data=update)


def _new_head(recipe: Recipe) -> "Weights":
    network = initial_model(recipe)
    renew_head(network, recipe.seed)
    state = network.state_dict()
    return {name: state[name] for name in network.head_names}


def _is_from(checkpoint: Artifact, source: Mapping[str, Any], context: Context) -> bool:
    """Return whether a checkpoint was imported from the same source, perhaps with different settings."""
    if IMPORTED not in checkpoint.layers:
        return False
    theirs = read_origin(context.store, checkpoint)
    return all(theirs.get(key) == value for key, value in source.items() if key not in ("weights", "classes"))


def _score(recipe: Recipe, shortcut: Shortcut | None, weights: "Weights", data: "ImageData", context: Context) -> "Score":
    """Score `full` with its own running statistics on test images.

    Raises:
        DivergedError: if the loss is not finite.
    """
    from sdpctl.engine.calibrate import running_statistics
    from sdpctl.engine.evaluate import evaluate
    from sdpctl.engine.weights import fill

    section = recipe.evaluate
    model = empty_model(replace(recipe.model, shortcut=shortcut or recipe.model.shortcut))
    fill(model.to_empty(device="cpu"), weights)
    model = model.to(data.device).channels_last().eval()
    most = math.ceil(SCORED / section.batch_size)
    most = min(section.batches or most, most)
    total = min(math.ceil(data.test_size / section.batch_size), most)
    images = min(data.test_size, most * section.batch_size)
    batches = timed(data.test(section.batch_size, most), total, "scoring full", recipe.name, context, images=images)
    statistics = running_statistics(model)
    return evaluate(model, [FULL], batches, statistics, recipe.evaluation)[FULL]


def _name(file: str) -> str:
    stem = re.sub(r"(\.(pth|pt|th|tar|bin|ckpt|safetensors))+$", "", file)
    return re.sub(r"[^A-Za-z0-9]+", "-", stem)[:80].strip("-") or "imported"
