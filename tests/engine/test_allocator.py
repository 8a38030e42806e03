"""Memory that is freed stays with the process of the command line, and of no other."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")

TOUCH = """
import resource
import torch

def touch():
    torch.empty(48 * 2**20, dtype=torch.uint8).fill_(1)

for _ in range(30):  # until a freed block fits: the first ones lie beside small blocks that came between
    touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

KEPT = "from sdpctl.engine.allocator import keep_freed_memory\nkeep_freed_memory()\n"

COMMAND = """
import contextlib, io, sys
from sdpctl.cli import main

sys.argv = ["sdpctl", "--version"]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    main()
"""

LIBRARY = """
import contextlib
import torch
import sdpctl, sdpctl.cli, sdpctl.engine.allocator
from sdpctl.errors import SdpctlError
from sdpctl.engine.calibrate import calibrate
from sdpctl.engine.evaluate import evaluate

model, batches = sdpctl.create_model("resnet20", num_classes=7), [(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))]
evaluate(model, [sdpctl.FULL], batches, calibrate(model, [sdpctl.FULL], batches))
with contextlib.suppress(SdpctlError):
    sdpctl.load("nowhere")
"""


def faults(first):
    """Return how often the kernel had to give a page while 48 MiB were taken, written and freed five times."""
    done = subprocess.run([sys.executable, "-c", first + TOUCH], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


LEAST = 5 * 48 // 2
"""Pages of 2 MiB in five times 48 MiB: what the kernel gives at least where nothing is kept."""


@pytest.mark.parametrize("first", [KEPT, COMMAND], ids=["kept", "command"])
def test_what_is_kept_is_not_given_anew(first):
    assert faults(first) < LEAST / 10


@pytest.mark.parametrize("first", ["", LIBRARY], ids=["torch", "library"])
def test_a_library_leaves_the_allocator_of_its_process(first):
    assert faults(first) >= LEAST
