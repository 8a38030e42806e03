"""Stopping a training by every means, and going on to the same digest."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from command import called
from forked import Forked
from safetensors.torch import load
from stage_calls import train

from sdpctl.data.loader import ImageData
from sdpctl.errors import IntegrityError, RunInterruptedError
from sdpctl.kinds import HISTORY, MODEL, TRAINING_STATE
from sdpctl.recipe.load import load_recipe
from sdpctl.signals import STOPPING
from sdpctl.stages.context import Context
from sdpctl.stages.interruption import Interruption
from sdpctl.stages.layers import read_records
from sdpctl.store import Store

LONGER = ["--set", "train.epochs=6"]
OFTEN = ["--set", "train.checkpoint.minutes=0.002"]
CROP = ["--set", "data.augment=crop"]
WORKERS = ["--set", "data.workers=2", *CROP]
FINE_TUNING = [
    word
    for setting in (
        "train.epochs=3",
        "train.ema=0.9",
        "train.mixup=0.2",
        "train.cutmix=1",
        "train.lr_body=0.05",
        "data.augment=crop-flip",
        "data.auto_augment=trivial",
        "data.random_erasing=0.5",
        "data.balance=sampler",
    )
    for word in ("--set", setting)
]


def arguments(repository, store, *more):
    return ["train", str(repository / "recipes" / "smoke.yaml"), "--store", str(store), *LONGER, *more]


def command(repository, store, *more):
    return [sys.executable, "-m", "sdpctl", *arguments(repository, store, *more)]


def forked(repository, store, *more):
    """Start a training in a process that needs not load torch."""
    return Forked(command(repository, store, *more)[1:], store.parent, os.environ | {"OMP_NUM_THREADS": "1"})


def digest_of(repository, store, *more):
    """Train within this process, and return the digest."""
    done = called(store.parent, *arguments(repository, store, *more), "-q", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def digest_with_workers(repository, store, *more):
    """Train in a process with two processes that load data, and return the digest."""
    process = forked(repository, store, *WORKERS, *more, "-q")
    digest, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return digest.strip()


def partial(store):
    try:
        return next((a for a in Store(store).artifacts() if a.tag == "smoke.partial"), None)
    except IntegrityError:
        return None


def stopped(repository, store, signum, *more):
    """Start a training, wait until it has saved something in the middle, send it a signal."""
    process = forked(repository, store, *OFTEN, *more)
    deadline = time.monotonic() + 120
    while partial(store) is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signum)
    stderr = process.communicate(timeout=120)[1]
    return process.returncode, stderr


@pytest.fixture(scope="module")
def uninterrupted(repository, make_once):
    """The digest of a training that nothing disturbs and that saves nothing on the way within an epoch."""

    def train_to_the_end(folder):
        (folder / "digest").write_text(digest_of(repository, folder / "store"))

    return (make_once("uninterrupted", train_to_the_end) / "digest").read_text()


@pytest.fixture(scope="module")
def uninterrupted_crop(repository, make_once):
    """The same with random crops, which two processes draw."""

    def train_to_the_end(folder):
        (folder / "digest").write_text(digest_with_workers(repository, folder / "store"))

    return (make_once("uninterrupted-crop", train_to_the_end) / "digest").read_text()


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_resumed_one_digest(repository, tmp_path, uninterrupted, uninterrupted_crop, workers):
    store = tmp_path / "store"
    code, _ = stopped(repository, store, signal.SIGKILL, "--set", f"data.workers={workers}", *CROP)
    assert code == -signal.SIGKILL
    assert list(Store(store).verify()) == []
    assert digest_of(repository, store, "--resume", *CROP) == uninterrupted_crop != uninterrupted


def test_with_everything_of_fine_tuning_killed_and_resumed_one_digest(repository, tmp_path, uninterrupted):
    whole = digest_of(repository, tmp_path / "whole", *FINE_TUNING, "--set", "data.workers=0")
    store = tmp_path / "store"
    code, _ = stopped(repository, store, signal.SIGKILL, *FINE_TUNING, "--set", "data.workers=2")
    assert code == -signal.SIGKILL
    resumed = forked(repository, store, *FINE_TUNING, "--set", "data.workers=1", "--resume", "-q")
    digest, said = resumed.communicate(timeout=120)
    assert digest.strip() == whole != uninterrupted, said


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
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


def run_python(script, **options):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, **options)


def test_a_second_signal_leaves_at_once():
    script = (
        "import os, signal\n"
        "from sdpctl.stages.interruption import Interruption\n"
        "with Interruption() as interruption:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    assert interruption.signum == signal.SIGINT\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('here')\n"
    )
    done = run_python(script)
    assert done.returncode == -signal.SIGINT
    assert "here" not in done.stdout


def test_a_terminal_that_closes_sends_two_and_only_the_first_counts():
    script = (
        "import os, signal\n"
        "from sdpctl.stages.interruption import Interruption\n"
        "try:\n"
        "    with Interruption() as interruption:\n"
        "        os.kill(os.getpid(), signal.SIGHUP)\n"
        "        os.kill(os.getpid(), signal.SIGHUP)\n"
        "        raise SystemExit(interruption.signum)\n"
        "finally:\n"
        "    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL\n"
    )
    assert run_python(script).returncode == signal.SIGHUP


def test_a_signal_that_nobody_looked_at_is_sent_again():
    caught = []
    before = signal.signal(signal.SIGTERM, lambda signum, _: caught.append(signum))
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGTERM)
            assert interruption.signum == signal.SIGTERM
            assert caught == []
        assert caught == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_is_ignored_from_the_start_stays_ignored(signum):
    script = (
        f"import os, signal, sys\nsignum = signal.{signum.name}\n"
        "from sdpctl.stages.interruption import Interruption\n"
        "from sdpctl.cli import main\n"
        "with Interruption() as interruption:\n"
        "    os.kill(os.getpid(), signum)\n"
        "    assert interruption.signum is None\n"
        "sys.argv = ['sdpctl', '--version']\n"
        "from sdpctl import cli\n"
        "cli.app = lambda **_: (os.kill(os.getpid(), signum), print('to the end'))\n"
        "main()\n"
    )
    done = run_python(script, preexec_fn=lambda: signal.signal(signum, signal.SIG_IGN))
    assert (done.returncode, done.stdout, done.stderr) == (0, "to the end\n", "")


def test_nothing_to_resume_is_said(repository, tmp_path):
    done = called(tmp_path, *arguments(repository, tmp_path / "store", "--resume"), "--set", "train.epochs=0")
    assert done.returncode == 0
    assert "smoke: starting afresh, nothing is saved" in done.stderr


def interrupt(recipe, context):
    """Train in this process until the validation of the first epoch, send a signal there, and return the error."""
    holdout, looked_at = ImageData.holdout, []

    def signalled(self, batch_size):
        for batch in holdout(self, batch_size):
            looked_at.append(batch)
            if len(looked_at) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageData, "holdout", signalled)
        with pytest.raises(RunInterruptedError, match="is saved") as caught:
            train(recipe, context)
    return caught.value


def test_progress_of_another_recipe_is_refused_with_the_keys_that_differ(repository, tmp_path, make_listener):
    store, smoke = tmp_path / "store", repository / "recipes" / "smoke.yaml"
    interrupt(load_recipe(smoke), Context(path=store, report=make_listener()))
    saved = partial(store)
    other = [smoke, "--store", store, "--set", "train.lr=0.05", "--set", "sdpoint.ratios=[0.75]"]
    for words in (["train", *other, "--resume"], ["train", *other, "--resume", "--dry-run"], ["run", *other]):
        done = called(tmp_path, *words)
        assert done.returncode == 2
        assert done.stderr == (
            "sdpctl: smoke: smoke.partial was saved by a recipe that differs in sdpoint.ratios, train.lr; resume it with its "
            "own recipe, train under a different name with --set name=NAME, or start afresh in its place with --force\n"
        )
    assert partial(store).digest == saved.digest
    done = called(tmp_path, "train", *other, "--resume", "--force")
    assert done.returncode == 0
    assert f"and {saved.digest[7:19]} stays without a tag" in done.stderr
    assert saved.digest in {a.digest for a in Store(store).artifacts()}


# With processes that load data, and signals to all of them, as SLURM, systemd and a terminal send


@contextmanager
def training(repository, store, *more):
    """Start a training with workers as a process group of its own; give it once it has trained an epoch, with its workers."""
    process = subprocess.Popen(
        command(repository, store, *WORKERS, *more), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        for line in process.stderr:
            if line.startswith("epoch 1/"):
                break
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        yield process, [int(pid) for pid in children.split()]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def await_end(pids):
    deadline = time.monotonic() + 60
    while not all(map(gone, pids)):
        assert time.monotonic() < deadline, "a process stays"
        time.sleep(0.01)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_whole_group_commits_too(repository, tmp_path, signum, code):
    with training(repository, tmp_path / "store") as (process, workers):
        assert len(workers) >= 2
        os.killpg(process.pid, signum)
        stderr = process.stderr.read()
        assert process.wait(timeout=120) == code
    assert stderr.splitlines()[-1].startswith("sdpctl: smoke: interrupted; "), stderr
    assert "Traceback" not in stderr
    assert partial(tmp_path / "store") is not None
    await_end(workers)


def test_workers_end_with_a_parent_that_is_killed(repository, tmp_path):
    with training(repository, tmp_path / "store") as (process, workers):
        process.kill()
        process.wait()
    await_end(workers)


def test_a_worker_that_dies_costs_nothing_that_was_learnt(repository, tmp_path, uninterrupted_crop):
    store = tmp_path / "store"
    with training(repository, store) as (process, workers):
        os.kill(workers[0], signal.SIGKILL)
        stderr = process.stderr.read()
        assert process.wait(timeout=120) == 7
    last = stderr.splitlines()[-1]
    assert "sdpctl: smoke: a process that loads data died" in last  # after a zero byte that torch prints
    assert "lower data.workers (0 loads without such processes)" in last
    assert last.endswith("is saved; `run` or `train --resume` continues from it")
    assert "Traceback" not in stderr
    await_end(workers)
    assert digest_with_workers(repository, store, "--resume") == uninterrupted_crop


def unshared(shm, arguments, **options):
    """Run a command where /dev/shm has so much room."""
    script = f'mount -t tmpfs -o size={shm} tmpfs /dev/shm && exec "$@"'
    return subprocess.run(["unshare", "-m", "sh", "-c", script, "sh", *arguments], **options, check=False)


@pytest.mark.skipif(unshared("64k", ["true"], capture_output=True).returncode != 0, reason="needs to mount a file system")
@pytest.mark.parametrize(("shm", "code"), [("16k", 7), ("64k", 0)])
def test_a_small_shared_memory_is_enough_or_is_said(repository, tmp_path, shm, code):
    """A batch takes 128 KiB here; what is shared is semaphores alone, a page of memory each."""
    settings = ["train.epochs=1", "data.image_size=32", "train.validate.every=0"]
    more = [word for setting in settings for word in ("--set", setting)]
    training = command(repository, tmp_path / "store", *WORKERS, *more)
    done = unshared(shm, training, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if code:
        assert "(/dev/shm is full)" in done.stderr
        assert "lower data.workers (0 loads without such processes)" in done.stderr
        assert "smoke.partial" in {a.tag for a in Store(tmp_path / "store").artifacts()}


@pytest.mark.parametrize("overrides", [[], ["train.ema=0.8", "train.mixup=0.2"]])
def test_a_signal_in_the_validation_is_heeded_there_and_the_digest_stays(tmp_path, repository, make_listener, overrides):
    recipe = load_recipe(repository / "recipes" / "smoke.yaml", ["train.epochs=3", *overrides])
    whole = train(recipe, Context(path=tmp_path / "whole", report=make_listener()))
    context = Context(path=tmp_path / "store", report=make_listener())
    assert interrupt(recipe, context).exit_code == 143
    if recipe.train.ema is not None:
        averaged, state = (load(context.store.read(partial(context.path), title)) for title in (MODEL, TRAINING_STATE))
        raw = {name.removeprefix("weights."): t for name, t in state.items() if name.startswith("weights.")}
        assert raw.keys() == averaged.keys()
        assert not raw["conv1.weight"].equal(averaged["conv1.weight"])
    assert train(recipe, context, resume=True).digest == whole.digest
    history = read_records(context.store, context.store.resolve("smoke"), HISTORY)
    assert [record["epoch"] for record in history] == [1, 2, 3]


# At the very end, when no step is left to stop at


GOES_ON = "sdpctl: interrupted; all results finished before are in the store, and the same command continues from there\n"


@pytest.fixture(scope="module")
def two_epochs(repository, make_once):
    """The digest of the smoke recipe's training."""

    def train_to_the_end(folder):
        done = called(folder, "train", repository / "recipes" / "smoke.yaml", "-q", OMP_NUM_THREADS="1")
        (folder / "digest").write_text(done.stdout.strip())

    return (make_once("two-epochs", train_to_the_end) / "digest").read_text()


@pytest.mark.parametrize(
    ("name", "when", "signum"),
    [
        *(("train", "made", signum) for signum in STOPPING),
        ("train", "committed", signal.SIGTERM),
        ("run", "made", signal.SIGTERM),
    ],
)
def test_a_signal_at_the_very_end_comes_after_the_commit(repository, tmp_path, monkeypatch, two_epochs, name, when, signum):
    smoke, commit = repository / "recipes" / "smoke.yaml", Store.commit

    def signalled(self, kind, layers, **options):
        ends = options["tag"] == "smoke"
        if ends and when == "made":
            assert partial(self.path) is not None
            os.kill(os.getpid(), signum)
        artifact = commit(self, kind, layers, **options)
        if ends and when == "committed":
            os.kill(os.getpid(), signum)
        return artifact

    with monkeypatch.context() as patch:
        patch.setattr(Store, "commit", signalled)
        done = called(tmp_path, name, smoke)
    assert done.returncode == 128 + signum
    assert "Traceback" not in done.stderr
    assert done.stderr.endswith(GOES_ON)
    assert f"smoke: trained, {two_epochs[7:19]}\n" in done.stderr
    store = Store(tmp_path / ".sdpctl")
    assert [(artifact.tag, artifact.digest) for artifact in store.artifacts()] == [("smoke", two_epochs)]
    assert list(store.verify()) == []
    again = called(tmp_path, "train", smoke)
    assert again.returncode == 0
    assert f"smoke: in the store already, {two_epochs[7:19]}\n" in again.stderr


# Wherever the command is


@pytest.mark.parametrize("signum", STOPPING)
@pytest.mark.parametrize("where", ["", "weakref", "import"])
def test_a_signal_ends_the_command_wherever_it_is(signum, where):
    """Python drops what is raised in the callback of a weak reference; C code makes another error of it."""
    script = f"""
import os, signal, sys, weakref
from sdpctl import cli
class Thing: pass
def kill(*_): os.kill(os.getpid(), signal.{signum.name})
def app(**_):
    where = {where!r}
    if not where: kill()
    if where == "weakref":
        thing = Thing()
        kept = weakref.ref(thing, kill)
        del thing
    if where == "import":
        try: kill()
        except BaseException: raise ImportError("numpy failed to import") from None
    signal.pause()
cli.app = app
cli.main()
"""
    done = run_python(script, timeout=60)
    assert done.returncode == 128 + signum, done.stderr
    assert done.stderr == GOES_ON
