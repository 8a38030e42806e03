"""Opening data sets in their official formats, and bringing them."""

import gzip
import hashlib
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets

from sdpctl.data import digits
from sdpctl.data.catalog import DATASETS
from sdpctl.data.files import locate
from sdpctl.data.folders import TinyImageNet
from sdpctl.data.reader import reader_of
from sdpctl.data.sources import download, open_sources, stratified
from sdpctl.errors import DataError


def opened(dataset, root):
    return open_sources(dataset, root, locate(dataset, root))


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def pixels(count, *shape):
    return np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)


def idx(array):
    """Return the bytes of an IDX file: two zeros, 8 for uint8, the dimensions' number and sizes, then the data."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


MNIST_TRAIN = pixels(12, 28, 28), np.arange(12, dtype=np.uint8) % 10
MNIST_TEST = pixels(5, 28, 28), np.array([9, 0, 3, 3, 1], dtype=np.uint8)


@pytest.fixture
def mnist_files():
    """Return the contents of MNIST's four files, by name."""
    arrays = zip(reader_of("mnist").files, (*MNIST_TRAIN, *MNIST_TEST), strict=True)
    return {name.rpartition("/")[2]: idx(array) for name, array in arrays}


@pytest.mark.parametrize(
    ("dataset", "folder", "first"), [("mnist", "MNIST", "0 - zero"), ("fashion-mnist", "FashionMNIST", "T-shirt/top")]
)
def test_idx_files(dataset, folder, first, mnist_files, tmp_path):
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    for name, content in mnist_files.items():
        (raw / name).write_bytes(content)
    locate(dataset, tmp_path)
    for source, (images, labels) in zip(opened(dataset, tmp_path), (MNIST_TRAIN, MNIST_TEST), strict=True):
        assert source.images.dtype == torch.uint8
        assert source.images.shape == (len(images), 1, 28, 28)
        assert np.array_equal(source.images[:, 0], images)
        assert source.labels.dtype == torch.int64
        assert source.labels.tolist() == labels.tolist()
        assert len(source.classes) == 10
        assert source.classes[0] == first


@pytest.mark.parametrize("content", [b"", b"\0\0\x08", b"<html>Not Found</html>", idx(MNIST_TRAIN[0])[:-5]], ids=len)
def test_a_damaged_idx_file(content, mnist_files, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, whole in mnist_files.items():
        (raw / name).write_bytes(content if name == "train-images-idx3-ubyte" else whole)
    with pytest.raises(DataError, match="mnist cannot be read") as caught:
        opened("mnist", tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert "read ()" not in str(caught.value), "the reason is not empty"


CIFAR = {
    "cifar10": {f"data_batch_{i}": pixels(i + 1, 3, 32, 32) for i in range(1, 6)} | {"test_batch": pixels(4, 3, 32, 32)},
    "cifar100": {"train": pixels(9, 3, 32, 32), "test": pixels(4, 3, 32, 32)},
}
"""Tiny batches as (N, C, H, W), by file name."""


def cifar_labels(dataset, name):
    return [(7 * i + len(name)) % DATASETS[dataset].num_classes for i in range(len(CIFAR[dataset][name]))]


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Write a tiny CIFAR as pickles, and let torchvision know their checksums."""

    def write(dataset):
        torchvision, fine = (datasets.CIFAR10, "") if dataset == "cifar10" else (datasets.CIFAR100, "fine_")
        folder = tmp_path / "root" / torchvision.base_folder
        folder.mkdir(parents=True)
        for name, images in CIFAR[dataset].items():
            batch = {"data": images.reshape(len(images), -1), f"{fine}labels": cifar_labels(dataset, name)}
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
        meta = folder / torchvision.meta["filename"]
        classes = [f"class {i}" for i in range(DATASETS[dataset].num_classes)]
        meta.write_bytes(pickle.dumps({f"{fine}label_names": classes}, protocol=2))
        for list_name in ("train_list", "test_list"):
            known = [[name, md5(folder / name)] for name, _ in getattr(torchvision, list_name)]
            monkeypatch.setattr(torchvision, list_name, known)
        monkeypatch.setitem(torchvision.meta, "md5", md5(meta))
        return tmp_path / "root"

    return write


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_cifar(dataset, cifar):
    root = cifar(dataset)
    locate(dataset, root)
    names = list(CIFAR[dataset])
    for source, parts in zip(opened(dataset, root), (names[:-1], names[-1:]), strict=True):
        assert source.images.dtype == torch.uint8
        assert np.array_equal(source.images, np.concatenate([CIFAR[dataset][name] for name in parts]))
        assert source.labels.dtype == torch.int64
        assert source.labels.tolist() == [label for name in parts for label in cifar_labels(dataset, name)]
        assert source.classes == tuple(f"class {i}" for i in range(DATASETS[dataset].num_classes))


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_damaged_pickle(name, cifar):
    root = cifar("cifar10")
    path = root / "cifar-10-batches-py" / name
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DataError) as caught:
        opened("cifar10", root)
    assert str(caught.value).startswith(f"{root}: cifar10 cannot be read (")
    assert caught.value.exit_code == 7


def test_image_folder(photos):
    train, test = opened("imagefolder", photos)
    assert train.classes == test.classes == ("ant", "bee", "cat")
    assert train.labels.tolist() == [0] * 10 + [1] * 20 + [2] * 31
    assert test.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for source, part in ((train, "train"), (test, "val")):
        assert list(source.images) == sorted((photos / part).rglob("*.jpg"))


@pytest.fixture
def tiny_imagenet(tmp_path):
    base = tmp_path / "root" / "tiny-imagenet-200"
    for name in ("n02", "n01"):
        (base / "train" / name / "images").mkdir(parents=True)
        (base / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t62\t62\n")
        for i in range(2):
            Image.new("RGB", (64, 64)).save(base / "train" / name / "images" / f"{name}_{i}.JPEG")
    (base / "val" / "images").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (64, 64)).save(base / "val" / "images" / f"val_{i}.JPEG")
    lines = [f"val_{i}.JPEG\t{name}\t0\t32\t44\t62\n" for i, name in enumerate(("n02", "n01", "n02"))]
    (base / "val" / "val_annotations.txt").write_text("".join(lines))
    return base


def test_tiny_imagenet(tiny_imagenet):
    locate("tiny-imagenet", tiny_imagenet.parent)
    train, test = opened("tiny-imagenet", tiny_imagenet.parent)
    assert train.classes == test.classes == ("n01", "n02")
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert [path.name for path in train.images] == ["n01_0.JPEG", "n01_1.JPEG", "n02_0.JPEG", "n02_1.JPEG"]
    assert list(test.images) == [tiny_imagenet / "val" / "images" / f"val_{i}.JPEG" for i in range(3)]
    assert test.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize("line", ["val_1.JPEG\tn99\t0\t0\t1\t1", "val_1.JPEG", ""])
def test_an_unknown_wordnet_id(line, tiny_imagenet):
    annotations = tiny_imagenet / "val" / "val_annotations.txt"
    annotations.write_text(f"val_0.JPEG\tn01\t0\t0\t1\t1\n{line}\n")
    with pytest.raises(DataError, match="is not a class of the training split; unpack the archive again") as caught:
        opened("tiny-imagenet", tiny_imagenet.parent)
    assert str(caught.value).startswith(f"{annotations}:2: ")


def test_annotations_that_are_no_text(tiny_imagenet):
    (tiny_imagenet / "val" / "val_annotations.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"this is not UTF-8 text .*; unpack the archive again"):
        opened("tiny-imagenet", tiny_imagenet.parent)


class TestDigits:
    def test_pixels_are_those_of_scikit_learn(self, tmp_path):
        images, labels = load_digits().images, load_digits().target
        expected = sorted((int(label), *image.ravel().astype(int)) for image, label in zip(images, labels, strict=True))
        found = []
        for source in opened("digits", tmp_path / "nowhere"):
            assert source.images.shape[1:] == (1, 8, 8)
            assert source.images.dtype == torch.uint8
            found += [
                (label, *torch.round(image.flatten() * (16 / 255)).int().tolist())
                for image, label in zip(source.images, source.labels.tolist(), strict=True)
            ]
        assert sorted(found) == expected
        assert len(found) == 1797

    def test_a_fifth_of_each_class_is_the_test_split(self, tmp_path):
        train, test = opened("digits", tmp_path)
        assert train.classes == test.classes == tuple("0123456789")
        counts = np.bincount(load_digits().target)
        assert test.labels.bincount().tolist() == [round(count / 5) for count in counts]
        assert train.labels.bincount().tolist() == [count - round(count / 5) for count in counts]

    def test_the_splits_are_always_the_same(self, tmp_path):
        first, again = (opened("digits", tmp_path) for _ in range(2))
        for one, other in zip(first, again, strict=True):
            assert torch.equal(one.images, other.images)

    def test_other_digits_are_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(digits, "DIGITS_SHA256", "0" * 64)
        with pytest.raises(DataError, match="not the known 1,797 images"):
            opened("digits", tmp_path)


class TestStratified:
    LABELS = [0] * 10 + [2] * 20 + [1] * 31

    @pytest.mark.parametrize(("share", "counts"), [(0.1, [1, 2, 3]), (0.2, [2, 4, 6]), (0.0, [])])
    def test_the_same_share_of_every_class(self, share, counts):
        drawn = stratified(self.LABELS, share, seed=0, name="x")
        assert drawn == sorted(set(drawn))
        found = np.bincount([self.LABELS[i] for i in drawn], minlength=3) if drawn else np.array([])
        assert found.tolist() == [counts[i] for i in (0, 2, 1)] if counts else not drawn

    def test_depends_on_seed_and_name_alone(self):
        drawn = stratified(self.LABELS, 0.2, seed=0, name="x")
        assert stratified(self.LABELS, 0.2, seed=0, name="x") == drawn
        assert stratified(self.LABELS, 0.2, seed=1, name="x") != drawn
        assert stratified(self.LABELS, 0.2, seed=0, name="y") != drawn


class TestDownload:
    @pytest.fixture(autouse=True)
    def _from_files(self, monkeypatch):
        """Let torchvision bring file:// addresses too: its own function asks for a length, which those lack."""

        def bring(url, filename):
            with urlopen(url) as response:
                Path(filename).write_bytes(response.read())

        monkeypatch.setattr(datasets.utils, "_urlretrieve", bring)

    @pytest.fixture
    def archive(self, tiny_imagenet, tmp_path, monkeypatch):
        """Take the place of the authors' archive."""
        path = tmp_path / "tiny-imagenet-200.zip"
        with zipfile.ZipFile(path, "w") as file:
            for member in sorted(tiny_imagenet.rglob("*")):
                file.write(member, member.relative_to(tiny_imagenet.parent))
        monkeypatch.setattr(TinyImageNet, "archive", (path.as_uri(), md5(path)))
        return path

    def test_tiny_imagenet(self, archive, tmp_path):
        root = tmp_path / "new"
        download("tiny-imagenet", root)
        assert locate("tiny-imagenet", root).classes == ("n01", "n02")
        archive.unlink()
        download("tiny-imagenet", root)
        assert len(opened("tiny-imagenet", root)[1].labels) == 3

    def test_a_wrong_checksum(self, archive, tmp_path, monkeypatch):
        monkeypatch.setattr(TinyImageNet, "archive", (archive.as_uri(), "0" * 32))
        with pytest.raises(DataError, match=r"tiny-imagenet could not be downloaded .*; fetch it by hand and set data\.root"):
            download("tiny-imagenet", tmp_path / "new")

    def test_nothing_at_the_address(self, archive, tmp_path):
        archive.unlink()
        with pytest.raises(DataError, match="tiny-imagenet could not be downloaded") as caught:
            download("tiny-imagenet", tmp_path / "new")
        assert str(caught.value).startswith(f"{tmp_path / 'new'}: ")

    @pytest.mark.filterwarnings("ignore:Python 3.14 will, by default, filter:DeprecationWarning")  # torchvision's own call
    def test_cifar(self, cifar, tmp_path, monkeypatch):
        path = tmp_path / "cifar-10-python.tar.gz"
        with tarfile.open(path, "w:gz") as file:
            file.add(cifar("cifar10") / "cifar-10-batches-py", "cifar-10-batches-py")
        monkeypatch.setattr(datasets.CIFAR10, "url", path.as_uri())
        monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(path))
        download("cifar10", tmp_path / "new")
        path.unlink()
        download("cifar10", tmp_path / "new")
        assert len(opened("cifar10", tmp_path / "new")[0].labels) == 20

    def test_mnist(self, mnist_files, tmp_path, monkeypatch):
        (tmp_path / "mirror").mkdir()
        resources = []
        for name, content in mnist_files.items():
            path = tmp_path / "mirror" / f"{name}.gz"
            path.write_bytes(gzip.compress(content))
            resources.append((path.name, md5(path)))
        monkeypatch.setattr(datasets.MNIST, "mirrors", [(tmp_path / "mirror").as_uri() + "/"])
        monkeypatch.setattr(datasets.MNIST, "resources", resources)
        download("mnist", tmp_path / "new")
        assert len(opened("mnist", tmp_path / "new")[1].labels) == 5
