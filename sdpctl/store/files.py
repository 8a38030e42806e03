"""Writing files so that a crash leaves the old content or the new, and locks that die with their process."""

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
    """Turn what the operating system refuses into one line."""
    try:
        yield
    except OSError as error:
        raise ResourceError(f"{path}: cannot write there ({error.strerror}); choose another store with --store") from error


def sync_directory(path: Path) -> None:
    """Make renames in a directory last."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def chunks(content: bytes | Path) -> Iterator[bytes]:
    """Yield content piece by piece."""
    if isinstance(content, bytes):
        yield content
        return
    with open_regular(content) as file:
        while piece := file.read(CHUNK):
            yield piece


@contextmanager
def staged(directory: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """Open a temporary file that is gone afterwards unless it was renamed."""
    descriptor, name = tempfile.mkstemp(dir=directory)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file, Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def replace_file(path: Path, content: bytes, *, staging: Path) -> None:
    """Write a file in one step."""
    with staged(staging) as (file, name):
        file.write(content)
        file.flush()
        os.fchmod(file.fileno(), 0o644)
        os.fsync(file.fileno())
        name.replace(path)
    sync_directory(path.parent)


def hash_of(content: bytes | Path, copy_to: BinaryIO | None = None) -> tuple[str, int]:
    """Return digest and size of some content, writing it on the way."""
    digest, size = hashlib.sha256(), 0
    for piece in chunks(content):
        digest.update(piece)
        size += len(piece)
        if copy_to is not None:
            copy_to.write(piece)
    return f"sha256:{digest.hexdigest()}", size


@contextmanager
def locked(path: Path, *, shared: bool = False, read_only: bool = False, timeout: float) -> Iterator[None]:
    """Hold a lock file, alone or shared; the file itself stays.

    Args:
        path: of the file, which is made where it is missing.
        shared: with others that hold it shared.
        read_only: open the file for reading only, which suffices for a shared lock.
        timeout: seconds to wait for a different process.

    Raises:
        OSError: where the file cannot be opened or made.
        ResourceError: where something other than a regular file is in its place.
        StoreLockedError: where another process holds it for longer than `timeout` seconds.
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
                    raise StoreLockedError(f"{path}: another process has held this lock for {timeout:g} s; try again") from None
                time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)
