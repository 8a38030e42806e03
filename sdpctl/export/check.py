"""Running an export where it will be used, and comparing it with the network it was made from."""

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import inf, isfinite
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from sdpctl.errors import IntegrityError, ResourceError, SdpctlError
from sdpctl.export.description import FILES
from sdpctl.export.network import INPUT

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

DIFFERENCE = 1e-4
"""How far a logit may be off, in units of the largest logit, or of 1 where all are smaller."""

AGREEMENT = 99.0
"""Per cent of the images that must keep their class; two logits may be as near as rounding."""

CHUNK = 32

Array = NDArray[np.float32]
Images = NDArray[np.generic]

_ANSWER = """
import io, os, sys, numpy, torch
pipe = os.fdopen(os.dup(1), "wb")  # which takes no room on a disk
os.dup2(2, 1)
def answer(logits):
    content = io.BytesIO()
    numpy.save(content, logits.numpy())
    pipe.write(content.getvalue())
"""

_RUN_PROGRAM = f"""{_ANSWER}
run = torch.export.load(sys.argv[1]).module()
images = torch.from_numpy(numpy.load(sys.argv[2]))
with torch.inference_mode():
    logits = torch.cat([run(chunk) for chunk in images.split({CHUNK})])
if "sdpctl" in sys.modules:
    sys.exit("sdpctl was needed")
answer(logits)
"""

_RUN_BUNDLE = f"""{_ANSWER}
import sdpctl
model = sdpctl.load(sys.argv[1], device="cpu")
images = torch.from_numpy(numpy.load(sys.argv[2]))
logits = [[model(chunk, instance=option.instance) for chunk in images.split({CHUNK})] for option in model.instances]
answer(torch.stack([torch.cat(chunks) for chunks in logits]))
"""


@dataclass(frozen=True)
class Agreement:
    """How near an export is to its source.

    Args:
        images: how many were compared.
        difference: of the logits, the largest.
        scale: the largest logit.
        top1: per cent of the images whose class is the same.
    """

    images: int
    difference: float
    scale: float
    top1: float

    @property
    def holds(self) -> bool:
        """Whether both are within their bounds."""
        return isfinite(self.difference) and self.difference <= DIFFERENCE * max(1, self.scale) and self.top1 >= AGREEMENT

    def require(self, what: str) -> "Agreement":
        """Return itself.

        Raises:
            IntegrityError: where a bound is passed.
        """
        if not self.holds:
            raise IntegrityError(
                f"{what}: run outside, its logits differ by up to {self.difference:.2g} (at most {DIFFERENCE:g} of "
                f"{self.scale:.3g} is allowed) and {self.top1:.2f} % of the classes agree; nothing was written, report this"
            )
        return self


def compare(wanted: Array, got: Array) -> Agreement:
    """Compare logits, (..., N, K)."""
    same = wanted.argmax(-1) == got.argmax(-1)
    finite = np.isfinite(wanted).all() and np.isfinite(got).all()
    difference, scale = float(np.abs(wanted - got).max()), float(np.abs(wanted).max())
    return Agreement(wanted.shape[-2], difference if finite else inf, scale, 100 * float(same.mean()))


def run(form: str, files: Mapping[str, bytes], images: Images) -> Array:
    """Run an export outside: ONNX in onnxruntime, the others in a process of their own.

    Args:
        form: `onnx`, `torch-export` or `bundle`.
        files: by name.
        images: as the export takes them, (N, C, H, W).

    Returns:
        Logits, (1, N, K), or (I, N, K) of a bundle.

    Raises:
        ResourceError: where the machine lacks the room to run it.
        SdpctlError: where it does not run at all.
    """
    if form == "onnx":
        try:
            session = onnx_session(files[FILES[form]])
            chunks = (images[start : start + CHUNK] for start in range(0, len(images), CHUNK))
            return np.concatenate([session.run(None, {INPUT: chunk})[0] for chunk in chunks])[None]
        except Exception as error:
            raise SdpctlError(f"onnxruntime does not run the export ({' '.join(str(error).split())}); report this") from error
    with _folder() as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        np.save(folder / "images.npy", images)
        if form == "torch-export":
            return _run(_RUN_PROGRAM, folder / FILES[form], folder / "images.npy")[None]
        return _run(_RUN_BUNDLE, folder, folder / "images.npy")


def onnx_session(content: bytes) -> "InferenceSession":
    """Open a model in onnxruntime, on the CPU."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else its import leaves a file in TMPDIR, and it reports its use
    import onnxruntime

    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


def latency(form: str, content: bytes, image: Images, runs: int = 15) -> float:
    """Return how long one image takes, in milliseconds: the median of some calls, after two that do not count.

    Args:
        form: `onnx` or `torch-export`.
        content: of the file.
        image: as the export takes it, (1, C, H, W).
        runs: how many calls.
    """
    if form == "onnx":
        session = onnx_session(content)
        call: Callable[[], object] = partial(session.run, None, {INPUT: image})
    else:
        call = partial(torch.export.load(io.BytesIO(content)).module(), torch.from_numpy(image))
    times = []
    with torch.inference_mode():
        for _ in range(runs + 2):
            began = perf_counter()
            call()
            times.append(1000 * (perf_counter() - began))
    return median(times[2:])


@contextmanager
def _folder() -> Iterator[Path]:
    """Give a temporary folder.

    Raises:
        ResourceError: where it cannot be written, or no process be started.
    """
    try:
        with TemporaryDirectory(prefix="sdpctl-") as folder:
            yield Path(folder)
    except OSError as error:
        raise ResourceError(
            f"the export cannot be run in a process of its own ({error.strerror or error}); nothing was written; "
            "free some room, or let TMPDIR name a folder that has it"
        ) from error


def _run(program: str, *arguments: Path) -> Array:
    home = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    # However this call is left, `run` ends the child and waits for it.
    done = subprocess.run(command, cwd=arguments[-1].parent, env=environment, capture_output=True, check=False)
    if done.returncode:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        if done.returncode < 0 or "MemoryError" in last or "can't allocate memory" in last:
            ended = f"signal {-done.returncode}" if done.returncode < 0 else last
            raise ResourceError(f"the process that runs the export was ended ({ended}); nothing was written; free some memory")
        raise SdpctlError(f"the export does not run in a process of its own ({last}); nothing was written, please report this")
    logits: Array = np.load(io.BytesIO(done.stdout))
    return logits
