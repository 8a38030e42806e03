"""Files beside a store's blobs that no artifact needs any more: logs, studies of searches, lock files of dead processes."""

import sqlite3
import stat
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sdpctl.stages.liveness import LivingProcess
from sdpctl.stages.workspace import LOGS, PROCESSES, STUDIES
from sdpctl.store import Store
from sdpctl.store.files import writing


@dataclass(frozen=True)
class Leftovers:
    """What was removed, or would be removed in a dry run.

    Args:
        logs: tags whose log was removed, since no such tag exists.
        studies: studies that were removed: their checkpoint is gone, or their search is finished and stored.
        locks: names of the lock files of dead processes.
        bytes: size of the removed files.
    """

    logs: tuple[str, ...]
    studies: tuple[str, ...]
    locks: tuple[str, ...]
    bytes: int


def remove_leftovers(store: Store, *, gone: Collection[str] = (), dry_run: bool, grace: float) -> Leftovers:
    """Remove what no artifact needs.

    Args:
        store: the store.
        gone: digests of artifacts that count as removed, which matters in a dry run.
        dry_run: say what would be removed, and remove nothing.
        grace: seconds; younger logs and lock files are kept, since a training has no tag before its first save.

    Raises:
        IntegrityError: if a manifest is damaged.
        ResourceError: if a file cannot be removed, or the studies cannot be read.
    """
    before = time.time() - grace
    tags = {artifact.tag for artifact in store.artifacts() if artifact.tag}
    logs = {
        path: size
        for path, size in _old(store.path / LOGS, ".jsonl", before)
        if not any(tag == path.stem or tag.startswith(f"{path.stem}.") for tag in tags)
    }
    process = LivingProcess(store.path / PROCESSES)
    locks = {path: size for path, size in _old(process.folder, ".lock", before) if process.gone(path.stem)}
    studies, freed = _remove_studies(store, process, gone, dry_run=dry_run)
    if not dry_run:
        with writing(store.path):
            for path in (*logs, *locks):
                path.unlink(missing_ok=True)
    size = sum(logs.values()) + sum(locks.values()) + freed
    return Leftovers(tuple(path.stem for path in logs), studies, tuple(path.name for path in locks), size)


def _old(folder: Path, suffix: str, before: float) -> Iterator[tuple[Path, int]]:
    """Yield the regular files of a folder with a suffix that were last changed before a time, and their sizes."""
    for path in sorted(folder.glob(f"*{suffix}")):
        with suppress(FileNotFoundError):  # its process has just ended
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_mtime < before:
                yield path, status.st_size


def _remove_studies(
    store: Store, process: LivingProcess, gone: Collection[str], *, dry_run: bool
) -> tuple[tuple[str, ...], int]:
    """Remove the studies that no living process works on and that no search will continue; return them and the freed bytes."""
    path = store.path / STUDIES
    if not path.is_file():
        return (), 0
    from sdpctl.search.study import forget, idle_studies, opened_storage

    checkpoints = {digest.removeprefix("sha256:")[:12] for digest in store.reachable() - set(gone)}
    finished = {artifact.key[:12] for artifact in store.artifacts() if artifact.key and artifact.digest not in gone}
    size = path.stat().st_size
    with opened_storage(f"sqlite:///{path.absolute()}") as storage:
        names = tuple(
            name
            for name, identity in idle_studies(storage, process).items()
            if identity.get("checkpoint") not in checkpoints or identity.get("search") in finished
        )
        if dry_run or not names:
            return names, 0
        for name in names:
            forget(storage, name)
    with suppress(sqlite3.OperationalError):  # a search is writing: it uses the free pages
        connection = sqlite3.connect(path, timeout=1)
        try:
            connection.execute("vacuum")
        finally:
            connection.close()
    return names, max(0, size - path.stat().st_size)
