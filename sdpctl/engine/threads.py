"""The number of threads that compute, and how they wait for each other. torch is imported inside functions only."""

import os
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdpctl.models.chain import Chain

SPINS = 10_000
"""How often a waiting thread checks before it sleeps: a quarter of a millisecond, a thirtieth of libgomp's default."""

SMALL = 10**9
"""MACs of a batch below which a single thread computes."""


def wait_briefly() -> None:
    """Make waiting OpenMP threads sleep soon, unless the environment says how they wait.

    A thread that spins keeps a core busy, which the thread that it waits for may need: beside two busy processes, a training of
    small maps took a hundred times as long. libgomp reads this setting when torch is loaded, so call this function before.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def choose_threads(model: "Chain", in_channels: int, image_size: int, images: int) -> None:
    """Set the number of threads: one for small batches, otherwise as many as torch started with.

    If the environment variable `OMP_NUM_THREADS` is set, nothing is changed. The choice depends only on the arguments and the
    machine, not on how busy the machine is, since the number of threads changes the last bits of a result.

    Args:
        model: the network, on any device; its weights are not read.
        in_channels: channels of an image.
        image_size: height and width of an image.
        images: number of images in a batch.
    """
    import torch

    if "OMP_NUM_THREADS" in os.environ:
        return
    threads = _all_threads()  # read before the number is changed
    small = images * count_macs(model, in_channels, image_size) < SMALL
    torch.set_num_threads(1 if small else threads)


@cache
def _all_threads() -> int:
    import torch

    return torch.get_num_threads()


def count_macs(model: "Chain", in_channels: int, image_size: int) -> int:
    """Return the MACs of one image as torch counts them; importing ptflops for this would take seconds."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from sdpctl.models.state import blank, map_shape

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.on_meta().eval()(blank(map_shape((in_channels, image_size, image_size))))
    return int(counter.get_total_flops()) // 2
