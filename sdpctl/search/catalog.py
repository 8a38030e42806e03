"""The strategies of a search as plain data. Importing this module needs no torch."""

from dataclasses import dataclass

from sdpctl.table import Table


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
