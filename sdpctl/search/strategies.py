"""The strategies: each proposes batches of networks and learns from their rewards, until `score` raises `Spent`.

Where candidates are drawn matters more than how, so all strategies except `uniform` and `exhaustive` begin near the budget.
"""

from collections.abc import Callable
from itertools import islice

import numpy as np
import optuna

from sdpctl.instance import Instance
from sdpctl.randomness import derive, stream
from sdpctl.search.environment import Walk
from sdpctl.search.kept import proposing
from sdpctl.search.problem import Evaluations, Problem
from sdpctl.search.proxy import Proxy

NETWORKS_PER_PASS = 512
"""Maximum number of networks scored in one pass: each keeps its own BatchNorm statistics in memory."""

BATCH = 16
"""Number of candidates that are proposed, and scored in one pass, at a time."""

POOL = 1000
"""Number of candidates near the budget among which the surrogate chooses, besides the neighbours of the best known network."""

Strategy = Callable[[Problem, Evaluations], None]


def random(problem: Problem, score: Evaluations) -> None:
    """Draw networks near the budget; the baseline of every search."""
    numbers, seen = stream(problem.seed, "near"), set[Instance]()
    while batch := problem.candidates(numbers, BATCH, seen):
        score(batch)


def uniform(problem: Problem, score: Evaluations) -> None:
    """Draw networks by walks that take random actions among those the budget allows."""
    numbers, seen = stream(problem.seed, "uniform"), set[Instance]()
    while batch := problem.distinct(problem.uniform, numbers, BATCH, seen):
        score(batch)


def first_candidates(problem: Problem) -> list[Instance]:
    """Return the networks near the budget with which the strategies of one seed begin, including the baseline."""
    return problem.candidates(stream(problem.seed, "near"), problem.warm_start, set())


def warm_start(problem: Problem, score: Evaluations) -> dict[Instance, float]:
    """Score the first candidates, and return their rewards."""
    batch = first_candidates(problem)
    return dict(zip(batch, score(batch), strict=True))


def exhaustive(problem: Problem, score: Evaluations) -> None:
    """Score every network within the budget, larger ratios first."""
    networks = problem.space.networks(problem.limit)
    while batch := list(islice(networks, NETWORKS_PER_PASS)):
        score(batch)


def surrogate(problem: Problem, score: Evaluations) -> None:
    """Fit a Bayesian ridge regression, and score the best candidate under each of several draws from its posterior.

    Thompson sampling (Thompson 1933), with a linear model as in Agrawal and Goyal 2013.
    """
    warm_start(problem, score)
    known = score.rewards
    numbers = stream(problem.seed, "pool")
    noise = np.random.default_rng(derive(problem.seed, "posterior"))
    while True:
        proxy = Proxy(problem.space, known)
        seen = set(known)
        pool = problem.distinct(problem.near_budget, numbers, POOL, seen) or problem.candidates(numbers, POOL, seen)
        pool += [instance for instance in _neighbours(problem, max(known, key=lambda i: known[i])) if instance not in seen]
        if not pool:
            return
        chosen: list[Instance] = []
        for expected in proxy.draws(noise, BATCH) @ proxy.features(pool).T:
            best = next((i for i in np.argsort(-expected, kind="stable").tolist() if pool[i] not in chosen), None)
            if best is not None:
                chosen.append(pool[best])
        score(chosen)


def agent(problem: Problem, score: Evaluations) -> None:
    """Score what a trained agent proposes, the most promising networks first."""
    assert problem.trained is not None
    numbers = proposing(problem)
    while batch := problem.trained.proposals(problem, score.rewards, numbers)[:BATCH]:
        score(batch)


def greedy(problem: Problem, score: Evaluations) -> None:
    """Score the neighbours of the best known network: one point changes by a step, or one goes down and a second one up."""
    warm_start(problem, score)
    known = score.rewards
    numbers = stream(problem.seed, "neighbours")
    exhausted: set[Instance] = set()
    while len(exhausted) < len(known):
        best = max((i for i in known if i not in exhausted), key=lambda i: known[i])
        unseen = [i for i in _neighbours(problem, best) if i not in known]
        if len(unseen) <= BATCH:
            exhausted.add(best)
        if unseen:
            score(numbers.sample(unseen, min(BATCH, len(unseen))))


def _neighbours(problem: Problem, instance: Instance) -> list[Instance]:
    space = problem.space
    places = [space.ratios[point].index(instance.ratio(point)) for point in space.points]
    steps = [
        (i, step)
        for i, point in enumerate(space.points)
        for step in (-1, 1)
        if 0 <= places[i] + step < len(space.ratios[point])
    ]
    moves = [(step,) for step in steps] + [(a, b) for a in steps for b in steps if a[0] < b[0] and a[1] != b[1]]
    found = []
    for move in moves:
        moved = list(places)
        for i, step in move:
            moved[i] += step
        choices = tuple((point, space.ratios[point][place]) for point, place in zip(space.points, moved, strict=True))
        neighbour = space.canonical(Instance(choices))
        if space.cost(neighbour) <= problem.limit:
            found.append(neighbour)
    return list(dict.fromkeys(found))


def tpe(problem: Problem, score: Evaluations) -> None:
    """Propose by Optuna's tree-structured Parzen estimator (Bergstra et al. 2011)."""
    sampler = optuna.samplers.TPESampler(seed=_seed(problem), constant_liar=True, n_startup_trials=0)
    _sample(problem, score, sampler)


def nsga2(problem: Problem, score: Evaluations) -> None:
    """Propose by Optuna's evolutionary sampler (Deb et al. 2002), whose first generation is near the budget."""
    _sample(problem, score, optuna.samplers.NSGAIISampler(seed=_seed(problem), population_size=max(2, problem.warm_start)))


def _seed(problem: Problem) -> int:
    return derive(problem.seed, "sampler") % 2**32


def _sample(problem: Problem, score: Evaluations, sampler: optuna.samplers.BaseSampler) -> None:
    """Ask a sampler for indices of ratios, score the nearest networks that the budget allows, and tell it the rewards."""
    space = problem.space
    study = optuna.create_study(sampler=sampler, direction="maximize")
    distributions: dict[str, optuna.distributions.BaseDistribution] = {
        point: optuna.distributions.CategoricalDistribution(list(range(len(ratios)))) for point, ratios in space.ratios.items()
    }
    first = first_candidates(problem)
    for instance in first:
        study.enqueue_trial({point: space.ratios[point].index(instance.ratio(point)) for point in space.points})
    count = len(first)
    while True:
        trials = [study.ask(distributions) for _ in range(count)]
        batch = []
        for trial in trials:
            walk = Walk(space, problem.limit)
            for point in space.points:
                walk.take(trial.params[point])
            batch.append(walk.instance)
        for trial, reward in zip(trials, score(batch), strict=True):
            study.tell(trial, reward)
        count = BATCH // 2
