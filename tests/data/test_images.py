"""Image files of all kinds: what a network sees of them, and what is refused."""

import os
import threading

import numpy as np
import pytest
from PIL import Image

from sdpctl.data.images import check, converted, decode
from sdpctl.errors import DataError

UPRIGHT = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
"""Two rows of three pixels, all of them different."""

STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.T,
    6: np.rot90(UPRIGHT),
    7: UPRIGHT[::-1, ::-1].T,
    8: np.rot90(UPRIGHT, -1),
}
"""How a camera stores it by orientation: EXIF 2.3, where 6 is to be turned a quarter clockwise to be seen upright."""


def exif(orientation):
    block = Image.Exif()
    block[0x0112] = orientation
    return block


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_images_are_turned_upright(orientation, suffix, tmp_path):
    path = tmp_path / f"turned.{suffix}"
    Image.fromarray(np.ascontiguousarray(STORED[orientation])).save(path, exif=exif(orientation), lossless=True)
    assert np.array_equal(np.asarray(decode(path, "L")), UPRIGHT)
    assert np.array_equal(np.asarray(decode(path, "RGB"))[..., 0], UPRIGHT)


def test_a_photograph_is_turned_upright(tmp_path):
    pixels = np.zeros((16, 32), np.uint8)
    pixels[:, 16:] = 255
    Image.fromarray(np.rot90(pixels)).save(tmp_path / "phone.jpg", exif=exif(6), quality=95)
    assert np.abs(np.asarray(decode(tmp_path / "phone.jpg", "L")).astype(int) - pixels).max() < 8


def test_sixteen_bits_are_turned_upright(tmp_path):
    Image.fromarray(np.ascontiguousarray(STORED[6]).astype(np.uint16) * 256).save(tmp_path / "deep.png", exif=exif(6))
    assert np.array_equal(np.asarray(decode(tmp_path / "deep.png", "L")), UPRIGHT)


def test_an_image_in_memory_is_turned_upright(tmp_path):
    Image.fromarray(np.ascontiguousarray(STORED[8])).save(tmp_path / "turned.png", exif=exif(8))
    with Image.open(tmp_path / "turned.png") as image:
        assert np.array_equal(np.asarray(converted(image, "L")), UPRIGHT)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "block", [b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x09\0\0\0\0"]
)
def test_a_damaged_exif_block_is_not_a_damaged_image(block, tmp_path):
    Image.fromarray(UPRIGHT).save(tmp_path / "a.jpg", exif=block, quality=100, subsampling=0)
    assert decode(tmp_path / "a.jpg", "L").size == (3, 2)
    check(tmp_path / "a.jpg")


RAMP = np.array([[0, 51, 102], [153, 204, 255]], np.uint8)

KINDS = {
    "float": (RAMP.astype(np.float32) / 255, "tif"),
    "sixteen bits": (RAMP.astype(np.uint16) * 257, "png"),
    "sixteen bits, TIFF": (RAMP.astype(np.uint16) * 257, "tif"),
    "sixteen bits, big-endian": (RAMP.astype(">u2") * 257, "tif"),
    "sixteen bits, PGM": (RAMP.astype(np.uint16) * 257, "pgm"),
    "32 bits of 8": (RAMP.astype(np.int32), "tif"),
    "32 bits of 16": (RAMP.astype(np.int32) * 257, "tif"),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_values_of_every_range_become_eight_bits(name, mode, tmp_path):
    values, suffix = KINDS[name]
    path = tmp_path / f"ramp.{suffix}"
    Image.fromarray(values).save(path)
    seen = np.asarray(decode(path, mode))
    assert np.array_equal(seen if mode == "L" else seen[..., 1], RAMP)


def test_a_dark_image_of_sixteen_bits_stays_dark(tmp_path):
    """None of its values is above 255, which is how 8 bits in 32 are told."""
    for suffix in ("png", "pgm"):
        Image.fromarray(np.full((3, 3), 255, np.uint16)).save(tmp_path / f"dark.{suffix}")
        assert np.asarray(decode(tmp_path / f"dark.{suffix}", "L")).max() == 0


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([[0, 1.5]], np.float32), r"its floating-point pixels are from 0 to 1\.5; scale them to 0\.\.1"),
        (np.array([[-0.1, 1]], np.float32), r"its floating-point pixels are from -0\.1 to 1; scale them to 0\.\.1"),
        (np.array([[0, np.nan]], np.float32), "its floating-point pixels are from nan to nan"),
        (np.array([[0, 65536]], np.int32), r"its integer pixels are from 0 to 65536; scale them to 0\.\.65535"),
        (np.array([[-1, 0]], np.int32), "its integer pixels are from -1 to 0"),
    ],
)
def test_values_of_an_unknown_range_are_refused(values, reason, tmp_path):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=rf"a\.tif: this image cannot be decoded \({reason}"):
        decode(tmp_path / "a.tif", "RGB")
    with pytest.raises(DataError, match=f"^{reason}"):
        converted(Image.fromarray(values), "RGB")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV"])
@pytest.mark.parametrize("wanted", ["L", "RGB"])
def test_white_is_white_in_every_mode(mode, wanted):
    steps = {"La": ("LA", "La"), "PA": ("P", "PA"), "RGBa": ("RGBA", "RGBa")}.get(mode, (mode,))
    image = Image.new("RGB", (4, 4), "white")
    for step in steps:
        image = image.convert(step)
    assert image.mode == mode
    seen = np.asarray(converted(image, wanted))
    assert seen.min() >= 254
    assert seen.shape[2:] == ((3,) if wanted == "RGB" else ())


@pytest.mark.parametrize("suffix", ["gif", "tif", "webp"])
def test_the_first_of_several_frames(suffix, tmp_path):
    frames = [Image.new("L", (8, 8), shade) for shade in (200, 100, 0)]
    frames[0].save(
        tmp_path / f"many.{suffix}", save_all=True, append_images=frames[1:], **({"lossless": True} if suffix == "webp" else {})
    )
    check(tmp_path / f"many.{suffix}")
    assert np.asarray(decode(tmp_path / f"many.{suffix}", "L")).tolist() == [[200] * 8] * 8


def test_the_first_of_two_photographs_in_one_file(tmp_path):
    first, second = Image.new("L", (16, 8), 200), Image.new("L", (16, 8), 0)
    first.save(tmp_path / "stereo.jpg", "MPO", save_all=True, append_images=[second], exif=exif(6))
    check(tmp_path / "stereo.jpg")
    seen = decode(tmp_path / "stereo.jpg", "L")
    assert (seen.size, seen.getpixel((2, 2))) == ((8, 16), 200)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (1001, 1), (2, 2002)])
def test_sizes_that_nothing_can_be_made_of(size):
    with pytest.raises(DataError, match=r"^it has [\d,]+ x [\d,]+ pixels"):
        converted(Image.new("L", size), "RGB")


def test_a_panorama_is_whole():
    assert converted(Image.new("L", (1000, 1)), "RGB").size == (1000, 1)


def test_no_memory_is_about_the_image(tmp_path, monkeypatch):
    Image.new("L", (9, 9)).save(tmp_path / "a.png")

    def load(image):
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(DataError, match=r"a\.png: this image cannot be decoded \(it needs more memory than is available\)"):
        decode(tmp_path / "a.png", "RGB")


def test_whatever_pil_raises_is_about_the_image(tmp_path, monkeypatch):
    Image.new("L", (9, 9)).save(tmp_path / "a.png")

    def load(image):
        raise IndexError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(DataError, match=r"a\.png: this image cannot be decoded \(IndexError\); replace or remove it"):
        decode(tmp_path / "a.png", "RGB")


def test_nobody_waits_for_a_fifo(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    failed = []

    def look():
        try:
            decode(tmp_path / "a.png", "RGB")
        except DataError as error:
            failed.append(str(error))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(30)
    assert failed == [
        f"{tmp_path / 'a.png'}: this image cannot be decoded (not a regular file but a FIFO); replace or remove it"
    ]
