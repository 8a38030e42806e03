"""The search as an environment: one step per point, from the first point to the last.

An observation is a float32 vector whose entries are in [0, 1]:

    index              points passed / number of points
    channels           channels of the map at the point / maximum over all points of the full network
    height, width      size of that map / size of an image
    kernel             longest kernel side of the layers up to the next point / longest of all layers
    kernels            output channels of these layers / maximum between two points
    stride             product of their strides / maximum between two points
    segment MACs       MACs of the layers since the previous point / MACs of `full`
    spent MACs         MACs of all layers so far / MACs of `full`
    most MACs          maximum MACs of the remaining layers / MACs of `full`
    least MACs         minimum MACs of the remaining layers / MACs of `full`
    left MACs          unspent MACs of the budget / MACs of `full`, at most 1
    decisions          one entry per point: the ratio chosen there, 0 before the choice

An action is an index into the ratios of the point, the largest first. The episode ends after the last point, and the only
reward comes at its end: the reward of the whole network (He et al. 2018, AMC, section 3.2).
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
"""Number of entries of an observation before the decisions."""

Observation = NDArray[np.float32]
Reward = Callable[[Sequence[Instance]], Sequence[float]]
"""Returns the rewards of networks, which are scored in one pass."""


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
        self.actions = max(len(ratios) for ratios in space.ratios.values())
        """Number of actions; a point with fewer ratios allows only the first few."""
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
        """The chosen network, in canonical form."""
        return self.space.canonical(Instance(tuple(zip(self.space.points, self.taken, strict=False))))

    def mask(self) -> NDArray[np.bool_]:
        """Return for each action whether the budget can still be met after it; after the last point, all are allowed."""
        mask = np.zeros(self.actions, dtype=np.bool_)
        if self.done:
            mask[:] = True
        else:
            allowed = self.space.allowed(self.number, self.shape, self.spent, self.budget)
            mask[: len(allowed)] = allowed
        return mask

    def take(self, action: int) -> int:
        """Take an action, or the nearest allowed one, and move to the next point.

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
        """Return the observation at the current position."""
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
        """Return the `info` of the step just taken."""
        info: dict[str, Any] = {"proposed": proposed, "taken": taken}
        return info | {"instance": str(self.instance), "macs": self.spent} if self.done else info


def observation_space(space: Space) -> spaces.Space[Observation]:
    """Return the space of the observations."""
    box: spaces.Space[Any] = spaces.Box(0.0, 1.0, (FACTS + len(space.points),), np.float32)
    return box


class SearchEnv(gymnasium.Env[Observation, np.int64]):
    """One walk as a Gymnasium environment.

    `action_masks()` says which actions the budget allows; a different action is replaced by the nearest allowed one.
    `info` holds the action `proposed`, the action `taken`, and at the end the `instance` and its `macs`.

    Args:
        space: the space of networks.
        budget: maximum MACs of the network.
        reward: returns the rewards of finished networks.

    Raises:
        BudgetError: if no network is within the budget.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  Gymnasium's declaration

    def __init__(self, space: Space, budget: int, reward: Reward) -> None:
        self.walk = Walk(space, budget)
        self.reward = reward
        self.observation_space = observation_space(space)
        self.action_space = spaces.Discrete(self.walk.actions)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """Begin a new walk."""
        super().reset(seed=seed, options=options)
        self.walk.reset()
        return self.walk.observation(), {}

    def step(self, action: np.int64 | int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Choose the ratio of one point."""
        taken = self.walk.take(int(action))
        done = self.walk.done
        reward = float(self.reward([self.walk.instance])[0]) if done else 0.0
        return self.walk.observation(), reward, done, False, self.walk.info(int(action), taken)

    def action_masks(self) -> NDArray[np.bool_]:
        """Return for each action whether the budget allows it at this point."""
        return self.walk.mask()
