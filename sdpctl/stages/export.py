"""Export: write a checkpoint's instances as files for other programs, and run these files as a check before keeping them."""

import hashlib
import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from sdpctl.budget import Budget
from sdpctl.cascade import Cascade
from sdpctl.errors import BudgetError, IntegrityError, NotFoundError, RecipeError, UsageError
from sdpctl.export.catalog import CARD, FORMATS
from sdpctl.export.description import Description, most_accurate
from sdpctl.export.precision import OWN, Accuracies, runtime_name
from sdpctl.export.settings import SEVERAL, ExportSettings
from sdpctl.instance import Instance
from sdpctl.kinds import CASCADE, EXPORT, EXPORTED, IMPORTED, MODEL
from sdpctl.recipe.load import dump_yaml
from sdpctl.stages.calibrate import Statistics
from sdpctl.stages.cascade import ChooseCascade
from sdpctl.stages.choosing import Choice, calibrated, pareto_front, within
from sdpctl.stages.context import Context
from sdpctl.stages.describing import chosen_cascade_options, describe, fitting_cascades, scored_alike_by, statistics_of
from sdpctl.stages.layers import read_document, read_model, read_origin, read_statistics, reader
from sdpctl.stages.network import TrainedNetwork, counted, named, recipe_of
from sdpctl.stages.opening import open_data, timed
from sdpctl.stages.optional import OptionalStage
from sdpctl.stages.search import Search, found_instances
from sdpctl.stages.stage import Job, Made, Stage, Steps, key_of
from sdpctl.store import Artifact

if TYPE_CHECKING:
    from torch import Tensor

    from sdpctl.data.loader import ImageData, Normalise
    from sdpctl.engine.calibrate import Statistics as Gathered
    from sdpctl.export.format import Images, Logits
    from sdpctl.models.chain import Chain

IMAGES, IMAGES_OF_SEVERAL = 256, 32
"""Number of real images for the check of an export of one instance; and of each instance of an export of several."""

BATCH = 512
"""Number of images that the files in a lower precision are given at once; a second runtime is started for each batch."""


class Export(OptionalStage):
    """Export one instance, a cascade, or several instances together, and run the files in a separate process on real images.

    An export of several instances includes every chosen cascade whose members it contains.

    The tags of the artifacts that the export is made from do not move.

    Args:
        network: a trained network, perhaps with statistics; its recipe's section `export` says what to write.
        search: reference of a search, or the stage that makes it; its best instance is exported, and in an export of several
            also its Pareto front and `full`.
        cascade: reference of a choice of cascades, or the stage that makes it; `NAME.cascade` by default.
        max_latency_ms: export the most accurate instance whose latency in milliseconds per image, measured on this machine with
            the format's own runtime, is at most this number.
        calibrates: whether missing statistics may be gathered.

    Raises:
        BudgetError: if no instance is within the budget; the message names the cheapest or fastest one.
        DataError: if the data is missing, or does not match its fingerprint.
        IntegrityError: if the exported files do not give the same results as the network; the export is not kept.
        NotFoundError: if an instance has no statistics and none may be gathered.
        UsageError: if several ways to choose instances are given.
    """

    kind = EXPORTED

    def __init__(
        self,
        network: TrainedNetwork,
        *,
        search: str | Stage | None = None,
        cascade: str | Stage | None = None,
        max_latency_ms: float | None = None,
        calibrates: bool = True,
    ) -> None:
        self.section = network.recipe.export or ExportSettings()
        # The artifacts that the export needs do not depend on the section `export`, so they do not record it.
        self.network = network.changed(export=None)
        self.search = f"{network.name}.search" if self.section.from_search and search is None else search
        self.cascade = cascade
        self.max_latency_ms = max_latency_ms
        self.calibrates = calibrates
        self.format = FORMATS.find(self.section.format)
        self.instances: list[Instance] | None = None
        self.exported: Cascade | None = None
        self._check()

    @classmethod
    def of(cls, network: TrainedNetwork) -> "Export":
        """Return the export with the settings of a network's recipe.

        Raises:
            RecipeError: if the format holds a cascade, and the recipe has no section `cascade`.
        """
        section = network.recipe.export or ExportSettings()
        form = FORMATS.find(section.format)
        if form.holds_cascade and network.recipe.cascade is None:
            raise RecipeError(
                [f"export.format: {form.name} exports a chosen cascade, and this recipe chooses none; add a section cascade"]
            )
        chooses = network.recipe.cascade is not None and form.takes_cascades
        return cls(
            network,
            search=Search.of(network) if section.from_search else None,
            cascade=ChooseCascade.of(network) if chooses else None,
        )

    @property
    def tag(self) -> str:
        """`NAME.export.FORMAT.` and twelve hex digits for what is exported; without the digits before it is chosen.

        A precision other than float32 follows the format: `NAME.export.onnx-int8.`.
        """
        precision = "" if self.section.precision == "fp32" else f"-{self.section.precision}"
        prefix = f"{self.network.name}.export.{self.format.name}{precision}"
        if self.instances is None:
            return prefix
        chosen = self.instances if self.exported is None else [self.exported]
        return f"{prefix}.{_digits(chosen, raw=self.section.raw_input, opset=self.section.opset)}"

    def _check(self) -> None:
        """Refuse more than one way to choose instances, and a latency limit that is not positive or cannot be measured.

        Raises:
            UsageError: if there are several ways, of which the message names two; or if the latency limit cannot be used.
        """
        if self.format.holds_cascade and self.search is not None:
            raise UsageError(
                f"--from-search: the format {self.format.name} holds a cascade, which `sdpctl search --cascade` chooses; leave "
                "this option out"
            )
        ways = {
            "an instance": self.section.instance,
            "--max-macs": self.section.max_macs,
            "--max-latency-ms": self.max_latency_ms,
            "--from-search": self.search,
            "--instances": self.section.instances if self.section.instances != ("all",) else None,
        }
        if len(given := [way for way, value in ways.items() if value is not None]) > 1:
            raise UsageError(f"{given[0]} and {given[1]} exclude each other; give one")
        if self.max_latency_ms is not None and not self.max_latency_ms > 0:
            raise UsageError(f"--max-latency-ms {self.max_latency_ms:g}: give milliseconds above 0")
        if self.max_latency_ms is not None and not self.format.latency:
            timed = ", ".join(name for name, form in FORMATS.items() if form.latency)
            raise UsageError(
                f"--max-latency-ms: the latency of the format {self.format.name} is not measured; leave the option out, or "
                f"choose one of the formats {timed}"
            )

    def steps(self, context: Context) -> Steps:
        """Ask for the checkpoint, for what the choice of instances needs, and for the evaluations of the chosen instances."""
        checkpoint = yield self.network.checkpoint
        network = self.network.with_known_data(context)
        search: Artifact | None = None
        if self.search is not None:
            search = (yield self.search) if isinstance(self.search, Stage) else context.store.resolve(self.search)
            if context.lineage(search)[-1].digest != checkpoint.digest:
                context.report.note(f"{self._searched} is a search of a different checkpoint than that of {network.name}")
        choice = yield from self._choice(context)
        if self.format.holds_cascade:
            files = yield from self._cascade_files(network, checkpoint, choice, context)
            self.instances = files.instances
            return Job(key=self._key(network, files), make=files.check, subject=files.statistics_of)
        chosen = yield from self._candidates(network, search, context)
        if self.max_latency_ms is not None:
            if context.dry_run:
                return None
            files = yield from self._quickest(network, checkpoint, chosen, self.max_latency_ms, context)
        else:
            self.instances = list(chosen)
            files = yield from self._files(network, checkpoint, chosen, context, choice)
        self.instances = files.instances
        return Job(key=self._key(network, files), make=files.check, subject=files.statistics_of)

    def task(self, context: Context) -> str:  # noqa: ARG002
        """Return which instances would be exported, and how they are chosen."""
        section, held_out = self.section, "the most accurate instance on held-out images"
        if self.format.holds_cascade:
            what = f"the cascade of {self._chosen_by}"
            if section.max_macs is not None:
                what = f"the most accurate cascade of {self._chosen_by} within {section.max_macs}"
        elif self.max_latency_ms is not None:
            what = f"{held_out} that takes at most {self.max_latency_ms:g} ms"
        elif self.search is not None:
            what = f"what {self._searched} found"
        elif section.max_macs is not None:
            what = f"{held_out} within {section.max_macs}"
        elif self.format.several:
            words = {"all": "every calibrated instance", "pareto": "the best instances on held-out images"}
            what = words.get(section.instances[0], ", ".join(section.instances))
        else:
            what = section.instance or "full"
        if self.exported is not None:
            what += f" ({self.exported})"
        elif self.instances is not None and (texts := ", ".join(map(str, self.instances))) != what:
            what += f" ({texts if len(self.instances) < 4 else counted(self.instances)})"
        checked = f"checked on at most {self.checked_on} images"
        if section.check is not None:
            checked += f", in {runtime_name(section.check)} too"
        if section.precision != "fp32":
            checked += f"; in {section.precision}, which may lose {section.max_drop:g} points on the test images"
        return f"export {what} as {self.format.name}, {checked}"

    @property
    def _searched(self) -> str:
        return self.search.tag if isinstance(self.search, Stage) else str(self.search)

    @property
    def _chosen_by(self) -> str:
        return self.cascade.tag if isinstance(self.cascade, Stage) else self.cascade or f"{self.network.name}.cascade"

    @property
    def checked_on(self) -> int:
        """Number of real images for the check of the files."""
        return IMAGES_OF_SEVERAL if self.format.several else IMAGES

    def _key(self, network: TrainedNetwork, files: "_Files") -> str:
        section = self.section
        texts = [str(instance) for instance in files.instances]
        form: dict[str, Any] = {"format": section.format, "instances": texts, "raw_input": section.raw_input}
        if files.choice is not None and files.description.cascades:
            cascades = [str(option.cascade) for option in files.description.cascades]
            form |= {"cascades": cascades, "choice": files.choice.digest}
        if section.precision != "fp32":
            form |= {"precision": section.precision, "max_drop": section.max_drop}
        if section.precision == "int8":
            form |= {"calibration_images": section.calibration_images}
        form |= {key: value for key in ("opset", "check") if (value := getattr(section, key)) is not None}
        parts = network.resolved.parts("seed", "data", "evaluate")
        return key_of(self.kind, statistics=files.statistics_of.digest, name=network.name, recipe=parts, export=form)

    def _candidates(self, network: TrainedNetwork, search: Artifact | None, context: Context) -> Choice:
        """Choose the instances to export, or, if there is a latency limit, the instances to measure."""
        section, points = self.section, network.recipe.model.points
        front = partial(pareto_front, network, context, calibrates=self.calibrates)
        if self.format.several:
            if search is not None:
                return found_instances(search, context, points)
            if section.instances[0] not in SEVERAL:
                return named(section.instances, points)
            if section.instances == ("all",):
                return (yield from calibrated(network, context, calibrates=self.calibrates))
            return (yield from front())
        if self.max_latency_ms is not None:
            return (yield from front())
        if section.max_macs is not None:
            known = yield from calibrated(network, context, calibrates=self.calibrates)
            best = yield from front(within(network, known, Budget.parse(section.max_macs)))
            return best[-1:]
        if search is not None:
            return found_instances(search, context, points)[:1]
        return named([section.instance or "full"], points)

    def _choice(self, context: Context) -> Generator[Stage, Artifact, Artifact | None]:
        """Ask for the choice of cascades; None if there is none, or the format takes no cascades."""
        if not self.format.takes_cascades:
            return None
        if isinstance(self.cascade, Stage):
            return (yield self.cascade)
        return context.tagged(self._chosen_by) if self.cascade is None else context.store.resolve(self.cascade)

    def _files(
        self,
        network: TrainedNetwork,
        checkpoint: Artifact,
        instances: Sequence[Instance],
        context: Context,
        choice: Artifact | None = None,
    ) -> "Generator[Stage, Artifact, _Files]":
        """Ask for statistics and evaluations of some instances, and return their files, which are not written yet.

        The files have the cascade that is exported, or those cascades of a choice that fit.
        """
        statistics = yield Statistics(network, instances, calibrates=self.calibrates)
        chosen = self.format.several and network.recipe.data.holdout > 0
        if choice is not None and self.exported is not None:
            cascades = [option for option in chosen_cascade_options(choice, context) if option.cascade == self.exported]
        else:
            cascades = fitting_cascades(network, statistics, instances, choice, context)
        described = yield from describe(
            network, checkpoint, statistics, instances, context, chosen=chosen, raw=self.section.raw_input, cascades=cascades
        )
        return _Files(self, network, checkpoint, statistics, described, list(instances), context, choice)

    def _cascade_files(
        self, network: TrainedNetwork, checkpoint: Artifact, choice: Artifact | None, context: Context
    ) -> "Generator[Stage, Artifact, _Files]":
        """Return the files of the best cascade of a choice, or of its most accurate cascade within the budget.

        Raises:
            BudgetError: if no cascade is within the budget; the message names the cheapest.
            NotFoundError: if there is no choice of cascades of this checkpoint.
            UsageError: if the choice was scored in a different way.
        """
        again = f"`sdpctl search {network.name} --cascade --max-macs 50%` makes one"
        if choice is None:
            raise NotFoundError(f"there is no artifact {self._chosen_by}; {again}")
        if choice.kind != CASCADE.name:
            raise NotFoundError(f"{self._chosen_by} is of kind {choice.kind}, not a choice of cascades; {again}")
        if context.lineage(choice)[-1].digest != checkpoint.digest:
            raise NotFoundError(f"{self._chosen_by} belongs to a different checkpoint than that of {network.name}; {again}")
        if "calibrate" in network.overridden or not scored_alike_by(choice, network, context):
            raise UsageError(
                f"{self._chosen_by} was chosen with different settings of data, calibrate or evaluate; give the same --set, "
                "or choose again by `sdpctl search --cascade`"
            )
        options = chosen_cascade_options(choice, context)
        document = read_document(context.store, choice)
        if self.section.max_macs is not None:
            budget = Budget.parse(self.section.max_macs)
            self.exported = most_accurate(options, budget.macs(document["full"]["macs"])).cascade
        else:
            self.exported = Cascade.parse(document["best"]["cascade"])
        network = network.with_statistics(statistics_of(choice, context))
        return (yield from self._files(network, checkpoint, self.exported.members, context, choice))

    def _quickest(
        self,
        network: TrainedNetwork,
        checkpoint: Artifact,
        candidates: Sequence[Instance],
        limit: float,
        context: Context,
    ) -> "Generator[Stage, Artifact, _Files]":
        """Find the most accurate of some Pareto-optimal instances whose latency is within a limit, and return its files.

        The search is a bisection; it assumes that a more accurate instance is slower.

        Raises:
            BudgetError: if every instance takes longer.
        """
        from sdpctl.export.check import latency
        from sdpctl.export.format import format_of

        best: _Files | None = None
        times: dict[Instance, float] = {}
        low, high = 0, len(candidates)
        while low < high:  # candidates before `low` are fast enough, those from `high` on are not
            middle = (low + high) // 2
            instance = candidates[middle]
            files = yield from self._files(network, checkpoint, [instance], context)
            call = format_of(self.format.name).one_call(files.content, files.given(files.data.examples(1)))
            times[instance] = latency(call)
            context.report.note(
                f"{instance}: {times[instance]:.3g} ms per image in {self.format.name}; the limit is {limit:g} ms"
            )
            context.workspace.log(self.tag, event="latency", instance=str(instance), milliseconds=times[instance])
            if times[instance] <= limit:
                best, low = files, middle + 1
            else:
                high = middle
        if best is None:
            least = min(times, key=lambda instance: times[instance])
            raise BudgetError(
                f"--max-latency-ms {limit:g}: no instance is that fast on this machine; {least} takes {times[least]:.3g} ms"
            )
        return best


def _digits(chosen: Sequence[Instance | Cascade], *, raw: bool, opset: int | None) -> str:
    """Return twelve hex digits that identify an export's instances or cascade, its input and its operators in its tag."""
    text = "+".join(map(str, chosen)) + " raw" * raw + ("" if opset is None else f" opset {opset}")
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def export_files(artifact: Artifact, context: Context) -> dict[str, bytes]:
    """Return the files of an export by name. Only names of the format's files are accepted, since the names become paths.

    Raises:
        IntegrityError: if a layer is missing or damaged, or its title is not a file of the format.
    """
    described = read_document(context.store, artifact)
    form = described["format"]
    info = FORMATS.find(form)
    if info.holds_cascade:
        graphs = sum(len(cascade["member_macs"]) for cascade in described.get("cascades") or ())
    else:  # cascades share graphs
        graphs = max(len(described["options"]), len(artifact.layers) - len({*info.files, CARD, EXPORT}))
    names = (*info.names(graphs), CARD)
    if others := sorted(set(artifact.layers) - {*names, EXPORT}):
        raise IntegrityError(
            f"{artifact.digest}: a layer is titled {others[0]!r}, which is not a file of the format {form}; export it again"
        )
    read = reader(context.store, artifact)
    return {name: read(name, artifact.layers[name].size if name in artifact.layers else 0) for name in names}


@dataclass(frozen=True)
class _Files:
    """The files of one export; they are computed when they are first used."""

    export: Export
    network: TrainedNetwork
    checkpoint: Artifact
    statistics_of: Artifact
    description: Description
    instances: list[Instance]
    context: Context
    choice: Artifact | None

    @cached_property
    def model(self) -> "Chain":
        """The network, on the CPU, since a GPU rounds differently."""
        return read_model(self.context.store, self.checkpoint, self.network.recipe.model).eval()

    @cached_property
    def statistics(self) -> "Gathered":
        """The statistics of the exported instances only."""
        from sdpctl.export.bundle import only_needed

        return only_needed(read_statistics(self.context.store, self.statistics_of, self.model), self.model, self.description)

    @cached_property
    def data(self) -> "ImageData":
        """The data set with the real images."""
        import torch

        return open_data(self.network.recipe, torch.device("cpu"), self.context)

    @cached_property
    def normalise(self) -> "Normalise":
        """The normalisation of pixels."""
        import torch

        from sdpctl.data.loader import Normalise

        return Normalise(self.description.input.mean, self.description.input.std, torch.device("cpu"))

    def given(self, pixels_NCHW: "Tensor") -> Any:
        """Convert uint8 images to the input of the export, an array (N, C, H, W)."""
        return (pixels_NCHW if self.export.section.raw_input else self.normalise(pixels_NCHW).contiguous()).numpy()

    def card(self, accuracies: Accuracies | None = None) -> str:
        """Return the model card, with the accuracies in a lower precision."""
        from sdpctl.export.card import card, code

        store, checkpoint = self.context.store, self.checkpoint
        origin = "It was trained by the recipe below."
        if IMPORTED in checkpoint.layers:
            source = read_origin(store, checkpoint)
            # Names of torchvision's files contain their hash.
            digest = f" (sha256 {code(source['sha256'])})" if "sha256" in source else ""
            origin = f"Its weights were imported from {code(source['from'])}{digest}."
        section = recipe_of(self.statistics_of, self.context).calibrate
        gathered = "the others'" if section.keep == "full" else "each instance's"
        origin += f" BatchNorm statistics: {gathered} were gathered by themselves on training images"
        origin += ", `full` keeps those it came with." if section.keep == "full" else "."
        nodes = {node for node, _ in self.statistics.tuned}
        if tuned := [each for each in self.instances if each.among(self.model.points) in nodes]:
            origin += f" Classifier and batch norms of {', '.join(map(str, tuned))} were fine-tuned by themselves."
        recipe = self.network.changed(calibrate=section).resolved.identity()
        settings = self.export.section
        check = settings.check
        return card(self.description, settings.format, dump_yaml(recipe), origin, accuracies=accuracies, check=check)

    @cached_property
    def content(self) -> dict[str, bytes]:
        """The files by name; the card of a lower precision does not have its accuracies yet."""
        from sdpctl.export.format import format_of

        section = self.export.section
        if section.precision == "fp32":
            return self.float32
        return format_of(self.export.format.name).lowered(
            self.float32, section.precision, lambda: self.given(self.data.training_examples(section.calibration_images))
        )

    @cached_property
    def float32(self) -> dict[str, bytes]:
        """The files in float32 by name."""
        from sdpctl.export.format import Source, format_of

        source = Source(
            model=self.model,
            statistics=self.statistics,
            description=self.description,
            weights=lambda: self.context.store.read(self.checkpoint, MODEL),
            card=self.card(),
            opset=self.export.section.opset,
        )
        return format_of(self.export.format.name).write(source)

    def logits(self, x_NCHW: "Tensor") -> "Tensor":
        """Return the network's own logits, computed as in an evaluation, (I, N, K)."""
        import torch

        from sdpctl.engine.calibrate import CalibratedNorms
        from sdpctl.engine.tree import Tree

        tree = Tree(self.model, self.statistics.instances, memory=self.network.recipe.memory)
        norms = CalibratedNorms(self.model, self.statistics)
        with torch.inference_mode():
            parts = [torch.stack(list(tree.walk(chunk, norms).values())) for chunk in torch.split(x_NCHW, 32)]
        return torch.cat(parts, dim=1)

    def answers(self, cascade: Cascade, x_NCHW: "Tensor") -> "tuple[Tensor, Tensor]":
        """Run a cascade.

        Returns:
            Probabilities, (1, N, K), and whether rounding cannot send an image to a different member, (N,).
        """
        import torch

        from sdpctl.engine.calibrate import CalibratedNorms
        from sdpctl.engine.cascade import CascadeRun, settled

        run = CascadeRun(self.model, cascade, CalibratedNorms(self.model, self.statistics))
        with torch.inference_mode():
            probabilities_NK = torch.cat([run(chunk)[0] for chunk in torch.split(x_NCHW, 32)]).exp()
        logits = dict(zip(self.statistics.instances, self.logits(x_NCHW), strict=True))
        return probabilities_NK[None], settled(cascade, [logits[member] for member in cascade.members])

    def check(self) -> Made:
        """Run the files in a separate process on real images, and return them if their results agree with the network's.

        Files in a lower precision are returned if their float32 form agrees, and they lose little accuracy on the test images.

        Raises:
            BudgetError: if a lower precision loses too much accuracy.
            IntegrityError: if the logits, or the probabilities of a cascade, differ too much.
            ResourceError: if a second runtime is not installed.
        """
        from sdpctl.export.format import format_of

        self.network.with_data(self.context)  # raises if the images are no longer those of the statistics
        section, form = self.export.section, format_of(self.export.format.name)
        pixels = self.data.examples(self.export.checked_on)
        summary = self._agree(pixels, form.run(self.float32, self.given(pixels)))
        if self.description.cascades and self.export.format.several and self.export.format.graphs is not None:
            self._cascades_agree(pixels, form.run_cascades(self.content, self.given(pixels)))
        files = self.content
        written: dict[str, Any] = {"format": self.export.format.name}
        if section.precision != "fp32":
            accuracies = self._accuracies().require(self.export.tag)
            self.context.workspace.log(self.export.tag, event="accuracy", **accuracies.document())
            files = form.labelled(files, accuracies) | {CARD: self.card(accuracies).encode()}
            written["precision"], summary = accuracies.document(), f"{accuracies}"
        elif section.check is not None:
            second = self._agree(pixels, form.run_in(section.check, files, self.given(pixels)), runtime_name(section.check))
            summary = f"{summary}; {second}"
        written |= {key: value for key in ("opset", "check") if (value := getattr(section, key)) is not None}
        described = json.dumps(self.description.document() | written, sort_keys=True).encode()
        return Made(files | {EXPORT: described}, summary)

    def _cascades_agree(self, pixels_NCHW: "Tensor", found_CNK: "Logits") -> None:
        """Compare the probabilities of each cascade of the files with the network's.

        Raises:
            IntegrityError: if they differ too much.
        """
        from sdpctl.export.check import compare

        for option, got_NK in zip(self.description.cascades, found_CNK, strict=True):
            wanted, sure_N = self.answers(option.cascade, self.normalise(pixels_NCHW))
            agreement = compare(wanted.numpy(), got_NK[None], sure_N.numpy())
            agreement.require(f"{self.export.tag}: {option.cascade}", "probabilities")

    def _agree(self, pixels_NCHW: "Tensor", found: "Logits", runtime: str = "outside") -> str:
        """Compare results of the files with the network's, and return a sentence about it.

        Raises:
            IntegrityError: if they differ too much.
        """
        from sdpctl.export.check import compare

        tag = self.export.tag
        if self.export.exported is None:
            results = "logits"
            agreement = compare(self.logits(self.normalise(pixels_NCHW)).numpy(), found)
        else:
            results = "probabilities"
            wanted, sure_N = self.answers(self.export.exported, self.normalise(pixels_NCHW))
            agreement = compare(wanted.numpy(), found, sure_N.numpy())
        self.context.workspace.log(
            tag, event="checked", images=agreement.images, difference=agreement.difference, top1_agreement=agreement.top1
        )
        agreement.require(tag, results)
        where = "run outside" if runtime == "outside" else f"run in {runtime}"
        return (
            f"{where} on {agreement.images} real images, the {results} differ by at most {agreement.difference:.2g} (the "
            f"largest is {agreement.scale:.3g}) and {agreement.top1:.2f} % of the classes agree"
        )

    def _accuracies(self) -> Accuracies:
        """Run the files in both precisions on all test images, and count the correct classes."""
        from sdpctl.export.format import format_of

        section, form = self.export.section, format_of(self.export.format.name)
        runs: dict[str, Callable[[Images], Logits]] = {
            "float32": partial(form.run, self.float32),
            OWN: partial(form.run, self.content),
        }
        if section.check is not None:
            runs[section.check] = partial(form.run_in, section.check, self.content)
        hits, images = dict.fromkeys(runs, 0), self.data.test_size
        batches = self.data.test_pixels(BATCH)
        text = f"accuracy in {section.precision}"
        for pixels_NCHW, labels_N in timed(batches, -(-images // BATCH), text, self.export.tag, self.context, images=images):
            given = self.given(pixels_NCHW)
            for name, run in runs.items():
                hits[name] += int((run(given)[0].argmax(-1) == labels_N.numpy()).sum())
        top1 = {name: 100 * count / images for name, count in hits.items()}
        return Accuracies(
            name=section.precision,
            images=images,
            float32_top1=top1.pop("float32"),
            top1=top1,
            max_drop=section.max_drop,
            calibration_images=section.calibration_images if section.precision == "int8" else None,
        )
