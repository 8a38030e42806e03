"""The data sets as plain data. Needs no torch."""

from dataclasses import dataclass
from typing import Literal

from sdpctl.table import Table

Augment = Literal["none", "crop", "crop-flip", "resized-crop"]
Interpolation = Literal["bilinear", "bicubic", "nearest"]

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What is known of a data set before it is opened.

    Args:
        name: what a recipe calls it.
        num_classes: or None where the folders say.
        mean: of each channel of the training images, in [0, 1].
        std: likewise.
        files: the official files, relative to the root; empty for data sets of folders and for embedded ones.
        folder: the data set's own folder below the root, for data sets of folders.
        downloadable: whether `download: true` can bring it.
    """

    name: str
    num_classes: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    files: tuple[str, ...] = ()
    folder: str | None = None
    downloadable: bool = True


DATASETS = Table(
    "data set",
    [
        DatasetInfo(name="digits", num_classes=10, mean=(0.3053,), std=(0.3760,), downloadable=False),
        DatasetInfo(
            name="mnist", num_classes=10, mean=(0.1307,), std=(0.3081,), files=tuple(f"MNIST/raw/{name}" for name in _IDX)
        ),
        DatasetInfo(
            name="fashion-mnist",
            num_classes=10,
            mean=(0.2860,),
            std=(0.3530,),
            files=tuple(f"FashionMNIST/raw/{name}" for name in _IDX),
        ),
        DatasetInfo(
            name="cifar10",
            num_classes=10,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            files=tuple(
                f"cifar-10-batches-py/{name}"
                for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
            ),
        ),
        DatasetInfo(
            name="cifar100",
            num_classes=100,
            mean=(0.5071, 0.4865, 0.4409),
            std=(0.2673, 0.2564, 0.2762),
            files=tuple(f"cifar-100-python/{name}" for name in ("train", "test", "meta")),
        ),
        DatasetInfo(
            name="tiny-imagenet",
            num_classes=200,
            mean=(0.4802, 0.4481, 0.3975),
            std=(0.2770, 0.2691, 0.2821),
            folder="tiny-imagenet-200",
        ),
        DatasetInfo(name="imagefolder", num_classes=None, mean=_IMAGENET[0], std=_IMAGENET[1], folder=".", downloadable=False),
    ],
)

DIGITS_SHA256 = "a19cb3d96bba7deace8ee5a513a6eb7bad0403d528f00bf4d351b6a7a55baa91"
"""Hash of the pixels and labels of scikit-learn's digits, uint8: what an opened set must have."""


def normalisation(dataset: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation for each of `channels` channels; grey images get the average of the colours'."""
    info = DATASETS[dataset]
    if len(info.mean) == channels:
        return info.mean, info.std
    mean, std = (sum(values) / len(values) for values in (info.mean, info.std))
    return (mean,) * channels, (std,) * channels
