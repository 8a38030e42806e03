"""The images of a calibration: how many a batch has, at which size, and whether they are augmented."""

import copy
import json

import pytest
import torch
from stage_calls import calibrate, document, evaluate, search, train
from torch import nn
from torchvision.transforms import v2

from sdpctl.data.loader import ImageData
from sdpctl.data.reader import Located
from sdpctl.data.settings import DataSettings, Preparation
from sdpctl.data.sources import open_sources
from sdpctl.errors import DataError, RecipeError
from sdpctl.instance import Instance
from sdpctl.stages.layers import read_model, read_statistics
from sdpctl.stages.network import open_network
from sdpctl.stages.train import train_key

DIGITS = DataSettings(dataset="digits", image_size=8, augment="crop", batch_size=128, workers=0)
OPTIONS = {
    "size": "calibrate.image_size=12",
    "batches": "calibrate.batch_size=40",
    "clean": "calibrate.augment=none",
    "all": "calibrate={batch_size: 50, image_size: 6, augment: none, batches: 2}",
}


def opened(settings=DIGITS, **options):
    return ImageData(settings, Located((), {}), torch.device("cpu"), in_channels=1, seed=0, **options)


def clean(size, side=None):
    """Return all training images after the test transform, (N, C, H, W), by torchvision alone."""
    source, _ = open_sources("digits", DIGITS.folder, Located((), {}))
    resized = v2.functional.resize(source.images, [side or size], antialias=True)
    mean, std = DIGITS.normalisation(1)
    return (v2.functional.center_crop(resized, [size, size]).float() / 255 - mean[0]) / std[0]


@pytest.mark.parametrize(
    ("settings", "scored_size", "size", "side"),
    [
        (DIGITS, None, 8, 8),
        (DIGITS, 16, 12, 12),
        (DataSettings(dataset="digits", image_size=8, augment="resized-crop", workers=0), None, 14, 16),
        (DataSettings(dataset="digits", image_size=8, resize=24, workers=0), 16, 8, 12),
    ],
)
def test_clean_images_are_those_of_the_test_transform(settings, scored_size, size, side):
    data, images = opened(settings, scored_size=scored_size), clean(size, side)
    preparation = Preparation(batch_size=30, image_size=size, augmented=False)
    order = [index for _, index in data._order("calibration")]
    batches = list(data.calibration(3, preparation))
    assert [len(labels_N) for _, labels_N in batches] == [30, 30, 30]
    torch.testing.assert_close(torch.cat([x for x, _ in batches]), images[order[:90]], rtol=0, atol=1e-5)
    assert torch.cat([y for _, y in batches]).tolist() == data.labels[order[:90]].tolist()
    assert not set(order) & set(data.holdout_indices)


def test_augmented_images_of_a_size_are_those_of_a_training_at_this_size():
    at_12 = DataSettings(dataset="digits", image_size=12, augment="crop", batch_size=40, workers=0)
    preparation = Preparation(batch_size=40, image_size=12)
    for ours, theirs in zip(opened().calibration(2, preparation), opened(at_12).calibration(2), strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_processes_share_the_batches():
    preparation = Preparation(batch_size=50, image_size=6, augmented=False)
    whole = list(opened().calibration(5, preparation))
    for rank in range(2):
        mine = list(opened(rank=rank, ranks=2).calibration(5, preparation))
        assert len(mine) == len(whole[rank::2])
        assert all(torch.equal(x, y) for (x, _), (y, _) in zip(mine, whole[rank::2], strict=True))


def gathered_alone(model, instance, batches):
    """Let PyTorch gather one instance's statistics."""
    alone = copy.deepcopy(model).train()
    for module in alone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        for x_NCHW in batches:
            alone(x_NCHW, instance)
    return alone


def test_clean_statistics_equal_a_plain_loop_over_the_test_transform(is_trained, context):
    network = open_network("tiny", context, [OPTIONS["all"]])
    artifact = calibrate(network, context)
    assert {key: document(artifact, context)[key] for key in ("batches", "images")} == {"batches": 2, "images": 100}
    model = read_model(context.store, context.tagged("tiny"), network.recipe.model)
    order = [index for _, index in opened()._order("calibration")]
    batches = clean(6)[order[:100]].split(50)
    statistics = read_statistics(context.store, artifact, model)
    for instance in map(Instance.parse, ("full", "stem@0.5", "layer2.0@0.5")):
        alone, passed = gathered_alone(model, instance, batches), []
        for segment in model.segments():
            for name in model.norms(segment):
                bn = alone.get_submodule(name)
                mean, var = statistics.at(instance.among(passed), name)
                torch.testing.assert_close(mean, bn.running_mean, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(var, bn.running_var, rtol=1e-4, atol=1e-5)
            passed += [segment.point] if segment.point else []


def test_statistics_and_evaluations_depend_on_them_and_a_training_does_not(is_trained, context, tiny):
    resolved = context.workspace.resolve(tiny())
    plain = evaluate(open_network("tiny", context), context)
    found = {plain.subject.digest: plain.key}
    for override in OPTIONS.values():
        assert train_key(context.workspace.resolve(tiny(override))) == train_key(resolved)
        artifact = evaluate(open_network("tiny", context, [override]), context, force=True)
        found[artifact.subject.digest] = artifact.key
        assert document(artifact, context)["rows"] != document(plain, context)["rows"]
    assert len(found) == len(set(found.values())) == 1 + len(OPTIONS)


def test_validation_uses_the_images_of_the_training(context, tiny):
    plain = train(tiny("train.epochs=1"), context)
    other = train(tiny("train.epochs=1", "name=other", OPTIONS["all"]), context)
    assert other.layers["history.jsonl"].digest == plain.layers["history.jsonl"].digest


def test_both_sizes_belong_together(is_trained, context, listener):
    sizes = ["calibrate.image_size=12", "evaluate.image_size=12"]
    losses = {}
    for name, overrides in {"scored": sizes[1:], "gathered": sizes[:1], "both": sizes}.items():
        listener.notes.clear()
        rows = document(evaluate(open_network("tiny", context, overrides), context), context)["rows"]
        losses[name] = {row["instance"]: row["loss"] for row in rows}["full"]
        assert any("of 12 px, but images of 8 px are scored" in note for note in listener.notes) == (name == "gathered")
    assert losses["both"] < losses["scored"]


def test_a_search_calibrates_with_the_same_images(is_trained, context, quick_sqlite):
    images = "calibrate={batch_size: 60, batches: 2, augment: none, image_size: 12}"
    settings = "search={evaluations: 2, images: 70, rescore: 1, rescore_images: 200, calibration_batches: 2, strategy: uniform}"
    overrides = [images, "evaluate.image_size=12"]
    found = search(open_network("tiny", context, [*overrides, settings, "search.precision=fp32"]), context)
    result = json.loads(context.store.read(found, "result.json"))
    held = evaluate(open_network("tiny", context, overrides), context, ["full"], "holdout")
    (row,) = document(held, context)["rows"]
    assert result["full"]["heldout"]["images"] == document(held, context)["images"]
    assert result["full"]["heldout"]["loss"] == pytest.approx(row["loss"], rel=1e-5)


def test_a_batch_of_more_images_than_there_are(is_trained, context):
    with pytest.raises(DataError, match=r"1295 training images do not fill one batch: lower calibrate\.batch_size=2000"):
        calibrate(open_network("tiny", context, ["calibrate.batch_size=2000"]), context)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("calibrate.image_size=2", r"calibrate\.image_size: 2 px is too small"),
        ("calibrate.batch_size=1", r"calibrate\.batch_size"),
        ("calibrate.augment=crop", r"calibrate\.augment"),
    ],
)
def test_what_is_refused(tiny, override, reason):
    with pytest.raises(RecipeError, match=reason):
        tiny(override)


def test_a_recipe_without_them_keeps_its_keys(tiny):
    assert set(tiny().identity()["calibrate"]) == {"batches", "estimator", "precision"}
