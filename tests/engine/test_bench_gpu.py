"""The benchmark of a GPU runs small, on a CPU."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "bench_gpu.py"


def test_it_runs_small():
    command = [sys.executable, SCRIPT, "--small", "--device", "cpu", "--runs", "1", "training", "tree"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("plain loop, bfloat16", "a mean SDPoint step", "one by one", "ours, bf16"):
        assert name in done.stdout
