"""The search as an environment: one step per point, from the first point to the last, under a budget that each episode draws.

An observation describes the point, the layers that follow and the budget. It has the same length for all networks, so that an
agent can walk a network that it was not trained on. `README.md` beside this module explains every entry. An action is an index
into the ratios of the point, the largest first. The episode ends after the last point, and the only reward comes at its end:
the reward of the whole network (He et al. 2018, AMC, section 3.2).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from sdpctl.instance import Instance
from sdpctl.search.space import Position, Space

SIDES = (1, 3, 5)
"""Upper limits of the bins of kernel sides; the last bin has all longer sides."""

CHANNELS = (16, 32, 64, 128, 256, 512)
"""Upper limits of the bins of output channels; the last bin has all larger numbers."""

QUARTERS = 4
"""Number of equal parts of the walk whose MACs are told apart."""

RECENT = 4
"""Number of the last decisions whose mean ratio is an entry."""

WAVES = (1, 2, 4)
"""Numbers of waves along a walk; the sines and cosines of the position tell near points apart (Vaswani et al. 2017)."""

ENTRIES = (
    "passed",
    *(f"{kind} {waves}" for waves in WAVES for kind in ("sine", "cosine")),
    "points left",
    "previous MACs",
    "channels",
    "height",
    "width",
    "kernel",
    "stride",
    "next MACs",
    "layers left",
    *(f"kernels up to {side}" for side in SIDES),
    "longer kernels",
    *(f"up to {channels} channels" for channels in CHANNELS),
    "more channels",
    *(f"MACs of quarter {number + 1}" for number in range(QUARTERS)),
    "spent MACs",
    "most MACs",
    "least MACs",
    "budget",
    "left MACs",
    "slack",
    "size",
    "last ratio",
    "recent ratio",
    "mean ratio",
    "smallest ratio",
    "lowered",
)
"""The names of the entries of an observation."""

DECIDED = len(ENTRIES) - ENTRIES.index("spent MACs")
"""Number of entries, at the end, that depend on the budget and on what the walk has decided."""

Observation = NDArray[np.float32]
Reward = Callable[[Sequence[Instance]], Sequence[float]]
"""Returns the rewards of networks, which are scored in one pass."""


@dataclass(frozen=True)
class Budgets:
    """The range from which each episode draws its budget, uniformly, in MACs of one image."""

    lowest: int
    highest: int

    def __post_init__(self) -> None:
        if self.lowest > self.highest:
            raise ValueError(f"the lowest budget, {self.lowest:,} MACs, is above the highest, {self.highest:,}")

    def draw(self, space: Space, random: np.random.Generator) -> int:
        """Draw a budget that a network of a space can meet.

        Raises:
            BudgetError: if no network is within the highest budget.
        """
        space.require(self.highest)
        return int(random.integers(max(self.lowest, space.least), self.highest, endpoint=True))


class Walk:
    """A walk through a space, which chooses a ratio at each point and stays within a budget.

    Args:
        space: the space of networks.
        budget: maximum MACs of the network.

    Raises:
        BudgetError: if no network is within the budget.
    """

    def __init__(self, space: Space, budget: int) -> None:
        space.require(budget)
        self.space, self.budget = space, budget
        self.position = space.start
        self.spent = space.start.macs
        """MACs of all layers so far."""
        self.proposed: list[int] = []
        self.actions: list[int] = []
        """The actions taken, in place of those proposed."""
        self.ratios: list[float] = []
        """The ratios taken."""
        self._choices: list[tuple[str, float]] = []

    @property
    def done(self) -> bool:
        """Whether every point has been passed."""
        return not self.position.onward

    @property
    def instance(self) -> Instance:
        """The network chosen so far, in canonical form."""
        return Instance(tuple(self._choices))

    def mask(self) -> NDArray[np.bool_]:
        """Return for each action whether the budget can still be met after it; after the last point, all are allowed."""
        mask = np.full(self.space.actions, self.done)
        for action, after in enumerate(self.position.onward):
            mask[action] = self.spent + after.macs + after.least <= self.budget
        return mask

    def take(self, action: int) -> None:
        """Take an action, or the nearest allowed one, and move to the next point."""
        self.proposed.append(action)
        action = min(np.flatnonzero(self.mask()).tolist(), key=lambda other: (abs(other - action), other))
        point, after = self.space.points[self.position.number], self.position.onward[action]
        self.actions.append(action)
        self.ratios.append(self.space.ratios[point][action])
        self._choices.append((point, self.space.ratios[point][self.position.onward.index(after)]))
        self.position = after
        self.spent += after.macs

    def info(self) -> dict[str, Any]:
        """Return the `info` of the step just taken."""
        info: dict[str, Any] = {"proposed": self.proposed[-1], "taken": self.actions[-1]}
        return info | {"instance": str(self.instance), "macs": self.spent} if self.done else info


class Observer:
    """Makes the observations of all walks through a space; what depends on the point alone is computed once.

    Args:
        space: the space of networks.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self._positions: dict[Position, Observation] = {}
        layers = space.layers
        self._following = [
            ([side for part in layers[n + 1 :] for side in part.sides], [c for part in layers[n + 1 :] for c in part.channels])
            for n in range(len(layers))
        ]
        self._count = sum(len(part.sides) for part in layers)

    def look(self, walk: Walk) -> Observation:
        """Return the observation at the current position of a walk, with one entry for each of `ENTRIES`."""
        position, full = walk.position, self.space.full
        left = walk.budget - walk.spent
        free = position.most - position.least
        ratios = walk.ratios or [1.0]
        entries = [
            walk.spent / full,
            position.most / full,
            position.least / full,
            walk.budget / full,
            left / full,
            (left - position.least) / free if free else 1.0,
            math.prod(ratios),
            ratios[-1],
            fmean(ratios[-RECENT:]),
            fmean(ratios),
            min(ratios),
            sum(ratio < 1 for ratio in ratios) / len(ratios),
        ]
        if position not in self._positions:
            self._positions[position] = np.array(self._around(position), dtype=np.float32)
        observation: Observation = np.concatenate([self._positions[position], np.array(entries, dtype=np.float32)]).clip(0, 1)
        return observation

    def _around(self, position: Position) -> list[float]:
        """Return the entries that depend on the position alone."""
        space, number = self.space, position.number
        passed = number / len(space.points)
        angles = [2 * math.pi * waves * passed for waves in WAVES]
        waves = [(1 + wave(angle)) / 2 for angle in angles for wave in (math.sin, math.cos)]
        entries = [passed, *waves, math.log2(1 + len(space.points) - number) / 10, position.macs / space.full]
        if not position.onward:
            return entries + [0.0] * (len(ENTRIES) - DECIDED - len(entries))
        channels, height, width = position.map
        _, image_height, image_width = space.costs.image_shape.maps[0]
        ahead = [position.onward[0]]  # the positions that follow if nothing shrinks
        while ahead[-1].onward:
            ahead.append(ahead[-1].onward[0])
        stride = height / ahead[0].map[1] if ahead[0].map else 1.0
        sides, following = self._following[number]
        quarters = [0.0] * QUARTERS
        for after in ahead:
            quarters[QUARTERS * after.number // (len(space.points) + 1)] += after.macs / space.full
        return [
            *entries,
            math.log2(channels) / 12,
            height / image_height,
            width / image_width,
            math.log2(space.layers[number + 1].kernel) / 5,
            math.log2(stride) / 5,
            ahead[0].macs / space.full,
            len(sides) / self._count,
            *_shares(sides, SIDES),
            *_shares(following, CHANNELS),
            *quarters,
        ]


def _shares(values: Sequence[int], limits: Sequence[int]) -> list[float]:
    """Return the share of the values in each bin, given the bins' upper limits; the last bin has all larger values."""
    if not values:
        return [0.0] * (len(limits) + 1)
    places = np.searchsorted(limits, values)
    shares: list[float] = (np.bincount(places, minlength=len(limits) + 1) / len(values)).tolist()
    return shares


def observation_space() -> spaces.Space[Observation]:
    """Return the space of the observations."""
    box: spaces.Space[Any] = spaces.Box(0.0, 1.0, (len(ENTRIES),), np.float32)
    return box


NAME = "sdpctl/Search-v0"
"""Name by which Gymnasium makes the environment, once this module is imported."""


class SearchEnv(gymnasium.Env[Observation, np.int64]):
    """One walk as a Gymnasium environment.

    `action_masks()` says which actions the budget allows; a different action is replaced by the nearest allowed one.
    `info` holds the action `proposed`, the action `taken`, and at the end the `instance` and its `macs`.

    Args:
        space: the space of networks.
        budgets: the maximum MACs of a network, or the range from which each episode draws it; `reset(options={"budget": MACs})`
            gives it for one episode.
        reward: returns the rewards of finished networks.

    Raises:
        BudgetError: if no network is within the budget.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  Gymnasium's declaration

    def __init__(self, space: Space, budgets: Budgets | int, reward: Reward) -> None:
        self.space = space
        self.budgets = budgets if isinstance(budgets, Budgets) else Budgets(budgets, budgets)
        self.reward = reward
        self.observer = Observer(space)
        self.walk = Walk(space, self.budgets.highest)
        self.observation_space = observation_space()
        self.action_space = spaces.Discrete(space.actions)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """Begin a new walk."""
        super().reset(seed=seed, options=options)
        given = None if options is None else options.get("budget")
        self.walk = Walk(self.space, self.budgets.draw(self.space, self.np_random) if given is None else int(given))
        return self.observer.look(self.walk), {"budget": self.walk.budget}

    def step(self, action: np.int64 | int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Choose the ratio of one point."""
        self.walk.take(int(action))
        done = self.walk.done
        reward = float(self.reward([self.walk.instance])[0]) if done else 0.0
        return self.observer.look(self.walk), reward, done, False, self.walk.info()

    def action_masks(self) -> NDArray[np.bool_]:
        """Return for each action whether the budget allows it at this point."""
        return self.walk.mask()


gymnasium.register(NAME, entry_point=f"{__name__}:SearchEnv")
