"""Every command on a network without batch norms, which reads no image for a calibration."""

import json

import pytest
from command import called, document

from sdpctl import load
from sdpctl.data.loader import ImageData

RECIPE = """
name: tiny
model: {arch: timm/test_convnext, in_channels: 1}
data: {dataset: digits, image_size: 64, batch_size: 64, workers: 0}
sdpoint: {ratios: [0.5], points: [stages.1.blocks.0, stages.2.blocks.1]}
train: {epochs: 1, lr: 0.05, validate: {every: 1}}
evaluate: {batches: 1}
search: {evaluations: 6, images: 40, ratios: [1, 0.5], points: [stem, stages.0.blocks.0, stages.1.blocks.0, stages.2.blocks.1]}
"""

NOTHING = "the network has no batch norms, so its instances need no calibration"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which all stages of the recipe were run, although calibration images could not be read."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageData, "calibration", _no_images)
        planned = called(folder, "run", "tiny.yaml", "--dry-run", SDPCTL_DEBUG="1")
        done = called(folder, "run", "tiny.yaml", SDPCTL_DEBUG="1")
    assert (planned.returncode, done.returncode) == (0, 0), planned.stderr + done.stderr
    return folder, planned, done


def _no_images(*_):
    raise AssertionError("calibration images were asked for")
    yield


def test_a_run_says_that_nothing_is_calibrated(trained):
    _, planned, done = trained
    (line,) = (line for line in planned.stdout.splitlines() if "bn-statistics" in line)
    assert NOTHING in line
    assert f"tiny.bn: {NOTHING}, " in done.stderr
    assert done.stdout.splitlines().count(NOTHING) == 1


def test_the_table_says_it_too(trained):
    folder, *_ = trained
    done = called(folder, "eval", "tiny", "--split", "holdout")
    assert done.stdout.splitlines()[-1] == NOTHING
    rows = document(folder, "eval", "tiny")["rows"]
    assert {row["instance"] for row in rows} == {"full", "stages.1.blocks.0@0.5", "stages.2.blocks.1@0.5"}


def test_calibrate_bn_succeeds_without_an_image(trained, monkeypatch):
    folder, *_ = trained
    monkeypatch.setattr(ImageData, "calibration", _no_images)
    shown = document(folder, "calibrate-bn", "tiny", "--instances", "stages.0.blocks.0@0.5", "--force")
    assert (shown["batches"], shown["images"], shown["instances"]) == (0, 0, ["stages.0.blocks.0@0.5"])
    planned = document(folder, "calibrate-bn", "tiny", "--dry-run", "--instances", "stem@0.5")
    (step,) = (step for step in planned["plan"] if step["kind"] == "bn-statistics")
    assert NOTHING in step["task"]


@pytest.mark.parametrize("form", ["onnx", "bundle"])
def test_an_instance_is_exported_without_statistics(trained, form, monkeypatch):
    folder, *_ = trained
    monkeypatch.setattr(ImageData, "calibration", _no_images)
    chosen = ("--instances", "stem@0.5,full") if form == "bundle" else ("--instance", "stem@0.5")
    shown = document(folder, "export", "tiny", "--format", form, *chosen, "--no-calibrate", "--output", f"out.{form}")
    assert {option["instance"] for option in shown["options"]} == {"stem@0.5"} | ({"full"} if form == "bundle" else set())
    if form == "bundle":
        assert json.loads((folder / "out.bundle" / "bundle.json").read_text())["statistics_nodes"]["nodes"] == {}
        assert len(load(folder / "out.bundle").instances) == 2
