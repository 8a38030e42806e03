from dataclasses import dataclass

import pytest

from sdpctl.errors import UsageError
from sdpctl.table import Table, load


@dataclass(frozen=True)
class Colour:
    name: str
    hue: int = 0


def test_a_table_keeps_the_order_and_finds_by_name():
    colours = Table("colour", [Colour("red"), Colour("blue")])
    green = colours.add(Colour("green", 120))
    assert list(colours) == ["red", "blue", "green"]
    assert colours.find("green") is green
    assert len(colours) == 3
    colours.remove("green")
    assert "green" not in colours


def test_a_name_is_given_once():
    colours = Table("colour", [Colour("red")])
    with pytest.raises(ValueError, match="there is already a colour 'red'"):
        colours.add(Colour("red"))


def test_an_unknown_name_gets_a_suggestion():
    colours = Table("colour", [Colour("red"), Colour("blue")])
    with pytest.raises(UsageError, match=r"^there is no colour 'rde' \(did you mean 'red'\?\); choose one of red, blue$"):
        colours.find("rde")
    listed = Table("colour", [Colour("red")], listed_by="sdpctl colours")
    assert listed.unknown("zzz") == "there is no colour 'zzz'; `sdpctl colours` lists them"


def test_an_entry_may_name_its_code():
    assert load("sdpctl.table:Table") is Table
