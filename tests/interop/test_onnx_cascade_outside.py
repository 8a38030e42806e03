"""An exported cascade runs in a fresh environment that has onnxruntime and numpy alone, and answers as the network does."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from cascade_options import EASY
from command import called, document

import sdpctl
from sdpctl.stages.context import Context
from sdpctl.stages.network import open_network
from sdpctl.stages.opening import open_data

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy, run
images = numpy.load("images.npy")
answers = [run.classify(images[start : start + 50]) for start in range(0, len(images), 50)]
numpy.savez("answers.npz", *map(numpy.concatenate, zip(*answers)))
loaded = {name for name in ("torch", "onnx", "sdpctl") if name in sys.modules}
assert not loaded, loaded
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of a new environment in which only onnxruntime and numpy, and what they need, are installed."""
    folder = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=120)
    python = folder / "bin" / "python"
    wanted = [f"{name}=={version(name)}" for name in ("onnxruntime", "numpy")]
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check", *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    if done.returncode and "SDPCTL_REQUIRE_INTEROP" not in os.environ:
        pytest.skip(f"needs a package index: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return python


def test_the_program_of_an_export_needs_onnxruntime_and_numpy_alone(fresh: Path, tmp_path: Path) -> None:
    (tmp_path / "easy.yaml").write_text(EASY)
    for words in (["run", "easy.yaml"], ["search", "easy", "--cascade", "--max-macs", "80%"]):
        assert called(tmp_path, *words, "-q").returncode == 0
    exported = document(tmp_path, "export", "easy", "--format", "onnx-cascade")
    (row,) = exported["cascades"]

    context = Context(path=tmp_path / ".sdpctl", report=None)
    data = open_data(open_network("easy", context).recipe, torch.device("cpu"), context)
    x_NCHW = torch.cat([x_NCHW for x_NCHW, _ in data.test(64)]).contiguous()
    log_p_NK, left_N = sdpctl.load("easy", store=tmp_path / ".sdpctl", device="cpu").run_cascade(x_NCHW, row["cascade"])
    np.save(tmp_path / "images.npy", x_NCHW.numpy())

    command = [fresh, "-I", "-c", PROGRAM, exported["file"]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "answers.npz") as answers:
        probabilities, left = answers["arr_0"], answers["arr_1"]
    assert len(probabilities) == data.test_size
    np.testing.assert_allclose(probabilities, log_p_NK.exp().numpy(), atol=1e-5)
    assert left.tolist() == left_N.tolist()
    assert len(set(left)) == len(row["member_macs"]), "every image leaves at one member"

    line = subprocess.run(
        [fresh, "-I", tmp_path / exported["file"] / "run.py", "images.npy"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout.splitlines()[-1]
    assert line == f"{row['macs']:,} MACs an image on average, {row['relative']:.1%} of `full`"
