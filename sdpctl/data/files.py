"""Where a data set's files lie, and what they are: the fingerprint. Needs no torch.

A fingerprint is a hash of the classes and of the sorted relative paths with each file's own hash. File hashes are kept by
size and modification time, so that only the first look at a data set reads it.
"""

import hashlib
import json
import os
import sqlite3
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sdpctl.data.catalog import DATASETS, DIGITS_SHA256
from sdpctl.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""As torchvision's ImageFolder."""


@dataclass(frozen=True)
class Located:
    """A data set whose files are there.

    Args:
        classes: their names, where folders name them; empty for official files.
        files: paths by name relative to the root.
    """

    classes: tuple[str, ...]
    files: Mapping[str, Path]


def locate(dataset: str, root: Path) -> Located:
    """Find the files of a data set.

    Raises:
        DataError: naming the folder or file that is missing or empty, and what to do.
    """
    info = DATASETS[dataset]
    if dataset == "digits":
        return Located((), {})
    where = "set data.root=FOLDER" + (", or data.download=true" if info.downloadable else "")
    if not root.is_dir():
        raise DataError(f"{root}: there is no such data folder; {where}")
    if info.files:
        missing = [name for name in info.files if not (root / name).is_file()]
        if missing:
            raise DataError(f"{root / missing[0]}: {dataset} lacks this file; {where}")
        return Located((), {name: root / name for name in info.files})
    base = root / (info.folder or ".")
    for part in ("train", "val"):
        if not (base / part).is_dir():
            raise DataError(f"{base / part}: {dataset} lacks this folder; {where}")
    classes = _class_folders(base / "train")
    files = [path for name in classes for path in _images(base / "train" / name)]
    if dataset == "tiny-imagenet":
        annotations = base / "val" / "val_annotations.txt"
        if not annotations.is_file():
            raise DataError(f"{annotations}: the official archive has this file; unpack it again")
        files += [annotations, *_images(base / "val" / "images")]
    else:
        if (found := _class_folders(base / "val")) != classes:
            odd = sorted(set(found) ^ set(classes))[0]
            raise DataError(f"{base}: train and val must have the same class folders, but only one has {odd!r}")
        files += [path for name in classes for path in _images(base / "val" / name)]
    return Located(classes, {path.relative_to(base).as_posix(): path for path in files})


def _class_folders(folder: Path) -> tuple[str, ...]:
    classes = tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()))
    if not classes:
        raise DataError(f"{folder}: no class folders; each class is a folder of images here")
    return classes


def _images(folder: Path) -> list[Path]:
    images = sorted(
        Path(parent, name)
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(IMAGE_SUFFIXES)
    )
    if not images:
        raise DataError(f"{folder}: no image in this folder; add images or remove the folder ({', '.join(IMAGE_SUFFIXES)})")
    return images


class FileHashes:
    """SHA-256 of files, remembered by size and modification time.

    Args:
        path: of the SQLite file that remembers.
        remember: whether new hashes are written there.
    """

    def __init__(self, path: Path, *, remember: bool = True) -> None:
        self.path = path
        self.remember = remember

    def of(self, files: Sequence[Path]) -> list[str]:
        """Return the hash of each file, reading those that are new or changed.

        Raises:
            DataError: where one cannot be read.
        """
        try:
            stats = [path.stat() for path in files]
            keys = [(str(path.resolve()), stat.st_size, stat.st_mtime_ns) for path, stat in zip(files, stats, strict=True)]
            known = self._known()
            new = [key for key in keys if key not in known]
            with ThreadPoolExecutor() as pool:
                known |= zip(new, pool.map(_sha256, (key[0] for key in new)), strict=True)
        except OSError as error:
            raise DataError(
                f"{error.filename}: this file cannot be read ({error.strerror}); mend its rights or remove it"
            ) from error
        if new and self.remember:
            with closing(sqlite3.connect(self.path, timeout=60)) as database, database:
                database.execute("create table if not exists files (path text primary key, size, mtime_ns, sha256)")
                database.executemany("replace into files values (?, ?, ?, ?)", [(*key, known[key]) for key in new])
        return [known[key] for key in keys]

    def _known(self) -> dict[tuple[str, int, int], str]:
        if not self.path.is_file():
            return {}
        try:
            with closing(sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True, timeout=60)) as database:
                rows = database.execute("select path, size, mtime_ns, sha256 from files")
                return {(path, size, mtime_ns): sha256 for path, size, mtime_ns, sha256 in rows}
        except sqlite3.DatabaseError as error:  # it only saves time: damaged, it is made anew
            if error.sqlite_errorcode in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT) and self.remember:
                self.path.unlink()
            return {}


def _sha256(path: str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(dataset: str, located: Located, hashes: FileHashes) -> str:
    """Return the hash by which this very data is known."""
    if dataset == "digits":
        return DIGITS_SHA256
    names = sorted(located.files)
    content = [dataset, located.classes, list(zip(names, hashes.of([located.files[n] for n in names]), strict=True))]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
