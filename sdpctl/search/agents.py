"""The agents: reinforcement learning that walks the network and chooses a ratio at each point, after AMC (He et al. 2018).

The libraries' default settings fail on short episodes whose only reward comes at the end. Measurements showed what is needed:
returns over the whole episode, standardised rewards, exploration that mostly chooses ratio 1 (ratios multiply, so uniform
choices end far below the budget), and a start from candidates near the budget. Every step receives the undiscounted reward.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sb3_contrib import MaskablePPO
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import Logger

from sdpctl.instance import Instance
from sdpctl.randomness import derive
from sdpctl.search.environment import Observation
from sdpctl.search.lockstep import LockstepEnv
from sdpctl.search.problem import Evaluations, Problem
from sdpctl.search.strategies import warm_start

WALKS = 8
"""Number of episodes that end together and are scored in one pass."""

ENDLESS = 2**62
"""Number of learning steps to ask for; an agent ends when `score` raises `Spent`."""


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Seed the global generators that the libraries use, and restore their states afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class _Standard:
    """Standardise rewards by the mean and standard deviation of the warm start."""

    def __init__(self, score: Evaluations, rewards: Sequence[float]) -> None:
        self.score = score
        self.mean, self.spread = float(np.mean(rewards)), float(np.std(rewards)) or 1.0

    def __call__(self, batch: Sequence[Instance]) -> list[float]:
        return [(reward - self.mean) / self.spread for reward in self.score(batch)]


class _Replayed:
    """The steps of the walks that lead to networks with known rewards."""

    def __init__(self, problem: Problem, rewards: dict[Instance, float]) -> None:
        space = problem.space
        self.rewards = np.array(list(rewards.values()), dtype=np.float32)
        env = LockstepEnv(space, problem.limit, lambda _: self.rewards.tolist(), len(rewards))
        choices = [[space.ratios[p].index(instance.ratio(p)) for p in space.points] for instance in rewards]
        self.observations, self.masks = [env.reset()], []
        self.actions = np.array(choices).T
        for actions in self.actions:
            self.masks.append(np.stack(env.env_method("action_masks")))
            after, _, _, infos = env.step(actions)
            self.observations.append(
                np.stack([info.get("terminal_observation", o) for info, o in zip(infos, after, strict=True)])
            )

    def steps(
        self, walks: NDArray[np.intp]
    ) -> Iterator[tuple[Observation, Observation, NDArray[Any], NDArray[Any], NDArray[Any]]]:
        """Yield the observations before and after, actions, rewards and ends of the walks, step by step."""
        for number, actions in enumerate(self.actions):
            end = number == len(self.actions) - 1
            rewards = self.rewards[walks] * end
            before, after = self.observations[number][walks], self.observations[number + 1][walks]
            yield before, after, actions[walks], rewards, np.full(len(walks), end)


class _SearchDQN(DQN):
    """A DQN that stores the action the environment actually took, and explores near ratio 1.

    Args:
        problem: the space, the budget and the seed.
        **settings: arguments of `DQN`.
    """

    def __init__(self, problem: Problem, **settings: Any) -> None:
        self.draws = np.random.default_rng(derive(problem.seed, "exploration"))
        points = problem.space.points
        self.ratios = max(len(ratios) for ratios in problem.space.ratios.values())
        self.lowered = 2 / len(points)  # an exploring walk downsamples at about two points
        self.expected_steps = max(1.0, (problem.evaluations - problem.warm_start) / WALKS) * len(points)
        self.steps_taken = 0
        super().__init__("MlpPolicy", **settings)

    def predict(
        self,
        observation: NDArray[Any] | dict[str, NDArray[Any]],
        state: tuple[NDArray[Any], ...] | None = None,
        episode_start: NDArray[Any] | None = None,
        deterministic: bool = False,  # noqa: ARG002
    ) -> tuple[NDArray[Any], tuple[NDArray[Any], ...] | None]:
        """Choose the best action for each walk, or, at random, an exploring action."""
        actions, state = self.policy.predict(observation, state, episode_start, True)
        rate = max(0.2, 0.5 * (1 - self.steps_taken / self.expected_steps))
        self.steps_taken += 1
        explored = self.draws.integers(1, self.ratios, size=len(actions))
        explored[self.draws.random(len(actions)) >= self.lowered] = 0
        exploring = self.draws.random(len(actions)) < rate
        return np.where(exploring, explored, actions), state

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: NDArray[Any],  # noqa: ARG002
        new_obs: NDArray[Any] | dict[str, NDArray[Any]],
        reward: NDArray[Any],
        dones: NDArray[Any],
        infos: list[dict[str, Any]],
    ) -> None:
        taken = np.array([info["taken"] for info in infos])
        super()._store_transition(replay_buffer, taken, new_obs, reward, dones, infos)


def dqn(problem: Problem, score: Evaluations) -> None:
    """Learn the value of each action from a replay buffer of walks (Mnih et al. 2015)."""
    known = warm_start(problem, score)
    points, seed = len(problem.space.points), derive(problem.seed, "dqn") % 2**31
    standard = _Standard(score, list(known.values()))
    env = LockstepEnv(problem.space, problem.limit, standard, WALKS)
    with _own_randomness(seed):
        agent = _SearchDQN(
            problem,
            env=env,
            seed=seed,
            device="cpu",
            learning_rate=1e-3,
            buffer_size=WALKS * points * 1000,
            learning_starts=0,
            batch_size=128,
            gamma=1.0,
            n_steps=max(2, points),
            train_freq=points,
            gradient_steps=50,
            target_update_interval=WALKS * points,
        )
        assert agent.replay_buffer is not None
        rewards = {instance: (reward - standard.mean) / standard.spread for instance, reward in known.items()}
        replayed = _Replayed(problem, rewards)
        order = np.arange(-(-len(rewards) // WALKS) * WALKS) % len(rewards)
        for walks in order.reshape(-1, WALKS):
            for before, after, actions, reward, ends in replayed.steps(walks):
                agent.replay_buffer.add(before, after, actions, reward, ends, [{}] * WALKS)
        agent.set_logger(Logger(None, []))  # the default logger makes a folder
        agent.learn(ENDLESS, log_interval=ENDLESS)


def ppo(problem: Problem, score: Evaluations) -> None:
    """Learn a policy (Schulman et al. 2017) restricted to the actions that the budget allows (Huang and Ontañón 2022)."""
    known = warm_start(problem, score)
    points, seed = len(problem.space.points), derive(problem.seed, "ppo") % 2**31
    standard = _Standard(score, list(known.values()))
    env = LockstepEnv(problem.space, problem.limit, standard, WALKS)
    with _own_randomness(seed):
        agent = MaskablePPO(
            "MlpPolicy",
            env,
            seed=seed,
            device="cpu",
            learning_rate=1e-3,
            n_steps=max(2, points),
            batch_size=WALKS * points,
            n_epochs=10,
            gamma=1.0,
            gae_lambda=1.0,
            ent_coef=0.2,
        )
        with torch.no_grad():
            head = agent.policy.action_net
            assert isinstance(head, torch.nn.Linear)
            head.bias[0] += 2.0  # start with a policy that mostly chooses ratio 1
        _clone(agent, problem, known)
        agent.set_logger(Logger(None, []))  # the default logger makes a folder
        agent.learn(ENDLESS, log_interval=ENDLESS)


def _clone(agent: MaskablePPO, problem: Problem, known: dict[Instance, float]) -> None:
    """Train the policy to imitate the walks to the better half of the known networks."""
    best = sorted(known, key=lambda instance: -known[instance])[: max(1, len(known) // 2)]
    replayed = _Replayed(problem, {instance: known[instance] for instance in best})
    observations = torch.from_numpy(np.concatenate(replayed.observations[:-1]))
    actions = torch.from_numpy(replayed.actions.reshape(-1))
    masks = torch.from_numpy(np.concatenate(replayed.masks))
    optimizer = torch.optim.Adam(agent.policy.parameters(), lr=1e-3)
    for _ in range(50):
        _, log_probs, entropies = agent.policy.evaluate_actions(observations, actions, masks)
        assert entropies is not None
        loss = -log_probs.mean() - agent.ent_coef * entropies.mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
