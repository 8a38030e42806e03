"""How many threads compute, and how they wait for each other. Loads torch only when it gets a network."""

import os
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdpctl.models.chain import Chain

SPINS = 10_000
"""How often a waiting thread polls before it sleeps: a quarter of a millisecond; libgomp's default is thirty times as long."""

SMALL = 10**9
"""MACs of a batch below which a single thread is used."""


def wait_briefly() -> None:
    """Let OpenMP's threads sleep soon when they wait, unless the environment sets how they wait.

    A thread that spins keeps busy the core that the thread it waits for needs. With two other busy processes, a training on
    small maps took a hundred times as long. libgomp reads the setting when torch is loaded, so call this before.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def choose_threads(model: "Chain", in_channels: int, image_size: int, images: int) -> None:
    """Use one thread for small batches, otherwise all threads that torch started with; `OMP_NUM_THREADS` overrides both.

    The choice depends only on the arguments and the machine, not on how busy the machine is, because the number of threads
    changes the last bits of a result.

    Args:
        model: on any device; its weights are not used.
        in_channels: channels of an image.
        image_size: height and width of an image.
        images: in a batch.
    """
    import torch

    if "OMP_NUM_THREADS" in os.environ:
        return
    threads = _all_threads()  # before the number is changed
    small = images * _macs(model, in_channels, image_size) < SMALL
    torch.set_num_threads(1 if small else threads)


@cache
def _all_threads() -> int:
    import torch

    return torch.get_num_threads()


def _macs(model: "Chain", in_channels: int, image_size: int) -> int:
    """Return the MACs of one image as torch counts them; importing ptflops would take seconds."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from sdpctl.models.state import blank, map_shape

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.on_meta().eval()(blank(map_shape((in_channels, image_size, image_size))))
    return int(counter.get_total_flops()) // 2
