"""The data sets as plain data. Importing this module needs no torch."""

from dataclasses import dataclass
from typing import Literal

from sdpctl.table import Table

Augment = Literal["none", "crop", "crop-flip", "resized-crop"]
AutoAugment = Literal["trivial", "rand"]
Balance = Literal["sampler", "loss"]
Caching = Literal["none", "ram", "disk"]
Decoder = Literal["torchvision", "pil", "nvjpeg"]
Identify = Literal["content", "stat"]
Interpolation = Literal["bilinear", "bicubic", "nearest"]


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """The facts about a data set that are known without its files.

    Args:
        name: name of the data set in recipes.
        num_classes: number of classes; None if it is the number of class folders.
        mean: mean of each channel of the training images, in [0, 1].
        std: standard deviation of each channel of the training images, in [0, 1].
        downloadable: whether `data.download=true` can fetch it.
        image_files: whether each image is a file, which is decoded when a batch is loaded, and which `data.identify=stat` tells
            from others without reading it; otherwise the images are in memory.
        code: the data set's `Reader`, as `module:class`.
    """

    name: str
    num_classes: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    downloadable: bool = False
    image_files: bool = False
    code: str

    @property
    def classes_from_folders(self) -> bool:
        """Whether the class folders define the classes, so that a split may be allowed to lack a class."""
        return self.num_classes is None


DATASETS = Table(
    "data set",
    [
        DatasetInfo(name="digits", num_classes=10, mean=(0.3053,), std=(0.3760,), code="sdpctl.data.digits:Digits"),
        DatasetInfo(
            name="mnist",
            num_classes=10,
            mean=(0.1307,),
            std=(0.3081,),
            downloadable=True,
            code="sdpctl.data.official:Mnist",
        ),
        DatasetInfo(
            name="fashion-mnist",
            num_classes=10,
            mean=(0.2860,),
            std=(0.3530,),
            downloadable=True,
            code="sdpctl.data.official:FashionMnist",
        ),
        DatasetInfo(
            name="cifar10",
            num_classes=10,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            downloadable=True,
            code="sdpctl.data.official:Cifar10",
        ),
        DatasetInfo(
            name="cifar100",
            num_classes=100,
            mean=(0.5071, 0.4865, 0.4409),
            std=(0.2673, 0.2564, 0.2762),
            downloadable=True,
            code="sdpctl.data.official:Cifar100",
        ),
        DatasetInfo(
            name="tiny-imagenet",
            num_classes=200,
            mean=(0.4802, 0.4481, 0.3975),
            std=(0.2770, 0.2691, 0.2821),
            downloadable=True,
            image_files=True,
            code="sdpctl.data.folders:TinyImageNet",
        ),
        DatasetInfo(  # normalised as ImageNet is
            name="imagefolder",
            num_classes=None,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            image_files=True,
            code="sdpctl.data.folders:ImageFolder",
        ),
    ],
)


def normalisation(dataset: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each of `channels` channels, in [0, 1].

    If the number of channels differs from the data set's own, every channel gets the average over the data set's channels.
    """
    info = DATASETS[dataset]
    if len(info.mean) == channels:
        return info.mean, info.std
    mean, std = (sum(values) / len(values) for values in (info.mean, info.std))
    return (mean,) * channels, (std,) * channels
