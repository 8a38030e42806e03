"""Decoding of image files: the header is checked, and the image becomes upright with eight bits per channel. Needs no torch.

Files are not trusted. PIL may raise nearly any exception for a hostile file, so every exception that PIL raises is treated as a
fault of the image.
"""

import hashlib
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from sdpctl.errors import DataError
from sdpctl.untrusted import open_regular, printable

ELONGATION = 1000
"""Maximum ratio of the longer to the shorter side: resizing scales both, so a more elongated image could fill the memory."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition for each EXIF orientation. `ImageOps.exif_transpose` also rewrites the block, and fails on damaged tags."""

_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}


def decode(path: Path, mode: str) -> Image.Image:
    """Open an image file.

    Args:
        path: path of the file.
        mode: `RGB` or `L`.

    Raises:
        DataError: if the file is not an image that can be decoded.
    """
    with reading(path) as image:
        return converted(image, mode)


@contextmanager
def reading(path: Path) -> Iterator[Image.Image]:
    """Open an image file of acceptable size; nothing but its header was read.

    Raises:
        DataError: if the file cannot be opened, or for any exception inside the block; the message names the file.
    """
    try:
        with _opened(path) as image:
            yield image
    except DataError as error:
        raise DataError(f"{printable(str(path))}: this image cannot be decoded ({error}); replace or remove it") from error


def check(path: Path) -> None:
    """Check that an image file can be decoded, at the lowest resolution that its format allows.

    Raises:
        DataError: if the file cannot be decoded; the message is the reason alone.
    """
    with _opened(path) as image:
        image.draft("", (1, 1))  # a JPEG is decoded at an eighth of its size, but read to its end
        converted(image, "RGB")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of an image that can be decoded.

    Args:
        width: width of the upright image, in pixels.
        height: height of the upright image, in pixels.
        mode: the mode in which PIL opens it, such as `RGB`, `L` or `CMYK`.
        transparent: whether the image has transparent pixels, or may have some.
        turned: whether the EXIF block says that the image is stored turned or mirrored.
        pixels: hash of the upright pixels, at the lowest resolution that the format allows.
    """

    width: int
    height: int
    mode: str
    transparent: bool
    turned: bool
    pixels: str


def facts_of(path: Path) -> Facts:
    """Decode an image file as `check` does, and describe the image.

    Raises:
        DataError: if the file cannot be decoded; the message is the reason alone.
    """
    with _opened(path) as image:
        mode, stored, turn = image.mode, image.size, orientation(image)
        transparent = mode in ("LA", "PA", "RGBA", *_PREMULTIPLIED) or "transparency" in image.info
        image.draft("", (1, 1))
        upright = converted(image, "RGB")
        width, height = reversed(stored) if turn in (5, 6, 7, 8) else stored
        pixels = hashlib.sha256(repr((width, height, upright.size)).encode() + upright.tobytes()).hexdigest()
    return Facts(width=width, height=height, mode=mode, transparent=transparent, turned=turn > 1, pixels=pixels)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image file of acceptable size; turn every failure inside the block into a `DataError`."""
    try:
        with open_regular(path) as file:
            if not os.fstat(file.fileno()).st_size:
                raise DataError("the file is empty")
            with Image.open(file) as image:
                if image.format == "EPS":
                    raise DataError("it is PostScript, a program that would have to be run")
                _check_size(image)
                yield image
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError("it is not an image") from error
    except MemoryError as error:
        raise DataError("it needs more memory than is available") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels") from error
    except Exception as error:
        text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        raise DataError(printable(" ".join(text.split()))) from error


def _check_size(image: Image.Image) -> None:
    short, long = sorted(image.size)
    if short < 1:
        raise DataError(f"it has {image.width} x {image.height} pixels")
    if long > ELONGATION * short:
        raise DataError(f"it has {image.width:,} x {image.height:,} pixels, which is too elongated to be resized")


def converted(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image of any mode to `RGB` or `L`, and turn it upright as its EXIF block says.

    Raises:
        DataError: if the image has no pixels, is too elongated, or its values are outside the expected range.
    """
    _check_size(image)
    image.load()  # PIL turns a TIFF here, and corrects its EXIF block
    turn = _UPRIGHT.get(orientation(image))
    if image.mode == "F" or image.mode.startswith("I"):  # PIL would keep the lowest eight bits, or clip
        image = _eight_bits(image)
    elif image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return (image if turn is None else image.transpose(turn)).convert(mode)


def orientation(image: Image.Image) -> int:
    """Return the orientation that the EXIF block says, 1 to 8; 1 (upright) if the block is damaged or missing."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (IndexError, KeyError, OSError, SyntaxError, TypeError, ValueError, struct.error):
        return 1  # the EXIF block is damaged, but the pixels are intact


def _eight_bits(image: Image.Image) -> Image.Image:
    """Convert a grey image of 16 or 32 bits, or of floating-point values, to eight bits.

    Of 16-bit values, and of 32-bit values up to 65,535, the higher eight bits are kept; 32-bit values up to 255 are unchanged.
    """
    values = np.asarray(image)
    least, most = values.min(), values.max()
    if image.mode == "F":
        if not (least >= 0 and most <= 1):  # also true for NaN
            raise DataError(f"its floating-point pixels are from {least:g} to {most:g}; scale them to 0..1")
        return Image.fromarray(np.rint(values * np.float32(255)).astype(np.uint8))
    if least < 0 or most > 65535:
        raise DataError(f"its integer pixels are from {least} to {most}; scale them to 0..65535")
    sixteen = image.mode != "I" or image.format in ("PNG", "PPM") or most > 255
    return Image.fromarray((values >> 8 if sixteen else values).astype(np.uint8))
