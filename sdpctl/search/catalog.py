"""The strategies and the rewards of a search as plain data. Importing this module needs no torch."""

from dataclasses import dataclass

from sdpctl.bounds import TOP5_MIN_CLASSES
from sdpctl.errors import UsageError
from sdpctl.search.rewards import COSTS, Expression, Facts, Reward
from sdpctl.table import Table, load


@dataclass(frozen=True, kw_only=True)
class StrategyInfo:
    """A strategy, which proposes the networks of a search.

    Args:
        name: name of the strategy in recipes.
        summary: what the strategy proposes, in a few words.
        code: `module:function`; the function takes a `Problem` and its `Evaluations`.
        scores_all: whether it scores every network within the budget, whatever the number of evaluations.
        learns: whether it trains an agent, which can learn a range of budgets and be kept.
    """

    name: str
    summary: str
    code: str
    scores_all: bool = False
    learns: bool = False


BASELINE = "random"
"""The strategy that every search also runs, for comparison."""

AGENT = "agent"
"""The strategy that takes the proposals of an agent trained before."""

EXHAUSTIVE = "exhaustive"
"""The strategy that replaces the chosen one if there are few networks within the budget."""

SINGLE_POINT = "single-point"
"""Name of the run that scores the SDPoint instances; no strategy has this name."""

STRATEGIES = Table(
    "strategy",
    [
        StrategyInfo(
            name="surrogate",
            summary="Thompson sampling from a Bayesian ridge regression",
            code="sdpctl.search.strategies:surrogate",
        ),
        StrategyInfo(
            name="dqn",
            summary="a DQN agent that walks the network and chooses a ratio at each point",
            code="sdpctl.search.agents:dqn",
            learns=True,
        ),
        StrategyInfo(
            name="ppo",
            summary="a PPO agent that walks the network and chooses among the ratios that the budget allows",
            code="sdpctl.search.agents:ppo",
            learns=True,
        ),
        StrategyInfo(
            name="reinforce",
            summary="a REINFORCE agent that walks the network, with a learned baseline",
            code="sdpctl.search.agents:reinforce",
            learns=True,
        ),
        StrategyInfo(
            name=AGENT,
            summary="the proposals of a trained agent, which `search.policy` names",
            code="sdpctl.search.strategies:agent",
        ),
        StrategyInfo(
            name=BASELINE,
            summary="random networks near the budget; the baseline of every search",
            code="sdpctl.search.strategies:random",
        ),
        StrategyInfo(
            name="uniform",
            summary="random walks that take any ratio the budget allows",
            code="sdpctl.search.strategies:uniform",
        ),
        StrategyInfo(
            name="tpe",
            summary="Optuna's tree-structured Parzen estimator",
            code="sdpctl.search.strategies:tpe",
        ),
        StrategyInfo(
            name="nsga2",
            summary="Optuna's evolutionary sampler NSGA-II",
            code="sdpctl.search.strategies:nsga2",
        ),
        StrategyInfo(
            name="greedy",
            summary="neighbours of the best network found so far",
            code="sdpctl.search.strategies:greedy",
        ),
        StrategyInfo(
            name=EXHAUSTIVE,
            summary="every network within the budget; used automatically if there are few",
            code="sdpctl.search.strategies:exhaustive",
            scores_all=True,
        ),
    ],
)


@dataclass(frozen=True, kw_only=True)
class RewardInfo:
    """A reward, by which a search compares networks.

    Args:
        name: name of the reward in recipes.
        summary: what the reward is, in a few words.
        code: `module:function`; the function takes the `Facts` of a network and `search.weight`.
        uses: the fields of `Facts` that the reward depends on.
    """

    name: str
    summary: str
    code: str
    uses: frozenset[str]

    @property
    def function(self) -> Reward:
        """The reward itself."""
        reward: Reward = load(self.code)
        return reward

    @property
    def weighs_costs(self) -> bool:
        """Whether the reward depends on the cost of a network, so that a search needs no budget."""
        return not self.uses.isdisjoint(COSTS)

    def refused(self, classes: int | None) -> str | None:
        """Return why the reward cannot be computed for a number of classes, if it is known; None if it can."""
        if "top5" not in self.uses or classes is None or classes >= TOP5_MIN_CLASSES:
            return None
        return f"top5 needs at least {TOP5_MIN_CLASSES} classes, and there are {classes}; use top1"


@dataclass(frozen=True, kw_only=True)
class ExpressionInfo(RewardInfo):
    """A reward that is written as an expression, which is its name."""

    @property
    def function(self) -> Reward:
        """The expression."""
        return Expression(self.name)


class Rewards(Table[RewardInfo]):
    """The named rewards, which an iteration yields, and expressions, which are found by their text."""

    pattern = "|".join(Facts._fields)

    def __getitem__(self, name: str) -> RewardInfo:
        if name in tuple(self):
            return super().__getitem__(name)
        try:
            uses = Expression(name).names
        except UsageError:
            raise KeyError(name) from None
        return ExpressionInfo(name=name, summary="an expression", code="", uses=uses)

    def unknown(self, name: str) -> str:
        """Return the message for a text that is neither the name of a reward nor an expression."""
        if name.isidentifier():
            return f"{super().unknown(name)}, or write an expression such as top1 - 2 * gmacs"
        try:
            raise AssertionError(f"{Expression(name).text} is a reward")
        except UsageError as error:
            return f"{error}; the named rewards are {', '.join(self)}"


REWARDS = Rewards(
    "reward",
    [
        RewardInfo(
            name="accuracy",
            summary="top-1 within the budget",
            code="sdpctl.search.rewards:accuracy",
            uses=frozenset({"top1"}),
        ),
        RewardInfo(
            name="amc",
            summary="-error * log(MACs)",
            code="sdpctl.search.rewards:amc",
            uses=frozenset({"top1", "macs"}),
        ),
        RewardInfo(
            name="branch",
            summary="top-1 less `weight` for each GMAC",
            code="sdpctl.search.rewards:branch",
            uses=frozenset({"top1", "macs"}),
        ),
    ],
)
