"""Several processes in one store, and processes that die in it."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sdpctl.errors import IntegrityError, NotFoundError, StoreLockedError
from sdpctl.store import Artifact, Descriptor, Store

WRITERS, COMMITS = 4, 10

# A draft shares a layer with what is kept, so that the collector is after blobs that are about to be needed again.
WRITER = f"""
import sys
from pathlib import Path
from sdpctl.store import Store
path, name = Path(sys.argv[1]), sys.argv[2]
for number in range({COMMITS}):
    store = Store.create(path)
    own = f"{{name}} {{number}}".encode()
    store.commit("draft", {{"costs.json": own}})
    store.commit("profile", {{"costs.json": own, "shared.json": b"shared"}}, tag=f"{{name}}.{{number}}")
"""

COLLECTOR = """
import sys, time
from pathlib import Path
from sdpctl.store import Store
path, stop = Path(sys.argv[1]), Path(sys.argv[2])
for _ in range(5000):
    Store(path).gc(untagged=True, grace=0)
    if stop.exists():
        break
    time.sleep(0.005)
else:
    raise SystemExit("was never stopped")
"""

HOLDER = """
import fcntl, sys
with open(sys.argv[1], "a") as file:
    fcntl.flock(file, fcntl.LOCK_SH if sys.argv[2] == "shared" else fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""

LOOPER = """
import itertools, sys
from pathlib import Path
from sdpctl.store import Store
store = Store(Path(sys.argv[1]))
for number in itertools.count():
    content = f"{sys.argv[2]} {number}".encode()
    artifact = store.commit("checkpoint", {"model.safetensors": content * 9999, "notes.md": content}, tag=sys.argv[2])
    print(artifact.digest, flush=True)
"""

# Dies at the nth point where a writer waits for the disk.
DYING = """
import os, signal, sys
from pathlib import Path
from sdpctl.store import Store
path, action, left = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
store = Store.create(path) if action == "commit" else None
def die_at_last(descriptor):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = die_at_last
store.commit("profile", {"costs.json": b"content"}, tag="digits") if store else Store.create(path)
"""


def start(script: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, text=True, **options)  # type: ignore[call-overload, no-any-return]


def reachable(store: Store) -> set[str]:
    """Return the file names of all blobs the index leads to, by reading JSON only."""
    blobs = store.path / "blobs" / "sha256"
    found: set[str] = set()
    waiting = [entry["digest"] for entry in json.loads((store.path / "index.json").read_bytes())["manifests"]]
    while waiting:
        name = waiting.pop().removeprefix("sha256:")
        manifest = json.loads((blobs / name).read_bytes())
        found |= {name} | {part["digest"].removeprefix("sha256:") for part in (manifest["config"], *manifest["layers"])}
        waiting += [manifest["subject"]["digest"]] if "subject" in manifest else []
    return found


def check_whole_and_clean(store: Store) -> None:
    """Check that a store is whole, and that nothing is left over once it was collected."""
    assert list(store.verify()) == []
    store.gc(grace=0)
    assert list((store.path / "tmp").iterdir()) == []
    assert {path.name for path in (store.path / "blobs" / "sha256").iterdir()} == reachable(store)
    assert list(store.verify()) == []


def test_no_commit_is_lost_beside_other_writers_and_a_collector(tmp_path: Path) -> None:
    store, stop = Store.create(tmp_path / "store"), tmp_path / "stop"
    collector = start(COLLECTOR, store.path, stop)
    writers = [start(WRITER, store.path, f"writer{number}") for number in range(WRITERS)]
    ended = [writer.wait(timeout=120) for writer in writers]
    stop.touch()
    assert collector.wait(timeout=120) == 0
    assert ended == [0] * WRITERS
    tags = {artifact.tag for artifact in store.artifacts()} - {None}
    assert tags == {f"writer{number}.{commit}" for number in range(WRITERS) for commit in range(COMMITS)}
    for tag in tags:
        assert store.read(store.resolve(str(tag)), "costs.json").decode() == str(tag).replace(".", " ")
    check_whole_and_clean(store)


def test_writers_may_all_make_the_store(tmp_path: Path) -> None:
    writers = [start(DYING, tmp_path / "store", "create", -1) for _ in range(WRITERS)]
    assert [writer.wait(timeout=60) for writer in writers] == [0] * WRITERS
    assert Store(tmp_path / "store").artifacts() == []


# Locks


@contextmanager
def holding(path: Path, how: str) -> Iterator[None]:
    """Let another process hold a lock."""
    with start(HOLDER, path, how, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield
        holder.communicate()


@pytest.mark.parametrize("lock", ["gc.lock", "index.lock"])
def test_a_held_lock_stops_a_commit_and_no_reader(tmp_path: Path, lock: str) -> None:
    store = Store.create(tmp_path / "store", lock_timeout=0.05)
    kept = store.commit("profile", {"costs.json": b"1"}, tag="kept")
    with holding(store.path / lock, "alone"):
        with pytest.raises(StoreLockedError, match=r"has held this lock for 0\.05 s; try again") as caught:
            store.commit("profile", {"costs.json": b"2"}, tag="refused")
        assert caught.value.exit_code == 6
        assert store.resolve("kept") == kept
        assert list(store.verify()) == []
    store.commit("profile", {"costs.json": b"2"}, tag="refused")
    assert [artifact.tag for artifact in store.artifacts()] == ["kept", "refused"]


def test_a_writer_stops_the_collector_and_no_other_writer(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store", lock_timeout=0.05)
    kept = store.commit("profile", {"costs.json": b"1"}, tag="kept")
    with holding(store.path / "gc.lock", "shared"):
        with pytest.raises(StoreLockedError):
            store.gc(grace=0)
        with pytest.raises(StoreLockedError):
            store.discard(kept)
        store.commit("profile", {"costs.json": b"2"}, tag="more")
    assert store.resolve("kept") == kept


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store", lock_timeout=10)
    with start(HOLDER, store.path / "gc.lock", "alone", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        holder.kill()
    store.commit("profile", {"costs.json": b"1"}, tag="digits")
    assert (store.path / "gc.lock").exists()


# Crashes


def test_a_killed_writer_leaves_a_whole_store(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store")
    for number in range(5):
        with start(LOOPER, store.path, f"run{number}", stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            reported = [writer.stdout.readline().strip() for _ in range(3)]
            time.sleep(0.004 * number)  # die at another moment each time
            writer.kill()
        assert writer.returncode == -signal.SIGKILL
        known = {artifact.digest for artifact in store.artifacts()}
        assert set(reported) <= known
        check_whole_and_clean(store)


# A commit of one layer waits for the disk eight times: file and folder, for layer, config, manifest and index.
@pytest.mark.parametrize("point", range(1, 9))
def test_a_writer_may_die_anywhere_in_a_commit(tmp_path: Path, point: int) -> None:
    writer = start(DYING, tmp_path / "store", "commit", point)
    assert writer.wait(timeout=60) == -signal.SIGKILL
    store = Store.create(tmp_path / "store")
    assert [artifact.tag for artifact in store.artifacts()] == (["digits"] if point == 8 else [])
    assert any((store.path / "tmp").iterdir()) == (point % 2 == 1)
    check_whole_and_clean(store)
    store.commit("profile", {"costs.json": b"content"}, tag="digits")
    assert store.read(store.resolve("digits"), "costs.json") == b"content"


@pytest.mark.parametrize("point", range(1, 5))
def test_a_writer_may_die_while_it_makes_the_store(tmp_path: Path, point: int) -> None:
    writer = start(DYING, tmp_path / "store", "create", point)
    assert writer.wait(timeout=60) == -signal.SIGKILL
    store = Store.create(tmp_path / "store")
    store.commit("profile", {"costs.json": b"content"}, tag="digits")
    check_whole_and_clean(store)


# Readers


class Raced(Store):
    """Lets something happen once, between the index and the first blob that is read."""

    meanwhile: Callable[[], object] | None = None

    def _read(self, descriptor: Descriptor) -> bytes:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return super()._read(descriptor)

    def _problem(self, blob: Descriptor) -> str | None:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return super()._problem(blob)


def save(store: Store, content: bytes) -> Artifact:
    return store.commit("checkpoint", {"model.safetensors": content}, key="k", tag="digits.partial")


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Raced, Artifact]:
    """Return a reader, and what a training saved; when the reader looks away, a newer one takes its place."""
    path = tmp_path / "store"
    before = save(Store.create(path), b"epoch 1")
    raced = Raced(path, lock_timeout=0.05)

    def save_again() -> None:
        save(Store(path), b"epoch 2")
        Store(path).discard(before)

    raced.meanwhile = save_again
    return raced, before


READERS = {
    "artifacts": lambda store: store.artifacts()[0],
    "resolve": lambda store: store.resolve("digits.partial"),
    "tagged": lambda store: store.tagged("digits.partial"),
    "find": lambda store: store.find("k"),
}


@pytest.mark.parametrize("name", READERS)
def test_a_reader_beside_a_training_finds_the_newer_one(saved: tuple[Raced, Artifact], name: str) -> None:
    raced, before = saved
    found = READERS[name](raced)
    assert raced.meanwhile is None
    assert found is not None
    assert found.digest != before.digest
    assert raced.read(found, "model.safetensors") == b"epoch 2"


def test_verify_beside_a_training_raises_no_alarm(saved: tuple[Raced, Artifact]) -> None:
    raced, _ = saved
    assert list(raced.verify()) == []
    assert raced.meanwhile is None


def test_what_a_training_removed_meanwhile_is_not_damage(saved: tuple[Raced, Artifact]) -> None:
    raced, before = saved
    for read in (lambda: raced.read(before, "model.safetensors"), lambda: raced.at(before.descriptor)):
        with pytest.raises(NotFoundError, match=r"was removed in the meantime.*run the command again") as caught:
            read()
        assert caught.value.exit_code == 4


def test_what_was_removed_meanwhile_is_not_pointed_at(saved: tuple[Raced, Artifact]) -> None:
    raced, before = saved
    assert raced.meanwhile is not None
    raced.meanwhile()
    with pytest.raises(NotFoundError, match="was removed in the meantime"):
        raced.commit("bn-statistics", {"nodes.json": b"[]"}, subject=before, tag="digits.bn")
    with pytest.raises(NotFoundError, match="was removed in the meantime"):
        raced.tag(before, "kept")
    check_whole_and_clean(Store(raced.path))


def test_a_reader_that_misses_a_blob_waits_for_the_collector(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store", lock_timeout=0.05)
    artifact = store.commit("profile", {"costs.json": b"1"}, tag="digits")
    (store.path / "blobs" / "sha256" / artifact.digest.removeprefix("sha256:")).unlink()
    with holding(store.path / "gc.lock", "alone"):
        for read in (store.artifacts, lambda: list(store.verify())):
            with pytest.raises(StoreLockedError):
                read()
    with holding(store.path / "gc.lock", "shared"), pytest.raises(IntegrityError, match="this blob is missing"):
        store.artifacts()


SAVER = """
import itertools, sys
from pathlib import Path
from sdpctl.store import Store
store, before = Store(Path(sys.argv[1])), None
for number in itertools.count():
    saved = store.commit("checkpoint", {"model.safetensors": f"{sys.argv[2]} {number}".encode()}, tag=sys.argv[2])
    if before is not None:
        store.discard(before)
    before = saved
    print(number, flush=True)
"""


def test_readers_beside_trainings_see_a_whole_store(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store")
    store.commit("profile", {"costs.json": b"1"}, tag="kept")
    names = ["one.partial", "two.partial"]
    trainings = [start(SAVER, store.path, name, stdout=subprocess.PIPE) for name in names]
    try:
        for training in trainings:
            assert training.stdout is not None
            training.stdout.readline()
        for _ in range(25):
            assert list(store.verify()) == []
            assert {*names, "kept"} <= {artifact.tag for artifact in store.artifacts()}
            assert store.resolve(names[0]).tag == names[0]
            assert store.gc(dry_run=True).blobs == ()
    finally:
        for training in trainings:
            training.kill()
            training.communicate()
