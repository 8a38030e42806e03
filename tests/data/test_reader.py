"""A data set that is added from outside."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch

from sdpctl.data.catalog import DATASETS, DatasetInfo
from sdpctl.data.files import FileHashes, class_names, locate, look_at
from sdpctl.data.reader import Located, Reader, reader_of
from sdpctl.data.source import Source
from sdpctl.data.sources import download
from sdpctl.errors import DataError

SPLITS = {"train.json": [[i % 2, 100 * (i % 2) + i] for i in range(40)], "test.json": [[0, 7], [1, 107]]}
"""Label and grey value of each image."""


class Toy(Reader):
    """Reads 4x4 images of one grey value each, from two JSON files."""

    def locate(self, root, *, partial):
        self.require_root(root)
        return Located((), {name: root / name for name in SPLITS})

    def open(self, root, located):
        return tuple(self._source(path) for path in located.files.values())

    def _source(self, path):
        pairs = torch.tensor(json.loads(path.read_text()))
        return Source(pairs[:, 1].to(torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4), pairs[:, 0], ("dark", "bright"))


@pytest.fixture
def toy(tmp_path):
    """Add the data set to the table, and return the folder of its files."""
    for name, pairs in SPLITS.items():
        (tmp_path / name).write_text(json.dumps(pairs))
    DATASETS.add(DatasetInfo(name="toy", num_classes=2, mean=(0.3,), std=(0.2,), code=f"{__name__}:Toy"))
    yield tmp_path
    DATASETS.remove("toy")


def test_one_entry_makes_a_data_set_that_trains(toy, open_data):
    seen = look_at("toy", locate("toy", toy), FileHashes(toy / "hashes.sqlite"))
    hashes = sorted([name, hashlib.sha256((toy / name).read_bytes()).hexdigest()] for name in SPLITS)
    assert seen.fingerprint == hashlib.sha256(json.dumps(["toy", [], hashes]).encode()).hexdigest()
    data = open_data("toy", toy, image_size=4, in_channels=1)
    assert data.classes == ("dark", "bright")
    assert (len(data.train_indices), len(data.holdout_indices), data.test_size) == (36, 4, 2)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(5):
        for x_NCHW, labels_N in data.training(epoch):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x_NCHW), labels_N).backward()
            optimizer.step()
    ((x_NCHW, labels_N),) = data.test(8)
    assert model(x_NCHW).argmax(1).tolist() == labels_N.tolist() == [0, 1]


def test_class_names_of_a_data_set_that_only_locates(toy, numbered):
    assert class_names("toy", toy) == ()
    assert class_names("imagefolder", numbered) == ("ant", "bee", "cat")


def test_what_is_not_downloaded_says_so(toy):
    with pytest.raises(DataError) as caught:
        download("toy", toy)
    assert str(caught.value) == f"toy is not downloaded; put its files into {toy}"
    with pytest.raises(DataError) as caught:
        locate("toy", toy / "none")
    assert str(caught.value) == f"{toy / 'none'}: there is no such data folder; set data.root=FOLDER"


@pytest.mark.parametrize("name", DATASETS)
def test_every_entry_has_a_reader_that_downloads_where_it_says_so(name):
    reader, info = reader_of(name), DATASETS[name]
    assert info.downloadable == (type(reader).download is not Reader.download)
    assert ("data.download=true" in reader.advice) == info.downloadable
    assert info.classes_from_folders == (name == "imagefolder")


def test_locating_needs_no_torch():
    code = "import sys; from sdpctl.data.catalog import DATASETS; from sdpctl.data.reader import reader_of; "
    code += "list(map(reader_of, DATASETS)); from sdpctl.data.files import locate; from pathlib import Path; "
    code += "locate('digits', Path('none')); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
