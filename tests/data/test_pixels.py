"""Parts of image files: the pixels of the decoder `torchvision` against those of PIL and of torchvision's transforms."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as VF

from sdpctl.data.images import decode
from sdpctl.data.loader import drawn_part
from sdpctl.data.pixels import INTERPOLATIONS, Middle, Part, Wanted, part_of
from sdpctl.errors import DataError, ResourceError

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC, "nearest": Image.Resampling.NEAREST}


def picture(width, height, seed=0):
    """Return an image with smooth gradients, an edge and a little noise, as photographs have."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 90 * np.sin((3 + k) * x / width + (5 - k) * y / height + seed) for k in range(3)]
    pixels = np.stack(waves, 2) + np.random.default_rng(seed).normal(0, 4, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (230, 40, 90)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def whole(height, width):
    return Wanted(Part(0, 0, height, width), height, width)


def differences(found_CHW, image):
    """Return the mean and the largest difference to a PIL image, in levels of 255."""
    apart = (found_CHW.float() - VF.pil_to_tensor(image).float()).abs()
    assert found_CHW.shape == VF.pil_to_tensor(image).shape
    return float(apart.mean()), float(apart.max())


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(30, 21), (300, 210)], ids=["whole", "decoded at a fraction"])
def test_jpegs_of_every_orientation(orientation, mode, size, tmp_path):
    """The part is not square and not in the middle, so that a wrong turn would move it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(*size).save(tmp_path / "a.jpg", exif=exif, quality=95)
    upright = decode(tmp_path / "a.jpg", mode)
    height, width = upright.height, upright.width
    part = Part(height // 5, width // 10, height // 2, width // 3)
    choose = {(height, width): Wanted(part, 9, 11)}
    found = part_of(tmp_path / "a.jpg", mode, lambda *size: choose[size], "bilinear", shrinks=True)
    box = (part.left, part.top, part.left + part.width, part.top + part.height)
    mean, most = differences(found, upright.crop(box).resize((11, 9), Image.Resampling.BILINEAR))
    assert mean < 2
    assert most < 20


@pytest.mark.parametrize("interpolation", RESAMPLING)
@pytest.mark.parametrize(("size", "side"), [((255, 250), 96), ((1400, 1100), 48)], ids=["whole", "decoded at a fraction"])
def test_parts_are_those_of_pil(size, side, interpolation, tmp_path):
    """A JPEG that is decoded whole differs by rounding; at a fraction of its size, libjpeg's scaling differs at sharp edges."""
    exactly = side == 96 or interpolation == "nearest"  # the parts are less than four times as large as 96
    picture(*size).save(tmp_path / "a.jpg", quality=90)
    image = decode(tmp_path / "a.jpg", "RGB")
    for seed in range(8):
        torch.manual_seed(seed)
        params = v2.RandomResizedCrop(side).make_params([image])
        part = Part(params["top"], params["left"], params["height"], params["width"])
        wanted = Wanted(part, side, side)
        found = part_of(tmp_path / "a.jpg", "RGB", lambda *_, wanted=wanted: wanted, interpolation, shrinks=True)
        box = (part.left, part.top, part.left + part.width, part.top + part.height)
        mean, most = differences(found, image.crop(box).resize((side, side), RESAMPLING[interpolation]))
        assert mean < (0.5 if interpolation == "nearest" else 0.02 if exactly else 0.7)
        assert most <= (1 if interpolation != "nearest" else 255) if exactly else 30  # the nearest of two as near may differ


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (33, 33), (7, 200), (1, 900)])
def test_the_same_parts_are_drawn_as_by_torchvision(size):
    transform = v2.RandomResizedCrop(24)
    for seed in range(20):
        torch.manual_seed(seed)
        params = transform.make_params([Image.new("RGB", size)])
        rest = torch.rand(1)
        torch.manual_seed(seed)
        wanted = drawn_part(transform, size[1], size[0])
        assert wanted == Wanted(Part(params["top"], params["left"], params["height"], params["width"]), 24, 24)
        assert torch.equal(torch.rand(1), rest)


@pytest.mark.parametrize("interpolation", RESAMPLING)
@pytest.mark.parametrize("size", [(40, 30), (30, 41), (33, 33), (45, 200), (37, 53)])
@pytest.mark.parametrize(("side", "part"), [(36, 32), (33, 32), (32, 32), (17, 4)])
def test_the_middle_is_torchvisions(size, side, part, interpolation, tmp_path):
    picture(*size).save(tmp_path / "a.png")
    middle = Middle(side, part, interpolation)
    found = middle.centred(part_of(tmp_path / "a.png", "RGB", middle.scaled, interpolation))
    transforms = [v2.Resize(side, interpolation=INTERPOLATIONS[interpolation], antialias=True), v2.CenterCrop(part)]
    mean, most = differences(found, v2.Compose(transforms)(Image.open(tmp_path / "a.png")))
    assert (mean < 3) if interpolation == "nearest" else (most <= 1)  # the nearest of two as near may differ


def palette():
    image = picture(20, 16).quantize(8)
    image.info["transparency"] = 3
    return image


OTHERS = {
    "grey.jpg": (picture(20, 16).convert("L"), {}),
    "cmyk.jpg": (picture(20, 16).convert("CMYK"), {}),
    "progressive.jpg": (picture(20, 16), {"progressive": True}),
    "plain.png": (picture(20, 16), {}),
    "palette.png": (palette(), {"transparency": 3}),
    "alpha.png": (picture(20, 16).convert("RGBA"), {}),
    "deep.png": (Image.fromarray(np.arange(320, dtype=np.uint16).reshape(16, 20) * 200), {}),
    "a.gif": (picture(20, 16).quantize(16), {}),
    "a.tif": (picture(20, 16), {}),
    "a.bmp": (picture(20, 16), {}),
    "a.webp": (picture(20, 16), {"lossless": True}),
    "a.ppm": (picture(20, 16), {}),
    "jpeg.png": (picture(20, 16), {"format": "JPEG"}),
    "png.jpg": (picture(20, 16), {"format": "PNG"}),
}


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", OTHERS)
def test_images_of_every_kind(name, mode, tmp_path):
    image, options = OTHERS[name]
    image.save(tmp_path / name, **options)
    _, most = differences(part_of(tmp_path / name, mode, whole, "bilinear"), decode(tmp_path / name, mode))
    assert most <= 4


def jpeg(**options):
    content = io.BytesIO()
    picture(64, 48).save(content, "JPEG", **options)
    return content.getvalue()


def of_size(width, height):
    """Return a JPEG whose header has a different size."""
    content = bytearray(jpeg())
    start = content.index(b"\xff\xc0") + 5
    content[start : start + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(content)


DAMAGED = {
    "empty": b"",
    "text": b"not an image",
    "ends early": jpeg()[:-300],
    "ends early, progressive": jpeg(progressive=True)[:-300],
    "only a header": jpeg()[:200],
    "no end": jpeg()[:-2],
    "elongated": of_size(60000, 1),
    "enormous": of_size(65000, 65000),
    "no pixels": of_size(0, 48),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_have_the_errors_of_pil(name, tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(DAMAGED[name])
    with pytest.raises(DataError) as wanted:
        decode(path, "RGB")
    with pytest.raises(DataError) as found:
        part_of(path, "RGB", whole, "bilinear")
    assert str(found.value) == str(wanted.value)


def test_a_large_file_that_ends_early_is_an_error_at_a_fraction_of_its_size_too(tmp_path):
    path = tmp_path / "a.jpg"
    picture(800, 600).save(path)
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(DataError, match=r"a\.jpg: this image cannot be decoded \(image file is truncated"):
        part_of(path, "RGB", lambda height, width: Wanted(Part(0, 0, height, width), 60, 80), "bilinear", shrinks=True)


@pytest.mark.parametrize(("ratio", "fraction"), [(1, 1), (3, 1), (4, 2), (7, 2), (8, 4), (15, 4), (16, 8), (30, 8)])
def test_at_least_twice_the_wanted_size_is_decoded(ratio, fraction, tmp_path, monkeypatch):
    picture(10 * ratio, 12 * ratio).save(tmp_path / "a.jpg")
    asked = []
    draft = JpegImageFile.draft
    monkeypatch.setattr(JpegImageFile, "draft", lambda image, mode, size: asked.append(size) or draft(image, mode, size))
    for shrinks in (False, True):
        part_of(tmp_path / "a.jpg", "RGB", lambda h, w: Wanted(Part(0, 0, h, w), 12, 10), "bilinear", shrinks=shrinks)
    assert asked == ([] if fraction == 1 else [(10 * ratio // fraction, 12 * ratio // fraction)])


def test_a_jpeg_that_torchvision_refuses_and_pil_takes_has_the_pixels_of_pil(tmp_path, monkeypatch):
    picture(64, 48).save(tmp_path / "a.jpg")

    def refuse(*_):
        raise RuntimeError("Unsupported")

    monkeypatch.setattr(torch.ops.image, "decode_jpeg", refuse)
    assert differences(part_of(tmp_path / "a.jpg", "RGB", whole, "bilinear"), decode(tmp_path / "a.jpg", "RGB")) == (0, 0)


def test_a_torchvision_that_cannot_decode_is_refused_where_files_are_decoded(open_data, photos, monkeypatch):
    monkeypatch.setattr(torch.ops, "image", object())
    with pytest.raises(ResourceError, match=r"^this torchvision cannot decode JPEGs; set data\.decoder=pil, or install"):
        open_data("imagefolder", photos)
    next(open_data("imagefolder", photos, decoder="pil").training(0))
    next(open_data("digits").training(0))
