"""Opening data sets, through torchvision's own classes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.utils import download_and_extract_archive

from sdpctl.data.catalog import DATASETS, DIGITS_SHA256
from sdpctl.data.files import Located, shown
from sdpctl.errors import DataError
from sdpctl.randomness import stream

_TORCHVISION = {
    "mnist": datasets.MNIST,
    "fashion-mnist": datasets.FashionMNIST,
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
}
_TINY_IMAGENET = ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")


@dataclass(frozen=True)
class Source:
    """One split of a data set, undecoded or raw.

    Args:
        images: uint8 (N, C, H, W) where all fit into memory, else the paths of N files.
        labels: int64, (N,).
        classes: the classes' names, K of them.
    """

    images: Tensor | Sequence[Path]
    labels: Tensor
    classes: tuple[str, ...]


def download(dataset: str, root: Path) -> None:
    """Bring a data set from where its authors keep it; archives that are there already are not fetched again.

    Raises:
        DataError: where it cannot be had.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        if dataset == "tiny-imagenet":
            url, md5 = _TINY_IMAGENET
            download_and_extract_archive(url, str(root), md5=md5)
        else:
            _TORCHVISION[dataset](root, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{shown(root)}: {dataset} could not be downloaded ({error}); fetch it by hand and set data.root"
        ) from error


def open_sources(dataset: str, root: Path, located: Located) -> tuple[Source, Source]:
    """Open a data set whose files are there.

    Args:
        dataset: a name of the catalog.
        root: the folder its files are in.
        located: its files, as `locate` found them.

    Returns:
        The training split and the test split.

    Raises:
        DataError: where its files do not hold what they should.
    """
    if dataset == "digits":
        return _digits()
    if dataset not in _TORCHVISION:
        return _files(located, located.train), _files(located, located.test)
    opened = _TORCHVISION[dataset]
    try:
        train, test = _in_memory(opened(root, train=True)), _in_memory(opened(root, train=False))
    except (OSError, RuntimeError, EOFError, ValueError, AssertionError) as error:
        reason = str(error) or "not in the official format"
        raise DataError(f"{shown(root)}: {dataset} cannot be read ({reason}); fetch it again") from error
    if len(train.classes) != DATASETS[dataset].num_classes:
        raise DataError(f"{shown(root)}: {dataset} has {len(train.classes)} classes there; fetch it again")
    return train, test


def _in_memory(opened: datasets.MNIST | datasets.CIFAR10) -> Source:
    images = torch.as_tensor(opened.data)
    images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
    return Source(images, torch.as_tensor(opened.targets), tuple(opened.classes))


def _files(located: Located, images: Sequence[tuple[str, int]]) -> Source:
    paths = tuple(located.files[name] for name, _ in images)
    return Source(paths, torch.tensor([label for _, label in images]), located.classes)


def _digits() -> tuple[Source, Source]:
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    images = np.rint(pixels.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = targets.astype(np.uint8)
    if hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest() != DIGITS_SHA256:
        raise DataError("scikit-learn's digits are not the known 1,797 images; install scikit-learn again")
    test = torch.tensor(stratified(labels.tolist(), 0.2, seed=0, name="digits"))
    train = torch.tensor(sorted(set(range(len(labels))) - set(test.tolist())))
    classes = tuple("0123456789")
    x_NCHW, labels_N = torch.from_numpy(images), torch.from_numpy(labels).long()
    return Source(x_NCHW[train], labels_N[train], classes), Source(x_NCHW[test], labels_N[test], classes)


def stratified(labels: Sequence[int], share: float, *, seed: int, name: str) -> list[int]:
    """Draw a share of every class.

    Returns:
        Sorted indices: of each class the share, rounded, drawn from (seed, name, class).
    """
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    drawn = (stream(seed, name, label).sample(indices, round(share * len(indices))) for label, indices in members.items())
    return sorted(index for indices in drawn for index in indices)
