"""The interface of a data set's code: find its files, download them, and open its two splits. Importing it needs no torch."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sdpctl.data.catalog import DATASETS, DatasetInfo
from sdpctl.errors import DataError
from sdpctl.table import load
from sdpctl.untrusted import printable_path

if TYPE_CHECKING:
    from sdpctl.data.source import Source


AS_USUAL: Mapping[str, Any] = MappingProxyType({})
"""The arrangement of an image folder as train and val."""


@dataclass(frozen=True)
class Located:
    """A data set whose files were found.

    Args:
        classes: names of the classes if folders name them; empty for a data set in an official format.
        files: path of each file, by its name relative to the data set's folder.
        train: name and class index of each training image; empty for a data set in an official format.
        test: name and class index of each test image; empty for a data set in an official format.
        fingerprint: the fingerprint of a data set without files; None if it is computed from the files.
    """

    classes: tuple[str, ...]
    files: Mapping[str, Path]
    train: tuple[tuple[str, int], ...] = ()
    test: tuple[tuple[str, int], ...] = ()
    fingerprint: str | None = None

    def without(self, names: Iterable[str]) -> "Located":
        """Return a copy without the images of these names."""
        left_out = set(names)
        kept = {name: path for name, path in self.files.items() if name not in left_out}
        train, test = (tuple(image for image in images if image[0] in kept) for images in (self.train, self.test))
        return replace(self, files=kept, train=train, test=test)


class Reader(ABC):
    """Reads one data set. The modules of the data sets import torch inside their methods, since locating needs none.

    Args:
        info: the data set's entry in `DATASETS`.
        folders: of an image folder: names of the folders of the training and of the test images.
        test_share: of an image folder whose class folders are not split: share of each class that is tested.
    """

    def __init__(self, info: DatasetInfo, *, folders: tuple[str, str] = ("train", "val"), test_share: float = 0) -> None:
        self.info, self.folders, self.test_share = info, folders, test_share

    @abstractmethod
    def locate(self, root: Path, *, partial: bool) -> Located:
        """Find the files of the data set.

        Args:
            root: the folder that holds the files.
            partial: whether a class may lack images, or its folder, in one split.

        Raises:
            DataError: if a folder or file is missing or empty.
            OSError: if a folder or file cannot be read.
        """

    @abstractmethod
    def open(self, root: Path, located: Located) -> "tuple[Source, Source]":
        """Open the training split and the test split of files that `locate` found.

        Raises:
            DataError: if the content of the files is not valid.
        """

    def class_names(self, root: Path, *, partial: bool) -> tuple[str, ...]:
        """Return the names of the classes.

        Raises:
            DataError: if a folder or file is missing or empty.
            OSError: if a folder or file cannot be read.
        """
        return self.locate(root, partial=partial).classes

    def download(self, root: Path) -> None:
        """Download the data set into an existing folder; archives that are already in the folder are not fetched again.

        Raises:
            DataError: if the data set cannot be downloaded at all.
            OSError: if the network or the folder fails.
            RuntimeError: if a downloaded file is damaged.
        """
        raise DataError(f"{self.info.name} is not downloaded; put its files into {printable_path(root)}")

    @property
    def advice(self) -> str:
        """What a user can do about missing files."""
        return "set data.root=FOLDER" + (", or data.download=true" if self.info.downloadable else "")

    def require_root(self, root: Path) -> None:
        """Check that the folder that holds the files exists.

        Raises:
            DataError: if the folder does not exist.
        """
        if not root.is_dir():
            raise DataError(f"{printable_path(root)}: there is no such data folder; {self.advice}")


def reader_of(dataset: str, arrangement: Mapping[str, Any] = AS_USUAL) -> Reader:
    """Return the reader of a data set.

    Args:
        dataset: name of the data set in `DATASETS`.
        arrangement: `folders` and `test_share` of an image folder that is not arranged as train and val.
    """
    info = DATASETS[dataset]
    reader: Reader = load(info.code)(info, **arrangement)
    return reader
