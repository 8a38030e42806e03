"""How many threads compute, and how they wait: what is set, when, and what a user's own settings change."""

import os
import subprocess
import sys
from functools import cache

import pytest
import torch

from sdpctl import create_model
from sdpctl.engine import threads
from sdpctl.engine.cost import profile
from sdpctl.engine.threads import choose_threads
from sdpctl.instance import FULL

SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.fixture
def of_two(monkeypatch):
    """Let torch have begun with two threads, and set it back afterwards."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    threads._all_threads.cache_clear()
    yield
    torch.set_num_threads(before)
    threads._all_threads.cache_clear()


def chosen(images, arch="resnet20", channels=1, size=8):
    choose_threads(create_model(arch, num_classes=10, in_channels=channels), channels, size, images)
    return torch.get_num_threads()


def test_one_thread_for_small_batches_and_all_for_others(of_two):
    assert [chosen(images) for images in (64, 256, 512, 64, 512)] == [1, 1, 2, 1, 2]
    assert chosen(128, channels=3, size=32) == 2


def test_the_users_number_of_threads_stays(of_two, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert chosen(64) == 2


@pytest.mark.parametrize(
    ("arch", "channels", "size"), [("resnet20", 1, 8), ("resnet50", 3, 224), ("preresnet18", 3, 64), ("twopipe", 3, 32)]
)
def test_macs_are_those_of_a_profile_but_for_biases(arch, channels, size):
    model = create_model(arch, num_classes=10, in_channels=channels)
    exact = profile(model, [FULL], (channels, size, size))[FULL].macs
    assert threads.count_macs(model, channels, size) == pytest.approx(exact, rel=1e-3)


@cache
def spins(script, **environment):
    """Return the line in which libgomp says how long its threads spin, once a script has loaded torch."""
    inherited = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=inherited | {"OMP_DISPLAY_ENV": "verbose"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return next((line.split("'")[1] for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line), None)


COMMAND = """
import sys
from sdpctl import cli
def app(**_): import torch
cli.app = app
cli.main()
"""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, str(threads.SPINS)), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
)
def test_the_command_line_says_how_long_threads_spin_before_torch_is_loaded(environment, expected):
    if spins("import torch") is None:
        pytest.skip("torch comes with a different OpenMP here")
    assert spins(COMMAND, **environment) == expected


def test_a_library_leaves_the_waiting_of_its_process():
    assert spins("import sdpctl, sdpctl.cli, torch") == spins("import torch")
