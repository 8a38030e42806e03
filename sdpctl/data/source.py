"""One split of a data set."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True)
class Source:
    """One split of a data set.

    Args:
        images: uint8 (N, C, H, W) for a data set held in memory, else the paths of N image files.
        labels: class indices, int64 (N,).
        classes: names of the K classes.
    """

    images: Tensor | Sequence[Path]
    labels: Tensor
    classes: tuple[str, ...]
