"""The search: find a checkpoint's best instance within a budget, and compare it with the results of simpler methods."""

import os
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from sdpctl.budget import Budget, BudgetRange, label
from sdpctl.errors import NotFoundError, ResourceError, RunInterruptedError, UsageError
from sdpctl.instance import FULL, Instance
from sdpctl.kinds import AGENT as AGENT_KIND
from sdpctl.kinds import RECIPE, RESULT, SEARCH, TRIALS
from sdpctl.models import empty_model
from sdpctl.randomness import derive
from sdpctl.recipe.schema import Recipe
from sdpctl.sdpoint import sdpoint_instances
from sdpctl.search.catalog import AGENT, BASELINE, EXHAUSTIVE, STRATEGIES
from sdpctl.search.settings import AgentSettings, SearchSettings
from sdpctl.stages.context import Context
from sdpctl.stages.evaluate import check_holdout, held_out_images
from sdpctl.stages.interruption import Interruption
from sdpctl.stages.layers import lines, read_agent, read_document
from sdpctl.stages.liveness import LivingProcess
from sdpctl.stages.network import TrainedNetwork, counted, named, recipe_layer
from sdpctl.stages.opening import open_network, timed
from sdpctl.stages.optional import OptionalStage
from sdpctl.stages.shared import Scored
from sdpctl.stages.stage import Job, Made, Steps, Tracked, key_of
from sdpctl.stages.workspace import PROCESSES, STUDIES
from sdpctl.store import Artifact
from sdpctl.store.layout import canonical

if TYPE_CHECKING:
    from sdpctl.data.loader import Batch, ImageData
    from sdpctl.engine.evaluate import Score
    from sdpctl.search.problem import Evaluations, Problem
    from sdpctl.search.run import Outcome, Run

    Outcomes = dict[tuple[str, int], Outcome]

STORAGE = "SDPCTL_STORAGE"
"""Environment variable with the storage's address, which may contain a password: the value is never written down."""

FEW = 4096
"""The maximum number of networks that `exhaustive` scores; a larger space is refused."""


class SearchStage(OptionalStage):
    """A stage that scores networks of a checkpoint on held-out images.

    Args:
        network: a trained network; its recipe's section `search` has the settings.
        anew: forget the scores of an earlier study with the same name.

    Raises:
        BudgetError: if no network is within the budget.
        DataError: if the data is missing, or too few images are held out.
        ResourceError: if the study's storage cannot be used.
        RunInterruptedError: on a signal; the scores so far are kept.
        UsageError: if the study in the storage belongs to a different search.
    """

    def __init__(self, network: TrainedNetwork, *, anew: bool = False) -> None:
        self.network = network
        self.anew = anew

    @property
    def section(self) -> SearchSettings:
        """The recipe's section, or its defaults."""
        return self.network.recipe.search or SearchSettings()

    @property
    def tracked(self) -> Tracked:
        """The trackers of the recipe."""
        return Tracked(self.network.recipe.train.track, self.network.name)

    @property
    def tag(self) -> str:
        """`NAME.search` or `NAME.agent`."""
        return f"{self.network.name}.{self.kind.name}"

    def steps(self, context: Context) -> Steps:
        """Ask for the checkpoint."""
        checkpoint = yield self.network.checkpoint
        check_holdout(self.network, checkpoint, context)
        network = self.network.with_known_data(context)
        recipe, section = network.recipe, self.section
        parts = network.changed(search=section).resolved.parts("seed", "data", "calibrate", "evaluate", "search")
        parts["calibrate"].pop("finetune", None)  # the networks of a search are not fine-tuned
        parts["search"]["precision"] = section.precision or recipe.train.precision
        if any(STRATEGIES[name].learns for name in section.strategies):
            parts["search"]["agent"] = asdict(section.agent or AgentSettings())
        agent = None if section.policy is None else agent_of(section.policy, context)
        if agent is not None:
            parts["search"]["policy"] = agent.digest
        self.complete(parts, recipe)
        key = key_of(self.kind, checkpoint=checkpoint.digest, recipe=parts)
        interruption = Interruption()

        def make() -> Made:
            search = self.searching(network.with_data(context), checkpoint, key, context, interruption, agent)
            return search.finish(anew=self.anew)

        return Job(key=key, make=make, subject=checkpoint, guard=interruption)

    def complete(self, parts: dict[str, Any], recipe: Recipe) -> None:
        """Add to the parts of a recipe that the key depends on, or remove some."""

    @property
    @abstractmethod
    def searching(self) -> "type[Searching]":
        """The class that does the work."""


class Search(SearchStage):
    """Search for the best ratio of every point within a budget.

    Each strategy makes its number of evaluations; so does the baseline, `random` near the budget. The winners, the best
    single-point instance and `full` are then evaluated once on the test split.
    """

    kind = SEARCH

    @classmethod
    def of(cls, network: TrainedNetwork) -> "Search | None":
        """Return the search that a network's recipe asks for; None if it asks for an agent."""
        section = network.recipe.search
        return cls(network) if section is None or section.budgets is None else None

    @property
    def also(self) -> tuple[str, ...]:
        """`NAME.search.BUDGET`: the newest search within this budget."""
        return (f"{self.tag}.{label(self.section.max_macs)}",)

    @property
    def searching(self) -> "type[Searching]":
        """The class that does the work."""
        return Searching

    def complete(self, parts: dict[str, Any], recipe: Recipe) -> None:
        """Add the single-point instances, which are scored too."""
        parts["single-point"] = [str(i) for i in sdpoint_instances(recipe, recipe.ratios)]

    def task(self, context: Context) -> str:
        """Return the size of the space, the budget and the strategies."""
        return f"search {SearchSpace(self.network.with_data(context), context).description()}"


class SearchSpace:
    """The search space and the strategies, which depend on neither weights nor data."""

    def __init__(self, network: TrainedNetwork, context: Context) -> None:
        from sdpctl.engine.cost import Costs
        from sdpctl.search.problem import Problem
        from sdpctl.search.scoring import make_reward
        from sdpctl.search.space import Space

        self.network, self.context = network, context
        self.recipe = recipe = network.recipe
        self.section = section = recipe.search or SearchSettings()
        self.tag = f"{network.name}.{SEARCH.name if section.budgets is None else AGENT_KIND.name}"
        size = recipe.scored_size
        costs = Costs(empty_model(recipe.model), (recipe.model.in_channels, size, size))
        self.space = Space(costs, dict.fromkeys(section.points or recipe.points, section.ratios) | section.ratios_at)
        self.reward = make_reward(section.reward, section.weight, self.space)
        self.budget = None if section.max_macs is None else Budget.parse(section.max_macs).macs(self.space.full)
        self.lowest: int | None = None
        if section.budgets is not None:
            self.lowest, self.budget = BudgetRange.parse(section.budgets).macs(self.space.full)
        if self.budget is not None:
            self.space.require(self.budget)
            if self.budget > self.space.full:
                context.report.note(
                    f"{self.tag}: the budget, {self.budget:,} MACs, is more than `full` costs, {self.space.full:,}; every "
                    "network is within the budget"
                )
        self.problems = [
            Problem(
                self.space,
                self.budget,
                max(1, section.evaluations),  # an agent's first proposal is scored for the table alone
                recipe.seed if k == 0 else derive(recipe.seed, "search", k),
                self.lowest,
                section.agent or AgentSettings(),
            )
            for k in range(section.seeds)
        ]
        self.strategies = self._chosen()

    def _chosen(self) -> tuple[str, ...]:
        """Return the strategies to run, the baseline last; if there are few networks, `exhaustive` scores all instead."""
        from itertools import islice

        section, limit = self.section, self.problems[0].limit
        asked = section.strategies
        if section.budgets is not None or not section.evaluations:
            return asked
        scores_all = any(STRATEGIES[name].scores_all for name in asked)
        count = sum(1 for _ in islice(self.space.networks(limit), (FEW if scores_all else section.evaluations) + 1))
        if scores_all and count > FEW:
            raise UsageError(
                f"more than {FEW:,} networks are within the budget, too many to score every one; choose a different "
                "search.strategy, or fewer points or ratios"
            )
        if count <= section.evaluations and not section.compare:
            if not scores_all:
                text = f"{count} networks are within the budget, no more than the evaluations, so all of them are scored"
                self.context.report.note(f"{self.tag}: {text}")
            return (EXHAUSTIVE,)
        return (*(name for name in asked if name != BASELINE), BASELINE)

    @property
    def reward_text(self) -> str:
        """The reward, with its weight if it has one."""
        section = self.section
        return f"{section.reward} {section.weight:g}" if section.reward == "branch" else section.reward

    def description(self) -> str:
        """Describe the size of the space, the budget and the strategies in words."""
        section, space = self.section, self.space
        budget = "any cost" if self.budget is None else f"at most {self.budget:,} MACs ({100 * self.budget / space.full:.1f} %)"
        if self.lowest is not None:
            budget = f"budgets of {section.budgets}"
        limited = not all(STRATEGIES[name].scores_all for name in self.strategies)
        each = f", {section.evaluations} evaluations each" if limited else ""
        times = f" x {section.seeds} seeds" if section.seeds > 1 else ""
        return (
            f"{space.count():,} networks of {len(space.points)} points, {budget}, by {', '.join(self.strategies)}{times}{each}"
        )


class Searching(SearchSpace):
    """One search of a checkpoint."""

    def __init__(
        self,
        network: TrainedNetwork,
        checkpoint: Artifact,
        key: str,
        context: Context,
        interruption: Interruption,
        agent: Artifact | None = None,
    ) -> None:
        super().__init__(network, context)
        self.checkpoint, self.key, self.interruption = checkpoint, key, interruption
        if agent is not None:
            trained = read_agent(context.store, agent, known=self._same_scores(agent))
            trained.check(self.space, f"the agent {agent.tag or agent.short}")
            self.problems = [replace(problem, trained=trained) for problem in self.problems]

    def _same_scores(self, agent: Artifact) -> bool:
        """Return whether an agent learned from rewards of the network that is searched, at the same size of images."""
        theirs, space = read_document(self.context.store, agent), self.space
        learned = (theirs["space"]["points"], theirs["space"]["full"], theirs["reward"])
        same = learned == (list(space.points), space.full, self.reward_text)
        return same and agent.subject is not None and agent.subject.digest == self.checkpoint.digest

    def finish(self, *, anew: bool) -> Made:
        """Run the strategies, and evaluate the winners on the test split."""
        from sdpctl.search.run import planned_runs
        from sdpctl.search.summary import Summary

        section, grid = self.section, sdpoint_instances(self.recipe, self.recipe.ratios)
        at_once = self.strategies == (AGENT,)
        with self.scoring(f"searching {self.description()}"):
            outcomes: Outcomes = {
                (planned.strategy, planned.seed_number): self.outcome(planned, anew=anew)
                for planned in planned_runs(self.problems, self.strategies, [] if at_once else grid)
            }
        summary = Summary(outcomes, self.problems[0], self.reward, self.scorer.score_on_all([FULL])[FULL])
        trials = [row.document() for row in summary.trials()]
        result = summary.result(section.max_macs, section.reward, self.tested(summary.winners)).document()
        layers = {TRIALS: lines(trials), RESULT: canonical(result), RECIPE: recipe_layer(self.network.resolved)}
        for line in summary.notes() if section.reward == "accuracy" else ():
            self.context.report.note(f"{self.tag}: {line}")
        return Made(layers, f"{_networks(len(trials))} scored")

    @contextmanager
    def scoring(self, description: str) -> Iterator[None]:
        """Open the network, the held-out images and the storage, in which this process is then known to be alive.

        Args:
            description: what is searched, and by what.
        """
        from optuna.exceptions import StorageInternalError

        from sdpctl.search.study import open_storage

        default = f"sqlite:///{self.context.path.absolute() / STUDIES}"
        self.storage = open_storage(os.environ.get(STORAGE) or self.section.storage or default)
        recipe, section = self.recipe, self.section
        self.shared = open_network(self.checkpoint, recipe, self.context, images=recipe.data.batch_size)
        first, more = self._held_out(self.shared.data)
        self.context.report.note(
            f"{self.tag}: {description}, scored on {first:,} held-out images, the best {section.rescore} on {more:,} more"
        )
        self.scorer = self.shared.scorer(
            Scored(section.calibration_batches, first, more, recipe.evaluate.batch_size, recipe.preparation),
            recipe.scoring,
            tick=lambda: self.study.heartbeat(),
        )
        self.process = LivingProcess(self.context.path / PROCESSES)
        try:
            with self.process.living():
                yield
        except StorageInternalError as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise ResourceError(
                f"{self.tag}: the storage cannot be used ({reason}); the same command continues the search"
            ) from error

    def _held_out(self, data: "ImageData") -> tuple[int, int]:
        """Return how many held-out images score every network, and how many further images score the best networks.

        Raises:
            DataError: if a class has no held-out image.
        """
        held = held_out_images(data, self.recipe)
        first = min(self.section.images, held // 2)
        return first, min(self.section.rescore_images, held - first)

    def outcome(self, planned: "Run", *, anew: bool) -> "Outcome":
        """Run a strategy; networks that an earlier strategy scored are not scored again.

        Args:
            planned: the strategy and its problem.
            anew: forget the scores of an earlier study with the same name.
        """
        from sdpctl.search.run import run_strategy
        from sdpctl.search.study import Study, forget

        section, name, problem = self.section, planned.strategy, planned.problem
        run = f"{name}.{planned.seed_number}" if section.seeds > 1 else name
        study = f"{section.study or f'{self.network.name}-{self.key[:12]}'}/{run}"
        if anew:
            forget(self.storage, study)
        self.study = Study(
            self.storage,
            study,
            self._identity(name, problem),
            space=self.space,
            choices=self._choices(),
            owner=self.process,
            reward=self.reward,
            measure=self.scorer.score,
        )
        if self.study.rank:  # other processes work on this study: propose different networks
            problem = replace(problem, seed=derive(problem.seed, "process", self.study.rank))
        with self._watching(run, problem) as watch:
            found = run_strategy(
                problem, planned.propose, self.study, best=section.rescore, measure_more=self.scorer.score_more, watch=watch
            )
        self.scorer.known.update(found.scores)
        self.scorer.known_more.update(found.more)
        self._tell(run, found)
        return found

    def _choices(self) -> dict[str, list[float]]:
        """Return the ratios that a trial may record: the ratios of the space and of the single-point instances."""
        used = {1.0, *(ratio for ratios in self.space.ratios.values() for ratio in ratios), *self.recipe.ratios}
        return dict.fromkeys(self.recipe.model.points, sorted(used, reverse=True))

    def _identity(self, name: str, problem: "Problem") -> dict[str, Any]:
        """Return everything that a study's scores and proposals depend on, in the order in which studies are compared."""
        return {
            "checkpoint": self.checkpoint.short,
            "data": str(self.network.resolved.fingerprint)[:12],
            "points": ", ".join(self.space.points),
            "ratios": "; ".join(", ".join(f"{r:g}" for r in ratios) for ratios in self.space.ratios.values()),
            "budget": problem.budget,
            "strategy": name,
            "evaluations": problem.evaluations,
            "reward": self.reward_text,
            "seed": problem.seed,
            "search": self.key[:12],
        } | ({} if self.lowest is None else {"budget": f"{self.lowest}..{problem.budget}"})

    @contextmanager
    def _watching(self, run: str, problem: "Problem") -> "Iterator[Any]":
        """Show a strategy's progress: evaluations, the best network so far, and the remaining time."""
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
                        f"{self.tag}: interrupted after {shown} evaluations of {run}; they are kept, the same command "
                        "continues",
                    )

            yield watch

    def _say(self, instance: Instance, reward: float) -> str:
        unit = " %" if self.section.reward == "accuracy" else ""
        return f"{reward:.2f}{unit} at {100 * self.space.cost(instance) / self.space.full:.1f} %"

    def _tell(self, run: str, outcome: "Outcome") -> None:
        score = outcome.best[outcome.winner]
        share = 100 * self.space.cost(outcome.winner) / self.space.full
        self.context.report.note(
            f"{run}: {_networks(len(outcome.scores))} scored, {outcome.winner} at {share:.1f} % of the MACs has "
            f"{score.top1:.2f} % on {score.images:,} held-out images"
        )

    def _watched(self, batches: "Iterable[Batch]", **options: Any) -> "Iterable[Batch]":
        """Yield batches with a progress bar until a signal comes; see `timed`."""

        def stop(signum: int) -> None:
            raise RunInterruptedError(
                signum, f"{self.tag}: interrupted after all evaluations; they are kept, the same command continues"
            )

        return timed(self.interruption.between(batches, stop), **options)

    def tested(self, instances: list[Instance]) -> "dict[Instance, Score]":
        """Evaluate networks on the test split, with the same statistics that `calibrate-bn` would gather."""
        recipe, data, shared = self.recipe, self.shared.data, self.shared
        section, size = recipe.evaluate, recipe.evaluate.batch_size
        watched = partial(self._watched, tag=self.tag, context=self.context)
        total = data.calibration_batches(recipe.calibrate.batches, recipe.preparation)
        watch = partial(
            watched,
            total=-(-total // self.context.ranks.size),
            text=f"calibrating {counted(instances)}",
            images=total * recipe.preparation.batch_size,
        )
        statistics = shared.calibrate(instances, total, recipe.preparation, recipe.calibration, watch)
        images = min(data.test_size, size * (section.batches or data.test_size))
        watch = partial(
            watched, total=data.batches_to_score(images, size), text=f"evaluating {counted(instances)}", images=images
        )
        return shared.evaluate(instances, ("test", size, section.batches), statistics, recipe.evaluation, watch=watch)


def _networks(count: int) -> str:
    return f"{count} network{'' if count == 1 else 's'}"


def agent_of(ref: str, context: Context) -> Artifact:
    """Return the agent that `search.policy` names.

    Raises:
        NotFoundError: if the store has no such agent.
    """
    agent = context.store.resolve(ref)
    if agent.kind != AGENT_KIND.name:
        raise NotFoundError(
            f"search.policy={ref} is of kind {agent.kind}, not an agent; `sdpctl search TAG --strategy ppo --budgets 30%..90%` "
            "trains one"
        )
    return agent


def found_instances(search: Artifact, context: Context, points: Sequence[str]) -> list[Instance]:
    """Return the best instance that a search found, its Pareto front and `full`, without duplicates.

    Raises:
        InstanceError: if the search names a point that is not among `points`.
        NotFoundError: if the artifact is not a search.
    """
    if search.kind != SEARCH.name:
        called = search.tag or search.digest
        raise NotFoundError(f"{called} is of kind {search.kind}, not a search; `sdpctl search` makes one")
    result = read_document(context.store, search)
    rows = [result["best"], *result["pareto"], result["full"]]
    return named([row["instance"] for row in rows], points)
