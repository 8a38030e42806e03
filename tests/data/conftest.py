"""Small data made on the spot."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdpctl.data.files import locate
from sdpctl.data.loader import ImageData
from sdpctl.data.settings import DataSettings

CLASSES = {"ant": 10, "bee": 20, "cat": 31}
"""Training images a class; each has four test images."""


def _folder(root: Path, image: Callable[[int], Image.Image], suffix: str) -> Path:
    number = 0
    for part, counts in (("train", CLASSES), ("val", dict.fromkeys(CLASSES, 4))):
        for name, count in counts.items():
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                image(number).save(root / part / name / f"{i:02}{suffix}")
                number += 1
    return root


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Return an image folder of JPEG noise, no two images of one size; not to be written to."""

    def noise(number: int) -> Image.Image:
        pixels = np.random.default_rng(number).integers(0, 256, (17 + number % 7, 16 + number % 5, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return _folder(tmp_path_factory.mktemp("photos"), noise, ".jpg")


@pytest.fixture(scope="session")
def numbered(tmp_path_factory) -> Path:
    """Return an image folder of plain PNGs, each as bright as its number: 0 to 60 in train, 61 to 72 in val."""
    return _folder(tmp_path_factory.mktemp("numbered"), lambda number: Image.new("RGB", (9, 9), (number,) * 3), ".png")


@pytest.fixture
def open_data():
    """Open data on the processor, with settings that a test need not name."""

    def open_(
        dataset: str = "digits",
        root: Path = Path("none"),
        *,
        in_channels: int | None = None,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        **chosen,
    ) -> ImageData:
        usual = {"image_size": 8, "batch_size": 8, "workers": 0}
        settings = DataSettings(dataset=dataset, root=str(root), **(usual | chosen))
        channels = in_channels or (1 if dataset == "digits" else 3)
        located, device = locate(dataset, root), torch.device("cpu")
        return ImageData(settings, located, device, in_channels=channels, seed=seed, rank=rank, ranks=ranks)

    return open_
