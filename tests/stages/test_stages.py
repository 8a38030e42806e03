import copy
import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load
from sklearn.metrics import recall_score
from stage_calls import calibrate, document, evaluate, planned, profile, run, train

from sdpctl import load as load_network
from sdpctl.engine.cost import profile as count
from sdpctl.errors import DataError, DivergedError, NotFoundError, UsageError
from sdpctl.instance import FULL, Instance
from sdpctl.models import create_model
from sdpctl.stages.context import Context
from sdpctl.stages.layers import read_records
from sdpctl.stages.network import grid, open_network


def test_run_goes_from_a_recipe_to_the_table(tiny, context):
    done = run(tiny("profile={}"), context)
    assert list(done) == ["train", "calibrate-bn", "eval-instances", "profile-flops"]
    assert [a.kind for a in done.values()] == ["checkpoint", "bn-statistics", "evaluation", "profile"]
    assert {a.tag for a in context.store.artifacts()} == {"tiny", "tiny.bn", "tiny.eval", "tiny.profile"}
    rows = {row["instance"]: row for row in document(done["eval-instances"], context)["rows"]}
    assert list(rows) == ["full", "stem@0.5", "layer2.0@0.5"]
    model = create_model("resnet20", num_classes=10, in_channels=1)
    for instance, cost in count(model, map(Instance.parse, rows), (1, 8, 8)).items():
        assert (rows[str(instance)]["macs"], rows[str(instance)]["params"]) == (cost.macs, cost.params)
    assert rows["full"]["relative"] == 1 > rows["layer2.0@0.5"]["relative"] > rows["stem@0.5"]["relative"]
    assert document(done["eval-instances"], context)["images"] == 359
    assert list(context.store.verify()) == []


def test_the_rows_are_those_of_each_instance_alone(tiny, context, done):
    """Weights and statistics, read back by other means than the tree's, give the committed accuracies."""
    store = context.store
    weights = load(store.read(done["train"], "model.safetensors"))
    statistics = load(store.read(done["calibrate-bn"], "statistics.safetensors"))
    from pathlib import Path

    from sdpctl.data.reader import Located
    from sdpctl.data.sources import open_sources

    test = open_sources("digits", Path(), Located((), {}))[1]
    x_NCHW = (test.images / 255 - 0.3053) / 0.3760
    for row in document(done["eval-instances"], context)["rows"]:
        model = create_model("resnet20", num_classes=10, in_channels=1).eval()
        model.load_state_dict(weights)
        for segment_index, segment in enumerate(model.segments()):
            node = Instance.parse(row["instance"]).among(s.point for s in model.segments()[:segment_index] if s.point)
            for name, bn in model.norms(segment).items():
                bn.running_mean.copy_(statistics[f"{node}/{name}.running_mean"])
                bn.running_var.copy_(statistics[f"{node}/{name}.running_var"])
        with torch.inference_mode():
            predicted = model(x_NCHW, row["instance"]).argmax(1)
        hits = (predicted == test.labels).sum().item()
        assert row["top1"] == pytest.approx(100 * hits / 359, abs=100 / 359 + 1e-9)  # one image may stand on the edge
        assert row["by_class"] == pytest.approx(100 * recall_score(test.labels, predicted, average=None), abs=100 / 30)
    assert document(done["eval-instances"], context)["class_images"] == test.labels.bincount().tolist()


def test_a_second_run_does_nothing(tiny, context, listener, done):
    again = run(tiny(), context)
    assert {k: a.digest for k, a in done.items()} == {k: a.digest for k, a in again.items()}
    assert len(listener.notes) == 3
    assert all("in the store already" in note for note in listener.notes)


@pytest.mark.usefixtures("is_trained")
def test_what_cannot_change_a_result_trains_nothing_again(tiny, context, listener):
    first = context.store.resolve("tiny")
    again = tiny("data.workers=1", "device=cpu", "train.checkpoint.epochs=7")
    assert train(again, context).digest == first.digest
    assert "in the store already" in listener.notes[-1]
    assert train(tiny("train.lr=0.05"), context).digest != first.digest


@pytest.mark.usefixtures("is_trained")
def test_a_recipe_that_differs_elsewhere_gets_the_checkpoint_it_would_have_led_to(tiny, context, tmp_path, listener):
    other = tiny("name=other", "calibrate.batches=2")
    fresh = train(other, Context(path=tmp_path / "fresh", report=listener))
    listener.notes.clear()
    assert train(other, context).digest == fresh.digest
    assert listener.notes[-1] == f"other: the same weights with this recipe, {fresh.short}"
    assert not any("epoch" in note for note in listener.notes)
    assert {a.tag for a in context.store.artifacts()} == {"tiny", "other"}
    calibrated = calibrate(open_network("other", context), context)
    assert (calibrated.tag, document(calibrated, context)["batches"]) == ("other.bn", 2)


@pytest.mark.parametrize("average", [None, 0.5])
def test_the_weights_that_were_validated_are_those_that_are_stored(tiny, context, average):
    recipe = tiny("train.epochs=1", "train.validate.every=1", "calibrate.batches=2", f"train.ema={average or 'null'}")
    checkpoint = train(recipe, context)
    (record,) = read_records(context.store, checkpoint, "history.jsonl")
    rows = document(evaluate(open_network("tiny", context), context, ["full", "layer2.0@0.5"], "holdout"), context)["rows"]
    assert {row["instance"]: {"top1": row["top1"], "loss": pytest.approx(row["loss"], rel=1e-6)} for row in rows} == record[
        "validation"
    ]
    assert len({row["top1"] for row in rows}) == 2


@pytest.mark.usefixtures("is_trained")
def test_evaluation_uses_the_statistics_that_were_made_for_it(tiny, context):
    two = calibrate(open_network("tiny", context, ["calibrate.batches=2"]), context)
    evaluation = evaluate(open_network("tiny", context), context)
    assert evaluation.subject.digest == two.digest
    assert "batches: 2" in context.store.read(evaluation, "recipe.yaml").decode()
    few = calibrate(open_network("tiny", context), context, ["stem@0.5+layer2.0@0.5", "full"])
    rows = document(evaluate(open_network("tiny.bn", context), context), context)["rows"]
    assert [row["instance"] for row in rows] == ["stem@0.5+layer2.0@0.5", "full"]
    assert context.tagged("tiny.bn").digest == few.digest
    with pytest.raises(UsageError, match=r"tiny\.bn has its statistics already"):
        open_network("tiny.bn", context, ["calibrate.batches=1"])


EVALUATIONS = [
    ["calibrate.batches=2"],
    ["calibrate.batches=1"],
    ["calibrate.batches=2", "evaluate.batch_size=100"],
]


@pytest.mark.parametrize("instances", [None, ["full"]])
def test_the_table_and_its_statistics_are_tagged_together(tiny, context, instances, done):
    for overrides in [*EVALUATIONS, *reversed(EVALUATIONS)]:
        evaluation = evaluate(open_network("tiny", context, overrides), context, instances)
        assert evaluation.tag == "tiny.eval"
        assert context.tagged("tiny.bn").digest == evaluation.subject.digest == context.tagged("tiny.eval").subject.digest


def test_a_checkpoint_has_all_its_instances_after_any_evaluation_of_all(tiny, context, done):
    for overrides, instances in zip(EVALUATIONS, (None, ["full"], None), strict=True):
        evaluate(open_network("tiny", context, overrides), context, instances)
    loaded = load_network("tiny", store=context.path)
    assert [str(option.instance) for option in loaded.instances] == ["stem@0.5", "layer2.0@0.5", "full"]


def test_a_table_of_held_out_images_leaves_the_statistics_of_the_test_table(tiny, context, done):
    held_out = evaluate(open_network("tiny", context, ["calibrate.batches=2"]), context, split="holdout")
    assert held_out.tag == "tiny.holdout"
    assert held_out.subject.digest != context.tagged("tiny.bn").digest == done["calibrate-bn"].digest
    assert len(load_network("tiny", store=context.path).instances) == 3


@pytest.mark.usefixtures("is_trained")
def test_a_batch_size_does_not_hide_an_evaluation(tiny, context):
    evaluate(open_network("tiny", context, ["evaluate.batch_size=100"]), context)
    assert len(load_network("tiny", store=context.path).instances) == 3
    evaluate(open_network("tiny", context, ["evaluate.batches=1", "calibrate.batches=2"]), context)
    with pytest.raises(NotFoundError, match="not evaluated yet"):  # a part of the images says something else
        load_network("tiny", store=context.path)


@pytest.mark.usefixtures("is_trained")
def test_tags_that_point_at_other_kinds_are_passed_over(tiny, context):
    done = run(tiny("profile={}"), context)
    for tag in ("tiny.eval", "tiny.bn"):
        context.store.tag(context.store.resolve("tiny.profile"), tag)
    assert len(load_network("tiny", store=context.path).instances) == 3
    assert evaluate(open_network("tiny", context), context).digest == done["eval-instances"].digest
    assert context.tagged("tiny.bn").digest == done["calibrate-bn"].digest


def test_a_table_that_fails_moves_no_tag(tiny, context, monkeypatch, done):
    before = {a.tag: a.digest for a in context.store.artifacts() if a.tag}

    def fail(*_: object, **__: object) -> None:
        raise DivergedError("the loss is not finite")

    monkeypatch.setattr("sdpctl.engine.evaluate.evaluate", fail)
    with pytest.raises(DivergedError):
        evaluate(open_network("tiny", context, ["calibrate.batches=2"]), context)
    assert {a.tag: a.digest for a in context.store.artifacts() if a.tag} == before


@pytest.mark.usefixtures("is_trained")
def test_statistics_of_other_images_are_not_used(tiny, context):
    opened = open_network("tiny", context)
    before = evaluate(opened, context)
    larger = calibrate(open_network("tiny", context, ["data.image_size=12"]), context)
    assert context.tagged("tiny.bn").digest == larger.digest
    assert evaluate(opened, context).digest == before.digest
    at_12 = evaluate(open_network("tiny", context, ["data.image_size=12"]), context)
    assert at_12.subject.digest == larger.digest


def test_moved_data_does_not_forget_statistics(tiny, context, image_folder):
    root = image_folder()
    train(tiny("data.dataset=imagefolder", "data.batch_size=4", "model.num_classes=2", f"data.root={root}"), context)
    one = calibrate(open_network("tiny", context, ["calibrate.batches=1"]), context)
    moved = root.rename(root.with_name("moved"))
    evaluation = evaluate(open_network("tiny", context, [f"data.root={moved}"]), dataclasses.replace(context))
    assert evaluation.subject.digest == one.digest


@pytest.mark.usefixtures("is_trained")
def test_an_old_checkpoint_does_not_take_the_new_ones_tags(tiny, context):
    old = context.store.resolve("tiny")
    train(tiny("train.lr=0.05"), context)
    evaluation = evaluate(open_network(old.digest, context), context)
    assert evaluation.tag == f"{old.digest.removeprefix('sha256:')[:12]}.eval"


def test_force_does_it_again_to_the_same_digest(tiny, context, listener, done):
    again = run(tiny(), context, force=True)
    assert {k: a.digest for k, a in done.items()} == {k: a.digest for k, a in again.items()}
    assert any("epoch 2/2" in note for note in listener.notes)


def test_one_digest_whatever_the_global_generator_does(tiny, done, tmp_path, listener):
    """The fixture seeded the generator differently."""
    elsewhere = Context(path=tmp_path / "elsewhere", report=listener)
    torch.manual_seed(1)
    again = run(tiny(), elsewhere)
    assert {k: a.digest for k, a in done.items()} == {k: a.digest for k, a in again.items()}


@pytest.mark.usefixtures("is_trained")
def test_history_holds_no_times(context):
    artifact = context.store.resolve("tiny")
    history = [json.loads(line) for line in context.store.read(artifact, "history.jsonl").splitlines()]
    assert [set(record) for record in history] == [{"epoch", "loss", "accuracy", "lr", "validation"}] * 2
    assert set(history[-1]["validation"]) == {"full", "layer2.0@0.5"}
    log = [json.loads(line) for line in (context.path / "logs" / "tiny.jsonl").read_text().splitlines()]
    assert {"images_per_second", "seconds", "time"} <= set(log[-1])


def test_epochs_0_commits_the_initial_weights(tiny, context):
    artifact = train(tiny("train.epochs=0"), context)
    weights = load(context.store.read(artifact, "model.safetensors"))
    assert torch.equal(weights["bn1.weight"], torch.ones(16))
    assert context.store.read(artifact, "history.jsonl") == b""


def test_the_plain_network_is_trained_without_draws(tiny, context):
    plain = train(tiny("sdpoint=off", "train.validate.every=0"), context)
    nearly = train(
        tiny("sdpoint.draw=independent", "sdpoint.p=1e-9", "train.validate.every=0"), context
    )  # never draws a point, in two epochs
    assert context.store.read(plain, "model.safetensors") == context.store.read(nearly, "model.safetensors")
    assert [str(i) for i in grid(open_network("tiny", context).recipe)][:2] == ["full", "stem@0.5"]


def test_statistics_of_the_grid_serve_its_parts(tiny, context, listener, done):
    opened = open_network("tiny", context)
    part = evaluate(opened, context, ["layer2.0@0.5", "full"])
    assert part.subject.digest == done["calibrate-bn"].digest
    assert not any("calibrat" in note for note in listener.notes)
    assert [row["instance"] for row in document(part, context)["rows"]] == ["layer2.0@0.5", "full"]
    other = evaluate(opened, context, ["layer1.0@0.5+layer3.1@0.75"])
    assert other.subject.digest != done["calibrate-bn"].digest


@pytest.mark.usefixtures("is_trained")
def test_evaluation_of_what_was_never_calibrated_calibrates_first(tiny, context):
    evaluation = evaluate(open_network("tiny", context), context)
    assert context.store.at(evaluation.subject).kind == "bn-statistics"


@pytest.mark.usefixtures("is_trained")
def test_names_of_new_artifacts_follow_the_tag_that_was_given(tiny, context):
    context.store.tag(context.store.resolve("tiny"), "best")
    assert calibrate(open_network("best", context), context).tag == "best.bn"


@pytest.mark.usefixtures("is_trained")
def test_fewer_batches_are_drawn_from_the_whole_test_split(tiny, context):
    results = document(
        evaluate(open_network("tiny", context, ["evaluate.batches=1", "evaluate.batch_size=50"]), context), context
    )
    assert results["images"] == 50


def test_another_data_set_under_the_same_recipe_is_never_an_old_answer(tiny, context, image_folder):
    folder = ["data.dataset=imagefolder", "data.batch_size=4", "model.num_classes=2", "data.augment=crop-flip"]
    one, two = image_folder("one"), image_folder("two", shade=90)
    first = train(tiny(*folder, f"data.root={one}"), context)
    assert train(tiny(*folder, f"data.root={one}"), context).digest == first.digest
    second = train(tiny(*folder, f"data.root={two}"), context)
    assert second.digest != first.digest
    moved = one.rename(one.with_name("moved"))
    assert train(tiny(*folder, f"data.root={moved}"), context).digest == first.digest


def test_artifacts_remember_where_the_data_was_and_say_when_it_is_gone(tiny, context, image_folder):
    root = image_folder()
    train(tiny("data.dataset=imagefolder", "data.batch_size=4", "model.num_classes=2", f"data.root={root}"), context)
    assert open_network("tiny", context).recipe.data.root == str(root)
    moved = root.rename(root.with_name("moved"))
    later = dataclasses.replace(context)
    with pytest.raises(DataError, match=r"images: there is no such data folder; set data\.root="):
        calibrate(open_network("tiny", later), later)
    assert calibrate(open_network("tiny", later, [f"data.root={moved}"]), later).kind == "bn-statistics"


def test_a_checkpoint_refuses_other_data_unless_told(tiny, context, image_folder):
    root, other = image_folder(), image_folder("other", shade=77)
    train(tiny("data.dataset=imagefolder", "data.batch_size=4", "model.num_classes=2", f"data.root={root}"), context)
    calibrate(open_network("tiny", context), context)
    with pytest.raises(DataError, match=r"this is not the data that was used before .*--set data\.fingerprint=null"):
        evaluate(open_network("tiny", context, [f"data.root={other}"]), context)
    told = open_network("tiny", context, [f"data.root={other}", "data.fingerprint=null"])
    assert document(evaluate(told, context), context)["images"] == 24


@pytest.mark.usefixtures("is_trained")
def test_what_is_settled_cannot_be_overridden(tiny, context):
    for override in ("model.arch=resnet32", "train.epochs=7", "seed=3", "sdpoint=off"):
        with pytest.raises(
            UsageError,
            match="only data, calibrate, evaluate, profile, search, cascade, export, report, device, memory can be set",
        ):
            open_network("tiny", context, [override])


def test_a_profile_is_no_checkpoint(tiny, context):
    profile(tiny(), context, [FULL], "tiny")
    with pytest.raises(NotFoundError, match=r"tiny\.profile is of kind profile"):
        open_network("tiny.profile", context)


@pytest.mark.usefixtures("is_trained")
def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tiny, context):
    with pytest.raises(DivergedError, match=r"tiny: .* (step|epoch) \d+.*lower train\.lr=1e\+30"):
        train(tiny("train.lr=1e30", "train.epochs=3"), context)
    assert {a.tag for a in context.store.artifacts()} == {"tiny"}
    assert list(context.store.verify()) == []


def test_a_loss_that_diverges_later_keeps_what_was_saved_before(tiny, context):
    later = tiny("train.epochs=3", "train.milestones=[1]", "train.gamma=1000")
    with pytest.raises(DivergedError, match=r"tiny: .* step [123]\d\b.*; tiny\.partial is still [0-9a-f]{12}; lower train\.lr"):
        train(later, context)
    saved = context.tagged("tiny.partial")
    assert all(t.isfinite().all() for t in load(context.store.read(saved, "model.safetensors")).values())
    epochs = [json.loads(line)["epoch"] for line in context.store.read(saved, "history.jsonl").splitlines()]
    assert epochs in ([1], [1, 2])  # the step at which the loss overflows depends on the processor
    assert {a.tag for a in context.store.artifacts()} == {"tiny.partial"}
    assert list(context.store.verify()) == []


@pytest.mark.parametrize("when", ["train", "calibrate-bn", "eval-instances"])
def test_a_dry_run_writes_nothing(tiny, trained, context, tmp_path, when):
    if when != "train":
        shutil.copytree(trained, context.path)
    if when == "eval-instances":
        calibrate(open_network("tiny", context), context)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    dry = dataclasses.replace(context, dry_run=True)
    done = run(tiny(), dry)
    there = ["train", "calibrate-bn", "eval-instances"].index(when)
    assert [step.digest is not None for step in planned(tiny(), dry)] == [k < there for k in range(3)]
    assert len(done) == there
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_progress_is_not_kept_twice(tiny, context):
    train(tiny("train.epochs=4", "train.validate.every=0"), context)
    reachable = {d.digest for a in context.store.artifacts() for d in (a.descriptor, *a.blobs())}
    blobs = {f"sha256:{path.name}" for path in (context.path / "blobs" / "sha256").iterdir()}
    assert blobs == reachable
    assert len(context.store.artifacts()) == 1


def test_recipes_are_left_as_they_were(tiny, context):
    recipe = tiny()
    before = copy.deepcopy(recipe)
    train(recipe, context)
    assert recipe == before
