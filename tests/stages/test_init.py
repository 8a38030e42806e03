"""Training that begins with a checkpoint, and fine-tuning the instances that were chosen."""

import dataclasses

import pytest
import timm
import torch
import torchvision
from networks import randomise_norms
from safetensors.torch import load
from stage_calls import calibrate, document, planned, run, train
from torch import nn

from sdpctl.errors import DataError, NotFoundError, RecipeError
from sdpctl.models import create_model
from sdpctl.randomness import derive
from sdpctl.recipe.load import parse_recipe
from sdpctl.stages.layers import renew_head
from sdpctl.stages.network import open_network

TUNED = ("name=tuned", "train.init=tiny")


pytestmark = pytest.mark.usefixtures("is_trained")


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
    assert train(open_network("tuned", context).recipe, context).digest == tuned.digest


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


MISFITS = {
    "model.stem=imagenet": ["conv1.weight is (16, 1, 3, 3), not (16, 1, 7, 7)"],
    "model.in_channels=3": ["conv1.weight is (16, 1, 3, 3), not (16, 3, 3, 3)"],
}


@pytest.mark.parametrize("override", MISFITS)
def test_each_tensor_that_does_not_fit_is_a_problem_of_its_own(tiny, context, override):
    larger = ["data.image_size=32"] if "stem" in override else []
    with pytest.raises(RecipeError) as caught:
        train(tiny(*TUNED, "sdpoint.points=all", "train.validate.instances=[full]", *larger, override), context)
    assert caught.value.exit_code == 3
    digest = context.store.resolve("tiny").digest.removeprefix("sha256:")
    called = f"train.init: the weights of {digest[:12]} do not fit this network: "
    assert caught.value.problems == [called + line for line in MISFITS[override]]
    assert str(caught.value).splitlines() == caught.value.problems
    assert context.tagged("tuned") is None


def test_weights_of_another_network_are_ten_problems_a_count_and_whose_they_are(tiny, context):
    with pytest.raises(RecipeError) as caught:
        train(tiny(*TUNED, "sdpoint.points=all", "train.validate.instances=[full]", "model.arch=resnet32"), context)
    own, theirs = (
        {name for name in create_model(arch).state_dict() if not name.endswith("num_batches_tracked")}
        for arch in ("resnet20", "resnet32")
    )
    missing = theirs - own
    *misfits, whose = caught.value.problems
    assert whose.endswith(" belong to resnet20; this network is resnet32")
    *first, last = (line.split(": ")[2] for line in misfits)
    assert len(first) == 10
    assert {line.split()[0] for line in first} <= missing
    assert last == f"... and {len(missing) - 10} more"
    assert context.tagged("tuned") is None


def test_other_classes_begin_with_a_new_head(tiny, context, image_folder, listener):
    source = load(weights(context.store.resolve("tiny"), context))
    folder = ["data.dataset=imagefolder", "data.batch_size=4", "model.num_classes=2", f"data.root={image_folder()}"]
    tuned = load(weights(train(tiny(*TUNED, *folder, "train.epochs=0"), context), context))
    fresh = load(weights(train(tiny("name=fresh", *folder, "train.epochs=0"), context), context))
    assert source.keys() == tuned.keys()
    for name, tensor in tuned.items():
        assert tensor.equal((fresh if name.startswith("fc.") else source)[name]), name
    digest = context.store.resolve("tiny").digest.removeprefix("sha256:")
    assert f"train.init: the weights of {digest[:12]} have 10 classes; the head is new" in listener.notes


def test_the_same_classes_keep_the_head(tiny, context, listener):
    train(tiny(*TUNED, "train.epochs=0"), context)
    assert not any("the head is new" in note for note in listener.notes)


def test_what_is_no_checkpoint(tiny, context):
    calibrate(open_network("tiny", context), context)
    with pytest.raises(NotFoundError, match=r"^train\.init=tiny\.bn is of kind bn-statistics, not a checkpoint; ") as caught:
        train(tiny("name=tuned", "train.init=tiny.bn"), context)
    assert caught.value.exit_code == 4
    with pytest.raises(NotFoundError, match=r"no artifact 'tinny' \(did you mean 'tiny'\?\)"):
        train(tiny("name=tuned", "train.init=tinny"), context)
    assert context.tagged("tuned") is None


def test_a_dry_run_resolves_it_and_writes_nothing(tiny, context, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    dry = dataclasses.replace(context, dry_run=True)
    assert train(tiny(*TUNED), dry) is None
    first = planned(tiny(*TUNED), dry)[0]
    assert (first.tag, first.digest) == ("tuned", None)
    assert first.task.startswith("train resnet20")
    with pytest.raises(NotFoundError):
        train(tiny("name=tuned", "train.init=tinny"), dry)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_chosen_instances_are_fine_tuned_calibrated_and_evaluated(tiny, context, monkeypatch):
    from sdpctl.engine.train import Trainer

    drawn, build = [], Trainer.__init__

    def watching(self, model, settings, draw, steps, **options):
        build(self, model, settings, lambda step: drawn.extend(map(str, draw(step))) or draw(step), steps, **options)

    monkeypatch.setattr(Trainer, "__init__", watching)
    chosen = "[layer1.0@0.5+layer2.0@0.75, stem@0.5]"
    done = run(tiny(*TUNED, f"sdpoint={{draw: listed, instances: {chosen}}}", "train.epochs=1"), context)
    assert set(drawn) == {"layer1.0@0.5+layer2.0@0.75", "stem@0.5"}
    rows = document(done["eval-instances"], context)["rows"]
    assert [row["instance"] for row in rows] == ["layer1.0@0.5+layer2.0@0.75", "stem@0.5"]


def test_weights_of_a_network_with_the_other_padding_are_refused(tiny, context):
    """The shapes are the same, so nothing else would tell."""
    with pytest.raises(RecipeError) as caught:
        train(tiny(*TUNED, "model.shortcut=padding-centred", "train.epochs=0"), context)
    digest = context.store.resolve("tiny").digest.removeprefix("sha256:")
    assert caught.value.problems == [
        f"train.init: the weights of {digest[:12]} belong to a network with model.shortcut=padding, not padding-centred; set "
        "model.shortcut=padding"
    ]
    tuned = train(tiny(*TUNED, "model.shortcut=padding", "train.epochs=0"), context)
    assert weights(tuned, context) == weights(context.store.resolve("tiny"), context)


# Weights of a library


FOUND = "timm/mobilenetv3_small_050.lamb_in1k"
FINE = """
name: fine
model: {arch: timm/mobilenetv3_small_050}
data: {dataset: imagefolder, image_size: 32, augment: resized-crop, batch_size: 4, workers: 0, holdout: 20%}
sdpoint: {ratios: [0.5], points: [blocks.0.0]}
train: {init: timm/mobilenetv3_small_050.lamb_in1k, epochs: 0, lr: 0.01, validate: {every: 0}}
calibrate: {batches: 1}
"""


@pytest.fixture
def fine(image_folder):
    root = image_folder()
    return lambda *overrides: parse_recipe(FINE, "fine.yaml", [f"data.root={root}", *overrides])


@pytest.fixture
def offered(timm_cache):
    """The weights that timm's cache holds."""
    torch.manual_seed(6)
    state = randomise_norms(timm.create_model("mobilenetv3_small_050")).state_dict()
    timm_cache("mobilenetv3_small_050.lamb_in1k", state)
    return state


def test_weights_of_a_library_with_a_new_classifier(fine, offered, context, listener):
    tuned = train(fine(), context)
    before, after = offered, load(weights(tuned, context))
    assert after.keys() == before.keys()
    head = {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - head)
    torch.manual_seed(derive(0, "head"))
    fresh = nn.Linear(1024, 2)  # as timm's own reset_classifier makes one
    assert torch.equal(after["classifier.weight"], fresh.weight)
    assert torch.equal(after["classifier.bias"], fresh.bias)
    other = load(weights(train(fine("seed=1", "name=seed"), context), context))
    assert not torch.equal(other["classifier.weight"], after["classifier.weight"])
    stored = context.store.resolve("mobilenetv3-small-050-lamb-in1k")
    recipe = parse_recipe(context.store.read(tuned, "recipe.yaml").decode(), "recipe.yaml")
    assert recipe.train.init == stored.digest
    assert any(note.endswith("have 1000 classes; the head is new") for note in listener.notes)


@pytest.mark.parametrize(
    "arch", ["torchvision/squeezenet1_1", "timm/nfnet_l0", "timm/convnext_atto", "torchvision/mobilenet_v3_small"]
)
def test_a_new_classifier_is_part_of_the_network(arch):
    """Classifiers are convolutions, within other modules, and without batch norms around them."""
    model = create_model(arch, num_classes=5).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    renew_head(model, seed=3)
    after = model.state_dict()
    assert {name: t.shape for name, t in after.items()} == {name: t.shape for name, t in before.items()}
    assert {name for name in after if not torch.equal(after[name], before[name])} <= set(model.head_names)
    for name in model.head_names:
        model.get_parameter(name).data.fill_(0.0 if name.endswith("weight") else 2.0)
    assert torch.equal(model(torch.randn(1, 3, 64, 64)), torch.full((1, 5), 2.0))


def test_weights_of_a_library_are_fetched_and_stored_once(fine, offered, context, monkeypatch):
    first = train(fine(), context)
    artifacts = len(context.store.artifacts())
    monkeypatch.setattr("sdpctl.models.pretrained.Pretrained.fetch", lambda _: pytest.fail("this is fetched again"))
    assert train(fine("name=again"), context).layers["model.safetensors"] == first.layers["model.safetensors"]
    named = train(fine("name=default", "train.init=timm/mobilenetv3_small_050"), context)
    assert named.layers["model.safetensors"] == first.layers["model.safetensors"]
    assert len(context.store.artifacts()) == artifacts + 2


def test_preprocessing_of_a_librarys_weights_comes_along(fine, offered, context, listener):
    interpolation = "data.interpolation=bicubic, as timm/mobilenetv3_small_050.lamb_in1k was trained; the recipe does not set"
    done = run(fine(), context)
    assert sum(f"fine: {interpolation}" in note for note in listener.notes) == 1
    for artifact in (done["train"], done["eval-instances"]):
        data = parse_recipe(context.store.read(artifact, "recipe.yaml").decode(), "recipe.yaml").data
        assert (data.mean, data.std, data.interpolation) == (None, None, "bicubic")  # mean and std are those of image folders
    chosen = train(fine("data.interpolation=bilinear", "data.mean=[0.5, 0.5, 0.5]", "name=own"), context)
    data = parse_recipe(context.store.read(chosen, "recipe.yaml").decode(), "recipe.yaml").data
    assert (data.mean, data.interpolation) == ((0.5, 0.5, 0.5), "bilinear")
    same = train(fine("data.interpolation=bicubic", "name=same"), context)
    assert same.key == done["train"].key


def test_a_dry_run_fetches_nothing(fine, offered, context, monkeypatch):
    monkeypatch.setattr("sdpctl.models.pretrained.Pretrained.fetch", lambda _: pytest.fail("a dry run fetches"))
    before = len(context.store.artifacts())
    steps = planned(fine(), dataclasses.replace(context, dry_run=True))
    assert [(step.tag, step.digest) for step in steps] == [("fine", None), ("fine.bn", None), ("fine.eval", None)]
    assert len(context.store.artifacts()) == before


def test_weights_of_a_library_for_a_network_of_this_package(fine, torch_hub, context):
    state = torchvision.models.resnet18().state_dict()
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    torch.save(state, torch_hub / url.rpartition("/")[2])
    recipe = fine("model.arch=resnet18", "train.init=torchvision/resnet18.IMAGENET1K_V1", "sdpoint.points=[layer1.0]")
    after = load(weights(train(recipe, context), context))
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items() if not name.startswith("fc."))
    assert after["fc.weight"].shape == (2, 512)


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("timn/resnet18.a1_in1k", r"train\.init: 'timn/resnet18\.a1_in1k' is neither a tag nor weights of torchvision or timm"),
        ("timm/resnet18x.a1_in1k", r"train\.init: timm [\d.]+ has no network 'resnet18x' \(did you mean 'resnet18"),
        (
            "torchvision/resnet18.V9",
            r"train\.init=torchvision/resnet18\.V9: torchvision has no weights 'V9' of resnet18; ",
        ),
    ],
)
def test_weights_that_no_library_has(fine, context, init, message):
    with pytest.raises(RecipeError, match=message):
        train(fine(f"train.init={init}"), context)


def test_weights_that_cannot_be_fetched_leave_nothing(fine, timm_cache, context):
    before = len(context.store.artifacts())
    with pytest.raises(DataError, match=r"https://huggingface\.co/timm/mobilenetv3_small_050.*could not be fetched"):
        train(fine(), context)
    assert len(context.store.artifacts()) == before


def test_weights_of_a_different_network_are_lines(fine, offered, context):
    with pytest.raises(RecipeError, match=r"train\.init: the weights of \w+ do not fit this network: .* is \(8, 16, 1, 1\), "):
        train(fine("model.arch=timm/mobilenetv3_small_100"), context)
    with pytest.raises(RecipeError, match=r" belong to timm/mobilenetv3_small_050; this network is timm/mobilenetv3_sm"):
        train(fine("model.arch=timm/mobilenetv3_small_100"), context)


def test_a_checkpoint_that_prepared_images_differently_is_said(tiny, context, listener):
    train(tiny("name=dark", "data.mean=[0.2]", "data.interpolation=nearest", "train.epochs=0"), context)
    tuned = train(tiny("name=tuned", "train.init=dark", "train.epochs=0"), context)
    assert "tuned: dark was made with data.mean=[0.2], data.interpolation=nearest; this recipe" in "\n".join(listener.notes)
    data = parse_recipe(context.store.read(tuned, "recipe.yaml").decode(), "recipe.yaml").data
    assert (data.mean, data.interpolation) == (None, None)
    listener.notes.clear()
    train(tiny("name=same", "train.init=dark", "train.epochs=0", "data.mean=[0.2]", "data.interpolation=nearest"), context)
    assert not any("was made with" in note for note in listener.notes)
