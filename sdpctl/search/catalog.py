"""The strategies of a search, as plain data. Needs no torch."""

from dataclasses import dataclass

from sdpctl.table import Table


@dataclass(frozen=True, kw_only=True)
class StrategyInfo:
    """What proposes the networks of a search.

    Args:
        name: what a recipe calls it.
        code: `module:function`; the function takes a `Problem` and its `Evaluations`.
    """

    name: str
    code: str


STRATEGIES = Table(
    "strategy",
    [
        StrategyInfo(name="surrogate", code="sdpctl.search.strategies:surrogate"),
        StrategyInfo(name="dqn", code="sdpctl.search.agents:dqn"),
        StrategyInfo(name="ppo", code="sdpctl.search.agents:ppo"),
        StrategyInfo(name="random", code="sdpctl.search.strategies:random"),
        StrategyInfo(name="uniform", code="sdpctl.search.strategies:uniform"),
        StrategyInfo(name="tpe", code="sdpctl.search.strategies:tpe"),
        StrategyInfo(name="nsga2", code="sdpctl.search.strategies:nsga2"),
        StrategyInfo(name="greedy", code="sdpctl.search.strategies:greedy"),
        StrategyInfo(name="exhaustive", code="sdpctl.search.strategies:exhaustive"),
    ],
)
