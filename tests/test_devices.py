"""On which device a test runs: the CPU, unless it is marked gpu. A machine with a CUDA device is imitated."""

import os
import subprocess
import sys

IMITATION = """
import torch
torch.cuda.is_available = lambda: {there}
torch.cuda.device_count = lambda: int({there})
torch.cuda.get_device_name = lambda: "Imitation 9000"
"""
TESTS = """
import os, subprocess, sys
import pytest, torch
from sdpctl.engine.device import pick_device

def seen():
    code = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    return torch.cuda.is_available(), torch.cuda.device_count(), child, pick_device("auto").type

@pytest.fixture(scope="module")
def made_for_both():
    return seen()

@pytest.mark.gpu
def test_on_the_gpu(made_for_both):
    assert made_for_both == (False, 0, "", "cpu")
    assert seen() == (True, 1, "0", "cuda")

def test_on_the_cpu(made_for_both):
    assert made_for_both == seen() == (False, 0, "", "cpu")
"""


def run_tests(folder, repository, *arguments, there):
    """Run both tests with this suite's settings, on a machine that has a CUDA device or has none."""
    (folder / "imitation.py").write_text(IMITATION.format(there=there))
    (folder / "test_seen.py").write_text(TESTS)
    options = ["-c", repository / "pyproject.toml", "--rootdir", folder, "-n0", "-p", "no:cacheprovider", "-p", "imitation"]
    command = [sys.executable, "-m", "pytest", *options, "-p", "conftest", *arguments, folder / "test_seen.py"]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (folder, repository / "tests", repository))),
        "CUDA_VISIBLE_DEVICES": "0",
    }
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_only_marked_tests_see_a_cuda_device(tmp_path, repository):
    told = run_tests(tmp_path, repository, there=True)
    assert "CUDA device: Imitation 9000" in told
    assert "2 passed" in told


def test_marked_tests_are_skipped_without_a_cuda_device(tmp_path, repository):
    told = run_tests(tmp_path, repository, "-m", "gpu", there=False)
    assert "CUDA device: none" in told
    assert "1 skipped, 1 deselected" in told
    assert "this machine has no CUDA device" in told
