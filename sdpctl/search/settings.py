"""The sections `search` and `cascade` of a recipe. Needs no torch."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from sdpctl.bounds import MOST
from sdpctl.engine.settings import Precision
from sdpctl.errors import shortened
from sdpctl.search.catalog import REWARDS, STRATEGIES
from sdpctl.section import MacsRange, MaxMacs, NameIn, Points, Section, each_once


def _ratio(value: object) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool) and not 0 < value <= 1:
        raise ValueError(f"a ratio is the size kept, above 0 and at most 1; got {value:g}")
    return value


def _one_and_smaller(ratios: tuple[float, ...]) -> tuple[float, ...]:
    if 1 not in ratios or len(ratios) < 2:
        raise ValueError(
            f"give 1 (no downsampling) and at least one smaller ratio, for example [1, 0.75, 0.5]; got "
            f"{shortened(str(list(ratios)), 200)}"
        )
    return ratios


def _without_password(storage: object) -> object:
    if isinstance(storage, str) and re.match(r"(?!sqlite)[^/:]+://([^@]*:.*@|.*password=)", storage):
        raise ValueError("a password does not belong here; leave it to the environment (PGPASSWORD, or SDPCTL_STORAGE)")
    return storage


StrategyName = Annotated[str, NameIn(STRATEGIES)]
RewardName = Annotated[str, NameIn(REWARDS)]
SearchRatios = Annotated[
    tuple[Annotated[float, BeforeValidator(_ratio)], ...],
    Field(max_length=100, json_schema_extra={"uniqueItems": True}),
    AfterValidator(each_once),
    AfterValidator(_one_and_smaller),
]


@dataclass(frozen=True, kw_only=True)
class AgentSettings(Section):
    """How the agents of the strategies `dqn`, `ppo` and `reinforce` learn.

    Args:
        reward: `terminal`, the reward of the network is that of the last step; `every-step`, every step of the walk has it.
        hidden: widths of the hidden layers of the policy.
        lr: learning rate of Adam.
        gamma: discount of the rewards of later steps.
        epsilon: of `dqn`: the least share of steps that explore; it begins at one half.
        entropy: of `ppo` and `reinforce`: weight of the entropy of the policy in the loss.
        warm_start: maximum number of networks near the budget that are scored first, for the agent to begin with.
        walks: number of walks that are scored in one pass.
        imagined: number of walks that a regression on the networks scored so far rewards, before each pass that the network
            itself scores; by default 0 for one budget, and 512 for a range of budgets.
    """

    reward: Literal["terminal", "every-step"] = "terminal"
    hidden: Annotated[tuple[Annotated[int, Field(ge=1, le=4096)], ...], Field(min_length=1, max_length=8)] = (64, 64)
    lr: Annotated[float, Field(gt=0, le=1)] = 1e-3
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    epsilon: Annotated[float, Field(ge=0, le=1)] = 0.2
    entropy: Annotated[float, Field(ge=0, le=10)] = 0.2
    warm_start: Annotated[int, Field(ge=1, le=10**6)] = 32
    walks: Annotated[int, Field(ge=1, le=1024)] = 8
    imagined: Annotated[int, Field(ge=0, le=10**7)] | None = None


@dataclass(frozen=True, kw_only=True)
class SearchSettings(Section):
    """An optional stage: find the best ratio for every point within a budget.

    Args:
        strategy: name of the strategy, which proposes the networks.
        compare: names of several strategies, which run one after another instead of `strategy` and share one table.
        seeds: number of runs per strategy.
        evaluations: maximum number of networks that each run of a strategy scores; with strategy `agent`, 0 takes the
            agent's first proposal.
        policy: of strategy `agent`: a trained agent, by tag or digest.
        agent: how the agents of `dqn`, `ppo` and `reinforce` learn.
        budgets: a range of budgets, such as 30%..90%: the strategy, `dqn`, `ppo` or `reinforce`, then trains an agent for all
            of them, which is kept.
        points: points that are searched; `all` stands for those of `sdpoint`.
        ratios: ratios to choose from at every point.
        ratios_at: different ratios at some points, by name of the point.
        max_macs: maximum cost of an image: a share of `full`, or a number of MACs such as 1.2G; or none.
        reward: `accuracy`, top-1; `amc`, -error * log(MACs); `branch`, top-1 less `weight` for each GMAC; or an expression of
            top1, top5, loss, macs, gmacs and relative (MACs as a share of `full`) with + - * / **, log, exp, sqrt, abs, min and
            max, such as top1 - 2 * gmacs. The network with the greatest reward wins.
        weight: of `branch`: percentage points of top-1 that one GMAC must bring.
        images: number of held-out images that score a network; at most half of all held-out images.
        calibration_batches: number of batches that calibrate a network before it is scored.
        rescore: number of a strategy's best networks that are scored on more images.
        rescore_images: maximum number of further held-out images that score these networks, besides `images`.
        precision: precision of scoring; that of `train` by default.
        storage: URL of an Optuna storage that processes and machines share; by default in the store; not part of a result.
        study: name of the study in the storage; not part of a result.
    """

    strategy: StrategyName = "surrogate"
    compare: tuple[StrategyName, ...] = ()
    seeds: Annotated[int, Field(ge=1, le=1000)] = 1
    evaluations: Annotated[int, Field(ge=0, le=10**6)] = 100
    policy: Annotated[str, Field(min_length=1)] | None = None
    agent: AgentSettings | None = None
    budgets: MacsRange | None = None
    points: Points = None
    ratios: SearchRatios = (1.0, 0.75, 0.5)
    ratios_at: dict[str, SearchRatios] = field(default_factory=dict)
    max_macs: MaxMacs = "50%"
    reward: RewardName = "accuracy"
    weight: Annotated[float, Field(ge=0, le=10**6)] = 1.0
    images: Annotated[int, Field(ge=1, le=MOST)] = 1000
    calibration_batches: Annotated[int, Field(ge=1, le=MOST)] = 4
    rescore: Annotated[int, Field(ge=1, le=10**6)] = 8
    rescore_images: Annotated[int, Field(ge=1, le=MOST)] = 3000
    precision: Precision | None = None
    storage: Annotated[str | None, BeforeValidator(_without_password)] = None
    study: Annotated[str, Field(min_length=1)] | None = None

    @property
    def strategies(self) -> tuple[str, ...]:
        """The strategies that the user asks for."""
        return self.compare or (self.strategy,)


@dataclass(frozen=True, kw_only=True)
class CascadeSettings(Section):
    """An optional stage: choose the members and thresholds of a cascade within a budget of mean MACs.

    Args:
        max_macs: maximum mean cost of an image: a share of `full`, or a number of MACs such as 1.2G; or none.
        members: maximum number of members.
        averaged: whether the answer of a member is the mean of its probabilities and those of all members before it; `auto`
            chooses what is more accurate.
        instances: the instances that may be members, besides `full`; all calibrated instances by default.
        images: maximum number of held-out images to choose by.
    """

    max_macs: MaxMacs = "50%"
    members: Annotated[int, Field(ge=2, le=3)] = 3
    averaged: bool | Literal["auto"] = "auto"
    instances: Annotated[tuple[str, ...] | None, Field(min_length=1), AfterValidator(each_once)] = None
    images: Annotated[int, Field(ge=1, le=MOST)] = 10_000
