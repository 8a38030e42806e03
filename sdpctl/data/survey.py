"""A look at an image folder before a recipe exists: how it is arranged, what its images are, and what is wrong with them.

The rules of image folders are those of `folders.py`; this module finds the keys by which its reader accepts a folder. It needs
no torch.
"""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median_low
from typing import Any

from sdpctl.data.files import IMAGE_SUFFIXES, Unreadable, Watch, images_in, locate, on_all_cores, unreadable
from sdpctl.data.images import Facts, facts_of
from sdpctl.data.reader import Located
from sdpctl.errors import DataError
from sdpctl.untrusted import printable, printable_path

TRAINING = ("train", "training")
TESTING = ("val", "valid", "validation", "test", "testing")
"""Names of folders that hold training and test images, the preferred first, compared without regard to case."""

USUAL = ("train", "val")
"""The folders of an image folder that needs no keys."""

TEST_SHARE = 0.2
"""Share of each class that is tested where the folder does not say which images are."""

DEEPEST = 8
"""Maximum number of folders that hold nothing but one folder each, above the images."""


@dataclass(frozen=True)
class Survey:
    """What is in an image folder.

    Args:
        root: the folder that holds the splits or the classes; the folder itself or one below it.
        arrangement: keys of `data` by which the reader accepts the folder: `folders` or `test_share`.
        located: the images by class and split, unreadable ones too.
        looked: what is known of each image that can be used, by its name.
        unreadable: the reason for each image that cannot be used, by its name.
        others: number of other files by suffix; hidden files are not counted.
        loose: number of images that are outside every class folder.
        unused: names of folders beside the splits that are not used.
        nested: classes that have folders of images within them.
    """

    root: Path
    arrangement: Mapping[str, Any]
    located: Located
    looked: Mapping[str, Facts]
    unreadable: Mapping[str, str]
    others: Mapping[str, int]
    loose: int
    unused: Sequence[str] = ()
    nested: Sequence[str] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.located.classes

    @property
    def parts(self) -> tuple[str, str]:
        """What the two splits are called: the names of their folders, or `train` and `test` if the images are divided."""
        train, test = self.arrangement.get("folders", ("train", "test") if "test_share" in self.arrangement else USUAL)
        return train, test

    @cached_property
    def counts(self) -> tuple[list[int], list[int]]:
        """Number of usable images of each class in training and in test."""
        numbers = [Counter(label for name, label in images if name in self.looked) for images in self._splits]
        train, test = ([number[i] for i in range(len(self.classes))] for number in numbers)
        return train, test

    @property
    def _splits(self) -> tuple[tuple[tuple[str, int], ...], ...]:
        return self.located.train, self.located.test

    def lacking(self, part: int) -> list[str]:
        """Return the classes that have no image in a split: 0 for training, 1 for test."""
        there = {label for _, label in self._splits[part]}
        return [name for label, name in enumerate(self.classes) if label not in there]

    def emptied(self, part: int) -> list[str]:
        """Return the classes all of whose images in a split cannot be decoded."""
        there = {label for _, label in self._splits[part]}
        return [name for label, name in enumerate(self.classes) if label in there and not self.counts[part][label]]

    @cached_property
    def sizes(self) -> list[tuple[int, int, str]]:
        """Width, height and name of each usable image, ordered by the shorter side."""
        found = [(facts.width, facts.height, name) for name, facts in self.looked.items()]
        return sorted(found, key=lambda size: (min(size[:2]), max(size[:2]), size[2]))

    @property
    def side(self) -> int:
        """The median of the shorter sides, in pixels."""
        return median_low(min(width, height) for width, height, _ in self.sizes)

    def smaller(self, side: float) -> list[str]:
        """Return the names of the images whose shorter side is below a number of pixels."""
        return [name for width, height, name in self.sizes if min(width, height) < side]

    @cached_property
    def groups(self) -> "Groups":
        """The images that occur more than once."""
        return Groups.of(self)

    @cached_property
    def modes(self) -> Counter[str]:
        """Number of usable images of each kind of colour."""
        return Counter(_colour(facts) for facts in self.looked.values())

    @property
    def grey(self) -> bool:
        """Whether all images are grey."""
        return all(facts.mode in _GREY for facts in self.looked.values())

    @property
    def similar(self) -> list[list[str]]:
        """Return groups of classes whose names differ only in case, spaces, hyphens, underscores, or Unicode form."""
        by: dict[str, list[str]] = {}
        for name in self.classes:
            plain = unicodedata.normalize("NFKC", name).casefold()
            by.setdefault("".join(filter(str.isalnum, plain)) or name, []).append(name)
        return [names for names in by.values() if len(names) > 1]


_GREY = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")


def _colour(facts: Facts) -> str:
    deep = facts.mode == "F" or facts.mode.startswith("I")
    kind = "grey" if facts.mode in _GREY else "CMYK" if facts.mode == "CMYK" else "colour"
    kind += " of more than 8 bits" * deep
    return kind + " with transparency" * facts.transparent


@dataclass(frozen=True)
class Groups:
    """Images that occur more than once, by name; the first of a group is the first in the order of the folders.

    Args:
        within: groups within one split and one class.
        across: groups with images in both splits, all their images.
        labelled: groups with images in several classes, all their images.
    """

    within: Sequence[Sequence[str]]
    across: Sequence[Sequence[str]]
    labelled: Sequence[Sequence[str]]

    @classmethod
    def of(cls, survey: Survey) -> "Groups":
        """Find the images of a survey that have the same pixels; files of equal content have them too."""
        place = {name: (part, label) for part, images in enumerate(survey._splits) for name, label in images}
        alike: dict[str, list[str]] = {}
        for name, facts in survey.looked.items():
            alike.setdefault(facts.pixels, []).append(name)
        groups = [sorted(names, key=lambda name: (*place[name], name)) for names in alike.values() if len(names) > 1]
        groups.sort(key=lambda names: names[0])
        across = [names for names in groups if len({place[name][0] for name in names}) > 1]
        labelled = [names for names in groups if len({place[name][1] for name in names}) > 1]
        within = [names for names in groups if len({place[name] for name in names}) == 1]
        return cls(within, across, labelled)


def survey(folder: Path, watch: Watch) -> Survey:
    """Look at a folder, and decode all its images on all cores.

    Args:
        folder: the folder.
        watch: shows the progress.

    Raises:
        DataError: if the folder cannot be read, or nothing in it can be used; the message says what to do.
        LoaderError: if a process that looks at files died.
    """
    try:
        root, arrangement, unused = _arranged(folder)
        located = locate("imagefolder", root, partial=True, arrangement=arrangement)
        others, loose, nested = _beside(root, arrangement, located)
    except OSError as error:
        raise unreadable(error) from error
    if len(located.classes) < 2:
        raise DataError(
            f"{printable_path(root)}: there is only one class, {printable(located.classes[0])!r}; put the images of each class "
            "into a folder of their own, beside this one"
        )
    found = zip(located.files, watch(on_all_cores(_look, list(located.files.values())), len(located.files)), strict=True)
    looked: dict[str, Facts] = {}
    bad: dict[str, str] = {}
    for name, result in found:
        if isinstance(result, Facts):
            looked[name] = result
        elif isinstance(result, Unreadable):
            bad[name] = result.reason
    if not looked:
        raise DataError(
            f"{printable_path(root)}: none of the {len(located.files):,} images can be decoded, for example "
            f"{printable(next(iter(bad)))} ({next(iter(bad.values()))}); replace them"
        )
    return Survey(root, arrangement, located, looked, bad, others, loose, unused, nested)


def _look(path: Path) -> Facts | Unreadable:
    try:
        return facts_of(path)
    except DataError as error:
        return Unreadable(str(error))


def _arranged(folder: Path) -> tuple[Path, Mapping[str, Any], list[str]]:
    """Find the folder that holds the splits or the classes, the keys for the reader, and the folders that are not used.

    Raises:
        DataError: if there is no such folder.
        OSError: if a folder cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"{printable_path(folder)}: there is no such folder; give the folder that holds your images")
    root = folder
    for _ in range(DEEPEST):
        folders, images = _entries(root)
        train, test = _named(folders, TRAINING), _named(folders, TESTING)
        if train and test:
            usual = (train[0], test[0]) == USUAL
            arrangement: dict[str, Any] = {} if usual else {"folders": (train[0], test[0])}
            return root, arrangement, [name for name in folders if name not in (train[0], test[0])]
        if train or (len(folders) == 1 and not images):
            root /= (train or folders)[0]
            continue
        if folders:
            return _class_folders(root, folders)
        break
    raise DataError(_nothing(folder, root))


def _nothing(folder: Path, root: Path) -> str:
    images = len(images_in(folder))
    if not images:
        return (
            f"{printable_path(folder)}: no image in this folder or the folders below it; give the folder that holds your "
            f"images ({', '.join(IMAGE_SUFFIXES)})"
        )
    return (
        f"{printable_path(root)}: {images:,} images, but no class folders: the folder of an image names its class; make a "
        "folder for each class here, and move the images into them"
    )


def _class_folders(root: Path, folders: Sequence[str]) -> tuple[Path, Mapping[str, Any], list[str]]:
    """Return the arrangement of a folder with class folders that are not split.

    Raises:
        DataError: if the folders are data sets of their own, or none holds an image.
    """
    sets = [name for name in folders if _named(_entries(root / name)[0], TRAINING)]
    if sets:
        raise DataError(
            f"{printable_path(root)}: {', '.join(map(printable, sets[:5]))} {'is' if len(sets) == 1 else 'are'} split into "
            f"training and test images {'itself' if len(sets) == 1 else 'themselves'}; give one of these folders, for example "
            f"{printable_path(root / sets[0])}"
        )
    if not any(images_in(root / name) for name in folders):
        raise DataError(_nothing(root, root))
    return root, {"test_share": TEST_SHARE}, []


def _entries(folder: Path) -> tuple[list[str], int]:
    """Return the names of the folders in a folder, sorted, and the number of its images; hidden ones are left out."""
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(".")]
        folders = sorted(entry.name for entry in shown if entry.is_dir())
        return folders, sum(entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.is_dir() for entry in shown)


def _named(folders: Iterable[str], wanted: Sequence[str]) -> list[str]:
    """Return the folders that have one of the wanted names, the preferred first."""
    return sorted(
        (name for name in folders if name.lower() in wanted),
        key=lambda name: (wanted.index(name.lower()), name.lower() != name),
    )


def _beside(root: Path, arrangement: Mapping[str, Any], located: Located) -> tuple[Mapping[str, int], int, list[str]]:
    """Count the files that are not images, by suffix, and the images outside every class folder; name the nested classes."""
    folders = [root] if "test_share" in arrangement else [root / part for part in arrangement.get("folders", USUAL)]
    others: Counter[str] = Counter()
    loose = 0 if root in folders else _entries(root)[1]
    for folder in folders:
        loose += _entries(folder)[1]
        for _, below, files in os.walk(folder):
            below[:] = [name for name in below if not name.startswith(".")]
            shown = [name for name in files if not name.startswith(".") and not name.lower().endswith(IMAGE_SUFFIXES)]
            others.update(Path(name).suffix.lower() or "no suffix" for name in shown)
    depth = 2 if "test_share" in arrangement else 3
    deep = {label for name, label in (*located.train, *located.test) if name.count("/") >= depth}
    return dict(others), loose, [located.classes[label] for label in sorted(deep)]
