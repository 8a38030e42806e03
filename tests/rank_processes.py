"""Several processes of one command, started as torchrun starts them, but each with its own exit code and streams."""

import os
import socket
import subprocess
import sys
from typing import NamedTuple

from forked import Forked


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def start(count, arguments, folder, *, fresh=False, **environment):
    """Start the ranks of `python ARGUMENTS` in a folder; return their processes by rank.

    Args:
        count: number of ranks.
        arguments: what follows `python`.
        folder: their working directory.
        fresh: start real processes, for a GPU and where it matters what happens while torch is loaded.
        environment: further environment variables.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"OMP_NUM_THREADS": 1} | environment
    processes = []
    for rank in range(count):
        env = os.environ | {key: str(value) for key, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        if fresh:
            command = [sys.executable, *map(str, arguments)]
            streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            processes.append(subprocess.Popen(command, cwd=folder, env=env, text=True, **streams))
        else:
            processes.append(Forked(arguments, folder, env))
    return processes


def ended(processes, timeout=120):
    """Wait for processes, and return how each ended; none outlives the test."""
    try:
        streams = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Ended(process.wait(), *each) for process, each in zip(processes, streams, strict=True)]
