"""What all runs of a search found together: every network scored, the winners beside each other, the Pareto front."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sdpctl.engine.cost import Costs
from sdpctl.engine.evaluate import Score
from sdpctl.instance import FULL, Instance, pareto_optimal
from sdpctl.search.problem import Problem
from sdpctl.search.run import Outcome, ranking
from sdpctl.uncertainty import choice_notes


@dataclass(frozen=True)
class TrialRow:
    """A network that was scored.

    Args:
        instance: text of the instance.
        macs: MACs of one image.
        runs: the runs that asked for it.
        reward: reward of its score on the first held-out images.
        top1: accuracy on the first held-out images, in per cent.
        top5: top-5 accuracy in the same form; None if there are fewer than six classes.
        loss: mean cross-entropy on the first held-out images.
    """

    instance: str
    macs: int
    runs: tuple[str, ...]
    reward: float
    top1: float
    top5: float | None
    loss: float

    def document(self) -> dict[str, Any]:
        """Return the row as a line of the trials holds it."""
        return asdict(self)


@dataclass(frozen=True)
class ScoreOnHeldout:
    """A network's score on held-out images: accuracy in per cent, and mean cross-entropy."""

    images: int
    top1: float
    loss: float


@dataclass(frozen=True)
class ScoreOnTest:
    """A network's score on the test split: accuracies in per cent, and mean cross-entropy."""

    images: int
    top1: float
    top5: float | None
    loss: float


@dataclass(frozen=True, kw_only=True)
class NetworkRow:
    """A network of the result.

    Args:
        instance: text of the instance.
        macs: MACs of one image.
        params: number of parameters.
        relative: MACs relative to `full`.
        heldout: score on all held-out images it was scored on.
        test: score on the test split; None for a network that did not win.
    """

    instance: str
    macs: int
    params: int
    relative: float
    heldout: ScoreOnHeldout
    test: ScoreOnTest | None

    def document(self) -> dict[str, Any]:
        """Return the row as plain data for the result; `test` is left out if there is no test score."""
        return {name: value for name, value in asdict(self).items() if name != "test" or value is not None}


@dataclass(frozen=True, kw_only=True)
class RunRow(NetworkRow):
    """The winner of one run.

    Args:
        run: name of the strategy, or `single-point`.
        seed: number of the seed, from 0.
        evaluations: number of networks that the run scored.
    """

    run: str
    seed: int
    evaluations: int


@dataclass(frozen=True, kw_only=True)
class BestRow(NetworkRow):
    """The best network of all runs.

    Args:
        runs: the runs that asked for it.
    """

    runs: tuple[str, ...]


@dataclass(frozen=True)
class BudgetRow:
    """The budget: the text a user wrote, and MACs; both None if there is no budget."""

    text: str | None
    macs: int | None


@dataclass(frozen=True)
class SpaceRow:
    """The searched space: its points, the number of its networks, and the MACs of the cheapest and of `full`."""

    points: tuple[str, ...]
    networks: int
    least: int
    full: int


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Args:
        budget: the budget that no network exceeds.
        space: the networks that were searched.
        reward: name of the reward.
        evaluations: number of networks scored by all runs together.
        runs: the winner of each run.
        full: the full network.
        best: the best network of all runs.
        pareto: the networks that no other network beats in both MACs and top-1, the cheapest first.
    """

    budget: BudgetRow
    space: SpaceRow
    reward: str
    evaluations: int
    runs: tuple[RunRow, ...]
    full: NetworkRow
    best: BestRow
    pareto: tuple[NetworkRow, ...]

    def document(self) -> dict[str, Any]:
        """Return the result as its layer holds it."""
        return {
            "budget": asdict(self.budget),
            "space": asdict(self.space),
            "reward": self.reward,
            "evaluations": self.evaluations,
            "runs": [row.document() for row in self.runs],
            "full": self.full.document(),
            "best": self.best.document(),
            "pareto": [row.document() for row in self.pareto],
        }


class Summary:
    """Joins the outcomes of all runs.

    Args:
        outcomes: result of each run, by the name of the strategy and the number of the seed.
        problem: the space and the budget that were searched.
        reward: returns the reward of a score.
        full: score of the full network on all held-out images; the full network may be beyond the budget.
    """

    def __init__(
        self,
        outcomes: Mapping[tuple[str, int], Outcome],
        problem: Problem,
        reward: Callable[[Instance, Score], float],
        full: Score,
    ) -> None:
        self.outcomes, self.problem, self.reward, self.full = outcomes, problem, reward, full
        self.scores: dict[Instance, Score] = {}
        """Score of every network on the first held-out images."""
        self.best_scores: dict[Instance, Score] = {}
        """Score of the best networks of each run on all held-out images."""
        self.runs: dict[Instance, list[str]] = {}
        """The runs that asked for each network."""
        for (name, number), outcome in outcomes.items():
            for instance, score in outcome.scores.items():
                self.scores.setdefault(instance, score)
                self.runs.setdefault(instance, []).append(f"{name}.{number}")
            self.best_scores |= outcome.best
        self.winners = list(dict.fromkeys([*(outcome.winner for outcome in outcomes.values()), FULL]))
        """The winner of each run, and `full`: the networks to evaluate on the test split."""
        self.best = min(self.best_scores.items(), key=ranking(problem, reward))[0]
        """The best network on all held-out images, whichever run found it."""

    def notes(self) -> list[str]:
        """Return notes on what makes the choice of the most accurate network uncertain."""
        best = self.best_scores[self.best]
        return choice_notes([score.top1 for score in self.best_scores.values()], best.top1, best.images)

    def trials(self) -> list[TrialRow]:
        """Return a row for each network that was scored."""
        cost = self.problem.space.cost
        return [
            TrialRow(
                instance=str(instance),
                macs=cost(instance),
                runs=tuple(self.runs[instance]),
                reward=self.reward(instance, score),
                top1=score.top1,
                top5=score.top5,
                loss=score.loss,
            )
            for instance, score in self.scores.items()
        ]

    def result(self, budget: str | None, reward: str, tested: Mapping[Instance, Score]) -> SearchResult:
        """Return the result.

        Args:
            budget: the budget as the user wrote it.
            reward: name of the reward.
            tested: scores of the winners on the test split.
        """
        space = self.problem.space
        known = {instance: self.best_scores.get(instance) or score for instance, score in self.scores.items()}
        front = pareto_optimal({instance: (space.cost(instance), score.top1) for instance, score in known.items()})
        return SearchResult(
            budget=BudgetRow(budget, self.problem.budget),
            space=SpaceRow(space.points, space.count(), space.least, space.full),
            reward=reward,
            evaluations=len(self.scores),
            runs=tuple(
                RunRow(run=name, seed=number, evaluations=len(outcome.scores), **self._facts(outcome.winner, tested))
                for (name, number), outcome in self.outcomes.items()
            ),
            full=NetworkRow(**self._facts(FULL, tested)),
            best=BestRow(runs=tuple(self.runs[self.best]), **self._facts(self.best, tested)),
            pareto=tuple(
                NetworkRow(**self._facts(instance, tested))
                for instance in sorted(front, key=lambda instance: (space.cost(instance), str(instance)))
            ),
        )

    def _facts(self, instance: Instance, tested: Mapping[Instance, Score]) -> dict[str, Any]:
        """Return the fields of a `NetworkRow`."""
        heldout = self.full if instance == FULL else self.best_scores.get(instance) or self.scores[instance]
        return network_facts(self.problem.space.costs, instance, heldout, tested.get(instance))


def network_facts(costs: Costs, instance: Instance, heldout: Score, test: Score | None) -> dict[str, Any]:
    """Return the fields of a `NetworkRow`.

    Args:
        costs: costs of the network's instances.
        instance: the instance.
        heldout: its score on all held-out images it was scored on.
        test: its score on the test split; None if it was not evaluated there.
    """
    cost, full = costs.of(instance), costs.of(FULL)
    return {
        "instance": str(instance),
        "macs": cost.macs,
        "params": cost.params,
        "relative": cost.macs / full.macs,
        "heldout": ScoreOnHeldout(heldout.images, heldout.top1, heldout.loss),
        "test": None if test is None else ScoreOnTest(test.images, test.top1, test.top5, test.loss),
    }
