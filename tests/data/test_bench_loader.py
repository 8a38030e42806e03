"""The benchmark of the loader runs."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "bench_loader.py"


def test_it_runs_small():
    done = subprocess.run([sys.executable, SCRIPT, "--small"], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    ways = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert ways == [f"photographs to 32 px, {way}" for way in ("decoder torchvision", "decoder pil", "cache ram", "cache disk")]
