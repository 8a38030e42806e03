"""A look at a folder before a recipe exists."""

import hashlib
import shutil

import numpy as np
import pytest
from PIL import Image

from sdpctl.data.files import locate
from sdpctl.data.survey import survey
from sdpctl.errors import DataError


def picture(path, seed, size=(24, 20), mode="RGB", **options):
    """Save noise as an image whose pixels depend on the seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)


def fill(root, *folders, images=3):
    """Make folders of images, no two of them alike."""
    for place, folder in enumerate(folders):
        for number in range(images):
            picture(root / folder / f"{number}.png", 1000 * place + number)


def look(folder):
    return survey(folder, lambda found, _: found)


@pytest.mark.parametrize(
    ("folders", "root", "arrangement"),
    [
        (["train/a", "train/b", "val/a", "val/b"], ".", {}),
        (["train/a", "train/b", "test/a", "test/b"], ".", {"folders": ("train", "test")}),
        (["Training/a", "Training/b", "valid/a", "valid/b", "test/a"], ".", {"folders": ("Training", "valid")}),
        (["a", "b"], ".", {"test_share": 0.2}),
        (["train/a", "train/b"], "train", {"test_share": 0.2}),
        (["one/two/train/a", "one/two/train/b", "one/two/val/a", "one/two/val/b"], "one/two", {}),
        (["one/a", "one/b"], "one", {"test_share": 0.2}),
    ],
)
def test_the_reader_accepts_what_the_survey_says(tmp_path, folders, root, arrangement):
    fill(tmp_path, *folders)
    seen = look(tmp_path)
    assert (seen.root, dict(seen.arrangement)) == (tmp_path / root, arrangement)
    located = locate("imagefolder", seen.root, arrangement=seen.arrangement)
    assert located.classes == ("a", "b")
    assert [*map(len, (located.train, located.test))] == [sum(numbers) for numbers in seen.counts]


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        ([], "no image in this folder"),
        (["."], "3 images, but no class folders"),
        (["a"], "3 images, but no class folders"),
        (["x/train/a", "x/val/a", "y/train/a", "y/val/a"], "give one of these folders"),
        (["train/a", "val/a"], "there is only one class, 'a'"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_with_advice(tmp_path, folders, words):
    fill(tmp_path, *folders)
    with pytest.raises(DataError, match=words):
        look(tmp_path)


def test_a_share_is_tested_by_the_names_of_the_images(tmp_path):
    fill(tmp_path, "a", "b", images=10)
    located = locate("imagefolder", tmp_path, arrangement={"test_share": 0.3})
    names = sorted((f"a/{number}.png" for number in range(10)), key=lambda name: hashlib.sha256(name.encode()).digest())
    assert {name for name, label in located.test if label == 0} == set(names[:3])
    assert {name for name, _ in located.train}.isdisjoint(name for name, _ in located.test)
    assert len(located.train) == 14
    (tmp_path / "c").mkdir()
    picture(tmp_path / "c" / "only.png", 77)
    assert ("c/only.png", 2) in locate("imagefolder", tmp_path, arrangement={"test_share": 0.3}).train


def test_what_is_wrong_with_the_images_is_found(tmp_path):
    fill(tmp_path, "train/a", "train/b c", "val/a", "val/B_c")
    train, val = tmp_path / "train", tmp_path / "val"
    shutil.copy(train / "a" / "0.png", val / "a" / "leak.png")
    shutil.copy(train / "a" / "1.png", train / "a" / "copy.png")
    shutil.copy(train / "a" / "2.png", train / "b c" / "wrong.png")
    picture(train / "b c" / "0.bmp", 1000)  # the pixels of train/b c/0.png
    picture(train / "a" / "deep" / "turned.jpg", 5, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0")
    picture(train / "a" / "clear.png", 6, mode="RGBA")
    picture(train / "a" / "grey.png", 7, mode="L")
    picture(train / "a" / "cmyk.jpg", 8, mode="CMYK")
    picture(train / "a" / "tiny.png", 9, size=(3, 5))
    (train / "a" / "text.jpg").write_text("text")
    (train / "a" / "Thumbs.db").write_text("x")
    (train / ".DS_Store").write_text("x")
    picture(train / "loose.png", 10)
    seen = look(tmp_path)
    assert seen.unreadable == {"train/a/text.jpg": "it is not an image"}
    assert (seen.others, seen.loose, list(seen.nested)) == ({".db": 1}, 1, ["a"])
    assert seen.lacking(0) == ["B_c"]
    assert seen.lacking(1) == ["b c"]
    assert seen.similar == [["B_c", "b c"]]
    assert seen.groups.across == [["train/a/0.png", "val/a/leak.png"]]
    assert seen.groups.labelled == [["train/a/2.png", "train/b c/wrong.png"]]
    assert seen.groups.within == [["train/a/1.png", "train/a/copy.png"], ["train/b c/0.bmp", "train/b c/0.png"]]
    assert seen.smaller(10) == ["train/a/tiny.png"]
    assert seen.looked["train/a/deep/turned.jpg"].turned
    assert (seen.looked["train/a/deep/turned.jpg"].width, seen.looked["train/a/0.png"].width) == (20, 24)
    assert {"CMYK": 1, "grey": 1, "colour with transparency": 1}.items() <= seen.modes.items()
