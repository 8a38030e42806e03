"""Networks without memory for their weights."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class OnMeta(TorchFunctionMode):
    """Makes tensors without values, in which layers keep their weights, on the meta device.

    Everything else stays on the CPU, such as the widths of layers that a library computes while it builds a network. A network
    that was built under this mode still has some small buffers on the CPU; move it to the meta device afterwards.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch."""
        given = kwargs or {}
        return func(*args, **(given | {"device": "meta"} if func is torch.empty else given))
