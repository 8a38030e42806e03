"""The first look at photographs, by processes against threads and against one process; and a look at names and sizes alone.

python tests/benchmarks/bench_look.py DIR
"""

import argparse
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

from paired import paired

from sdpctl.data import files
from sdpctl.data.files import FileHashes, locate, look_at

NEVER = 10**9


def look(paths: list[Path], processes_from: int) -> list[object]:
    """Hash and decode files; more than `processes_from` files are given to processes."""
    with mock.patch.object(files, "MANY", processes_from):
        return list(files.on_all_cores(files.look, paths))


def share_of_cores(paths: list[Path], cores: int) -> float:
    """Return the share of the cores' time that a look by processes takes."""
    began, before = time.perf_counter(), sum(os.times()[:4])
    look(paths, 1)
    return (sum(os.times()[:4]) - before) / (time.perf_counter() - began) / cores


def main() -> None:
    """Print each comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path, help="an image folder with train and val")
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    located, cores = locate("imagefolder", arguments.photos), len(os.sched_getaffinity(0))
    paths = list(located.files.values())
    print(f"{len(paths):,} files, {cores} cores; by processes, of the cores' time: {100 * share_of_cores(paths, cores):.0f} %")
    alone = [files.look(path) for path in paths]
    assert look(paths, 1) == look(paths, NEVER) == alone
    by_processes = partial(look, paths, 1)
    print("against threads:", paired(by_processes, partial(look, paths, NEVER), runs=arguments.runs))
    print("against one process:", paired(by_processes, lambda: list(map(files.look, paths)), runs=arguments.runs))
    with tempfile.TemporaryDirectory() as folder:
        cached = FileHashes(Path(folder) / "files.sqlite")
        sizes, content = (partial(look_at, "imagefolder", located, cached, identify=kind) for kind in ("stat", "content"))
        print("data.identify=stat against a second look at content:", paired(sizes, content, runs=arguments.runs))


if __name__ == "__main__":
    main()
