"""Where files lie, and the fingerprint."""

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import socket
import sqlite3
import struct
import zlib
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdpctl.data import files, images
from sdpctl.data.files import FileHashes, Unreadable, identified_by, images_in, locate, look_at
from sdpctl.data.reader import reader_of
from sdpctl.errors import DataError, LoaderError


def picture(text):
    """Return the bytes of a small image, different for different texts: a PGM, which is text itself."""
    shades = " ".join(str(byte) for byte in hashlib.md5(text.encode()).digest())
    return f"P2 4 4 255 {shades}".encode()


@pytest.fixture
def folder(tmp_path):
    """Return an image folder of one image a class and split."""
    root = tmp_path / "data"
    for part in ("train", "val"):
        for name in ("ant", "bee"):
            (root / part / name).mkdir(parents=True)
            (root / part / name / "1.png").write_bytes(picture(f"{part} {name}"))
    return root


@pytest.fixture
def seen(tmp_path):
    """Look at a data set."""

    def seen(root, dataset="imagefolder", *, partial=False, **chosen):
        return look_at(dataset, locate(dataset, root, partial=partial), FileHashes(tmp_path / "files.sqlite"), **chosen)

    return seen


@pytest.fixture
def identify(seen):
    return lambda *arguments, **chosen: seen(*arguments, **chosen).fingerprint


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_fingerprint_of_folders_by_hand(folder, identify):
    names = [f"{part}/{name}" for part in ("train", "val") for name in ("ant", "bee")]
    listed = ", ".join(f'["{name}/1.png", "{sha256(picture(name.replace("/", " ")))}"]' for name in names)
    assert identify(folder) == sha256(f'["imagefolder", ["ant", "bee"], [{listed}]]'.encode())


def official(root, dataset):
    for name in reader_of(dataset).files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


@pytest.mark.parametrize("dataset", ["mnist", "fashion-mnist", "cifar10", "cifar100"])
def test_fingerprint_of_official_files_by_hand(dataset, tmp_path, identify):
    listed = ", ".join(f'["{name}", "{sha256(name.encode())}"]' for name in sorted(reader_of(dataset).files))
    assert identify(official(tmp_path, dataset), dataset) == sha256(f'["{dataset}", [], [{listed}]]'.encode())


def test_fingerprint_of_tiny_imagenet_has_the_annotations(tmp_path, identify):
    base = tmp_path / "tiny-imagenet-200"
    for name in ("train/n1/images/n1_0.JPEG", "val/images/val_0.JPEG"):
        (base / name).parent.mkdir(parents=True)
        (base / name).write_bytes(picture(name))
    (base / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn1\n")
    before = identify(tmp_path, "tiny-imagenet")
    (base / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn1\t0\n")
    assert identify(tmp_path, "tiny-imagenet") != before


def test_digits_need_no_files(tmp_path, identify):
    assert len(identify(tmp_path / "nowhere", "digits")) == 64


def change_bytes(folder):
    (folder / "val" / "bee" / "1.png").write_bytes(picture("something else"))


def change_a_name(folder):
    (folder / "train" / "ant" / "1.png").rename(folder / "train" / "ant" / "2.png")


def change_a_class(folder):
    for part in ("train", "val"):
        (folder / part / "bee").rename(folder / part / "wasp")


def add_an_image(folder):
    (folder / "train" / "ant" / "deeper").mkdir()
    (folder / "train" / "ant" / "deeper" / "2.JPEG").write_bytes(picture("2"))


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


def add_hidden_names(folder):
    for name in (".DS_Store", "._1.png", ".1.png", ".hidden/1.png"):
        path = folder / "train" / "ant" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    (folder / "val" / ".ipynb_checkpoints").mkdir()


def add_a_note(folder):
    (folder / "train" / "ant" / "notes.txt").write_text("not an image")
    (folder / "README.md").write_text("nor is this")


def move(folder):
    shutil.move(folder, folder.parent / "elsewhere")


def touch(folder):
    os.utime(folder / "train" / "ant" / "1.png", ns=(1, 1))


@pytest.mark.parametrize("change", [add_a_note, add_hidden_names, move, touch])
def test_fingerprint_does_not_change(change, folder, identify):
    before = identify(folder)
    change(folder)
    assert identify(folder if folder.exists() else folder.parent / "elsewhere") == before


class TestFileHashes:
    @pytest.fixture
    def read(self, monkeypatch):
        """List the names of the files that are read."""
        read = []

        def noted(path, look=files.look):
            read.append(path.name)
            return look(path)

        monkeypatch.setattr(files, "look", noted)
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
        return folder / part, "this folder of imagefolder is missing; set data.root="

    return remove


def no_classes(folder):
    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()
    return folder / "train", "no class folders; put the images of each class into a folder here"


def empty_class(folder):
    (folder / "train" / "bee" / "1.png").unlink()
    return folder / "train" / "bee", "no image in this folder; add images or remove the folder"


def empty_test_class(folder):
    (folder / "val" / "ant" / "1.png").rename(folder / "val" / "ant" / "1.txt")
    return folder / "val" / "ant", "no image in this folder; add images or remove the folder"


def other_class(folder):
    (folder / "val" / "bee").rename(folder / "val" / "wasp")
    return folder, "train and val must have the same class folders, but val lacks 'bee'; train lacks 'wasp'; add them, or set"


def further_class(folder):
    shutil.copytree(folder / "val" / "bee", folder / "val" / "wasp")
    return folder, "train and val must have the same class folders, but train lacks 'wasp'; add them, or set data.partial"


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


@pytest.mark.parametrize("lacking", reader_of("cifar100").files)
def test_a_lacking_official_file(lacking, tmp_path):
    official(tmp_path, "cifar100")
    (tmp_path / lacking).unlink()
    with pytest.raises(DataError) as caught:
        locate("cifar100", tmp_path)
    expected = f"{tmp_path / lacking}: this file of cifar100 is missing; set data.root=FOLDER, or data.download=true"
    assert str(caught.value) == expected


def test_tiny_imagenet_without_annotations(tmp_path):
    base = tmp_path / "tiny-imagenet-200"
    (base / "train" / "n1").mkdir(parents=True)
    (base / "train" / "n1" / "1.JPEG").write_bytes(picture("1"))
    (base / "val").mkdir()
    with pytest.raises(DataError) as caught:
        locate("tiny-imagenet", tmp_path)
    assert str(caught.value).startswith(f"{base / 'val' / 'val_annotations.txt'}: ")
    assert str(caught.value).endswith("unpack it again")


class TestListing:
    def test_in_the_order_of_torchvision(self, tmp_path):
        """An independent listing: labels and order decide which images are held out."""
        from torchvision.datasets import ImageFolder

        for part in ("train", "val"):
            for name in ("b", "a/z", "a", "a/b", "a-b", "c/a.b/c", "c/a"):
                (tmp_path / part / name).mkdir(parents=True, exist_ok=True)
                for file in ("10.png", "9.PNG", "b.jpeg", "a.tif"):
                    (tmp_path / part / name / file).touch()
        located = locate("imagefolder", tmp_path)
        theirs = ImageFolder(tmp_path / "train")
        assert [(str(located.files[name]), label) for name, label in located.train] == theirs.samples
        assert located.classes == tuple(theirs.classes)

    def test_a_gif_counts(self, folder):
        (folder / "train" / "ant" / "2.gif").touch()
        assert ("train/ant/2.gif", 0) in locate("imagefolder", folder).train

    def test_tiny_imagenet_without_hidden_names(self, tmp_path):
        base = tmp_path / "tiny-imagenet-200"
        for name in ("train/n1/images/n1_0.JPEG", "train/.n2/1.JPEG", "val/images/val_0.JPEG", "val/images/._val_0.JPEG"):
            (base / name).parent.mkdir(parents=True, exist_ok=True)
            (base / name).touch()
        (base / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn1\n")
        located = locate("tiny-imagenet", tmp_path)
        assert located.classes == ("n1",)
        assert set(located.files) == {"train/n1/images/n1_0.JPEG", "val/images/val_0.JPEG", "val/val_annotations.txt"}

    def test_tiny_imagenet_with_an_image_that_is_not_there(self, tmp_path):
        base = tmp_path / "tiny-imagenet-200"
        for name in ("train/n1/1.JPEG", "val/images/val_0.JPEG"):
            (base / name).parent.mkdir(parents=True)
            (base / name).touch()
        (base / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn1\n../../elsewhere.JPEG\tn1\n")
        with pytest.raises(DataError, match=r"annotations\.txt:2: '\.\./\.\./elsewhere\.JPEG' is not in val/images"):
            locate("tiny-imagenet", tmp_path)

    @pytest.mark.parametrize("target", [".", "..", "deeper"])
    def test_links_that_lead_to_a_folder_twice(self, target, folder):
        """A link to a folder above would never end; thirty folders with two links each to the next would not either."""
        (folder / "train" / "ant" / "deeper").mkdir()
        (folder / "train" / "ant" / "again").symlink_to(target)
        with pytest.raises(DataError, match=r"links lead to this folder twice, also as .*; remove one of them") as caught:
            locate("imagefolder", folder) if target != ".." else images_in(folder)
        assert str(caught.value).startswith(str(folder / "train"))

    def test_a_linked_folder_is_listed(self, folder, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "2.png").write_bytes(picture("2"))
        (folder / "train" / "ant" / "more").symlink_to(tmp_path / "elsewhere")
        assert ("train/ant/more/2.png", 0) in locate("imagefolder", folder).train

    @pytest.mark.parametrize("refused", ["train", "ant"])
    def test_a_folder_that_may_not_be_read(self, refused, folder, monkeypatch):
        """Root may read everything, so the refusal is made up."""

        def scandir(path, scandir=os.scandir):
            if os.fspath(path).endswith(refused):
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", scandir)
        with pytest.raises(DataError, match=rf"{refused}: this cannot be read \(Permission denied\); fix its permissions"):
            locate("imagefolder", folder)

    def test_a_tree_that_is_too_deep(self, folder, monkeypatch):
        monkeypatch.chdir(folder / "train" / "ant")
        for _ in range(20):
            Path("d" * 250).mkdir()
            os.chdir("d" * 250)
        with pytest.raises(DataError, match=r"this cannot be read \(File name too long\)"):
            locate("imagefolder", folder)

    def test_every_class_that_a_split_lacks_is_named(self, folder):
        for number in range(30):
            (folder / "train" / f"c{number:02}").mkdir()
        (folder / "val" / "wasp").mkdir()
        with pytest.raises(DataError) as caught:
            locate("imagefolder", folder)
        names = ", ".join(f"'c{number:02}'" for number in range(20))
        assert f"but val lacks {names} and 10 more; train lacks 'wasp'; " in str(caught.value)

    def test_a_class_whose_name_is_not_text(self, folder):
        for part in ("train", "val"):
            (folder / part / os.fsdecode("🐈".encode() + b"caf\xe9")).mkdir()
        with pytest.raises(DataError, match=r"caf\\udce9: the name of this class is not UTF-8; rename the folder"):
            locate("imagefolder", folder)


class TestPartial:
    def test_val_may_lack_classes_and_train_too(self, folder, seen):
        shutil.rmtree(folder / "val" / "ant")
        shutil.copytree(folder / "val" / "bee", folder / "val" / "wasp")
        (folder / "train" / "cat").mkdir()
        located = seen(folder, partial=True).located
        assert located.classes == ("ant", "bee", "cat", "wasp")
        assert located.train == (("train/ant/1.png", 0), ("train/bee/1.png", 1))
        assert located.test == (("val/bee/1.png", 1), ("val/wasp/1.png", 3))

    def test_the_fingerprint_of_a_whole_folder_is_the_same(self, folder, identify):
        assert identify(folder) == identify(folder, partial=True)

    @pytest.mark.parametrize("part", ["train", "val"])
    def test_a_split_has_images(self, part, folder):
        for path in (folder / part).rglob("*.png"):
            path.unlink()
        with pytest.raises(DataError, match=rf"{part}: no image in this folder"):
            locate("imagefolder", folder, partial=True)


def truncated(path):
    Image.effect_noise((64, 64), 90).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-300])


def wide(path):
    """Write the header of a PNG of 1 x 80,000,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 1, 80_000_000, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 9) + b"IDAT")


BAD = {
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
    "AppleDouble": (lambda path: path.write_bytes(b"\0\5\x16\7"), "it is not an image"),
    "text": (lambda path: path.write_text("not an image"), "it is not an image"),
    "truncated": (truncated, "image file is truncated (6 bytes not processed)"),
    "elongated": (wide, "it has 1 x 80,000,000 pixels, which is too elongated to be resized"),
    "PostScript": (lambda p: Image.new("L", (9, 9)).save(p, "EPS"), "it is PostScript, a program that would have to be run"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "No such file or directory"),
    "itself": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    "FIFO": (os.mkfifo, "not a regular file but a FIFO"),
    "zero": (lambda path: path.symlink_to("/dev/zero"), "not a regular file but a device"),
    "socket": (lambda path: bind(path), "No such device or address"),
    "float": (
        lambda path: Image.fromarray(np.full((3, 3), 2, np.float32)).save(path, "TIFF"),
        "its floating-point pixels are from 2 to 2; scale them to 0..1",
    ),
}


def bind(path):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


class TestFirstLook:
    @pytest.mark.parametrize("name", BAD)
    def test_a_bad_image(self, name, folder, seen, tmp_path):
        path = folder / "train" / "ant" / "2.jpg"
        make, reason = BAD[name]
        before = seen(folder)
        make(path)
        for _ in range(2):
            with pytest.raises(DataError) as caught:
                seen(folder)
            advice = "remove it, or leave it out with --set data.skip_unreadable=true"
            line = f"{path}: this image cannot be decoded ({reason}); {advice}"
            assert re.sub(r"\(\d+ bytes not", "(6 bytes not", str(caught.value)) == line
        skipped = seen(folder, skip_unreadable=True)
        assert skipped.fingerprint == before.fingerprint
        assert skipped.located == before.located
        assert list(skipped.left_out) == ["train/ant/2.jpg"]

    def test_a_large_image_is_refused_by_its_header(self, folder, seen, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)
        with pytest.raises(DataError, match=r"4 of 4 images cannot be decoded; remove them, or leave them out") as caught:
            seen(folder)
        assert str(caught.value).splitlines()[0].endswith("this image cannot be decoded (it has more than 14 pixels)")

    def test_all_bad_ones_are_named_at_once(self, folder, seen):
        for number in range(30):
            (folder / "val" / "bee" / f"b{number:02}.jpg").touch()
        with pytest.raises(DataError) as caught:
            seen(folder)
        *lines, more, last = str(caught.value).splitlines()
        assert [line.partition(": ")[0][-7:] for line in lines] == [f"b{number:02}.jpg" for number in range(20)]
        assert more == "and 10 more"
        assert last.startswith("30 of 34 images cannot be decoded; ")

    def test_a_class_of_which_nothing_is_left(self, folder, seen):
        (folder / "val" / "bee" / "1.png").write_bytes(b"")
        with pytest.raises(DataError, match="no test image of 'bee' can be decoded"):
            seen(folder, skip_unreadable=True)

    @pytest.mark.parametrize("name", [b"caf\xe9.png", b"two\nlines\x1b[2J.png", "größe.png".encode()])
    def test_names_of_all_kinds(self, name, folder, seen):
        path = folder / "train" / "ant" / os.fsdecode(name)
        path.write_bytes(picture("2"))
        first = seen(folder)
        assert len(first.located.train) == 3
        assert seen(folder).fingerprint == first.fingerprint
        path.write_bytes(b"")
        with pytest.raises(DataError) as caught:
            seen(folder)
        assert str(caught.value).isprintable()

    def test_no_thread_is_asked_twice_and_progress_is_shown(self, folder, tmp_path):
        shown = []

        def watch(found, total):
            shown.append(total)
            for result in found:
                shown.append("one")
                yield result

        for _ in range(2):
            look_at("imagefolder", locate("imagefolder", folder), FileHashes(tmp_path / "files.sqlite"), watch=watch)
        assert shown == [4, "one", "one", "one", "one"]

    def test_an_interrupted_look_keeps_what_it_saw(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(files, "AT_A_TIME", 2)
        hashes = FileHashes(tmp_path / "files.sqlite")

        def stopped(found, total):
            yield next(found)
            yield next(found)
            found.close()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            look_at("imagefolder", locate("imagefolder", folder), hashes, watch=stopped)
        seen = []
        look_at("imagefolder", locate("imagefolder", folder), hashes, watch=lambda found, total: seen.append(total) or found)
        assert seen == [2]

    def test_hashes_of_earlier_versions_are_not_believed(self, folder, tmp_path):
        """Their images were never decoded."""
        bad = folder / "train" / "ant" / "2.jpg"
        bad.touch()
        stat = bad.stat()
        with closing(sqlite3.connect(tmp_path / "files.sqlite")) as database, database:
            database.execute("create table files (path text primary key, size, mtime_ns, sha256)")
            database.execute("insert into files values (?, ?, ?, ?)", (str(bad), stat.st_size, stat.st_mtime_ns, sha256(b"")))
        found = FileHashes(tmp_path / "files.sqlite").of([bad, folder / "train" / "ant" / "1.png"])
        assert found == [Unreadable("the file is empty"), sha256(picture("train ant"))]

    def test_permissions_that_were_mended(self, folder, tmp_path, monkeypatch):
        path = folder / "train" / "ant" / "1.png"
        hashes = FileHashes(tmp_path / "files.sqlite")
        with monkeypatch.context() as patch:
            patch.setattr(files, "open_regular", refuse)
            patch.setattr(images, "open_regular", refuse)
            assert hashes.of([path]) == [Unreadable("Permission denied")]
        assert hashes.of([path]) == [sha256(picture("train ant"))]

    def test_a_store_that_cannot_remember(self, folder, tmp_path):
        with closing(sqlite3.connect(tmp_path / "files.sqlite")) as database, database:
            database.execute("create table seen (something)")
        with pytest.raises(DataError, match=r"files\.sqlite: the hashes of the data cannot be written to it"):
            look_at("imagefolder", locate("imagefolder", folder), FileHashes(tmp_path / "files.sqlite"))


class TestSizes:
    """`data.identify=stat`: names and sizes, and no image is read."""

    def test_the_fingerprint_by_hand(self, folder, identify):
        names = [f"{part}/{name}/1.png" for part in ("train", "val") for name in ("ant", "bee")]
        sizes = sorted((name, str((folder / name).stat().st_size)) for name in names)
        content = json.dumps(["stat", "imagefolder", ["ant", "bee"], sizes])
        found = identify(folder, identify="stat")
        assert found == "stat-" + sha256(content.encode())
        assert identified_by(found) == "stat"
        assert identified_by(identify(folder)) == "content"

    def test_no_image_is_opened_and_nothing_is_cached(self, folder, seen, monkeypatch, tmp_path):
        monkeypatch.setattr(files, "open_regular", refuse)
        monkeypatch.setattr(images, "open_regular", refuse)
        assert len(seen(folder, identify="stat").located.train) == 2
        assert not (tmp_path / "files.sqlite").exists()

    def test_what_is_noticed_and_what_is_not(self, folder, identify):
        path = folder / "train" / "ant" / "1.png"
        first, content = identify(folder, identify="stat"), identify(folder)
        os.utime(path, (0, 0))
        assert identify(folder, identify="stat") == first
        shades = path.read_bytes()
        path.write_bytes(shades[:-1] + (b"1" if shades.endswith(b"0") else b"0"))
        assert identify(folder, identify="stat") == first
        assert identify(folder) != content
        seen = {first}
        path.write_bytes(path.read_bytes() + b" ")
        seen.add(identify(folder, identify="stat"))
        path.rename(path.with_name("2.png"))
        seen.add(identify(folder, identify="stat"))
        (folder / "val" / "bee" / "2.png").write_bytes(picture("more"))
        seen.add(identify(folder, identify="stat"))
        assert len(seen) == 4

    def test_files_that_cannot_be_images(self, folder, seen):
        ant = folder / "train" / "ant"
        (ant / "empty.jpg").touch()
        os.mkfifo(ant / "fifo.jpg")
        (ant / "gone.jpg").symlink_to("nowhere")
        (ant / "loop.jpg").symlink_to("loop.jpg")
        with pytest.raises(DataError) as caught:
            seen(folder, identify="stat")
        reasons = ("the file is empty", "not a regular file but a FIFO")
        reasons += ("No such file or directory", "Too many levels of symbolic links")
        assert str(caught.value).splitlines() == [
            *(
                f"{ant / name}.jpg: this image cannot be decoded ({reason})"
                for name, reason in zip(("empty", "fifo", "gone", "loop"), reasons, strict=True)
            ),
            "4 of 8 images cannot be decoded; remove them",
        ]

    def test_one_that_vanishes_after_it_was_listed(self, folder, tmp_path):
        located = locate("imagefolder", folder)
        (folder / "val" / "bee" / "1.png").unlink()
        with pytest.raises(
            DataError, match=r"bee/1\.png: this image cannot be decoded \(No such file or directory\); remove it$"
        ):
            look_at("imagefolder", located, FileHashes(tmp_path / "files.sqlite"), identify="stat")

    def test_folders_that_links_lead_to_twice(self, folder, seen):
        (folder / "train" / "ant" / "again").symlink_to(folder / "train" / "ant")
        with pytest.raises(DataError, match="links lead to this folder twice"):
            seen(folder, identify="stat")

    def test_labels_are_hashed(self, tmp_path, identify):
        base = tmp_path / "tiny-imagenet-200"
        for place in ("train/n1/images/a.png", "train/n2/images/b.png", "val/images/c.png", "val/images/d.png"):
            (base / place).parent.mkdir(parents=True, exist_ok=True)
            (base / place).write_bytes(picture(place))
        labels, found = base / "val" / "val_annotations.txt", set()
        for text in ("c.png\tn1\nd.png\tn2\n", "c.png\tn2\nd.png\tn1\n"):
            labels.write_text(text)
            found.add(identify(tmp_path, "tiny-imagenet", identify="stat"))
        assert len(found) == 2


def die(_):
    os.kill(os.getpid(), 9)


class TestProcesses:
    """Many files are looked at by processes."""

    @pytest.fixture(autouse=True)
    def many(self, monkeypatch):
        monkeypatch.setattr(files, "MANY", 3)
        monkeypatch.setattr(files, "PIECE", 2)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})

    @pytest.fixture
    def crowd(self, folder):
        """Add images that differ, and one that cannot be decoded."""
        for number in range(40):
            (folder / "train" / "ant" / f"x{number}.png").write_bytes(picture(str(number)))
        (folder / "val" / "bee" / "bad.png").write_bytes(b"not an image")
        return folder

    def test_find_what_threads_find(self, crowd, tmp_path, monkeypatch):
        paths = images_in(crowd)
        by_processes = FileHashes(tmp_path / "files.sqlite").of(paths)
        monkeypatch.setattr(files, "MANY", 1000)
        assert FileHashes(tmp_path / "other.sqlite").of(paths) == by_processes
        bad = crowd / "val" / "bee" / "bad.png"
        assert dict(zip(paths, by_processes, strict=True))[bad] == Unreadable("it is not an image")
        assert by_processes[0] == sha256(paths[0].read_bytes())
        assert not multiprocessing.active_children()

    def test_are_other_processes(self, crowd):
        found = set(files.on_all_cores(pid, images_in(crowd)))
        assert os.getpid() not in found
        assert len(found) <= 3

    def test_an_interrupted_look_keeps_what_it_saw(self, crowd, tmp_path, monkeypatch):
        monkeypatch.setattr(files, "AT_A_TIME", 4)
        paths = [path for path in images_in(crowd) if path.name != "bad.png"]

        def stopped(found, total):
            for _ in range(10):
                yield next(found)
            found.close()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            FileHashes(tmp_path / "files.sqlite").of(paths, stopped)
        assert not multiprocessing.active_children()
        left = []
        FileHashes(tmp_path / "files.sqlite").of(paths, lambda found, total: left.append(total) or found)
        assert left == [len(paths) - 8]

    def test_one_that_is_killed_is_one_line(self, crowd):
        with pytest.raises(LoaderError, match=r"a process that looks at files died .*; run the command again") as caught:
            list(files.on_all_cores(die, images_in(crowd)))
        assert len(caught.value.lines) == 1
        assert not multiprocessing.active_children()


def pid(_):
    return os.getpid()


@pytest.mark.parametrize(("cores", "gigabytes", "workers"), [(2, 1, 2), (64, 8, 16), (64, 40, 40), (64, 500, 64)])
def test_as_many_as_cores_if_the_memory_allows(monkeypatch, cores, gigabytes, workers):
    sizes = {"SC_PHYS_PAGES": gigabytes * 2**18, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert files._workers() == workers


def refuse(path):
    raise PermissionError(13, "Permission denied", str(path))
