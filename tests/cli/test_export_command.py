"""`sdpctl export`, `import`, `predict` and `eval --split holdout` as a user meets them."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from command import called, completed, document, light, one_line
from forked import Forked
from PIL import Image

from sdpctl.export import check
from sdpctl.export.bundle import BundleFormat
from sdpctl.export.catalog import CARD
from sdpctl.export.onnx import OnnxFormat
from sdpctl.export.torch_export import TorchExportFormat
from sdpctl.models import create_model
from sdpctl.store import Store

SMOKE = Path(__file__).parent.parent.parent / "recipes" / "smoke.yaml"
DIGITS = ("--set", "data.dataset=digits", "--set", "data.image_size=8", "--set", "data.workers=0")
BUNDLE = {"bundle.json", "card.md", "model.safetensors", "statistics.safetensors", "SHA256SUMS"}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def exports(folder):
    return {artifact.digest for artifact in Store(folder / ".sdpctl").artifacts() if artifact.kind == "export"}


def export_smoke(folder):
    (folder / "work").mkdir()
    assert called(folder / "work", "train", SMOKE, "--set", "export=null", "-q").returncode == 0
    assert called(folder / "work", "calibrate-bn", "smoke", "-q").returncode == 0
    shown = {form: document(folder / "work", "export", "smoke", "--format", form) for form in ("bundle", "onnx")}
    (folder / "shown.json").write_text(json.dumps(shown))


@pytest.fixture(scope="module")
def exported(make_once, tmp_path_factory):
    """A folder with a store that holds the smoke network, evaluated, a bundle and an ONNX file; and what was printed."""
    made, folder = make_once("cli-exported", export_smoke), tmp_path_factory.mktemp("exported")
    shutil.copytree(made / "work", folder, dirs_exist_ok=True)
    return folder, json.loads((made / "shown.json").read_text())


@pytest.fixture
def folder(exported, tmp_path):
    """A copy, to write to."""
    shutil.copytree(exported[0], tmp_path / "copied")
    return tmp_path / "copied"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Image files of every kind of colour."""
    folder = tmp_path_factory.mktemp("pictures")
    drawn = np.random.default_rng(0).integers(0, 256, (20, 16), dtype=np.uint8)
    for mode in ("L", "RGB", "RGBA"):
        Image.fromarray(drawn).convert(mode).save(folder / f"{mode}.png")
    return [folder / f"{mode}.png" for mode in ("L", "RGB", "RGBA")]


@pytest.fixture
def believed(monkeypatch):
    """Run nothing outside."""
    for form in (OnnxFormat, TorchExportFormat, BundleFormat):
        monkeypatch.setattr(form, "run", lambda *_: None)
    monkeypatch.setattr(check, "compare", lambda *_: check.Agreement(1, 0.0, 1.0, 100.0))


@pytest.fixture
def hollow(monkeypatch, believed):
    """Write nothing of value either; the cheapest takes five milliseconds, the others six."""
    for form, name in ((OnnxFormat, "model.onnx"), (TorchExportFormat, "model.pt2")):
        monkeypatch.setattr(form, "write", lambda _, source, name=name: hollow_files(name, source))
        monkeypatch.setattr(form, "one_call", lambda _, files, image, name=name: lambda: files[name])
    monkeypatch.setattr(check, "latency", lambda call: 5.0 if call() == b"stem@0.5" else 6.0)


def hollow_files(name, source):
    return {name: str(source.description.options[0].instance).encode(), CARD: source.card.encode()}


# Export


def test_the_document_of_an_export(exported):
    folder, shown = exported
    for form, said in shown.items():
        assert said["schema"] == "sdpctl.export/1"
        assert list(said)[1:4] == ["digest", "tag", "file"]
        assert said["digest"] == Store(folder / ".sdpctl").resolve(said["tag"]).digest
        assert (said["format"], said["name"], said["file"]) == (form, "smoke", f"smoke.{form}")
        assert [o["instance"] for o in said["options"]][-1] == "full"
    assert len(shown["bundle"]["options"]) == 5
    assert {path.name for path in (folder / "smoke.bundle").iterdir()} == BUNDLE
    for line in (folder / "smoke.bundle" / "SHA256SUMS").read_text().splitlines():
        digest, _, name = line.partition("  ")
        assert hashlib.sha256((folder / "smoke.bundle" / name).read_bytes()).hexdigest() == digest
    session = onnxruntime.InferenceSession(folder / "smoke.onnx")
    assert session.run(None, {"images": np.zeros((3, 1, 8, 8), np.float32)})[0].shape == (3, 10)
    for card in ("smoke.onnx.md", "smoke.bundle/card.md"):
        assert "smoke" in (folder / card).read_text()
    names = {path.name for path in folder.iterdir()}
    assert names == {".sdpctl", "smoke.bundle", "smoke.onnx", "smoke.onnx.md"}


def test_the_table_of_an_export(exported, tmp_path):
    folder, shown = exported
    done = called(folder, "export", "smoke", "--format", "bundle", "-o", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].rstrip() == shown["bundle"]["tag"]
    assert lines[1].split() == ["instance", "MACs", "relative", "test", "%", "held-out", "%"]
    for line, option in zip(lines[2:], shown["bundle"]["options"], strict=True):
        assert line.split()[0] == option["instance"]
        assert line.split()[-2:] == [f"{option['top1']:.2f}", f"{option['heldout_top1']:.2f}"]
    assert f"{tmp_path / 'b'}: " in done.stderr
    assert "in the store already" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    one = called(folder, "export", "smoke", "-o", tmp_path / "x.onnx")
    assert one.stdout.splitlines()[1].split() == ["instance", "MACs", "relative", "test", "%"]


def test_quiet_prints_the_digest_only(exported, tmp_path):
    done = called(exported[0], "export", "smoke", "-o", tmp_path / "x.onnx", "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, exported[1]["onnx"]["digest"] + "\n", "")


def test_an_export_writes_its_files_again(exported, tmp_path):
    folder, shown = exported
    for ref in (shown["bundle"]["tag"], shown["bundle"]["digest"]):
        out = tmp_path / ref[:5]
        again = document(folder, "export", ref, "-o", out)
        assert again == shown["bundle"] | {"file": str(out)}
        for path in (folder / "smoke.bundle").iterdir():
            assert (out / path.name).read_bytes() == path.read_bytes()
    document(folder, "export", shown["onnx"]["tag"], "-o", tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (folder / "smoke.onnx").read_bytes()
    assert (tmp_path / "again.onnx.md").read_bytes() == (folder / "smoke.onnx.md").read_bytes()


def test_an_export_leads_to_its_checkpoint(exported, tmp_path):
    folder, shown = exported
    lineage = document(folder, "store", "show", shown["onnx"]["tag"])["lineage"]
    assert [link["kind"] for link in lineage] == ["bn-statistics", "checkpoint"]
    again = called(folder, "export", shown["onnx"]["tag"], "--format", "bundle", "-o", tmp_path / "b")
    one_line(again, 2, "is an export already; give the checkpoint to export again")


def test_an_output_that_exists_is_kept_unless_forced(folder, exported):
    before = contents(folder)
    one_line(called(folder, "export", "smoke"), 2, "smoke.onnx: this file exists; --force replaces it")
    one_line(
        called(folder, "export", "smoke", "--format", "bundle"), 2, "smoke.bundle: this folder exists; --force replaces it"
    )
    (folder / "smoke.onnx").rename(folder / "other.onnx")
    one_line(called(folder, "export", "smoke"), 2, "smoke.onnx.md: this file exists")
    (folder / "other.onnx").rename(folder / "smoke.onnx")
    one_line(called(folder, "export", exported[1]["onnx"]["tag"]), 2, "smoke.onnx: this file exists")
    assert contents(folder) == before


def test_force_replaces_outputs(folder, exported, believed):
    (folder / "smoke.onnx").write_bytes(b"old")
    (folder / "smoke.onnx.md").write_bytes(b"old")
    shown = document(folder, "export", exported[1]["onnx"]["tag"], "--force")
    assert shown == exported[1]["onnx"]
    bundle = folder / "smoke.bundle"
    (bundle / "stray.txt").write_text("left over")
    (bundle / "card.md").write_text("old")
    assert document(folder, "export", "smoke", "--format", "bundle", "--force") == exported[1]["bundle"]
    for name in ("smoke.onnx", "smoke.onnx.md"):
        assert (folder / name).read_bytes() == (exported[0] / name).read_bytes()
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == {
        path.name: path.read_bytes() for path in (exported[0] / "smoke.bundle").iterdir()
    }
    assert {path.name for path in folder.iterdir()} == {".sdpctl", "smoke.bundle", "smoke.onnx", "smoke.onnx.md"}


def test_a_folder_that_is_no_bundle_is_never_replaced(folder):
    mine = folder / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    before = contents(folder)
    for force in ([], ["--force"]):
        for form in ("bundle", "onnx"):
            done = called(folder, "export", "smoke", "--format", form, "-o", mine, *force)
            one_line(done, 2, "mine: this")
    done = called(folder, "export", "smoke", "--format", "bundle", "-o", mine / "thesis.txt", "--force")
    one_line(done, 2, "thesis.txt: this exists and is not a folder with a bundle.json, so --force does not replace it")
    assert contents(folder) == before


def test_an_output_in_no_folder(folder):
    before = contents(folder)
    for form in ("bundle", "onnx"):
        done = called(folder, "export", "smoke", "--format", form, "-o", "nowhere/x")
        one_line(done, 2, "nowhere")
    assert contents(folder) == before


def test_a_dry_run_writes_nothing(folder):
    before = contents(folder)
    shown = document(folder, "export", "smoke", "--instance", "layer3.0@0.5", "--dry-run", "-o", "x.onnx")
    assert list(shown) == ["schema", "dry_run", "plan"]
    assert [step["tag"] for step in shown["plan"] if step["digest"] is not None] == ["smoke.bn", "smoke.eval"]
    assert shown["plan"][-1]["task"] == "export layer3.0@0.5 as onnx, checked on at most 256 images"
    known = document(folder, "export", "smoke", "--dry-run", "-o", "x.onnx")
    assert known["options"][0]["instance"] == "full"
    assert document(folder, "import", "--arch", "resnet18", weights(folder), "--dry-run")["dry_run"] is True
    (folder / "w.pth").unlink()
    assert contents(folder) == before


def weights(folder):
    torch.save(create_model("resnet18", num_classes=4).state_dict(), folder / "w.pth")
    return folder / "w.pth"


def test_the_options_say_which_instance(folder, hollow):
    rows = {o["instance"]: o for o in document(folder, "export", "smoke", "--format", "bundle", "-o", "b")["options"]}
    named = document(folder, "export", "smoke", "--instance", "stem@0.5", "-o", "a.onnx")
    assert [option["instance"] for option in named["options"]] == ["stem@0.5"]
    within = document(folder, "export", "smoke", "--max-macs", "60%", "-o", "c.onnx")
    best = max((o for o in rows.values() if o["relative"] <= 0.6), key=lambda o: (o["heldout_top1"], -o["macs"]))
    assert [option["instance"] for option in within["options"]] == [best["instance"]]
    few = document(folder, "export", "smoke", "--format", "bundle", "--instances", "full, stem@0.5", "-o", "d")
    assert [option["instance"] for option in few["options"]] == ["stem@0.5", "full"]
    pareto = document(folder, "export", "smoke", "--format", "bundle", "--instances", "pareto", "-o", "e")
    tops = [option["heldout_top1"] for option in pareto["options"]]
    assert tops == sorted(set(tops))
    raw = document(folder, "export", "smoke", "--raw-input", "-o", "f.onnx")
    assert raw["input"]["raw"] is True
    slow = document(folder, "export", "smoke", "--max-latency-ms", "6", "-o", "g.onnx")
    assert slow["options"][0]["instance"] == pareto["options"][-1]["instance"]
    quick = document(folder, "export", "smoke", "--max-latency-ms", "5.5", "-o", "h.onnx")
    assert quick["options"][0]["instance"] == "stem@0.5"


MISTAKES = {
    "two ways at once": (["--instance", "full", "--max-macs", "50%"], 2, ["--instance and --max-macs exclude each other"]),
    "a budget and a latency": (["--max-macs", "1G", "--max-latency-ms", "5"], 2, ["--max-macs and --max-latency-ms exclude"]),
    "a search and an instance": (["--instance", "full", "--from-search", "x"], 2, ["--instance and --from-search exclude"]),
    "a bundle by latency": (
        ["--format", "bundle", "--max-latency-ms", "5"],
        2,
        ["--max-latency-ms: the latency of the format bundle is not measured"],
    ),
    "a bundle of one": (
        ["--format", "bundle", "--instance", "full"],
        3,
        ["export.instance: the format bundle has no `instance`"],
    ),
    "a bundle of raw pixels": (
        ["--format", "bundle", "--raw-input"],
        3,
        ["export.raw_input: the format bundle does not take raw pixels"],
    ),
    "several in one file": (["--instances", "full,stem@0.5"], 3, ["export.instances: the format onnx holds one instance"]),
    "a budget that nothing meets": (
        ["--max-macs", "1k"],
        8,
        ["--max-macs 1k: no calibrated instance", "the cheapest, stem@0.5"],
    ),
    "a budget that is none": (["--max-macs", "half"], 2, ["'half' is not a budget"]),
    "a latency that nothing meets": (["--max-latency-ms", "4.9"], 8, ["no instance is that fast", "stem@0.5 takes"]),
    "an instance that is none": (["--instance", "stem"], 2, ["'stem' is not an instance"]),
    "a point the network lacks": (["--instance", "maxpool@0.5"], 3, ["export.instance: ", "no point 'maxpool'"]),
    "no calibration": (["--instance", "layer3.1@0.5", "--no-calibrate"], 4, ["no BatchNorm statistics of layer3.1@0.5"]),
    "no search": (["--from-search", "smoke"], 4, ["smoke is of kind checkpoint, not a search"]),
    "what is settled": (["--set", "train.lr=1"], 2, ["smoke is trained already", "export"]),
    "an unknown key": (["--set", "export.fromat=onnx"], 3, ["export.fromat: unknown key (did you mean 'format'?)"]),
    "an empty list": (["--format", "bundle", "--instances", ","], 2, ["an empty list (',')"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_its_exit_code(exported, tmp_path, name, hollow):
    arguments, code, words = MISTAKES[name]
    folder = exported[0]
    before = exports(folder)
    one_line(called(folder, "export", "smoke", "-o", tmp_path / "out", *arguments), code, *words)
    assert exports(folder) == before
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported(exported, tmp_path):
    folder = exported[0]
    one_line(called(folder, "export", "smok"), 4, "no artifact 'smok' (did you mean 'smoke'?)")
    one_line(called(tmp_path, "export", "smoke"), 5, "there is no store")
    there = "choose one of onnx, torch-export, bundle"
    one_line(called(folder, "export", "smoke", "--format", "tflite"), 2, "there is no format 'tflite'", there)
    one_line(called(folder, "export", "smoke", "--format", "onx"), 2, "there is no format 'onx' (did you mean 'onnx'?)", there)


def test_a_recipes_section_holds_until_the_command_line_speaks(tmp_path, hollow):
    section = ("--set", "export={format: bundle, instances: [full, stem@0.5]}", "--set", "search=null", "--set", "profile=null")
    shown = document(tmp_path, "run", SMOKE, *section)
    assert list(shown)[1:] == ["train", "calibrate-bn", "eval-instances", "export"]
    said = document(tmp_path, "export", "smoke")
    assert said["digest"] == shown["export"]["digest"]
    assert said["file"] == "smoke.bundle"
    one = document(tmp_path, "export", "smoke", "--format", "onnx")
    assert [option["instance"] for option in one["options"]] == ["full"]


# Predict


def test_predictions_as_a_document(exported, pictures):
    shown = document(exported[0], "predict", "smoke", *pictures, "--instance", "full")
    assert list(shown) == ["schema", "instance", "macs", "relative", "milliseconds", "images"]
    assert (shown["schema"], shown["instance"], shown["relative"]) == ("sdpctl.predict/1", "full", 1)
    assert [image["file"] for image in shown["images"]] == [str(path) for path in pictures]
    for image in shown["images"]:
        likely = [top["probability"] for top in image["top"]]
        assert len(likely) == 5
        assert likely == sorted(likely, reverse=True)
        assert {top["class"] for top in image["top"]} <= {str(k) for k in range(10)}
    grey, colour, transparent = ([top["probability"] for top in image["top"]] for image in shown["images"])
    assert grey == pytest.approx(colour, abs=1e-5)
    assert grey == pytest.approx(transparent, abs=1e-5)


def test_predictions_are_those_of_the_network(exported, pictures):
    folder = exported[0]
    shown = document(folder, "predict", "smoke", pictures[0], "--instance", "full")
    pixels = np.asarray(Image.open(pictures[0]).resize((8, 10), Image.Resampling.BILINEAR).crop((0, 1, 8, 9)), np.float32)
    session = onnxruntime.InferenceSession(folder / "smoke.onnx")
    logits = session.run(None, {"images": ((pixels / 255 - 0.3053) / 0.3760)[None, None]})[0][0]
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    for top in shown["images"][0]["top"]:
        assert top["probability"] == pytest.approx(shares[int(top["class"])], abs=1e-3)


def test_predictions_for_people_and_for_scripts(exported, pictures):
    folder = exported[0]
    done = called(folder, "predict", "smoke.bundle", *pictures[:2], "--max-macs", "60%")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    shown = document(folder, "predict", "smoke.bundle", *pictures[:2], "--max-macs", "60%")
    assert lines[0].startswith(f"smoke.bundle: {shown['instance']}, ")
    assert lines[1].split() == ["image", "class", "probability"]
    assert [line.split()[0] for line in (lines[2], lines[7])] == [str(path) for path in pictures[:2]]
    assert len(lines) == 12
    quiet = called(folder, "predict", "smoke.bundle", *pictures[:2], "--max-macs", "60%", "-q")
    assert quiet.stdout.splitlines() == [image["top"][0]["class"] for image in shown["images"]]
    assert quiet.stderr == ""


def test_a_bundle_needs_no_store(exported, pictures, tmp_path):
    shutil.copytree(exported[0] / "smoke.bundle", tmp_path / "b")
    alone = document(tmp_path, "predict", "b", *pictures, "--max-macs", "60%")
    of_store = document(exported[0], "predict", exported[1]["bundle"]["tag"], *pictures, "--max-macs", "60%")
    of_network = document(exported[0], "predict", "smoke", *pictures, "--max-macs", "60%")
    for other in (of_store, of_network):
        assert (alone["instance"], alone["macs"]) == (other["instance"], other["macs"])
        assert [i["top"] for i in alone["images"]] == [i["top"] for i in other["images"]]
    options = exported[1]["bundle"]["options"]
    best = max((o for o in options if o["relative"] <= 0.6), key=lambda o: (o["heldout_top1"], -o["macs"]))
    assert alone["instance"] == best["instance"]
    assert {path.name for path in tmp_path.iterdir()} == {"b"}
    assert document(tmp_path, "predict", "b", pictures[0], "--max-latency-ms", "100000")["instance"] in str(options)


def test_what_was_never_evaluated_is_evaluated_first(tmp_path, pictures):
    assert called(tmp_path, "train", SMOKE, "-q").returncode == 0
    one_line(called(tmp_path, "predict", "smoke", pictures[0], "--no-calibrate"), 4, "no BatchNorm statistics")
    shown = document(tmp_path, "predict", "smoke", pictures[0], "--max-macs", "60%")
    assert shown["relative"] <= 0.6
    assert {a.tag for a in Store(tmp_path / ".sdpctl").artifacts()} == {"smoke", "smoke.bn", "smoke.eval", "smoke.holdout"}
    assert (
        document(tmp_path, "predict", "smoke", pictures[0], "--max-macs", "60%", "--no-calibrate")["images"] == shown["images"]
    )


def test_a_flipped_bit_in_a_bundle_is_found(exported, pictures, tmp_path):
    for name in sorted(BUNDLE - {"SHA256SUMS"}):
        shutil.copytree(exported[0] / "smoke.bundle", tmp_path / "b")
        content = bytearray((tmp_path / "b" / name).read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / "b" / name).write_bytes(content)
        done = called(tmp_path, "predict", "b", pictures[0])
        one_line(done, 5, f"b: the content of {name} does not match SHA256SUMS; copy or export it again")
        (tmp_path / "b" / name).unlink()
        one_line(called(tmp_path, "predict", "b", pictures[0]), 5, f"b: this bundle lacks {name}; copy or export it again")
        shutil.rmtree(tmp_path / "b")


def test_what_is_no_image(exported, pictures, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(pictures[1].read_bytes()[:60])
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("text.png", "cut.png", "empty.png", "missing.png"):
        done = called(exported[0], "predict", "smoke.bundle", pictures[0], tmp_path / name)
        one_line(done, 7, f"{tmp_path / name}: this image cannot be decoded")


@pytest.mark.parametrize("ref", ["smoke", "smoke.bundle"])
def test_mistakes_of_predict(exported, pictures, ref):
    folder, picture = exported[0], pictures[0]
    assert called(folder, "predict", ref).returncode == 2
    both = called(folder, "predict", ref, picture, "--instance", "full", "--max-macs", "50%")
    one_line(both, 2, "an instance and a budget exclude each other; give one")
    one_line(
        called(folder, "predict", ref, picture, "--max-macs", "1k"),
        8,
        "no instance is within 1,000 MACs; the cheapest, stem@0.5",
    )
    one_line(called(folder, "predict", ref, picture, "--max-macs", "half"), 2, "'half' is not a budget")
    one_line(called(folder, "predict", ref, picture, "--max-latency-ms", "0.000001"), 8, "no instance is within 1e-06 ms")
    one_line(called(folder, "predict", ref, picture, "--instance", "stem"), 2, "stem")
    one_line(called(folder, "predict", ref, picture, "--instance", "maxpool@0.5"), 2 if ref == "smoke" else 4, "maxpool")
    if ref == "smoke.bundle":
        set_ = called(folder, "predict", ref, picture, "--set", "device=cpu")
        one_line(
            set_, 2, "--set device=cpu: smoke.bundle is an export, whose settings cannot be changed; leave this override out"
        )
        tag = exported[1]["bundle"]["tag"]
        one_line(
            called(folder, "predict", tag, picture, "--set", "device=cpu"), 2, "is an export, whose settings cannot be changed"
        )
        done = called(folder, "predict", exported[1]["onnx"]["tag"], picture)
        one_line(done, 2, "is not a bundle but a different export; `sdpctl export --format bundle` makes a bundle")
    else:
        done = called(folder, "predict", ref, picture, "--instance", "layer3.1@0.5", "--no-calibrate")
        one_line(done, 4, "no BatchNorm statistics of layer3.1@0.5")
        one_line(called(folder, "predict", "smok", picture), 4, "no artifact 'smok' (did you mean 'smoke'?)")


# Import


@pytest.fixture
def theirs(tmp_path):
    """A file as the public code leaves it."""
    torch.manual_seed(0)
    state = create_model("resnet20", num_classes=10, in_channels=1).state_dict()
    path = tmp_path / "model_best.pth.tar"
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}, "epoch": 3}, path)
    return path


def test_import_says_what_it_made(tmp_path, theirs):
    done = called(tmp_path, "import", "--arch", "resnet20", theirs, *DIGITS, "--json")
    shown = json.loads(done.stdout)
    artifact = Store(tmp_path / ".sdpctl").resolve("model-best")
    full, warning = shown.pop("full"), shown.pop("warning")
    assert shown == {"schema": "sdpctl.import/1", "digest": artifact.digest, "tag": "model-best"}
    assert full.keys() == {"images", "top1", "top5", "loss"}
    assert full["images"] == 359
    assert warning.startswith(f"model-best: warning: {full['top1']:.2f} % is at chance")
    quiet = called(tmp_path, "import", "--arch", "resnet20", theirs, *DIGITS, "-q")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, artifact.digest + "\n", "")
    human = called(tmp_path, "import", "--arch", "resnet20", theirs, *DIGITS)
    assert human.stdout == ""
    assert f"model-best: imported model_best.pth.tar as resnet20, {artifact.digest[7:19]}" in done.stderr
    assert f"model-best: in the store already, {artifact.digest[7:19]}" in human.stderr
    assert f"model-best: `full` scores {full['top1']:.2f} % on 359 test images (chance is 10 %)" in human.stderr
    assert warning in human.stderr
    assert len(Store(tmp_path / ".sdpctl").artifacts()) == 1
    rows = document(tmp_path, "eval", "model-best", "--instances", "full,stem@0.5")["rows"]
    assert {row["instance"] for row in rows} == {"full", "stem@0.5"}


def test_without_data_the_next_command_asks_for_it(tmp_path, theirs):
    done = called(tmp_path, "import", "--arch", "resnet20", theirs)
    assert "no data was named; later commands need it" in done.stderr
    one_line(called(tmp_path, "eval", "model-best"), 7, "set data.root=")
    assert document(tmp_path, "eval", "model-best", *DIGITS, "--instances", "full")["images"] == 359


class Touches:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_hostile_file_is_refused_and_runs_nothing(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}, "args": Touches(tmp_path / "mark")}, tmp_path / "w.pth")
    done = called(tmp_path, "import", "--arch", "resnet20", "w.pth")
    one_line(done, 7, "w.pth: this file is not plain tensors and was not run")
    assert {path.name for path in tmp_path.iterdir()} == {"w.pth"}


def test_misfits_are_lines(tmp_path, theirs):
    done = called(tmp_path, "import", "--arch", "resnet20", theirs, "--set", "model.num_classes=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "sdpctl: model_best.pth.tar: fc.weight is (10, 64), not (3, 64)",
        "sdpctl: model_best.pth.tar: fc.bias is (10,), not (3,)",
        "sdpctl: model_best.pth.tar: 2 tensors do not fit resnet20 with 3 classes and the small stem; is --arch right?",
    ]
    assert not (tmp_path / ".sdpctl").exists()


def test_mistakes_of_import(tmp_path, theirs):
    before = contents(tmp_path)
    one_of_them = "give a file of weights, --timm NAME or --torchvision NAME, one of them"
    one_line(called(tmp_path, "import", "--arch", "resnet20"), 2, one_of_them)
    one_line(called(tmp_path, "import", "--arch", "resnet18", theirs, "--torchvision", "IMAGENET1K_V1"), 2, one_of_them)
    one_line(called(tmp_path, "import", "--timm", "resnet18", theirs), 2, one_of_them)
    one_line(called(tmp_path, "import", "--arch", "resnet20", "nothing.pth"), 7, "nothing.pth: no weights can be read")
    unknown = called(tmp_path, "import", "--arch", "resnet18", "--torchvision", "V9")
    one_line(unknown, 2, "--torchvision V9: torchvision has no weights 'V9' of resnet18; it has IMAGENET1K_V1")
    none = called(tmp_path, "import", "--arch", "resnet20", "--torchvision", "IMAGENET1K_V1")
    one_line(none, 2, "--torchvision: torchvision has no weights of resnet20")
    key = called(tmp_path, "import", "--arch", "resnet20", theirs, "--set", "data.datset=digits")
    one_line(key, 3, "unknown key (did you mean 'dataset'?)")
    missing = "--arch is missing: name the architecture of the weights; `sdpctl models` lists them"
    one_line(called(tmp_path, "import", theirs), 2, missing)
    near = called(tmp_path, "import", "--timm", "resnet50.a1_in1j")
    one_line(near, 2, "--timm resnet50.a1_in1j: timm has no weights 'a1_in1j' of resnet50 (did you mean 'a1_in1k'?); it has")
    assert contents(tmp_path) == before


def test_an_architecture_that_does_not_exist_is_one_line(tmp_path, theirs):
    done = called(tmp_path, "import", "--arch", "resnet21", theirs)
    assert done.returncode in (2, 3)
    one_line(done, done.returncode, "resnet21", "(did you mean 'resnet")


# The held-out images


def test_eval_of_the_held_out_images(folder, exported):
    shown = document(folder, "eval", "smoke", "--split", "holdout")
    assert (shown["schema"], shown["tag"], shown["images"]) == ("sdpctl.eval-instances/1", "smoke.holdout", 143)
    rows = {row["instance"]: row["top1"] for row in shown["rows"]}
    assert rows == {o["instance"]: o["heldout_top1"] for o in exported[1]["bundle"]["options"]}
    done = called(folder, "eval", "smoke", "--split", "holdout")
    assert done.stdout.splitlines()[0].rstrip() == "smoke.holdout: 143 held-out images"
    assert called(folder, "eval", "smoke", "--split", "holdout", "-q").stdout == shown["digest"] + "\n"
    assert document(folder, "eval", "smoke")["tag"] == "smoke.eval"
    few = document(folder, "eval", "smoke", "--split", "holdout", "--batches", 1, "--set", "evaluate.batch_size=50")
    assert few["images"] == 50


def test_mistakes_of_the_held_out_images(folder):
    done = called(folder, "eval", "smoke", "--split", "holdout", "--set", "data.holdout=20%")
    one_line(done, 2, "--set data.holdout=0.2: the training held out 0.1", "leave this override out")
    assert called(folder, "eval", "smoke", "--split", "train").returncode == 2


# Help and completion


def test_help_loads_nothing_heavy(tmp_path):
    words = {"export": "--raw-input", "import": "--torchvision", "predict": "IMAGE"}
    for word, shown in zip(words.values(), light(tmp_path, *([command, "--help"] for command in words)), strict=True):
        assert word in shown


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("sdpctl export smo", "smoke"),
        ("sdpctl export smoke --instance layer2.", "layer2.2"),
        ("sdpctl export smoke --format torch", "torch-export"),
        ("sdpctl predict smoke.export.b", "smoke.export.bundle."),
        ("sdpctl import --arch resnext", "resnext50"),
    ],
)
def test_completion(exported, line, expected):
    assert any(word.startswith(expected) for word in completed(exported[0], line))


# What is less usual


def test_a_search_is_exported_by_its_own_name(folder, hollow):
    search = ("--set", "search={images: 40, evaluations: 4, max_macs: 60%, rescore: 1, strategy: random}")
    assert called(folder, "search", "smoke", *search, "-q").returncode == 0
    by_name = document(folder, "export", "smoke.search", "-o", "a.onnx")
    for number, ref in enumerate(("smoke.search", "smoke.search.60pct")):
        again = document(folder, "export", "smoke", "--from-search", ref, "-o", f"b{number}.onnx")
        assert (again["digest"], again["tag"]) == (by_name["digest"], by_name["tag"])
    by_budget = document(folder, "export", "smoke.search.60pct", "-o", "c.onnx")
    assert (by_budget["digest"], by_budget["tag"]) == (by_name["digest"], by_name["tag"])
    assert by_name["options"][0]["relative"] <= 0.6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--instance", "null"], "'null' is not an instance"),
        (["--instance", ""], "'' is not an instance"),
        (["--max-macs", "none"], "'none' is not a budget"),
        (["--instances", "full],["], "'full]' is not an instance"),
        (
            ["-o", "y", "--set", "export.format=bundle", "--max-latency-ms", "5"],
            "--max-latency-ms: the latency of the format bundle is not measured",
        ),
        (
            ["-o", "y", "--set", "export.max_macs=50%", "--max-latency-ms", "5"],
            "--max-macs and --max-latency-ms exclude each other",
        ),
        (["-o", "y", "--max-latency-ms", "nan"], "--max-latency-ms nan: give a finite number"),
        (["-o", "."], "this cannot be the name of a file"),
        (["--format", "bundle", "-o", ".", "--force"], "this cannot be the name of a folder"),
        (["-o", "smoke.bundle"], "smoke.bundle: this is a folder; give the path of a file"),
        (["-o", "nowhere/x.onnx"], "nowhere/x.onnx: there is no folder nowhere"),
    ],
)
def test_odd_choices_are_a_line(folder, hollow, arguments, words):
    before = contents(folder)
    one_line(called(folder, "export", "smoke", *arguments), 2, words)
    assert contents(folder) == before


def test_what_a_link_points_at_is_replaced(folder, believed, pictures):
    (folder / "real").mkdir()
    (folder / "smoke.bundle").rename(folder / "real" / "smoke.bundle")
    (folder / "smoke.bundle").symlink_to(folder / "real" / "smoke.bundle")
    (folder / "real" / "smoke.bundle" / "bundle.json").write_text("old")
    assert called(folder, "export", "smoke", "--format", "bundle", "--force", "-q").returncode == 0
    assert (folder / "smoke.bundle").is_symlink()
    assert {path.name for path in (folder / "real").iterdir()} == {"smoke.bundle"}
    assert {path.name for path in (folder / "smoke.bundle").iterdir()} == BUNDLE
    assert called(folder, "predict", "smoke.bundle", pictures[0]).returncode == 0


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(folder, believed, monkeypatch):
    before, rename = contents(folder / "smoke.bundle"), Path.rename

    def fail(path, target):
        if ".new." in path.name:
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    one_line(called(folder, "export", "smoke", "--format", "bundle", "--force"), 7, "No space left on device")
    assert contents(folder / "smoke.bundle") == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".smoke")]


def test_names_are_shown_as_they_are(exported, pictures, tmp_path):
    shutil.copy(pictures[0], tmp_path / "a[copy].png")
    done = called(exported[0], "predict", "smoke.bundle", tmp_path / "a[copy].png")
    assert "a[copy].png" in done.stdout


def test_what_is_no_bundle_is_said_to_be_none(exported, pictures):
    one_line(called(exported[0], "predict", "smoke.onnx", pictures[0]), 2, "smoke.onnx: this is not a bundle")
    one_line(called(exported[0], "predict", "smoke.bundel", pictures[0]), 4, "no artifact 'smoke.bundel'")


# What others wrote


def rewritten(folder, tag, change):
    """Change the layers of an artifact, (title, content), every digest with them: only the meaning is hostile."""
    store = folder / ".sdpctl"
    index = json.loads((store / "index.json").read_bytes())
    title = "org.opencontainers.image.title"
    (entry,) = (e for e in index["manifests"] if e["annotations"].get("org.opencontainers.image.ref.name") == tag)

    def put(content):
        digest = hashlib.sha256(content).hexdigest()
        (store / "blobs" / "sha256" / digest).write_bytes(content)
        return {"digest": f"sha256:{digest}", "size": len(content)}

    def blob(descriptor):
        return (store / "blobs" / "sha256" / descriptor["digest"].removeprefix("sha256:")).read_bytes()

    manifest = json.loads(blob(entry))
    layers = change([(layer["annotations"][title], blob(layer)) for layer in manifest["layers"]])
    manifest["layers"] = [
        {"mediaType": "application/json", "annotations": {title: name}, **put(content)} for name, content in layers
    ]
    entry |= put(json.dumps(manifest).encode())
    (store / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("form", ["bundle", "onnx"])
@pytest.mark.parametrize("title", ["../../thesis.txt", "/ABSOLUTE", "..", "", "notes.txt", "a/b"])
def test_a_layer_with_a_title_of_its_own_is_not_written(folder, exported, form, title):
    (folder.parent / "thesis.txt").write_text("years of work")
    title = title.replace("ABSOLUTE", str(folder.parent / "absolute.txt").lstrip("/"))
    tag = exported[1][form]["tag"]
    rewritten(folder, tag, lambda layers: [*layers, (title, b"hostile")])
    before = contents(folder.parent)
    one_line(called(folder, "export", tag, "--force"), 5)
    one_line(called(folder, "export", tag, "-o", "new"), 5)
    assert contents(folder.parent) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "../../thesis"}, "export.json cannot be understood (name: expected a name"),
        ({"name": "/etc/x"}, "export.json cannot be understood (name: expected a name"),
        ({"format": "exe"}, "export.json cannot be understood (format: expected one of onnx, torch-export, bundle"),
        ({"format": "bundle"}, "a layer is titled 'model.onnx', which is not a file of the format bundle"),
        ({"options": []}, "export.json cannot be understood (options: expected a list"),
    ],
)
def test_what_an_export_says_of_itself_is_not_believed(folder, exported, change, said):
    tag = exported[1]["onnx"]["tag"]

    def changed(layers):
        return [(t, json.dumps(json.loads(c) | change).encode() if t == "export.json" else c) for t, c in layers]

    rewritten(folder, tag, changed)
    before = contents(folder.parent)
    one_line(called(folder, "export", tag, "--force"), 5, said)
    assert contents(folder.parent) == before


@pytest.mark.parametrize(
    ("tag", "layer", "content", "said"),
    [
        ("smoke", "model.safetensors", b"nothing", "model.safetensors does not fit resnet20: it is cut off, or is not"),
        ("smoke.bn", "statistics.safetensors", b"\xff" * 99, "statistics.safetensors: it is cut off, or is not"),
        ("smoke.bn", "nodes.json", b"{}", "nodes.json cannot be understood (batches: this key is missing)"),
        ("smoke.eval", "results.json", b"[]", "results.json cannot be understood (the document: expected an object"),
        ("smoke.bn", "recipe.yaml", b"\xff\xfe", "this file is UTF-16 or UTF-32, not UTF-8"),
        ("smoke", "recipe.yaml", b"name: x\ndata: {root: /home, download: true}\n", "data.root does not belong in an artifact"),
        ("smoke", "recipe.yaml", b"search: {storage: 'sqlite:////home/x'}\n", "search.storage does not belong in an artifact"),
    ],
)
def test_a_layer_that_is_not_what_its_title_says_is_named(folder, tag, layer, content, said):
    assert called(folder, "eval", "smoke", "-q").returncode == 0
    rewritten(folder, tag, lambda layers: [(title, content if title == layer else before) for title, before in layers])
    one_line(called(folder, "eval", "smoke"), 5, said)


# Where nothing may be written


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: os.mkfifo(path), "this is a FIFO, which is never replaced"),
        (lambda path: path.symlink_to("/dev/null"), "this is a device, which is never replaced"),
        (lambda path: path.symlink_to("nowhere"), "cannot be written (it is a link to nothing)"),
        (lambda path: path.symlink_to(path.name), "cannot be written (it is a link to nothing)"),
    ],
)
@pytest.mark.parametrize("form", ["onnx", "bundle", "csv"])
def test_only_regular_files_are_replaced(folder, make, said, form):
    make(folder / "out")
    arguments = ["eval", "smoke", "--csv", "out"] if form == "csv" else ["export", "smoke", "--format", form, "-o", "out"]
    before = contents(folder)
    for force in ([], ["--force"]):
        one_line(called(folder, *arguments, *force), 2, "out: ", said)
    assert contents(folder) == before
    assert (folder / "out").is_symlink() or (folder / "out").is_fifo()


@pytest.mark.parametrize("name", ["x" * 256, "x" * 254, "nowhere/x"])
def test_a_name_that_cannot_be_is_refused_before_any_work(folder, name):
    before = exports(folder)
    one_line(called(folder, "export", "smoke", "--instance", "stem@0.5", "-o", name), 2, "choose a different path")
    assert exports(folder) == before


def test_standard_output_is_not_a_file_to_write(folder):
    command = [sys.executable, "-m", "sdpctl", "export", "smoke", "--force", "-o", "/dev/stdout"]
    with (folder / "log").open("wb") as log:
        done = subprocess.run(command, cwd=folder, stdout=log, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, (folder / "log").read_bytes()) == (2, b"")
    assert (
        "/dev/stdout: the command's standard output or standard error goes to this file; choose a different name" in done.stderr
    )


def test_what_a_link_to_a_file_points_at_is_replaced(folder, believed):
    (folder / "smoke.onnx").rename(folder / "real.onnx")
    (folder / "smoke.onnx").symlink_to("real.onnx")
    (folder / "real.onnx").write_bytes(b"old")
    assert called(folder, "export", "smoke", "--force", "-q").returncode == 0
    assert (folder / "smoke.onnx").is_symlink()
    assert (folder / "real.onnx").stat().st_size > 1000


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), -1))
sys.argv[:2] = ["sdpctl"]
from sdpctl.cli import main
main()
"""


@pytest.mark.parametrize("form", ["onnx", "bundle"])
def test_a_full_disk_ends_an_export_with_a_line(folder, tmp_path, form):
    (tmp_path / "temporary").mkdir()
    before = contents(folder)
    command = ["-c", LIMITED, "500000", "export", "smoke", "--format", form, "-o", "y", "--force"]
    process = Forked(command, folder, os.environ | {"TMPDIR": str(tmp_path / "temporary")})
    streams = process.communicate(timeout=120)
    line = one_line(subprocess.CompletedProcess(command, process.returncode, *streams), 7, "File too large")
    assert ("cannot write there" if form == "onnx" else "in a separate process") in line
    assert {path: content for path, content in contents(folder).items() if "logs" not in path.parts} == {
        path: content for path, content in before.items() if "logs" not in path.parts
    }
    assert not [path for path in (tmp_path / "temporary").iterdir() if path.name.startswith("sdpctl-")]
