"""Evaluation: score instances on the test split, or on held-out images."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from sdpctl.cascade import Cascade
from sdpctl.errors import DataError, UsageError
from sdpctl.instance import FULL, Instance
from sdpctl.kinds import EVALUATION, PREDICTIONS, RECIPE, RESULTS
from sdpctl.recipe.schema import Recipe
from sdpctl.stages.calibrate import Statistics
from sdpctl.stages.context import Context
from sdpctl.stages.layers import calibrated_instances, read_document, read_statistics
from sdpctl.stages.network import TrainedNetwork, counted, grid, recipe_layer, recipe_of
from sdpctl.stages.opening import open_data, open_network, timed
from sdpctl.stages.predictions import predictions_layer
from sdpctl.stages.profile import cost_rows, count_costs, network_costs
from sdpctl.stages.shared import Images
from sdpctl.stages.stage import Job, Made, Stage, Steps, Tracked, key_of
from sdpctl.store import Artifact
from sdpctl.store.layout import canonical

if TYPE_CHECKING:
    from sdpctl.data.loader import ImageData
    from sdpctl.engine.cost import Costs
    from sdpctl.engine.evaluate import CascadeScore, CascadeTally

Split = Literal["test", "holdout"]


class Evaluate(Stage):
    """Score instances, each with its own statistics.

    A table of the test split belongs together with its statistics: `NAME.bn` moves with `NAME.eval`.

    Args:
        network: a trained network, perhaps with statistics.
        instances: the instances to score; by default those of the network's statistics, or the SDPoint grid.
        split: `test` for reported numbers, or `holdout` for the held-out images, by which instances may be chosen.
        statistics: the stage that makes the statistics; by default, stored statistics that cover the instances are used.
        calibrates: whether missing statistics may be gathered.
        cascades: cascades of these instances, to be scored too.

    Raises:
        DataError: if the data is missing or does not match its fingerprint, or if no images are held out.
        DivergedError: if the loss of an instance is not finite.
        UsageError: if the recipe holds out a different share than the training did.
    """

    kind = EVALUATION

    def __init__(
        self,
        network: TrainedNetwork,
        instances: Sequence[Instance] | None = None,
        split: Split = "test",
        *,
        statistics: Stage | None = None,
        calibrates: bool = True,
        cascades: Sequence[Cascade] = (),
    ) -> None:
        if instances is None and network.statistics is None:
            instances = grid(network.recipe)
        self.network = network
        self.statistics = statistics or Statistics(network, instances, calibrates=calibrates)
        self.instances = None if instances is None else list(instances)
        self.split = split
        self.cascades = list(cascades)

    @property
    def tag(self) -> str:
        """`NAME.eval`, or `NAME.holdout`."""
        return f"{self.network.name}.{'eval' if self.split == 'test' else 'holdout'}"

    @property
    def tracked(self) -> Tracked:
        """The trackers of the recipe."""
        return Tracked(self.network.recipe.train.track, self.network.name)

    def steps(self, context: Context) -> Steps:
        """Ask for the checkpoint and for statistics of the instances."""
        checkpoint = yield self.network.checkpoint
        if self.split == "holdout":
            check_holdout(self.network, checkpoint, context)
        statistics = yield self.statistics
        return self.job(self.network.with_known_data(context), checkpoint, statistics, context)

    def _wanted(self, statistics: Artifact, context: Context) -> list[Instance]:
        """Return the instances to score; by default those of the statistics."""
        return calibrated_instances(context.store, statistics) if self.instances is None else self.instances

    def job(self, network: TrainedNetwork, checkpoint: Artifact, statistics: Artifact, context: Context) -> Job:
        """Return the job that scores the instances with the given statistics."""
        wanted = self._wanted(statistics, context)
        network = network.changed(calibrate=recipe_of(statistics, context).calibrate)
        _note_sizes(network, context)
        parts = network.resolved.parts("seed", "data", "evaluate")
        texts = [str(instance) for instance in wanted]
        main = context.tagged(f"{network.name}.bn")
        is_main = main is not None and main.digest == statistics.digest
        more = {"cascades": [str(cascade) for cascade in self.cascades]} if self.cascades else {}
        return Job(
            key=key_of(self.kind, statistics=statistics.digest, recipe=parts, instances=texts, split=self.split, **more),
            make=lambda: self._score(network, checkpoint, statistics, wanted, context),
            subject=statistics,
            complete=is_main and wanted == calibrated_instances(context.store, statistics),
            together={f"{network.name}.bn": statistics} if self.split == "test" else {},
        )

    def task(self, context: Context) -> str:
        """Return the number of instances to evaluate and the number of images to use."""
        from torch import device

        network = self.network.with_data(context)
        images = _images(open_data(network.recipe, device("cpu"), context), network, self.split)
        given = self.network.statistics
        instances = self.instances or ([] if given is None else calibrated_instances(context.store, given))
        return f"evaluate {self._counted(instances)} on {images:,} images"

    def _counted(self, instances: Sequence[Instance]) -> str:
        """Return the number of instances, and of cascades if there are any."""
        more = len(self.cascades)
        return counted(instances) + (f" and {more} cascade{'' if more == 1 else 's'}" if more else "")

    def _score(
        self, network: TrainedNetwork, checkpoint: Artifact, statistics: Artifact, wanted: list[Instance], context: Context
    ) -> Made:
        from sdpctl.engine.evaluate import CascadeTally, ClassTally

        network = network.with_data(context)
        recipe = network.recipe
        shared = open_network(checkpoint, recipe, context, images=recipe.evaluate.batch_size)
        data = shared.data
        images = _images(data, network, self.split)
        watch = partial(
            timed,
            total=data.batches_to_score(images, recipe.evaluate.batch_size),
            text=f"evaluating {self._counted(wanted)}",
            tag=self.tag,
            context=context,
            images=images,
        )
        gathered = read_statistics(context.store, statistics, shared.model)
        tally = ClassTally(keeps=recipe.evaluate.predictions)
        cascades = CascadeTally(self.cascades) if self.cascades else None
        scores = shared.evaluate(wanted, _scored(network, self.split), gathered, recipe.evaluation, tally, watch, cascades)
        by_class = dict(zip(scores, tally.top1(), strict=True))
        costs = cost_rows(count_costs(recipe.model, recipe.scored_size, wanted), wanted)
        rows = [
            row
            | {"top1": scores[instance].top1, "top5": scores[instance].top5, "loss": scores[instance].loss}
            | {"by_class": by_class[instance]}
            for instance, row in zip(wanted, costs, strict=True)
        ]
        table = {"classes": data.classes, "class_images": tally.images, "images": images, "rows": rows}
        results = table | {"split": self.split} | ({} if cascades is None else {"cascades": _cascade_rows(recipe, cascades)})
        layers = {RESULTS: canonical(results), RECIPE: recipe_layer(network.resolved)}
        if tally.keeps:
            labels_N, predicted_IN = tally.kept
            shows = self.split == "test" and images == data.test_size
            macs = [row["macs"] for row in rows]
            layers[PREDICTIONS] = predictions_layer(labels_N, predicted_IN, macs, data.pictures if shows else None)
        return Made(layers, f"{self._counted(wanted)} on {images:,} images")


def cascade_row(cascade: Cascade, score: "CascadeScore", costs: "Costs") -> dict[str, Any]:
    """Return the row of a cascade in a document.

    Args:
        cascade: the cascade.
        score: its score on test or held-out images.
        costs: the costs of the network's segments.
    """
    from sdpctl.engine.cascade import added_macs

    spent = added_macs(cascade, costs)
    mean = score.macs(spent) / score.images
    return {
        "cascade": str(cascade),
        "macs": round(mean),
        "relative": mean / costs.of(FULL).macs,
        "worst_macs": sum(spent),
        "member_macs": list(spent),
        "left": score.shares,
        "top1": score.top1,
        "loss": score.loss,
    }


def _cascade_rows(recipe: Recipe, cascades: "CascadeTally") -> list[dict[str, Any]]:
    """Return a row for each cascade of an evaluation."""
    costs = network_costs(recipe.model, recipe.scored_size)
    params = costs.of(FULL).params
    return [
        cascade_row(cascade, score, costs) | {"params": params, "top5": score.top5}
        for cascade, score in cascades.scores.items()
    ]


class Scores(Evaluate):
    """Use the table tagged `NAME.eval` or `NAME.holdout` if it has the instances; otherwise evaluate them."""

    def steps(self, context: Context) -> Steps:
        """Ask for the checkpoint and for statistics; return a table that has the instances, or the job that makes one."""
        checkpoint = yield self.network.checkpoint
        if self.split == "holdout":
            check_holdout(self.network, checkpoint, context)
        statistics = yield self.statistics
        network = self.network.with_known_data(context)
        wanted = self._wanted(statistics, context)
        if (found := self._sufficient(network, statistics, wanted, context)) is not None:
            return found
        return self.job(network, checkpoint, statistics, context)

    def _sufficient(
        self, network: TrainedNetwork, statistics: Artifact, wanted: Iterable[Instance], context: Context
    ) -> Artifact | None:
        tagged = context.tagged(self.tag)
        if tagged is None or tagged.kind != self.kind.name or tagged.subject is None:
            return None
        if tagged.subject.digest != statistics.digest:
            return None
        if not scored_alike(recipe_of(tagged, context).identity(), network.resolved.identity()):
            return None
        results = read_document(context.store, tagged)
        rows = {row["instance"] for row in results["rows"]}
        names_classes = "classes" in results  # evaluations by early versions do not list the classes
        return tagged if names_classes and {str(instance) for instance in wanted} <= rows else None


def scored_alike(there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Return whether two recipes give the same scores; the batch size is ignored if both score every image.

    Whether predictions are kept is ignored, too.
    """
    if any(there[part] != here[part] for part in ("seed", "data")):
        return False
    every_image = "batches" not in there["evaluate"] and "batches" not in here["evaluate"]
    ignored = ("predictions", *(("batch_size",) if every_image else ()))
    kept = [{key: value for key, value in each["evaluate"].items() if key not in ignored} for each in (there, here)]
    return kept[0] == kept[1]


def _images(data: "ImageData", network: TrainedNetwork, split: Split) -> int:
    """Return the number of images that an evaluation uses.

    Raises:
        DataError: if the holdout has no images and `split` is `holdout`.
    """
    section = network.recipe.evaluate
    size = data.test_size if split == "test" else len(data.holdout_indices)
    if not size:
        share = f"{100 * network.recipe.data.holdout:g}%"
        raise DataError(f"data.holdout={share} of each class leaves no image to choose an instance by; name an instance")
    return size if section.batches is None else min(size, section.batches * section.batch_size)


def _scored(network: TrainedNetwork, split: Split) -> Images:
    section = network.recipe.evaluate
    if split == "test":
        return "test", section.batch_size, section.batches
    if section.batches is not None:
        return "holdout_part", 0, section.batches * section.batch_size, section.batch_size
    return "holdout", section.batch_size


def _note_sizes(network: TrainedNetwork, context: Context) -> None:
    """Tell the user if statistics were gathered on purpose at a size at which no image is scored."""
    size, scored = network.recipe.calibrate.image_size, network.recipe.scored_size
    if size not in (None, scored):
        context.note_once(
            f"{network.name}: the statistics are of images of {size} px, but images of {scored} px are scored; use "
            f"--set evaluate.image_size={size}, or calibrate again at {scored} px"
        )


def check_holdout(network: TrainedNetwork, checkpoint: Artifact, context: Context) -> None:
    """Refuse a holdout share that differs from the training's, since choices would then depend on training images.

    Raises:
        UsageError: if the shares differ.
    """
    trained = recipe_of(checkpoint, context)
    if (there := network.recipe.data.holdout) != (then := trained.data.holdout):
        raise UsageError(
            f"--set data.holdout={there:g}: the training held out {then:g}; with a different share, instances would be chosen "
            "on images of the training; leave this override out"
        )


def held_out_images(data: "ImageData", recipe: Recipe) -> int:
    """Return the number of held-out images.

    Raises:
        DataError: if a class has no held-out image, or there are fewer than two images for each class.
    """
    held = len(data.holdout_indices)
    classes = len(set(data.labels.tolist()))
    there = len({int(data.labels[i]) for i in data.holdout_indices})
    if there < classes or held < 2 * classes:
        share = f"{100 * recipe.data.holdout:g}%"
        raise DataError(
            f"data.holdout={share} keeps {held} images of {classes} classes, too few to choose by; train with a larger one"
        )
    return held
