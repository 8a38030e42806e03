"""The agents: reinforcement learning that walks the network and chooses a ratio at each point, after AMC (He et al. 2018).

The libraries' default settings fail on short episodes whose only reward comes at the end. Measurements showed what is needed:
returns over the whole episode, standardised rewards, exploration that mostly chooses ratio 1 (ratios multiply, so uniform
choices end far below the budget), and a start from candidates near the budget.

An agent learns one budget, or all budgets of a range: each walk draws its budget, which the observation holds. With imagined
walks (Sutton 1991, Dyna), a regression on the networks scored so far rewards most of the walks. Networks that the policy then
proposes are scored for real, and correct the regression.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.buffers import MaskableRolloutBuffer
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import Logger
from torch import Tensor, nn

from sdpctl.instance import Instance
from sdpctl.randomness import derive
from sdpctl.search.environment import Observation, Observer, Walk
from sdpctl.search.lockstep import LockstepEnv
from sdpctl.search.policy import HEATS, Policy, Shaped
from sdpctl.search.problem import Evaluations, Problem, Spent
from sdpctl.search.proxy import Proxy
from sdpctl.search.strategies import BATCH, warm_start

IMAGINED_TOGETHER = 64
"""Number of imagined walks that are walked in step."""

IMAGINED = 512
"""Default number of imagined walks before each batch of real ones, if an agent learns a range of budgets."""

LAST = 8
"""Number of times as many imagined walks, after the last evaluation."""

DQN_TEMPERATURE = 0.1
"""Temperature of the softmax of a DQN's values, which are standardised rewards, when its policy draws actions."""

ENDLESS = 2**62
"""Number of learning steps to ask for; an agent ends when `score` raises `Spent`."""


@dataclass(frozen=True)
class Learned:
    """What a training of an agent leaves.

    Args:
        policy: the policy.
        curve: a row for each batch of walks whose networks were scored: the number of networks scored so far, the mean reward
            of the batch, and the mean reward beyond networks of the same budget, in standard deviations.
        walks: all walks whose networks were scored, with their rewards, in order.
    """

    policy: Policy
    curve: list[dict[str, float]]
    walks: list[tuple[Walk, float]]


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
    """Compares rewards with the expected reward at the same budget.

    Args:
        problem: the space and the budgets.
        rewards: rewards of known networks near their budgets.
    """

    def __init__(self, problem: Problem, rewards: Mapping[Instance, float]) -> None:
        self.space = problem.space
        known = np.array(list(rewards.values()))
        degree = 0 if problem.lowest is None or len(known) < 4 else 2
        shares = [self._share(self.space.cost(instance)) for instance in rewards]
        self.curve = np.polynomial.Polynomial.fit(shares, known, degree, domain=[-1, 1])
        self.spread = float(np.std(known - self.curve(np.array(shares)))) or 1.0

    def _share(self, macs: int) -> float:
        return float(np.log(macs / self.space.full))

    def __call__(self, budget: int, reward: float) -> float:
        """Return a reward less the expected reward of a network with as many MACs as the budget, in standard deviations."""
        return (reward - float(self.curve(self._share(min(budget, self.space.full))))) / self.spread


class _Replayed:
    """The steps of the walks that lead to networks with known rewards, each under a budget that the network just meets."""

    def __init__(self, problem: Problem, rewards: Mapping[Instance, float], standard: _Standard) -> None:
        space, observer = problem.space, Observer(problem.space)
        limits = [max(problem.budgets.lowest, space.cost(instance)) for instance in rewards]
        pairs = zip(limits, rewards.values(), strict=True)
        self.rewards = np.array([standard(budget, reward) for budget, reward in pairs], dtype=np.float32)
        self.walks = walks = [Walk(space, budget) for budget in limits]
        self.observations, self.masks = [np.stack([observer.look(walk) for walk in walks])], []
        self.actions = np.array([[space.ratios[p].index(instance.ratio(p)) for instance in rewards] for p in space.points])
        for actions in self.actions:
            self.masks.append(np.stack([walk.mask() for walk in walks]))
            for walk, action in zip(walks, actions.tolist(), strict=True):
                walk.take(action)
            self.observations.append(np.stack([observer.look(walk) for walk in walks]))

    def steps(
        self, walks: NDArray[np.intp]
    ) -> Iterator[tuple[Observation, Observation, NDArray[Any], NDArray[Any], NDArray[Any]]]:
        """Yield the observations before and after, actions, rewards and ends of the walks, step by step."""
        for number, actions in enumerate(self.actions):
            end = number == len(self.actions) - 1
            rewards = self.rewards[walks] * end
            before, after = self.observations[number][walks], self.observations[number + 1][walks]
            yield before, after, actions[walks], rewards, np.full(len(walks), end)


class _RewardAtEveryStep(MaskableRolloutBuffer):
    """A rollout of whole walks in which every step has the reward of the last one (He et al. 2018, section 3.2)."""

    def compute_returns_and_advantage(self, last_values: Tensor, dones: NDArray[Any]) -> None:
        """Compute the returns once the rewards stand at every step."""
        for step in reversed(range(self.buffer_size - 1)):
            self.rewards[step] = np.where(self.episode_starts[step + 1], self.rewards[step], self.rewards[step + 1])
        super().compute_returns_and_advantage(last_values, dones)


class _SearchDQN(DQN):
    """A DQN that stores the action the environment actually took, and explores near ratio 1.

    Args:
        problem: the space, the budgets, the seed, and how the agent learns.
        progress: returns the share of the evaluations that are used up.
        **settings: arguments of `DQN`.
    """

    def __init__(self, problem: Problem, progress: Callable[[], float], **settings: Any) -> None:
        self.draws = np.random.default_rng(derive(problem.seed, "exploration"))
        self.progress, self.settings = progress, problem.agent
        self.points, self.ratios = len(problem.space.points), problem.space.actions
        self.lowered = 2 / self.points  # an exploring walk downsamples at about two points
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
        rate = max(self.settings.epsilon, 0.5 * (1 - self.progress()))
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
        if dones[0] and self.settings.reward == "every-step":
            replay_buffer.rewards[(replay_buffer.pos - 1 - np.arange(self.points)) % replay_buffer.buffer_size] = reward


class _Learning(ABC):
    """A training of an agent: the walks, whose networks are scored for real or by the proxy.

    Args:
        problem: the space, the budgets, the seed, and how the agent learns.
        score: returns the rewards of networks.
        name: name of the algorithm.
    """

    def __init__(self, problem: Problem, score: Evaluations, name: str) -> None:
        self.problem, self.score = problem, score
        self.space, self.budgets = problem.space, problem.budgets
        self.seed = derive(problem.seed, name) % 2**31
        self.draws = np.random.default_rng(derive(self.seed, "walks"))
        imagined = problem.agent.imagined
        self.imagined = (0 if problem.lowest is None else IMAGINED) if imagined is None else imagined
        self.curve: list[dict[str, float]] = []
        self.walks: list[tuple[Walk, float]] = []

    def learn(self) -> Learned:
        """Learn until the evaluations are used up."""
        with suppress(Spent):  # raised here if other processes have used up the evaluations
            warm_start(self.problem, self.score)
        known = dict(self.score.rewards)
        self.standard = _Standard(self.problem, known)
        replayed = _Replayed(self.problem, known, self.standard)
        self.walks += zip(replayed.walks, known.values(), strict=True)
        together = IMAGINED_TOGETHER if self.imagined else self.problem.agent.walks
        self.env = LockstepEnv(self.space, lambda: self.budgets.draw(self.space, self.draws), self._scored, together)
        with _own_randomness(self.seed):
            self.agent = self.make(replayed)
            self.agent.set_logger(Logger(None, []))  # the default logger makes a folder
            with suppress(Spent):
                if self.imagined:
                    self._learn_in_turns()
                else:
                    self.agent.learn(ENDLESS, log_interval=ENDLESS)
            if self.imagined:
                self._imagine(drawn=False, walks=LAST * self.imagined)
        return Learned(self.policy(), self.curve, self.walks)

    @abstractmethod
    def make(self, replayed: _Replayed) -> DQN | MaskablePPO:
        """Return the agent, once it has learned from the walks to the first networks."""

    @abstractmethod
    def policy(self) -> Policy:
        """Return the agent's policy as it is now."""

    def _learn_in_turns(self) -> None:
        """Learn from walks that the proxy rewards, and score new networks that the policy proposes, in turns, while it does."""
        while True:
            self._imagine(drawn=True, walks=self.imagined)
            policy, fresh = self.policy(), dict[Instance, Walk]()
            for heat in HEATS:
                walks = policy.walks(self.space, self._spread_budgets(), self.draws, heat)
                for walk in walks:
                    if walk.instance not in self.score.rewards and len(fresh) < BATCH:
                        fresh.setdefault(walk.instance, walk)
            if not fresh:
                return
            self._scored(list(fresh.values()))

    def _spread_budgets(self) -> list[int]:
        """Draw a budget from each of equal parts of the range."""
        lowest = max(self.budgets.lowest, self.space.least)
        places = (np.arange(BATCH) + self.draws.random(BATCH)) / BATCH
        return [int(lowest + place * (self.budgets.highest - lowest)) for place in places]

    def _imagine(self, *, drawn: bool, walks: int) -> None:
        """Learn from walks that the proxy rewards, with weights drawn from its posterior (Thompson 1933) or with their mean."""
        proxy = Proxy(self.space, self.score.rewards)
        weights = proxy.draws(self.draws, 1)[0] if drawn else proxy.ridge.coef_

        def rewards(walks: Sequence[Walk]) -> list[float]:
            expected = proxy.features([walk.instance for walk in walks]) @ weights + proxy.ridge.intercept_
            return [self.standard(walk.budget, reward) for walk, reward in zip(walks, expected.tolist(), strict=True)]

        self.env.reward = rewards
        self.agent.learn(len(self.space.points) * walks, log_interval=ENDLESS, reset_num_timesteps=False)

    def _scored(self, walks: Sequence[Walk]) -> list[float]:
        """Score the networks of walks for real; return their rewards, standardised."""
        try:
            self.score([walk.instance for walk in walks])
        finally:
            known = self.score.rewards
            kept = [(walk, known[walk.instance]) for walk in walks if walk.instance in known]
            standardised = [self.standard(walk.budget, reward) for walk, reward in kept]
            self.walks += kept
            if kept:
                mean = {"reward": fmean(reward for _, reward in kept), "standardised": fmean(standardised)}
                self.curve.append({"evaluations": len(known), **mean})
        return standardised


class _LearningDQN(_Learning):
    """Learn the value of each action from a replay buffer of walks (Mnih et al. 2015)."""

    def make(self, replayed: _Replayed) -> DQN:
        """Return the agent, with the first walks in its replay buffer."""
        settings, points, walks = self.problem.agent, len(self.space.points), self.env.num_envs
        agent = _SearchDQN(
            self.problem,
            lambda: len(self.score.rewards) / self.problem.evaluations,
            env=self.env,
            seed=self.seed,
            device="cpu",
            learning_rate=settings.lr,
            policy_kwargs={"net_arch": list(settings.hidden)},
            buffer_size=walks * points * 1000,
            learning_starts=0,
            batch_size=128,
            gamma=settings.gamma,
            n_steps=max(2, points),
            train_freq=points,
            gradient_steps=50,
            target_update_interval=walks * points,
        )
        assert agent.replay_buffer is not None
        first = len(replayed.rewards)
        order = np.arange(-(-first // walks) * walks) % first
        for chosen in order.reshape(-1, walks):
            for before, after, actions, reward, ends in replayed.steps(chosen):
                agent.replay_buffer.add(before, after, actions, reward, ends, [{}] * walks)
        return agent

    def policy(self) -> Policy:
        """Return the values of the actions as scores."""
        assert isinstance(self.agent, DQN)
        return _extracted(self.agent.q_net.q_net, activation="relu", temperature=DQN_TEMPERATURE)


class _LearningPPO(_Learning):
    """Learn a policy restricted to the actions that the budget allows (Huang and Ontañón 2022).

    Args:
        problem: the space, the budgets, the seed, and how the agent learns.
        score: returns the rewards of networks.
        name: name of the algorithm.
        epochs: passes over the walks of each update. With a single pass of one batch the clipped objective of PPO (Schulman et
            al. 2017) has the gradient of REINFORCE with a learned baseline (Williams 1992).
    """

    def __init__(self, problem: Problem, score: Evaluations, name: str, epochs: int) -> None:
        super().__init__(problem, score, name)
        self.epochs = epochs

    def make(self, replayed: _Replayed) -> MaskablePPO:
        """Return the agent, once it imitates the walks to the better half of the first networks."""
        settings, steps = self.problem.agent, max(2, len(self.space.points))
        agent = MaskablePPO(
            "MlpPolicy",
            self.env,
            seed=self.seed,
            device="cpu",
            learning_rate=settings.lr,
            policy_kwargs={"net_arch": list(settings.hidden)},
            rollout_buffer_class=_RewardAtEveryStep if settings.reward == "every-step" else MaskableRolloutBuffer,
            n_steps=steps,
            batch_size=self.env.num_envs * steps,
            n_epochs=self.epochs,
            gamma=settings.gamma,
            gae_lambda=1.0,
            ent_coef=settings.entropy,
        )
        with torch.no_grad():
            head = agent.policy.action_net
            assert isinstance(head, torch.nn.Linear)
            head.bias[0] += 2.0  # start with a policy that mostly chooses ratio 1
        _clone(agent, replayed)
        return agent

    def policy(self) -> Policy:
        """Return the logits of the actions as scores."""
        assert isinstance(self.agent, MaskablePPO)
        policy = self.agent.policy
        return _extracted(policy.mlp_extractor.policy_net, policy.action_net, activation="tanh", temperature=1.0)


def _extracted(*parts: nn.Module, activation: str, temperature: float) -> Policy:
    """Return the policy that the linear layers of some modules are, in order."""
    layers = [layer for part in parts for layer in part.modules() if isinstance(layer, nn.Linear)]
    weights = {
        f"{number}.{name}": tensor.detach().clone()
        for number, layer in enumerate(layers)
        for name, tensor in layer.named_parameters()
    }
    hidden = tuple(layer.out_features for layer in layers[:-1])
    return Policy(Shaped(layers[-1].out_features, hidden, activation, temperature), weights)


def _clone(agent: MaskablePPO, replayed: _Replayed) -> None:
    """Train the policy to imitate the walks to the better half of the known networks."""
    better = np.argsort(-replayed.rewards, kind="stable")[: max(1, len(replayed.rewards) // 2)]
    observations = torch.from_numpy(np.concatenate([step[better] for step in replayed.observations[:-1]]))
    actions = torch.from_numpy(replayed.actions[:, better].reshape(-1))
    masks = torch.from_numpy(np.concatenate([step[better] for step in replayed.masks]))
    optimizer = torch.optim.Adam(agent.policy.parameters(), lr=1e-3)
    for _ in range(50):
        _, log_probs, entropies = agent.policy.evaluate_actions(observations, actions, masks)
        assert entropies is not None
        loss = -log_probs.mean() - agent.ent_coef * entropies.mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def learn(name: str, problem: Problem, score: Evaluations) -> Learned:
    """Train an agent until the evaluations are used up.

    Args:
        name: `dqn`, `ppo` or `reinforce`.
        problem: the space, the budget or the range of budgets, the seed, and how the agent learns.
        score: returns the rewards of networks.
    """
    match name:
        case "dqn":
            return _LearningDQN(problem, score, name).learn()
        case "ppo":
            return _LearningPPO(problem, score, name, epochs=10).learn()
        case _:
            return _LearningPPO(problem, score, name, epochs=1).learn()


def dqn(problem: Problem, score: Evaluations) -> None:
    """Learn the value of each action from a replay buffer of walks."""
    learn("dqn", problem, score)


def ppo(problem: Problem, score: Evaluations) -> None:
    """Learn a policy by proximal policy optimisation."""
    learn("ppo", problem, score)


def reinforce(problem: Problem, score: Evaluations) -> None:
    """Learn a policy by the policy gradient."""
    learn("reinforce", problem, score)
