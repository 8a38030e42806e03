"""One strategy from its first candidate to its winner."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from sdpctl.engine.evaluate import Score
from sdpctl.instance import Instance
from sdpctl.search.catalog import STRATEGIES
from sdpctl.search.problem import Evaluations, Problem, Spent
from sdpctl.search.scoring import pooled
from sdpctl.search.strategies import PASS, Strategy
from sdpctl.search.study import Measure, Study
from sdpctl.table import load

BASELINE = "random"
"""What every report shows beside the strategy."""


def strategy(name: str) -> Strategy:
    """Return a strategy by its name."""
    found: Strategy = load(STRATEGIES.find(name).code)
    return found


def listed(networks: Sequence[Instance]) -> Strategy:
    """Return a strategy that asks for some networks, one and all."""

    def propose(_: Problem, score: Evaluations) -> None:
        for i in range(0, len(networks), PASS):
            score(networks[i : i + PASS])

    return propose


@dataclass(frozen=True)
class Outcome:
    """What a strategy found.

    Args:
        scores: of every network it asked for, in the order of the trials.
        more: of the best few, on other images.
        best: of these, on all images.
        winner: the best of these.
    """

    scores: dict[Instance, Score]
    more: dict[Instance, Score]
    best: dict[Instance, Score]
    winner: Instance


def ranking(
    problem: Problem, reward: Callable[[Instance, Score], float]
) -> Callable[[tuple[Instance, Score]], tuple[object, ...]]:
    """Return what scored networks are sorted by: the greatest reward first, then the cheaper, then by name."""

    def key(entry: tuple[Instance, Score]) -> tuple[object, ...]:
        instance, score = entry
        return -reward(instance, score), problem.space.cost(instance), str(instance)

    return key


def run(
    problem: Problem,
    propose: Strategy,
    study: Study,
    *,
    best: int,
    measure_more: Measure,
    watch: Callable[[Evaluations], None],
) -> Outcome:
    """Let a strategy use up its evaluations, score its best networks on more images, and name the winner.

    Args:
        problem: what is searched.
        propose: the strategy.
        study: where the trials are kept.
        best: how many networks are scored again.
        measure_more: scores networks on other images than the first.
        watch: called before each batch with what is known.
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
    again = {instance: pooled(score, more[instance]) for instance, score in top.items()}
    return Outcome(scores, more, again, min(again.items(), key=key)[0])
