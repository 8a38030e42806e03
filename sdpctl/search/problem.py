"""What a strategy is given, and the ways to draw candidates."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

from sdpctl.instance import Instance
from sdpctl.search.environment import Walk
from sdpctl.search.space import Space

NEAR = 0.8
"""A candidate is near the budget where it uses this share of it."""

TRIES = 100
"""Draws before the nearest to the budget so far is taken."""

MISSES = 100
"""Draws in a row that are known already, before nothing new is expected."""


class Spent(Exception):  # noqa: N818  it ends a strategy, it is no error
    """The evaluations are used up, or the strategy finds nothing new."""


IDLE = 50
"""So many batches without a network that is new end a strategy."""

Answer = Callable[[Sequence[Instance], int], Mapping[Instance, float]]
"""Given networks and how many may be scored in all, return the rewards of those that are within, and any others known."""


class Evaluations:
    """What a strategy asks; a network counts when it is first asked for.

    Args:
        limit: how many networks may be scored.
        answer: where the rewards come from.
    """

    def __init__(self, limit: int, answer: Answer) -> None:
        self.limit = limit
        self.answer = answer
        self.rewards: dict[Instance, float] = {}
        """All that are known, those that other processes asked for included."""
        self.idle = 0

    def __call__(self, instances: Sequence[Instance]) -> list[float]:
        """Return the reward of each network.

        Raises:
            Spent: where the evaluations are used up, or nothing new was asked for a long time.
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
        space: the networks.
        budget: MACs; None where the reward itself weighs them.
        evaluations: how many networks may be scored.
        seed: of everything a strategy draws.
    """

    space: Space
    budget: int | None
    evaluations: int
    seed: int

    @property
    def limit(self) -> int:
        """The MACs that no network may exceed."""
        return self.space.full if self.budget is None else self.budget

    @property
    def warm_start(self) -> int:
        """How many candidates near the budget every strategy begins with."""
        return max(1, min(32, self.evaluations // 2))

    def near_budget(self, random: Random, share: float = 1.0) -> Instance:
        """Draw a network near the budget: lower points at random, step by step, until it is within.

        Where there is no budget, one is drawn for each network, between the cheapest and `full`.

        Args:
            random: what it draws from.
            share: of the budget that is aimed at.
        """
        space = self.space
        limit = random.randint(space.least, space.full) if self.budget is None else min(self.budget, space.full)
        if limit == space.full:
            limit = random.randint(int(NEAR * space.full), space.full)  # else every draw would be `full`
        target = max(int(share * limit), space.least)
        best: dict[str, float] = {}
        best_macs = -1
        for _ in range(TRIES):
            ratios: dict[str, float] = {}
            left = {point: list(space.ratios[point][1:]) for point in space.points}
            macs = space.full
            while macs > target:
                point = random.choice([point for point, lower in left.items() if lower])
                ratios[point] = left[point].pop(0)
                macs = space.macs(ratios)
            if macs > best_macs:
                best, best_macs = ratios, macs
            if best_macs >= NEAR * target:
                break
        return space.canonical(Instance(tuple(best.items())))

    def candidates(self, random: Random, count: int, seen: set[Instance]) -> list[Instance]:
        """Draw new networks near the budget, and where no more come there, below it.

        Args:
            random: what it draws from.
            count: how many are wanted.
            seen: the networks known; those drawn are added.

        Returns:
            As many as wanted, or fewer where nothing new comes any more.
        """
        found: list[Instance] = []
        share = 1.0
        while len(found) < count and share * self.limit >= NEAR * self.space.least:
            found += self.distinct(partial(self.near_budget, share=share), random, count - len(found), seen)
            share *= NEAR
        return found

    def uniform(self, random: Random) -> Instance:
        """Draw a network by a walk that takes any action the budget allows."""
        walk = Walk(self.space, self.limit)
        while not walk.done:
            walk.take(random.choice(walk.mask().nonzero()[0].tolist()))
        return walk.instance

    def distinct(self, draw: Callable[[Random], Instance], random: Random, count: int, seen: set[Instance]) -> list[Instance]:
        """Draw networks that were not seen before, and remember them.

        Args:
            draw: one of the ways to draw.
            random: what it draws from.
            count: how many are wanted.
            seen: the networks known; those drawn are added.

        Returns:
            As many as wanted, or fewer where nothing new comes any more.
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
