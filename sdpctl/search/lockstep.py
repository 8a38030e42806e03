"""Several walks as one vectorised environment of stable-baselines3."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from sdpctl.search.environment import Observation, Reward, Walk, observation_space
from sdpctl.search.space import Space


class LockstepEnv(VecEnv):
    """Several walks that end in the same step, so that their networks are scored in one pass.

    Args:
        space: the space of networks.
        budget: maximum MACs of a network.
        reward: returns the rewards of finished networks.
        walks: number of walks.

    Raises:
        BudgetError: if no network is within the budget.
    """

    def __init__(self, space: Space, budget: int, reward: Reward, walks: int) -> None:
        self.walks = [Walk(space, budget) for _ in range(walks)]
        self.reward = reward
        self._actions: list[int] = []
        super().__init__(walks, observation_space(space), spaces.Discrete(self.walks[0].actions))

    def _observations(self) -> Observation:
        return np.stack([walk.observation() for walk in self.walks])

    def reset(self) -> Observation:
        """Begin new walks."""
        for walk in self.walks:
            walk.reset()
        return self._observations()

    def step_async(self, actions: NDArray[Any]) -> None:
        """Store the action of each walk for `step_wait`."""
        self._actions = [int(action) for action in actions]

    def step_wait(self) -> tuple[Observation, NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Take the actions; after the last point, score all networks and begin new walks, as a `VecEnv` must."""
        taken = [walk.take(action) for walk, action in zip(self.walks, self._actions, strict=True)]
        infos = [walk.info(*pair) for walk, pair in zip(self.walks, zip(self._actions, taken, strict=True), strict=True)]
        done = self.walks[0].done
        rewards = self.reward([walk.instance for walk in self.walks]) if done else [0.0] * self.num_envs
        observations = self._observations()
        if done:
            for info, last in zip(infos, observations, strict=True):
                info["terminal_observation"] = last
            observations = self.reset()
        return observations, np.array(rewards, dtype=np.float32), np.full(self.num_envs, done), infos

    def close(self) -> None:
        """Do nothing: there are no resources to release."""

    def _chosen(self, indices: int | Iterable[int] | None) -> list[Walk]:
        return [self.walks[i] for i in self._get_indices(indices)]

    def env_method(self, method_name: str, *args: Any, indices: int | Iterable[int] | None = None, **kwargs: Any) -> list[Any]:
        """Call `action_masks` of each walk."""
        return [method(*args, **kwargs) for method in self.get_attr(method_name, indices)]

    def get_attr(self, attr_name: str, indices: int | Iterable[int] | None = None) -> list[Any]:
        """Return what an agent asks each walk for: `action_masks`, and `render_mode`, which is None."""
        known: dict[str, Callable[[Walk], Any]] = {"action_masks": lambda walk: walk.mask, "render_mode": lambda _: None}
        if attr_name not in known:
            raise AttributeError(f"a walk has no {attr_name}")
        return [known[attr_name](walk) for walk in self._chosen(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: int | Iterable[int] | None = None) -> None:  # noqa: ARG002
        """Raise an error: attributes of a walk cannot be set."""
        raise AttributeError(f"{attr_name} of a walk cannot be set")

    def env_is_wrapped(
        self,
        wrapper_class: Any,  # noqa: ARG002
        indices: int | Iterable[int] | None = None,
    ) -> list[bool]:
        """Return False for each walk: no walk is wrapped."""
        return [False for _ in self._chosen(indices)]
