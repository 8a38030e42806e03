"""Training that begins with a checkpoint, and fine-tuning the instances that were chosen."""

import dataclasses
import shutil

import pytest
from safetensors.torch import load

from sdpctl.errors import NotFoundError, RecipeError
from sdpctl.pipeline.context import Context, open_artifact
from sdpctl.pipeline.instances import calibrate, document
from sdpctl.pipeline.run import run
from sdpctl.pipeline.train import train
from sdpctl.recipe.load import parse_recipe

TUNED = ("name=tuned", "train.init=tiny")


@pytest.fixture
def context(trained, tmp_path, listener):
    shutil.copytree(trained, tmp_path / "store")
    return Context(path=tmp_path / "store", report=listener)


def weights(artifact, context):
    return context.store.read(artifact, "model.safetensors")


def test_it_begins_with_those_weights(tiny, context):
    source = context.store.resolve("tiny")
    tuned = train(tiny(*TUNED, "train.epochs=0"), context)
    assert tuned.tag == "tuned"
    assert weights(tuned, context) == weights(source, context)
    assert weights(train(tiny("train.epochs=0", "name=fresh"), context), context) != weights(source, context)


def test_it_trains_on_from_there(tiny, context):
    source = context.store.resolve("tiny")
    tuned = train(tiny(*TUNED, "train.epochs=1", "train.lr=1e-6", "train.weight_decay=0"), context)
    before, after = load(weights(source, context)), load(weights(tuned, context))
    assert not before["conv1.weight"].equal(after["conv1.weight"])
    assert (before["conv1.weight"] - after["conv1.weight"]).abs().max() < 1e-3


def test_the_digest_is_recorded_whatever_it_was_named_by(tiny, context, listener):
    digest = context.store.resolve("tiny").digest
    tuned = train(tiny(*TUNED, "train.epochs=0"), context)
    recipe = parse_recipe(context.store.read(tuned, "recipe.yaml").decode(), "recipe.yaml")
    assert recipe.train.init == digest
    for ref in (digest, digest[:20], digest.removeprefix("sha256:")[:12]):
        assert train(tiny("name=tuned", f"train.init={ref}", "train.epochs=0"), context).digest == tuned.digest
        assert listener.notes[-1].startswith("tuned: in the store already")
    assert train(open_artifact("tuned", context).recipe, context).digest == tuned.digest


def test_a_tag_that_moved_is_another_training(tiny, context, listener):
    first = train(tiny(*TUNED, "train.epochs=0"), context)
    train(tiny("train.epochs=0", "seed=5"), context)
    second = train(tiny(*TUNED, "train.epochs=0"), context)
    assert weights(second, context) == weights(context.store.resolve("tiny"), context) != weights(first, context)
    assert second.digest != first.digest


def test_a_network_may_be_trained_on_under_its_own_name(tiny, context):
    source = context.store.resolve("tiny")
    once = train(tiny("train.init=tiny", "train.epochs=1"), context)
    assert (once.tag, context.store.resolve("tiny").digest) == ("tiny", once.digest)
    recipe = parse_recipe(context.store.read(once, "recipe.yaml").decode(), "recipe.yaml")
    assert recipe.train.init == source.digest


@pytest.mark.parametrize("override", ["model.stem=imagenet", "model.arch=resnet32", "model.in_channels=3"])
def test_weights_that_do_not_fit_are_one_line(tiny, context, override):
    larger = ["data.image_size=32"] if "stem" in override else []
    with pytest.raises(RecipeError) as caught:
        train(tiny(*TUNED, "sdpoint.points=all", "train.validate.instances=[full]", *larger, override), context)
    assert caught.value.exit_code == 3
    digest = context.store.resolve("tiny").digest.removeprefix("sha256:")
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"train.init: the weights of {digest[:12]} do not fit this network (")
    assert context.tagged("tuned") is None


def test_other_classes_do_not_fit(tiny, context, image_folder):
    folder = ["data.dataset=imagefolder", "data.batch_size=4", "model.num_classes=2", f"data.root={image_folder()}"]
    with pytest.raises(RecipeError, match=r"train\.init: .*fc\.weight"):
        train(tiny(*TUNED, *folder), context)


def test_what_is_no_checkpoint(tiny, context):
    calibrate(open_artifact("tiny", context), context)
    with pytest.raises(NotFoundError, match=r"^train\.init=tiny\.bn is of kind bn-statistics, no checkpoint; ") as caught:
        train(tiny("name=tuned", "train.init=tiny.bn"), context)
    assert caught.value.exit_code == 4
    with pytest.raises(NotFoundError, match=r"no artifact 'tinny' \(did you mean 'tiny'\?\)"):
        train(tiny("name=tuned", "train.init=tinny"), context)
    assert context.tagged("tuned") is None


def test_a_dry_run_resolves_it_and_writes_nothing(tiny, context, tmp_path, listener):
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    dry = dataclasses.replace(context, dry_run=True)
    assert train(tiny(*TUNED), dry) is None
    assert listener.notes[-1].startswith("tuned: would train resnet20")
    with pytest.raises(NotFoundError):
        train(tiny("name=tuned", "train.init=tinny"), dry)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_chosen_instances_are_fine_tuned_calibrated_and_evaluated(tiny, context, monkeypatch):
    from sdpctl.engine.train import Trainer

    drawn, build = [], Trainer.__init__

    def watching(self, model, settings, draw, steps):
        build(self, model, settings, lambda step: drawn.append(str(draw(step))) or draw(step), steps)

    monkeypatch.setattr(Trainer, "__init__", watching)
    chosen = "[layer1.0@0.5+layer2.0@0.75, stem@0.5]"
    done = run(tiny(*TUNED, f"sdpoint={{draw: listed, instances: {chosen}}}", "train.epochs=1"), context)
    assert set(drawn) == {"layer1.0@0.5+layer2.0@0.75", "stem@0.5"}
    rows = document(done["eval-instances"], context)["rows"]
    assert [row["instance"] for row in rows] == ["layer1.0@0.5+layer2.0@0.75", "stem@0.5"]
