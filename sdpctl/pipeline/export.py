"""The export stage: from a checkpoint to files for use elsewhere, run there before they are kept."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sdpctl.budget import Budget
from sdpctl.errors import BudgetError, IntegrityError, UsageError
from sdpctl.export.catalog import CARD, FORMATS
from sdpctl.export.description import Description, Input, Option
from sdpctl.export.settings import SEVERAL, ExportSettings
from sdpctl.instance import FULL, Instance
from sdpctl.models.settings import ModelSettings
from sdpctl.pipeline.artifacts import EXPORT, IMPORTED, MODEL, read_model, read_origin, read_statistics, reader
from sdpctl.pipeline.choice import calibrated, front, within
from sdpctl.pipeline.context import Context, Opened, counted, named, recipe_of, stage_key
from sdpctl.pipeline.findings import found_instances
from sdpctl.pipeline.instances import document, evaluated, profile_model, statistics_for
from sdpctl.recipe.load import dump_yaml
from sdpctl.store import Artifact

if TYPE_CHECKING:
    from torch import Tensor

    from sdpctl.data.loader import ImageData, Normalise
    from sdpctl.engine.calibrate import Statistics
    from sdpctl.models.chain import Chain

IMAGES, IMAGES_OF_SEVERAL = 256, 32
"""Real images that an export of one instance is checked on; and each instance of an export of several."""


def export(
    opened: Opened, context: Context, *, search: str | None = None, max_latency_ms: float | None = None
) -> Artifact | None:
    """Write one instance, or a bundle of many, run it outside, and commit it as `<name>.export.<format>.<12 hex>`.

    Args:
        opened: the checkpoint, or statistics; its recipe's section `export` says what.
        context: where, and who is told.
        search: a search whose best instance is meant; in a bundle its Pareto front and `full` too.
        max_latency_ms: of one image, run here by what the format is for: the most accurate instance within.

    Returns:
        The export; None on a dry run that would have exported.

    Raises:
        BudgetError: where no instance is within the budget; it names the cheapest.
        DataError: where the data is not there, or not what was promised.
        IntegrityError: where the export, run outside, does not do what the network does; nothing is kept.
        NotFoundError: where an instance lacks statistics and may not be calibrated.
    """
    # What an export is made from is not done again, and leaves its tags where they are.
    again, context = context.force, replace(context, force=False, aside=True)
    if opened.other_data:
        opened = context.fingerprinted(opened)
    section = opened.recipe.export or ExportSettings()
    # What other stages make does not depend on what is exported, and does not say it.
    opened = replace(opened, recipe=opened.recipe.changed(export=None))
    if section.from_search and search is None:
        search = f"{opened.name}.search"
    _check(section, search, max_latency_ms)
    if search is not None and context.lineage(context.store.resolve(search))[-1].digest != opened.checkpoint.digest:
        context.report.note(f"{search} is a search of another checkpoint than {opened.name}")
    candidates = _candidates(opened, section, context, search, by_latency=max_latency_ms is not None)
    if candidates is None:
        context.report.note(f"{opened.name}: would choose on held-out images, then export")
        return None
    if max_latency_ms is not None:
        return _quickest(opened, section, context, candidates, max_latency_ms)
    job = _job(opened, section, context, candidates, again=again)
    return job if job is None or isinstance(job, Artifact) else job.commit(job.files())


def _check(section: ExportSettings, search: str | None, max_latency_ms: float | None) -> None:
    """Refuse more than one way to say what is exported.

    Raises:
        UsageError: naming two.
    """
    several = section.instances != ("all",) or None
    ways = {
        "an instance": section.instance,
        "--max-macs": section.max_macs,
        "--max-latency-ms": max_latency_ms,
        "--from-search": search,
        "--instances": several,
    }
    if len(given := [way for way, value in ways.items() if value is not None]) > 1:
        raise UsageError(f"{given[0]} and {given[1]} exclude each other; give one")
    if max_latency_ms is not None and not max_latency_ms > 0:
        raise UsageError(f"--max-latency-ms {max_latency_ms:g}: give milliseconds above 0")
    if max_latency_ms is not None and not FORMATS.find(section.format).latency:
        timed = ", ".join(name for name, form in FORMATS.items() if form.latency)
        raise UsageError(
            f"--max-latency-ms: the latency of the format {section.format} is not measured; leave the option out, or choose "
            f"one of the formats {timed}"
        )


def export_files(artifact: Artifact, context: Context) -> dict[str, bytes]:
    """Return the files of an export by name: those of its format, since their names become paths.

    Raises:
        IntegrityError: where a layer is missing, damaged, or has a different title.
    """
    form = document(artifact, context)["format"]
    names = (*FORMATS.find(form).files, CARD)
    if others := sorted(set(artifact.layers) - {*names, EXPORT}):
        raise IntegrityError(
            f"{artifact.digest}: a layer is titled {others[0]!r}, which is not a file of the format {form}; export it again"
        )
    read = reader(context.store, artifact)
    return {name: read(name, artifact.layers[name].size if name in artifact.layers else 0) for name in names}


def _candidates(
    opened: Opened, section: ExportSettings, context: Context, search: str | None, *, by_latency: bool
) -> list[Instance] | None:
    """Return the instances to export, or, where the latency decides, to try; None on a dry run that cannot know."""
    points = opened.recipe.model.points
    if FORMATS.find(section.format).several:
        if search is not None:
            return named(found_instances(search, context), points)
        if section.instances[0] not in SEVERAL:
            return named(section.instances, points)
        everything = calibrated(opened, context)
        return everything if section.instances == ("all",) else front(opened, context, everything)
    if by_latency:
        return front(opened, context, calibrated(opened, context))
    if section.max_macs is not None:
        best = front(opened, context, within(opened, calibrated(opened, context), Budget.parse(section.max_macs)))
        return None if best is None else best[-1:]
    text = found_instances(search, context)[0] if search is not None else section.instance
    return named([text or "full"], points)


def _quickest(
    opened: Opened, section: ExportSettings, context: Context, candidates: Sequence[Instance], limit: float
) -> Artifact | None:
    """Export the most accurate of Pareto-optimal candidates that is as quick as the limit asks, the dearer being the slower.

    Raises:
        BudgetError: where none is.
    """
    from sdpctl.export.check import latency

    if context.dry_run:
        context.report.note(f"{opened.name}: would measure {counted(candidates)} until one is quick enough, and export it")
        return None
    form = FORMATS.find(section.format).implementation()
    best: tuple[_Job, dict[str, bytes]] | None = None
    times: dict[Instance, float] = {}
    low, high = 0, len(candidates)
    while low < high:  # candidates before `low` are quick enough, those from `high` on are not
        middle = (low + high) // 2
        instance = candidates[middle]
        job = _job(opened, section, context, [instance], again=True)
        if not isinstance(job, _Job):
            return None
        files = job.files()
        times[instance] = latency(form.one_call(files, job.given(job.data.examples(1))))
        context.report.note(f"{instance}: {times[instance]:.3g} ms an image in {section.format}, at most {limit:g} are wanted")
        context.workspace.log(job.tag, event="latency", milliseconds=times[instance])
        if times[instance] <= limit:
            best, low = (job, files), middle + 1
        else:
            high = middle
    if best is None:
        least = min(times, key=lambda instance: times[instance])
        raise BudgetError(f"--max-latency-ms {limit:g}: no instance is that quick here; {least} takes {times[least]:.3g} ms")
    job, files = best
    return job.commit(files)


def _job(
    opened: Opened, section: ExportSettings, context: Context, instances: Sequence[Instance], *, again: bool
) -> "_Job | Artifact | None":
    """Return what there is to write; the export itself where the store has it, unless asked `again`; None on a dry run."""
    texts = [str(instance) for instance in instances]
    tag = f"{opened.name}.export.{section.format}.{_digits(texts, raw=section.raw_input)}"
    statistics = statistics_for(opened, context, instances)
    if statistics is not None:
        identity = opened.recipe.identity()
        parts = {part: identity[part] for part in ("seed", "data", "evaluate")}
        form = {"format": section.format, "instances": texts, "raw_input": section.raw_input}
        key = stage_key("export", statistics=statistics.digest, name=opened.name, recipe=parts, export=form)
        if not again and (found := context.known(key, tag)) is not None:
            return found
        opened = replace(opened, statistics=statistics)
        chosen = FORMATS.find(section.format).several and opened.recipe.data.holdout > 0
        description = describe(opened, context, instances, chosen=chosen, raw=section.raw_input)
        if description is not None and not context.dry_run:
            context.prepare()
            return _Job(context.fingerprinted(opened), section, context, statistics, description, key, tag)
    context.report.note(f"{tag}: would export {', '.join(texts)}")
    return None


def _digits(texts: Sequence[str], *, raw: bool) -> str:
    """Return the twelve hex digits that an export is tagged by."""
    return hashlib.sha256(("+".join(texts) + (" raw" if raw else "")).encode()).hexdigest()[:12]


def describe(
    opened: Opened, context: Context, instances: Sequence[Instance], *, chosen: bool, raw: bool = False
) -> Description | None:
    """Describe instances of a checkpoint, evaluating those that were not.

    Args:
        opened: the statistics.
        context: where, and who is told.
        instances: which.
        chosen: whether one will be chosen among them when they run, which takes their accuracy on held-out images.
        raw: whether uint8 pixels come in.

    Returns:
        The description; None on a dry run that would have evaluated.

    Raises:
        IntegrityError: where the evaluation is not one of this network.
    """
    nothing: dict[str, Any] = {"images": 0, "rows": []}
    test = evaluated(opened, context, instances)
    heldout = evaluated(opened, context, instances, "holdout") if chosen else nothing
    if test is None or heldout is None or opened.statistics is None:
        return None
    recipe = opened.recipe
    data, model = recipe.data, recipe.complete()["model"]
    mean, std = data.normalisation(recipe.model.in_channels)
    rows = {row["instance"]: row for row in test["rows"]}
    heldout_top1 = {row["instance"]: row["top1"] for row in heldout["rows"]}
    full = profile_model(recipe.model, data.image_size, [FULL])[FULL].macs
    options = (
        Option(
            instance=instance,
            **{key: rows[str(instance)].get(key) for key in ("macs", "params", "relative", "top1", "top5", "loss")},
            heldout_top1=heldout_top1.get(str(instance)),
        )
        for instance in instances
    )
    description = Description(
        name=opened.name,
        network=ModelSettings(**model),
        input=Input(
            size=data.image_size,
            resize=data.test_side,
            mean=mean,
            std=std,
            raw=raw,
            interpolation=data.resampling,
        ),
        classes=tuple(test["classes"]),
        options=tuple(sorted(options, key=lambda option: option.macs)),
        full_macs=full,
        checkpoint=opened.checkpoint.digest,
        statistics=opened.statistics.digest,
        test_images=test["images"],
        heldout_images=heldout["images"],
    )
    try:
        return description.check()
    except ValueError as error:
        raise IntegrityError(f"{opened.name}: its evaluation does not fit its network ({error}); evaluate it again") from error


@dataclass(frozen=True)
class _Job:
    """An export to be written."""

    opened: Opened
    section: ExportSettings
    context: Context
    artifact: Artifact
    description: Description
    key: str
    tag: str

    @cached_property
    def model(self) -> "Chain":
        """The network, on the CPU: a GPU rounds elsewhere."""
        return read_model(self.context.store, self.opened.checkpoint, self.opened.recipe.model).eval()

    @cached_property
    def statistics(self) -> "Statistics":
        """Those of the instances, and no others."""
        from sdpctl.export.bundle import only_needed

        return only_needed(read_statistics(self.context.store, self.artifact, self.model), self.model, self.description)

    @cached_property
    def data(self) -> "ImageData":
        """Where the real images come from."""
        import torch

        from sdpctl.pipeline.inputs import open_data

        return open_data(self.opened.recipe, torch.device("cpu"), self.context)

    @cached_property
    def normalise(self) -> "Normalise":
        """What is done to pixels."""
        import torch

        from sdpctl.data.loader import Normalise

        return Normalise(self.description.input.mean, self.description.input.std, torch.device("cpu"))

    def given(self, pixels_NCHW: "Tensor") -> Any:
        """Return uint8 images as the export takes them, as an array, (N, C, H, W)."""
        return (pixels_NCHW if self.section.raw_input else self.normalise(pixels_NCHW).contiguous()).numpy()

    def card(self) -> str:
        """Return the model card."""
        from sdpctl.export.card import card, code

        store, checkpoint = self.context.store, self.opened.checkpoint
        origin = "It was trained by the recipe below."
        if IMPORTED in checkpoint.layers:
            source = read_origin(store, checkpoint)
            # The name of torchvision's files holds their hash.
            digest = f" (sha256 {code(source['sha256'])})" if "sha256" in source else ""
            origin = f"Its weights were imported from {code(source['from'])}{digest}."
        section = recipe_of(self.artifact, self.context).calibrate
        gathered = "the others'" if section.keep == "full" else "each instance's"
        origin += f" BatchNorm statistics: {gathered} were gathered by themselves on training images"
        origin += ", `full` keeps those it came with." if section.keep == "full" else "."
        recipe = self.opened.recipe.changed(calibrate=section)
        return card(self.description, self.section.format, dump_yaml(recipe.identity()), origin)

    def files(self) -> dict[str, bytes]:
        """Return the content of the export's files by name."""
        from sdpctl.export.format import Source

        source = Source(
            model=self.model,
            statistics=self.statistics,
            description=self.description,
            weights=lambda: self.context.store.read(self.opened.checkpoint, MODEL),
            card=self.card(),
        )
        return FORMATS.find(self.section.format).implementation().write(source)

    def logits(self, x_NCHW: "Tensor") -> "Tensor":
        """Return what evaluation sees, (I, N, K)."""
        import torch

        from sdpctl.engine.calibrate import CalibratedNorms
        from sdpctl.engine.tree import Tree

        tree, norms = (
            Tree(self.model, self.statistics.instances, memory=self.opened.recipe.memory),
            CalibratedNorms(self.model, self.statistics),
        )
        with torch.inference_mode():
            parts = [torch.stack(list(tree.walk(chunk, norms).values())) for chunk in torch.split(x_NCHW, 32)]
        return torch.cat(parts, dim=1)

    def commit(self, files: dict[str, bytes]) -> Artifact:
        """Run files outside on real images, and keep them where they do what they should.

        Raises:
            IntegrityError: where they do not.
        """
        from sdpctl.export.check import compare

        form = FORMATS.find(self.section.format)
        pixels = self.data.examples(IMAGES_OF_SEVERAL if form.several else IMAGES)
        logits = form.implementation().run(files, self.given(pixels))
        agreement = compare(self.logits(self.normalise(pixels)).numpy(), logits)
        self.context.workspace.log(
            self.tag, event="checked", images=agreement.images, difference=agreement.difference, top1_agreement=agreement.top1
        )
        agreement.require(self.tag)
        described = json.dumps(self.description.document() | {"format": self.section.format}, sort_keys=True).encode()
        artifact = self.context.store.commit(
            "export", files | {EXPORT: described}, subject=self.artifact, key=self.key, tag=self.tag
        )
        self.context.report.note(
            f"{self.tag}: run outside on {agreement.images} real images, the logits differ by at most "
            f"{agreement.difference:.2g} (the largest is {agreement.scale:.3g}) and {agreement.top1:.2f} % of the classes agree"
        )
        return artifact
