"""Measure the loader against torchvision's ImageFolder, PIL transforms and DataLoader, with as many workers.

    python tests/benchmarks/bench_loader.py --photos FOLDER --cifar FOLDER [--device cuda]
    python tests/benchmarks/bench_loader.py --accuracy TAG --store STORE
    python tests/benchmarks/bench_loader.py --small

Both sides load the same number of augmented batches, in turn, in the same run; the ratio is the median of the pairs, with the
least and the most. Photographs (train/CLASS/*.jpg and val/CLASS/*.jpg) are cropped at random to 224 px and flipped; CIFAR-10
(cifar-10-batches-py) is padded, cropped to 32 px and flipped. Each side ends with normalised float32 on the device.

`--accuracy` evaluates `full` of a checkpoint, on a copy of its store, with the decoders pil and torchvision.
`--small` makes a few images of its own, to show that everything runs.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from paired import paired
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

from sdpctl.data.cache import Cache
from sdpctl.data.files import locate
from sdpctl.data.loader import ImageData
from sdpctl.data.settings import DataSettings
from sdpctl.engine.allocator import keep_freed_memory
from sdpctl.engine.threads import wait_briefly

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def plain(images, crop, options, batch, batches):
    """Return a function that loads batches with a plain `DataLoader`, and counts the images."""
    steps = [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    images.transform = transforms.Compose(steps)
    chosen = torch.arange(batches * batch) * len(images) // (batches * batch)
    loader = DataLoader(
        Subset(images, chosen.tolist()),
        batch,
        shuffle=True,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
        pin_memory=options.device == "cuda",
    )

    def load():
        count = 0
        for x_NCHW, labels_N in loader:
            x_NCHW, labels_N = (part.to(options.device, non_blocking=True) for part in (x_NCHW, labels_N))
            count += len(labels_N)
        wait(options)
        return count

    return load


def ours(options, batch, batches, folder, **keys):
    """Return a function that loads batches with `ImageData`, and counts the images."""
    settings = DataSettings(batch_size=batch, workers=options.workers, holdout=0.0, mean=MEAN, std=STD, **keys)
    located = locate(settings.dataset, settings.folder)
    cache = None if settings.cache == "none" else Cache(Path(folder) if settings.cache == "disk" else None, "f")
    data = ImageData(settings, located, torch.device(options.device), in_channels=3, seed=0, cache=cache)

    def load():
        count = sum(len(labels_N) for _, labels_N in islice(data.training(0, max(0, data.steps_per_epoch - batches)), batches))
        wait(options)
        return count

    return load


def wait(options):
    if options.device == "cuda":
        torch.cuda.synchronize()


def compare(name, mine, theirs, options):
    counts = mine(), theirs()
    assert counts[0] == counts[1], counts
    print(f"{name}: {counts[0]:,} images; {paired(mine, theirs, runs=options.runs)}", flush=True)


def photographs(options, folder, size, batch):
    images = datasets.ImageFolder(Path(options.photos) / "train")
    batches = min(20, len(images) // batch)
    theirs = plain(images, transforms.RandomResizedCrop(size), options, batch, batches)
    ways = {
        "decoder torchvision": {},
        "decoder pil": {"decoder": "pil"},
        "cache ram": {"cache": "ram"},
        "cache disk": {"cache": "disk"},
    }
    if options.device == "cuda":
        ways["decoder nvjpeg"] = {"decoder": "nvjpeg"}
    for name, keys in ways.items():
        given = {"dataset": "imagefolder", "root": str(options.photos), "image_size": size, "augment": "resized-crop"}
        mine = ours(options, batch, batches, folder, **given, **keys)
        compare(f"photographs to {size} px, {name}", mine, theirs, options)


def cifar(options, folder, batch=128, batches=100):
    theirs = plain(datasets.CIFAR10(options.cifar), transforms.RandomCrop(32, padding=4), options, batch, batches)
    mine = ours(options, batch, batches, folder, dataset="cifar10", root=str(options.cifar), image_size=32, augment="crop-flip")
    compare("CIFAR-10 to 32 px", mine, theirs, options)


def accuracy(options):
    """Evaluate one checkpoint with two decoders; its statistics are calibrated with the same decoder."""
    rows = {}
    for decoder in ("pil", "torchvision"):
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder) / "store"
            shutil.copytree(options.store, store, ignore=shutil.ignore_patterns("cache"))
            words = ["eval-instances", options.accuracy, "--store", str(store), "--instances", "full", "--json"]
            words += ["--set", f"data.decoder={decoder}"]
            done = subprocess.run([sys.executable, "-m", "sdpctl", *words], stdout=subprocess.PIPE, text=True, check=True)
            rows[decoder] = {row["instance"]: row for row in json.loads(done.stdout)["rows"]}
    for instance, row in rows["pil"].items():
        other = rows["torchvision"][instance]
        print(
            f"{instance}: top-1 {row['top1']:.2f} with pil, {other['top1']:.2f} with torchvision, difference "
            f"{other['top1'] - row['top1']:+.2f}; loss {row['loss']:.4f} and {other['loss']:.4f}"
        )


def make_photographs(folder, count=24):
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in "ab":
            (folder / part / label).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (60, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / label / f"{i}.jpg")


def main():
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):  # as in the command line; torch reads it when it is loaded
        wait_briefly()
        os.execv(sys.executable, [sys.executable, *sys.argv])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos")
    parser.add_argument("--cifar")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--workers", type=int, default=min(16, len(os.sched_getaffinity(0))))
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--accuracy", metavar="TAG")
    parser.add_argument("--store", default=".sdpctl")
    options = parser.parse_args()
    keep_freed_memory()
    if options.accuracy:
        accuracy(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.small:
            options.photos, options.workers, options.runs = Path(folder) / "photos", 1, 1
            make_photographs(options.photos)
        if options.photos:
            photographs(options, f"{folder}/cache", *((32, 8) if options.small else (224, 64)))
        if options.cifar:
            cifar(options, folder)


if __name__ == "__main__":
    main()
