"""The search stage: from a checkpoint to the best network under a budget, and what it is worth beside simpler ways."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sdpctl.budget import Budget
from sdpctl.errors import DataError, ResourceError, RunInterruptedError, UsageError
from sdpctl.instance import FULL, Instance
from sdpctl.models import empty_model
from sdpctl.pipeline.artifacts import RECIPE, RESULT, TRIALS, lines
from sdpctl.pipeline.context import Context, Opened, counted, recipe_layer, short, stage_key
from sdpctl.pipeline.instances import check_holdout, gather, load_model, watched
from sdpctl.pipeline.interruption import Interruption
from sdpctl.pipeline.process import Process
from sdpctl.randomness import derive
from sdpctl.sdpoint import sdpoint_instances
from sdpctl.search.catalog import BASELINE, EXHAUSTIVE, STRATEGIES
from sdpctl.search.settings import SearchSettings
from sdpctl.store import Artifact
from sdpctl.store.layout import canonical

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

    from sdpctl.data.loader import Batch, ImageData
    from sdpctl.engine.evaluate import Score
    from sdpctl.search.problem import Evaluations, Problem
    from sdpctl.search.run import Outcome

    Outcomes = dict[tuple[str, int], Outcome]

STORAGE = "SDPCTL_STORAGE"
"""Names the storage too, with its password if need be: it is never written down."""

FEW = 4096
"""So many networks may be scored one and all; beyond that `exhaustive` is refused."""


def search(opened: Opened, context: Context) -> Artifact | None:
    """Search for the best ratio of every point within a budget, and commit what was found as `<name>.search`.

    Each strategy uses up its evaluations; so does `random` near the budget, the baseline. The winners, the best single-point
    instance and `full` are then evaluated once on the test split.

    Args:
        opened: the checkpoint; its recipe's section `search` says how.
        context: where, and who is told.

    Returns:
        The search; None on a dry run that would have searched.

    Raises:
        BudgetError: where no network is within the budget.
        DataError: where the data is not there, or too few images are held out.
        ResourceError: where the study's storage cannot be used.
        RunInterruptedError: on a signal; what was scored is kept.
        UsageError: where the study is of something else.
    """
    tag = f"{opened.name}.search"
    check_holdout(opened, context)
    if opened.other_data:
        opened = context.fingerprinted(opened)
    recipe = opened.recipe
    section = recipe.search or SearchSettings()
    identity = recipe.changed(search=section).identity()
    parts = {part: identity[part] for part in ("seed", "data", "calibrate", "evaluate", "search")}
    parts["single-point"] = [str(i) for i in sdpoint_instances(recipe, recipe.ratios)]
    parts["search"]["precision"] = section.precision or recipe.train.precision
    key = stage_key("search", checkpoint=opened.checkpoint.digest, recipe=parts)
    if (found := context.known(key, tag)) is not None:
        return found
    context.prepare()
    opened = context.fingerprinted(opened)
    run = _Search(opened, section, key, context)
    if context.dry_run:
        context.report.note(f"{tag}: would search {run.plan()}")
        return None
    with Interruption() as interruption:
        return run.finish(interruption)


class _Search:
    """One search of a checkpoint."""

    def __init__(self, opened: Opened, section: SearchSettings, key: str, context: Context) -> None:
        from sdpctl.engine.cost import Costs
        from sdpctl.search.problem import Problem
        from sdpctl.search.scoring import make_reward
        from sdpctl.search.space import Space

        self.opened, self.section, self.key, self.context = opened, section, key, context
        self.tag = f"{opened.name}.search"
        recipe = opened.recipe
        size = recipe.data.image_size
        self.costs = Costs(empty_model(recipe.model), (recipe.model.in_channels, size, size))
        self.space = Space(self.costs, dict.fromkeys(section.points or recipe.points, section.ratios) | section.ratios_at)
        self.reward = make_reward(section.reward, section.weight, self.space)
        self.budget = None if section.max_macs is None else Budget.parse(section.max_macs).macs(self.space.full)
        if self.budget is not None:
            self.space.require(self.budget)
            if self.budget > self.space.full:
                context.report.note(
                    f"{self.tag}: {self.budget:,} MACs are more than `full` costs, {self.space.full:,}: all is within"
                )
        self.problems = [
            Problem(self.space, self.budget, section.evaluations, recipe.seed if k == 0 else derive(recipe.seed, "search", k))
            for k in range(section.seeds)
        ]
        self.strategies = self._chosen()

    def _chosen(self) -> tuple[str, ...]:
        """Return the strategies to run, the baseline last; where the networks are few, all of them are scored instead."""
        from itertools import islice

        section, limit = self.section, self.problems[0].limit
        asked = section.compare or (section.strategy,)
        scores_all = any(STRATEGIES[name].scores_all for name in asked)
        count = sum(1 for _ in islice(self.space.networks(limit), (FEW if scores_all else section.evaluations) + 1))
        if scores_all and count > FEW:
            raise UsageError(
                f"more than {FEW:,} networks are within the budget, too many to score each; choose another search.strategy, "
                "or fewer points or ratios"
            )
        if count <= section.evaluations and not section.compare:
            if not scores_all:
                text = f"{count} networks are within the budget, no more than the evaluations: all are scored"
                self.context.report.note(f"{self.tag}: {text}")
            return (EXHAUSTIVE,)
        return (*(name for name in asked if name != BASELINE), BASELINE)

    def plan(self) -> str:
        """Say what would be done."""
        section, space = self.section, self.space
        budget = "any cost" if self.budget is None else f"at most {self.budget:,} MACs ({100 * self.budget / space.full:.1f} %)"
        limited = not all(STRATEGIES[name].scores_all for name in self.strategies)
        each = f", {section.evaluations} evaluations each" if limited else ""
        times = f" x {section.seeds} seeds" if section.seeds > 1 else ""
        return (
            f"{space.count():,} networks of {len(space.points)} points, {budget}, by {', '.join(self.strategies)}{times}{each}"
        )

    def finish(self, interruption: Interruption) -> Artifact:
        """Run the strategies, evaluate the winners on the test split, and commit."""
        from optuna.exceptions import StorageInternalError

        from sdpctl.pipeline.inputs import open_data
        from sdpctl.search.scoring import Scorer
        from sdpctl.search.study import open_storage
        from sdpctl.search.summary import Summary

        default = f"sqlite:///{self.context.path.absolute() / 'studies.sqlite'}"
        storage = open_storage(os.environ.get(STORAGE) or self.section.storage or default)
        recipe, section, report = self.opened.recipe, self.section, self.context.report
        self.interruption = interruption
        self.model, device = load_model(self.opened, self.context, images=recipe.data.batch_size)
        self.data = open_data(recipe, device, self.context)
        first, more = self._held_out(self.data)
        report.note(
            f"{self.tag}: searching {self.plan()}, scored on {first:,} held-out images, the best {section.rescore} on "
            f"{more:,} more"
        )
        size = recipe.evaluate.batch_size
        self.scorer = Scorer(
            self.model,
            self.data.calibration(section.calibration_batches),
            self.data.holdout_part(0, first, size),
            lambda: self.data.holdout_part(first, first + more, size),
            recipe.scoring,
            tick=lambda: self.study.heartbeat(),
        )
        process = Process(self.context.path / "processes")
        try:
            with process.living():
                outcomes = self._outcomes(process, storage)
        except StorageInternalError as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise ResourceError(
                f"{self.tag}: the storage cannot be used ({reason}); the same command goes on from it"
            ) from error
        summary = Summary(outcomes, self.problems[0], self.reward, self.scorer.score_on_all([FULL])[FULL])
        trials = [row.document() for row in summary.trials()]
        result = summary.result(section.max_macs, section.reward, self._tested(summary.winners)).document()
        layers = {TRIALS: lines(trials), RESULT: canonical(result), RECIPE: recipe_layer(recipe)}
        store = self.context.store
        artifact = store.commit("search", layers, subject=self.opened.checkpoint, key=self.key, tag=self.tag)
        for line in summary.notes() if section.reward == "accuracy" else ():
            report.note(f"{self.tag}: {line}")
        report.note(f"{self.tag}: {len(trials)} networks scored, {short(artifact)}")
        return artifact

    def _held_out(self, data: "ImageData") -> tuple[int, int]:
        """Return how many held-out images score every network, and how many more the best.

        Raises:
            DataError: where a class has no held-out image.
        """
        held = len(data.holdout_indices)
        classes = len(set(data.labels.tolist()))
        there = len({int(data.labels[i]) for i in data.holdout_indices})
        if there < classes or held < 2 * classes:
            share = f"{100 * self.opened.recipe.data.holdout:g}%"
            raise DataError(
                f"data.holdout={share} keeps {held} images of {classes} classes, too few to choose on; train with a larger one"
            )
        first = min(self.section.images, held // 2)
        return first, min(self.section.rescore_images, held - first)

    def _outcomes(self, process: Process, storage: "BaseStorage") -> "Outcomes":
        """Run everything that is to be compared; a network that an earlier run scored is not scored again."""
        from sdpctl.search.run import planned_runs, run_strategy
        from sdpctl.search.study import Study, forget

        section = self.section
        grid = sdpoint_instances(self.opened.recipe, self.opened.recipe.ratios)
        outcomes: Outcomes = {}
        for planned in planned_runs(self.problems, self.strategies, grid):
            name, k, problem = planned.strategy, planned.seed_number, planned.problem
            run = f"{name}.{k}" if section.seeds > 1 else name
            study = f"{section.study or f'{self.opened.name}-{self.key[:12]}'}/{run}"
            if self.context.force:
                forget(storage, study)
            self.study = Study(
                storage,
                study,
                self._identity(name, problem),
                space=self.space,
                choices=self._choices(),
                owner=process,
                reward=self.reward,
                measure=self.scorer.score,
            )
            if self.study.rank:  # others are at it: propose something else than they do
                problem = replace(problem, seed=derive(problem.seed, "process", self.study.rank))
            with self._watching(run, problem) as watch:
                outcomes[name, k] = outcome = run_strategy(
                    problem, planned.propose, self.study, best=section.rescore, measure_more=self.scorer.score_more, watch=watch
                )
            self.scorer.known.update(outcome.scores)
            self.scorer.known_more.update(outcome.more)
            self._tell(run, outcome)
        return outcomes

    def _choices(self) -> dict[str, list[float]]:
        """Return the ratios that a trial may show: the space's and those of the single-point instances."""
        used = {1.0, *(ratio for ratios in self.space.ratios.values() for ratio in ratios), *self.opened.recipe.ratios}
        return dict.fromkeys(self.opened.recipe.model.points, sorted(used, reverse=True))

    def _identity(self, name: str, problem: "Problem") -> dict[str, Any]:
        """Return what the scores and the course of a study depend on, in the order it is compared."""
        recipe, section = self.opened.recipe, self.section
        return {
            "checkpoint": short(self.opened.checkpoint),
            "data": str(recipe.data.fingerprint)[:12],
            "points": ", ".join(self.space.points),
            "ratios": "; ".join(", ".join(f"{r:g}" for r in ratios) for ratios in self.space.ratios.values()),
            "budget": problem.budget,
            "strategy": name,
            "evaluations": problem.evaluations,
            "reward": f"{section.reward} {section.weight:g}" if section.reward == "branch" else section.reward,
            "seed": problem.seed,
            "search": self.key[:12],
        }

    @contextmanager
    def _watching(self, run: str, problem: "Problem") -> "Iterator[Any]":
        """Show how far a strategy is: evaluations, the best so far, the time left."""
        report, began, shown = self.context.report, time.monotonic(), 0
        with report.progress(f"searching: {run}", problem.evaluations) as bar:

            def watch(evaluations: "Evaluations") -> None:
                nonlocal shown
                best = max(evaluations.rewards.items(), key=lambda entry: entry[1], default=None)
                text = f"best {self._say(*best)}" if best else ""
                for _ in range(len(evaluations.rewards) - shown):
                    bar.advance(text)
                if len(evaluations.rewards) > shown:
                    shown = len(evaluations.rewards)
                    left = (time.monotonic() - began) / shown * (problem.evaluations - shown)
                    report.detail(f"{run}: {shown}/{problem.evaluations} evaluations, {text}, {left:.0f} s left")
                if self.interruption.signum is not None:
                    raise RunInterruptedError(
                        self.interruption.signum,
                        f"{self.tag}: interrupted after {shown} evaluations of {run}; they are kept, the same command goes on",
                    )

            yield watch

    def _say(self, instance: Instance, reward: float) -> str:
        unit = " %" if self.section.reward == "accuracy" else ""
        return f"{reward:.2f}{unit} at {100 * self.space.cost(instance) / self.space.full:.1f} %"

    def _tell(self, run: str, outcome: "Outcome") -> None:
        score = outcome.best[outcome.winner]
        share = 100 * self.space.cost(outcome.winner) / self.space.full
        self.context.report.note(
            f"{run}: {len(outcome.scores)} networks scored, {outcome.winner} at {share:.1f} % of the MACs has "
            f"{score.top1:.2f} % on {score.images:,} held-out images"
        )

    def _unless_interrupted(self, batches: "Iterator[Batch]") -> "Iterator[Batch]":
        def stop(signum: int) -> None:
            raise RunInterruptedError(
                signum, f"{self.tag}: interrupted after all evaluations; they are kept, the same command goes on"
            )

        return self.interruption.between(batches, stop)

    def _tested(self, instances: list[Instance]) -> "dict[Instance, Score]":
        """Evaluate networks on the test split, with statistics as a table of instances has them."""
        from sdpctl.engine.evaluate import evaluate

        recipe, data = self.opened.recipe, self.data
        section, size = recipe.evaluate, recipe.evaluate.batch_size
        total = min(recipe.calibrate.batches, data.steps_per_epoch)
        text = f"calibrating {counted(instances)}"
        batches = watched(self._unless_interrupted(data.calibration(total)), total, text, self.tag, self.context)
        statistics = gather(self.model, instances, batches, recipe)
        total = min(-(-data.test_size // size), section.batches or data.test_size)
        text = f"evaluating {counted(instances)}"
        batches = watched(self._unless_interrupted(data.test(size, section.batches)), total, text, self.tag, self.context)
        return evaluate(self.model, instances, batches, statistics, recipe.evaluation)
