"""Trainings with several instances in a step, and with a teacher."""

import dataclasses

import pytest
from stage_calls import evaluate, train

import sdpctl.stages.train as stage
from sdpctl.engine.cost import Costs
from sdpctl.errors import NotFoundError, RecipeError, RunInterruptedError
from sdpctl.instance import FULL, Instance
from sdpctl.models import create_model
from sdpctl.recipe.load import parse_recipe
from sdpctl.recipe.resolved import Resolved
from sdpctl.stages.beginning import teacher_of
from sdpctl.stages.draws import make_draw, training_macs
from sdpctl.stages.network import open_network
from sdpctl.stages.train import Train

SANDWICH = ("sdpoint.draw=sandwich", "train.distill.temperature=2", "train.validate.every=0")


def test_a_sandwich_has_full_and_the_cheapest_instance(tiny):
    draw = make_draw(tiny("sdpoint.draw=sandwich"))
    assert {draw(step) for step in range(20)} == {(FULL, Instance.parse("stem@0.5"), Instance.parse("layer2.0@0.5"))}


def test_points_are_drawn_in_inverse_proportion_to_their_macs(tiny):
    draw = make_draw(tiny("sdpoint.weights=cost"))
    drawn = [draw(step)[0] for step in range(6000)]
    costs = Costs(create_model("resnet20", num_classes=10, in_channels=1), (1, 8, 8))
    inverse = {instance: 1 / costs.of(instance).macs for instance in set(drawn)}
    assert len(inverse) == 3
    for instance, weight in inverse.items():
        assert drawn.count(instance) / 6000 == pytest.approx(weight / sum(inverse.values()), abs=0.025)


def test_the_macs_of_a_training_are_those_of_what_its_steps_share(tiny):
    costs = Costs(create_model("resnet20", num_classes=10, in_channels=1), (1, 8, 8))
    full, stem, later = (costs.of(Instance.parse(text)) for text in ("full", "stem@0.5", "layer2.0@0.5"))
    shared = sum(segment.macs for segment in full.segments[:5])  # stem, layer1.0 to layer1.2, layer2.0
    assert later.segments[4].macs == full.segments[4].macs
    assert later.segments[5].macs < full.segments[5].macs
    assert training_macs(tiny("sdpoint=off"), 7) == 3 * 7 * full.macs
    alone = stem.macs - stem.segments[0].macs + later.macs - shared
    assert training_macs(tiny("sdpoint.draw=sandwich"), 7) == 3 * 7 * (full.macs + alone)
    taught = training_macs(tiny("sdpoint=off"), 7, dataclasses.replace(tiny().model, arch="resnet32"))
    larger = Costs(create_model("resnet32", num_classes=10, in_channels=1), (1, 8, 8)).of(FULL).macs
    assert taught == 7 * (3 * full.macs + larger)


@pytest.mark.usefixtures("is_trained")
@pytest.mark.parametrize(
    "keys",
    [SANDWICH, ("sdpoint.draw=pair", "train.distill.teacher=tiny"), ("sdpoint.draw=budgeted", "sdpoint.budgets=30%..100%")],
    ids=["self", "a checkpoint", "budgeted"],
)
def test_a_training_that_was_stopped_ends_in_the_same_digest(tiny, context, keys, monkeypatch):
    recipe = tiny(*keys, "name=taught", "train.epochs=2")
    whole = train(recipe, context)
    context.store.discard(whole)
    stopped, original = [], stage._Training.epoch

    def epoch(self, interruption, *more):
        if len(self.history) == 1 and not stopped:
            stopped.append(True)
            interruption.signum = 15
        return original(self, interruption, *more)

    monkeypatch.setattr(stage._Training, "epoch", epoch)
    with pytest.raises(RunInterruptedError):
        train(recipe, context)
    assert train(recipe, context, resume=True).digest == whole.digest


@pytest.mark.usefixtures("is_trained")
def test_the_teacher_is_recorded_by_its_digest_and_can_be_evaluated(tiny, context, listener):
    teacher = context.store.resolve("tiny")
    taught = train(tiny("name=taught", "sdpoint=off", "train.distill.teacher=tiny", "train.epochs=1"), context)
    recipe = parse_recipe(context.store.read(taught, "recipe.yaml").decode(), "recipe.yaml")
    assert recipe.train.distill.teacher == teacher.digest
    assert evaluate(open_network("taught", context), context, ["full"]).kind == "evaluation"
    plain = train(tiny("name=plain", "sdpoint=off", "train.epochs=1"), context)
    assert context.store.read(plain, "model.safetensors") != context.store.read(taught, "model.safetensors")
    context.store.tag(teacher, "also")
    again = train(tiny("name=taught", "sdpoint=off", "train.distill.teacher=also", "train.epochs=1"), context)
    assert again.digest == taught.digest


@pytest.mark.usefixtures("is_trained")
@pytest.mark.parametrize(
    ("keys", "error", "reason"),
    [
        (("train.distill.teacher=nobody",), NotFoundError, "nobody"),
        (("train.distill.teacher=tiny", "model.in_channels=3"), RecipeError, "takes 1 channels, not model.in_channels=3"),
        (("train.distill.teacher=tiny", "data.mean=[0.5]"), RecipeError, "was trained with data.mean="),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(tiny, context, keys, error, reason):
    with pytest.raises(error, match=reason):
        train(tiny("name=taught", "sdpoint=off", *keys), context)


@pytest.mark.usefixtures("is_trained")
def test_a_teacher_is_a_checkpoint(tiny, context):
    evaluate(open_network("tiny", context), context, ["full"])
    with pytest.raises(NotFoundError, match=r"train\.distill\.teacher=tiny\.eval is of kind evaluation"):
        train(tiny("name=taught", "sdpoint=off", "train.distill.teacher=tiny.eval"), context)


@pytest.mark.usefixtures("is_trained")
def test_a_teacher_of_other_classes_is_refused(tiny, context):
    recipe = tiny("name=taught", "sdpoint=off", "train.distill.teacher=tiny").changed(model={"num_classes": 7})
    with pytest.raises(RecipeError, match="tiny has 10 classes, not 7"):
        teacher_of(Resolved(recipe), context)


def test_a_training_says_how_many_macs_it_takes(tiny, context):
    """Those of a teacher's forward passes are among them."""
    train(tiny("train.epochs=1"), context)
    costs = Costs(create_model("resnet20", num_classes=10, in_channels=1), (1, 8, 8))
    steps = 1294 // 128
    for keys, times in (((), 3), (("train.distill.teacher=tiny",), 4)):
        task = Train(tiny("name=other", "sdpoint=off", "train.epochs=2", *keys)).task(context)
        assert f"2 epochs of {steps} steps, {times * costs.of(FULL).macs * 2 * steps * 128:.3g} MACs" in task


def test_of_a_long_training_some_steps_stand_for_all(tiny):
    recipe = tiny("sdpoint.draw=sandwich", "sdpoint.ratios=[0.5, 0.75]")
    assert training_macs(recipe, 1_000_000) == pytest.approx(500 * training_macs(recipe, 2000), rel=1e-9)


@pytest.mark.usefixtures("is_trained")
def test_a_teacher_of_other_images_is_told(tiny, context, listener):
    taught = ("name=taught", "sdpoint=off", "train.distill.teacher=tiny")
    teacher_of(context.workspace.resolve(tiny(*taught)), context)
    assert not any("teacher" in note for note in listener.notes)
    recipe = tiny(*taught, "seed=3", "data.holdout=0.2")
    teacher_of(Resolved(recipe, "f" * 64), context)
    assert "was trained with a different data.fingerprint and data.holdout and seed" in listener.notes[-1]


def test_a_network_does_not_teach_itself_and_a_library_does_not_teach(tiny, context):
    with pytest.raises(RecipeError, match="tiny would learn from its own earlier training"):
        tiny("sdpoint=off", "train.distill.teacher=tiny")
    with pytest.raises(RecipeError, match="a teacher is a checkpoint of the store"):
        train(tiny("train.distill.teacher=timm/resnet18.a1_in1k"), context)


@pytest.mark.parametrize("key", ["sdpoint.weights=uniform", "sdpoint.weights={}", "sdpoint.drawn=1", "model.width=1"])
def test_one_training_has_one_key(tiny, key):
    draw = "sdpoint.draw=pair"
    assert tiny(draw, key).identity() == tiny(draw).identity()
