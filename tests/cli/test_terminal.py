"""What a terminal shows while something is under way."""

import csv
import io
import os
import pty
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from command import called, document, exit_code

from sdpctl.cli.output import Output
from sdpctl.cli.row_table import RowTable
from sdpctl.cli.rows import LineageRow
from sdpctl.store import Store

SMOKE = Path(__file__).parent.parent.parent / "recipes" / "smoke.yaml"


def received(terminal):
    """Return all that is written to a pseudo-terminal until its other end is closed."""
    written = b""
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # Linux says so when the other end is closed
            break
        if not piece:
            break
        written += piece
    os.close(terminal)
    return written.decode()


def on_a_terminal(folder, *arguments, **environment):
    """Run the command line as a process on a pseudo-terminal, and return all that it wrote there."""
    terminal, its_end = pty.openpty()
    command = [sys.executable, "-m", "sdpctl", *map(str, arguments)]
    env = os.environ | {"COLUMNS": "100"} | environment
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=its_end, stderr=its_end)
    os.close(its_end)
    shown = received(terminal)
    assert process.wait() == 0, shown
    return shown


def called_on_a_terminal(folder, *arguments, **environment):
    """Run the command line within this process, on a pseudo-terminal, and return all that it wrote there."""
    terminal, its_end = pty.openpty()
    with ThreadPoolExecutor(1) as reader:
        shown = reader.submit(received, terminal)
        with os.fdopen(its_end, "w", buffering=1, encoding="utf-8") as stream:
            code = exit_code(folder, arguments, {"COLUMNS": "100"} | environment, stream, stream)
        assert code == 0, shown.result()
        return shown.result()


def test_a_bar_with_the_time_left_and_lines_that_stay(tmp_path):
    shown = on_a_terminal(tmp_path, "train", SMOKE, "--set", "train.epochs=4")
    assert "training smoke epoch" in shown
    assert "left" in shown
    assert "\x1b[" in shown
    assert "epoch 4/4  loss" in shown


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_plain_terminals_get_plain_text(tmp_path, environment):
    shown = on_a_terminal(tmp_path, "models", **environment)
    assert "preresnet200" in shown
    assert "\x1b[3" not in shown  # no colour


def test_quiet_shows_no_bar(tmp_path):
    shown = called_on_a_terminal(tmp_path, "train", SMOKE, "-q")
    assert "left" not in shown
    assert shown.strip().startswith("sha256:")


@pytest.mark.parametrize("columns", ["60", "80"])
def test_a_narrow_terminal_cuts_nothing(tmp_path, columns):
    shown = on_a_terminal(tmp_path, "models", COLUMNS=columns, NO_COLOR="1")
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in shown.splitlines()]
    assert max(map(len, lines)) <= int(columns)
    assert "…" not in shown
    rows = {words[0]: words[1:] for line in lines if (words := line.split())}
    assert "67" in rows["preresnet200"]
    assert ("left" in rows) == (columns == "60")  # of the caption that names the columns left out


@pytest.mark.parametrize("columns", ["40", "80"])
def test_a_narrow_bar_cuts_nothing(tmp_path, columns):
    shown = called_on_a_terminal(tmp_path, "train", SMOKE, "--set", "train.epochs=1", COLUMNS=columns)
    assert "…" not in shown
    assert "10/10" in re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert ("━" in shown) == (columns == "80")


FOREIGN = "a\x1b[2Jb\nsdpctl: forged\u202e"


@pytest.fixture
def foreign(tmp_path):
    """A folder with a recipe whose file's name is foreign text."""
    (tmp_path / f"{FOREIGN}.yaml").write_bytes(SMOKE.read_bytes())
    return tmp_path


def test_foreign_text_is_escaped_in_tables_and_true_in_documents(foreign):
    shown = called(foreign, "recipe", "ls", ".").stdout
    assert r"a\x1b[2Jb\nsdpctl: forged\u202e.yaml" in shown
    assert all(line.isprintable() for line in shown.splitlines())
    assert len(shown.splitlines()) == 2
    (row,) = document(foreign, "recipe", "ls", ".")["rows"]
    assert row["recipe"] == f"{FOREIGN}.yaml"


def test_foreign_text_in_an_error_makes_no_line_of_its_own(foreign):
    done = called(foreign, "recipe", "ls", FOREIGN)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(r"sdpctl: a\x1b[2Jb\nsdpctl: forged\u202e: ")
    (foreign / f"{FOREIGN}.yaml").write_text("name: x\ntrain: {lrr: 1, epochs: none}\n")
    lines = called(foreign, "recipe", "ls", ".").stderr.splitlines()
    assert len(lines) > 2  # one for each problem
    assert all(line.startswith(r"sdpctl: a\x1b[2Jb\nsdpctl: forged\u202e.yaml:") for line in lines)


def test_foreign_text_is_escaped_in_notes_digests_and_progress(capsys, monkeypatch):
    Output().note(FOREIGN)
    Output(quiet=True).result("test", {}, digests=[FOREIGN])
    shown = capsys.readouterr()
    assert shown.err == r"a\x1b[2Jb\nsdpctl: forged\u202e" + "\n"
    assert shown.out == r"a\x1b[2Jb\nsdpctl: forged\u202e" + "\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Output().progress("[/b]" + FOREIGN, 1) as bar:
        bar.advance(FOREIGN)
    shown = capsys.readouterr().err
    assert "\x1b[2J" not in shown
    assert r"[/b]a\x1b[2Jb" in shown


def test_a_layer_is_escaped_on_a_terminal_and_whole_elsewhere(tmp_path):
    content = FOREIGN.encode() + b"\nend\xff"
    Store.create(tmp_path / ".sdpctl").commit("other", {"text": content}, tag="it")
    shown = on_a_terminal(tmp_path, "store", "show", "it", "--layer", "text")
    assert shown.splitlines() == [r"a\x1b[2Jb", r"sdpctl: forged\u202e", r"end\xff"]
    command = [sys.executable, "-m", "sdpctl", "store", "show", "it", "--layer", "text"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout == content


def test_csv_keeps_true_values():
    table = RowTable([], [LineageRow(digest="x", tag=FOREIGN, kind=None)])
    assert list(csv.reader(io.StringIO(table.csv().decode(), newline=""))) == [["digest", "tag", "kind"], ["x", FOREIGN, ""]]
