"""Lock files by which processes that share a store find out whether the other processes are still alive."""

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sdpctl.errors import StoreLockedError
from sdpctl.store.files import locked, writing

KEPT = 3600.0
"""Seconds for which the lock file of a dead process is kept; after this time no process checks it any more."""


class LivingProcess:
    """This process as one of those that share a study: it keeps a file beside the blobs locked as long as it lives.

    Args:
        folder: the folder of the lock files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.id = uuid.uuid4().hex

    def _file(self, other: str) -> Path:
        return self.folder / f"{other}.lock"

    def gone(self, other: str) -> bool | None:
        """Return whether a different process is dead; None if it has no lock file here, for example on a different machine."""
        if not self._file(other).exists():
            return None
        try:
            with locked(self._file(other), shared=True, timeout=0):  # shared: several processes may check at once
                return True
        except StoreLockedError:
            return False

    @contextmanager
    def living(self) -> Iterator[None]:
        """Hold the lock; delete the lock file only on a clean exit."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self._file(self.id), timeout=0):
            yield
            self._file(self.id).unlink()
        for file in self.folder.glob("*.lock"):
            with suppress(FileNotFoundError):  # a second process may remove the same file
                if time.time() - file.stat().st_mtime > KEPT and self.gone(file.stem):
                    file.unlink()
