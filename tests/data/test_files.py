"""Where files lie, and the fingerprint."""

import hashlib
import os
import shutil

import pytest

from sdpctl.data import files
from sdpctl.data.catalog import DATASETS
from sdpctl.data.files import FileHashes, fingerprint, locate
from sdpctl.errors import DataError


@pytest.fixture
def folder(tmp_path):
    """Return an image folder whose files need be no images: only their bytes count here."""
    root = tmp_path / "data"
    for part in ("train", "val"):
        for name in ("ant", "bee"):
            (root / part / name).mkdir(parents=True)
            (root / part / name / "1.png").write_bytes(f"{part} {name}".encode())
    return root


@pytest.fixture
def identify(tmp_path):
    def identify(root, dataset="imagefolder"):
        return fingerprint(dataset, locate(dataset, root), FileHashes(tmp_path / "files.sqlite"))

    return identify


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_fingerprint_of_folders_by_hand(folder, identify):
    names = [f"{part}/{name}" for part in ("train", "val") for name in ("ant", "bee")]
    listed = ", ".join(f'["{name}/1.png", "{sha256(name.replace("/", " ").encode())}"]' for name in names)
    assert identify(folder) == sha256(f'["imagefolder", ["ant", "bee"], [{listed}]]'.encode())


def official(root, dataset):
    for name in DATASETS[dataset].files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


@pytest.mark.parametrize("dataset", [name for name, info in DATASETS.items() if info.files])
def test_fingerprint_of_official_files_by_hand(dataset, tmp_path, identify):
    listed = ", ".join(f'["{name}", "{sha256(name.encode())}"]' for name in sorted(DATASETS[dataset].files))
    assert identify(official(tmp_path, dataset), dataset) == sha256(f'["{dataset}", [], [{listed}]]'.encode())


def test_fingerprint_of_tiny_imagenet_has_the_annotations(tmp_path, identify):
    base = tmp_path / "tiny-imagenet-200"
    for name in ("train/n1/images/n1_0.JPEG", "val/images/val_0.JPEG"):
        (base / name).parent.mkdir(parents=True)
        (base / name).write_bytes(b"")
    (base / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn1\n")
    before = identify(tmp_path, "tiny-imagenet")
    (base / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn1\t0\n")
    assert identify(tmp_path, "tiny-imagenet") != before


def test_digits_need_no_files(tmp_path, identify):
    assert len(identify(tmp_path / "nowhere", "digits")) == 64


def change_bytes(folder):
    (folder / "val" / "bee" / "1.png").write_bytes(b"something else")


def change_a_name(folder):
    (folder / "train" / "ant" / "1.png").rename(folder / "train" / "ant" / "2.png")


def change_a_class(folder):
    for part in ("train", "val"):
        (folder / part / "bee").rename(folder / part / "wasp")


def add_an_image(folder):
    (folder / "train" / "ant" / "deeper").mkdir()
    (folder / "train" / "ant" / "deeper" / "2.JPEG").write_bytes(b"")


def exchange_two_images(folder):
    ant, bee = (folder / "train" / name / "1.png" for name in ("ant", "bee"))
    ant.rename(folder / "spare")
    bee.rename(ant)
    (folder / "spare").rename(bee)


@pytest.mark.parametrize("change", [change_bytes, change_a_name, change_a_class, add_an_image, exchange_two_images])
def test_fingerprint_changes(change, folder, identify):
    before = identify(folder)
    change(folder)
    assert identify(folder) != before


def add_a_note(folder):
    (folder / "train" / "ant" / "notes.txt").write_text("not an image")
    (folder / "README.md").write_text("nor is this")


def move(folder):
    shutil.move(folder, folder.parent / "elsewhere")


def touch(folder):
    os.utime(folder / "train" / "ant" / "1.png", ns=(1, 1))


@pytest.mark.parametrize("change", [add_a_note, move, touch])
def test_fingerprint_does_not_change(change, folder, identify):
    before = identify(folder)
    change(folder)
    assert identify(folder if folder.exists() else folder.parent / "elsewhere") == before


class TestFileHashes:
    @pytest.fixture
    def read(self, monkeypatch):
        """List the names of the files that are read."""
        read = []

        def noted(path, sha256=files._sha256):
            read.append(path.rpartition("/")[2])
            return sha256(path)

        monkeypatch.setattr(files, "_sha256", noted)
        return read

    @pytest.fixture
    def two(self, tmp_path):
        paths = [tmp_path / "a", tmp_path / "b"]
        for path in paths:
            path.write_text(path.name)
        return paths

    def test_in_the_order_asked(self, tmp_path, two):
        hashes = FileHashes(tmp_path / "files.sqlite")
        assert hashes.of(two[::-1]) == [sha256(b"b"), sha256(b"a")] == hashes.of(two)[::-1]

    def test_read_once(self, tmp_path, two, read):
        first = FileHashes(tmp_path / "files.sqlite").of(two)
        assert sorted(read) == ["a", "b"]
        assert FileHashes(tmp_path / "files.sqlite").of(two) == first
        assert len(read) == 2

    def test_read_again_after_a_change_of_size(self, tmp_path, two, read):
        hashes = FileHashes(tmp_path / "files.sqlite")
        hashes.of(two)
        stat = two[1].stat()
        two[1].write_text("longer")
        os.utime(two[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert hashes.of(two) == [sha256(b"a"), sha256(b"longer")]
        assert read[2:] == ["b"]

    def test_read_again_after_a_change_of_time(self, tmp_path, two, read):
        hashes = FileHashes(tmp_path / "files.sqlite")
        hashes.of(two)
        two[0].write_text("c")
        os.utime(two[0], ns=(5, 5))
        assert hashes.of(two) == [sha256(b"c"), sha256(b"b")]
        assert read[2:] == ["a"]
        hashes.of(two)
        assert len(read) == 3

    def test_nothing_is_written_when_it_is_not_to_remember(self, tmp_path, two, read):
        for _ in range(2):
            FileHashes(tmp_path / "files.sqlite", remember=False).of(two)
        assert len(read) == 4
        assert not (tmp_path / "files.sqlite").exists()

    def test_what_is_known_is_used_when_it_is_not_to_remember(self, tmp_path, two, read):
        FileHashes(tmp_path / "files.sqlite").of(two)
        FileHashes(tmp_path / "files.sqlite", remember=False).of(two)
        assert len(read) == 2

    @pytest.mark.parametrize("content", [b"", b"damaged" * 100], ids=["empty", "damaged"])
    def test_a_damaged_memory_costs_a_read_and_no_more(self, content, tmp_path, two):
        (tmp_path / "files.sqlite").write_bytes(content)
        assert FileHashes(tmp_path / "files.sqlite").of(two) == [sha256(b"a"), sha256(b"b")]


def no_root(folder):
    shutil.rmtree(folder)
    return folder, "there is no such data folder; set data.root="


def no_part(part):
    def remove(folder):
        shutil.rmtree(folder / part)
        return folder / part, "imagefolder lacks this folder; set data.root="

    return remove


def no_classes(folder):
    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()
    return folder / "train", "no class folders; each class is a folder of images here"


def empty_class(folder):
    (folder / "train" / "bee" / "1.png").unlink()
    return folder / "train" / "bee", "no image in this folder; add images or remove the folder"


def empty_test_class(folder):
    (folder / "val" / "ant" / "1.png").rename(folder / "val" / "ant" / "1.txt")
    return folder / "val" / "ant", "no image in this folder; add images or remove the folder"


def other_class(folder):
    (folder / "val" / "bee").rename(folder / "val" / "wasp")
    return folder, "train and val must have the same class folders, but only one has 'bee'"


def further_class(folder):
    shutil.copytree(folder / "val" / "bee", folder / "val" / "wasp")
    return folder, "train and val must have the same class folders, but only one has 'wasp'"


@pytest.mark.parametrize(
    "damage",
    [no_root, no_part("train"), no_part("val"), no_classes, empty_class, empty_test_class, other_class, further_class],
)
def test_what_a_folder_lacks(damage, folder):
    path, message = damage(folder)
    with pytest.raises(DataError) as caught:
        locate("imagefolder", folder)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "data.download" not in str(caught.value), "an image folder cannot be downloaded"
    assert caught.value.exit_code == 7


@pytest.mark.parametrize("lacking", DATASETS["cifar100"].files)
def test_a_lacking_official_file(lacking, tmp_path):
    official(tmp_path, "cifar100")
    (tmp_path / lacking).unlink()
    with pytest.raises(DataError) as caught:
        locate("cifar100", tmp_path)
    expected = f"{tmp_path / lacking}: cifar100 lacks this file; set data.root=FOLDER, or data.download=true"
    assert str(caught.value) == expected


def test_tiny_imagenet_without_annotations(tmp_path):
    base = tmp_path / "tiny-imagenet-200"
    (base / "train" / "n1").mkdir(parents=True)
    (base / "train" / "n1" / "1.JPEG").write_bytes(b"")
    (base / "val").mkdir()
    with pytest.raises(DataError) as caught:
        locate("tiny-imagenet", tmp_path)
    assert str(caught.value).startswith(f"{base / 'val' / 'val_annotations.txt'}: ")
    assert str(caught.value).endswith("unpack it again")
