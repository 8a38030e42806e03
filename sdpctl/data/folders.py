"""Data sets that are folders of image files: a user's own image folder, and Tiny ImageNet. Locating needs no torch."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sdpctl.data.files import IMAGE_SUFFIXES, images_in, several
from sdpctl.data.reader import Located, Reader
from sdpctl.errors import DataError
from sdpctl.untrusted import printable, printable_path, read_regular

if TYPE_CHECKING:
    from sdpctl.data.source import Source

ANNOTATIONS_BYTES = 64 * 2**20
"""Maximum size of Tiny ImageNet's annotations, in bytes."""


class FolderReader(Reader):
    """Reads image files below the folders `train` and `val`; `val` is the test split."""

    folder: ClassVar[str] = "."
    """The folder below the root that holds `train` and `val`."""

    def _require_splits(self, root: Path) -> Path:
        """Check that both splits exist, and return the folder that holds them."""
        self.require_root(root)
        base = root / self.folder
        for part in self.folders:
            if not (base / part).is_dir():
                raise DataError(f"{printable_path(base / part)}: this folder of {self.info.name} is missing; {self.advice}")
        return base

    def open(self, root: Path, located: Located) -> "tuple[Source, Source]":  # noqa: ARG002  the paths are in `located`
        """Return the paths and labels of both splits; the images are decoded when batches are loaded."""
        return _source(located, located.train), _source(located, located.test)


def _source(located: Located, images: Sequence[tuple[str, int]]) -> "Source":
    import torch

    from sdpctl.data.source import Source

    paths = tuple(located.files[name] for name, _ in images)
    return Source(paths, torch.tensor([label for _, label in images]), located.classes)


class ImageFolder(FolderReader):
    """Reads `train/CLASS/...` and `val/CLASS/...`, or `CLASS/...` of which a share is tested; classes are in sorted order."""

    def locate(self, root: Path, *, partial: bool) -> Located:
        """Find the images of each class."""
        if self.test_share:
            return self._divided(root, partial=partial)
        base = self._require_splits(root)
        classes = _common_classes(base, self.folders, partial=partial)
        files: dict[str, Path] = {}
        splits: dict[str, tuple[tuple[str, int], ...]] = {}
        for part in self.folders:
            images: list[tuple[str, int]] = []
            for index, name in enumerate(classes):
                folder = base / part / name
                paths = images_in(folder) if not partial or folder.is_dir() else []
                if not paths and not partial:
                    raise _no_images(folder)
                named = {path.relative_to(base).as_posix(): path for path in paths}
                files |= named
                images += [(image, index) for image in named]
            if not images:
                raise _no_images(base / part)
            splits[part] = tuple(images)
        return Located(classes, files, splits[self.folders[0]], splits[self.folders[1]])

    def _divided(self, root: Path, *, partial: bool) -> Located:
        """Divide the images of class folders that are not split.

        Within each class the images are ordered by the hashes of their names, and the first ones are tested. So the same images
        are tested on every machine, and a new image moves at most one other from one split to the other.
        """
        self.require_root(root)
        classes = tuple(sorted(_class_folders(root)))
        files: dict[str, Path] = {}
        train, test = [], []
        for index, name in enumerate(classes):
            named = {path.relative_to(root).as_posix(): path for path in images_in(root / name)}
            if not named and not partial:
                raise _no_images(root / name)
            files |= named
            tested = set(sorted(named, key=_place)[: _number_of_tested(self.test_share, len(named))])
            test += [(image, index) for image in named if image in tested]
            train += [(image, index) for image in named if image not in tested]
        if not train or not test:
            raise DataError(f"{printable_path(root)}: too few images to test {self.test_share:.0%} of each class; add images")
        return Located(classes, files, tuple(train), tuple(test))

    def class_names(self, root: Path, *, partial: bool) -> tuple[str, ...]:
        """Return the names of the class folders, without looking for images."""
        base = root / self.folder
        if self.test_share:
            self.require_root(root)
            return tuple(sorted(_class_folders(root)))
        for folder in (root, *(base / part for part in self.folders)):
            if not folder.is_dir():
                raise DataError(f"{printable_path(folder)}: there is no such folder; set data.root=FOLDER")
        return _common_classes(base, self.folders, partial=partial)


def _place(name: str) -> bytes:
    """Return the place of an image in the order in which images are taken to be tested."""
    return hashlib.sha256(os.fsencode(name)).digest()


def _number_of_tested(share: float, images: int) -> int:
    """Return how many images of a class are tested: the rounded share, but one at least, and never the only image."""
    return min(max(1, round(share * images)), max(0, images - 1))


class TinyImageNet(FolderReader):
    """Reads Tiny ImageNet's archive: `train/WORDNET_ID/images`, and `val/images` with a list of annotations."""

    folder = "tiny-imagenet-200"
    archive = ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")
    """Address and MD5 of the official archive."""

    def locate(self, root: Path, *, partial: bool) -> Located:  # noqa: ARG002  the archive is always whole
        """Find the images of each class, and the annotations of the test split."""
        base = self._require_splits(root)
        annotations, folder = base / "val" / "val_annotations.txt", base / "val" / "images"
        classes = tuple(sorted(_class_folders(base / "train")))
        files, train, test = {}, [], []
        for index, name in enumerate(classes):
            paths = images_in(base / "train" / name)
            if not paths:
                raise _no_images(base / "train" / name)
            for path in paths:
                files[path.relative_to(base).as_posix()] = path
                train.append((path.relative_to(base).as_posix(), index))
        lines = _annotation_lines(annotations)
        paths = images_in(folder)
        if not paths:
            raise _no_images(folder)
        files |= {path.relative_to(base).as_posix(): path for path in paths}
        files[annotations.relative_to(base).as_posix()] = annotations
        for number, line in enumerate(lines, 1):
            name, _, rest = line.partition("\t")
            wordnet_id = rest.split("\t")[0]
            place = f"{printable_path(annotations)}:{number}"
            if wordnet_id not in classes:
                raise DataError(f"{place}: {wordnet_id!r} is not a class of the training split; unpack the archive again")
            if (image := f"val/images/{name}") not in files:
                raise DataError(f"{place}: {name!r} is not in val/images; unpack the archive again")
            test.append((image, classes.index(wordnet_id)))
        return Located(classes, files, tuple(train), tuple(test))

    def download(self, root: Path) -> None:
        """Download and unpack the official archive."""
        from torchvision.datasets.utils import download_and_extract_archive

        url, md5 = self.archive
        download_and_extract_archive(url, str(root), md5=md5)


def _annotation_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(f"{printable_path(path)}: the official archive has this file; unpack it again")
    try:
        return read_regular(path, limit=ANNOTATIONS_BYTES).decode().splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{printable_path(path)}: this is not UTF-8 text ({error.reason}); unpack the archive again") from error


def _no_images(folder: Path) -> DataError:
    suffixes = ", ".join(IMAGE_SUFFIXES)
    return DataError(f"{printable_path(folder)}: no image in this folder; add images or remove the folder ({suffixes})")


def _common_classes(base: Path, folders: tuple[str, str], *, partial: bool) -> tuple[str, ...]:
    """Return the sorted names of the class folders; with `partial`, those of either split."""
    train, val = (_class_folders(base / part) for part in folders)
    lacking = {folders[1]: sorted(train - val), folders[0]: sorted(val - train)}
    if any(lacking.values()) and not partial:
        both = " and ".join(map(printable, folders))
        lacks = "; ".join(f"{printable(part)} lacks {several(map(repr, names))}" for part, names in lacking.items() if names)
        raise DataError(
            f"{printable_path(base)}: {both} must have the same class folders, but {lacks}; add "
            "them, or set data.partial=true if they are missing on purpose"
        )
    return tuple(sorted(train | val))


def _class_folders(folder: Path) -> set[str]:
    with os.scandir(folder) as entries:
        names = {entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()}
    if not names:
        raise DataError(f"{printable_path(folder)}: no class folders; put the images of each class into a folder here")
    for name in sorted(names):
        if any("\udc80" <= character <= "\udcff" for character in name):
            raise DataError(f"{printable_path(folder / name)}: the name of this class is not UTF-8; rename the folder")
    return names
