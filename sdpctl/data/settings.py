"""The section `data` of a recipe: which images, and how they become batches."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, WithJsonSchema

from sdpctl.bounds import LARGEST_IMAGE, MOST
from sdpctl.data.catalog import (
    DATASETS,
    Augment,
    AutoAugment,
    Balance,
    Caching,
    Decoder,
    Identify,
    Interpolation,
    normalisation,
)
from sdpctl.errors import shortened, shown
from sdpctl.section import NameIn, Section


def _share(value: object) -> object:
    if isinstance(value, str) and value.endswith("%"):
        if not re.fullmatch(r"\s*[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?\s*%", value, re.IGNORECASE):
            raise ValueError(f"{shown(value)} is not a share; write 10% or 0.1")
        return float(value[:-1]) / 100
    if isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value < 100:
        raise ValueError(f"this should be less than 1, got {value:g}; write {value:g}% or {value / 100:g}")
    return value


def _plain_name(name: str) -> str:
    if not name or name.startswith(".") or {"/", "\0"} & set(name):
        raise ValueError(f"{shown(name)} is not the name of a folder in data.root; write one name, without a slash")
    return name


def _auto_is_none(value: object) -> object:
    if isinstance(value, str) and value != "auto":
        raise ValueError(f"{shown(value)} is not a number of processes; write auto or a number")
    return None if value == "auto" else value


def _existing_home(root: str) -> str:
    try:
        folder = Path(root).expanduser()
    except RuntimeError:
        user = Path(root).parts[0]
        raise ValueError(
            f"{shortened(user)} is not the home of a user of this machine; write ./{shortened(root)} for a folder of this name"
        ) from None
    name, path = (os.pathconf("/", key) for key in ("PC_NAME_MAX", "PC_PATH_MAX"))
    if len(os.fsencode(folder)) >= path or any(len(os.fsencode(part)) > name for part in folder.parts):
        raise ValueError(f"{shortened(root)} is longer than a path may be")
    return root


Share = Annotated[
    float,
    BeforeValidator(_share),
    Field(ge=0, lt=1),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0, "exclusiveMaximum": 1}, {"type": "string", "pattern": "%$"}]}),
]

FolderName = Annotated[str, AfterValidator(_plain_name)]
"""The name of a folder within the root of the data."""

Workers = Annotated[
    Annotated[int, Field(ge=0, le=1024)] | None,
    BeforeValidator(_auto_is_none),
    PlainSerializer(lambda workers: "auto" if workers is None else workers),
    WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 0, "maximum": 1024}]}),
]
"""A number of processes; None, written `auto`, for a number that suits the machine."""


MOST_AUTOMATIC = 16
"""Maximum number of worker processes that `workers: auto` starts for one part of the data."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How training images become the batches of a calibration.

    Args:
        batch_size: images of a batch.
        image_size: height and width of an image, in pixels.
        augmented: whether the images are augmented as in training; otherwise they are transformed as test images are.
    """

    batch_size: int
    image_size: int
    augmented: bool = True


@dataclass(frozen=True, kw_only=True)
class DataSettings(Section):
    """The images.

    Args:
        dataset: the data set.
        root: the folder that holds the files; not part of a result.
        image_size: height and width of an image as the network sees it, in pixels.
        augment: augmentation of the training images; it also determines the test transform.
        auto_augment: random changes of colour and geometry after crop and flip, with torchvision's strengths: `trivial`
            (TrivialAugment, Müller & Hutter 2021) or `rand` (RandAugment, Cubuk et al. 2020); off by default.
        random_erasing: probability that a random rectangle of a training image is filled with the mean colour (Zhong et al.
            2020); off by default.
        balance: for classes of unequal size. With `sampler`, each class has the same share of the images of an epoch and of a
            calibration: they are drawn with replacement. With `loss`, each class is weighted by n/(K*n_c) in the training loss,
            for n_c of n images in one of K classes. Off by default.
        batch_size: images of a training or calibration batch: BatchNorm needs two images or more. Several processes share each
            training batch.
        workers: processes that decode and augment; with `auto`, one for each core but one, at most 16, and none if there is
            nothing to do; not part of a result.
        download: download the files that are missing; not part of a result.
        identify: of image files: what the fingerprint is made of. With `content`, the first look reads and decodes every file.
            With `stat`, it takes the names and sizes of the images without reading them: a changed image of the same size is
            not noticed, and an image that cannot be decoded ends the command when it is loaded.
        skip_unreadable: leave out images that cannot be decoded; the fingerprint covers the other images; not part of a result.
        partial: of an image folder: a class may lack images in train or in val; the classes of both are used.
        folders: of an image folder: names of the folders of the training images and of the test images, by default train and
            val.
        test_share: of an image folder that holds class folders alone, without train and val: share of each class that is
            tested, chosen by the names of the images.
        holdout: share of each class that is kept out of training, to choose instances by.
        mean: mean of each channel, in [0, 1], which is subtracted from the pixels; the data set's own by default.
        std: standard deviation of each channel, in [0, 1], by which the pixels are divided; the data set's own by default.
        resize: shorter side of a test image, in pixels, before its central part is taken; by default the size of the part, or
            256/224 of it with `augment: resized-crop`.
        interpolation: interpolation of resizing; bilinear by default.
        decoder: decoder of image files: `torchvision` (libjpeg-turbo, and only the needed part is resized), `nvjpeg`, which
            decodes and resizes on an NVIDIA GPU, or `pil`, the slowest; the pixels differ slightly.
        cache: keep images that were resized once, in memory (`ram`) or in a file beside the store (`disk`), so that nothing is
            decoded again; not part of a result.
        presize: with `augment: resized-crop`, take training crops from images that were resized as test images are, instead of
            from the images themselves; by default only with a cache, which keeps resized images.
        fingerprint: hash of classes and files; if it is given, the data must match it.
    """

    dataset: Annotated[str, NameIn(DATASETS)]
    root: Annotated[str, AfterValidator(_existing_home)] = "data"
    image_size: Annotated[int, Field(ge=1, le=LARGEST_IMAGE)] = 32
    augment: Augment = "none"
    auto_augment: AutoAugment | None = None
    random_erasing: Annotated[float, Field(gt=0, le=1)] | None = None
    balance: Balance | None = None
    batch_size: Annotated[int, Field(ge=2, le=MOST)] = 64
    workers: Annotated[Workers, Field(json_schema_extra={"default": "auto"})] = None
    download: bool = False
    identify: Identify = "content"
    skip_unreadable: bool = False
    partial: bool | None = None
    folders: tuple[FolderName, FolderName] | None = None
    test_share: Annotated[Share, Field(gt=0)] | None = None
    holdout: Share = 0.1
    mean: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None = None
    std: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = None
    resize: Annotated[int, Field(ge=1, le=LARGEST_IMAGE)] | None = None
    interpolation: Interpolation | None = None
    decoder: Decoder = "torchvision"
    cache: Caching = "none"
    presize: bool | None = None
    fingerprint: str | None = None

    @property
    def processes(self) -> int:
        """The number of worker processes: the chosen one, or one for each core of this machine that may be used, but one.

        The cores are shared by the processes that torchrun starts on a machine.
        """
        if self.workers is not None:
            return self.workers
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return max(1, min(cores - 1, MOST_AUTOMATIC))

    @property
    def preparation(self) -> Preparation:
        """How training images become the batches of a training."""
        return Preparation(batch_size=self.batch_size, image_size=self.image_size)

    @property
    def presizes(self) -> bool:
        """Whether random crops are taken from resized images."""
        return self.augment == "resized-crop" and (self.cache != "none" if self.presize is None else self.presize)

    @property
    def arrangement(self) -> dict[str, Any]:
        """How an image folder is arranged, for its reader; empty if it has train and val."""
        chosen = {"folders": self.folders, "test_share": self.test_share}
        return {key: value for key, value in chosen.items() if value is not None}

    @property
    def folder(self) -> Path:
        """The root as a path, with `~` replaced by the home folder."""
        return Path(self.root).expanduser()

    def normalisation(self, in_channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation of each channel, in [0, 1]."""
        mean, std = normalisation(self.dataset, in_channels)
        return self.mean or mean, self.std or std

    def side_of(self, size: int) -> int:
        """Return the shorter side of a test image, in pixels, before its central part is taken.

        Args:
            size: height and width of the part, in pixels.
        """
        usual = round(size * 256 / 224) if self.augment == "resized-crop" else size
        return self.resize or usual

    @property
    def resampling(self) -> Interpolation:
        """The interpolation of resizing: the chosen one, or bilinear."""
        return self.interpolation or "bilinear"
