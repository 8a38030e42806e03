"""`sdpctl predict --cascade`, and exports of cascades, as a user meets them."""

import json
import shutil

import numpy as np
import pytest
from cascade_options import EASY
from command import called, document, one_line
from PIL import Image
from sklearn.datasets import load_digits

PICTURES = tuple(f"{n}.png" for n in range(20))


@pytest.fixture(scope="module")
def chosen(make_once):
    """A folder with a chosen cascade, a bundle that has it, and pictures of digits."""

    def choose(folder):
        (folder / "easy.yaml").write_text(EASY)
        for words in (
            ["run", "easy.yaml"],
            ["search", "easy", "--cascade", "--max-macs", "80%"],
            ["export", "easy", "--format", "bundle"],
        ):
            done = called(folder, *words, "-q")
            assert done.returncode == 0, done.stderr
        digits = load_digits().images
        for n, name in enumerate(PICTURES):
            pixels = (digits[n] + digits[n + 1]) / 2 if n % 2 else digits[n]  # one digit over the next is hard to tell
            Image.fromarray((pixels * 15.9).astype(np.uint8)).save(folder / name)

    return make_once("easy-chosen", choose)


@pytest.fixture
def folder(chosen, tmp_path):
    return shutil.copytree(chosen, tmp_path / "easy")


def figures(folder):
    """Return the cascades of the bundle by their text."""
    return {row["cascade"]: row for row in json.loads((folder / "easy.bundle" / "bundle.json").read_text())["cascades"]}


@pytest.mark.parametrize("ref", ["easy", "easy.bundle", "easy.cascade"])
def test_each_image_has_the_member_that_answered_it_and_its_cost(chosen, ref):
    known = figures(chosen)
    dearest = max(row["heldout_macs"] for row in known.values())
    shown = document(chosen, "predict", ref, *PICTURES, "--cascade", "--max-macs", dearest)
    row = known[shown["cascade"]]
    members = [part.partition(":")[0].partition("~")[0] for part in shown["cascade"].removeprefix("mean/").split("/")]
    spent = np.cumsum(row["member_macs"]).tolist()
    assert [image["file"] for image in shown["images"]] == list(PICTURES)
    for image in shown["images"]:
        assert image["macs"] == spent[members.index(image["instance"])]
        assert 0.8 < sum(top["probability"] for top in image["top"]) <= 1.0001
    mean = sum(image["macs"] for image in shown["images"]) / len(PICTURES)
    assert (shown["macs"], shown["relative"]) == (round(mean), pytest.approx(mean / full_macs(chosen)))
    assert "instance" not in shown
    assert len({image["instance"] for image in shown["images"]}) > 1, "one member answers all pictures"
    assert (
        shown["images"] == document(chosen, "predict", "easy.bundle", *PICTURES, "--cascade", "--max-macs", dearest)["images"]
    )


def full_macs(folder):
    return json.loads((folder / "easy.bundle" / "bundle.json").read_text())["full_macs"]


def test_a_member_answers_as_it_does_alone(chosen):
    dearest = max(row["heldout_macs"] for row in figures(chosen).values())
    shown = document(chosen, "predict", "easy", *PICTURES, "--cascade", "--max-macs", dearest)
    (first, *_) = shown["cascade"].removeprefix("mean/").split("/")
    instance, _, temperature = first.partition(":")[0].partition("~")
    alone = {i["file"]: i["top"] for i in document(chosen, "predict", "easy", *PICTURES, "--instance", instance)["images"]}
    left = [image for image in shown["images"] if image["instance"] == instance]
    assert left
    for image in left:
        mine, theirs = ({top["class"]: top["probability"] for top in tops} for tops in (image["top"], alone[image["file"]]))
        common = sorted(set(mine) & set(theirs))
        log_ratio = [np.log(mine[c] / mine[common[0]]) for c in common]
        expected = [np.log(theirs[c] / theirs[common[0]]) / float(temperature or 1) for c in common]
        np.testing.assert_allclose(log_ratio, expected, atol=1e-3)


def test_people_see_who_answered(chosen):
    done = called(chosen, "predict", "easy.bundle", *PICTURES[:3], "--cascade")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("easy.bundle: ")
    assert " MACs (" in lines[0]
    assert " on average, " in lines[0]
    assert lines[1].split("  ")[-1] == "answered by"
    assert [line.split()[0] for line in lines[2:] if line.startswith(PICTURES[:3])] == list(PICTURES[:3])
    quiet = called(chosen, "predict", "easy.bundle", *PICTURES[:3], "--cascade", "-q").stdout.split()
    assert quiet == [i["top"][0]["class"] for i in document(chosen, "predict", "easy", *PICTURES[:3], "--cascade")["images"]]


def test_mistakes_are_a_line(folder):
    least = min(figures(folder).values(), key=lambda row: row["heldout_macs"])
    words = f"the cheapest, {least['cascade']}, takes {least['heldout_macs']:,} MACs on average"
    for ref in ("easy", "easy.bundle"):
        predict = ("predict", ref, PICTURES[0], "--cascade")
        one_line(called(folder, *predict, "--max-macs", least["heldout_macs"] - 1), 8, words)
        one_line(called(folder, *predict, "--instance", "full"), 2, "an instance and a cascade exclude each other")
        one_line(called(folder, *predict, "--max-latency-ms", 5), 2, "the latency of a cascade depends on the images")
    cheap = ("--format", "onnx-cascade", "--max-macs", least["heldout_macs"] - 1)
    one_line(called(folder, "export", "easy", *cheap), 8, words)
    one_line(
        called(folder, "export", "easy", "--format", "onnx-cascade", "--instance", "full"), 3, "export.instance: the format"
    )
    shutil.rmtree(folder / "easy.bundle")
    bundle = ("export", "easy", "--format", "bundle", "--instances", "full")
    assert called(folder, *bundle, "-q").returncode == 0
    one_line(
        called(folder, "predict", "easy.bundle", PICTURES[0], "--cascade"), 4, "easy has no cascade to choose; `sdpctl search"
    )


def test_an_export_names_its_cascade_and_is_a_folder(folder):
    shown = document(folder, "export", "easy.cascade")
    (row,) = shown["cascades"]
    assert (shown["format"], shown["file"]) == ("onnx-cascade", "easy.onnx-cascade")
    names = {path.name for path in (folder / "easy.onnx-cascade").iterdir()}
    assert names == {"policy.json", "run.py", "SHA256SUMS", "card.md", *(f"member{i}.onnx" for i in range(len(row["left"])))}
    one_line(called(folder, "export", "easy.cascade"), 2, "easy.onnx-cascade: this folder exists; --force replaces it")
    again = called(folder, "export", shown["tag"], "-o", "again")
    assert again.returncode == 0, again.stderr
    assert f"cascade {row['cascade']}: " in again.stdout
    for name in names:
        assert (folder / "again" / name).read_bytes() == (folder / "easy.onnx-cascade" / name).read_bytes()
    for what in ("easy.onnx-cascade", shown["tag"]):
        one_line(called(folder, "predict", what, PICTURES[0]), 2, "bundle")
