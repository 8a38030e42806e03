"""Telling other processes on the same store that this one lives."""

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sdpctl.errors import StoreLockedError
from sdpctl.store.files import locked, writing

KEPT = 3600.0
"""Seconds that the file of a dead process stays: by then nobody asks for it."""


class Process:
    """This process among those that share a study; a lock on a file beside the blobs tells of its death.

    Args:
        folder: of the lock files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.id = uuid.uuid4().hex

    def _file(self, other: str) -> Path:
        return self.folder / f"{other}.lock"

    def gone(self, other: str) -> bool | None:
        """Say whether a process that used this store is dead; None of one that left no file here, as on another machine."""
        if not self._file(other).exists():
            return None
        try:
            with locked(self._file(other), shared=True, timeout=0):  # several may ask at once
                return True
        except StoreLockedError:
            return False

    @contextmanager
    def living(self) -> Iterator[None]:
        """Hold the lock; only a process that ends well, with nothing left to do, takes its file along."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self._file(self.id), timeout=0):
            yield
            self._file(self.id).unlink()
        for file in self.folder.glob("*.lock"):
            with suppress(FileNotFoundError):  # another process clears away too
                if time.time() - file.stat().st_mtime > KEPT and self.gone(file.stem):
                    file.unlink()
