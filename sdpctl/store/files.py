"""Files that are replaced atomically, and locks that end with the process that holds them."""

import fcntl
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sdpctl.errors import ResourceError, StoreLockedError
from sdpctl.untrusted import open_regular

CHUNK = 2**20


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the operating system into a `ResourceError` that names the path."""
    try:
        yield
    except OSError as error:
        raise ResourceError(f"{path}: cannot write there ({error.strerror}); choose a different store with --store") from error


def sync_directory(path: Path) -> None:
    """Flush a directory to the disk, so that renames in it survive a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def chunks(content: bytes | Path) -> Iterator[bytes]:
    """Yield the content of a file in pieces, or bytes as one piece."""
    if isinstance(content, bytes):
        yield content
        return
    with open_regular(content) as file:
        while piece := file.read(CHUNK):
            yield piece


@contextmanager
def staged(directory: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """Open a temporary file; remove it afterwards unless it was renamed."""
    descriptor, name = tempfile.mkstemp(dir=directory)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file, Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def replace_file(path: Path, content: bytes, *, staging: Path) -> None:
    """Replace a file atomically: write a temporary file in the folder `staging`, then rename it."""
    with staged(staging) as (file, name):
        file.write(content)
        file.flush()
        os.fchmod(file.fileno(), 0o644)
        os.fsync(file.fileno())
        name.replace(path)
    sync_directory(path.parent)


def hash_of(content: bytes | Path, copy_to: BinaryIO | None = None) -> tuple[str, int]:
    """Return the digest and the size of content; write the content to `copy_to` if it is given."""
    digest, size = hashlib.sha256(), 0
    for piece in chunks(content):
        digest.update(piece)
        size += len(piece)
        if copy_to is not None:
            copy_to.write(piece)
    return f"sha256:{digest.hexdigest()}", size


@contextmanager
def locked(path: Path, *, shared: bool = False, read_only: bool = False, timeout: float) -> Iterator[None]:
    """Hold a lock on a file, exclusive or shared; the file itself is not removed.

    Args:
        path: path of the lock file, which is created if it is missing.
        shared: share the lock with other processes that hold it shared.
        read_only: open the file for reading only, which is enough for a shared lock.
        timeout: seconds to wait for a different process.

    Raises:
        OSError: if the file cannot be opened or created.
        ResourceError: if the file is not a regular file.
        StoreLockedError: if a different process holds the lock for longer than `timeout` seconds.
    """
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o644)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ResourceError(f"{path}: this lock is not a regular file; remove it")
        deadline = time.monotonic() + timeout
        mode = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
        while True:
            try:
                fcntl.flock(descriptor, mode)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StoreLockedError(
                        f"{path}: a different process has held this lock for {timeout:g} s; try again"
                    ) from None
                time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)
