"""What a terminal shows while something is under way."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

SMOKE = Path(__file__).parent.parent.parent / "recipes" / "smoke.yaml"


def on_a_terminal(folder, *arguments, **environment):
    """Run the command line on a pseudo-terminal, and return all that it wrote there."""
    terminal, its_end = pty.openpty()
    command = [sys.executable, "-m", "sdpctl", *map(str, arguments)]
    env = os.environ | {"COLUMNS": "100"} | environment
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=its_end, stderr=its_end)
    os.close(its_end)
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
    assert process.wait() == 0, written.decode()
    return written.decode()


def test_a_bar_with_the_time_left_and_lines_that_stay(tmp_path):
    shown = on_a_terminal(tmp_path, "train", SMOKE, "--set", "train.epochs=8")
    assert "training smoke epoch" in shown
    assert "left" in shown
    assert "\x1b[" in shown
    assert "epoch 8/8  loss" in shown


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_plain_terminals_get_plain_text(tmp_path, environment):
    shown = on_a_terminal(tmp_path, "models", **environment)
    assert "preresnet200" in shown
    assert "\x1b[3" not in shown  # no colour


def test_quiet_shows_no_bar(tmp_path):
    shown = on_a_terminal(tmp_path, "train", SMOKE, "-q")
    assert "left" not in shown
    assert shown.strip().startswith("sha256:")
