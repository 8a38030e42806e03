"""What the command line makes of text: values within bounds, or one line."""

import os

import pytest
from command import called

RESNET = ["profile-flops", "resnet18", "--image-size", "32"]


HOSTILE = {
    "a latency that is not a number": (
        ["export", "x", "--max-latency-ms", "nan"],
        "--max-latency-ms nan: give a finite number",
    ),
    "an endless latency": (["predict", "x", "y", "--max-latency-ms", "inf"], "--max-latency-ms inf: give a finite number"),
    "a grace that is not a number": (["store", "gc", "--grace", "nan"], "--grace nan: give a finite number"),
    "ratios that are not numbers": ([*RESNET, "--ratios", "nan"], "--ratios nan: give different numbers above 0 and below 1"),
    "ratios with separators": ([*RESNET, "--ratios", "0.5_0"], "--ratios 0.5_0: give different numbers above 0 and below 1"),
    "ratios without end": ([*RESNET, "--ratios", "1e999"], "--ratios 1e999: give different numbers above 0 and below 1"),
    "long ratios": ([*RESNET, "--ratios", "9" * 5000], "(5,000 characters): give different numbers above 0 and below 1"),
    "an escape sequence": ([*RESNET, "--ratios", "\x1b[31m"], "--ratios \\x1b[31m: give different numbers"),
    "only commas": ([*RESNET, "--instances", ",,,"], "an empty list (',,,') on the command line"),
    "a superscript": ([*RESNET, "--instances", "layer\u00b2@0.5"], "'layer\u00b2@0.5' is not an instance"),
    "many digits": ([*RESNET, "--instances", f"layer{'1' * 5000}@0.5"], "is not an instance"),
    "a size": (["profile-flops", "resnet18", "--image-size", "1" + "0" * 20], "--image-size"),
    "classes": (["profile-flops", "resnet18", "--num-classes", "1" + "0" * 30], "--num-classes"),
    "classes of 5,000 digits": (["profile-flops", "resnet18", "--num-classes", "1" * 5000], "--num-classes"),
    "batches": (["eval", "x", "--batches", "1" + "0" * 4000], "--batches"),
    "batches of a calibration": (["calibrate-bn", "x", "--batches", "1" + "0" * 30], "--batches"),
    "seeds": (["search", "x", "--seeds", "1" + "0" * 30], "--seeds"),
    "evaluations": (["search", "x", "--evaluations", "1" + "0" * 30], "--evaluations"),
}


@pytest.mark.parametrize(("words", "line"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_values_are_usage_errors(tmp_path, words, line):
    done = called(tmp_path, *words)
    assert done.returncode == 2
    assert line in done.stderr
    assert "bug" not in done.stderr


@pytest.mark.parametrize(
    "words", [["recipe", "ls"], ["recipe", "show"], ["profile-flops"], ["store", "ls", "--store"], [*RESNET, "--csv"]]
)
def test_a_path_that_is_too_long_is_a_usage_error(tmp_path, words):
    done = called(tmp_path, *words, "x" * 5000)
    assert done.returncode in (2, 5)  # 5: there is no such store
    assert "bug" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_folder_of_recipes_is_listed_although_some_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_bytes("name: b".encode("utf-16"))
    (tmp_path / "c.yaml").write_text("name: c\nmodel: {arch: resnet20}\ndata: {dataset: digits}\n")
    done = called(tmp_path, "recipe", "ls", ".")
    assert done.returncode == 3
    assert "c.yaml" in done.stdout
    first, second = done.stderr.splitlines()
    assert first.startswith("sdpctl: a.yaml: this recipe cannot be read (not a regular file but a FIFO)")
    assert second.startswith("sdpctl: b.yaml:1:1: this file is UTF-16 or UTF-32, not UTF-8")
