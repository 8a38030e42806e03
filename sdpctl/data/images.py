"""Image files: checked by their header, decoded, turned upright, eight bits a channel. Needs no torch.

Files may come from anywhere. PIL raises nearly any exception for a hostile file, so that whatever it raises is taken to be
about the image.
"""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from sdpctl.errors import DataError
from sdpctl.untrusted import open_regular, printable

ELONGATION = 1000
"""Longer side by shorter side, at most: resizing the shorter side multiplies the longer one too, and may fill the memory."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation. `ImageOps.exif_transpose` also writes the EXIF block anew, which fails for blocks with damaged tags."""

_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}


def decode(path: Path, mode: str) -> Image.Image:
    """Open an image file.

    Args:
        path: of the file.
        mode: `RGB` or `L`.

    Raises:
        DataError: where it is not an image that can be decoded.
    """
    try:
        with _opened(path) as image:
            return converted(image, mode)
    except DataError as error:
        raise DataError(f"{printable(str(path))}: this image cannot be decoded ({error}); replace or remove it") from error


def check(path: Path) -> None:
    """Decode an image file as coarsely as its format allows, to see whether it can be decoded.

    Raises:
        DataError: where it cannot, with the reason alone.
    """
    with _opened(path) as image:
        image.draft("", (1, 1))  # JPEG: an eighth of the height and width, from all of the file
        converted(image, "RGB")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image file whose header promises nothing absurd, and say why what is done with it fails."""
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
        raise DataError("it takes more memory than there is") from error
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
    """Return an image as colour (`RGB`) or grey (`L`), whatever it was, upright where its EXIF block says how.

    Raises:
        DataError: where it has no pixels, is too elongated, or its values have no known range.
    """
    _check_size(image)
    image.load()  # a TIFF is turned here, and its EXIF block corrected
    turn = _UPRIGHT.get(_orientation(image))
    if image.mode == "F" or image.mode.startswith("I"):  # of which PIL would keep the lowest eight bits, or clip
        image = _eight_bits(image)
    elif image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return (image if turn is None else image.transpose(turn)).convert(mode)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (IndexError, KeyError, OSError, SyntaxError, TypeError, ValueError, struct.error):
        return 1  # a damaged EXIF block says nothing, and the pixels are whole


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return grey pixels of 16 or 32 bits, or floating-point ones, as eight bits.

    Sixteen bits, and values up to 65,535 in 32 bits, become their higher eight; values up to 255 in 32 bits stay.
    """
    values = np.asarray(image)
    least, most = values.min(), values.max()
    if image.mode == "F":
        if not (least >= 0 and most <= 1):  # NaN is neither
            raise DataError(f"its floating-point pixels are from {least:g} to {most:g}; scale them to 0..1")
        return Image.fromarray(np.rint(values * np.float32(255)).astype(np.uint8))
    if least < 0 or most > 65535:
        raise DataError(f"its integer pixels are from {least} to {most}; scale them to 0..65535")
    sixteen = image.mode != "I" or image.format in ("PNG", "PPM") or most > 255
    return Image.fromarray((values >> 8 if sixteen else values).astype(np.uint8))
