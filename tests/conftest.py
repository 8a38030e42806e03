"""What all tests share: few threads, few digits lost, an environment that no shell can change, and the device they run on."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch.utils._triton import has_triton

for _signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(_signum) is signal.SIG_IGN:  # tests that run behind `nohup` or a shell's `&` send signals too
        signal.signal(_signum, signal.default_int_handler if _signum == signal.SIGINT else signal.SIG_DFL)

torch.set_num_threads(1)  # the networks are tiny, and one digest is promised for one number of threads

REPOSITORY = Path(__file__).parent.parent

Sdpctl = Callable[..., subprocess.CompletedProcess[str]]

ENVIRONMENT_THAT_CHANGES_OUTPUT = ("SDPCTL_STORE", "SDPCTL_DEBUG", "NO_COLOR", "FORCE_COLOR", "GITHUB_ACTIONS", "CI", "COLUMNS")


CUDA = torch.cuda.is_available()
"""Whether this machine has a CUDA device, asked before it is hidden; torch then knows the device whatever is hidden later."""

VISIBLE = "CUDA_VISIBLE_DEVICES"


def pytest_report_header(config: pytest.Config) -> str:
    """Say which devices the tests run on."""
    name = torch.cuda.get_device_name() if CUDA else "none; tests marked gpu are skipped"
    return f"devices: CPU, {torch.get_num_threads()} thread per process, torch {torch.__version__}; CUDA device: {name}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need a CUDA device where there is none."""
    if not CUDA:
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="this machine has no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _hidden_gpu() -> Iterator[Mapping[str, Any]]:
    """Hide the CUDA devices from this process and the processes that it starts, and yield what `_device` restores.

    The scope is the session, so that fixtures of a session or a module run on the CPU too, whichever test asks for them first.
    """
    shown = {"is_available": torch.cuda.is_available, "device_count": torch.cuda.device_count, VISIBLE: os.environ.get(VISIBLE)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VISIBLE, "")
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        yield shown


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _hidden_gpu: Mapping[str, Any]) -> None:
    """Show the CUDA devices to a test that is marked gpu."""
    if request.node.get_closest_marker("gpu") is None:
        return
    for name in ("is_available", "device_count"):
        monkeypatch.setattr(torch.cuda, name, _hidden_gpu[name])
    has_triton.cache_clear()  # a test that compiled on the CPU left the answer for a hidden device
    if _hidden_gpu[VISIBLE] is None:
        monkeypatch.delenv(VISIBLE)
    else:
        monkeypatch.setenv(VISIBLE, _hidden_gpu[VISIBLE])


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Return the folder in which all worker processes of a test run keep what they find out about traced networks."""
    folders = tmp_path_factory.getbasetemp()
    return (folders if worker_id == "master" else folders.parent) / "cache"


@pytest.fixture(autouse=True)
def _pinned(monkeypatch: pytest.MonkeyPatch, cache_folder: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_folder))
    for name in ENVIRONMENT_THAT_CHANGES_OUTPUT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def double() -> Iterator[None]:
    """Let float64 be torch's default while the test runs."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def torch_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Torch's folder of downloaded weights, empty, and nothing can be fetched."""

    def refuse(*_: object, **__: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    monkeypatch.setattr("torch.hub._hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def timm_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Mapping[str, torch.Tensor]], None]:
    """Return a function that puts weights into huggingface_hub's cache, which is empty; nothing can be fetched."""
    import timm
    from safetensors.torch import save_file

    folder = tmp_path / "huggingface"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def put(name: str, state: Mapping[str, torch.Tensor]) -> None:
        kept = folder / "hub" / f"models--{timm.get_pretrained_cfg(name).hf_hub_id.replace('/', '--')}"
        (kept / "refs").mkdir(parents=True)
        (kept / "refs" / "main").write_text("0" * 40)
        (kept / "snapshots" / ("0" * 40)).mkdir(parents=True)
        save_file({key: t.contiguous() for key, t in state.items()}, kept / "snapshots" / ("0" * 40) / "model.safetensors")

    return put


@pytest.fixture
def sdpctl(tmp_path: Path) -> Sdpctl:
    """Run the command line as a user does, in an empty folder."""

    def run(*arguments: object, env: Mapping[str, str] | None = None, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sdpctl", *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False)

    return run


MakeOnce = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> MakeOnce:
    """Fill a folder once for all worker processes of a test run; a test that writes to the folder writes to a copy."""
    folders = tmp_path_factory.getbasetemp()
    shared = folders if worker_id == "master" else folders.parent

    def make(name: str, fill: Callable[[Path], None]) -> Path:
        folder, staging = shared / name, shared / f"{name}.new"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                shutil.rmtree(staging, ignore_errors=True)  # of a process that failed
                staging.mkdir()
                fill(staging)
                staging.rename(folder)
        return folder

    return make


@pytest.fixture
def quick_sqlite() -> Iterator[None]:
    """Let SQLite not wait for the disk, which takes most of a small search's time: no test has a power cut."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def hurry(connection: Any, _: object) -> None:
        if type(connection).__module__ == "sqlite3":
            connection.execute("pragma synchronous = off")

    event.listen(Engine, "connect", hurry)
    yield
    event.remove(Engine, "connect", hurry)


@pytest.fixture
def believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run no export outside, and believe that it does what the network does."""
    from sdpctl.export import check
    from sdpctl.export.catalog import FORMATS
    from sdpctl.export.format import format_of

    for name in FORMATS:
        monkeypatch.setattr(type(format_of(name)), "run", lambda *_: None)
    monkeypatch.setattr(check, "compare", lambda *_: check.Agreement(1, 0.0, 1.0, 100.0))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout that is tested."""
    return REPOSITORY
