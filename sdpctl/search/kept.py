"""An agent as it is kept: its policy, the ratios of its actions, and the networks that were scored while it learned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdpctl.errors import UsageError
from sdpctl.instance import Instance
from sdpctl.randomness import derive, stream
from sdpctl.search.environment import ENTRIES, Observer, Walk
from sdpctl.search.policy import Policy, Shaped
from sdpctl.search.problem import Problem
from sdpctl.search.proxy import Proxy
from sdpctl.search.space import Space

POOL = 64
"""Number of networks that a policy proposes at a time, among which a proxy chooses."""

ENOUGH = 8
"""Number of scored networks from which on a proxy ranks what the policy proposes."""


def check_entries(entries: Sequence[str], called: str) -> None:
    """Check that the observations of an agent have the entries of this version.

    Raises:
        UsageError: if they differ.
    """
    if tuple(entries) != ENTRIES:
        raise UsageError(f"{called} was trained on the observations of a different version of sdpctl; train it again")


@dataclass(frozen=True)
class Agent:
    """A trained agent.

    Args:
        policy: the policy.
        ratios: the ratios of its actions, the largest first.
        rewards: rewards of the networks scored while it learned, if the network to search is the one it learned on.
    """

    policy: Policy
    ratios: tuple[float, ...]
    rewards: Mapping[Instance, float] = field(default_factory=dict)

    def check(self, space: Space, called: str) -> None:
        """Check that the agent can walk a space.

        Raises:
            UsageError: if a point has other ratios than those the agent chooses among.
        """
        for point, ratios in space.ratios.items():
            if ratios != self.ratios:
                mine, theirs = (", ".join(f"{ratio:g}" for ratio in each) for each in (self.ratios, ratios))
                raise UsageError(
                    f"{called} chooses among the ratios {mine}, and {point} has {theirs}; give --ratios {mine.replace(' ', '')}"
                )

    def proposals(self, problem: Problem, known: Mapping[Instance, float], random: np.random.Generator) -> list[Instance]:
        """Return networks within the budget that are not known yet, the most promising first.

        The policy proposes them. Once enough networks are scored, a regression ranks them, with others near the budget.

        Args:
            problem: the space and the budget.
            known: rewards of the networks that are known.
            random: draws the walks of the policy.
        """
        space = problem.space
        pool = self.policy.proposals(space, problem.limit, POOL + len(known), random)
        scored = {**self.rewards, **known}
        if len(scored) >= ENOUGH:
            pool += [network for network in self.rewards if space.cost(network) <= problem.limit]
            pool += problem.candidates(stream(problem.seed, "pool", len(known)), POOL, {*pool, *known})
        fresh = [network for network in dict.fromkeys(pool) if network not in known]
        if len(scored) < ENOUGH or not fresh:
            return fresh
        proxy = Proxy(space, scored)
        expected = proxy.features(fresh) @ proxy.ridge.coef_
        return [fresh[i] for i in np.argsort(-expected, kind="stable").tolist()]

    def first(self, problem: Problem) -> Instance:
        """Return the most promising network within the budget, without an evaluation."""
        return self.proposals(problem, {}, proposing(problem))[0]


def proposing(problem: Problem) -> np.random.Generator:
    """Return the generator that draws the walks of an agent's proposals."""
    return np.random.default_rng(derive(problem.seed, "proposals"))


def rollouts(space: Space, walks: Sequence[tuple[Walk, float]]) -> dict[str, Tensor]:
    """Return walks as a table with a row for each step.

    Args:
        space: the space of networks.
        walks: finished walks with their rewards.

    Returns:
        `state` and `next_state` (steps, entries), `proposed` and `taken` (steps,), the actions, `reward` (steps,), which is 0
        before the last step of a walk, `walk` (steps,), the number of the walk, and `budget` (steps,), its budget in MACs.
    """
    observer, states, following = Observer(space), [], []
    for walk, _ in walks:
        again = Walk(space, walk.budget)
        for action in walk.actions:
            states.append(observer.look(again))
            again.take(action)
            following.append(observer.look(again))
    steps = len(space.points)

    def column(values: Sequence[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype)

    return {
        "state": torch.from_numpy(np.stack(states)),
        "next_state": torch.from_numpy(np.stack(following)),
        "proposed": column([action for walk, _ in walks for action in walk.proposed], torch.int64),
        "taken": column([action for walk, _ in walks for action in walk.actions], torch.int64),
        "reward": column([end for _, reward in walks for end in (*[0.0] * (steps - 1), reward)], torch.float32),
        "walk": column([number for number in range(len(walks)) for _ in range(steps)], torch.int64),
        "budget": column([walk.budget for walk, _ in walks for _ in range(steps)], torch.int64),
    }


def described(shaped: Shaped) -> dict[str, Any]:
    """Return the architecture of a policy as plain data, with the entries of its observations."""
    return {
        "entries": list(ENTRIES),
        "actions": shaped.actions,
        "hidden": list(shaped.hidden),
        "activation": shaped.activation,
        "temperature": shaped.temperature,
    }
