"""Processes like those of `python ARGUMENTS`, forked from a server that has loaded torch once; a real one takes six seconds."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "optuna",
        "ptflops",
        "pydantic",
        "safetensors.torch",
        "scipy.optimize",
        "sklearn.datasets",
        "sqlalchemy",
        "sdpctl.cli",
        "sdpctl.data.digits",
        "sdpctl.data.loader",
        "sdpctl.engine.calibrate",
        "sdpctl.engine.evaluate",
        "sdpctl.engine.train",
        "sdpctl.models.resnet",
        "sdpctl.plan",
        "sdpctl.search.cascades",
        "sdpctl.search.run",
        "sdpctl.stages.run",
        "sdpctl.stages.shared",
    ]
)
AT_IMPORT = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""What torch reads when it is loaded, as sdpctl and these tests set it for real processes."""


class Forked:
    """A forked `python ARGUMENTS`, with the methods of `subprocess.Popen`; its streams are files.

    Args:
        arguments: what would follow `python`: `-m MODULE ...`, `-c PROGRAM ...` or a script with its arguments.
        folder: its working directory.
        environment: all of its environment variables.
    """

    def __init__(self, arguments: Sequence[object], folder: Path, environment: Mapping[str, str]) -> None:
        self._streams = TemporaryDirectory(prefix="streams-")
        words = tuple(map(str, arguments))
        self._process = SERVER.Process(target=_become, args=(words, str(folder), dict(environment), self._streams.name))
        with pytest.MonkeyPatch.context() as patch:
            for name, value in AT_IMPORT.items():  # of the server, which the first of these processes starts
                patch.setenv(name, value)
            self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired("python", timeout)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the process, and return its streams, once."""
        self.wait(timeout)
        with self._streams as folder:
            paths = [Path(folder) / name for name in ("1", "2")]
            out, err = (path.read_text() if path.exists() else "" for path in paths)  # it may have been killed at once
        return out, err


def _become(words: tuple[str, ...], folder: str, environment: dict[str, str], streams: str) -> None:
    """Become `python WORDS` in a forked process."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number in (1, 2):
        os.dup2(os.open(f"{streams}/{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    first, *others = words
    sys.argv = [first, *others]
    if first == "-m":
        sys.argv = others
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *others[1:]]
        exec(compile(others[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")
