"""The runs of a search, a strategy that is added from outside, and what is told of all runs together."""

import json
from types import SimpleNamespace

import optuna
import pytest
import torch

from sdpctl.engine.cost import Costs
from sdpctl.engine.evaluate import Score
from sdpctl.errors import UsageError
from sdpctl.instance import FULL, Instance
from sdpctl.models import create_model
from sdpctl.sdpoint import sdpoint_instances
from sdpctl.search.catalog import BASELINE, EXHAUSTIVE, SINGLE_POINT, STRATEGIES, StrategyInfo
from sdpctl.search.problem import Problem
from sdpctl.search.run import load_strategy, planned_runs, run_strategy
from sdpctl.search.space import Space
from sdpctl.search.study import Study
from sdpctl.search.summary import Summary


def cheapest(problem, score):
    """Ask for the networks within the budget, the smallest ratios first, two at a time."""
    networks = list(problem.space.networks(problem.limit))[::-1]
    for i in range(0, len(networks), 2):
        score(networks[i : i + 2])


@pytest.fixture
def toy():
    """Add a strategy to the table."""
    STRATEGIES.add(StrategyInfo(name="cheapest", summary="the cheapest networks", code=f"{__name__}:cheapest"))
    yield "cheapest"
    STRATEGIES.remove("cheapest")


@pytest.fixture(scope="module")
def space():
    with torch.device("meta"):
        model = create_model("resnet20", num_classes=10, in_channels=1)
    return Space(Costs(model, (1, 12, 12)), dict.fromkeys(("layer1.0", "layer2.0"), (1, 0.75, 0.5)))


def score_of(instance, images):
    """Return a score that is better for larger ratios."""
    top1 = 100.0
    for _, ratio in instance.choices:
        top1 *= ratio
    return Score(images, top1, None, 1.0)


@pytest.fixture
def outcome_of(space):
    """Run one planned run to its end."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def outcome_of(run):
        study = Study(
            optuna.storages.InMemoryStorage(),
            run.strategy,
            {"strategy": run.strategy},
            space=space,
            choices={point: [1.0, 0.75, 0.5] for point in ("layer1.0", "layer2.0")},
            owner=SimpleNamespace(id="me", gone=lambda _: False),
            reward=lambda _, score: score.top1,
            measure=lambda instances: {instance: score_of(instance, 100) for instance in instances},
        )
        return run_strategy(
            run.problem,
            run.propose,
            study,
            best=2,
            measure_more=lambda instances: {instance: score_of(instance, 50) for instance in instances},
            watch=lambda _: None,
        )

    return outcome_of


def test_one_entry_makes_a_strategy_that_runs(toy, space, outcome_of):
    problem = Problem(space, space.full, 4, 0)
    (run,) = planned_runs([problem], [toy], [])
    assert (run.strategy, run.seed_number, run.problem) == (toy, 0, problem)
    outcome = outcome_of(run)
    networks = list(space.networks(space.full))[::-1]
    assert list(outcome.scores) == networks[:4]
    assert outcome.winner == max(networks[:4], key=lambda instance: (score_of(instance, 1).top1, -space.cost(instance)))
    assert outcome.best[outcome.winner].images == 150


def test_a_name_that_is_not_there_suggests_one(toy):
    with pytest.raises(UsageError, match=r"there is no strategy 'cheapes'.*did you mean 'cheapest'"):
        load_strategy("cheapes")


def test_the_runs_of_a_search_in_order(space):
    budget = int(0.8 * space.full)
    problems = [Problem(space, budget, 3, seed) for seed in (5, 6)]
    grid = [FULL, *(Instance(((point, ratio),)) for point in ("layer1.0", "layer2.0", "layer3.0") for ratio in (0.75, 0.5))]
    runs = planned_runs(problems, [EXHAUSTIVE, BASELINE], grid)
    named = [(run.strategy, run.seed_number, run.problem.seed) for run in runs]
    assert named == [(SINGLE_POINT, 0, 5), (EXHAUSTIVE, 0, 5), (EXHAUSTIVE, 1, 6), (BASELINE, 0, 5), (BASELINE, 1, 6)]
    asked = []
    runs[0].propose(runs[0].problem, asked.extend)
    within = [space.canonical(instance) for instance in grid[1:] if space.cost(instance) <= budget]
    assert asked == list(dict.fromkeys(within))
    assert 0 < len(asked) < len(grid) - 1
    counts = [run.problem.evaluations for run in runs]
    assert counts == [len(asked), *[len(list(space.networks(budget)))] * 2, 3, 3]
    assert SINGLE_POINT not in [run.strategy for run in planned_runs(problems, [BASELINE], [FULL])]


def test_every_strategy_has_a_summary_and_its_names_are_in_the_table():
    assert all(info.summary for info in STRATEGIES.values())
    assert [name for name, info in STRATEGIES.items() if info.scores_all] == [EXHAUSTIVE]
    assert BASELINE in STRATEGIES
    assert SINGLE_POINT not in STRATEGIES


def test_the_summary_of_two_runs(space, outcome_of):
    problem = Problem(space, None, 3, 0)
    runs = planned_runs([problem], [EXHAUSTIVE], sdpoint_instances(space.costs.model, (0.5,)))
    outcomes = {(run.strategy, run.seed_number): outcome_of(run) for run in runs}
    summary = Summary(outcomes, problem, lambda _, score: score.top1, score_of(FULL, 150))
    single = outcomes[SINGLE_POINT, 0].winner
    assert summary.winners == [single, FULL]
    assert summary.best == FULL
    assert summary.notes() == []
    tested = {single: Score(10, 40.0, None, 2.0), FULL: Score(10, 90.0, 99.0, 0.5)}
    result = summary.result("none", "accuracy", tested).document()
    assert json.loads(json.dumps(result)) == result | {"space": result["space"] | {"points": ["layer1.0", "layer2.0"]}} | {
        "best": result["best"] | {"runs": ["exhaustive.0"]}
    }
    assert result["budget"] == {"text": "none", "macs": None}
    assert result["evaluations"] == len(set(outcomes[EXHAUSTIVE, 0].scores) | set(outcomes[SINGLE_POINT, 0].scores))
    full = {
        "instance": "full",
        "macs": space.full,
        "params": space.costs.of(FULL).params,
        "relative": 1.0,
        "heldout": {"images": 150, "top1": 100.0, "loss": 1.0},
        "test": {"images": 10, "top1": 90.0, "top5": 99.0, "loss": 0.5},
    }
    assert result["full"] == full
    assert result["best"] == full | {"runs": ("exhaustive.0",)}
    assert [(run["run"], run["seed"], run["instance"]) for run in result["runs"]] == [
        (SINGLE_POINT, 0, str(single)),
        (EXHAUSTIVE, 0, "full"),
    ]
    macs = [row["macs"] for row in result["pareto"]]
    assert macs == sorted(macs)
    assert [("test" in row) for row in result["pareto"]] == [
        row["instance"] in (str(single), "full") for row in result["pareto"]
    ]
    trials = {trial.instance: trial.document() for trial in summary.trials()}
    assert len(trials) == result["evaluations"]
    assert trials["full"] == {
        "instance": "full",
        "macs": space.full,
        "runs": ("exhaustive.0",),
        "reward": 100.0,
        "top1": 100.0,
        "top5": None,
        "loss": 1.0,
    }
