"""`sdpctl latency` on exports of one network, and what uses its table."""

import csv
import json
import shutil
from dataclasses import replace

import pytest
import torch
from command import called
from PIL import Image

import sdpctl
from sdpctl.engine.calibrate import calibrate
from sdpctl.engine.tensors import tensors_to_bytes
from sdpctl.errors import IntegrityError, UsageError
from sdpctl.export.catalog import FORMATS
from sdpctl.export.description import Description, Input, Option
from sdpctl.export.format import Source, format_of
from sdpctl.instance import FULL, Instance
from sdpctl.models.settings import ModelSettings

STEM = Instance.parse("stem@0.5")


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A bundle, an onnx-folder, an .onnx file and a .pt2 file."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("exports")
    settings = ModelSettings(arch="resnet8", num_classes=3, in_channels=1, stem="small")
    model = sdpctl.create_model("resnet8", num_classes=3, in_channels=1, stem="small").eval()
    figures = {"params": 2, "top1": 3.0, "top5": None, "loss": 4.0}
    description = Description(
        name="net",
        network=settings,
        input=Input(size=8, resize=8, mean=(0.4,), std=(0.2,)),
        classes=("a", "b", "c"),
        options=tuple(
            Option(instance=instance, macs=macs, relative=macs / 4000, heldout_top1=top1, **figures)
            for instance, macs, top1 in ((STEM, 1000, 50.0), (FULL, 4000, 60.0))
        ),
        full_macs=4000,
        checkpoint="1",
        statistics="2",
        test_images=80,
        heldout_images=40,
    )
    statistics = calibrate(model, [STEM, FULL], [(torch.randn(8, 1, 8, 8), None)])
    for name, form in FORMATS.items():
        if form.holds_cascade:
            continue
        options = description.options if form.several else description.options[1:]
        source = Source(
            model=model,
            statistics=statistics,
            description=replace(description, options=options),
            weights=lambda: tensors_to_bytes(model.state_dict()),
            card="card",
        )
        files = format_of(name).write(source)
        if form.several:
            (path / f"net.{form.suffix}").mkdir()
            for title, content in files.items():
                (path / f"net.{form.suffix}" / title).write_bytes(content)
        else:
            (path / f"net.{form.suffix}").write_bytes(files[form.files[0]])
    Image.new("L", (9, 9), 99).save(path / "grey.png")
    return path


@pytest.fixture
def folder(exports, tmp_path):
    shutil.copytree(exports, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_every_kind_of_export_is_measured(folder):
    names = ["net.bundle", "net.onnx-folder", "net.onnx", "net.pt2"]
    words = ("--batch", "1,3", "--repeats", 2, "--threads", 1, "--csv", "all.csv")
    done = called(folder, "latency", *names, *words, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["schema"] == "sdpctl.latency/1"
    rows = [(row["file"], row["instance"], row["batch"], row["macs"], row["relative"]) for row in said["rows"]]
    both = [(batch, *each) for batch in (1, 3) for each in (("stem@0.5", 1000), ("full", 4000))]
    assert rows == [
        *((name, text, batch, macs, macs / 4000) for name in names[:2] for batch, text, macs in both),
        *((name, "full", batch, 4000, 1.0) for name in names[2:] for batch in (1, 3)),
    ]
    for row in said["rows"]:
        assert 0 < row["median_ms"] <= row["p95_ms"]
        assert row["images_per_second"] == pytest.approx(1000 * row["batch"] / row["median_ms"])
    libraries = [file["machine"]["library"].split()[0] for file in said["files"]]
    assert libraries == ["torch", "onnxruntime", "onnxruntime", "torch"]
    assert {file["machine"]["threads"] for file in said["files"]} == {1}
    assert [file["kept"] for file in said["files"]] == [True, True, False, False]
    with (folder / "all.csv").open() as file:
        assert [row["median_ms"] for row in csv.DictReader(file)] == [str(row["median_ms"]) for row in said["rows"]]
    for name in names[:2]:
        kept = json.loads((folder / name / "latency.json").read_text())
        assert [row["median_ms"] for row in kept["rows"]] == [row["median_ms"] for row in said["rows"] if row["file"] == name]
    table = called(folder, "latency", "net.onnx", "--repeats", 1).stdout
    assert "4.00 k" in table
    assert "milliseconds per call, of 1 calls" in table


def kept_table(folder, times, **machine):
    """Write the table of a bundle with certain milliseconds, measured here, or on a machine that differs in some keys."""
    here = sdpctl.load(folder / "net.bundle", device="cpu").machine
    rows = [
        {"instance": name, "batch": 1, "median_ms": ms, "p95_ms": ms, "images_per_second": 1000 / ms}
        for name, ms in times.items()
    ]
    table = {"schema": "sdpctl.latency-table/1", "machine": here | machine, "rows": rows}
    (folder / "net.bundle" / "latency.json").write_text(json.dumps(table))
    return table


def test_predict_and_load_use_the_table_of_this_machine(folder):
    kept_table(folder, {"stem@0.5": 1e6, "full": 3e6})
    model, x = sdpctl.load(folder / "net.bundle", device="cpu"), torch.zeros(1, 1, 8, 8)
    assert torch.equal(model(x, max_latency_ms=2e6), model(x, instance="stem@0.5"))
    assert torch.equal(model(x, max_latency_ms=3e6), model(x, instance="full"))
    for limit, chosen in ((2e6, "stem@0.5"), (3e6, "full")):
        done = called(folder, "predict", "net.bundle", "grey.png", "--max-latency-ms", limit, "--json")
        assert json.loads(done.stdout)["instance"] == chosen
        assert "measur" not in done.stderr
    done = called(folder, "predict", "net.bundle", "grey.png", "--max-latency-ms", 9)  # a measurement here would be within
    assert done.returncode == 8
    assert "the quickest, stem@0.5, 1e+06 ms" in done.stderr


@pytest.mark.parametrize("other", [{"device": "Cortex-A76"}, {"threads": 77}, {"library": "torch 1.0"}, {"precision": "bf16"}])
def test_the_table_of_a_different_machine_is_not_used(folder, other):
    kept_table(folder, {"stem@0.5": 1e6, "full": 3e6}, **other)
    done = called(folder, "predict", "net.bundle", "grey.png", "--max-latency-ms", 1e5, "--json")
    assert json.loads(done.stdout)["instance"] == "full"
    (line,) = [line for line in done.stderr.splitlines() if "latency.json was measured on" in line]
    assert line.endswith("; measuring here")
    with pytest.raises(UsageError, match=r"not measured \(latency\.json was measured on .* and this is .*\); call measure"):
        sdpctl.load(folder / "net.bundle", device="cpu")(torch.zeros(1, 1, 8, 8), max_latency_ms=9)


def damaged(change):
    """Return a function that changes a table."""
    return lambda table: json.dumps({**table, **change(table)})


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda _: "{", "Expecting property name"),
        (lambda _: "[]", "expected an object"),
        (damaged(lambda _: {"schema": "x"}), "schema: expected one of"),
        (damaged(lambda table: {"rows": table["rows"][:1]}), "full, batch 1, differs"),
        (damaged(lambda table: {"rows": table["rows"] * 2}), "occur twice"),
        (damaged(lambda table: {"rows": [*table["rows"], table["rows"][0] | {"instance": "layer1.0@0.5"}]}), "layer1.0@0.5"),
        (damaged(lambda table: {"rows": [row | {"median_ms": -1} for row in table["rows"]]}), "median_ms: expected a number"),
        (damaged(lambda table: {"machine": table["machine"] | {"device": 3}}), "machine.device: expected text"),
        (damaged(lambda _: {"more": 1}), "unknown key"),
    ],
)
def test_a_table_of_a_stranger_is_refused(folder, write, reason):
    table = kept_table(folder, {"stem@0.5": 1.0, "full": 3.0})
    (folder / "net.bundle" / "latency.json").write_text(write(table))
    with pytest.raises(IntegrityError, match="remove it, or run `sdpctl latency") as caught:
        sdpctl.load(folder / "net.bundle")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_refused_table_can_be_measured_again(folder):
    (folder / "net.bundle" / "latency.json").write_text("{")
    assert called(folder, "predict", "net.bundle", "grey.png").returncode == 5
    assert called(folder, "latency", "net.bundle", "--repeats", 1, "-q").returncode == 0
    assert called(folder, "predict", "net.bundle", "grey.png", "--max-latency-ms", 1e6).returncode == 0


def test_a_part_of_the_instances_is_only_shown(folder):
    done = called(folder, "latency", "net.bundle", "net.onnx-folder", "--instances", "full", "--repeats", 1, "--json")
    assert [row["instance"] for row in json.loads(done.stdout)["rows"]] == ["full", "full"]
    assert not list(folder.glob("*/latency.json"))


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["nothing.onnx"], 2, "nothing.onnx: there is no such file or folder"),
        (["grey.png"], 2, "grey.png: this is not a bundle, an onnx-folder, an .onnx file or a .pt2 file"),
        (["net.onnx", "--batch", "1,0"], 2, "--batch '1,0': give different numbers from 1 to 4096"),
        (["net.onnx", "--batch", "2,2"], 2, "--batch '2,2': give different numbers"),
        (["net.onnx", "--instances", "full"], 2, "--instances: net.onnx holds one network"),
        (["net.bundle", "--instances", "layer1.0@0.5"], 4, "net.bundle has no instance layer1.0@0.5; it has stem@0.5, full"),
        (["net.onnx-folder", "--instances", "x"], 4, "net.onnx-folder has no instance x; it has stem@0.5, full"),
        (["broken.onnx"], 7, "broken.onnx: onnxruntime cannot open this file"),
        (["broken.pt2"], 7, "broken.pt2: this is not a .pt2 file of `sdpctl export`"),
        (["broken.onnx-folder"], 5, "broken.onnx-folder: the content of run.py does not match SHA256SUMS"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(folder, words, code, line):
    for name in ("broken.onnx", "broken.pt2"):
        (folder / name).write_bytes(b"broken")
    shutil.copytree(folder / "net.onnx-folder", folder / "broken.onnx-folder")
    (folder / "broken.onnx-folder" / "run.py").write_text("import os\n")
    done = called(folder, "latency", *words)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(f"sdpctl: {line}"), done.stderr
    assert done.stderr.count("\n") == 1
