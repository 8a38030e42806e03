"""How many threads compute, and how they wait for one another. Loads torch only where a network is there already."""

import os
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdpctl.models.chain import Chain

SPINS = 10_000
"""Turns that a waiting thread spins before it sleeps: a quarter of a millisecond, where libgomp spins thirty times as long."""

SMALL = 10**9
"""MACs of a batch below which one thread computes."""


def wait_briefly() -> None:
    """Tell OpenMP's threads to sleep soon where they wait, unless the environment says how they wait.

    A thread that spins for one which is not running takes the very core that the other one waits for: beside two busy
    processes a training of small maps took a hundred times as long. libgomp reads this when torch is loaded, so call it before.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def choose_threads(model: "Chain", in_channels: int, image_size: int, images: int) -> None:
    """Let one thread compute where batches are small, else all that torch began with; `OMP_NUM_THREADS` settles it otherwise.

    The choice follows from the arguments and the machine alone, never from how busy it is: the number of threads decides
    about the last bits of a result.

    Args:
        model: on any device; its weights are not looked at.
        in_channels: of an image.
        image_size: height and width of an image.
        images: of a batch.
    """
    import torch

    if "OMP_NUM_THREADS" in os.environ:
        return
    threads = _all_threads()  # before they are changed
    small = images * _macs(model, in_channels, image_size) < SMALL
    torch.set_num_threads(1 if small else threads)


@cache
def _all_threads() -> int:
    import torch

    return torch.get_num_threads()


def _macs(model: "Chain", in_channels: int, image_size: int) -> int:
    """Return the MACs of one image as torch counts them, without the seconds that importing ptflops takes."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from sdpctl.models.state import blank, map_shape

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.on_meta().eval()(blank(map_shape((in_channels, image_size, image_size))))
    return int(counter.get_total_flops()) // 2
