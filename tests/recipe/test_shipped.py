"""The recipes that come with the project."""

from pathlib import Path

import pytest

from sdpctl.cli.recipe import schema
from sdpctl.recipe.load import load_recipe

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_recipe(path):
    first, second, *_ = path.read_text(encoding="utf-8").splitlines()
    assert first == "# yaml-language-server: $schema=schema.json"
    assert second.startswith("# ")
    assert load_recipe(path).name == path.stem


def test_schema_is_what_the_command_prints(capsys):
    schema()
    printed = capsys.readouterr().out
    assert '"SdpointSettings"' in printed
    assert (FOLDER / "schema.json").read_text(encoding="utf-8") == printed, "run `sdpctl recipe schema > recipes/schema.json`"
