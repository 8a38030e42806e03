"""Stopping a training by every means, and going on to the same digest."""

import os
import signal
import subprocess
import sys
import time

import pytest

from sdpctl.errors import IntegrityError
from sdpctl.store import Store

LONGER = ["--set", "train.epochs=6", "--set", "train.checkpoint.minutes=0.002"]


def command(repository, store, *more):
    return [
        sys.executable,
        "-m",
        "sdpctl",
        "train",
        str(repository / "recipes" / "smoke.yaml"),
        "--store",
        str(store),
        *LONGER,
        *more,
    ]


def digest_of(repository, store, *more):
    done = subprocess.run([*command(repository, store, *more), "-q"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def partial(store):
    try:
        return next((a for a in Store(store).artifacts() if a.tag == "smoke.partial"), None)
    except IntegrityError:
        return None


def stopped(repository, store, signum, *more):
    """Start a training, wait until it has saved something in the middle, send it a signal."""
    process = subprocess.Popen(command(repository, store, *more), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while partial(store) is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signum)
    stderr = process.communicate(timeout=120)[1]
    return process.returncode, stderr


@pytest.fixture
def uninterrupted(repository, tmp_path):
    return digest_of(repository, tmp_path / "uninterrupted")


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_resumed_one_digest(repository, tmp_path, uninterrupted, workers):
    store = tmp_path / "store"
    code, _ = stopped(repository, store, signal.SIGKILL, "--set", f"data.workers={workers}", "--set", "data.augment=crop")
    assert code == -signal.SIGKILL
    assert list(Store(store).verify()) == []
    resumed = digest_of(repository, store, "--resume", "--set", "data.augment=crop")
    other = digest_of(repository, tmp_path / "other", "--set", "data.augment=crop", "--set", f"data.workers={2 - workers}")
    assert resumed == other != uninterrupted


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_commits(repository, tmp_path, uninterrupted, signum, code):
    store = tmp_path / "store"
    returned, stderr = stopped(repository, store, signum)
    assert returned == code
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("sdpctl: smoke: interrupted; ")
    saved = partial(store)
    assert saved is not None
    assert set(saved.layers) == {"model.safetensors", "history.jsonl", "recipe.yaml", "training-state.safetensors"}
    assert digest_of(repository, store, "--resume") == uninterrupted
    assert partial(store) is None


def test_a_second_signal_leaves_at_once():
    from sdpctl.pipeline.interruption import Interruption

    script = (
        "import os, signal\n"
        "from sdpctl.pipeline.interruption import Interruption\n"
        "with Interruption() as interruption:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    assert interruption.signum == signal.SIGINT\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('here')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGINT
    assert "here" not in done.stdout
    before = signal.getsignal(signal.SIGTERM)
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_nothing_to_resume_is_said(repository, tmp_path):
    done = subprocess.run(
        [*command(repository, tmp_path / "store", "--resume"), "--set", "train.epochs=0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "smoke: starting afresh, nothing is saved" in done.stderr


def test_progress_of_another_recipe_is_refused_with_the_keys_that_differ(repository, tmp_path):
    store = tmp_path / "store"
    stopped(repository, store, signal.SIGTERM)
    saved = partial(store)
    other = [*command(repository, store), "--set", "train.lr=0.05", "--set", "sdpoint.ratios=[0.75]"]
    for more in (["--resume"], ["--resume", "--dry-run"]):
        done = subprocess.run([*other, *more], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr == (
            "sdpctl: smoke: smoke.partial was saved by a recipe that differs in sdpoint.ratios, train.lr; resume it with its "
            "own recipe, --set name=NAME trains beside it, and --force starts afresh in its place\n"
        )
    run = [word if word != "train" else "run" for word in other]
    assert subprocess.run(run, capture_output=True, check=False).returncode == 2
    assert partial(store).digest == saved.digest
    done = subprocess.run([*other, "--resume", "--force"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert f"and {saved.digest[7:19]} stays without a tag" in done.stderr
    assert saved.digest in {a.digest for a in Store(store).artifacts()}
