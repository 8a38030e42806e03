"""Replay what a GPU did for a batch: a CUDA graph launches thousands of kernels at once, without Python between them."""

import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

MOST_GRAPHS = 256
"""Maximum number of graphs of one function; calls beyond it run the function."""

ROOM = 2.2
"""Multiple of the peak memory that must be free for graphs, which have memory of their own."""


class Replay:
    """A function of tensors, which a GPU replays as a CUDA graph when a call comes again; on a CPU, the function itself.

    The first call with some shapes runs the function, the second one records it. A replay computes the same bits. The function
    may read and change tensors that exist before and after the call. A function that waits for the device cannot be recorded:
    it is run each time, and a warning says why. If memory is short, nothing is recorded.

    Args:
        function: maps tensors on one device, and plain values between them, to a tensor on that device.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self._seen: set[Hashable] = set()
        self._given: dict[Hashable, Tensor] = {}
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None
        self._records = True

    def __call__(self, *arguments: Any) -> Tensor:
        """Return the function's result; the next call overwrites it.

        Args:
            arguments: those of the function, a tensor first. Values that are not tensors are hashable.
        """
        if arguments[0].device.type != "cuda":
            return self.function(*arguments)
        if not self._seen:
            torch.cuda.reset_peak_memory_stats(arguments[0].device)  # `_record` reads the peak of this function
        keys = tuple(_shape(value) if isinstance(value, Tensor) else value for value in arguments)
        if keys not in self._graphs:
            if keys in self._seen and self._records and len(self._graphs) < MOST_GRAPHS:
                self._record(keys, arguments)
            self._seen.add(keys)
        if keys not in self._graphs:
            return self.function(*arguments)
        graph, result = self._graphs[keys]
        for given, value in zip(self._inputs(arguments), arguments, strict=True):
            if isinstance(value, Tensor):
                given.copy_(value)
        graph.replay()
        return result

    def _inputs(self, arguments: tuple[Any, ...]) -> list[Any]:
        """Return the arguments that the graphs read: tensors of these shapes, which all graphs share, and the plain values."""
        inputs = []
        for place, value in enumerate(arguments):
            if isinstance(value, Tensor):
                key = place, _shape(value)
                if key not in self._given:
                    self._given[key] = torch.empty_like(value)
                value = self._given[key]
            inputs.append(value)
        return inputs

    def _record(self, keys: Hashable, arguments: tuple[Any, ...]) -> None:
        """Record a call without computing anything."""
        device = arguments[0].device
        if self._pool is None:
            free, _ = torch.cuda.mem_get_info(device)
            if ROOM * torch.cuda.max_memory_allocated(device) > free + torch.cuda.memory_reserved(device):
                self._records = False
                return
            self._pool = torch.cuda.graph_pool_handle()
        inputs, graph = self._inputs(arguments), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):  # other threads may pin memory
                result = self.function(*inputs)
        except RuntimeError as error:
            self._records = False
            reason = " ".join(str(error).split())
            warnings.warn(f"this network cannot be recorded as a CUDA graph and runs slower ({reason})", stacklevel=3)
        else:
            self._graphs[keys] = graph, result


def _shape(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.stride(), tensor.dtype
