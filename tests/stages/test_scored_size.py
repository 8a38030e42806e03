"""Images that are scored at a different size than the network is trained at."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from stage_calls import calibrate, document, evaluate, export, import_weights, profile, search, train
from torch import nn
from torchvision.transforms import v2

import sdpctl
from sdpctl.data.loader import ImageData
from sdpctl.data.reader import Located
from sdpctl.data.settings import DataSettings
from sdpctl.data.sources import open_sources
from sdpctl.engine.cost import profile as count
from sdpctl.errors import RecipeError
from sdpctl.instance import FULL
from sdpctl.models import create_model
from sdpctl.stages.network import open_network
from sdpctl.stages.train import train_key

SIZE = "evaluate.image_size=16"


def opened(settings, scored_size=None):
    device = torch.device("cpu")
    return ImageData(settings, Located((), {}), device, in_channels=1, seed=0, scored_size=scored_size)


@pytest.mark.parametrize(
    ("augment", "resize", "side", "training_side"),
    [("none", None, 12, 8), ("none", 18, 18, 12), ("resized-crop", None, 14, None)],
)
def test_only_images_that_are_scored_have_the_size(augment, resize, side, training_side):
    given = DataSettings(dataset="digits", image_size=8, augment=augment, resize=resize, workers=0, mean=(0.0,), std=(1.0,))
    data = opened(given, 12)
    train_split, test_split = open_sources("digits", given.folder, Located((), {}))
    resized = v2.functional.resize(test_split.images[:5], [side], antialias=True)
    wanted = v2.functional.center_crop(resized, [12, 12]).float() / 255
    x_NCHW, _ = next(data.test(5))
    torch.testing.assert_close(x_NCHW, wanted, rtol=0, atol=1e-6)
    x_NCHW, _ = next(data.holdout(5))
    assert x_NCHW.shape[2:] == (12, 12)
    x_NCHW, _ = next(data.training(0))
    assert x_NCHW.shape[2:] == (8, 8)
    if training_side is not None:
        resized = v2.functional.resize(train_split.images, [training_side], antialias=True)
        whole = v2.functional.center_crop(resized, [8, 8]).float() / 255
        digits = {image.numpy().tobytes() for image in (whole * 255).round().to(torch.uint8)}
        assert {image.numpy().tobytes() for image in (x_NCHW * 255).round().to(torch.uint8).contiguous()} <= digits
    assert next(opened(given).test(5))[0].shape[2:] == (8, 8)


def test_the_test_split_is_scored_at_the_size_and_costs_are_counted_at_it(is_trained, context):
    network = open_network("tiny", context, [SIZE])
    statistics = calibrate(open_network("tiny", context), context)
    artifact = evaluate(network, context)
    assert artifact.subject.digest == statistics.digest  # which are gathered at the size of the training
    rows = {row["instance"]: row for row in document(artifact, context)["rows"]}
    model = create_model("resnet20", num_classes=10, in_channels=1)
    assert rows["full"]["macs"] == count(model, [FULL], (1, 16, 16))[FULL].macs
    plain = {row["instance"]: row for row in document(evaluate(open_network("tiny", context), context), context)["rows"]}
    assert rows["full"]["macs"] > 3 * plain["full"]["macs"]
    assert rows["full"]["loss"] != plain["full"]["loss"]


def test_full_is_the_network_on_larger_images(context, tmp_path):
    """With kept statistics, `full` is a plain network, so that its loss follows from the images."""
    torch.manual_seed(4)
    model = create_model("resnet20", num_classes=10, in_channels=1).eval()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    digits = ("data.dataset=digits", "data.image_size=8", "data.workers=0", "calibrate.batches=2", "sdpoint.points=[stem]")
    import_weights(tmp_path / "w.pth", context, arch="resnet20", overrides=[*digits, SIZE])
    artifact = evaluate(open_network("w", context), context, ["full"])
    _, test = open_sources("digits", DataSettings(dataset="digits").folder, Located((), {}))
    pixels = v2.functional.center_crop(v2.functional.resize(test.images, [16], antialias=True), [16, 16])
    with torch.inference_mode():
        logits = model((pixels / 255 - 0.3053) / 0.3760)
    (row,) = document(artifact, context)["rows"]
    assert row["loss"] == pytest.approx(nn.functional.cross_entropy(logits, test.labels).item(), rel=1e-5)


def test_a_training_does_not_depend_on_it(context, tiny):
    plain = train(tiny("train.epochs=1"), context)
    same = train(tiny("train.epochs=1", SIZE, "name=other"), context)
    assert same.layers["model.safetensors"].digest == plain.layers["model.safetensors"].digest
    assert same.layers["history.jsonl"].digest == plain.layers["history.jsonl"].digest
    assert same.key == plain.key


def test_a_recipe_without_it_keeps_its_keys(context, tiny):
    assert "image_size" not in tiny().identity()["evaluate"]
    resolved = context.workspace.resolve(tiny())
    assert train_key(resolved) == train_key(context.workspace.resolve(tiny(SIZE)))


def test_exports_and_the_runtime_take_the_size(is_trained, context, believed):
    bundle = export(open_network("tiny", context, [SIZE, "export.format=bundle"]), context)
    described = document(bundle, context)
    assert (described["input"]["size"], described["input"]["resize"]) == (16, 16)
    model = sdpctl.load(bundle.digest, store=context.path, device="cpu")
    pixels = np.random.default_rng(1).integers(0, 256, (20, 20), dtype=np.uint8)
    assert model.preprocess(Image.fromarray(pixels)).shape == (1, 1, 16, 16)
    full = next(option for option in model.instances if str(option.instance) == "full")
    assert full.macs == described["full_macs"] == count(model.network, [FULL], (1, 16, 16))[FULL].macs


def test_a_search_counts_and_scores_at_the_size(is_trained, context, quick_sqlite):
    settings = "search={evaluations: 3, images: 20, rescore: 1, rescore_images: 20, calibration_batches: 1, strategy: uniform}"
    found = search(open_network("tiny", context, [SIZE, settings]), context)
    result = json.loads(context.store.read(found, "result.json"))
    model = create_model("resnet20", num_classes=10, in_channels=1)
    assert result["full"]["macs"] == count(model, [FULL], (1, 16, 16))[FULL].macs
    other = search(open_network("tiny", context, [settings]), context)
    assert other.key != found.key


def test_a_profile_counts_at_the_size(context, tiny):
    (row,) = document(profile(tiny(SIZE), context, [FULL], "tiny"), context)["rows"]
    model = create_model("resnet20", num_classes=10, in_channels=1)
    assert row["macs"] == count(model, [FULL], (1, 16, 16))[FULL].macs


def test_sizes_that_do_not_go_together(tiny):
    with pytest.raises(RecipeError, match=r"data\.resize: 12 px is less than the 16 of evaluate\.image_size, which are taken"):
        tiny(SIZE, "data.resize=12")
    with pytest.raises(RecipeError, match=r"--set evaluate\.image_size=2: evaluate\.image_size: 2 px is too small"):
        tiny("evaluate.image_size=2")
