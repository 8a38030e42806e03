"""A written folder of graphs, run by its own program without torch, against PyTorch."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from cascade_options import cascade_option
from PIL import Image
from test_network import alone, calibration, describe, images, network

from sdpctl.budget import Budget
from sdpctl.cascade import Cascade
from sdpctl.engine.calibrate import CalibratedNorms, calibrate
from sdpctl.engine.cascade import CascadeRun, added_macs
from sdpctl.engine.cost import Costs
from sdpctl.errors import UsageError
from sdpctl.export import run_folder
from sdpctl.export.bundle import Bundle
from sdpctl.export.check import compare
from sdpctl.export.description import Option
from sdpctl.export.format import Source
from sdpctl.export.onnx_folder import OnnxFolderFormat
from sdpctl.instance import FULL, Instance
from sdpctl.models.settings import ModelSettings
from sdpctl.runtime import Runtime

SIZE, STEM = 12, Instance.parse("stem@0.5")
CASCADES = ("stem@0.5:0.6/full", "mean/stem@0.5~1.5:0.7/full")


@pytest.fixture(scope="module")
def source():
    """A network of two instances, and two cascades of them that share their graphs."""
    model = network("resnet8", in_channels=3, stem="small").eval()
    costs = Costs(model, (3, SIZE, SIZE))
    member_macs = added_macs(Cascade.parse(CASCADES[0]), costs)
    figures = {"params": 2, "relative": 0.5, "top5": None, "loss": 1.0, "top1": 50.0}
    description = replace(
        describe("resnet8", FULL, 3, "small", SIZE),
        network=ModelSettings(arch="resnet8", num_classes=7, in_channels=3, stem="small"),
        options=tuple(
            Option(instance=instance, macs=costs.of(instance).macs, heldout_top1=accuracy, **figures)
            for instance, accuracy in ((STEM, 60.0), (FULL, 70.0))
        ),
        full_macs=costs.of(FULL).macs,
        heldout_images=100,
        cascades=tuple(cascade_option(text, member_macs, costs.of(FULL).macs) for text in CASCADES),
    )
    statistics = calibrate(model, [STEM, FULL], calibration(3, SIZE))
    return Source(model=model, statistics=statistics, description=description, weights=lambda: b"", card="# A card\n")


@pytest.fixture(scope="module")
def files(source):
    return OnnxFolderFormat().write(source)


@pytest.fixture
def folder(files, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.fixture(scope="module")
def runtime(source):
    return Runtime(Bundle(source.description, source.model.state_dict(), source.statistics), device="cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Images of several modes and shapes, and what Pillow would distort."""
    path, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(1)
    pixels = draw.integers(256, size=(20, 31, 4), dtype=np.uint8)
    Image.fromarray(pixels[..., :3]).save(path / "rgb.png")
    Image.fromarray(pixels).save(path / "rgba.png")
    Image.fromarray(pixels[..., 0]).save(path / "grey.png")
    Image.fromarray(pixels[:12, :12, :3]).save(path / "small.png")
    Image.fromarray(pixels[..., :3]).quantize(9).save(path / "palette.png", transparency=3)
    Image.fromarray(draw.integers(65536, size=(20, 31), dtype=np.uint16)).save(path / "sixteen.png")
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels[..., :3]).save(path / "turned.jpg", exif=exif)
    return sorted(path.iterdir())


def test_the_format_runs_each_instance_and_cascade_without_torch(source, files):
    x_NCHW = images(9, 3, SIZE, seed=3)
    found = OnnxFolderFormat().run(files, x_NCHW.numpy())
    with torch.no_grad():
        wanted = [alone(source.model, each, calibration(3, SIZE))(x_NCHW, each).numpy() for each in (STEM, FULL)]
    np.testing.assert_allclose(found, np.stack(wanted), atol=1e-5)
    answers = OnnxFolderFormat().run_cascades(files, x_NCHW.numpy())
    norms = CalibratedNorms(source.model, source.statistics)
    for text, answer in zip(CASCADES, answers, strict=True):
        with torch.no_grad():
            assert compare(CascadeRun(source.model, Cascade.parse(text), norms)(x_NCHW)[0].exp().numpy(), answer).holds


def test_weights_are_stored_once_and_graphs_are_shared(source, files):
    graphs = {name: onnx.load_from_string(content) for name, content in files.items() if name.endswith(".onnx")}
    assert sorted(graphs) == ["graph0.onnx", "graph1.onnx", "graph2.onnx", "graph3.onnx"]  # four for two instances and cascades
    external = [
        {entry.key: entry.value for entry in tensor.external_data}
        for graph in graphs.values()
        for tensor in graph.graph.initializer
        if tensor.external_data
    ]
    assert {each["location"] for each in external} == {"weights.bin"}
    convolutions = [p for name, p in source.model.named_parameters() if p.dim() == 4]
    for weight in convolutions:
        assert files["weights.bin"].count(weight.detach().numpy().tobytes()) == 1
    parameters = sum(4 * p.numel() for p in source.model.parameters())
    assert len(files["weights.bin"]) < 1.2 * parameters
    for graph in graphs.values():
        assert len(graph.SerializeToString()) < 40_000
        assert "BatchNormalization" in {node.op_type for node in graph.graph.node}


def test_the_same_export_has_the_same_bytes(source, files):
    again = OnnxFolderFormat().write(source)
    assert {name: hashlib.sha256(content).digest() for name, content in again.items()} == {
        name: hashlib.sha256(content).digest() for name, content in files.items()
    }


BLOCKED = """
import runpy, sys
sys.modules.update(dict.fromkeys(("torch", "torchvision", "sdpctl", "onnx")))
sys.argv[0:1] = []
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def program(folder, *words):
    """Run the program of a folder in a process that cannot import torch and sdpctl."""
    command = [sys.executable, "-I", "-c", BLOCKED, str(folder / "run.py"), *map(str, words)]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]})


def test_the_program_answers_as_the_runtime_does(folder, runtime, pictures, source):
    names = source.description.classes
    for words, chosen in ((["--max-macs", "99%"], STEM), ([], FULL), (["--instance", "full"], FULL)):
        done = program(folder, *pictures, *words, "--threads", 1)
        assert done.returncode == 0, done.stderr
        head, *lines = done.stdout.splitlines()
        assert head.startswith(f"instance {chosen}: ")
        for path, line in zip(pictures, lines, strict=True):
            share, k = runtime(runtime.preprocess(path), instance=chosen).softmax(1)[0].max(0)
            assert line.startswith(f"{path}: {names[k]} {float(share):.2%}, "), line


def test_images_are_prepared_as_the_runtime_prepares_them(folder, runtime, pictures):
    for path in pictures:
        found = run_folder.Network(folder).preprocess(path)
        np.testing.assert_allclose(found, runtime.preprocess(path).numpy(), atol=1e-5, err_msg=path.name)
        assert found.dtype == np.float32


def test_a_cascade_answers_as_the_runtime_does(folder, runtime, pictures, source):
    chosen = runtime.pick(cascade=True)
    done = program(folder, *pictures, "--cascade", "--threads", 1)
    head, *lines, tail = done.stdout.splitlines()
    assert head == f"cascade {chosen.cascade}"
    spent = []
    for path, line in zip(pictures, lines, strict=True):
        answer, left = runtime.run_cascade(runtime.preprocess(path), chosen.cascade)
        share, k = answer.exp()[0].max(0)
        member = chosen.cascade.members[int(left)]
        assert line.startswith(f"{path}: {source.description.classes[k]} {float(share):.2%}, ")
        assert line.endswith(f", by {member}")
        spent.append(sum(chosen.member_macs[: int(left) + 1]))
    assert tail.startswith(f"{np.mean(spent):,.0f} MACs an image on average")


def test_latency_is_measured_kept_and_used(folder, pictures):
    done = program(folder, "--max-latency-ms", 5, pictures[0])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "run.py: the latency was not measured; `python run.py --latency` measures on this device\n"
    done = program(folder, "--latency", "--threads", 1)
    assert done.returncode == 0, done.stderr
    table = json.loads((folder / "latency.json").read_text())
    assert [row["instance"] for row in table["rows"]] == [str(STEM), "full"]
    assert all(0 < row["median_ms"] <= row["p95_ms"] for row in table["rows"])
    assert table["machine"]["threads"] == 1
    assert program(folder, "--max-latency-ms", 1e9, pictures[0], "--threads", 1).stdout.startswith("instance full: ")
    network = run_folder.Network(folder, threads=1)
    quick, slow = ({"median_ms": ms, "batch": 1, "instance": str(each)} for ms, each in ((1.0, STEM), (3.0, FULL)))
    (folder / "latency.json").write_text(json.dumps(table | {"rows": [slow, quick]}))
    assert [network.pick(max_latency_ms=ms)["instance"] for ms in (1, 2.9, 3)] == ["stem@0.5", "stem@0.5", "full"]
    with pytest.raises(run_folder.UserError, match=r"no instance is within 0\.5 ms; .*the quickest, stem@0\.5, 1 ms$"):
        network.pick(max_latency_ms=0.5)
    with pytest.raises(run_folder.UserError, match=r"was measured on .*, and this is .*2 threads.*--latency` measures"):
        run_folder.Network(folder, threads=2).pick(max_latency_ms=9)
    for text in ("{", "[]", "{}", json.dumps(table | {"machine": 3})):
        (folder / "latency.json").write_text(text)
        with pytest.raises(run_folder.UserError, match=r"latency\.json: this table cannot be understood"):
            network.pick(max_latency_ms=9)


@pytest.mark.parametrize("text", ["50%", "12.5%", "1.2G", "350M", "7k", "123456", ".5M", "0", "-3", "x", "50 %", "1e9", "0%"])
def test_budgets_are_read_as_sdpctl_reads_them(folder, text):
    network = run_folder.Network(folder)
    try:
        wanted = Budget.parse(text).macs(network.table["full_macs"])
    except UsageError:
        with pytest.raises(run_folder.UserError, match="is not a budget"):
            network.macs(text)
        return
    assert network.macs(text) == wanted


def test_errors_are_one_line(folder, pictures):
    broken = folder / "broken.png"
    broken.write_bytes(b"no image")
    for words, code, line in (
        ([broken], 1, f"run.py: {broken}: this image cannot be read ("),
        ([pictures[0], "--max-macs", "1"], 1, "run.py: no instance is within 1 MACs; the cheapest, stem@0.5, takes "),
        ([pictures[0], "--instance", "nothing"], 1, "run.py: there is no instance nothing; there are stem@0.5, full"),
        (
            [pictures[0], "--instance", "full", "--max-macs", "1"],
            2,
            "run.py: error: --instance, --latency, and a choice within",
        ),
        ([], 2, "run.py: error: give images, or --latency without images"),
    ):
        done = program(folder, *words)
        assert done.returncode == code
        assert done.stderr.splitlines()[-1].startswith(line)
        assert "Traceback" not in done.stderr
