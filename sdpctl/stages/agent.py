"""The training of an agent that answers every budget of a range."""

from typing import TYPE_CHECKING, Any

from sdpctl.errors import UsageError
from sdpctl.instance import FULL
from sdpctl.kinds import AGENT, AGENT_DOCUMENT, CURVE, POLICY, RECIPE, ROLLOUTS, TRIALS
from sdpctl.recipe.schema import Recipe
from sdpctl.stages.context import Context
from sdpctl.stages.layers import lines
from sdpctl.stages.network import TrainedNetwork, recipe_layer
from sdpctl.stages.search import Searching, SearchSpace, SearchStage
from sdpctl.stages.stage import Made
from sdpctl.store.layout import canonical

if TYPE_CHECKING:
    from sdpctl.search.agents import Learned
    from sdpctl.search.problem import Evaluations

STEP = 0.05
"""Share of the MACs of `full` between the budgets whose networks the table shows."""


class TrainAgent(SearchStage):
    """Train an agent that proposes a network for every budget of a range.

    Raises:
        UsageError: also if points have different ratios.
    """

    kind = AGENT

    @classmethod
    def of(cls, network: TrainedNetwork) -> "TrainAgent | None":
        """Return the stage if a network's recipe has a range of budgets."""
        section = network.recipe.search
        return None if section is None or section.budgets is None else cls(network)

    @property
    def searching(self) -> type[Searching]:
        """The class that does the work."""
        return _Training

    def complete(self, parts: dict[str, Any], recipe: Recipe) -> None:  # noqa: ARG002
        """Remove the budget of a search, which the agent does not know."""
        parts["search"].pop("max_macs")

    def task(self, context: Context) -> str:
        """Return the size of the space, the budgets and the strategy."""
        return f"train an agent on {SearchSpace(self.network.with_data(context), context).description()}"


class _Training(Searching):
    """One training of an agent on a checkpoint."""

    def finish(self, *, anew: bool) -> Made:
        """Train the agent, and evaluate what it proposes."""
        from sdpctl.engine.tensors import tensors_to_bytes
        from sdpctl.search.agents import learn
        from sdpctl.search.kept import Agent, described, rollouts
        from sdpctl.search.problem import Problem
        from sdpctl.search.run import Run
        from sdpctl.search.summary import NetworkRow, Summary, network_facts

        (name,), (problem,), space = self.strategies, self.problems, self.space
        if len(set(space.ratios.values())) > 1:
            raise UsageError(f"{self.tag}: an agent chooses among the same ratios at every point; remove search.ratios_at")
        found: list[Learned] = []

        def propose(problem: Problem, score: "Evaluations") -> None:
            found.append(learn(name, problem, score))

        with self.scoring(f"training an agent on {self.description()}"):
            outcome = self.outcome(Run(name, 0, problem, propose), anew=anew)
        (learned,) = found
        budgets = self._budgets()
        ratios = next(iter(space.ratios.values()))
        rewards = {instance: self.reward(instance, score) for instance, score in outcome.scores.items()}
        agent = Agent(learned.policy, ratios, rewards)
        proposed = [agent.first(Problem(space, budget, 1, problem.seed)) for budget in budgets]
        different = list(dict.fromkeys([*proposed, FULL]))
        scores, tested = self.scorer.score_on_all(different), self.tested(different)
        rows = {
            instance: NetworkRow(**network_facts(space.costs, instance, scores[instance], tested[instance])).document()
            for instance in different
        }
        document: dict[str, Any] = {
            "policy": described(learned.policy.shaped),
            "ratios": list(ratios),
            "strategy": name,
            "reward": self.reward_text,
            "budgets": {"text": self.section.budgets, "lowest": budgets[0], "highest": budgets[-1]},
            "evaluations": len(outcome.scores),
            "space": {"points": list(space.points), "networks": space.count(), "least": space.least, "full": space.full},
            "proposals": [{"budget": budget, **rows[one]} for budget, one in zip(budgets, proposed, strict=True)],
            "full": rows[FULL],
        }
        trials = Summary({(name, 0): outcome}, problem, self.reward, scores[FULL]).trials()
        layers = {
            AGENT_DOCUMENT: canonical(document),
            POLICY: tensors_to_bytes(learned.policy.weights),
            ROLLOUTS: tensors_to_bytes(rollouts(space, learned.walks)),
            TRIALS: lines(row.document() for row in trials),
            CURVE: lines(learned.curve),
            RECIPE: recipe_layer(self.network.resolved),
        }
        return Made(layers, f"learned from {len(outcome.scores)} networks")

    def _budgets(self) -> list[int]:
        """Return budgets from the lowest to the highest of the range, in equal steps."""
        assert self.budget is not None
        assert self.lowest is not None
        lowest, span = max(self.lowest, self.space.least), self.budget - max(self.lowest, self.space.least)
        steps = max(1, round(span / (STEP * self.space.full)))
        return [lowest + span * number // steps for number in range(steps + 1)]
