"""Calibration: gather the BatchNorm statistics of instances, or find them in the store."""

import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from sdpctl.errors import NotFoundError
from sdpctl.instance import Instance
from sdpctl.kinds import BN_STATISTICS, RECIPE
from sdpctl.models import empty_model
from sdpctl.recipe.schema import Recipe
from sdpctl.stages.context import Context
from sdpctl.stages.layers import calibrated_instances, read_document, statistics_layers
from sdpctl.stages.network import TrainedNetwork, counted, grid, named, recipe_layer, recipe_of
from sdpctl.stages.opening import open_network, timed
from sdpctl.stages.shared import Finetuning, SharedNetwork
from sdpctl.stages.stage import Job, Made, Stage, Steps, key_of
from sdpctl.store import Artifact

if TYPE_CHECKING:
    from sdpctl.engine.finetune import Tuned

NOTHING_TO_CALIBRATE = "the network has no batch norms, so its instances need no calibration"


def needs_calibration(recipe: Recipe) -> bool:
    """Return whether the network of a recipe has batch norms."""
    return bool(empty_model(recipe.model).batch_norms)


class Calibrate(Stage):
    """Gather the BatchNorm statistics of instances in one pass over training images.

    The statistics of a network without batch norms are empty, and no image is read for them.

    Args:
        network: a trained network.
        instances: the instances to calibrate; the SDPoint grid by default.

    Raises:
        DataError: if the data is missing, does not match its fingerprint, or fills less than one batch.
    """

    kind = BN_STATISTICS

    def __init__(self, network: TrainedNetwork, instances: Sequence[Instance] | None = None) -> None:
        self.network = network
        self.grid = grid(network.recipe)
        self.instances = self.grid if instances is None else list(instances)

    @property
    def tag(self) -> str:
        """`NAME.bn`."""
        return f"{self.network.name}.bn"

    def steps(self, context: Context) -> Steps:
        """Ask for the checkpoint."""
        checkpoint = yield self.network.checkpoint
        return self.job(self.network.with_known_data(context), checkpoint, context)

    def job(self, network: TrainedNetwork, checkpoint: Artifact, context: Context) -> Job:
        """Return the job that gathers the statistics; tell the user which instances will not be fine-tuned."""
        section = network.recipe.calibrate.finetune
        listed = () if section is None else named(section.instances, network.recipe.model.points)
        if left_out := [instance for instance in listed if instance not in self.instances]:
            context.note_once(
                f"{self.tag}: calibrate.finetune lists {counted(left_out)} outside this calibration; no fine-tuning of "
                f"{', '.join(map(str, left_out))}"
            )
        return Job(
            key=self.key_for(network, checkpoint, self.instances),
            make=lambda: self._gather(network, checkpoint, context),
            subject=checkpoint,
            complete=self.instances == self.grid,
        )

    def key_for(self, network: TrainedNetwork, checkpoint: Artifact, instances: Sequence[Instance]) -> str:
        """Return the key of the statistics of some instances."""
        parts = network.resolved.parts("seed", "data", "calibrate")
        return key_of(self.kind, checkpoint=checkpoint.digest, recipe=parts, instances=[str(i) for i in instances])

    def task(self, context: Context) -> str:
        """Return the number of instances to calibrate and the number of images to use."""
        if not needs_calibration(self.network.recipe) and not self._finetuned(self.network.recipe):
            return f"{NOTHING_TO_CALIBRATE}: no image is read"
        recipe = self.network.with_data(context).recipe
        images = recipe.calibrate.batches * recipe.preparation.batch_size
        finetuned = self._finetuned(recipe)
        first = f"fine-tune {counted(finetuned)}, then " if finetuned else ""
        return f"{first}calibrate {counted(self.instances)} on at most {images:,} images"

    def _gather(self, network: TrainedNetwork, checkpoint: Artifact, context: Context) -> Made:
        from sdpctl.engine.calibrate import uncalibrated

        finetunes = self._finetuned(network.recipe)
        if not needs_calibration(network.recipe) and not finetunes:
            layers = statistics_layers(uncalibrated(self.instances)) | {RECIPE: recipe_layer(network.resolved)}
            return Made(layers, NOTHING_TO_CALIBRATE)
        network = network.with_data(context)
        recipe = network.recipe
        shared = open_network(checkpoint, recipe, context, images=recipe.preparation.batch_size)
        total = shared.data.calibration_batches(recipe.calibrate.batches, recipe.preparation)
        watch = partial(
            timed,
            total=-(-total // context.ranks.size),
            text=f"calibrating {counted(self.instances)}",
            tag=self.tag,
            context=context,
            images=total * recipe.preparation.batch_size,
        )
        tuned = self._finetune(shared, recipe, context) if finetunes else None
        statistics = shared.calibrate(self.instances, total, recipe.preparation, recipe.calibration, watch, tuned)
        layers = statistics_layers(statistics) | {RECIPE: recipe_layer(network.resolved)}
        return Made(layers, f"{counted(self.instances)} on {statistics.images:,} images")

    def _finetuned(self, recipe: Recipe) -> list[Instance]:
        """Return the instances to fine-tune: those of the recipe that will be calibrated."""
        section = recipe.calibrate.finetune
        texts = () if section is None else section.instances
        return [instance for instance in named(texts, recipe.model.points) if instance in self.instances]

    def _finetune(self, shared: SharedNetwork, recipe: Recipe, context: Context) -> "Tuned":
        """Fine-tune instances, and tell the user how long it took."""
        settings, instances = recipe.calibrate.finetune, self._finetuned(recipe)
        assert settings is not None
        images = settings.steps * recipe.preparation.batch_size
        finetuning = Finetuning(
            instances=tuple(map(str, instances)),
            settings=settings,
            preparation=recipe.preparation,
            precision=recipe.calibrate.precision,
        )
        watch = partial(
            timed, total=settings.steps, text="fine-tuning an instance", tag=self.tag, context=context, images=images
        )
        began = time.monotonic()
        tuned = shared.finetune([*self.grid, *self.instances], finetuning, watch)
        context.report.note(
            f"{self.tag}: {counted(instances)} fine-tuned in {settings.steps:,} steps on {images:,} images each, in "
            f"{time.monotonic() - began:.1f} s"
        )
        return tuned


def calibration_notes(evaluation: Artifact, context: Context) -> list[str]:
    """Return a note for the table of an evaluation if its statistics are empty, since the network has no batch norms."""
    _, statistics, *_ = context.lineage(evaluation)
    return [] if read_document(context.store, statistics)["nodes"] else [NOTHING_TO_CALIBRATE]


class Statistics(Calibrate):
    """Find stored statistics that cover the instances, and gather new ones only if there are none.

    The order is: the statistics that the user named; those of `NAME.bn`, if they belong to this checkpoint and this data; those
    of the whole grid.

    Args:
        network: a trained network.
        instances: the instances to cover; by default those of the first statistics that are found, or the SDPoint grid.
        calibrates: whether missing statistics may be gathered; a network without batch norms needs none.

    Raises:
        NotFoundError: if no statistics are found and none may be gathered.
    """

    def __init__(
        self, network: TrainedNetwork, instances: Sequence[Instance] | None = None, *, calibrates: bool = True
    ) -> None:
        super().__init__(network, instances)
        self.required = [] if instances is None else self.instances
        self.calibrates = calibrates

    def steps(self, context: Context) -> Steps:
        """Ask for the checkpoint; return stored statistics that cover the instances, or the job that gathers them."""
        checkpoint = yield self.network.checkpoint
        network = self.network.with_known_data(context)
        if (found := self._sufficient(network, checkpoint, context)) is not None:
            return found
        if not self.calibrates and needs_calibration(network.recipe):
            lacking = ", ".join(map(str, self.instances)) if len(self.instances) < 4 else counted(self.instances)
            raise NotFoundError(
                f"{network.name}: no BatchNorm statistics of {lacking}; leave --no-calibrate out, or run "
                "`sdpctl calibrate-bn` first"
            )
        return self.job(network, checkpoint, context)

    def _sufficient(self, network: TrainedNetwork, checkpoint: Artifact, context: Context) -> Artifact | None:
        for statistics in (network.statistics, self._tagged(network, checkpoint, context)):
            if statistics is not None and set(self.required) <= set(calibrated_instances(context.store, statistics)):
                return statistics
        if set(self.instances) <= set(self.grid):
            return context.by_key(self.key_for(network, checkpoint, self.grid))
        return None

    def _tagged(self, network: TrainedNetwork, checkpoint: Artifact, context: Context) -> Artifact | None:
        """Return the statistics of `NAME.bn` if they belong to this checkpoint and to the same data with the same settings."""
        tagged = context.tagged(self.tag)
        if tagged is None or tagged.kind != self.kind.name or tagged.subject is None or "calibrate" in network.overridden:
            return None
        same_data = recipe_of(tagged, context).identity()["data"] == network.resolved.identity()["data"]
        return tagged if same_data and tagged.subject.digest == checkpoint.digest else None
