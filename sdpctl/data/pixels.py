"""Parts of image files as tensors of a given size: the decoder `torchvision`.

A JPEG is decoded by torchvision.io, and only the part that is needed is resized. If a random crop is at least four times as
large as needed, PIL decodes the JPEG at a half, a quarter or an eighth of its size: libjpeg then computes fewer pixels.
`images.decode` decodes all other formats, JPEGs in CMYK, and JPEGs that torchvision.io refuses. The choice is a function of the
file and the part. Files that cannot be decoded have the errors of `images.decode`.

Suffixes of tensor names: C channels, H height, W width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torchvision.io import ImageReadMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as VF

from sdpctl.data.catalog import Decoder, Interpolation
from sdpctl.data.images import converted, decode, orientation, reading
from sdpctl.errors import ResourceError

INTERPOLATIONS: dict[Interpolation, v2.InterpolationMode] = {
    "bilinear": v2.InterpolationMode.BILINEAR,
    "bicubic": v2.InterpolationMode.BICUBIC,
    "nearest": v2.InterpolationMode.NEAREST_EXACT,  # the same pixels whether an image is in memory or in a file
}

FILE_BYTES = 2**28
"""Maximum size of a file that is read into memory as a whole, in bytes."""

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
MODES = {"L": ImageReadMode.GRAY.value, "RGB": ImageReadMode.RGB.value}


class Part(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Wanted(NamedTuple):
    """The part of an image that is needed, and the height and width that the part is resized to, in pixels."""

    part: Part
    height: int
    width: int


Choose = Callable[[int, int], Wanted]
"""Returns what is needed of an upright image of a height and a width."""


@dataclass(frozen=True)
class Middle:
    """The transform of test images: the shorter side is scaled, then the central part is taken.

    Args:
        side: the shorter side of the scaled image, in pixels.
        size: height and width of the part, in pixels; at most `side`.
        interpolation: interpolation of resizing.
    """

    side: int
    size: int
    interpolation: Interpolation

    def transforms(self) -> list[v2.Transform]:
        """Return torchvision's transforms."""
        mode = INTERPOLATIONS[self.interpolation]
        return [v2.Resize(self.side, interpolation=mode, antialias=True), v2.CenterCrop(self.size)]

    def of(self, path: Path, mode: str, decoder: Decoder, *, whole: bool = False) -> Tensor:
        """Return the transformed image of a file, uint8 (C, H, W).

        Args:
            path: path of the file.
            mode: `RGB` or `L`.
            decoder: decoder of the file.
            whole: return the whole scaled image.

        Raises:
            DataError: if the file is not an image that can be decoded.
        """
        if decoder == "pil":
            scale, _ = self.transforms()
            image_CHW: Tensor = VF.pil_to_tensor(scale(decode(path, mode)))
        else:
            image_CHW = part_of(path, mode, self.scaled, self.interpolation)
        return image_CHW if whole else self.centred(image_CHW)

    def scaled(self, height: int, width: int) -> Wanted:
        """Return the scaled size of a whole image, rounded as in torchvision's `Resize`."""
        long = int(self.side * max(height, width) / min(height, width))
        scaled = (self.side, long) if height <= width else (long, self.side)
        return Wanted(Part(0, 0, height, width), *scaled)

    def centred(self, image_CHW: Tensor) -> Tensor:
        """Return the central part of a scaled image."""
        return central(image_CHW, self.size)


def central(image_CHW: Tensor, size: int) -> Tensor:
    """Return the central part of an image, as torchvision's `CenterCrop` does."""
    top, left = (round((length - size) / 2) for length in image_CHW.shape[1:])
    return image_CHW[:, top : top + size, left : left + size]


class Turn(NamedTuple):
    """How a stored image becomes upright: rows and columns are exchanged, then the order of either is reversed.

    Args:
        exchanged: whether rows and columns are exchanged.
        rows: whether the order of the rows is reversed.
        columns: whether the order of the columns is reversed.
    """

    exchanged: bool
    rows: bool
    columns: bool

    def applied(self, image_CHW: Tensor) -> Tensor:
        """Return a stored image upright."""
        image_CHW = image_CHW.transpose(1, 2) if self.exchanged else image_CHW
        reversed_ = [dimension for dimension, flag in ((1, self.rows), (2, self.columns)) if flag]
        return image_CHW.flip(reversed_) if reversed_ else image_CHW

    def undone(self, wanted: Wanted, height: int, width: int) -> Wanted:
        """Return what is needed of the stored image, given what is needed of the upright image of this height and width."""
        (top, left, tall, wide), out_height, out_width = wanted
        top = height - top - tall if self.rows else top
        left = width - left - wide if self.columns else left
        if self.exchanged:
            return Wanted(Part(left, top, wide, tall), out_width, out_height)
        return Wanted(Part(top, left, tall, wide), out_height, out_width)


_TURNS = {
    2: Turn(False, False, True),
    3: Turn(False, True, True),
    4: Turn(False, True, False),
    5: Turn(True, False, False),
    6: Turn(True, False, True),
    7: Turn(True, True, True),
    8: Turn(True, True, False),
}
"""The turn of each EXIF orientation that is not upright."""

_UPRIGHT = Turn(False, False, False)


@dataclass(frozen=True)
class Jpeg:
    """A JPEG whose header was read.

    Args:
        content: the bytes of the file, uint8.
        height: height of the upright image, in pixels.
        width: width of the upright image, in pixels.
        turn: how the image becomes upright.
    """

    content: Tensor
    height: int
    width: int
    turn: Turn


def require_decoder() -> None:
    """Check that torchvision can decode JPEGs; its developers plan to remove this.

    Raises:
        ResourceError: if it cannot.
    """
    if not hasattr(torch.ops.image, "decode_jpeg"):
        raise ResourceError("this torchvision cannot decode JPEGs; set data.decoder=pil, or install torchvision 0.29 or older")


def read(path: Path, mode: str) -> Jpeg | Image.Image:
    """Read a JPEG that torchvision.io may decode; decode every other file.

    Args:
        path: path of the file.
        mode: `RGB` or `L`.

    Raises:
        DataError: if the file is not an image that can be decoded.
    """
    with reading(path) as image:
        if not isinstance(image, JpegImageFile) or image.mode not in MODES or image.fp is None:
            return converted(image, mode)
        turn = _TURNS.get(orientation(image), _UPRIGHT)
        image.fp.seek(0)
        content = bytearray(image.fp.read(FILE_BYTES + 1))
        if len(content) > FILE_BYTES:
            return converted(image, mode)
        height, width = (image.width, image.height) if turn.exchanged else (image.height, image.width)
    return Jpeg(torch.frombuffer(content, dtype=torch.uint8), height, width, turn)


def part_of(path: Path, mode: str, choose: Choose, interpolation: Interpolation, *, shrinks: bool = False) -> Tensor:
    """Decode an image file, and resize the part that is needed.

    Args:
        path: path of the file.
        mode: `RGB` or `L`.
        choose: chooses the part by the size of the upright image.
        interpolation: interpolation of resizing.
        shrinks: whether a JPEG may be decoded at a fraction of its size. On ResNet-20 with images of 32 px, which is sensitive
            to it, this costs up to a point of accuracy; so it is for augmented images only.

    Returns:
        uint8 (C, H, W).

    Raises:
        DataError: if the file is not an image that can be decoded.
    """
    image = read(path, mode)
    if isinstance(image, Image.Image):
        return resized(VF.pil_to_tensor(image), choose(image.height, image.width), interpolation)
    wanted = choose(image.height, image.width)
    stored = image.turn.undone(wanted, image.height, image.width)
    if shrinks and (shrink := _shrink(stored, interpolation)) > 1:
        return image.turn.applied(_shrunk(path, mode, stored, shrink, interpolation))
    try:
        image_CHW = torch.ops.image.decode_jpeg(image.content, MODES[mode], False)  # False: it stays as it is stored
    except RuntimeError:
        return resized(VF.pil_to_tensor(decode(path, mode)), wanted, interpolation)
    return image.turn.applied(resized(image_CHW, stored, interpolation))


def resized(image_CHW: Tensor, wanted: Wanted, interpolation: Interpolation) -> Tensor:
    """Resize a part of an image.

    Args:
        image_CHW: uint8.
        wanted: the part, and its new size.
        interpolation: interpolation of resizing.
    """
    (top, left, tall, wide), height, width = wanted
    part_1CHW = image_CHW[None, :, top : top + tall, left : left + wide]
    if (tall, wide) == (height, width):
        return part_1CHW[0]
    part_1CHW = part_1CHW.contiguous(memory_format=torch.channels_last)  # the faster kernel
    mode = INTERPOLATIONS[interpolation]
    resized_1CHW: Tensor = VF.resize(part_1CHW, [height, width], interpolation=mode, antialias=True)
    return resized_1CHW[0]


def _shrink(wanted: Wanted, interpolation: Interpolation) -> int:
    """Return the divisor at which a JPEG is decoded: 1, 2, 4 or 8. At least twice the wanted size is left to be resized."""
    if interpolation == "nearest":  # decoding at a smaller size averages pixels
        return 1
    ratio = min(wanted.part.height // wanted.height, wanted.part.width // wanted.width)
    return next(divisor for divisor in (8, 4, 2, 1) if ratio >= 2 * divisor or divisor == 1)


def _shrunk(path: Path, mode: str, wanted: Wanted, shrink: int, interpolation: Interpolation) -> Tensor:
    """Decode a JPEG at a fraction of its size, and resize a part; the image is not turned upright."""
    (top, left, tall, wide), height, width = wanted
    box = (left / shrink, top / shrink, (left + wide) / shrink, (top + tall) / shrink)
    with reading(path) as image:
        image.draft(None, (image.width // shrink, image.height // shrink))
        part = image.resize((width, height), _RESAMPLING[interpolation], box=box).convert(mode)
    return torch.from_numpy(np.array(part).reshape(height, width, -1)).permute(2, 0, 1)
