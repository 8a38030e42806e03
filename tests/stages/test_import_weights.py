"""Weights from elsewhere, as a checkpoint like any other."""

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from networks import randomise_norms
from safetensors.torch import load, save_file
from stage_calls import calibrate, document, evaluate, export, import_weights, train
from torch import nn

import sdpctl
from sdpctl.data.reader import Located
from sdpctl.data.sources import open_sources
from sdpctl.engine.evaluate import Score
from sdpctl.errors import DataError, RecipeError, UsageError
from sdpctl.models import create_model
from sdpctl.models.pretrained import Preprocessing, Pretrained
from sdpctl.plan import Plan
from sdpctl.prediction import predict
from sdpctl.recipe.load import parse_recipe
from sdpctl.recipe.resolved import Resolved
from sdpctl.stages.context import Context
from sdpctl.stages.import_weights import ImportWeights, read_weights
from sdpctl.stages.network import open_network

DIGITS = ("data.dataset=digits", "data.image_size=8", "data.batch_size=128", "data.workers=0", "calibrate.batches=2")
FEW = ("sdpoint.ratios=[0.5]", "sdpoint.points=[stem, layer2.0]")
"""Three instances in all."""


@pytest.fixture(scope="module")
def network():
    """A network whose batch norms hold what no calibration would."""
    torch.manual_seed(4)
    return randomise_norms(create_model("resnet20", num_classes=10, in_channels=1)).eval()


@pytest.fixture
def file(network, tmp_path):
    """The file that a training script would leave."""
    state = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    path = tmp_path / "theirs" / "model_best.pth.tar"
    path.parent.mkdir()
    torch.save({"epoch": 90, "state_dict": state, "best_prec1": 69.0}, path)
    return path


GREY = ("data.mean=[0.3]", "data.std=[0.4]")

V1 = {
    "image_size": 224,
    "test_size": 224,
    "resize": 256,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bilinear",
}
"""The preprocessing of torchvision's first weights."""


def imported(file, context, *overrides):
    return committed(file, context, overrides=overrides)


def committed(file, context, arch="resnet20", **options):
    done = import_weights(file, context, arch=arch, **options)
    return done and done.artifact


def recipe_of(artifact, context):
    return parse_recipe(context.store.read(artifact, "recipe.yaml").decode(), "recipe.yaml")


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_checkpoint_holds_the_weights_and_says_where_they_are_from(file, network, context, listener):
    artifact = imported(file, context, *DIGITS, *FEW)
    assert (artifact.kind, artifact.tag, artifact.subject) == ("checkpoint", "model-best", None)
    weights = load(context.store.read(artifact, "model.safetensors"))
    assert weights.keys() == network.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in network.state_dict().items())
    assert json.loads(context.store.read(artifact, "import.json")) == {
        "from": "model_best.pth.tar",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    assert context.store.read(artifact, "history.jsonl") == b""
    recipe = recipe_of(artifact, context)
    assert (recipe.model.num_classes, recipe.model.in_channels, recipe.model.stem) == (10, 1, "small")
    assert (recipe.train.epochs, recipe.calibrate.keep) == (0, "full")
    assert any(note.startswith("model-best: imported model_best.pth.tar as resnet20, ") for note in listener.notes)
    assert list(context.store.verify()) == []


def test_the_same_file_again_is_the_same_checkpoint(file, context):
    assert imported(file, context, *DIGITS).digest == imported(file, context, *DIGITS).digest
    assert len(context.store.artifacts()) == 1


def test_counters_that_old_files_lack_begin_at_nought(network, context, tmp_path):
    kept = {name: t for name, t in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file(kept, tmp_path / "old.safetensors")
    artifact = imported(tmp_path / "old.safetensors", context, *DIGITS)
    weights = load(context.store.read(artifact, "model.safetensors"))
    assert weights.keys() == network.state_dict().keys()
    assert {t.item() for name, t in weights.items() if name not in kept} == {0}


def test_one_digest_wherever_the_file_and_the_store_are(file, context, tmp_path, listener):
    first = imported(file, context, *DIGITS)
    other = tmp_path / "another" / "place" / file.name
    other.parent.mkdir(parents=True)
    other.write_bytes(file.read_bytes())
    second = imported(other, Context(path=tmp_path / "elsewhere", report=listener), *DIGITS)
    assert second.digest == first.digest
    for path in (context.path / "blobs").rglob("*"):
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes()
    renamed = file.rename(file.with_name("renamed.pth"))
    assert imported(renamed, context, *DIGITS).digest != first.digest


def test_full_is_the_network_that_came_in(file, network, context):
    imported(file, context, *DIGITS, *FEW)
    evaluation = evaluate(open_network("model-best", context), context)
    test = open_sources("digits", Path(), Located((), {}))[1]
    with torch.inference_mode():
        logits = network((test.images / 255 - 0.3053) / 0.3760)
    rows = {row["instance"]: row for row in document(evaluation, context)["rows"]}
    assert list(rows) == ["full", "stem@0.5", "layer2.0@0.5"]
    assert rows["full"]["loss"] == pytest.approx(nn.functional.cross_entropy(logits, test.labels).item(), rel=1e-5)
    hits = (logits.argmax(1) == test.labels).sum().item()
    assert rows["full"]["top1"] == pytest.approx(100 * hits / 359, abs=100 / 359 + 1e-9)


def test_keep_may_be_set_otherwise(file, network, context):
    imported(file, context, *DIGITS, *FEW)
    kept = calibrate(open_network("model-best", context), context)
    anew = calibrate(open_network("model-best", context, ["calibrate.keep=null"]), context)
    assert anew.digest != kept.digest
    for artifact, same in ((kept, True), (anew, False)):
        mean = load(context.store.read(artifact, "statistics.safetensors"))["full/bn1.running_mean"]
        assert torch.equal(mean, network.bn1.running_mean) == same


def test_every_stage_goes_on_from_there(file, context):
    artifact = imported(file, context, *DIGITS, *FEW)
    assert recipe_of(artifact, context).data.fingerprint is not None
    opened = open_network("model-best", context)
    statistics = calibrate(opened, context)
    assert (statistics.tag, statistics.subject.digest) == ("model-best.bn", artifact.digest)
    evaluation = evaluate(opened, context)
    assert (evaluation.tag, evaluation.subject.digest) == ("model-best.eval", statistics.digest)
    bundle = export(open_network("model-best", context, ["export.format=bundle"]), context)
    assert len(document(bundle, context)["options"]) == 3
    card = context.store.read(bundle, "card.md").decode()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert f"imported from `model_best.pth.tar` (sha256 `{digest}`)" in card
    assert "It was trained by the recipe" not in card


def test_a_training_may_begin_with_it(file, network, context, tiny):
    artifact = imported(file, context, *DIGITS)
    tuned = train(tiny("name=tuned", "train.init=model-best", "train.epochs=0"), context)
    assert context.store.read(tuned, "model.safetensors") == context.store.read(artifact, "model.safetensors")
    further = train(tiny("name=further", "train.init=model-best", "train.epochs=1"), context)
    assert recipe_of(further, context).train.init == artifact.digest


def test_without_data_later_stages_ask_for_it(file, context, listener):
    artifact = imported(file, context)
    assert (
        "model-best: no data was named; later commands need it, for example --set data.dataset=imagefolder"
        in listener.notes[-1]
    )
    assert recipe_of(artifact, context).data.fingerprint is None
    for stage in (calibrate, evaluate, export):
        with pytest.raises(
            DataError,
            match=r"data: there is no such data folder; set data\.root=|this folder of imagefolder is missing; set data",
        ):
            stage(open_network("model-best", context), context)
    assert len(context.store.artifacts()) == 1
    opened = open_network("model-best", context, DIGITS)
    assert calibrate(opened, context).kind == "bn-statistics"
    assert evaluate(opened, context).kind == "evaluation"


def test_data_that_is_not_there_is_no_import(file, context, tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        imported(file, context, f"data.root={tmp_path / 'nowhere'}", "data.dataset=imagefolder")
    assert not context.path.exists() or context.store.artifacts() == []


def test_a_name_and_an_image_size_may_be_set(file, context):
    artifact = imported(file, context, "name=mine", "data.image_size=16", "data.dataset=digits", "data.augment=none")
    assert artifact.tag == "mine"
    data = recipe_of(artifact, context).data
    assert (data.image_size, data.augment) == (16, "none")


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("resnet20.pth", "resnet20"),
        ("model_best.pth.tar", "model-best"),
        ("a.b--c d.pt", "a-b-c-d"),
        ("_.safetensors", "imported"),
        pytest.param("x" * 120 + ".pth", "x" * 80, id="long"),
        pytest.param("y" * 79 + "--z.pth", "y" * 79, id="cut at a dash"),
    ],
)
def test_the_tag_is_made_of_the_files_name(network, context, tmp_path, name, tag):
    path = tmp_path / name
    if name.endswith("safetensors"):
        save_file(network.state_dict(), path)
    else:
        torch.save(network.state_dict(), path)
    assert imported(path, context).tag == tag


def test_classes_channels_and_stem_are_those_of_the_weights(context, tmp_path):
    torch.save(create_model("resnet18", num_classes=5, in_channels=1, stem="small").state_dict(), tmp_path / "w.pth")
    recipe = recipe_of(committed(tmp_path / "w.pth", context, arch="resnet18"), context)
    assert (recipe.model.num_classes, recipe.model.in_channels, recipe.model.stem) == (5, 1, "small")
    assert (recipe.data.image_size, recipe.data.augment) == (32, "crop-flip")
    before = context.tagged("w")
    torch.save(create_model("resnet18", num_classes=5).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UsageError, match="a different checkpoint has the tag w; give this one a name"):
        import_weights(tmp_path / "w.pth", context, arch="resnet18")
    assert context.tagged("w") == before
    recipe = recipe_of(committed(tmp_path / "w.pth", context, arch="resnet18", overrides=["name=other"]), context)
    assert (recipe.model.num_classes, recipe.model.in_channels, recipe.model.stem) == (5, 3, "imagenet")
    assert (recipe.data.image_size, recipe.data.augment) == (224, "resized-crop")


@pytest.mark.parametrize("override", ["data.image_size=16", "data.workers=0", "data.holdout=20%"])
def test_data_that_is_not_named_is_not_looked_at(file, context, override):
    recipe = recipe_of(committed(file, context, arch="resnet20", overrides=[override]), context)
    assert recipe.data.fingerprint is None
    assert recipe.data.dataset == "imagefolder"


def test_data_may_be_named_as_a_section(file, context):
    override = "data={dataset: digits, image_size: 8, workers: 0}"
    recipe = recipe_of(committed(file, context, arch="resnet20", overrides=[override]), context)
    assert recipe.data.fingerprint is not None


# Mistakes


def test_every_tensor_that_does_not_fit_is_a_line(network, context, tmp_path):
    state = dict(network.state_dict())
    state["layer1.0.bn1.bias"] = torch.ones(3)
    state["extra"] = torch.ones(1)
    del state["layer3.2.conv2.weight"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UsageError) as caught:
        imported(tmp_path / "w.pth", context)
    assert caught.value.exit_code == 2
    *lines, last = str(caught.value).splitlines()
    assert last == "w.pth: 3 tensors do not fit resnet20 with 10 classes and the small stem; is --arch right?"
    assert set(lines) == {
        "w.pth: layer1.0.bn1.bias is (3,), not (16,)",
        "w.pth: extra (1,) is not expected",
        "w.pth: layer3.2.conv2.weight (64, 64, 3, 3) is missing",
    }
    assert not context.path.exists()


def test_another_architecture_does_not_fit(file, context):
    with pytest.raises(UsageError, match=r"tensors do not fit resnet32 .*; is --arch right\?"):
        import_weights(file, context, arch="resnet32")
    with pytest.raises(UsageError, match=r"fc\.weight is \(10, 64\), not \(7, 64\)\n.*\n.*do not fit resnet20 with 7 classes"):
        imported(file, context, "model.num_classes=7")
    assert not context.path.exists()


def test_a_recipe_that_does_not_hold(file, context):
    with pytest.raises(RecipeError, match=r"--set train\.lrr=1: train\.lrr: unknown key"):
        imported(file, context, "train.lrr=1")
    assert not context.path.exists()


def test_a_dry_run_writes_nothing(file, network, context, tmp_path):
    before = files(tmp_path)
    dry = dataclasses.replace(context, dry_run=True)
    plan = Plan(dry)
    assert plan.run(ImportWeights(read_weights(file, dry, arch="resnet20", overrides=DIGITS))) is None
    (step,) = plan.steps
    assert (step.tag, step.kind, step.digest) == ("model-best", "checkpoint", None)
    assert step.task == f"import {len(network.state_dict())} tensors of model_best.pth.tar"
    assert files(tmp_path) == before


def test_a_file_or_torchvisions_one_of_them(file, context):
    for given in ({"file": file, "torchvision": "IMAGENET1K_V1"}, {"file": None}):
        with pytest.raises(UsageError, match=r"^give a file of weights, --timm NAME or --torchvision NAME, one of them$"):
            import_weights(**given, context=context, arch="resnet20")
    assert not context.path.exists()


def in_hub(torch_hub, weights, state):
    torch.save(state, torch_hub / weights.url.rpartition("/")[2])


def test_torchvisions_weights_are_named_by_their_address(context, torch_hub):
    theirs = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    state = randomise_norms(create_model("resnet18", num_classes=1000)).state_dict()
    in_hub(torch_hub, theirs, state)
    artifact = committed(None, context, arch="resnet18", torchvision="IMAGENET1K_V1")
    assert artifact.tag == "resnet18"
    origin = json.loads(context.store.read(artifact, "import.json"))
    assert origin == {
        "from": theirs.url,
        "weights": "torchvision/resnet18.IMAGENET1K_V1",
        "classes": theirs.meta["categories"],
    }
    weights = load(context.store.read(artifact, "model.safetensors"))
    assert all(torch.equal(weights[name], tensor) for name, tensor in state.items())


def offered(change, monkeypatch, state, classes=()):
    """Let torchvision offer weights with a different preprocessing."""
    found = Pretrained(
        library="torchvision",
        network="resnet18",
        weights="IMAGENET1K_V1",
        source="https://example.org/resnet18-0123abcd.pth",
        preprocessing=Preprocessing(**V1 | change),
        classes=classes,
        load=lambda: state,
    )
    monkeypatch.setattr("sdpctl.models.pretrained.pretrained", lambda *_: found)


def test_torchvisions_weights_are_exported_with_a_card(network, context, monkeypatch, believed):
    offered({"image_size": 8, "test_size": 8, "resize": 8}, monkeypatch, dict(network.state_dict()))
    import_weights(None, context, arch="resnet20", torchvision="resnet18.IMAGENET1K_V1", overrides=[*DIGITS, *FEW, *GREY])
    artifact = export(open_network("resnet20", context), context)
    card = context.store.read(artifact, "card.md").decode()
    address = "https://example.org/resnet18-0123abcd.pth"
    assert f"Its weights were imported from `{address}`. BatchNorm statistics: the others' were gathered" in card


@pytest.mark.parametrize(
    ("change", "overrides", "given"),
    [
        ({}, [], {}),
        ({"resize": 232}, [], {"resize": 232}),
        ({"resize": 232}, ["data.resize=240"], {"resize": 240}),
        ({"resize": 232}, ["data.image_size=160"], {}),
        ({"resize": 232}, ["data.image_size=160", "data.resize=180"], {"resize": 180}),
        ({"interpolation": "bicubic", "mean": (0.5, 0.5, 0.5)}, [], {"interpolation": "bicubic", "mean": (0.5, 0.5, 0.5)}),
        ({"std": (0.5, 0.5, 0.5)}, ["data.std=[1, 1, 1]"], {"std": (1, 1, 1)}),
        ({}, ["data.dataset=cifar100", "model.num_classes=100"], {"mean": V1["mean"], "std": V1["std"]}),
        ({"test_size": 288, "resize": 303}, [], {"resize": 303, "image_size": 288}),
        ({"test_size": 288, "resize": 329}, [], {"image_size": 288}),
        ({"test_size": 288, "resize": 303}, ["evaluate.image_size=256"], {"image_size": 256}),
        ({"test_size": 288, "resize": 303}, ["data.image_size=160"], {}),
    ],
)
def test_torchvisions_weights_bring_their_preprocessing(context, monkeypatch, change, overrides, given):
    offered(change, monkeypatch, create_model("resnet18", num_classes=100).state_dict())
    monkeypatch.setattr("sdpctl.stages.workspace.Workspace.resolve", lambda _, recipe: Resolved(recipe))  # no data
    artifact = committed(None, context, arch="resnet18", torchvision="resnet18.IMAGENET1K_V2", overrides=overrides)
    recipe = recipe_of(artifact, context)
    kept = {key: getattr(recipe.data, key) for key in ("resize", "mean", "std", "interpolation")}
    kept["image_size"] = recipe.evaluate.image_size
    assert {key: value for key, value in kept.items() if value is not None} == given


def test_weights_of_timm_bring_network_preprocessing_and_classes(context, timm_cache):
    theirs = randomise_norms(timm.create_model("resnet18d")).eval()
    timm_cache("resnet18d.ra4_e3600_r224_in1k", theirs.state_dict())
    artifact = committed(None, context, None, timm="resnet18d.ra4_e3600_r224_in1k")
    assert artifact.tag == "resnet18d-ra4-e3600-r224-in1k"
    recipe = recipe_of(artifact, context)
    assert (recipe.model.arch, recipe.model.num_classes, recipe.data.image_size) == ("timm/resnet18d", 1000, 224)
    assert (recipe.data.mean, recipe.data.std, recipe.data.interpolation) == ((0.5,) * 3, (0.5,) * 3, "bicubic")
    assert (recipe.evaluate.image_size, recipe.data.resize) == (288, 288)
    origin = json.loads(context.store.read(artifact, "import.json"))
    assert origin["weights"] == "timm/resnet18d.ra4_e3600_r224_in1k"
    assert origin["classes"][:2] == ["tench, Tinca tinca", "goldfish, Carassius auratus"]
    assert len(origin["classes"]) == 1000
    weights = load(context.store.read(artifact, "model.safetensors"))
    assert all(torch.equal(weights[name], tensor) for name, tensor in theirs.state_dict().items())
    again = committed(None, context, "timm/resnet18d", timm="timm/resnet18d.ra4_e3600_r224_in1k")
    assert again.digest == artifact.digest


def test_weights_of_a_library_fit_the_same_network_of_this_package(context, timm_cache):
    theirs = timm.create_model("resnet18")
    timm_cache("resnet18.tv_in1k", theirs.state_dict())
    artifact = committed(None, context, arch="resnet18", timm="resnet18.tv_in1k")
    assert (artifact.tag, recipe_of(artifact, context).model.arch) == ("resnet18", "resnet18")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"torchvision": "IMAGENET1K_V1"},
            r"^--torchvision IMAGENET1K_V1: name the network too, as in resnet50\.IMA",
        ),
        (
            {"torchvision": "V9", "arch": "resnet50"},
            r"^--torchvision V9: torchvision has no weights 'V9' of resnet50; it",
        ),
        (
            {"torchvision": "V1", "arch": "resnet20"},
            r"^--torchvision: torchvision has no weights of resnet20; it has those",
        ),
        ({"torchvision": "V1", "arch": "timm/resnet18"}, r"torchvision has no weights of timm/resnet18; it has those of"),
        ({"timm": "resnet18x"}, r"^--timm resnet18x: timm [\d.]+ has no network 'resnet18x' \(did you mean 'resnet18d?'\?\)"),
        ({"timm": "resnet18.a1"}, r"^--timm resnet18\.a1: timm has no weights 'a1' of resnet18; it has a1_in1k, "),
        ({"timm": "vit_base_patch16_224"}, r"^timm/vit_base_patch16_224 cannot be run at several costs: "),
    ],
)
def test_weights_that_no_library_has(context, torch_hub, options, message):
    with pytest.raises(UsageError, match=message) as caught:
        import_weights(None, context, **options)
    assert caught.value.exit_code == 2
    assert not context.path.exists()


def test_weights_that_cannot_be_fetched(context, timm_cache, torch_hub):
    for options in ({"timm": "resnet18.a1_in1k"}, {"torchvision": "resnet18.IMAGENET1K_V1"}):
        with pytest.raises(DataError, match=r"^https://.*: these weights could not be fetched \(.*`sdpctl import FILE --arch"):
            import_weights(None, context, **options)
    assert not context.path.exists()


def saved_as(folder, state, name="w.pth"):
    torch.save(state, folder / name)
    return folder / name


def test_a_file_of_a_network_of_timm(context, tmp_path):
    state = timm.create_model("mobilenetv3_small_050", num_classes=7, in_chans=1).state_dict()
    path = saved_as(tmp_path, {"state_dict": {f"module.model._orig_mod.{name}": t for name, t in state.items()}})
    artifact = committed(path, context, "timm/mobilenetv3_small_050")
    recipe = recipe_of(artifact, context)
    assert (recipe.model.num_classes, recipe.model.in_channels, recipe.data.image_size) == (7, 1, 224)
    weights = load(context.store.read(artifact, "model.safetensors"))
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in state.items())


def test_a_classifier_that_is_a_convolution(context, tmp_path, listener):
    state = torchvision.models.squeezenet1_1(num_classes=5).state_dict()
    artifact = committed(saved_as(tmp_path, state), context, "torchvision/squeezenet1_1")
    assert recipe_of(artifact, context).model.num_classes == 5
    renamed = {name.replace("classifier.1.", "top."): tensor for name, tensor in state.items()}
    artifact = committed(saved_as(tmp_path, renamed, "v.pth"), context, "torchvision/squeezenet1_1")
    assert recipe_of(artifact, context).model.num_classes == 5
    assert any("the classifier `top` counts as `classifier.1`" in note for note in listener.notes)
    weights = load(context.store.read(artifact, "model.safetensors"))
    assert torch.equal(weights["classifier.1.weight"], state["classifier.1.weight"])


def test_a_headless_file_gets_a_classifier_that_is_a_convolution(context, tmp_path):
    state = torchvision.models.squeezenet1_1().state_dict()
    headless = {name: tensor for name, tensor in state.items() if not name.startswith("classifier.")}
    overrides = ["model.num_classes=6"]
    artifact = committed(saved_as(tmp_path, headless), context, "torchvision/squeezenet1_1", overrides=overrides)
    weights = load(context.store.read(artifact, "model.safetensors"))
    assert weights["classifier.1.weight"].shape == (6, 512, 1, 1)
    assert torch.equal(weights["features.0.weight"], state["features.0.weight"])


@pytest.mark.parametrize("arch", ["torchvision/densenet121", "timm/densenet121"])
def test_old_names_of_densenets(context, tmp_path, arch):
    torch.manual_seed(3)
    theirs = randomise_norms(torchvision.models.densenet121(num_classes=6)).eval()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)\.", r"\1.\2.", name): t for name, t in theirs.state_dict().items()}
    assert len(old.keys() & theirs.state_dict().keys()) < len(old) / 5
    artifact = committed(saved_as(tmp_path, old), context, arch)
    weights = load(context.store.read(artifact, "model.safetensors"))
    assert weights.keys() == theirs.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in theirs.state_dict().items())


def test_auxiliary_classifiers_may_be_missing(context, tmp_path):
    state = torchvision.models.googlenet(num_classes=9, init_weights=False).state_dict()
    without = {name: tensor for name, tensor in state.items() if not name.startswith("aux")}
    assert len(without) < len(state)
    whole = committed(saved_as(tmp_path, state), context, "torchvision/googlenet")
    lacking = committed(saved_as(tmp_path, without, "v.pth"), context, "torchvision/googlenet")
    for artifact, given in ((whole, state), (lacking, without)):
        weights = load(context.store.read(artifact, "model.safetensors"))
        assert {name: t.shape for name, t in weights.items()} == {name: t.shape for name, t in state.items()}
        assert all(torch.equal(weights[name], tensor) for name, tensor in given.items())


def test_half_precision_is_converted_and_said(context, tmp_path, listener):
    state = timm.create_model("mobilenetv3_small_050", num_classes=7).half().state_dict()
    artifact = committed(saved_as(tmp_path, state), context, "timm/mobilenetv3_small_050")
    assert any("w.pth: float16 is converted to float32" in note for note in listener.notes)
    weights = load(context.store.read(artifact, "model.safetensors"))
    assert torch.equal(weights["conv_stem.weight"], state["conv_stem.weight"].float())


def test_weights_of_a_different_variant_are_listed(context, tmp_path, listener):
    path = saved_as(tmp_path, torchvision.models.mobilenet_v3_small(num_classes=4).state_dict())
    with pytest.raises(UsageError, match=r"290 tensors do not fit torchvision/mobilenet_v3_large with 4 classes; is") as caught:
        import_weights(path, context, arch="torchvision/mobilenet_v3_large")
    *lines, rest, last = caught.value.lines
    assert (len(lines), rest) == (10, "w.pth: ... and 280 more")
    assert last.endswith("is --arch right? --verbose lists all of them")
    assert len(set(listener.notes)) == 290
    assert set(lines) <= set(listener.notes)


def test_preprocessing_and_shortcut_travel_to_the_runtime(file, context, network, believed):
    said = (
        "data.mean=[0.25]",
        "data.std=[0.5]",
        "data.resize=16",
        "data.interpolation=nearest",
        "model.shortcut=padding-centred",
    )
    imported(file, context, *DIGITS, *FEW, *said)
    bundle = export(open_network("model-best", context, ["export.format=bundle"]), context)
    described = document(bundle, context)
    assert described["network"]["shortcut"] == "padding-centred"
    assert described["input"] == {
        "size": 8,
        "resize": 16,
        "mean": [0.25],
        "std": [0.5],
        "raw": False,
        "interpolation": "nearest",
    }
    assert "to 16 px (nearest interpolation), take" in context.store.read(bundle, "card.md").decode()
    centred = create_model("resnet20", num_classes=10, in_channels=1, shortcut="padding-centred").eval()
    centred.load_state_dict(network.state_dict())
    image = np.random.default_rng(1).integers(0, 256, (8, 8), dtype=np.uint8)
    places = [int((i + 0.5) / 2) for i in range(4, 12)]  # the middle eight of sixteen
    x_NCHW = torch.tensor((image[np.ix_(places, places)] / 255 - 0.25) / 0.5, dtype=torch.float32)[None, None]
    for opened in (bundle.digest, "model-best"):
        model = sdpctl.load(opened, store=context.path, device="cpu")
        torch.testing.assert_close(model.preprocess(image), x_NCHW, rtol=0, atol=1e-6)
        with torch.inference_mode():
            wanted = centred(x_NCHW)
            torch.testing.assert_close(model(x_NCHW, instance="full"), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
            assert (network(x_NCHW) - wanted).abs().max() > 1e-3 * wanted.abs().max()


def test_what_is_usual_is_not_said_in_an_export(file, context, believed):
    imported(file, context, *DIGITS, *FEW)
    described = document(export(open_network("model-best", context, ["export.format=bundle"]), context), context)
    assert described["input"].keys() == {"size", "resize", "mean", "std", "raw"}
    assert "shortcut" not in described["network"]


# Names of classes


@pytest.mark.parametrize(
    ("folders", "classes", "shown"),
    [
        (("n01440764", "n01443537"), ("tench", "goldfish"), ["tench", "goldfish"]),
        (("n01440764", "n01443537"), ("tench", "goldfish", "shark"), ["n01440764", "n01443537"]),
        (("n01440764", "n01443537"), (), ["n01440764", "n01443537"]),
        (("cat", "n01443537"), ("tench", "goldfish"), ["cat", "n01443537"]),
        (("10", "9"), ("ten", "nine"), ["10", "9"]),
    ],
)
def test_names_of_classes_replace_wordnet_ids(context, monkeypatch, image_folder, tmp_path, believed, folders, classes, shown):
    state = create_model("resnet20", num_classes=2).state_dict()
    offered({"image_size": 32, "test_size": 32, "resize": 32}, monkeypatch, state, classes=classes)
    data = (f"data.root={image_folder(classes=folders)}", "data.batch_size=4", "data.workers=0", "calibrate.batches=1")
    import_weights(None, context, arch="resnet20", torchvision="resnet18", overrides=[*data, "sdpoint.points=[stem]"])
    answer = predict("resnet20", [tmp_path / "images" / "val" / folders[0] / "0.jpg"], context, instance="full")
    assert sorted(entry["class"] for entry in answer["images"][0]["top"]) == sorted(shown)
    bundle = export(open_network("resnet20", context, ["export.format=bundle"]), context)
    assert document(bundle, context)["classes"] == shown
    scores = evaluate(open_network("resnet20", context), context)
    assert document(scores, context)["classes"] == list(folders)


# How well an imported network does


@pytest.fixture(scope="module")
def learnt(tmp_path_factory, make_listener):
    """The file of a network that has learnt the digits with the centred shortcut, under public names, and its score."""
    context = Context(path=tmp_path_factory.mktemp("learnt") / "store", report=make_listener())
    text = """
name: learnt
model: {arch: resnet20, in_channels: 1, shortcut: padding-centred}
data: {dataset: digits, image_size: 8, batch_size: 64, workers: 0, mean: [0.25], std: [0.5]}
sdpoint: off
train: {epochs: 4, lr: 0.1, schedule: cosine, validate: {every: 0}}
"""
    artifact = train(parse_recipe(text, "learnt.yaml"), context)
    state = load(context.store.read(artifact, "model.safetensors"))
    path = context.path.parent / "learnt.pth"
    torch.save({"state_dict": {f"module.{name.replace('fc.', 'linear.')}": t for name, t in state.items()}}, path)
    return path


SAID = ("model.shortcut=padding-centred", "data.mean=[0.25]", "data.std=[0.5]")


def test_the_score_is_that_of_the_evaluation(learnt, context, listener):
    done = import_weights(learnt, context, arch="resnet20", overrides=[*DIGITS, *FEW, *SAID])
    evaluation = evaluate(open_network("learnt", context), context, ["full"])
    (row,) = document(evaluation, context)["rows"]
    assert row["top1"] > 80
    assert (done.score.top1, done.score.images, done.warning) == (row["top1"], 359, None)
    assert f"learnt: `full` scores {row['top1']:.2f} % on 359 test images (chance is 10 %)" in listener.notes


def test_a_shortcut_that_was_not_said_is_tried_both_ways(learnt, context, listener):
    done = import_weights(learnt, context, arch="resnet20", overrides=[*DIGITS, *SAID[1:]])
    better = import_weights(learnt, context, arch="resnet20", overrides=[*DIGITS, *SAID])
    assert done.score.top1 < better.score.top1 - 20
    assert done.warning == (
        f"learnt: warning: model.shortcut=padding, which this was imported with, scores {done.score.top1:.2f} %, and "
        f"padding-centred {better.score.top1:.2f} %; import it again with --set model.shortcut=padding-centred"
    )
    assert done.warning in listener.notes
    assert (better.warning, context.store.resolve("learnt").digest) == (None, better.artifact.digest)


@pytest.mark.parametrize(("centred", "told"), [(89.0, False), (91.0, True)])
def test_the_centred_shortcut_is_recommended_beyond_three_standard_errors(file, context, monkeypatch, centred, told):
    """Of 50 images, three standard errors of the difference of two accuracies are 30 percentage points."""
    top1 = {"padding": 60.0, "padding-centred": centred}
    monkeypatch.setattr(
        "sdpctl.stages.import_weights._score", lambda recipe, shortcut, *_: Score(50, top1[shortcut], None, 1.0)
    )
    done = import_weights(file, context, arch="resnet20", overrides=DIGITS)
    assert (done.warning is not None and "padding-centred" in done.warning) == told


def test_preprocessing_that_was_not_said_is_named(learnt, context, listener):
    import_weights(learnt, context, arch="resnet20", overrides=[*DIGITS, SAID[0]])
    assert any(
        note.endswith(", with the usual normalisation of digits; data.mean and data.std set that of the weights' training")
        for note in listener.notes
    )


def test_a_network_at_chance_gets_a_warning(file, context, listener):
    done = import_weights(file, context, arch="resnet20", overrides=DIGITS)
    assert done.score.top1 < 20
    assert f"{done.score.top1:.2f} % is at chance: the weights may need a different data.mean" in done.warning
    assert done.warning in listener.notes


def test_a_loss_that_is_not_finite_is_a_warning(network, context, tmp_path):
    state = dict(network.state_dict()) | {"fc.weight": torch.full((10, 64), 3e38)}
    torch.save(state, tmp_path / "w.pth")
    done = import_weights(tmp_path / "w.pth", context, arch="resnet20", overrides=DIGITS)
    assert done.score is None
    assert done.warning.startswith("w: warning: the loss of full is ")
    assert context.store.resolve("w").digest == done.artifact.digest


def test_at_most_so_many_images_are_scored(learnt, context, monkeypatch):
    monkeypatch.setattr("sdpctl.stages.import_weights.SCORED", 100)
    done = import_weights(learnt, context, arch="resnet20", overrides=[*DIGITS, *SAID, "evaluate.batch_size=40"])
    assert done.score.images == 120
    done = import_weights(
        learnt, context, arch="resnet20", overrides=[*DIGITS, *SAID, "evaluate={batch_size: 40, batches: 2}", "name=few"]
    )
    assert done.score.images == 80


def test_without_data_nothing_is_scored(learnt, context):
    done = import_weights(learnt, context, arch="resnet20")
    assert (done.score, done.warning) == (None, None)


def test_data_with_other_classes_is_told_before_anything_is_kept(file, context, image_folder):
    with pytest.raises(DataError, match=r"has 2 classes in this folder, but model\.num_classes is 10"):
        imported(file, context, "data.dataset=imagefolder", f"data.root={image_folder()}", "model.in_channels=1")
    assert context.store.artifacts() == []


# Checkpoints as people have them


def test_a_projection_is_recognised(context, tmp_path):
    torch.save(create_model("resnet20", num_classes=10, shortcut="projection").state_dict(), tmp_path / "w.pth")
    assert recipe_of(imported(tmp_path / "w.pth", context), context).model.shortcut == "projection"
    torch.save(create_model("resnet18", num_classes=10).state_dict(), tmp_path / "v.pth")
    assert recipe_of(committed(tmp_path / "v.pth", context, "resnet18"), context).model.shortcut is None


@pytest.fixture
def backbone(network, tmp_path):
    kept = {f"encoder.{name}": tensor for name, tensor in network.state_dict().items() if not name.startswith("fc.")}
    torch.save(kept, tmp_path / "backbone.pth")
    return tmp_path / "backbone.pth"


def test_a_backbone_gets_a_new_head_drawn_from_the_seed(backbone, network, context, listener, image_folder):
    def head(*overrides):
        artifact = imported(backbone, context, "model.in_channels=1", *overrides)
        weights = load(context.store.read(artifact, "model.safetensors"))
        assert torch.equal(weights["conv1.weight"], network.conv1.weight)
        return weights["fc.weight"], weights["fc.bias"]

    first, again, other = (head("model.num_classes=7", f"seed={seed}", f"name=n{i}") for i, seed in enumerate((0, 0, 1)))
    assert first[0].shape == (7, 64)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert any(
        note
        == "backbone.pth: the prefix `encoder.` is removed from the names; there is no classifier: a new one for 7 classes is "
        "drawn from the seed"
        for note in listener.notes
    )
    assert head("data.dataset=digits", "data.image_size=8", "name=d")[0].shape == (10, 64)
    assert head(f"data={{dataset: imagefolder, root: {image_folder()}, batch_size: 4}}", "name=f")[0].shape == (2, 64)


def test_a_new_head_needs_to_know_its_classes(backbone, context):
    with pytest.raises(UsageError, match=r"^backbone\.pth has no classifier \(fc\.weight\): .* --set model\.num_classes=N, or"):
        imported(backbone, context)
    assert not context.path.exists()


def test_a_moving_average_is_recorded(network, context, tmp_path):
    torch.save({"model": network.state_dict(), "model_ema": network.state_dict()}, tmp_path / "w.pth")
    usual, average = (committed(tmp_path / "w.pth", context, ema=ema, overrides=[f"name=e{ema:d}"]) for ema in (False, True))
    origins = [json.loads(context.store.read(artifact, "import.json")) for artifact in (usual, average)]
    assert origins[1] == origins[0] | {"ema": True}


def test_the_same_file_may_be_imported_again_with_other_settings(file, context):
    first = imported(file, context, *DIGITS)
    second = imported(file, context, *DIGITS, "data.mean=[0.5]")
    assert first.digest != second.digest
    assert context.store.resolve("model-best").digest == second.digest


@pytest.mark.parametrize("classes", [0, 1])
def test_a_classifier_of_less_than_two_classes(context, tmp_path, classes):
    head = {"fc.weight": torch.ones(classes, 64), "fc.bias": torch.ones(classes)}
    torch.save(create_model("resnet20", num_classes=2).state_dict() | head, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=rf"^w\.pth: its classifier has {classes} class(es)?; a network here has two or more$"):
        imported(tmp_path / "w.pth", context)


def test_a_file_whose_name_is_not_text(network, context, tmp_path):
    path = tmp_path / os.fsdecode(b"w\xff\x1b[31m.pth")
    torch.save(network.state_dict(), path)
    artifact = imported(path, context)
    origin = json.loads(context.store.read(artifact, "import.json"))
    assert origin["from"] == "w\\udcff\\x1b[31m.pth"


def test_many_misfits_are_few_lines(network, context, tmp_path):
    torch.save(network.state_dict(), tmp_path / "w.pth")
    with pytest.raises(UsageError) as caught:
        committed(tmp_path / "w.pth", context, "resnet32")
    lines = str(caught.value).splitlines()
    assert len(lines) == 12
    assert lines[-2] == "w.pth: ... and 50 more"
    assert lines[-1].startswith(
        "w.pth: 60 tensors do not fit resnet32 with 10 classes and the small stem; is --arch right? --v"
    )
