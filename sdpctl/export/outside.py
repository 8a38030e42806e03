"""Run an export in a separate process, as a user would, without this process's network and settings."""

import io
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from sdpctl.errors import ResourceError, SdpctlError
from sdpctl.export.format import Images, Logits

ANSWER = """
import io, os, sys, numpy
pipe = os.fdopen(os.dup(1), "wb")  # logits go back through standard output: this needs no disk space
os.dup2(2, 1)
def answer(logits):
    content = io.BytesIO()
    numpy.save(content, numpy.asarray(logits))
    pipe.write(content.getvalue())
"""
"""Beginning of a program for `run_program`: it defines `answer`, which takes an array or a tensor."""


def run_program(program: str, files: Mapping[str, bytes], images: Images) -> Logits:
    """Run a Python program in a separate process and a temporary folder.

    Args:
        program: reads the files and `images.npy` in its working directory, and passes its logits to `answer`; see `ANSWER`.
        files: content of the files by name.
        images: the input of the export, (N, C, H, W).

    Returns:
        The logits, in the shape in which the program answered.

    Raises:
        ResourceError: if the folder cannot be written, no process can be started, or the process runs out of memory.
        SdpctlError: if the program fails.
    """
    try:
        with TemporaryDirectory(prefix="sdpctl-") as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            np.save(Path(folder) / "images.npy", images)
            return _run(program, folder)
    except OSError as error:
        raise ResourceError(
            f"the export cannot be run in a separate process ({error.strerror or error}); nothing was written; "
            "free some disk space, or set TMPDIR to a folder with enough space"
        ) from error


def _run(program: str, folder: str) -> Logits:
    home = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))}
    # `run` ends the child and waits for it, even if this call is interrupted.
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, check=False)
    if done.returncode:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        if done.returncode < 0 or "MemoryError" in last or "can't allocate memory" in last:
            ended = f"signal {-done.returncode}" if done.returncode < 0 else last
            raise ResourceError(f"the process that runs the export was ended ({ended}); nothing was written; free some memory")
        raise SdpctlError(f"the export does not run in a separate process ({last}); nothing was written, please report this")
    logits: Logits = np.load(io.BytesIO(done.stdout))
    return logits
