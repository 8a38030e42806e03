"""What a machine has that sdpctl uses, and what is missing. torch is imported inside functions only."""

import fcntl
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Literal

GIB = 2**30

LITTLE_MEMORY, LITTLE_DISK, LITTLE_SHARED = 2 * GIB, 2 * GIB, 64 * 2**20
"""Bytes of memory, of free space for the store, and of /dev/shm below which there is a warning."""

PURPOSES = {
    "dev": "tests, linters and everything that the tests use",
    "mlflow": "train.track: mlflow",
    "openvino": "a second runtime for ONNX exports",
    "report": "pages and pictures of results",
    "sharing": "store push and store pull",
    "tensorboard": "train.track: tensorboard",
}
"""What an extra of the package is for. An extra that is missing here is listed without a purpose."""

TOOLS = {"skopeo": "copies a store to a registry and back; tests use it as an independent reader"}
"""Programs that some users need, and what each is for."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at.

    Args:
        name: what was looked at.
        state: `ok`, `missing` (optional, and not there), `warning`, or `broken` (sdpctl does not work without it).
        found: what was found.
        advice: what to do, or what it is for; empty if there is nothing to say.
    """

    name: str
    state: Literal["ok", "missing", "warning", "broken"]
    found: str
    advice: str = ""


def checks(store: Path) -> Iterator[Check]:
    """Look at this machine.

    Args:
        store: path of the artifact store, which need not exist.
    """
    yield Check(name="Python", state="ok", found=f"{sys.version.split()[0]}, {sys.executable}")
    yield from _packages()
    of_torch = list(_torch())
    yield from of_torch
    yield _cores()
    if all(check.state != "broken" for check in of_torch):  # the code that knows the memory needs torch
        yield _memory()
    yield _compiler()
    yield from _store(store)
    yield _shared_memory()
    yield _cache()
    yield from _extras()
    for tool, purpose in TOOLS.items():
        path = shutil.which(tool)
        advice = purpose if path else f"{purpose}; your system's packages have it"
        yield Check(name=tool, state="ok" if path else "missing", found=path or "not found", advice=advice)


def _requirements() -> dict[str, list[str]]:
    """Return the packages that sdpctl requires, by extra; those that it always requires under an empty name."""
    found: dict[str, list[str]] = {"": []}
    about = metadata("sdpctl")
    for extra in about.get_all("Provides-Extra") or ():
        found[extra] = []
    for line in about.get_all("Requires-Dist") or ():
        match = re.match(r"[A-Za-z0-9._-]+", line)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", line)
        if match is not None:
            found.setdefault(extra[1] if extra else "", []).append(match[0])
    return found


def _lacking(packages: list[str]) -> list[str]:
    lacking = []
    for package in packages:
        try:
            version(package)
        except PackageNotFoundError:
            lacking.append(package)
    return lacking


def _packages() -> Iterator[Check]:
    try:
        required = _requirements()[""]
    except PackageNotFoundError:
        yield Check(
            name="packages", state="warning", found="sdpctl is not installed", advice="run `pip install -e .` in the clone"
        )
        return
    if lacking := _lacking(required):
        advice = "run `pip install -e .` again"
        yield Check(name="packages", state="broken", found=f"not installed: {', '.join(lacking)}", advice=advice)
    else:
        yield Check(name="packages", state="ok", found=f"sdpctl {version('sdpctl')} and the {len(required)} that it requires")


def _torch() -> Iterator[Check]:
    try:
        import torch
        import torchvision
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        yield Check(name="torch", state="broken", found=reason, advice="install torch and torchvision of the same release")
        return
    yield Check(name="torch", state="ok", found=f"torch {torch.__version__}, torchvision {torchvision.__version__}")
    if hasattr(torch.ops.image, "decode_jpeg"):
        yield Check(name="JPEG decoder", state="ok", found="torchvision's")
    else:
        advice = "set data.decoder=pil, or install a torchvision that has it"
        yield Check(name="JPEG decoder", state="warning", found="torchvision has none", advice=advice)
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if names:
        yield Check(name="CUDA", state="ok", found=", ".join(names))
    else:
        reason = (
            f"torch was built for CUDA {torch.version.cuda}, and no device is found" if torch.version.cuda else "torch for CPUs"
        )
        advice = "everything runs on the CPU; for a GPU install its driver and a torch for CUDA"
        yield Check(name="CUDA", state="missing", found=reason, advice=advice)
    fast = _flags() & {"avx512_bf16", "amx_bf16", "bf16", "sve_bf16"}
    if fast:
        yield Check(name="bf16 on the CPU", state="ok", found=", ".join(sorted(fast)), advice="train.precision=bf16 is faster")
    else:
        advice = "leave train.precision=fp32 on the CPU: bf16 works, but is not faster"
        yield Check(name="bf16 on the CPU", state="missing", found="the processor has no instructions for it", advice=advice)


def _flags() -> set[str]:
    """Return the features of the processor as Linux names them."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.partition(":")[2].split()}


def _cores() -> Check:
    usable, threads = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS")
    found = f"{usable} of {os.cpu_count()} may be used"
    if threads is None:
        return Check(name="cores", state="ok", found=f"{found}; OMP_NUM_THREADS is not set")
    if threads.isdecimal() and 0 < int(threads) < usable:
        advice = f"a computation uses {threads} of {usable} cores; `unset OMP_NUM_THREADS` for all"
        return Check(name="cores", state="warning", found=f"{found}; OMP_NUM_THREADS={threads}", advice=advice)
    return Check(name="cores", state="ok", found=f"{found}; OMP_NUM_THREADS={threads}")


def _memory() -> Check:
    from sdpctl.data.cache import available_memory

    available = available_memory()
    found = f"{available / GIB:.1f} GiB are available"
    if available >= LITTLE_MEMORY:
        return Check(name="memory", state="ok", found=found)
    return Check(
        name="memory", state="warning", found=found, advice="lower data.batch_size, and set memory, for example 512MiB"
    )


def _compiler() -> Check:
    path = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    if path:
        return Check(name="C++ compiler", state="ok", found=path)
    advice = "train.compile needs one on a CPU: install g++, or keep train.compile=false"
    return Check(name="C++ compiler", state="missing", found="not found", advice=advice)


def _store(store: Path) -> Iterator[Check]:
    there = store.is_dir()
    folder = next(place for place in (store, *store.absolute().parents) if place.is_dir())
    name, elsewhere = "store", "choose a folder with --store, or fix the permissions"
    if os.path.lexists(store) and not there:
        yield Check(name=name, state="broken", found=f"{store} is not a folder", advice="choose a folder with --store")
        return
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        advice = f"sdpctl must write there and lock files (flock); {elsewhere}"
        yield Check(name=name, state="broken", found=f"{folder}: {error.strerror}", advice=advice)
        return
    whole = (store / "index.json").is_file() and (store / "oci-layout").is_file()
    found = (
        f"{store} is a store" if whole else f"{store} does not exist yet" if not there else f"{store} holds no artifacts yet"
    )
    yield Check(name=name, state="ok", found=f"{found}; files can be written and locked")
    free = shutil.disk_usage(folder).free
    little = free < LITTLE_DISK
    advice = "`sdpctl store gc` removes what no tag needs; or choose a different disk with --store" if little else ""
    yield Check(name="disk", state="warning" if little else "ok", found=f"{free / GIB:.1f} GiB are free for it", advice=advice)


def _shared_memory() -> Check:
    place = Path("/dev/shm")
    if not place.is_dir():
        advice = "sdpctl's loaders do not need it; other programs may"
        return Check(name="/dev/shm", state="missing", found="there is no such folder", advice=advice)
    size = shutil.disk_usage(place).total
    advice = "sdpctl's loaders do not use it; other programs need `docker run --shm-size`" if size <= LITTLE_SHARED else ""
    return Check(name="/dev/shm", state="warning" if advice else "ok", found=f"{size / GIB:.2f} GiB", advice=advice)


def _cache() -> Check:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdpctl"
    place = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    if os.access(place, os.W_OK | os.X_OK):
        return Check(name="cache folder", state="ok", found=str(folder))
    advice = "networks of timm are traced anew by each command; set XDG_CACHE_HOME to a folder that can be written"
    return Check(name="cache folder", state="warning", found=f"{folder} cannot be written", advice=advice)


def _extras() -> Iterator[Check]:
    try:
        required = _requirements()
    except PackageNotFoundError:
        return
    for extra, packages in sorted(required.items()):
        if not extra:
            continue
        lacking, purpose = _lacking(packages), PURPOSES.get(extra, "")
        name = f"extra {extra}"
        if not lacking:
            yield Check(name=name, state="ok", found="installed", advice=purpose)
        else:
            advice = f"`pip install 'sdpctl[{extra}]'`" + (f" for {purpose}" if purpose else "")
            yield Check(name=name, state="missing", found=f"not installed: {', '.join(lacking)}", advice=advice)
