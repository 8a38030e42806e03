import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from PIL import Image
from stage_calls import run, train

from sdpctl.recipe.load import parse_recipe
from sdpctl.stages.context import Context

TINY = """
name: tiny
model: {arch: resnet20, in_channels: 1}
data: {dataset: digits, image_size: 8, batch_size: 128, workers: 0, augment: crop}
sdpoint: {ratios: [0.5], points: [stem, layer2.0]}
train: {epochs: 2, lr: 0.1, validate: {instances: [full, layer2.0@0.5], batches: 2}}
calibrate: {batches: 3}
"""


class Listener:
    """Remembers what a user would be told."""

    def __init__(self):
        self.notes, self.advanced = [], 0

    def note(self, text):
        self.notes.append(text)

    detail = note

    def advance(self, text=""):
        self.advanced += 1

    @contextmanager
    def progress(self, text, total, done=0) -> Iterator["Listener"]:
        yield self


@pytest.fixture(scope="session")
def make_listener():
    return Listener


@pytest.fixture
def listener():
    return Listener()


@pytest.fixture(scope="session")
def trained(make_once):
    """A store that holds the tiny network, to be copied."""

    def fill(path):
        torch.manual_seed(2)  # what is made does not depend on it
        train(parse_recipe(TINY, "tiny.yaml"), Context(path=path, report=Listener()))

    return make_once("tiny", fill)


@pytest.fixture(scope="session")
def evaluated(trained, make_once):
    """A copy of that store in which the network is calibrated and evaluated, to be copied."""

    def fill(path):
        shutil.copytree(trained, path, dirs_exist_ok=True)
        torch.manual_seed(3)
        run(parse_recipe(TINY, "tiny.yaml"), Context(path=path, report=Listener()))

    return make_once("tiny-evaluated", fill)


@pytest.fixture
def context(tmp_path, listener):
    """Where a test works: a store that is not there yet, unless `is_trained` or `done` fills it."""
    return Context(path=tmp_path / "store", report=listener)


@pytest.fixture
def is_trained(trained, context):
    """Begin with a store that holds the tiny network."""
    shutil.copytree(trained, context.path)


@pytest.fixture
def done(evaluated, context):
    """Begin with a store in which the tiny recipe was run; return the artifacts by command."""
    shutil.copytree(evaluated, context.path)
    tags = {"train": "tiny", "calibrate-bn": "tiny.bn", "eval-instances": "tiny.eval"}
    return {command: context.store.resolve(tag) for command, tag in tags.items()}


@pytest.fixture
def tiny():
    """Read the tiny recipe, with overrides."""
    return lambda *overrides: parse_recipe(TINY, "tiny.yaml", overrides)


@pytest.fixture
def image_folder(tmp_path):
    """Make a folder of images, laid out as ImageNet is."""

    def make(name="images", classes=("cat", "dog"), count=12, shade=40):
        root = tmp_path / name
        for split in ("train", "val"):
            for label, kind in enumerate(classes):
                folder = root / split / kind
                folder.mkdir(parents=True)
                for i in range(count):
                    Image.new("RGB", (20, 16), (shade * label, 10 * i % 256, 90)).save(folder / f"{i}.jpg")
        return root

    return make
