"""The kernels of a GPU, in Triton's interpreter on a CPU, which is chosen when a process imports Triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="torch came without Triton")

PROGRAM = Path(__file__).with_name("in_interpreter.py")


@pytest.mark.parametrize("what", ["kernels", "networks", "kept", "finetuned"])
def test_joined_norms_equal_batch_norm_of_each_branch(what):
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, PROGRAM, what], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
