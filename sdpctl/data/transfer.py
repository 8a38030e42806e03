"""Batches on their way to a device."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def transferred(
    batches: Iterable[T], move: Callable[[T], tuple[Tensor, Tensor]], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Move batches to a device; on CUDA on a stream of their own, while the kernels of the batches before still run.

    The caller's kernels are launched without waiting for them, so the caller asks for a batch long before the device needs it.

    Args:
        batches: what to move; a batch must not be changed before the next one is asked for.
        move: returns the images and labels of a batch on the device.
        device: the device.
    """
    if device.type != "cuda":
        yield from map(move, batches)
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    for batch in batches:
        with torch.cuda.stream(stream):
            moved = move(batch)
            done = stream.record_event()
        user = torch.cuda.current_stream(device)
        user.wait_event(done)
        for tensor in moved:
            tensor.record_stream(user)  # its memory is free again once this stream has used it
        yield moved
        done.synchronize()  # `batch` may change from here on


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; it is copied to CUDA from pinned memory, since only such a copy runs beside kernels."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
