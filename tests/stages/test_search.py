"""The search as a stage: what it finds and commits, when it refuses, and how it ends after every kind of stop."""

import dataclasses
import json
import os
import shutil
import signal
import sqlite3
import tempfile
from contextlib import closing
from itertools import chain, product

import pytest
from other_search import another_search
from stage_calls import document, evaluate, run, search, train

from sdpctl.engine.cost import profile
from sdpctl.errors import BudgetError, DataError, NotFoundError, ResourceError, RunInterruptedError, UsageError
from sdpctl.instance import FULL, Instance
from sdpctl.models import create_model
from sdpctl.plan import Plan
from sdpctl.recipe.load import parse_recipe
from sdpctl.search import study
from sdpctl.search.scoring import Scorer
from sdpctl.search.study import open_storage
from sdpctl.stages.context import Context
from sdpctl.stages.network import open_network
from sdpctl.stages.search import Search, found_instances

pytestmark = pytest.mark.usefixtures("quick_sqlite")

POINTS = [f"layer{i}.{j}" for i in (1, 2, 3) for j in (0, 1, 2)]
LARGE = (
    f"search.points=[stem, {', '.join(POINTS)}]",
    "search.evaluations=16",
    "search.images=60",
    "search.calibration_batches=1",
    "search.rescore=3",
)
"""A search that takes a second: 196 networks, 129 of them within half of the MACs."""

FEW = ("search.images=60", "search.calibration_batches=1")
"""The same of the two points that were trained: a handful of networks."""


@pytest.fixture(scope="module")
def prepared(trained, make_once):
    """The same store with an empty database: making its tables takes most of a second."""

    def fill(path):
        shutil.copytree(trained, path, dirs_exist_ok=True)
        open_storage(f"sqlite:///{path / 'studies.sqlite'}").engine.dispose()

    return make_once("tiny-prepared", fill)


@pytest.fixture
def context(prepared, tmp_path, listener):
    shutil.copytree(prepared, tmp_path / "store")
    return Context(path=tmp_path / "store", report=listener)


@pytest.fixture(scope="module")
def first(prepared, make_once, make_listener):
    """The large search where nothing went wrong: its store, what it committed, what was said."""

    def fill(path):
        shutil.copytree(prepared, path, dirs_exist_ok=True)
        context = Context(path=path, report=make_listener())
        searched(context, *LARGE)
        (path / "notes.json").write_text(json.dumps(context.report.notes))

    path = make_once("tiny-searched", fill)
    context = Context(path=path, report=make_listener())
    return context, context.store.resolve("tiny.search"), json.loads((path / "notes.json").read_text())


def searched(context, *overrides, force=False):
    return search(open_network("tiny", context, overrides), context, force=force)


def found(ref, context):
    """Return the texts of the instances that a search found."""
    points = open_network(ref, context).recipe.model.points
    return [str(instance) for instance in found_instances(context.store.resolve(ref), context, points)]


def read(artifact, context):
    """Return the networks scored by their text, and the result."""
    trials = [json.loads(line) for line in context.store.read(artifact, "trials.jsonl").splitlines()]
    assert len({trial["instance"] for trial in trials}) == len(trials)
    return {trial["instance"]: trial for trial in trials}, document(artifact, context)


def asked_by(row, trials):
    """Return the networks that a run of a result asked for."""
    return {text: trial for text, trial in trials.items() if f"{row['run']}.{row['seed']}" in trial["runs"]}


def first_three(row, trials):
    """Return the networks of a run that are scored again: the best, then the cheaper, then by name."""
    asked = asked_by(row, trials)
    return sorted(asked, key=lambda text: (-asked[text]["top1"], asked[text]["macs"], text))[:3]


@pytest.fixture
def measured(monkeypatch):
    """Remember the networks that each pass really scores."""
    passes, score = [], Scorer.score

    def watched(self, instances):
        fresh = [str(instance) for instance in instances if instance not in self.known]
        scores = score(self, instances)
        passes.extend([fresh] if fresh else [])
        return scores

    monkeypatch.setattr(Scorer, "score", watched)
    return passes


def studies(path):
    """Read the trials of each study by SQL alone: (network, state), in order."""
    query = (
        "select s.study_name, a.value_json, t.state from studies s join trials t using (study_id) "
        "join trial_user_attributes a using (trial_id) where a.key = 'network' order by t.trial_id"
    )
    found = {}
    with closing(sqlite3.connect(path / "studies.sqlite")) as connection:
        for name, network, state in connection.execute(query):
            found.setdefault(name.partition("/")[2], []).append((json.loads(network), state))
    return found


# What is found


def test_the_artifact_holds_trials_result_and_recipe(first):
    context, artifact, notes = first
    assert (artifact.kind, artifact.tag) == ("search", "tiny.search")
    assert artifact.subject.digest == context.store.resolve("tiny").digest
    assert set(artifact.layers) == {"trials.jsonl", "result.json", "recipe.yaml"}
    assert list(context.store.verify()) == []
    recipe = parse_recipe(context.store.read(artifact, "recipe.yaml").decode(), "recipe.yaml")
    assert (recipe.search.evaluations, recipe.search.max_macs, recipe.search.strategy) == (16, "50%", "surrogate")
    assert notes[-1].startswith("tiny.search: ")
    assert artifact.digest.removeprefix("sha256:").startswith(notes[-1].split()[-1])


def test_every_network_is_counted_costs_what_it_costs_and_is_within_the_budget(first):
    context, artifact, _ = first
    trials, result = read(artifact, context)
    costs = profile(create_model("resnet20", num_classes=10, in_channels=1), map(Instance.parse, trials), (1, 8, 8))
    full = profile(create_model("resnet20", num_classes=10, in_channels=1), [FULL], (1, 8, 8))[FULL].macs
    assert result["budget"] == {"text": "50%", "macs": full // 2}
    assert result["space"]["points"] == ["stem", *POINTS]
    assert result["space"]["full"] == full
    assert {text: trial["macs"] for text, trial in trials.items()} == {str(i): cost.macs for i, cost in costs.items()}
    assert max(trial["macs"] for trial in trials.values()) <= full // 2
    assert result["evaluations"] == len(trials)
    for row in result["runs"]:
        assert row["evaluations"] == len(asked_by(row, trials))
    assert {trial["reward"] == trial["top1"] for trial in trials.values()} == {True}


def test_the_winner_stands_beside_the_best_single_point_the_baseline_and_full(first):
    context, artifact, _ = first
    trials, result = read(artifact, context)
    assert [row["run"] for row in result["runs"]] == ["single-point", "surrogate", "random"]
    assert [row["evaluations"] for row in result["runs"]] == [1, 16, 16]
    assert result["runs"][0]["instance"] == "stem@0.5"
    assert result["full"]["instance"] == "full"
    assert result["full"]["relative"] == 1
    for row in (*result["runs"], result["full"], result["best"]):
        assert row["heldout"]["images"] == 143
        assert row["test"]["images"] == 359
    best = max(result["runs"], key=lambda row: (row["heldout"]["top1"], -row["macs"]))
    assert result["best"]["instance"] == best["instance"]
    assert result["best"]["runs"] == trials[best["instance"]]["runs"]
    assert "full" not in trials


def test_each_winner_is_among_the_first_of_its_run_and_first_on_all_images(first):
    context, artifact, _ = first
    trials, result = read(artifact, context)
    rows = {row["instance"]: row for row in result["pareto"]}
    for row in result["runs"]:
        top = first_three(row, trials)
        assert row["instance"] in top
        assert all(rows[text]["heldout"]["top1"] <= row["heldout"]["top1"] for text in top if text in rows)


def test_the_pareto_front_is_what_nothing_beats(first):
    context, artifact, _ = first
    trials, result = read(artifact, context)
    pareto_front = result["pareto"]
    assert [row["macs"] for row in pareto_front] == sorted(row["macs"] for row in pareto_front)
    assert {row["heldout"]["images"] for row in pareto_front} <= {60, 143}
    again = {text for row in result["runs"] for text in first_three(row, trials)}
    known = {text: (trial["macs"], trial["top1"]) for text, trial in trials.items() if text not in again}
    known |= {row["instance"]: (row["macs"], row["heldout"]["top1"]) for row in (*pareto_front, *result["runs"])}
    best = {row["instance"] for row in pareto_front}
    assert best == {
        text
        for text, (macs, top1) in known.items()
        if not any(m <= macs and t >= top1 and (m, t) != (macs, top1) for m, t in known.values())
    }


def test_the_strategy_and_the_baseline_begin_with_the_same_networks(first):
    context, artifact, _ = first
    trials, _ = read(artifact, context)
    both = [text for text, trial in trials.items() if {"surrogate.0", "random.0"} <= set(trial["runs"])]
    assert len(both) >= 8


def test_test_scores_are_those_of_an_evaluation(first, tmp_path, listener):
    shutil.copytree(first[0].path, tmp_path / "store")
    context = Context(path=tmp_path / "store", report=listener)
    result = document(first[1], context)
    rows = {row["instance"]: row for row in (*result["runs"], result["full"])}
    evaluation = evaluate(open_network("tiny", context), context, list(rows))
    for row in document(evaluation, context)["rows"]:
        searched = rows[row["instance"]]
        assert searched["test"] == {"images": 359} | {name: row[name] for name in ("top1", "top5", "loss")}
        assert {name: searched[name] for name in ("macs", "params", "relative")} == {
            name: row[name] for name in ("macs", "params", "relative")
        }
    alone = document(evaluate(open_network("tiny", context), context, [result["best"]["instance"]]), context)["rows"][0]
    assert result["best"]["test"]["top1"] == pytest.approx(alone["top1"], abs=100 / 359 + 1e-9)  # one may stand on the edge


def test_full_keeps_its_own_statistics_on_the_test_images_too(context):
    """Imported weights say `calibrate.keep: full`; the search must then report what an evaluation does."""
    keep = "calibrate.keep=full"
    result = document(search(open_network("tiny", context, [*FEW, keep]), context), context)
    rows = document(evaluate(open_network("tiny", context, [keep]), context, ["full"]), context)["rows"]
    calibrated = document(evaluate(open_network("tiny", context, ["calibrate.keep=null"]), context, ["full"]), context)["rows"]
    assert result["full"]["test"]["loss"] == rows[0]["loss"] != calibrated[0]["loss"]


def test_what_was_found_can_be_named(first, context, tmp_path, listener):
    there = first[0]
    result = document(first[1], there)
    texts = found("tiny.search", there)
    assert texts == list(dict.fromkeys([result["best"]["instance"], *(r["instance"] for r in result["pareto"]), "full"]))
    assert found(first[1].digest, there) == texts
    shutil.copytree(there.path, tmp_path / "copy")
    copy = Context(path=tmp_path / "copy", report=listener)
    evaluation = evaluate(open_network("tiny.search", copy), copy, texts)
    assert [row["instance"] for row in document(evaluation, copy)["rows"]] == texts
    assert evaluation.tag == "tiny.eval"
    with pytest.raises(NotFoundError, match="tiny is of kind checkpoint, not a search; `sdpctl search` makes one"):
        found("tiny", context)


def test_few_networks_are_all_scored_and_that_is_said(context, listener):
    artifact = searched(context, *FEW)
    trials, result = read(artifact, context)
    assert any("no more than the evaluations, so all of them are scored" in note for note in listener.notes)
    assert [row["run"] for row in result["runs"]] == ["single-point", "exhaustive"]
    model = create_model("resnet20", num_classes=10, in_channels=1)
    every = [Instance((("stem", a), ("layer2.0", b))) for a, b in product((1, 0.75, 0.5), repeat=2)]
    costs = {str(i): cost.macs for i, cost in profile(model, every, (1, 8, 8)).items()}
    assert {costs[text] for text in costs if costs[text] <= costs["full"] // 2} == {t["macs"] for t in trials.values()}
    assert result["runs"][1]["evaluations"] == len(trials)


def test_compared_strategies_have_the_same_number_of_evaluations(context):
    artifact = searched(context, *LARGE, "search.compare=[uniform, random, greedy]", "search.seeds=2", "search.evaluations=10")
    trials, result = read(artifact, context)
    strategies = [row for row in result["runs"] if row["run"] != "single-point"]
    assert [(row["run"], row["seed"]) for row in strategies] == [
        (name, seed) for name in ("uniform", "greedy", "random") for seed in (0, 1)
    ]
    assert [row["evaluations"] for row in strategies] == [10] * 6
    asked = [set(asked_by(row, trials)) for row in strategies]
    assert [len(networks) for networks in asked] == [10] * 6
    assert asked[0] != asked[1]
    assert asked[4] != asked[5]


@pytest.mark.parametrize("agent", ["dqn", "ppo"])
def test_an_agent_searches_and_leaves_nothing_behind(context, tmp_path, monkeypatch, agent):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    trials, result = read(searched(context, *LARGE, f"search.strategy={agent}"), context)
    assert [(row["run"], row["evaluations"]) for row in result["runs"]] == [("single-point", 1), (agent, 16), ("random", 16)]
    assert max(trial["macs"] for trial in trials.values()) <= result["budget"]["macs"]
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_reward_that_weighs_the_cost_needs_no_budget(context):
    artifact = searched(context, *LARGE, "search.max_macs=none", "search.reward=branch", "search.weight=9000")
    trials, result = read(artifact, context)
    assert result["budget"]["macs"] is None
    assert result["budget"]["text"] is None
    for trial in trials.values():
        assert trial["reward"] == pytest.approx(trial["top1"] - 9000 * trial["macs"] / 1e9, rel=1e-12)
    assert max(trial["macs"] for trial in trials.values()) > result["space"]["full"] / 2
    winner = next(row for row in result["runs"] if row["run"] == "surrogate")
    worth = {text: trial["reward"] for text, trial in asked_by(winner, trials).items()}
    assert worth[winner["instance"]] >= sorted(worth.values())[-3]


def test_an_expression_is_the_reward_of_a_search(context):
    text = "top5 - 100 * max(relative, 0.5) - loss"
    artifact = searched(context, *LARGE, "search.max_macs=none", f"search.reward={text}")
    trials, result = read(artifact, context)
    assert result["reward"] == text
    full = result["space"]["full"]
    for trial in trials.values():
        expected = trial["top5"] - 100 * max(trial["macs"] / full, 0.5) - trial["loss"]
        assert trial["reward"] == pytest.approx(expected, rel=1e-12)
    same = searched(context, *LARGE, "search.max_macs=none", f"search.reward={text}")
    assert same.digest == artifact.digest
    other = searched(context, *LARGE, "search.max_macs=none", f"search.reward={text.replace('100', '99')}")
    assert other.digest != artifact.digest


def test_a_reward_without_a_value_ends_the_search_in_one_line(context):
    keys = (*FEW, "search.max_macs=none", "search.reward=log(relative - 2)")
    lines = []
    for _ in range(2):  # the scores are kept, so the second search ends at the first network
        with pytest.raises(UsageError) as caught:
            searched(context, *keys)
        lines.append(str(caught.value))
    assert lines[0].startswith("search.reward='log(relative - 2)': the reward of ")
    assert lines[1].startswith("search.reward='log(relative - 2)': the reward of ")
    assert {line.partition(" (")[0].partition(" where ")[2].partition(" is ")[0] for line in lines} == {"relative"}
    with pytest.raises(NotFoundError):
        context.store.resolve("tiny.search")


def test_other_ratios_at_some_points(context):
    artifact = searched(context, *FEW, "search.ratios=[1, 0.5]", "search.ratios_at={layer2.0: [1, 0.75, 0.25]}")
    trials, result = read(artifact, context)
    used = {choice for text in trials for choice in Instance.parse(text).choices} - {("layer2.0", 0.5)}
    assert used <= {("stem", 0.5), ("layer2.0", 0.75), ("layer2.0", 0.25)}
    assert ("layer2.0", 0.25) in used
    assert result["space"]["points"] == ["stem", "layer2.0"]


def test_run_searches_where_the_recipe_says_so(tiny, context, listener):
    recipe = tiny("search={images: 60, calibration_batches: 1, strategy: random}")
    done = run(recipe, context)
    assert list(done) == ["train", "calibrate-bn", "eval-instances", "search"]
    assert (done["search"].kind, done["search"].tag) == ("search", "tiny.search")
    assert done["search"].subject.digest == done["train"].digest
    assert not any("epoch" in note for note in listener.notes)
    listener.notes.clear()
    assert run(recipe, context)["search"].digest == done["search"].digest
    assert "tiny.search: in the store already" in listener.notes[-1]


# Its tags


def tags(context):
    return {artifact.tag: artifact.digest for artifact in context.store.artifacts() if artifact.kind == "search"}


def test_a_search_within_a_second_budget_leaves_the_first_under_its_budget(context):
    half = searched(context, *FEW)
    most = searched(context, *FEW, "search.max_macs=080.0 %")
    assert half.digest != most.digest
    assert (half.tag, most.tag) == ("tiny.search", "tiny.search")
    after = {"tiny.search": most.digest, "tiny.search.50pct": half.digest, "tiny.search.80pct": most.digest}
    assert tags(context) == after
    assert found("tiny.search", context) == found("tiny.search.80pct", context) != found("tiny.search.50pct", context)

    index = (context.path / "index.json").read_bytes()
    dry = dataclasses.replace(context, dry_run=True)
    assert searched(dry, *FEW).tag == "tiny.search.50pct"
    assert searched(dry, *FEW, "search.max_macs=70%") is None
    assert (context.path / "index.json").read_bytes() == index

    again = searched(context, *FEW)
    assert (again.digest, again.tag) == (half.digest, "tiny.search")
    assert tags(context) == after | {"tiny.search": half.digest}
    forced = searched(context, *FEW, "search.max_macs=080.0 %", force=True)
    assert (forced.digest, forced.tag) == (most.digest, "tiny.search")  # the same scores, the same digest
    assert tags(context) == after
    assert context.store.gc(untagged=True, grace=0).entries == ()
    assert context.store.count() == 3  # the checkpoint and two searches


def test_a_search_that_is_older_than_the_tags_of_budgets_takes_its_tag(context):
    half = searched(context, *FEW)
    context.store.discard(dataclasses.replace(half, tag="tiny.search.50pct"))
    assert tags(context) == {"tiny.search": half.digest}
    searched(context, *FEW)
    assert tags(context) == {"tiny.search": half.digest, "tiny.search.50pct": half.digest}


def test_a_checkpoint_keeps_a_tag_that_looks_like_that_of_a_search(context):
    checkpoint = context.store.tag(context.store.resolve("tiny"), "tiny.search.50pct")
    artifact = search(open_network("tiny.search.50pct", context, FEW), context)
    assert artifact.tag == "tiny.search.50pct.search"
    assert context.store.resolve("tiny.search.50pct").digest == checkpoint.digest
    assert open_network(artifact.tag, context).name == "tiny.search.50pct"


def test_a_search_without_a_budget_has_a_tag_too(context):
    artifact = searched(context, *FEW, "search.max_macs=none", "search.reward=amc")
    assert tags(context) == {"tiny.search": artifact.digest, "tiny.search.any": artifact.digest}


# Again


def test_a_second_search_answers_from_the_store(first, tmp_path, listener, measured):
    shutil.copytree(first[0].path, tmp_path / "store")
    context = Context(path=tmp_path / "store", report=listener)
    assert searched(context, *LARGE).digest == first[1].digest
    assert "in the store already" in listener.notes[-1]
    assert measured == []
    assert searched(context, *LARGE, "search.storage=sqlite:///elsewhere", "search.study=x").digest == first[1].digest
    assert measured == []


def test_two_stores_one_digest(first, context):
    assert searched(context, *LARGE).digest == first[1].digest


@pytest.mark.parametrize("overrides", [LARGE, (*LARGE, "search.points=[stem, layer1.0, layer1.1, layer1.2, layer2.0]")])
def test_force_scores_anew_to_the_same_digest(context, measured, overrides):
    """Also where a strategy finds nothing new before its evaluations are used up."""
    before = searched(context, *overrides)
    once = [list(networks) for networks in measured]
    measured.clear()
    assert searched(context, *overrides, force=True).digest == before.digest
    assert measured == once != []


def test_no_network_is_scored_twice_for_several_strategies(context, measured):
    searched(context, *LARGE, "search.compare=[surrogate, greedy, uniform]", "search.evaluations=12")
    networks = list(chain(*measured))
    assert len(set(networks)) == len(networks)
    assert sum(len(trials) for trials in studies(context.path).values()) > len(networks)


def test_a_dry_run_says_what_and_writes_nothing(context, tmp_path, measured):
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    dry = dataclasses.replace(context, dry_run=True)
    assert searched(dry, *LARGE) is None
    plan = Plan(dry)
    plan.run(Search(open_network("tiny", dry, LARGE)))
    assert [(step.tag, step.digest) for step in plan.steps] == [("tiny.search", None)]
    assert plan.steps[0].task == (
        "search 196 networks of 10 points, at most 1,258,309 MACs (50.0 %), by surrogate, random, 16 evaluations each"
    )
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert measured == []


# What is refused


def refused(context, error, code, *overrides):
    """Check that a search is refused before anything is scored or written, and return the line."""
    before = studies(context.path)
    digests = {artifact.digest for artifact in context.store.artifacts()}
    with pytest.raises(error) as caught:
        searched(context, *overrides)
    assert caught.value.exit_code == code
    assert len(str(caught.value).splitlines()) == 1
    assert studies(context.path) == before
    assert {artifact.digest for artifact in context.store.artifacts()} == digests
    return str(caught.value)


@pytest.mark.parametrize("budget", ["1", "14.3%"])
def test_a_budget_that_nothing_meets_names_the_least(context, measured, budget):
    line = refused(context, BudgetError, 8, *LARGE, f"search.max_macs={budget}")
    assert "360,074" in line
    assert "14.3 %" in line
    assert measured == []


def test_the_least_itself_is_within_the_budget(context):
    _, result = read(searched(context, *LARGE, "search.max_macs=360074"), context)
    assert result["best"]["macs"] == result["space"]["least"] == 360_074


def test_a_budget_above_full_is_said(context, listener):
    trials, result = read(searched(context, *FEW, "search.max_macs=1G"), context)
    assert any("the budget, 1,000,000,000 MACs, is more than `full` costs, 2,516,618; every" in note for note in listener.notes)
    assert "full" in trials
    assert result["budget"]["macs"] == 10**9


def test_another_holdout_than_that_of_the_training_is_refused(context, measured):
    line = refused(context, UsageError, 2, *LARGE, "data.holdout=20%")
    assert "data.holdout=0.2" in line
    assert "0.1" in line
    assert measured == []


def test_a_holdout_too_small_for_the_classes(tiny, context, measured):
    train(tiny("data.holdout=1%", "train.epochs=0"), context)
    line = refused(context, DataError, 7, *FEW)
    assert line.startswith("data.holdout=1% keeps 1")
    assert "images of 10 classes, too few" in line
    assert measured == []


def test_too_many_networks_to_score_each(context):
    wide = (*LARGE, "data.image_size=32", "search.strategy=exhaustive", "search.max_macs=90%")
    assert "more than 4,096 networks are within the budget" in refused(context, UsageError, 2, *wide)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("search.max_macs=60%", "its budget is 1258309, here it is 1509970"),
        ("search.points=[stem, layer1.0, layer1.1, layer1.2, layer2.0, layer2.1]", "its points is stem, "),
        ("search.ratios=[1, 0.5]", "its ratios is 1, 0.75, 0.5; 1, 0.75, 0.5"),
        ("search.images=50", "its search is "),
        ("search.reward=amc", "its reward is accuracy, here it is amc"),
        ("search.reward=top1 - 2 * gmacs", "its reward is accuracy, here it is top1 - 2 * gmacs"),
    ],
)
def test_a_study_of_something_else_is_refused(first, tmp_path, listener, override, words):
    shutil.copytree(first[0].path, tmp_path / "store")
    context = Context(path=tmp_path / "store", report=listener)
    (name,) = {name for (name,) in sql(context.path, "select study_name from studies") if name.endswith("/single-point")}
    line = refused(context, UsageError, 2, *LARGE, override, f"search.study={name.partition('/')[0]}")
    assert line.startswith(f"study {name}: {words}")


def sql(path, query):
    with closing(sqlite3.connect(path / "studies.sqlite")) as connection:
        return connection.execute(query).fetchall()


def test_a_study_of_another_checkpoint_is_refused(tiny, context):
    searched(context, *FEW, "search.study=shared")
    train(tiny("train.epochs=0", "name=other"), context)
    with pytest.raises(
        UsageError, match=r"^study shared/single-point: its checkpoint is [0-9a-f]{12}, here it is [0-9a-f]{12};"
    ):
        search(open_network("other", context, [*FEW, "search.study=shared"]), context)


def test_a_storage_that_is_not_there_is_refused(context, tmp_path, measured):
    line = refused(context, ResourceError, 7, *LARGE, f"search.storage=sqlite:///{tmp_path}/nowhere/studies.sqlite")
    assert "nowhere/studies.sqlite: cannot open this database" in line
    assert measured == []


def test_a_storage_that_breaks_is_one_line(context, monkeypatch):
    score = Scorer.score

    def breaking(self, instances):
        (context.path / "studies.sqlite").write_bytes(b"broken" * 9999)
        return score(self, instances)

    monkeypatch.setattr(Scorer, "score", breaking)
    with pytest.raises(ResourceError, match=r"tiny\.search: the storage cannot be used") as caught:
        searched(context, *LARGE)
    assert len(str(caught.value).splitlines()) == 1


# The storage


def everything(path):
    """Return the bytes of all files of a store but the studies'."""
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and not file.name.startswith("studies")}


@pytest.mark.parametrize("how", ["recipe", "environment"])
def test_the_address_of_a_storage_is_written_nowhere(first, context, tmp_path, monkeypatch, listener, how):
    address = f"sqlite:///{tmp_path}/geheim.sqlite"
    before = everything(context.path)
    if how == "environment":
        monkeypatch.setenv("SDPCTL_STORAGE", address)
        address = "sqlite:////nowhere/at/all"
    artifact = searched(context, *LARGE, f"search.storage={address}", "search.study=heimlich")
    assert artifact.digest == first[1].digest
    assert (tmp_path / "geheim.sqlite").stat().st_size > 10_000
    assert studies(context.path) == {}
    written = everything(context.path)
    assert len(written) > len(before)
    for file, content in written.items():
        assert not any(word in content for word in (b"geheim", b"heimlich", b"sqlite:", b"nowhere")), file
    assert not any("geheim" in note or "sqlite" in note for note in listener.notes)


# Stopped


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_after_a_pass_and_gone_on_to_the_same_digest(first, context, monkeypatch, measured, signum, code):
    score, passes = Scorer.score, iter(range(99))

    def interrupted(self, instances):
        scores = score(self, instances)
        if next(passes) == 1:
            os.kill(os.getpid(), signum)
        return scores

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "score", interrupted)
        with pytest.raises(RunInterruptedError) as caught:
            searched(context, *LARGE)
    assert caught.value.exit_code == code
    assert str(caught.value) == (
        "tiny.search: interrupted after 8 evaluations of surrogate; they are kept, the same command continues"
    )
    assert [a.tag for a in context.store.artifacts()] == ["tiny"]
    assert searched(context, *LARGE).digest == first[1].digest
    networks = list(chain(*measured))
    assert len(set(networks)) == len(networks)


def complete(path):
    """Return the networks of each study that are scored, once none is under way."""
    found = studies(path)
    assert {state for trials in found.values() for _, state in trials} <= {"COMPLETE", "FAIL"}
    found = {name: [network for network, state in trials if state == "COMPLETE"] for name, trials in found.items()}
    for networks in found.values():
        assert len(set(networks)) == len(networks)
    return found


def test_killed_and_gone_on_to_the_same_digest_scoring_nothing_twice(first, context, tmp_path, measured):
    with another_search(context.path, tmp_path / "log", LARGE, dies=3) as killed:
        killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    states = [state for _, state in studies(context.path)["surrogate"]]
    assert (states.count("COMPLETE"), states.count("RUNNING")) == (8, 8)
    assert searched(context, *LARGE).digest == first[1].digest
    networks = [*(tmp_path / "log").read_text().split(), *chain(*measured)]
    assert len(set(networks)) == len(networks)
    assert {name: len(networks) for name, networks in complete(context.path).items()} == {
        "single-point": 1,
        "surrogate": 16,
        "random": 16,
    }
    assert [state for _, state in studies(context.path)["surrogate"]].count("FAIL") == 8


def test_two_processes_on_one_store_end_with_one_artifact(context, tmp_path, measured, monkeypatch):
    """While the other is at its first networks, this one claims the next and scores them."""
    monkeypatch.setattr(study, "POLL", 0.05)
    score, awaited = Scorer.score, tmp_path / "awaited"
    monkeypatch.setattr(Scorer, "score", lambda self, instances: awaited.touch() or score(self, instances))
    with another_search(context.path, tmp_path / "log", LARGE, awaited=awaited) as other:
        while "RUNNING" not in {state for _, state in studies(context.path).get("surrogate", [])}:
            assert other.poll() is None, other.communicate()
        artifact = searched(context, *LARGE)
        printed, said = other.communicate(timeout=120)
    assert (other.returncode, printed.strip(), said) == (0, artifact.digest, "")
    assert tags(context) == {"tiny.search": artifact.digest, "tiny.search.50pct": artifact.digest}
    assert list(context.store.verify()) == []
    theirs, ours = (tmp_path / "log").read_text().split(), list(chain(*measured))
    assert set(theirs) & set(ours) <= {"full"}
    assert min(len(theirs), len(ours)) > 1
    trials, result = read(artifact, context)
    assert {row["run"]: row["evaluations"] for row in result["runs"]} == {"single-point": 1, "surrogate": 16, "random": 16}
    assert {name: len(networks) for name, networks in complete(context.path).items()} == {
        "single-point": 1,
        "surrogate": 16,
        "random": 16,
    }
    assert {*theirs, *ours} == {*trials, "full"}
    assert list((context.path / "processes").iterdir()) == []
