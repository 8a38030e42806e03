"""Processes that tell each other, by a lock, that they live."""

import os
import signal
import subprocess
import sys
import time

import pytest

from sdpctl.stages.liveness import KEPT, LivingProcess

LIVING = """
import sys
from pathlib import Path
from sdpctl.stages.liveness import LivingProcess
process = LivingProcess(Path(sys.argv[1]))
with process.living():
    print(process.id, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def start(tmp_path):
    """Start processes that live until they are told not to; return them with their names."""
    started = []

    def start():
        command = [sys.executable, "-c", LIVING, str(tmp_path / "processes")]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1], started[-1].stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_process_is_known_to_live_until_it_is_killed(start, tmp_path):
    here = LivingProcess(tmp_path / "processes")
    other, name = start()
    assert here.gone(name) is False
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert here.gone(name) is True
    assert here.gone(name) is True


def test_a_process_that_ended_well_or_elsewhere_left_nothing(start, tmp_path):
    here = LivingProcess(tmp_path / "processes")
    other, name = start()
    other.communicate("")
    assert other.returncode == 0
    assert here.gone(name) is None
    assert here.gone("0" * 32) is None
    assert list((tmp_path / "processes").iterdir()) == []


ASKING = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_SH)
print("asking", flush=True)
sys.stdin.read()
"""


def test_those_who_ask_do_not_take_each_other_for_the_one_they_ask_about(start, tmp_path):
    """The lock of a dead process is free, however many look at it."""
    other, name = start()
    other.kill()
    other.wait()
    command = [sys.executable, "-c", ASKING, str(tmp_path / "processes" / f"{name}.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as asker:
        assert asker.stdout.readline() == "asking\n"
        assert LivingProcess(tmp_path / "processes").gone(name) is True
        asker.communicate("")


def test_what_the_dead_left_is_cleared_away_when_nobody_asks_any_more(start, tmp_path):
    folder = tmp_path / "processes"
    names = {}
    for what in ("long dead", "just dead", "alive"):
        process, names[what] = start()
        if what != "alive":
            process.kill()
            process.wait()
    old = time.time() - 2 * KEPT
    for what in ("long dead", "alive"):
        os.utime(folder / f"{names[what]}.lock", (old, old))
    with LivingProcess(folder).living():
        assert len(list(folder.iterdir())) == 4
    assert {path.stem for path in folder.iterdir()} == {names["just dead"], names["alive"]}


def test_two_may_clear_away_at_once(tmp_path, monkeypatch):
    """What one of them lists, the other has removed before it is looked at."""
    folder = tmp_path / "processes"
    here = LivingProcess(folder)
    with here.living():
        (folder / "removed.lock").touch()
        listed = [folder / "removed.lock"]
        (folder / "removed.lock").unlink()
        monkeypatch.setattr(type(folder), "glob", lambda *_: listed)
    assert list(folder.iterdir()) == []


def test_a_process_that_fails_is_dead_to_the_others(tmp_path):
    process = LivingProcess(tmp_path)

    def fail():
        with process.living():
            assert LivingProcess(tmp_path).gone(process.id) is False
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert LivingProcess(tmp_path).gone(process.id) is True
