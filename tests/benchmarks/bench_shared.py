"""Training on a machine of one's own and beside two busy processes, against the same with torch's own threads.

python tests/benchmarks/bench_shared.py --runs 5

Each training is a process of the command line; what is timed are the images/s that it logs of its epochs but the first. Theirs
is the same command where torch keeps the threads and the waiting that it comes with.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "recipes"
SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")

OURS = "from sdpctl.cli import main; main()"
THEIRS = """
import sdpctl.cli
import sdpctl.engine.threads
sdpctl.cli.wait_briefly = lambda: None
sdpctl.engine.threads.choose_threads = lambda *_: None
sdpctl.cli.main()
"""


def images_per_second(script, epochs):
    """Train the digits, and return the median rate of the epochs after the first."""
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    with tempfile.TemporaryDirectory() as folder:
        sets = [f"train.epochs={epochs}", "train.validate.every=0", "train.checkpoint.epochs=1000"]
        arguments = [RECIPES / "digits.yaml", "-q", "--store", folder, *(part for s in sets for part in ("--set", s))]
        command = [sys.executable, "-c", script, "train", *map(str, arguments)]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        log = (Path(folder) / "logs" / "digits.jsonl").read_text().splitlines()
    return statistics.median(json.loads(line)["images_per_second"] for line in log[1:])


@contextmanager
def busy(count):
    """Let so many processes do nothing but compute."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def compared(runs, epochs, their_epochs):
    """Return what both reach, in turn, and the ratio of each pair."""
    pairs = [(images_per_second(OURS, epochs), images_per_second(THEIRS, their_epochs)) for _ in range(runs)]
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    return (
        f"ours {ours:,.0f} images/s, torch's threads {theirs:,.0f}, {statistics.median(ratios):.2f} times as fast "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f}, {runs} pairs)"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    print(f"digits.yaml, {os.cpu_count()} cores")
    print("alone:", compared(options.runs, epochs=8, their_epochs=8), flush=True)
    with busy(2):  # an epoch is 1,280 images, which take torch's threads half a minute there
        print("beside two busy processes:", compared(options.runs, epochs=4, their_epochs=2), flush=True)


if __name__ == "__main__":
    main()
