"""`init`: the recipe that it writes runs, whatever the folder and its names hold."""

import json

import numpy as np
import pytest
from command import called, document, one_line
from PIL import Image

from sdpctl.recipe.load import load_recipe

TINY = ["train.epochs=1", "model.width=0.25", "sdpoint.points=[layer3.0]", "sdpoint.ratios=[0.5]", "calibrate.batches=1"]


def fill(root, *folders, images=6, size=18):
    """Make folders of small images."""
    for place, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        for number in range(images):
            pixels = np.random.default_rng((place, number)).integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{number}.png")


@pytest.mark.parametrize("folders", [["train/a", "train/日 #: b", "val/a"], ["a", "b\x1b[31m"]])
def test_the_recipe_runs(tmp_path, folders):
    fill(tmp_path / "my: #photos", *folders, images=12)
    (tmp_path / "my: #photos" / folders[0] / "broken.jpg").write_text("text")
    done = called(tmp_path, "init", "my: #photos")
    assert done.returncode == 0, done.stderr
    assert "\x1b[31m" not in done.stdout
    assert "broken.jpg (it is not an image)" in done.stdout
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert (recipe.name, recipe.data.root, recipe.data.skip_unreadable) == ("my-photos", "my: #photos", True)
    overrides = [word for value in TINY for word in ("--set", value)]
    scored = document(tmp_path, "run", "recipe.yaml", *overrides)
    assert scored["schema"] == "sdpctl.run/1"
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == ["recipe.yaml"]


def test_a_file_is_replaced_only_with_force(tmp_path):
    fill(tmp_path, "a", "b")
    (tmp_path / "recipe.yaml").write_text("mine")
    one_line(called(tmp_path, "init"), 2, "recipe.yaml: this file exists; --force replaces it")
    assert (tmp_path / "recipe.yaml").read_text() == "mine"
    told = json.loads(called(tmp_path, "init", "--force", "--dry-run", "--json").stdout)
    assert (told["schema"], told["written"], told["runs"]) == ("sdpctl.init/1", False, True)
    assert (tmp_path / "recipe.yaml").read_text() == "mine"
    assert called(tmp_path, "init", "--force").returncode == 0
    assert load_recipe(tmp_path / "recipe.yaml").data.test_share == 0.2


def test_a_class_without_any_usable_image_stops_the_recipe_and_is_said(tmp_path):
    fill(tmp_path, "train/a", "train/b", "val/a")
    (tmp_path / "val" / "b").mkdir()
    (tmp_path / "val" / "b" / "0.png").write_text("text")
    told = document(tmp_path, "init")
    assert not told["runs"]
    assert told["findings"][0]["kind"] == "stop"
    assert told["findings"][0]["found"] == "no image of b in val can be decoded"


def test_a_folder_without_images_is_one_line(tmp_path):
    one_line(called(tmp_path, "init"), 7, "no image in this folder")
    one_line(called(tmp_path, "init", "nowhere"), 7, "nowhere: there is no such folder")
    assert not list(tmp_path.iterdir())
