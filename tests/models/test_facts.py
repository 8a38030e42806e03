"""Facts about traced networks are kept between runs, and never stand in the way."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sdpctl.errors import ModelError
from sdpctl.models import facts, traced
from sdpctl.models.registry import TracedArchitecture

ARCH = TracedArchitecture(name="torchvision/squeezenet1_1", family="torchvision", network="squeezenet1_1")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "sdpctl" / "networks"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count how often a network's points are looked for."""
    made: list[int] = []

    def points(arch: TracedArchitecture) -> tuple[str, ...]:
        made.append(1)
        return ("a", "b")

    monkeypatch.setattr(traced, "points", points)
    return made


def test_a_fact_is_found_out_once(folder: Path, calls: list[int]) -> None:
    assert [facts.find_out("points", ARCH) for _ in range(3)][1:] == [["a", "b"], ["a", "b"]]
    assert len(calls) == 1
    (file,) = folder.iterdir()
    assert json.loads(file.read_text())["network"] == "torchvision/squeezenet1_1"


def test_facts_of_other_arguments_versions_and_code_are_different_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced, "refused_size", lambda arch, size: f"{size} px")
    assert facts.find_out("refused_size", ARCH, 32) == "32 px"
    assert facts.find_out("refused_size", ARCH, 64) == "64 px"
    assert len(list(folder.iterdir())) == 2
    monkeypatch.setattr(facts, "version", lambda package: "0")
    facts.find_out("refused_size", ARCH, 32)
    monkeypatch.setattr(facts, "_code", lambda: "other")
    facts.find_out("refused_size", ARCH, 32)
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("damaged", ["", "{", "[]", "{}", "null", '"found"'])
def test_a_damaged_file_is_made_again(damaged: str, folder: Path, calls: list[int]) -> None:
    facts.find_out("points", ARCH)
    (file,) = folder.iterdir()
    file.write_text(damaged)
    assert facts.find_out("points", ARCH) == ("a", "b")
    assert json.loads(file.read_text())["found"] == ["a", "b"]
    assert len(calls) == 2


def test_a_folder_that_cannot_be_written_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert facts.find_out("points", ARCH) == ("a", "b")
    assert facts.find_out("points", ARCH) == ("a", "b")
    assert len(calls) == 2


def test_an_error_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def points(arch: TracedArchitecture) -> tuple[str, ...]:
        raise ModelError("no")

    monkeypatch.setattr(traced, "points", points)
    with pytest.raises(ModelError, match="no"):
        facts.find_out("points", ARCH)
    assert not folder.exists()


def test_known_points_need_neither_torch_nor_the_library(folder: Path) -> None:
    expected = ("features.2", "features.3", "features.4", "features.6", "features.7", "features.9")
    assert ARCH.points()[:6] == expected
    code = "import sys\nfrom sdpctl.models import architecture\nprint(architecture('torchvision/squeezenet1_1').points()[0])\n"
    code += "print([name for name in ('torch', 'torchvision', 'timm') if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")
    assert printed[:2] == ["features.2", "[]"]
