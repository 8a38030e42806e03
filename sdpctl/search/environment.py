"""The search as an environment: one step a point, from the first to the last.

An observation is a float32 vector, every entry in [0, 1]:

    index              points passed / points
    channels           of the map that waits there / the most channels of any such map of the full network
    height, width      of it / those of an image
    kernel             longest kernel side of the layers up to the next point / the longest of all
    kernels            how many kernels (output channels) they have / the most between two points
    stride             by how much they shrink a side / the most between two points
    segment MACs       of the layers just passed, those since the point before / MACs of `full`
    spent MACs         so far / MACs of `full`
    most MACs          still to come where nothing shrinks any more / MACs of `full`
    least MACs         still to come where everything shrinks as far as it can / MACs of `full`
    left MACs          of the budget / MACs of `full`, at most 1
    decisions          one entry a point: the ratio taken there, 0 before that

An action is an index into the ratios of the point, the largest first. The episode ends after the last point, and only then
is there a reward: that of the network as a whole (He et al. 2018, AMC, section 3.2).
"""

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from sdpctl.instance import Instance
from sdpctl.search.space import Space

FACTS = 12
"""Entries of an observation before the decisions."""

Observation = NDArray[np.float32]
Reward = Callable[[Sequence[Instance]], Sequence[float]]
"""Scores networks, all in one pass."""


class Walk:
    """One way through a space, within a budget.

    Args:
        space: to walk through.
        budget: MACs that are not to be exceeded.

    Raises:
        BudgetError: where no network is within the budget.
    """

    def __init__(self, space: Space, budget: int) -> None:
        space.require(budget)
        self.space, self.budget = space, budget
        self.actions = max(len(ratios) for ratios in space.ratios.values())
        """How many actions there are; a point with fewer ratios allows the first few."""
        channels, shape = [], space.start[1]
        for number in range(len(space.points)):
            shape = space.choices(number, shape)[0]
            channels.append(shape.maps[0][0])
            _, shape = space.leg(number + 1, shape)
        self._channels = max(channels)
        self._kernel = max(layers.kernel for layers in space.layers)
        self._kernels = max(layers.kernels for layers in space.layers)
        self._stride = max(layers.stride for layers in space.layers)
        self.reset()

    def reset(self) -> None:
        """Go back to the first point."""
        self.number = 0
        self.segment, self.shape = self.space.start
        self.spent = self.segment
        self.taken: list[float] = []

    @property
    def done(self) -> bool:
        """Whether every point has been passed."""
        return self.number == len(self.space.points)

    @property
    def instance(self) -> Instance:
        """The network decided on."""
        return self.space.canonical(Instance(tuple(zip(self.space.points, self.taken, strict=False))))

    def mask(self) -> NDArray[np.bool_]:
        """Say for each action whether the budget can still be met after it; after the last point all are the same."""
        mask = np.zeros(self.actions, dtype=np.bool_)
        if self.done:
            mask[:] = True
        else:
            allowed = self.space.allowed(self.number, self.shape, self.spent, self.budget)
            mask[: len(allowed)] = allowed
        return mask

    def take(self, action: int) -> int:
        """Take an action, or the nearest that is allowed, and go on to the next point.

        Returns:
            The action taken.
        """
        mask = self.mask()
        action = min(np.flatnonzero(mask).tolist(), key=lambda other: (abs(other - action), other))
        self.taken.append(self.space.ratios[self.space.points[self.number]][action])
        handed_on = self.space.choices(self.number, self.shape)[action]
        self.number += 1
        self.segment, self.shape = self.space.leg(self.number, handed_on)
        self.spent += self.segment
        return action

    def observation(self) -> Observation:
        """Return what is known here."""
        space, full = self.space, self.space.full
        observation = np.zeros(FACTS + len(space.points), dtype=np.float32)
        observation[0] = self.number / len(space.points)
        least = most = 0
        if not self.done:
            channels, height, width = space.choices(self.number, self.shape)[0].maps[0]
            ahead = space.layers[self.number + 1]
            observation[1] = channels / self._channels
            _, image_height, image_width = space.costs.image_shape.maps[0]
            observation[2:4] = height / image_height, width / image_width
            observation[4:7] = ahead.kernel / self._kernel, ahead.kernels / self._kernels, ahead.stride / self._stride
            least, most = space.bounds(self.number, self.shape)
        left = min(full, max(0, self.budget - self.spent))
        observation[7:FACTS] = np.array([self.segment, self.spent, most, least, left]) / full
        observation[FACTS : FACTS + len(self.taken)] = self.taken
        return observation.clip(0, 1)

    def info(self, proposed: int, taken: int) -> dict[str, Any]:
        """Return what an agent may want to know of the step just done."""
        info: dict[str, Any] = {"proposed": proposed, "taken": taken}
        return info | {"instance": str(self.instance), "macs": self.spent} if self.done else info


def observation_space(space: Space) -> spaces.Space[Observation]:
    """Return the observations' space."""
    box: spaces.Space[Any] = spaces.Box(0.0, 1.0, (FACTS + len(space.points),), np.float32)
    return box


class SearchEnv(gymnasium.Env[Observation, np.int64]):
    """One walk as a Gymnasium environment.

    `action_masks()` says which actions the budget allows; where another is given, the nearest allowed one is taken instead.
    `info` holds the action `proposed`, the one `taken`, and at the end the `instance` and its `macs`.

    Args:
        space: to walk through.
        budget: MACs that are not to be exceeded.
        reward: of finished networks.

    Raises:
        BudgetError: where no network is within the budget.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  Gymnasium's declaration

    def __init__(self, space: Space, budget: int, reward: Reward) -> None:
        self.walk = Walk(space, budget)
        self.reward = reward
        self.observation_space = observation_space(space)
        self.action_space = spaces.Discrete(self.walk.actions)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """Begin a walk."""
        super().reset(seed=seed, options=options)
        self.walk.reset()
        return self.walk.observation(), {}

    def step(self, action: np.int64 | int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Decide on the ratio of one point."""
        taken = self.walk.take(int(action))
        done = self.walk.done
        reward = float(self.reward([self.walk.instance])[0]) if done else 0.0
        return self.walk.observation(), reward, done, False, self.walk.info(int(action), taken)

    def action_masks(self) -> NDArray[np.bool_]:
        """Return which actions the budget allows here."""
        return self.walk.mask()
