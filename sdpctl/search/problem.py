"""What a strategy receives: the problem, with ways to draw candidates, and its evaluations."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from sdpctl.instance import Instance
from sdpctl.search.environment import Budgets, Walk
from sdpctl.search.settings import AgentSettings
from sdpctl.search.space import Space

if TYPE_CHECKING:
    from sdpctl.search.kept import Agent

NEAR = 0.8
"""A candidate is near the budget if its MACs are at least this share of the budget."""

TRIES = 100
"""Maximum number of draws; after them, the candidate nearest to the budget is taken."""

MISSES = 100
"""Number of known networks drawn in a row after which drawing stops."""


class Spent(Exception):  # noqa: N818  it ends a strategy and is not an error
    """Raised when the evaluations are used up, or when the strategy finds nothing new."""


IDLE = 50
"""Number of consecutive batches without a new network that ends a strategy."""

Answer = Callable[[Sequence[Instance], int], Mapping[Instance, float]]
"""Takes networks and the maximum number of scored networks; returns their rewards up to this number, and others known."""


class Evaluations:
    """Returns rewards to a strategy; a network counts once, when it is first asked for.

    Args:
        limit: maximum number of networks that may be scored.
        answer: returns the rewards.
    """

    def __init__(self, limit: int, answer: Answer) -> None:
        self.limit = limit
        self.answer = answer
        self.rewards: dict[Instance, float] = {}
        """All known rewards, including those of networks that other processes asked for."""
        self.idle = 0

    def __call__(self, instances: Sequence[Instance]) -> list[float]:
        """Return the reward of each network.

        Raises:
            Spent: if the evaluations are used up, or if many batches in a row had no new network.
        """
        wanted = [instance for instance in dict.fromkeys(instances) if instance not in self.rewards]
        self.idle = 0 if wanted else self.idle + 1
        if wanted:
            self.rewards.update(self.answer(wanted, self.limit))
        left_out = any(instance not in self.rewards for instance in instances)
        if left_out or len(self.rewards) >= self.limit or self.idle >= IDLE:
            raise Spent
        return [self.rewards[instance] for instance in instances]


@dataclass(frozen=True)
class Problem:
    """What to search.

    Args:
        space: the space of networks.
        budget: maximum MACs of a network; None if the reward itself weighs them.
        evaluations: maximum number of networks that may be scored.
        seed: seed of everything that a strategy draws.
        lowest: the lowest budget, if one agent shall answer all budgets from there to `budget`.
        agent: how an agent learns.
        trained: the agent that proposes the networks of the strategy `agent`.
    """

    space: Space
    budget: int | None
    evaluations: int
    seed: int
    lowest: int | None = None
    agent: AgentSettings = field(default_factory=AgentSettings)
    trained: "Agent | None" = None

    @property
    def limit(self) -> int:
        """Maximum MACs of a network."""
        return self.space.full if self.budget is None else self.budget

    @property
    def warm_start(self) -> int:
        """Number of candidates near the budget that a strategy begins with."""
        return max(1, min(self.agent.warm_start, self.evaluations // 2))

    @property
    def budgets(self) -> Budgets:
        """The budgets of a walk: the one budget, or the range that an agent shall answer."""
        return Budgets(self.limit if self.lowest is None else min(self.lowest, self.limit), self.limit)

    def near_budget(self, random: Random, share: float = 1.0) -> Instance:
        """Draw a network near the budget: lower the ratios of random points, step by step, until the network is within it.

        Without a budget, one is drawn for each network, between the MACs of the cheapest network and of `full`; of a range of
        budgets, one is drawn for each network too.

        Args:
            random: the random generator.
            share: share of the budget to aim at.
        """
        space = self.space
        if self.budget is None:
            limit = random.randint(space.least, space.full)
        elif self.lowest is None:
            limit = min(self.budget, space.full)
        else:
            limit = random.randint(max(space.least, min(self.lowest, space.full)), min(self.budget, space.full))
        if limit == space.full:
            limit = random.randint(int(NEAR * space.full), space.full)  # otherwise every draw would be `full`
        target = max(int(share * limit), space.least)
        best: dict[str, float] = {}
        best_macs = -1
        for _ in range(TRIES):
            *_, (ratios, macs) = space.lowered(random, target)
            if macs > best_macs:
                best, best_macs = ratios, macs
            if best_macs >= NEAR * target:
                break
        return space.canonical(Instance(tuple(best.items())))

    def candidates(self, random: Random, count: int, seen: set[Instance]) -> list[Instance]:
        """Draw new networks near the budget, and further below it once no new ones are found there.

        Args:
            random: the random generator.
            count: number of networks wanted.
            seen: the known networks; drawn networks are added.

        Returns:
            At most `count` networks; fewer once nothing new is found.
        """
        found: list[Instance] = []
        share = 1.0
        while len(found) < count and share * self.limit >= NEAR * self.space.least:
            found += self.distinct(partial(self.near_budget, share=share), random, count - len(found), seen)
            share *= NEAR
        return found

    def uniform(self, random: Random) -> Instance:
        """Draw a network by a walk that takes random actions among those the budget allows."""
        walk = Walk(self.space, self.limit)
        while not walk.done:
            walk.take(random.choice(walk.mask().nonzero()[0].tolist()))
        return walk.instance

    def distinct(self, draw: Callable[[Random], Instance], random: Random, count: int, seen: set[Instance]) -> list[Instance]:
        """Draw networks that are not in `seen`, and add them to it.

        Args:
            draw: draws one network.
            random: the random generator.
            count: number of networks wanted.
            seen: the known networks; drawn networks are added.

        Returns:
            At most `count` networks; fewer once nothing new is found.
        """
        found: list[Instance] = []
        misses = 0
        while len(found) < count and misses < MISSES:
            instance = draw(random)
            if instance in seen:
                misses += 1
                continue
            misses = 0
            seen.add(instance)
            found.append(instance)
        return found
