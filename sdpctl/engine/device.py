"""The device and the precision of computations."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from sdpctl.engine.distributed import device_of_rank
from sdpctl.engine.settings import Precision
from sdpctl.errors import ResourceError

Batches = Iterable[tuple[Tensor, Tensor]]


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Return the context manager of a forward pass: autocast to bfloat16 for `bf16`, and no change for `fp32`."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def pick_device(name: str) -> torch.device:
    """Return the device of a name; `auto` is CUDA if it is available, otherwise the CPU. Each rank has its own GPU.

    Raises:
        ResourceError: if the machine has no such device.
    """
    own = device_of_rank(name)
    if own is not None:
        name = str(own)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ResourceError(f"device {name!r} cannot be used here ({reason}); set device=auto or device=cpu") from error
    return device
