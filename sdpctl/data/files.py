"""Where a data set's files lie, and what they are: the fingerprint. Needs no torch.

A fingerprint is a hash of the classes and of the sorted relative paths with each file's own hash. The first look at a data
set reads every file and decodes every image once; what was found is kept by size and modification time.
"""

import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from sdpctl.data.catalog import DATASETS, DIGITS_SHA256
from sdpctl.errors import DataError
from sdpctl.untrusted import open_regular, printable, read_regular

T = TypeVar("T")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
"""What an image file's name ends with, in any case."""

NAMED = 20
"""Files, classes and other things that a message names at most."""

AT_A_TIME = 1024
"""Files whose hashes are written in one step: an interrupted first look loses no more."""

CHUNK = 2**20

THREADS = 16
"""Threads that look at files, at most: each may hold one decoded image."""

ANNOTATIONS_BYTES = 64 * 2**20

Watch = Callable[[Iterable["str | Unreadable"], int], Iterable["str | Unreadable"]]
"""Passes on what is found in so many files, and shows how far it is."""


@dataclass(frozen=True)
class Unreadable:
    """What is known of a file that cannot be used.

    Args:
        reason: in a few words.
    """

    reason: str


@dataclass(frozen=True)
class Located:
    """A data set whose files are there.

    Args:
        classes: their names, where folders name them; empty for official files.
        files: paths by name relative to the root.
        train: name and class index of each training image; empty for official files.
        test: likewise.
    """

    classes: tuple[str, ...]
    files: Mapping[str, Path]
    train: tuple[tuple[str, int], ...] = ()
    test: tuple[tuple[str, int], ...] = ()

    def without(self, names: Iterable[str]) -> "Located":
        """Return the same without some images."""
        left_out = set(names)
        kept = {name: path for name, path in self.files.items() if name not in left_out}
        train, test = (tuple(image for image in images if image[0] in kept) for images in (self.train, self.test))
        return replace(self, files=kept, train=train, test=test)


def locate(dataset: str, root: Path, *, partial: bool = False) -> Located:
    """Find the files of a data set. Names that begin with a dot are not part of it.

    Args:
        dataset: a name of the catalog.
        root: the folder its files are in.
        partial: whether a class of an image folder may lack images in one split, or its folder there.

    Raises:
        DataError: naming the folder or file that is missing or empty, and what to do.
    """
    info = DATASETS[dataset]
    if dataset == "digits":
        return Located((), {})
    where = "set data.root=FOLDER" + (", or data.download=true" if info.downloadable else "")
    with _reading():
        if not root.is_dir():
            raise DataError(f"{shown(root)}: there is no such data folder; {where}")
        if info.files:
            missing = [name for name in info.files if not (root / name).is_file()]
            if missing:
                raise DataError(f"{shown(root / missing[0])}: {dataset} lacks this file; {where}")
            return Located((), {name: root / name for name in info.files})
        base = root / (info.folder or ".")
        for part in ("train", "val"):
            if not (base / part).is_dir():
                raise DataError(f"{shown(base / part)}: {dataset} lacks this folder; {where}")
        return _tiny_imagenet(base) if dataset == "tiny-imagenet" else _image_folder(base, partial=partial)


def class_folders(dataset: str, root: Path, *, partial: bool = False) -> tuple[str, ...]:
    """Return the classes that the folders of an image folder name, without a look at the images.

    Raises:
        DataError: where the folders are not there, or the splits differ and `partial` does not allow it.
    """
    base = root / (DATASETS[dataset].folder or ".")
    with _reading():
        for folder in (root, base / "train", base / "val"):
            if not folder.is_dir():
                raise DataError(f"{shown(folder)}: there is no such folder; set data.root=FOLDER")
        return _classes(base, partial=partial)


def _image_folder(base: Path, *, partial: bool) -> Located:
    classes = _classes(base, partial=partial)
    files: dict[str, Path] = {}
    splits = []
    for part in ("train", "val"):
        images: list[tuple[str, int]] = []
        for index, name in enumerate(classes):
            folder = base / part / name
            paths = images_in(folder) if not partial or folder.is_dir() else []
            if not paths and not partial:
                raise DataError(_no_images(folder))
            named = {path.relative_to(base).as_posix(): path for path in paths}
            files |= named
            images += [(image, index) for image in named]
        if not images:
            raise DataError(_no_images(base / part))
        splits.append(tuple(images))
    return Located(classes, files, *splits)


def _no_images(folder: Path) -> str:
    return f"{shown(folder)}: no image in this folder; add images or remove the folder ({', '.join(IMAGE_SUFFIXES)})"


def _classes(base: Path, *, partial: bool) -> tuple[str, ...]:
    train, val = (_folders(base / part) for part in ("train", "val"))
    lacking = {"val": sorted(train - val), "train": sorted(val - train)}
    if any(lacking.values()) and not partial:
        lacks = "; ".join(f"{part} lacks {several(map(repr, names))}" for part, names in lacking.items() if names)
        raise DataError(
            f"{shown(base)}: train and val must have the same class folders, but {lacks}; add them, or set data.partial=true "
            "where they are meant to be lacking"
        )
    return tuple(sorted(train | val))


def _folders(folder: Path) -> set[str]:
    with os.scandir(folder) as entries:
        names = {entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()}
    if not names:
        raise DataError(f"{shown(folder)}: no class folders; each class is a folder of images here")
    for name in sorted(names):
        if any("\udc80" <= character <= "\udcff" for character in name):
            raise DataError(f"{shown(folder / name)}: the name of this class is not UTF-8; rename the folder")
    return names


def _tiny_imagenet(base: Path) -> Located:
    annotations, folder = base / "val" / "val_annotations.txt", base / "val" / "images"
    classes = tuple(sorted(_folders(base / "train")))
    files, train, test = {}, [], []
    for index, name in enumerate(classes):
        paths = images_in(base / "train" / name)
        if not paths:
            raise DataError(_no_images(base / "train" / name))
        for path in paths:
            files[path.relative_to(base).as_posix()] = path
            train.append((path.relative_to(base).as_posix(), index))
    if not annotations.is_file():
        raise DataError(f"{shown(annotations)}: the official archive has this file; unpack it again")
    try:
        lines = read_regular(annotations, limit=ANNOTATIONS_BYTES).decode().splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{shown(annotations)}: this is not UTF-8 text ({error.reason}); unpack the archive again") from error
    paths = images_in(folder)
    if not paths:
        raise DataError(_no_images(folder))
    files |= {path.relative_to(base).as_posix(): path for path in paths}
    files[annotations.relative_to(base).as_posix()] = annotations
    for number, line in enumerate(lines, 1):
        name, _, rest = line.partition("\t")
        wordnet_id = rest.split("\t")[0]
        if wordnet_id not in classes:
            raise DataError(
                f"{shown(annotations)}:{number}: {wordnet_id!r} is not a class of the training split; unpack the archive again"
            )
        if (image := f"val/images/{name}") not in files:
            raise DataError(f"{shown(annotations)}:{number}: {name!r} is not in val/images; unpack the archive again")
        test.append((image, classes.index(wordnet_id)))
    return Located(classes, files, tuple(train), tuple(test))


def images_in(folder: Path) -> list[Path]:
    """Return the image files in a folder and in those below it, hidden ones left out, sorted by folder, then by name.

    Links to folders are followed.

    Raises:
        DataError: where a folder is reached twice: its images would count twice, or the search would not end.
        OSError: where a folder cannot be read.
    """
    found: list[Path] = []
    waiting = [folder]
    known: dict[tuple[int, int], Path] = {}
    while waiting:
        parent = waiting.pop()
        stat = parent.stat()
        first = known.setdefault((stat.st_dev, stat.st_ino), parent)
        if first != parent:
            raise DataError(f"{shown(parent)}: links lead to this folder twice, also as {shown(first)}; remove one of them")
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
                    is_folder = False  # the first look says why it cannot be read
                if is_folder:
                    waiting.append(Path(entry.path))
                elif is_image:
                    found.append(Path(entry.path))
    return sorted(found, key=lambda path: (str(path.parent), path.name))


@contextmanager
def _reading() -> Iterator[None]:
    """Turn what the operating system refuses into one line."""
    try:
        yield
    except OSError as error:
        raise unreadable(error) from error


def unreadable(error: OSError) -> DataError:
    """Return the error that says what cannot be read."""
    name = printable(str(error.filename))
    return DataError(f"{name}: this cannot be read ({error.strerror}); fix its permissions or remove it")


def shown(path: Path) -> str:
    """Return a path as a message may hold it: other programs, or other people, named it."""
    return printable(str(path))


def several(texts: Iterable[str]) -> str:
    """Join texts, the first twenty of them."""
    listed = list(texts)
    more = f" and {len(listed) - NAMED:,} more" if len(listed) > NAMED else ""
    return ", ".join(map(printable, listed[:NAMED])) + more


Key = tuple[bytes, int, int]
"""Path, size and modification time: what a hash is remembered by."""


class FileHashes:
    """SHA-256 of files, remembered by size and modification time; images were decoded when they were hashed.

    Args:
        path: of the SQLite file that remembers.
        remember: whether new hashes are written there.
    """

    def __init__(self, path: Path, *, remember: bool = True) -> None:
        self.path = path
        self.remember = remember

    def of(self, files: Sequence[Path], watch: Watch = lambda found, _: found) -> list[str | Unreadable]:
        """Return the hash of each file, reading those that are new or changed; or why a file cannot be used.

        Args:
            files: their paths; those whose names are an image's are decoded too.
            watch: shows how far it is.

        Raises:
            DataError: where the hashes cannot be remembered.
        """
        known = self._known()
        results: dict[Path, str | Unreadable] = {}
        new: list[tuple[Key, Path]] = []
        for path in files:
            try:
                key = _key(path)
            except OSError as error:
                results[path] = Unreadable(error.strerror or str(error))
                continue
            if key in known:
                results[path] = known[key]
            else:
                new.append((key, path))
        if new:
            fresh: dict[Key, str] = {}
            for result, (key, path) in zip(watch(_in_threads(look, [path for _, path in new]), len(new)), new, strict=True):
                results[path] = result
                if isinstance(result, str):  # what cannot be read is looked at again: its permissions may be mended
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
                database.execute("drop table if exists files")  # of earlier versions, which did not decode images
                database.execute("create table if not exists seen (path blob primary key, size, mtime_ns, sha256)")
                rows = [(*key, sha256) for key, sha256 in hashes.items()]
                database.executemany("replace into seen (path, size, mtime_ns, sha256) values (?, ?, ?, ?)", rows)
        except sqlite3.Error as error:
            raise DataError(
                f"{shown(self.path)}: the hashes of the data cannot be kept there ({error}); remove this file, or choose "
                "another store with --store"
            ) from error

    def _known(self) -> dict[Key, str]:
        if not self.path.is_file():
            return {}
        try:
            with closing(sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True, timeout=60)) as database:
                rows = database.execute("select path, size, mtime_ns, sha256 from seen where typeof(sha256) = 'text'")
                return {(path, size, mtime_ns): sha256 for path, size, mtime_ns, sha256 in rows}
        except sqlite3.DatabaseError as error:  # it only saves time: damaged, it is made anew
            if error.sqlite_errorcode in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT) and self.remember:
                self.path.unlink()
            return {}


def _key(path: Path) -> Key:
    stat = path.stat()
    return os.fsencode(os.path.realpath(path)), stat.st_size, stat.st_mtime_ns


def _in_threads(function: Callable[[Path], T], paths: Sequence[Path]) -> Iterator[T]:
    """Look at files in several threads: PIL and hashlib work outside Python's lock."""
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        try:
            for start in range(0, len(paths), AT_A_TIME):
                yield from pool.map(function, paths[start : start + AT_A_TIME])
        finally:
            pool.shutdown(cancel_futures=True)  # else an interruption would wait for all of them


def look(path: Path) -> str | Unreadable:
    """Return the SHA-256 of a file, after decoding it where its name is an image's; or why it cannot be used."""
    if path.name.lower().endswith(IMAGE_SUFFIXES) and (problem := _undecodable(path)):
        return problem
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            while piece := file.read(CHUNK):
                digest.update(piece)
    except OSError as error:
        return Unreadable(error.strerror or str(error))
    return digest.hexdigest()


def _undecodable(path: Path) -> Unreadable | None:
    from sdpctl.data import images

    try:
        images.check(path)
    except DataError as error:
        return Unreadable(str(error))
    return None


def undecodable(paths: Sequence[Path]) -> list[tuple[Path, str]]:
    """Return those of some image files that cannot be decoded, each with the reason."""
    problems = zip(paths, _in_threads(_undecodable, paths), strict=True)
    return [(path, problem.reason) for path, problem in problems if problem is not None]


@dataclass(frozen=True)
class Seen:
    """A data set that was looked at.

    Args:
        located: the files that are used.
        fingerprint: the hash by which they are known.
        left_out: why other images are not used, by name.
    """

    located: Located
    fingerprint: str
    left_out: Mapping[str, str]


def look_at(
    dataset: str,
    located: Located,
    hashes: FileHashes,
    *,
    skip_unreadable: bool = False,
    watch: Watch = lambda found, _: found,
) -> Seen:
    """Look at every file of a data set.

    Args:
        dataset: a name of the catalog.
        located: its files.
        hashes: of files looked at before.
        skip_unreadable: leave out images that cannot be decoded.
        watch: shows how far it is.

    Raises:
        DataError: with a line for every image that cannot be decoded, unless they are left out; or where another file cannot
            be read, or nothing is left of a class.
    """
    if dataset == "digits":
        return Seen(located, DIGITS_SHA256, {})
    found = dict(zip(located.files, hashes.of(list(located.files.values()), watch), strict=True))
    bad = {name: result.reason for name, result in found.items() if isinstance(result, Unreadable)}
    for name, reason in bad.items():
        if not name.lower().endswith(IMAGE_SUFFIXES):
            raise DataError(f"{shown(located.files[name])}: this file cannot be read ({reason}); fix that or remove it")
    if bad and not skip_unreadable:
        pairs = [(located.files[name], reason) for name, reason in bad.items()]
        raise bad_images(pairs, len(found), "remove {0}, or leave {0} out with --set data.skip_unreadable=true")
    kept = located.without(bad)
    for before, after, part in ((located.train, kept.train, "training"), (located.test, kept.test, "test")):
        if emptied := sorted({index for _, index in before} - {index for _, index in after}):
            names = several(repr(located.classes[index]) for index in emptied)
            raise DataError(f"no {part} image of {names} can be decoded, so that nothing is left of it; add images")
    content = [dataset, located.classes, sorted((name, found[name]) for name in kept.files)]
    return Seen(kept, hashlib.sha256(json.dumps(content).encode()).hexdigest(), bad)


def bad_images(bad: Sequence[tuple[Path, str]], total: int, advice: str) -> DataError:
    """Return the error that names images that cannot be decoded, the first twenty of them.

    Args:
        bad: their paths and the reasons.
        total: how many images were looked at.
        advice: what to do, with `{}` for the images.
    """
    lines = [f"{shown(path)}: this image cannot be decoded ({reason})" for path, reason in bad[:NAMED]]
    if len(bad) == 1:
        return DataError(f"{lines[0]}; {advice.format('it')}")
    lines += [f"and {len(bad) - NAMED:,} more"] * (len(bad) > NAMED)
    return DataError(*lines, f"{len(bad):,} of {total:,} images cannot be decoded; {advice.format('them')}")
