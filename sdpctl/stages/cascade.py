"""The choice of a cascade: members and thresholds for a budget of mean MACs, and the best choice for every other budget."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from statistics import fmean, median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from sdpctl.budget import Budget, label
from sdpctl.cascade import Cascade
from sdpctl.errors import BudgetError, DivergedError, NotFoundError, RecipeError, RunInterruptedError, UsageError
from sdpctl.instance import FULL, Instance
from sdpctl.kinds import CASCADE, CASCADES, RECIPE
from sdpctl.search.settings import CascadeSettings
from sdpctl.stages.calibrate import Statistics
from sdpctl.stages.context import Context
from sdpctl.stages.evaluate import cascade_row, check_holdout, held_out_images
from sdpctl.stages.interruption import Interruption
from sdpctl.stages.layers import calibrated_instances, read_document, read_statistics
from sdpctl.stages.network import TrainedNetwork, counted, grid, named, recipe_layer, recipe_of
from sdpctl.stages.opening import open_network, timed
from sdpctl.stages.optional import OptionalStage
from sdpctl.stages.profile import count_costs, network_costs
from sdpctl.stages.shared import SharedNetwork
from sdpctl.stages.stage import Job, Made, Steps, key_of
from sdpctl.store import Artifact
from sdpctl.store.layout import canonical
from sdpctl.uncertainty import few_images_note

if TYPE_CHECKING:
    from torch import Tensor

    from sdpctl.data.loader import Batch
    from sdpctl.engine.calibrate import Statistics as BatchNormStatistics
    from sdpctl.engine.evaluate import CascadeScore, Score
    from sdpctl.search.cascades import Found, Logits

IMAGES_OF_A_CLASS = 2
"""Minimum number of held-out images for each class, as in `held_out_images`."""

STEP = 20
"""Number of budgets of the front: shares of the MACs of `full`, at equal distances."""

LATENCY_BATCHES = (1, 32)
"""The batch sizes for which latency is measured."""


class ChooseCascade(OptionalStage):
    """Choose the members and thresholds of a cascade on the held-out images, within a budget of mean MACs.

    Args:
        network: a trained network; its recipe's section `cascade` has the settings.

    Raises:
        BudgetError: if no cascade is within the budget.
        DataError: if the data is missing, or too few images are held out.
        DivergedError: if logits are not finite.
        RecipeError: if the section `cascade` lists no instance besides `full`, or asks for too few images.
        RunInterruptedError: on a signal; nothing is kept.
        UsageError: if the statistics cover one instance only.
    """

    kind = CASCADE

    def __init__(self, network: TrainedNetwork) -> None:
        self.network = network
        self.section = network.recipe.cascade or CascadeSettings()
        listed = self.section.instances
        self.instances: list[Instance] | None = None
        if listed is not None:
            self.instances = named([str(FULL), *listed], network.recipe.model.points)
        elif network.statistics is None:
            self.instances = grid(network.recipe)
        self.statistics = Statistics(network, self.instances)
        self._check()

    def _check(self) -> None:
        """Refuse settings that allow no choice.

        Raises:
            RecipeError: if they do.
        """
        problems = []
        if self.instances is not None and len(self.instances) < 2:
            key = "sdpoint" if self.section.instances is None else "cascade.instances"
            problems.append(f"{key}: a cascade has at least two members, and full is the only candidate; add an instance")
        least = IMAGES_OF_A_CLASS * (self.network.recipe.model.num_classes or 0)
        if self.section.images < least:
            problems.append(
                f"cascade.images: {self.section.images} images are too few to choose by; use at least {IMAGES_OF_A_CLASS} for "
                f"each class, {least:,}"
            )
        if problems:
            raise RecipeError(problems)

    @classmethod
    def of(cls, network: TrainedNetwork) -> "ChooseCascade":
        """Return the choice that a network's recipe asks for."""
        return cls(network)

    @property
    def tag(self) -> str:
        """`NAME.cascade`."""
        return f"{self.network.name}.cascade"

    @property
    def also(self) -> tuple[str, ...]:
        """`NAME.cascade.BUDGET`: the newest choice within this budget."""
        return (f"{self.tag}.{label(self.section.max_macs)}",)

    def steps(self, context: Context) -> Steps:
        """Ask for the checkpoint and for statistics of the candidates."""
        checkpoint = yield self.network.checkpoint
        check_holdout(self.network, checkpoint, context)
        limit = None if self.instances is None else self._limit(self.instances)  # before anything is calibrated
        statistics = yield self.statistics
        network = self.network.with_known_data(context)
        candidates = self._candidates(statistics, context)
        limit = self._limit(candidates) if self.instances is None else limit
        network = network.changed(cascade=self.section, calibrate=recipe_of(statistics, context).calibrate)
        parts = network.resolved.parts("seed", "data", "evaluate", "cascade")
        texts = [str(instance) for instance in candidates]
        interruption = Interruption()

        def make() -> Made:
            work = _Work(self, network.with_data(context), checkpoint, statistics, candidates, limit, context, interruption)
            return work.finish()

        key = key_of(self.kind, statistics=statistics.digest, recipe=parts, instances=texts)
        return Job(key=key, make=make, subject=statistics, guard=interruption)

    def task(self, context: Context) -> str:
        """Return the number of candidates, the number of members and the budget."""
        network = self.network.with_data(context)
        given = self.network.statistics
        instances = self.instances or ([] if given is None else calibrated_instances(context.store, given))
        limit = self._limit(instances)
        budget = "at any cost" if limit is None else f"of at most {limit:,} MACs on average"
        share = f"{100 * network.recipe.data.holdout:g}%"
        return f"choose a cascade of {counted(instances)} {budget}, by the held-out images (data.holdout={share})"

    def _candidates(self, statistics: Artifact, context: Context) -> list[Instance]:
        """Return the instances that may be members, `full` among them."""
        found = calibrated_instances(context.store, statistics) if self.instances is None else self.instances
        if FULL not in found:
            raise NotFoundError(
                f"{self.network.name}: these statistics do not cover full; name the checkpoint, or run `sdpctl calibrate-bn`"
            )
        if len(found) < 2:
            raise UsageError(
                f"{self.network.name}: a cascade has at least two members, and these statistics cover full only; name the "
                "checkpoint, or calibrate more instances by `sdpctl calibrate-bn`"
            )
        return found

    def _limit(self, instances: Sequence[Instance]) -> int | None:
        """Return the budget in MACs; None if there is none.

        Raises:
            BudgetError: if even the cheapest instance takes more, or as much.
        """
        if self.section.max_macs is None:
            return None
        recipe = self.network.recipe
        costs = count_costs(recipe.model, recipe.scored_size, instances)
        budget = Budget.parse(self.section.max_macs)
        limit = budget.macs(costs[FULL].macs)
        least = min(instances, key=lambda instance: costs[instance].macs)
        if costs[least].macs >= limit:
            share = 100 * costs[least].macs / costs[FULL].macs
            raise BudgetError(
                f"--max-macs {budget.text}: no cascade is within {limit:,} MACs on average; a cascade takes more than its "
                f"first member, and the cheapest instance, {least}, takes {costs[least].macs:,} ({share:.1f} %)"
            )
        return limit


class _Work:
    """One choice: the passes over the images, and the document."""

    def __init__(
        self,
        stage: ChooseCascade,
        network: TrainedNetwork,
        checkpoint: Artifact,
        statistics: Artifact,
        candidates: list[Instance],
        limit: int | None,
        context: Context,
        interruption: Interruption,
    ) -> None:
        self.tag, self.section, self.network, self.recipe = stage.tag, stage.section, network, network.recipe
        self.candidates, self.limit = candidates, limit
        self.context, self.interruption = context, interruption
        self.shared: SharedNetwork = open_network(checkpoint, self.recipe, context, images=self.recipe.evaluate.batch_size)
        self.statistics: BatchNormStatistics = read_statistics(context.store, statistics, self.shared.model)
        self.costs = network_costs(self.recipe.model, self.recipe.scored_size)
        self.macs = {instance: self.costs.of(instance).macs for instance in candidates}

    def finish(self) -> Made:
        """Choose on the held-out images, score on the test images, and measure the latency."""
        from sdpctl.engine.evaluate import CascadeTally

        known = self._logits()
        best, front = self._chosen(known)
        cascades = list(dict.fromkeys(found.choice for found in (best, *front) if isinstance(found.choice, Cascade)))
        single = self._single(known)
        singles = [found.choice for found in (*front, *([single] if single else [])) if isinstance(found.choice, Instance)]
        members = [member for cascade in cascades for member in cascade.members]
        instances = list(dict.fromkeys([*members, *singles, FULL]))
        tally = CascadeTally(cascades)
        self.tested: dict[Instance, Score] = self._tested(instances, tally)
        self.cascades_tested: dict[Cascade, CascadeScore] = tally.scores
        self.held = self._held(known, cascades)
        document = {
            "budget": {"text": self.section.max_macs, "macs": self.limit},
            "images": self.tested[FULL].images,
            "heldout_images": best.images,
            "candidates": [str(instance) for instance in self.candidates],
            "best": self._row(best),
            "single": None if single is None else self._row(single),
            "full": self._row(known.found(FULL)),
            "front": [self._row(found) for found in front],
        }
        assert isinstance(best.choice, Cascade)
        self._tell(best, single)
        self._measure(best.choice)
        layers = {CASCADES: canonical(document), RECIPE: recipe_layer(self.network.resolved)}
        return Made(layers, f"{len(best.choice.members)} of {counted(self.candidates)} chosen on {best.images:,} images")

    def _logits(self) -> "Logits":
        """Run all candidates on the held-out images."""
        import numpy as np

        from sdpctl.engine.cascade import shared_macs
        from sdpctl.search.cascades import Logits

        data, size = self.shared.data, self.recipe.evaluate.batch_size
        images = min(self.section.images, held_out_images(data, self.recipe))
        watch = partial(
            self._watched,
            total=data.batches_to_score(images, size),
            text=f"running {counted(self.candidates)} on held-out images",
            images=images,
        )
        logits_INK, labels_N = self.shared.logits(
            self.candidates, ("holdout_part", 0, images, size), self.statistics, self.recipe.evaluation, watch
        )
        for instance, logits_NK in zip(self.candidates, logits_INK, strict=True):
            if not bool(logits_NK.isfinite().all()):
                raise DivergedError(f"the logits of {instance} are not finite: these weights cannot be used")
        macs = [self.macs[instance] for instance in self.candidates]
        logits = [logits_NK.numpy().astype(np.float32, copy=False) for logits_NK in logits_INK]
        return Logits(self.candidates, macs, shared_macs(self.candidates, self.costs), logits, labels_N.numpy())

    def _chosen(self, known: "Logits") -> "tuple[Found, list[Found]]":
        """Return the best cascade within the budget, and the best choices for a list of budgets, the cheapest first.

        Raises:
            BudgetError: if no cascade is within the budget; the message names the cheapest.
        """
        from sdpctl.search.cascades import Cascades

        averaged = None if self.section.averaged == "auto" else self.section.averaged
        cascades = Cascades(known, members=self.section.members, averaged=averaged)
        full, most = self.macs[FULL], sum(self.macs.values())
        steps = sorted({min(self.macs.values()), *(full * k // STEP for k in range(1, STEP + 1))})
        limit = most if self.limit is None else min(self.limit, most)
        best, *found = cascades.within([limit, *steps])
        if best is None:
            least = cascades.least()
            if least is None:
                raise BudgetError(
                    f"{self.tag}: there is no cascade, since each candidate is equally confident of all held-out images; train "
                    "longer, or hold out more images"
                )
            raise BudgetError(
                f"--max-macs {self.section.max_macs}: no cascade is within {self.limit or 0:,} MACs on average; the cheapest, "
                f"{least.choice}, takes {least.mean_macs:,.0f} ({100 * least.mean_macs / full:.1f} %)"
            )
        front: list[Found] = []
        for step, cascade in zip(steps, found, strict=True):
            within = [one for one in (known.best_single(step), cascade) if one is not None]
            if within and (not front or max(one.right for one in within) > front[-1].right):
                front.append(min(within, key=lambda one: (-one.right, one.macs)))
        return best, front

    def _single(self, known: "Logits") -> "Found | None":
        """Return the most accurate single instance within the budget."""
        return known.best_single(max(self.macs.values()) if self.limit is None else self.limit)

    def _held(self, known: "Logits", cascades: Sequence[Cascade]) -> "dict[Cascade, CascadeScore]":
        """Score cascades on the held-out images, as the test images are scored."""
        import torch

        from sdpctl.engine.distributed import ALONE
        from sdpctl.engine.evaluate import CascadeTally

        tally = CascadeTally(cascades)
        tensors = {instance: torch.from_numpy(x) for instance, x in zip(known.instances, known.logits, strict=True)}
        tally.add(tensors, torch.from_numpy(known.labels))
        tally.finish(ALONE, len(known.labels), known.logits[0].shape[1])
        return tally.scores

    def _tested(self, instances: list[Instance], tally: Any) -> "dict[Instance, Score]":
        """Score instances and cascades on the test images."""
        data, section = self.shared.data, self.recipe.evaluate
        images = data.test_size if section.batches is None else min(data.test_size, section.batches * section.batch_size)
        watch = partial(
            self._watched,
            total=data.batches_to_score(images, section.batch_size),
            text=f"evaluating {len(tally.cascades)} cascades and {counted(instances)}",
            images=images,
        )
        test = ("test", section.batch_size, section.batches)
        return self.shared.evaluate(instances, test, self.statistics, self.recipe.evaluation, watch=watch, cascades=tally)

    def _watched(self, batches: "Iterable[Batch]", **options: Any) -> "Iterable[Batch]":
        """Yield batches with a progress bar until a signal comes; see `timed`."""

        def stop(signum: int) -> None:
            raise RunInterruptedError(signum, f"{self.tag}: interrupted; nothing is kept, the same command begins again")

        return timed(self.interruption.between(batches, stop), tag=self.tag, context=self.context, **options)

    def _row(self, found: "Found") -> dict[str, Any]:
        """Return the row of an instance or a cascade in the document."""
        if isinstance(found.choice, Instance):
            score, macs = self.tested[found.choice], self.macs[found.choice]
            cost = {"instance": str(found.choice), "macs": macs, "relative": macs / self.macs[FULL]}
            return cost | {"top1": score.top1, "loss": score.loss, "heldout_top1": 100 * found.right / found.images}
        held = cascade_row(found.choice, self.held[found.choice], self.costs)
        moved = {f"heldout_{key}": held[key] for key in ("top1", "macs", "left")}
        return cascade_row(found.choice, self.cascades_tested[found.choice], self.costs) | moved

    def _tell(self, best: "Found", single: "Found | None") -> None:
        """Tell the user what makes the choice uncertain."""
        report = self.context.report
        if (few := few_images_note(best.images)) is not None:
            report.note(f"{self.tag}: the choice is made on held-out images; {few}")
        if single is not None and single.right >= best.right:
            report.note(
                f"{self.tag}: the single instance {single.choice} is as accurate on held-out images as the cascade "
                f"({100 * single.right / single.images:.2f} % and {100 * best.right / best.images:.2f} %)"
            )

    def _measure(self, cascade: Cascade) -> None:
        """Measure the latency of a cascade and of `full` on test images, in turns; a clock's results are in no layer."""
        import torch

        from sdpctl.engine.calibrate import CalibratedNorms
        from sdpctl.engine.cascade import CascadeRun
        from sdpctl.engine.device import autocast
        from sdpctl.engine.tree import Tree

        model, settings = self.shared.model, self.recipe.evaluation
        device = next(model.parameters()).device
        norms = CalibratedNorms(model, self.statistics.to(device))
        run, tree = CascadeRun(model, cascade, norms), Tree(model, [FULL])
        size = max(LATENCY_BATCHES)
        x_NCHW, _ = next(iter(self.shared.data.test(size * self.context.ranks.size, 1)))
        calls = {"cascade": run, "full": lambda x_NCHW: tree.walk(x_NCHW, norms)}
        with torch.inference_mode(), autocast(device, settings.precision):
            for batch in LATENCY_BATCHES:
                times = latencies(calls, torch.split(x_NCHW, batch))
                self.context.report.note(
                    f"{self.tag}: a batch of {batch} takes {times['cascade']:.3g} ms on this machine, {times['full']:.3g} ms "
                    "with full"
                )
                self.context.workspace.log(self.tag, event="latency", batch_size=batch, milliseconds=times)


def latencies(calls: "Mapping[str, Any]", batches: "Sequence[Tensor]", runs: int = 3) -> dict[str, float]:
    """Return the mean latency of each call over some batches, in milliseconds.

    The calls take turns, so that a machine that slows down slows down all of them. Of each batch and call the median of `runs`
    counts, after a run that does not count.
    """
    import torch

    seen: dict[str, list[float]] = {name: [] for name in calls}
    for x_NCHW in batches:
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(runs + 1):
            for name, call in calls.items():
                began = perf_counter()
                call(x_NCHW)
                if x_NCHW.device.type == "cuda":
                    torch.cuda.synchronize(x_NCHW.device)
                times[name].append(1000 * (perf_counter() - began))
        for name, own in times.items():
            seen[name].append(median(own[1:]))
    return {name: fmean(own) for name, own in seen.items()}


def chosen_cascades(artifact: Artifact, context: Context, points: Sequence[str]) -> list[Instance | Cascade]:
    """Return the cascade of a choice, the best single instance within its budget, its front and `full`, without duplicates.

    Raises:
        InstanceError: if the artifact names a point that is not among `points`.
    """
    document = read_document(context.store, artifact)
    rows = [document["best"], *([document["single"]] if document["single"] else []), *document["front"], document["full"]]
    found = [Cascade.parse(row["cascade"]) if "cascade" in row else Instance.parse(row["instance"]) for row in rows]
    return list(dict.fromkeys(one.check(points) for one in found))
