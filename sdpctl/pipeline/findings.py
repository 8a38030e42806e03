"""What a search found: every network it scored, the winners beside each other, the Pareto front."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sdpctl.errors import NotFoundError
from sdpctl.instance import FULL, Instance, pareto_optimal
from sdpctl.pipeline.context import Context
from sdpctl.pipeline.instances import Row, cost_rows, document
from sdpctl.pipeline.ties import doubts

if TYPE_CHECKING:
    from sdpctl.engine.evaluate import Score
    from sdpctl.search.problem import Problem
    from sdpctl.search.scoring import Scorer
    from sdpctl.search.search import Outcome


class Findings:
    """What all runs of a search found together.

    Args:
        outcomes: of each run, by strategy and seed.
        problem: what was searched.
        reward: of a score.
        scorer: scores `full`, which may be beyond the budget.
    """

    def __init__(
        self,
        outcomes: "Mapping[tuple[str, int], Outcome]",
        problem: "Problem",
        reward: "Callable[[Instance, Score], float]",
        scorer: "Scorer",
    ) -> None:
        from sdpctl.search.scoring import pooled

        self.outcomes, self.problem, self.reward = outcomes, problem, reward
        self.scores: dict[Instance, Score] = {}
        self.again: dict[Instance, Score] = {}
        self.runs: dict[Instance, list[str]] = {}
        for (name, k), outcome in outcomes.items():
            for instance, score in outcome.scores.items():
                self.scores.setdefault(instance, score)
                self.runs.setdefault(instance, []).append(f"{name}.{k}")
            self.again |= outcome.best
        self.full = pooled(scorer.score([FULL])[FULL], scorer.score_more([FULL])[FULL])
        self.winners = list(dict.fromkeys([*(outcome.winner for outcome in outcomes.values()), FULL]))
        """The winner of each run, and `full`: what is evaluated on the test split."""

    def _rows(self, instances: list[Instance], tested: "Mapping[Instance, Score]") -> list[Row]:
        costs = {instance: self.problem.space.costs.of(instance) for instance in {FULL, *instances}}
        rows = cost_rows(costs, instances)
        for instance, row in zip(instances, rows, strict=True):
            score = self.full if instance == FULL else self.again.get(instance) or self.scores[instance]
            row["heldout"] = {"images": score.images, "top1": score.top1, "loss": score.loss}
            if instance in tested:
                test = tested[instance]
                row["test"] = {"images": test.images, "top1": test.top1, "top5": test.top5, "loss": test.loss}
        return rows

    def _best(self) -> Instance:
        """Return the best of all, chosen on the larger number of images, whichever run found it: all of them are paid for."""
        from sdpctl.search.search import ranking

        return min(self.again.items(), key=ranking(self.problem, self.reward))[0]

    def doubts(self) -> list[str]:
        """Return what makes the choice of the most accurate uncertain, in lines."""
        best = self.again[self._best()]
        return doubts([score.top1 for score in self.again.values()], best.top1, best.images)

    def trials(self) -> list[Row]:
        """Return a record for each network that was scored, with the runs that asked for it."""
        cost = self.problem.space.cost
        return [
            {"instance": str(instance), "macs": cost(instance), "runs": self.runs[instance]}
            | {"reward": self.reward(instance, score), "top1": score.top1, "top5": score.top5, "loss": score.loss}
            for instance, score in self.scores.items()
        ]

    def result(self, budget: str | None, reward: str, tested: "Mapping[Instance, Score]") -> dict[str, Any]:
        """Return the result.

        Args:
            budget: as it was asked for.
            reward: its name.
            tested: scores of the winners on the test split.
        """
        space = self.problem.space
        runs = [
            {"run": name, "seed": k, "evaluations": len(outcome.scores)} | row
            for ((name, k), outcome), row in zip(
                self.outcomes.items(), self._rows([outcome.winner for outcome in self.outcomes.values()], tested), strict=True
            )
        ]
        best = self._best()
        known = {instance: self.again.get(instance) or score for instance, score in self.scores.items()}
        front = pareto_optimal({instance: (space.cost(instance), score.top1) for instance, score in known.items()})
        return {
            "budget": {"text": budget, "macs": self.problem.budget},
            "space": {
                "points": list(space.points),
                "networks": space.count(),
                "least": space.least,
                "full": space.full,
            },
            "reward": reward,
            "evaluations": len(self.scores),
            "runs": runs,
            "full": self._rows([FULL], tested)[0],
            "best": self._rows([best], tested)[0] | {"runs": self.runs[best]},
            "pareto": self._rows(sorted(front, key=lambda instance: (space.cost(instance), str(instance))), tested),
        }


def found_instances(ref: str, context: Context) -> list[str]:
    """Return the best network of a search, its Pareto front and `full`.

    Raises:
        NotFoundError: where the reference is no search.
    """
    artifact = context.store.resolve(ref)
    if artifact.kind != "search":
        raise NotFoundError(f"{ref} is of kind {artifact.kind}, no search; `sdpctl search` makes one")
    result = document(artifact, context)
    rows = [result["best"], *result["pareto"], result["full"]]
    return list(dict.fromkeys(row["instance"] for row in rows))
