"""Data sets in their authors' own formats, which torchvision's classes download and read."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sdpctl.data.reader import Located, Reader
from sdpctl.errors import DataError
from sdpctl.untrusted import printable_path

if TYPE_CHECKING:
    from sdpctl.data.source import Source

_IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


class OfficialReader(Reader):
    """Reads a data set through a class of `torchvision.datasets`, and keeps all images in memory."""

    torchvision_class: ClassVar[str]
    """Name of the class in `torchvision.datasets`."""

    files: ClassVar[tuple[str, ...]]
    """The official files, relative to the root."""

    def locate(self, root: Path, *, partial: bool) -> Located:  # noqa: ARG002  the official files are always whole
        """Find the official files."""
        self.require_root(root)
        for name in self.files:
            if not (root / name).is_file():
                raise DataError(f"{printable_path(root / name)}: this file of {self.info.name} is missing; {self.advice}")
        return Located((), {name: root / name for name in self.files})

    def _open_class(self, root: Path, **options: bool) -> Any:
        from torchvision import datasets

        return getattr(datasets, self.torchvision_class)(root, **options)

    def download(self, root: Path) -> None:
        """Download and unpack the official archives."""
        self._open_class(root, download=True)

    def open(self, root: Path, located: Located) -> "tuple[Source, Source]":  # noqa: ARG002  torchvision finds its files
        """Read both splits into memory."""
        try:
            train, test = (_in_memory(self._open_class(root, train=train)) for train in (True, False))
        except (OSError, RuntimeError, EOFError, ValueError, AssertionError) as error:
            reason = str(error) or "not in the official format"
            raise DataError(f"{printable_path(root)}: {self.info.name} cannot be read ({reason}); fetch it again") from error
        if len(train.classes) != self.info.num_classes:
            raise DataError(f"{printable_path(root)}: {self.info.name} has {len(train.classes)} classes there; fetch it again")
        return train, test


def _in_memory(opened: Any) -> "Source":
    import torch

    from sdpctl.data.source import Source

    images = torch.as_tensor(opened.data)
    images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
    return Source(images, torch.as_tensor(opened.targets), tuple(opened.classes))


class Mnist(OfficialReader):
    """Reads MNIST (LeCun et al. 1998)."""

    torchvision_class = "MNIST"
    files = tuple(f"MNIST/raw/{name}" for name in _IDX)


class FashionMnist(OfficialReader):
    """Reads Fashion-MNIST (Xiao et al. 2017)."""

    torchvision_class = "FashionMNIST"
    files = tuple(f"FashionMNIST/raw/{name}" for name in _IDX)


class Cifar10(OfficialReader):
    """Reads CIFAR-10 (Krizhevsky 2009)."""

    torchvision_class = "CIFAR10"
    files = tuple(
        f"cifar-10-batches-py/{name}" for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
    )


class Cifar100(OfficialReader):
    """Reads CIFAR-100 (Krizhevsky 2009)."""

    torchvision_class = "CIFAR100"
    files = tuple(f"cifar-100-python/{name}" for name in ("train", "test", "meta"))
