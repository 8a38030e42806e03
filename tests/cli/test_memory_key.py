"""`memory` on the command line: what it refuses, and that no result depends on it."""

import shutil
from pathlib import Path

import pytest
from command import called, document, one_line

from sdpctl.engine.tree import Tree
from sdpctl.recipe.load import load_recipe

SMOKE = Path(__file__).parent.parent.parent / "recipes" / "smoke.yaml"
COMMANDS = ["calibrate-bn", "eval-instances"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A folder whose store holds the smoke network, and its table."""
    folder = tmp_path_factory.mktemp("memory")
    assert called(folder, "train", SMOKE, "-q").returncode == 0
    return folder, document(folder, "eval-instances", "smoke")


@pytest.fixture
def copied(evaluated, tmp_path):
    """A copy of the folder, to write to."""
    shutil.copytree(evaluated[0], tmp_path / "copied")
    return tmp_path / "copied"


@pytest.fixture
def walks(monkeypatch):
    """For each walk its number of images, and what it may hold."""
    seen, walk = [], Tree.walk
    monkeypatch.setattr(Tree, "walk", lambda tree, x, norm: seen.append((len(x), tree.memory)) or walk(tree, x, norm))
    return seen


@pytest.mark.parametrize("value", ["0", "-1", "lots"])
def test_what_is_no_memory_is_one_line(evaluated, value):
    one_line(called(evaluated[0], "eval-instances", "smoke", "--set", f"memory={value}"), 3, f"--set memory={value}: memory: ")


@pytest.mark.parametrize("command", COMMANDS)
def test_too_little_is_one_line_that_names_it(copied, command):
    shown = document(copied, "store", "ls")
    arguments = (command, "smoke", "--set", "memory=1MiB", "--set", "calibrate.batches=3", "--force")
    one_line(called(copied, *arguments), 7, "memory=1MiB does not hold", "a batch of 128 images", "raise memory")
    assert document(copied, "store", "ls") == shown


def test_a_result_is_found_whatever_the_memory(evaluated, walks):
    folder, table = evaluated
    assert document(folder, "eval-instances", "smoke", "--set", "memory=1GiB") == table
    assert document(folder, "eval-instances", "smoke", "--set", "memory=3MB") == table
    assert walks == []


def test_a_training_is_found_whatever_the_memory(evaluated):
    first, again = (document(evaluated[0], "train", SMOKE, *more) for more in ((), ("--set", "memory=1GiB")))
    assert first["digest"] == again["digest"]


def test_a_table_does_not_depend_on_the_memory(evaluated, copied, walks):
    least = 4 * 128 * 16 * 8 * 8 * 4  # bytes of four maps of a batch as large as the largest, 16 channels of 8 px
    done = document(copied, "eval-instances", "smoke", "--set", f"memory={least}", "--force")
    assert {memory for _, memory in walks} == {least}
    assert sorted(size for size, _ in walks) == [103, 128, 128]
    for row, other in zip(done["rows"], evaluated[1]["rows"], strict=True):
        assert row == other | {"loss": pytest.approx(other["loss"], rel=1e-5)}


def test_where_memory_stands_in_a_recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(SMOKE.read_text(encoding="utf-8") + "memory: 2GiB\n", encoding="utf-8")
    assert load_recipe(path).memory == 2 * 2**30
    assert load_recipe(path, ["memory=512MB"]).memory == 512 * 10**6
    assert called(tmp_path, "recipe", "show", path, "--set", "memory=0").returncode == 3
