"""Several walks as one vectorised environment of stable-baselines3."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from sdpctl.search.environment import Observation, Observer, Walk, observation_space
from sdpctl.search.space import Space

WalkReward = Callable[[Sequence[Walk]], Sequence[float]]
"""Returns the rewards of finished walks, whose networks are scored in one pass."""


class LockstepEnv(VecEnv):
    """Several walks that end in the same step, so that their networks are scored in one pass.

    Args:
        space: the space of networks.
        budget: returns the budget of a new walk, the maximum MACs of its network.
        reward: returns the rewards of finished walks.
        walks: number of walks.

    Raises:
        BudgetError: if no network is within the budget.
    """

    def __init__(self, space: Space, budget: Callable[[], int], reward: WalkReward, walks: int) -> None:
        self.space, self.budget, self.reward = space, budget, reward
        self.observer = Observer(space)
        self.walks = [Walk(space, budget()) for _ in range(walks)]
        self._actions: list[int] = []
        super().__init__(walks, observation_space(), spaces.Discrete(space.actions))

    def _observations(self) -> Observation:
        return np.stack([self.observer.look(walk) for walk in self.walks])

    def reset(self) -> Observation:
        """Begin new walks."""
        self.walks = [Walk(self.space, self.budget()) for _ in self.walks]
        return self._observations()

    def step_async(self, actions: NDArray[Any]) -> None:
        """Store the action of each walk for `step_wait`."""
        self._actions = [int(action) for action in actions]

    def step_wait(self) -> tuple[Observation, NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Take the actions; after the last point, score all networks and begin new walks, as a `VecEnv` must."""
        for walk, action in zip(self.walks, self._actions, strict=True):
            walk.take(action)
        infos = [walk.info() for walk in self.walks]
        done = self.walks[0].done
        rewards = self.reward(self.walks) if done else [0.0] * self.num_envs
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
