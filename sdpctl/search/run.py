"""The runs of a search: the list of runs, and the course of a run from its first candidates to its winner."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from sdpctl.engine.evaluate import Score
from sdpctl.instance import FULL, Instance
from sdpctl.search.catalog import SINGLE_POINT, STRATEGIES
from sdpctl.search.problem import Evaluations, Problem, Spent
from sdpctl.search.scoring import pooled
from sdpctl.search.strategies import NETWORKS_PER_PASS, Strategy
from sdpctl.search.study import Measure, Study
from sdpctl.table import load


def load_strategy(name: str) -> Strategy:
    """Import a strategy by its name.

    Raises:
        UsageError: if there is no strategy of this name.
    """
    strategy: Strategy = load(STRATEGIES.find(name).code)
    return strategy


def fixed_list(networks: Sequence[Instance]) -> Strategy:
    """Return a strategy that asks for each of these networks, in order."""

    def propose(_: Problem, score: Evaluations) -> None:
        for i in range(0, len(networks), NETWORKS_PER_PASS):
            score(networks[i : i + NETWORKS_PER_PASS])

    return propose


@dataclass(frozen=True)
class Run:
    """One run of a search, from its own seed.

    Args:
        strategy: name of the strategy, or `SINGLE_POINT`.
        seed_number: number of the seed, from 0.
        problem: the space, the budget and the seed of the run.
        propose: the strategy.
    """

    strategy: str
    seed_number: int
    problem: Problem
    propose: Strategy


def planned_runs(problems: Sequence[Problem], strategies: Sequence[str], single_point: Sequence[Instance]) -> list[Run]:
    """Return the runs of a search in order: the single-point instances first, then each strategy with each seed.

    Args:
        problems: one problem for each seed.
        strategies: names of the strategies.
        single_point: the SDPoint instances; `full` and those beyond the budget are left out.
    """
    first = problems[0]
    singles = dict.fromkeys(first.space.canonical(instance) for instance in single_point)
    within = [instance for instance in singles if instance != FULL and first.space.cost(instance) <= first.limit]
    runs = []
    if within:
        runs.append(Run(SINGLE_POINT, 0, replace(first, evaluations=len(within)), fixed_list(within)))
    for name in strategies:
        propose = load_strategy(name)
        for number, problem in enumerate(problems):
            if STRATEGIES[name].scores_all:
                problem = replace(problem, evaluations=sum(1 for _ in problem.space.networks(problem.limit)))
            runs.append(Run(name, number, problem, propose))
    return runs


@dataclass(frozen=True)
class Outcome:
    """The result of one run.

    Args:
        scores: score of every network the run asked for, in the order of the trials.
        more: score of the best few networks on the other held-out images.
        best: score of these few on all held-out images.
        winner: the best of these few.
    """

    scores: dict[Instance, Score]
    more: dict[Instance, Score]
    best: dict[Instance, Score]
    winner: Instance


def ranking(
    problem: Problem, reward: Callable[[Instance, Score], float]
) -> Callable[[tuple[Instance, Score]], tuple[object, ...]]:
    """Return the key that sorts scored networks: the greatest reward first, then the fewest MACs, then the name."""

    def key(entry: tuple[Instance, Score]) -> tuple[object, ...]:
        instance, score = entry
        return -reward(instance, score), problem.space.cost(instance), str(instance)

    return key


def run_strategy(
    problem: Problem,
    propose: Strategy,
    study: Study,
    *,
    best: int,
    measure_more: Measure,
    watch: Callable[[Evaluations], None],
) -> Outcome:
    """Run a strategy until its evaluations are used up, score its best networks on more images, and name the winner.

    Args:
        problem: the space, the budget and the seed.
        propose: the strategy.
        study: keeps the trials.
        best: number of networks that are scored on more images.
        measure_more: scores networks on the other held-out images.
        watch: called with the evaluations before each batch is scored, and at the end.
    """

    def answer(wanted: Sequence[Instance], limit: int) -> dict[Instance, float]:
        watch(evaluations)
        scores = study.answer(wanted, limit)
        return {instance: study.reward(instance, score) for instance, score in scores.items()}

    evaluations = Evaluations(problem.evaluations, answer)
    with suppress(Spent):
        propose(problem, evaluations)
    study.settle()
    watch(evaluations)
    scores = study.scores()
    key = ranking(problem, study.reward)
    top = dict(sorted(scores.items(), key=key)[:best])
    more = study.rescored(list(top), measure_more)
    on_all_images = {instance: pooled(score, more[instance]) for instance, score in top.items()}
    return Outcome(scores, more, on_all_images, min(on_all_images.items(), key=key)[0])
