"""Damaged image files: `predict` answers, or names the file in one line; it never crashes, hangs or fills the memory."""

import io
import random
import resource
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from harness import attack, run
from PIL import Image

from sdpctl.engine.calibrate import calibrate
from sdpctl.engine.tensors import tensors_to_bytes
from sdpctl.export.bundle import to_files
from sdpctl.export.description import Description, Input, Option
from sdpctl.instance import FULL
from sdpctl.models import create_model
from sdpctl.models.settings import ModelSettings

MEMORY = 8 * 2**30
"""Bytes of address space that a command may take."""


def bundle(folder: Path) -> Path:
    """Write the bundle of a network with fresh weights."""
    model = create_model("resnet20", num_classes=10)
    statistics = calibrate(model, [FULL], [(torch.rand(8, 3, 8, 8), torch.zeros(8))])
    option = Option(instance=FULL, macs=1, params=1, relative=1.0, top1=9.0, top5=None, loss=1.0, heldout_top1=9.0)
    description = Description(
        name="net",
        network=ModelSettings(arch="resnet20", num_classes=10, in_channels=3, stem="small"),
        input=Input(size=8, resize=8, mean=(0.5,) * 3, std=(0.5,) * 3),
        classes=tuple("0123456789"),
        options=(option,),
        full_macs=1,
        checkpoint="a",
        statistics="b",
        test_images=1,
        heldout_images=1,
    )
    folder.mkdir()
    for name, content in to_files(description, tensors_to_bytes(model.state_dict()), statistics, "").items():
        (folder / name).write_bytes(content)
    return folder


def whole() -> dict[str, bytes]:
    """Return an image in each format and mode that people have."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 20, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    colour, grey = Image.fromarray(noise[..., :3].copy()), Image.fromarray(noise[..., 0].copy())
    images = {
        "photo.jpg": (colour, {"exif": exif}),
        "progressive.jpg": (colour, {"progressive": True}),
        "cmyk.jpg": (colour.convert("CMYK"), {}),
        "colour.png": (colour, {"exif": exif}),
        "palette.png": (colour.convert("P"), {"transparency": 3}),
        "deep.png": (Image.fromarray(noise[..., 0].astype(np.uint16) * 257), {}),
        "float.tif": (Image.fromarray(noise[..., 0].astype(np.float32) / 255), {"exif": exif}),
        "packed.tif": (colour, {"compression": "tiff_lzw"}),
        "many.gif": (grey, {"save_all": True, "append_images": [grey.rotate(90)]}),
        "photo.webp": (colour, {"exif": exif}),
        "plain.bmp": (colour, {}),
        "grey.pgm": (grey, {}),
        "two.mpo": (colour, {"save_all": True, "append_images": [colour]}),
    }
    found = {}
    for name, (image, options) in images.items():
        buffer = io.BytesIO()
        image.save(buffer, Image.registered_extensions()[f".{name.partition('.')[2]}"], **options)
        found[name] = buffer.getvalue()
    return found


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Return content with some of its bytes changed, most often near its beginning, or a part of it lost or repeated."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        place = draw.randrange(min(len(changed), draw.choice((64, 256, len(changed)))))
        match draw.randrange(5):
            case 0:
                changed[place] = draw.randrange(256)
            case 1:
                number = draw.choice((0, 1, 65535, 2**31 - 1, 2**32 - 1))
                changed[place : place + 4] = struct.pack(draw.choice("<>") + "I", number)
            case 2:
                changed[place] ^= 1 << draw.randrange(8)
            case 3:
                del changed[place : place + draw.randrange(1, 40)]
            case 4:
                changed[place:place] = changed[place : place + draw.randrange(1, 400)]
        if not changed:
            return b""
    return bytes(changed)


def cases(seed: int, folder: Path) -> Iterator[list[str]]:
    """Yield what went wrong with one image after another."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    draw, images, net = random.Random(seed), whole(), bundle(folder / "net.bundle")
    while True:
        name = draw.choice(list(images))
        content = damaged(images[name], draw)
        path = folder / name
        path.write_bytes(content)
        outcome = run(["predict", net, path], folder)
        faults = outcome.faults({0, 7})
        lines = [line for line in outcome.err.splitlines() if not line.startswith("tempfile.tif: ")]  # libtiff's own
        if outcome.code == 7 and not (len(lines) == 1 and lines[0].startswith(f"sdpctl: {path}: ")):
            faults.append(f"not one line that names the file: {lines}")
        if outcome.code == 0 and lines:
            faults.append(f"something beside the answer: {lines}")
        yield [f"{name}, {content.hex()[:2000]}: {fault}" for fault in faults]


if __name__ == "__main__":
    attack(cases, preload=["torchvision.transforms.v2", "sdpctl.prediction", "sdpctl.runtime"])
