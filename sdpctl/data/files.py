"""The files of a data set and their fingerprint. Importing this module needs no torch.

A fingerprint is a hash of the classes and of the sorted relative paths with each file's own hash. The first look at a data
set reads every file and decodes every image once; the hashes are then cached by size and modification time. With
`data.identify=stat`, an image's size takes the place of its hash, no image is read, and the fingerprint begins with `stat-`.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import sqlite3
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from sdpctl.data.catalog import Identify
from sdpctl.data.reader import AS_USUAL, Located, reader_of
from sdpctl.data.settle import settle
from sdpctl.errors import DataError, LoaderError
from sdpctl.signals import STOPPING
from sdpctl.untrusted import kind_of, open_regular, printable, printable_path

T = TypeVar("T")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
"""Suffixes of image files, compared without regard to case."""

NAMED = 20
"""Maximum number of files or classes that a message names."""

AT_A_TIME = 1024
"""Number of hashes written to the cache at once, which is the most that an interrupted first look loses."""

CHUNK = 2**20

MANY = 2048
"""Number of files from which processes look at them, since Python's global lock is held for a quarter of a look at an image."""

PIECE = 16
"""Number of files that a thread or process looks at in one go."""

AT_ONCE, MEMORY_OF_ONE = 16, 2**30
"""How many look at files at once on a machine of any memory; and the memory in bytes for one more. Each may hold an image."""

STAT = "stat-"
"""The beginning of a fingerprint that was made with `data.identify=stat`."""

Watch = Callable[[Iterable[Any], int], Iterable[Any]]
"""Takes the results of looking at files and the number of files; yields the results and shows the progress."""


@dataclass(frozen=True)
class Unreadable:
    """A file that cannot be used.

    Args:
        reason: the reason in a few words.
    """

    reason: str


def locate(dataset: str, root: Path, *, partial: bool = False, arrangement: Mapping[str, Any] = AS_USUAL) -> Located:
    """Find the files of a data set. Files whose names begin with a dot are not part of it.

    Args:
        dataset: name of the data set in `DATASETS`.
        root: the folder that holds its files.
        partial: whether a class may lack images, or its folder, in one split.
        arrangement: `folders` and `test_share` of an image folder that is not arranged as train and val.

    Raises:
        DataError: if a folder or file is missing, empty or unreadable; the message names it and says what to do.
    """
    with _reading():
        return reader_of(dataset, arrangement).locate(root, partial=partial)


def class_names(
    dataset: str, root: Path, *, partial: bool = False, arrangement: Mapping[str, Any] = AS_USUAL
) -> tuple[str, ...]:
    """Return the names of the classes of a data set; those of an image folder are read without looking for images.

    Raises:
        DataError: if a folder is missing, or the splits have different classes and `partial` does not allow it.
    """
    with _reading():
        return reader_of(dataset, arrangement).class_names(root, partial=partial)


def images_in(folder: Path) -> list[Path]:
    """Return the image files in a folder and its subfolders, without hidden ones, sorted by folder, then by name.

    Links to folders are followed.

    Raises:
        DataError: if links lead to one folder twice, so that its images would count twice or the walk would not end.
        OSError: if a folder cannot be read.
    """
    found: list[Path] = []
    waiting = [folder]
    known: dict[tuple[int, int], Path] = {}
    while waiting:
        parent = waiting.pop()
        stat = parent.stat()
        first = known.setdefault((stat.st_dev, stat.st_ino), parent)
        if first != parent:
            raise DataError(
                f"{printable_path(parent)}: links lead to this folder twice, also as {printable_path(first)}; remove one of "
                "them"
            )
        with os.scandir(parent) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                is_image = entry.name.lower().endswith(IMAGE_SUFFIXES)
                try:
                    is_folder = entry.is_dir()
                except OSError:  # a link to itself
                    if not is_image:
                        raise
                    is_folder = False  # `look` will say why it cannot be read
                if is_folder:
                    waiting.append(Path(entry.path))
                elif is_image:
                    found.append(Path(entry.path))
    return sorted(found, key=lambda path: (str(path.parent), path.name))


@contextmanager
def _reading() -> Iterator[None]:
    """Turn an `OSError` into a `DataError`."""
    try:
        yield
    except OSError as error:
        raise unreadable(error) from error


def unreadable(error: OSError) -> DataError:
    """Return the `DataError` for a path that cannot be read."""
    name = printable(str(error.filename))
    return DataError(f"{name}: this cannot be read ({error.strerror}); fix its permissions or remove it")


def several(texts: Iterable[str]) -> str:
    """Join texts with commas; of more than twenty, join the first twenty and add the number of the others."""
    listed = list(texts)
    more = f" and {len(listed) - NAMED:,} more" if len(listed) > NAMED else ""
    return ", ".join(map(printable, listed[:NAMED])) + more


Key = tuple[bytes, int, int]
"""Path, size and modification time: the key of a cached hash."""


class FileHashes:
    """SHA-256 of files, cached by size and modification time; an image was decoded when it was hashed.

    Args:
        path: path of the SQLite file that holds the cache.
        remember: whether new hashes are written to the cache.
    """

    def __init__(self, path: Path, *, remember: bool = True) -> None:
        self.path = path
        self.remember = remember

    def of(self, files: Sequence[Path], watch: Watch = lambda found, _: found) -> list[str | Unreadable]:
        """Return the hash of each file, or why the file cannot be used; new and changed files are read.

        Args:
            files: their paths; a file with an image's suffix is decoded too.
            watch: shows the progress.

        Raises:
            DataError: if the cache cannot be written.
        """
        known, real = self._known(), cache(os.path.realpath)
        results: dict[Path, str | Unreadable] = {}
        new: list[tuple[Key, Path]] = []
        for path in files:
            try:
                key = _key(path, real)
            except OSError as error:
                results[path] = Unreadable(error.strerror or str(error))
                continue
            if key in known:
                results[path] = known[key]
            else:
                new.append((key, path))
        if new:
            fresh: dict[Key, str] = {}
            for result, (key, path) in zip(watch(on_all_cores(look, [path for _, path in new]), len(new)), new, strict=True):
                results[path] = result
                if isinstance(result, str):  # unreadable files are not cached: their permissions may be fixed
                    fresh[key] = result
                if len(fresh) == AT_A_TIME:
                    self._write(fresh)
                    fresh = {}
            self._write(fresh)
        return [results[path] for path in files]

    def _write(self, hashes: Mapping[Key, str]) -> None:
        if not hashes or not self.remember:
            return
        try:
            with closing(sqlite3.connect(self.path, timeout=60)) as database, database:
                database.execute("drop table if exists files")  # the table of earlier versions, which did not decode images
                database.execute("create table if not exists seen (path blob primary key, size, mtime_ns, sha256)")
                rows = [(*key, sha256) for key, sha256 in hashes.items()]
                database.executemany("replace into seen (path, size, mtime_ns, sha256) values (?, ?, ?, ?)", rows)
        except sqlite3.Error as error:
            raise DataError(
                f"{printable_path(self.path)}: the hashes of the data cannot be written to it ({error}); remove this file, or "
                "choose a different store with --store"
            ) from error

    def _known(self) -> dict[Key, str]:
        if not self.path.is_file():
            return {}
        try:
            with closing(sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True, timeout=60)) as database:
                rows = database.execute("select path, size, mtime_ns, sha256 from seen where typeof(sha256) = 'text'")
                return {(path, size, mtime_ns): sha256 for path, size, mtime_ns, sha256 in rows}
        except sqlite3.DatabaseError as error:  # the cache only saves time: a damaged cache is removed and made again
            if error.sqlite_errorcode in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT) and self.remember:
                self.path.unlink()
            return {}


def _key(path: Path, real: Callable[[Path], str]) -> Key:
    """Return the key of a file's hash.

    Args:
        path: path of the file.
        real: returns the real path of a folder; it may remember it, since the folder's other files need it too.
    """
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        status, target = path.stat(), os.path.realpath(path)
    else:
        target = f"{real(path.parent)}/{path.name}"
    return os.fsencode(target), status.st_size, status.st_mtime_ns


def on_all_cores(function: Callable[[Path], T], paths: Sequence[Path], *, decodes: bool = True) -> Iterator[T]:
    """Apply a function to files, and yield the results in order.

    Args:
        function: looks at one file.
        paths: the files.
        decodes: whether the function decodes images: many are then given to processes. Otherwise threads suffice.

    Raises:
        LoaderError: if a process died or could not be started.
    """
    workers = _workers()
    pieces = (paths[start : start + PIECE] for start in range(0, len(paths), PIECE))
    others = set(multiprocessing.active_children())
    begun = deque[Future[list[T]]]()
    pool: Executor
    if workers > 1 and decodes and len(paths) >= MANY:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), initializer=settle)
    else:
        pool = ThreadPoolExecutor(workers)
    try:
        for piece in pieces:
            begun.append(_submit(pool, function, piece))
            if len(begun) > 4 * workers:
                yield from begun.popleft().result()
        while begun:
            yield from begun.popleft().result()
    except (BrokenProcessPool, OSError) as error:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()  # one that could not be told to end would be waited for at exit
        raise LoaderError(
            f"a process that looks at files died or could not be started ({str(error).rstrip('.')}), perhaps for lack of "
            "memory; run the command again, which goes on with the files that are left"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)  # otherwise an interruption would wait for all files


def _workers() -> int:
    """Return how many look at files at once: as many as this process has cores, if the memory allows."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(len(os.sched_getaffinity(0)), max(AT_ONCE, memory // MEMORY_OF_ONE))


def _submit(pool: Executor, function: Callable[[Path], T], paths: Sequence[Path]) -> "Future[list[T]]":
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # the first call forks: until `settle` has run
    try:
        return pool.submit(_each, function, paths)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _each(function: Callable[[Path], T], paths: Sequence[Path]) -> list[T]:
    return list(map(function, paths))


def look(path: Path) -> str | Unreadable:
    """Return the SHA-256 of a file, or why the file cannot be used; a file with an image's suffix is decoded first."""
    if _is_image(path.name) and (problem := _undecodable(path)):
        return problem
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            while piece := file.read(CHUNK):
                digest.update(piece)
    except OSError as error:
        return Unreadable(error.strerror or str(error))
    return digest.hexdigest()


def size_of(path: Path) -> str | Unreadable:
    """Return the size of an image file in bytes, or why the file cannot be an image; the file is not opened."""
    try:
        status = path.stat()
    except OSError as error:
        return Unreadable(error.strerror or str(error))
    if not stat.S_ISREG(status.st_mode):
        return Unreadable(f"not a regular file but {kind_of(status.st_mode)}")
    return str(status.st_size) if status.st_size else Unreadable("the file is empty")


def _undecodable(path: Path) -> Unreadable | None:
    from sdpctl.data import images

    try:
        images.check(path)
    except DataError as error:
        return Unreadable(str(error))
    return None


def undecodable(paths: Sequence[Path]) -> list[tuple[Path, str]]:
    """Return the image files that cannot be decoded, each with the reason."""
    problems = zip(paths, on_all_cores(_undecodable, paths), strict=True)
    return [(path, problem.reason) for path, problem in problems if problem is not None]


@dataclass(frozen=True)
class Seen:
    """A data set whose files were looked at.

    Args:
        located: the files that are used.
        fingerprint: hash of the classes and the files.
        left_out: reason for each image that is not used, by the image's name.
    """

    located: Located
    fingerprint: str
    left_out: Mapping[str, str]


def look_at(
    dataset: str,
    located: Located,
    hashes: FileHashes,
    *,
    identify: Identify = "content",
    skip_unreadable: bool = False,
    watch: Watch = lambda found, _: found,
) -> Seen:
    """Look at every file of a data set.

    Args:
        dataset: name of the data set in `DATASETS`.
        located: the files of the data set.
        hashes: the cache of hashes.
        identify: whether an image counts by its content, which is decoded, or by its size alone.
        skip_unreadable: whether images that cannot be decoded are left out.
        watch: shows the progress.

    Raises:
        DataError: if an image cannot be decoded and `skip_unreadable` is not set (with a line for each of the first twenty),
            if a different kind of file cannot be read, or if a class has no image left.
        LoaderError: if a process that looks at files died.
    """
    if located.fingerprint is not None:
        return Seen(located, located.fingerprint, {})
    sized = [name for name in located.files if identify == "stat" and _is_image(name)]
    hashed = [name for name in located.files if identify == "content" or not _is_image(name)]
    sizes = watch(on_all_cores(size_of, [located.files[name] for name in sized], decodes=False), len(sized)) if sized else ()
    found = dict(zip(sized, sizes, strict=True))
    found |= zip(hashed, hashes.of([located.files[name] for name in hashed], watch), strict=True)
    bad = {name: result.reason for name, result in found.items() if isinstance(result, Unreadable)}
    for name, reason in bad.items():
        if not _is_image(name):
            path = printable_path(located.files[name])
            raise DataError(f"{path}: this file cannot be read ({reason}); make it readable, or remove it")
    if bad and not skip_unreadable:
        pairs = [(located.files[name], reason) for name, reason in bad.items()]
        leave_out = ", or leave {0} out with --set data.skip_unreadable=true" if identify == "content" else ""
        raise bad_images(pairs, len(found), "remove {0}" + leave_out)
    kept = located.without(bad)
    for before, after, part in ((located.train, kept.train, "training"), (located.test, kept.test, "test")):
        if emptied := sorted({index for _, index in before} - {index for _, index in after}):
            names = several(repr(located.classes[index]) for index in emptied)
            raise DataError(f"no {part} image of {names} can be decoded; add images")
    content = [dataset, located.classes, sorted((name, found[name]) for name in kept.files)]
    kind = [identify] if identify == "stat" else []
    digest = hashlib.sha256(json.dumps(kind + content).encode()).hexdigest()
    return Seen(kept, (STAT if kind else "") + digest, bad)


def identified_by(fingerprint: str) -> Identify:
    """Return what a fingerprint is made of."""
    return "stat" if fingerprint.startswith(STAT) else "content"


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def bad_images(bad: Sequence[tuple[Path, str]], total: int, advice: str) -> DataError:
    """Return the error that names the first twenty images that cannot be decoded.

    Args:
        bad: path of each such image, and the reason.
        total: number of images looked at.
        advice: what to do, with `{0}` in place of "it" or "them".
    """
    lines = [f"{printable_path(path)}: this image cannot be decoded ({reason})" for path, reason in bad[:NAMED]]
    if len(bad) == 1:
        return DataError(f"{lines[0]}; {advice.format('it')}")
    lines += [f"and {len(bad) - NAMED:,} more"] * (len(bad) > NAMED)
    return DataError(*lines, f"{len(bad):,} of {total:,} images cannot be decoded; {advice.format('them')}")
