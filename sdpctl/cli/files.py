"""Files that a command writes: they are refused before any work if they may not be replaced, and written in one step."""

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from sdpctl.errors import IntegrityError, ResourceError, UsageError
from sdpctl.fields import is_name
from sdpctl.untrusted import kind_of


def check_output(path: Path, *, member: str | None = None, force: bool) -> None:
    """Refuse an output path that exists or cannot be written, before any work is done.

    Only regular files are replaced, and folders that contain the file `member`. For a link, its target is checked.

    Args:
        path: path of the file or folder.
        member: the file that a folder must hold to be replaced; None if the output is a file.
        force: allow an existing output to be replaced.

    Raises:
        UsageError: if the output exists and may not be replaced, or cannot be written at that path.
    """
    wanted = "folder" if member else "file"
    if not path.name:
        raise UsageError(f"{path}: this cannot be the name of a {wanted}; choose a different path")
    try:
        there = None if not path.is_symlink() and not path.exists() else path.stat()
        place = path.resolve()
        if there is not None:
            _check_replaceable(path, there, member=member, force=force)
        if not place.parent.is_dir():
            raise UsageError(f"{path}: there is no folder {path.parent}; choose a different path, or make the folder")
    except OSError as error:
        reason = "it is a link to nothing" if error.errno in (errno.ENOENT, errno.ELOOP) else error.strerror
        raise UsageError(f"{path}: this {wanted} cannot be written ({reason}); choose a different path") from error
    if not os.access(place.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{path}: the folder {path.parent} is not writable; choose a different folder")
    if there is not None and member is not None and not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"{path}: nothing can be removed from this folder; choose a different one")


def _check_replaceable(path: Path, there: os.stat_result, *, member: str | None, force: bool) -> None:
    is_file, is_folder = stat.S_ISREG(there.st_mode), stat.S_ISDIR(there.st_mode)
    if not (is_file or is_folder):
        raise UsageError(f"{path}: this is {kind_of(there.st_mode)}, which is never replaced; choose a different name")
    if any(os.path.samestat(there, stream) for stream in _standard_streams()):
        raise UsageError(f"{path}: the command's standard output or standard error goes to this file; choose a different name")
    if member is None and is_folder:
        raise UsageError(f"{path}: this is a folder; give the path of a file")
    if not force:
        raise UsageError(
            f"{path}: this {'folder' if member else 'file'} exists; --force replaces it, or choose a different path"
        )
    if member is not None and not (path / member).is_file():
        raise UsageError(
            f"{path}: this exists and is not a folder with a {member}, so --force does not replace it; choose a different path"
        )


def _standard_streams() -> Iterator[os.stat_result]:
    for descriptor in (1, 2):
        with suppress(OSError):  # a closed stream cannot be replaced
            yield os.fstat(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write a file in one step.

    Raises:
        ResourceError: if the file cannot be written.
    """
    with _staged(path) as (place, staged):
        with staged.open("xb") as file:
            file.write(content)
        staged.replace(place)


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder of files; an existing folder is replaced once the new one is complete.

    Args:
        path: path of the folder.
        files: content of each file by its name.

    Raises:
        IntegrityError: for a name that leads out of the folder; nothing is written.
        ResourceError: if the folder cannot be written.
    """
    for name in files:
        if not is_name(name):
            raise IntegrityError(f"{path}: {name!r} is not the name of a file in it; nothing was written")
    with _staged(path) as (place, staged), _staged(path, "old") as (_, before):
        staged.mkdir()
        for name, content in files.items():
            (staged / name).write_bytes(content)
        if place.exists():
            place.rename(before)
        try:
            staged.rename(place)
        except BaseException:
            if before.exists():
                before.rename(place)
            raise


@contextmanager
def _staged(path: Path, word: str = "new") -> Iterator[tuple[Path, Path]]:
    """Yield the path with links resolved, and a temporary sibling path; remove whatever is left at the latter."""
    try:
        place = path.resolve()
        staged = place.with_name(f".{place.name[:40]}.{word}.{secrets.token_hex(4)}")  # nobody can guess the name
        try:
            yield place, staged
        finally:
            if staged.is_dir():
                shutil.rmtree(staged)
            staged.unlink(missing_ok=True)
    except OSError as error:
        raise ResourceError(f"{path}: this cannot be written ({error.strerror or error}); choose a different path") from error
