"""What `store gc` removes beside the blobs: never what a tag, a running search or a young training still needs."""

import os
import time

import pytest
from command import called, document

from sdpctl.search.study import IDENTITY, LEASE, OWNER, opened_storage
from sdpctl.stages.leftovers import remove_leftovers
from sdpctl.stages.liveness import LivingProcess
from sdpctl.store import Store

pytestmark = pytest.mark.usefixtures("quick_sqlite")


@pytest.fixture
def store(tmp_path):
    store = Store.create(tmp_path / ".sdpctl")
    checkpoint = store.commit("checkpoint", {"model.safetensors": b"weights"}, key="c" * 64, tag="digits")
    store.commit("bn-statistics", {"nodes.json": b"[]"}, subject=checkpoint, key="b" * 64, tag="digits.bn")
    store.commit("search", {"result.json": b"{}"}, subject=checkpoint, key="5" * 64, tag="digits.search")
    store.commit("checkpoint", {"model.safetensors": b"half"}, key="d" * 64, tag="half.partial")
    return store


def write_logs(store, *names, age=7200.0):
    (store.path / "logs").mkdir(exist_ok=True)
    for name in names:
        path = store.path / "logs" / f"{name}.jsonl"
        path.write_text("{}\n")
        os.utime(path, (time.time() - age, time.time() - age))


def logs(store):
    return sorted(path.stem for path in (store.path / "logs").iterdir())


def test_logs_go_with_their_tags(store):
    write_logs(store, "digits", "digits.bn", "digits.eval", "half", "lost", "digit")
    write_logs(store, "begun", age=0)
    (store.path / "logs" / "notes.txt").write_text("mine")
    expected = ("digit", "digits.eval", "lost")
    assert remove_leftovers(store, dry_run=True, grace=3600).logs == expected
    assert len(logs(store)) == 8, "a dry run removes nothing"
    removed = remove_leftovers(store, dry_run=False, grace=3600)
    assert (removed.logs, removed.bytes) == (expected, 9)
    assert logs(store) == ["begun", "digits", "digits.bn", "half", "notes"]
    assert remove_leftovers(store, dry_run=False, grace=3600).logs == ()


def test_a_log_that_is_a_link_stays(store, tmp_path):
    write_logs(store)
    (tmp_path / "precious").write_text("mine")
    os.utime(tmp_path / "precious", (0, 0))
    (store.path / "logs" / "lost.jsonl").symlink_to(tmp_path / "precious")
    assert remove_leftovers(store, dry_run=False, grace=0).logs == ()
    assert (tmp_path / "precious").exists()


def make_study(store, name, checkpoint, search, owner=None, heard=0.0, identity=True):
    with opened_storage(f"sqlite:///{store.path / 'studies.sqlite'}") as storage:
        number = storage.create_new_study([], name)
        if identity:
            storage.set_study_user_attr(number, IDENTITY, {"checkpoint": checkpoint, "search": search})
        if owner is not None:
            storage.set_study_user_attr(number, f"{OWNER}:{owner}", [heard, heard])


def studies(store):
    with opened_storage(f"sqlite:///{store.path / 'studies.sqlite'}") as storage:
        return {study.study_name for study in storage.get_all_studies()}


def test_studies_go_with_their_checkpoint_or_when_their_search_is_stored(store):
    ours = store.resolve("digits").short
    make_study(store, "unfinished", ours, "e" * 12, "x")
    make_study(store, "finished", ours, "5" * 12, "x")
    make_study(store, "orphan", "0" * 12, "e" * 12, "x")
    expected = ("finished", "orphan")
    assert sorted(remove_leftovers(store, dry_run=True, grace=0).studies) == list(expected)
    assert len(studies(store)) == 3
    assert sorted(remove_leftovers(store, dry_run=False, grace=0).studies) == list(expected)
    assert studies(store) == {"unfinished"}
    digests = {artifact.digest for artifact in store.artifacts()}
    assert remove_leftovers(store, gone=digests, dry_run=True, grace=0).studies == ("unfinished",)


def test_the_study_of_a_running_search_stays(store):
    running, dead = LivingProcess(store.path / "processes"), LivingProcess(store.path / "processes")
    with running.living():
        with dead.living():
            lock = store.path / "processes" / f"{dead.id}.lock"
            content = lock.read_bytes()
        lock.write_bytes(content)  # a process that is killed leaves its file
        now = time.time()
        make_study(store, "running", "0" * 12, "e" * 12, running.id, heard=0.0)
        make_study(store, "elsewhere", "0" * 12, "e" * 12, "machine", heard=now)
        make_study(store, "long ago", "0" * 12, "e" * 12, "machine", heard=now - LEASE - 1)
        make_study(store, "dead", "0" * 12, "e" * 12, dead.id, heard=now)
        make_study(store, "just made", "0" * 12, "e" * 12)
        make_study(store, "of another program", "0" * 12, "e" * 12, "x", identity=False)
        removed = remove_leftovers(store, dry_run=False, grace=0)
        assert sorted(removed.studies) == ["dead", "long ago"]
        assert removed.locks == (lock.name,)
        assert (store.path / "processes" / f"{running.id}.lock").exists()
    assert studies(store) == {"running", "elsewhere", "just made", "of another program"}


def test_a_locked_database_is_left_to_its_search(store):
    import sqlite3

    make_study(store, "orphan", "0" * 12, "e" * 12, "x")
    reader = sqlite3.connect(store.path / "studies.sqlite")
    reader.execute("begin")
    reader.execute("select * from studies").fetchone()
    assert remove_leftovers(store, dry_run=True, grace=0).studies == ("orphan",)
    reader.close()


def test_gc_lists_and_removes_them(store, tmp_path):
    write_logs(store, "lost")
    make_study(store, "orphan", "0" * 12, "e" * 12, "x")
    said = document(tmp_path, "store", "gc", "--dry-run")
    assert (said["logs"], said["studies"], said["dry_run"]) == (["lost"], ["orphan"], True)
    done = called(tmp_path, "store", "gc")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[:2] == ["log of lost", "study orphan"]
    assert "1 logs, 1 studies" in done.stderr
    assert (logs(store), studies(store)) == ([], set())


def test_a_store_without_studies_gets_none(store):
    remove_leftovers(store, dry_run=False, grace=0)
    assert not (store.path / "studies.sqlite").exists()
