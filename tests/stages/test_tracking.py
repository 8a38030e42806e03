"""Trackers get the figures of a training and of what is made from it; their own readers say so."""

import json
import shutil
import warnings

import pytest
from command import called, one_line
from stage_calls import evaluate, train

from sdpctl.errors import ResourceError
from sdpctl.kinds import HISTORY, RECIPE
from sdpctl.stages.layers import read_document, read_records
from sdpctl.stages.network import open_network
from sdpctl.stages.tracking import FIGURES
from sdpctl.tracking.catalog import TRACKERS, TrackerInfo
from sdpctl.tracking.tracker import Run, Tracker, curve_name


@pytest.fixture(scope="module")
def tensorboard_reader():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the reader's own imports
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    return EventAccumulator


def points(events):
    return [(event.step, event.value) for event in events]


def test_tensorboard_reads_the_curves_the_instances_and_the_digests(tiny, context, tensorboard_reader):
    recipe = tiny("train.epochs=2", "train.track=tensorboard")
    checkpoint = train(recipe, context)
    evaluation = evaluate(open_network(recipe.name, context), context)
    rows = read_document(context.store, evaluation)["rows"]
    folder = context.path / "tensorboard" / recipe.name / checkpoint.key[:12]
    reader = tensorboard_reader(str(folder)).Reload()
    history = read_records(context.store, checkpoint, HISTORY)
    for key in ("loss", "accuracy", "lr"):
        assert points(reader.Scalars(f"train/{key}")) == [(each["epoch"], pytest.approx(each[key])) for each in history]
    validated = [(each["epoch"], each["validation"]["full"]["top1"]) for each in history if "validation" in each]
    assert points(reader.Scalars("validation/top1/full")) == [pytest.approx(pair) for pair in validated]
    for row in rows:
        assert points(reader.Scalars(curve_name(f"test/top1/{row['instance']}"))) == [(0, pytest.approx(row["top1"]))]
    front = points(reader.Scalars("test/top1_by_macs"))
    assert sorted(front) == [pytest.approx(pair) for pair in sorted((row["macs"], row["top1"]) for row in rows)]
    texts = {tag: reader.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in reader.Tags()["tensors"]}
    assert checkpoint.digest in texts["checkpoint.digest.txt/text_summary"]
    assert "arch: " in texts["recipe.yaml/text_summary"]


def test_a_step_that_is_written_again_has_one_value(tmp_path, tensorboard_reader):
    from sdpctl.tracking.tensorboard import TensorBoard

    run = Run(name="net", id="0123456789ab", folder=tmp_path)
    for first, values in ((1, [1.0, 2.0, 3.0]), (3, [30.0, 40.0])):
        tracker = TensorBoard(run, first)
        for step, value in enumerate(values, first):
            tracker.scalars({"loss": value}, step)
        tracker.close()
    reader = tensorboard_reader(str(tmp_path / "tensorboard" / "net" / run.id)).Reload()
    assert points(reader.Scalars("loss")) == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]


def test_tracking_is_part_of_no_digest(tiny, context):
    plain = train(tiny("train.epochs=1"), context)
    tracked = train(tiny("train.epochs=1", "train.track=[tensorboard]"), context, force=True)
    assert tracked.digest == plain.digest
    assert b"track" not in context.store.read(tracked, RECIPE)


def test_mlflow_has_one_run_for_a_training_and_its_evaluation(tiny, context, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    monkeypatch.chdir(tmp_path)  # MLflow puts the artifacts of a local database here
    recipe = tiny("train.epochs=2", "train.track=mlflow")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's and SQLAlchemy's own
        checkpoint = train(recipe, context)
        evaluation = evaluate(open_network(recipe.name, context), context)
        from mlflow import MlflowClient

        client = MlflowClient()
        (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
        losses = client.get_metric_history(run.info.run_id, "train/loss")
    history = read_records(context.store, checkpoint, HISTORY)
    assert points(losses) == [(each["epoch"], each["loss"]) for each in history]
    rows = read_document(context.store, evaluation)["rows"]
    assert all(run.data.metrics[curve_name(f"test/top1/{row['instance']}")] == row["top1"] for row in rows)
    assert (run.info.run_name, run.info.status, run.data.params["train.epochs"]) == (recipe.name, "FINISHED", "2")
    texts = {path.name: path.read_text() for path in tmp_path.glob("mlruns/**/artifacts/*")}
    assert texts["evaluation.digest.txt"] == evaluation.digest
    assert texts[RECIPE].encode() == context.store.read(checkpoint, RECIPE)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_ends_before_anything_is_done(name, repository, tmp_path, monkeypatch):
    monkeypatch.setattr("sdpctl.tracking.catalog.find_spec", lambda module: None)
    done = called(tmp_path, "train", repository / "recipes" / "smoke.yaml", "--set", f"train.track={name}")
    one_line(done, 7, "train.track", f"pip install 'sdpctl[{name}]'")
    assert not list(tmp_path.glob(".sdpctl/blobs/sha256/*"))


class Failing(Tracker):
    """A tracker whose program goes away after the first epoch."""

    def __init__(self, run, first_step=None):
        self.failed = False

    def scalars(self, values, step):
        if step > 1:
            self.failed = True
            raise ResourceError("nobody answers")

    def document(self, name, text): ...

    def settings(self, values): ...

    def close(self):
        assert not self.failed  # it gets nothing more


def test_a_tracker_that_fails_is_told_once_and_costs_nothing(tiny, context, listener):
    plain = train(tiny("train.epochs=3"), context)
    TRACKERS.add(TrackerInfo(name="failing", module="json", code=f"{__name__}:Failing"))
    try:
        tracked = train(tiny("train.epochs=3", "train.track=failing"), context, force=True)
    finally:
        TRACKERS.remove("failing")
    assert tracked.digest == plain.digest
    (note,) = [note for note in listener.notes if "tracking" in note]
    assert "failing" in note
    assert "nobody answers" in note


def test_a_result_is_kept_where_its_tracker_cannot_be_reached(tiny, context, listener):
    recipe = tiny("train.epochs=1", "train.track=tensorboard")
    train(recipe, context)
    shutil.rmtree(context.path / "tensorboard")
    (context.path / "tensorboard").write_text("in the way")
    evaluation = evaluate(open_network(recipe.name, context), context, ["full"])
    assert context.tagged(f"{recipe.name}.eval").digest == evaluation.digest
    (note,) = [note for note in listener.notes if "tracking" in note]
    assert "the work goes on" in note


def test_a_missing_tracker_ends_before_the_same_weights_get_a_different_recipe(tiny, context, monkeypatch):
    train(tiny("train.epochs=1"), context)
    monkeypatch.setattr("sdpctl.tracking.catalog.find_spec", lambda module: None)
    with pytest.raises(ResourceError, match="is not installed"):
        train(tiny("train.epochs=1", "name=renamed", "train.track=tensorboard"), context)
    assert context.tagged("renamed") is None


def test_a_folder_that_cannot_be_written_to_ends_before_the_training(tiny, context):
    context.make_store()
    (context.path / "tensorboard").write_text("in the way")
    with pytest.raises(ResourceError, match="tensorboard"):
        train(tiny("train.track=tensorboard"), context)


def test_a_search_has_a_curve_for_each_run_and_its_best_so_far():
    trials = [
        ({"reward": 70.0, "runs": ["ppo.0"]}),
        {"reward": 72.0, "runs": ["ppo.0", "tpe.1"]},
        {"reward": 71.0, "runs": ["ppo.0"]},
    ]
    layers = {
        "trials.jsonl": "\n".join(map(json.dumps, trials)).encode(),
        "result.json": json.dumps({"budget": {"text": "50%"}}).encode(),
    }
    figures = list(FIGURES["search"](layers))
    best = [(step, values["search/50%/ppo.0/best"]) for step, values in figures if "search/50%/ppo.0/best" in values]
    assert best == [(1, 70.0), (2, 72.0), (3, 72.0)]
    assert (1, {"search/50%/tpe.1/reward": 72.0, "search/50%/tpe.1/best": 72.0}) in figures


def test_an_agent_has_its_learning_curve():
    records = [
        {"evaluations": 48, "reward": 77.5, "standardised": -1.0},
        {"evaluations": 64, "reward": 78.0, "standardised": 0.5},
    ]
    figures = list(FIGURES["agent"]({"curve.jsonl": "\n".join(map(json.dumps, records)).encode()}))
    assert figures == [
        (48, {"agent/reward": 77.5, "agent/standardised": -1.0}),
        (64, {"agent/reward": 78.0, "agent/standardised": 0.5}),
    ]
