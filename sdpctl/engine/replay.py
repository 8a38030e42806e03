"""Replay what a GPU did for a batch: a CUDA graph launches thousands of kernels at once, without Python between them."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor


class Replay:
    """A function of one tensor, which a GPU replays as a CUDA graph when a shape comes again; on a CPU, the function itself.

    The first call with a shape runs the function, the second one records it. The function may read and change tensors that
    exist before and after the call. A function that waits for the device cannot be recorded: it is run each time, as slow as it
    is, and a warning says why.

    Args:
        function: maps a tensor to a tensor on the same device.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self._known: set[tuple[torch.Size, tuple[int, ...], torch.dtype]] = set()
        self._graphs: dict[tuple[torch.Size, tuple[int, ...], torch.dtype], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._records = True

    def __call__(self, x: Tensor) -> Tensor:
        """Return the function's result; it is overwritten by the next call."""
        key = x.shape, x.stride(), x.dtype
        if x.device.type == "cuda" and key in self._known and key not in self._graphs and self._records:
            try:
                self._graphs[key] = self._recorded(x)
            except RuntimeError as error:
                self._records = False
                reason = " ".join(str(error).split())
                warnings.warn(f"this network cannot be recorded as a CUDA graph and runs slower ({reason})", stacklevel=2)
        self._known.add(key)
        if key not in self._graphs:
            return self.function(x)
        graph, given, result = self._graphs[key]
        given.copy_(x)
        graph.replay()
        return result

    def _recorded(self, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """Return the graph of the function, its input and its result; recording does not compute anything."""
        given, graph = torch.empty_like(x), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may pin memory meanwhile
            result = self.function(given)
        return graph, given, result
