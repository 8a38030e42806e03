"""Kill pushes and pulls through a real registry at any moment, by SIGKILL, and look at what they left behind.

Whatever the moment, both stores are whole, a tag points at all of its artifact or at what it pointed at before, and the same
command then ends as if nobody had killed the first one.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from harness import attack, become, run
from registry_process import running

BYTES = 8 * 2**20


def prepare(folder: Path) -> None:
    """Make a store with a checkpoint, and three artifacts that were made from it."""
    from sdpctl.store import Store

    draw = random.Random(0)
    store = Store.create(folder / ".sdpctl")
    layers: dict[str, bytes | Path] = {f"part{part}.safetensors": draw.randbytes(BYTES // 4) for part in range(4)}
    subject = store.commit("checkpoint", layers, key="c", tag="net")
    statistics = store.commit("bn-statistics", {"s.safetensors": draw.randbytes(2**18)}, subject=subject, tag="net.bn")
    store.commit("evaluation", {"results.json": b"[1]"}, subject=statistics, tag="net.eval")
    store.commit("search", {"result.json": b"[2]"}, subject=subject, tag="net.search")
    store.commit("checkpoint", {"old.safetensors": b"old"}, tag="old")


def tags_of(path: Path) -> dict[str | None, str]:
    from sdpctl.store import Store

    return {artifact.tag: artifact.digest for artifact in Store(path).artifacts() if artifact.tag}


def killed(arguments: Sequence[str], folder: Path, delay: float) -> bool:
    """Run a command, kill it after some seconds, and return whether it was still running."""
    child = os.fork()
    if not child:
        null = os.open(os.devnull, os.O_WRONLY)
        become(list(arguments), folder, null, null)
    time.sleep(delay)
    done, _ = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return not done


def case(host: str, base: Path, folder: Path, draw: random.Random, number: int, took: dict[str, float]) -> list[str]:
    from sdpctl.store import Store

    shutil.copytree(base, folder)
    address = f"oci://{host}/case{number}/net:v1"
    faults: list[str] = []
    again = ["--force", "-r"]
    put = run(["store", "push", "old", address], folder, limit=60)
    assert put.code == 0, put.err
    commands = {
        "push": ["store", "push", "net", address, *again],
        "pull": ["store", "pull", address, "net", "--store", "b", *again],
    }
    for name, command in commands.items():
        if name == "pull":
            Store.create(folder / "b").commit("checkpoint", {"old.safetensors": b"old"}, tag="net")
        delay = draw.random() * took.get(name, 0.6)
        hit = killed(command, folder, delay)
        where = f"{name}, killed after {delay:.3f} s"
        if name == "push":
            seen = run(["store", "pull", address, "x", "--store", "seen"], folder, limit=60)
            now = tags_of(folder / "seen").get("x") if seen.code == 0 else seen.err
            allowed = {tags_of(base / ".sdpctl")[tag] for tag in ("net", "old")}
            faults += [] if now in allowed else [f"{where}: the tag in the registry points at {now!r}"]
        else:
            faults += [f"{where}: {problem}" for problem in Store(folder / "b").verify()]
            now = tags_of(folder / "b")
            whole = set(now) == {"net", "net.bn", "net.eval", "net.search"}
            untouched = set(now) == {"net"} and now["net"] == tags_of(base / ".sdpctl")["old"]
            faults += [] if whole or untouched else [f"{where}: only some tags were moved: {now}"]
        began = time.monotonic()
        done = run(command, folder, limit=60)
        if not hit or name not in took:
            took[name] = max(took.get(name, 0), time.monotonic() - began)
        faults += [f"{where}: {fault}" for fault in done.faults({0})]
    ours, theirs = tags_of(folder / ".sdpctl"), tags_of(folder / "b")
    ours.pop("old")
    faults += [] if ours == theirs else [f"other digests than were pushed: {theirs}"]
    faults += [f"{path}: {problem}" for path in (".sdpctl", "b") for problem in Store(folder / path).verify()]
    gone = run(["store", "gc", "--grace", "0", "--store", "b"], folder, limit=60)
    left = [path.name for path in (folder / "b" / "tmp").iterdir()]
    faults += [f"{left} stays after gc"] if left or gone.code else []
    shutil.rmtree(folder)
    return faults


def cases(seed: int, folder: Path) -> Iterator[list[str]]:
    draw = random.Random(seed)
    base = folder / "base"
    base.mkdir()
    prepare(base)
    (folder / "registry").mkdir()
    took: dict[str, float] = {}
    with running(folder / "registry") as registry:
        number = 0
        while True:
            yield case(registry.host, base, folder / f"case{number}", draw, number, took)
            number += 1


if __name__ == "__main__":
    attack(cases, preload=("oras.provider", "sdpctl.cli", "sdpctl.store.registry", "sdpctl.store.sharing"))
