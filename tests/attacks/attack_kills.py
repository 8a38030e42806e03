"""Kill every command that writes, at any moment and by every signal, and look at what it left behind.

Most commands run in a forked child, each eighth as a process of its own. Whatever the moment, the store is whole, no tag and no
process is lost or left, and the same command then goes on to the digests that it has when nobody kills it.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded: it is to be forked

from harness import Outcome, attack, become, run

RECIPE = """
name: {name}
seed: {seed}
model: {{arch: resnet20, in_channels: 1}}
data: {{dataset: digits, image_size: 8, augment: crop, batch_size: 128, workers: {workers}}}
sdpoint: {{ratios: [0.5], points: [stem, layer3.0]}}
train: {{epochs: 2, lr: 0.1, schedule: cosine}}
calibrate: {{batches: 2}}
"""

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

LIMIT = 240.0
"""Seconds after which a command hangs: the machine may be busy."""

COMMANDS: dict[str, list[str]] = {
    "run": ["run", "mine.yaml"],
    "train": ["train", "mine.yaml"],
    "train with workers": ["train", "workers.yaml"],
    "train --resume": ["train", "half.yaml", "--resume"],
    "calibrate-bn": ["calibrate-bn", "base", "--batches", "3"],
    "eval-instances": ["eval-instances", "base", "--set", "evaluate.batch_size=100"],
    "search": ["search", "base", "--strategy", "random", "--evaluations", "4", "--set", "search.images=40"],
    "search --cascade": ["search", "base", "--cascade", "--max-macs", "90%"],
    "profile-flops": ["profile-flops", "mine.yaml"],
    "export onnx": ["export", "base", "-o", "out"],
    "export torch-export": ["export", "base", "--format", "torch-export", "-o", "out"],
    "export bundle": ["export", "base", "--format", "bundle", "-o", "out"],
    "import": [
        *("import", "weights.safetensors", "--arch", "resnet20", "--set", "name=imported"),
        *("--set", "data.dataset=digits", "--set", "data.image_size=8"),
    ],
    "store tag": ["store", "tag", "base", "copy"],
    "store gc": ["store", "gc", "--untagged"],
    "store verify": ["store", "verify"],
}

HEAVY = (
    *("alembic.command", "gymnasium", "networkx", "onnxruntime", "onnxscript", "optuna", "pydantic", "ptflops"),
    *("safetensors.torch", "sklearn.datasets", "sqlalchemy", "torch", "torch.export", "torch.onnx"),
    *("torchvision.transforms.v2", "sdpctl.data.digits", "sdpctl.data.loader", "sdpctl.engine.calibrate"),
    *("sdpctl.engine.cost", "sdpctl.engine.evaluate", "sdpctl.engine.train", "sdpctl.export.onnx"),
    *("sdpctl.export.torch_export", "sdpctl.models.resnet", "sdpctl.plan", "sdpctl.search.run", "sdpctl.search.strategies"),
    *("sdpctl.search.cascades", "sdpctl.stages.cascade", "sdpctl.stages.import_weights", "sdpctl.stages.run"),
)


@dataclass(frozen=True)
class Reference:
    """What a command leads to when nobody kills it: digests by tag, its output's files, and how long it takes."""

    tags: dict[str | None, str]
    files: dict[str, bytes]
    seconds: float


def tags_of(folder: Path) -> dict[str | None, str]:
    from sdpctl.store import Store

    return {artifact.tag: artifact.digest for artifact in Store(folder / ".sdpctl").artifacts() if artifact.tag}


def outputs(folder: Path) -> dict[str, bytes]:
    """Return what an export wrote, by path, and anything beside it that begins with a dot."""
    paths = [path for path in folder.rglob("*") if path.is_file() and ".sdpctl" not in path.relative_to(folder).parts]
    given = {"mine.yaml", "workers.yaml", "half.yaml", "weights.safetensors"}
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.name not in given}


def prepare(folder: Path) -> None:
    """Make the folder that every case begins with: a trained network, its tables, a training that stopped half way, weights."""
    from safetensors.torch import save_file

    from sdpctl import create_model

    for name, seed, workers in (("mine", 1, 0), ("workers", 1, 2), ("half", 2, 0), ("base", 0, 0)):
        (folder / f"{name}.yaml").write_text(RECIPE.format(name=name, seed=seed, workers=workers))
    save_file(create_model("resnet20", num_classes=10, in_channels=1).state_dict(), folder / "weights.safetensors")
    for arguments in (["run", "base.yaml"], ["calibrate-bn", "base", "--batches", "1"], ["calibrate-bn", "base"]):
        done = run(arguments, folder, limit=LIMIT)
        assert done.code == 0, done.err
    stopped, _ = killed(["train", "half.yaml"], folder, signal.SIGTERM, group=False, when=stop_at_the_first_step)
    assert stopped.code == 143, stopped.err
    assert "half.partial" in tags_of(folder)
    (folder / "base.yaml").unlink()


def stop_at_the_first_step() -> None:
    """Let a training in this process get its signal before its first step."""
    from sdpctl.stages.interruption import Interruption

    entered = Interruption.__enter__

    def at_once(self: Interruption) -> Interruption:
        entered(self)
        os.kill(os.getpid(), signal.SIGTERM)
        return self

    Interruption.__enter__ = at_once  # type: ignore[method-assign]


def killed(
    arguments: Sequence[str],
    folder: Path,
    signum: signal.Signals,
    *,
    group: bool,
    delay: float = LIMIT,
    real: bool = False,
    when: Callable[[], None] | None = None,
) -> tuple[Outcome, list[str]]:
    """Run a command in a session of its own, send it a signal after `delay` seconds, and say which processes stay."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.monotonic()
        if real:
            command = [sys.executable, "-m", "sdpctl", *arguments]
            child = subprocess.Popen(command, cwd=folder, stdout=out, stderr=err, start_new_session=True).pid
        elif not (child := os.fork()):
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # as sdpctl.__main__
            if when is not None:
                when()
            become(arguments, folder, out.fileno(), err.fileno())
        sent = False
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            seconds = time.monotonic() - began
            if seconds > LIMIT:
                os.killpg(child, signal.SIGKILL)
            elif seconds > delay and not sent:
                sent = True
                with suppress(ProcessLookupError):  # the child has not made its session yet
                    (os.killpg if group else os.kill)(child, signum)
            time.sleep(0.002)
        seconds = time.monotonic() - began
        staying = session(child)
        while staying and time.monotonic() - began < seconds + 10:
            time.sleep(0.01)
            staying = session(child)
        for pid in staying:
            os.kill(pid, signal.SIGKILL)
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
    code = os.waitstatus_to_exitcode(status)
    return Outcome(tuple(arguments), code, texts[0], texts[1], seconds), [f"process {pid} stays" for pid in staying]


def session(leader: int) -> list[int]:
    """Return the living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            state, _, _, its, *_ = stat.read_text().rpartition(")")[2].split()
            if int(its) == leader and state != "Z":
                found.append(int(stat.parent.name))
    return found


def whole(folder: Path, before: dict[str | None, str]) -> Iterator[str]:
    """Yield what is wrong with a store after a kill."""
    from sdpctl.store import Store

    yield from Store(folder / ".sdpctl").verify()
    now = tags_of(folder)
    yield from (f"the tag {tag} is lost" for tag in before if tag not in now and not str(tag).endswith(".partial"))


def seen(outcome: Outcome, allowed: set[int]) -> list[str]:
    """Return what must never happen; a command that a signal kills says nothing, and a busy machine takes its time."""
    found = replace(outcome, seconds=0).faults(allowed)
    return [fault for fault in found if outcome.code >= 0 or fault != "a failure without a word"]


def case(name: str, reference: Reference, base: Path, folder: Path, draw: random.Random, *, real: bool) -> list[str]:
    arguments = COMMANDS[name]
    shutil.copytree(base, folder, symlinks=True)
    temporary = folder.with_name(f"{folder.name}.tmp")
    temporary.mkdir()
    before = tags_of(folder)
    signum, group = draw.choice(SIGNALS), draw.random() < 0.5
    delay = draw.random() * (reference.seconds + (6 if real else 0.1))
    os.environ["TMPDIR"] = str(temporary)
    tempfile.tempdir = None
    try:
        outcome, faults = killed(arguments, folder, signum, group=group, delay=delay, real=real)
    finally:
        del os.environ["TMPDIR"]
        tempfile.tempdir = None
    faults += seen(outcome, {0, 128 + signum, -signum})
    if outcome.code == 128 + signum and "interrupted" not in outcome.err:
        faults.append("an interruption without a word")
    faults += whole(folder, before)
    ended_itself = outcome.code >= 0
    if ended_itself and (left := sorted(path.name for path in temporary.iterdir())):
        faults.append(f"{', '.join(left)} stays in TMPDIR")
    for path, content in outputs(folder).items():
        if path in reference.files:
            if content != reference.files[path]:
                faults.append(f"{path} is half written")
        elif ended_itself:
            faults.append(f"{path} stays")
    for path in folder.glob("out*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = run(
        [*arguments, *(["--resume"] if arguments[0] == "train" and "--resume" not in arguments else [])], folder, limit=LIMIT
    )
    faults += seen(again, {0})
    faults += whole(folder, before)
    if (now := tags_of(folder)) != reference.tags:
        faults.append(f"other digests than undisturbed: {sorted(map(str, set(now.items()) ^ set(reference.tags.items())))}")
    if {path: content for path, content in outputs(folder).items() if path in reference.files} != reference.files:
        faults.append("other files than undisturbed")
    shutil.rmtree(folder)
    shutil.rmtree(temporary)
    how = f"{name}, {signum.name} to the {'group' if group else 'process'} after {delay:.2f} s"
    if real:
        how += ", a real process"
    return [f"{how}: {fault}; exit code {outcome.code}, {outcome.err[-300:]!r}" for fault in faults]


def cases(seed: int, folder: Path) -> Iterator[list[str]]:
    draw = random.Random(seed)
    base = folder / "base"
    base.mkdir()
    prepare(base)
    references: dict[str, Reference] = {}
    number = 0
    while True:
        name = list(COMMANDS)[number % len(COMMANDS)]
        if name not in references:
            undisturbed = folder / "undisturbed"
            shutil.copytree(base, undisturbed, symlinks=True)
            done = run(COMMANDS[name], undisturbed, limit=LIMIT)
            assert done.code == 0, (name, done.err)
            references[name] = Reference(tags_of(undisturbed), outputs(undisturbed), done.seconds)
            shutil.rmtree(undisturbed)
        yield case(name, references[name], base, folder / f"case{number}", draw, real=number % 8 == 7)
        number += 1


if __name__ == "__main__":
    attack(cases, preload=HEAVY)
