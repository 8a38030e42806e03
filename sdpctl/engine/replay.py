"""Replay what a GPU did for a batch: a CUDA graph launches thousands of kernels at once, without Python between them."""

import warnings
from collections.abc import Callable, Hashable
from contextlib import suppress
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
        self._peak = 0
        self._records = True

    def __call__(self, *arguments: Any) -> Tensor:
        """Return the function's result; the next call overwrites it.

        Args:
            arguments: those of the function, a tensor first. Values that are not tensors are hashable.
        """
        device = arguments[0].device
        if device.type != "cuda":
            return self.function(*arguments)
        keys = tuple(_shape(value) if isinstance(value, Tensor) else value for value in arguments)
        if keys in self._seen and keys not in self._graphs and self._records and len(self._graphs) < MOST_GRAPHS:
            self._record(keys, arguments)
        if keys not in self._graphs:
            self._seen.add(keys)
            torch.cuda.reset_peak_memory_stats(device)
            result = self.function(*arguments)
            self._peak = max(self._peak, torch.cuda.max_memory_allocated(device))
            return result
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
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info(device)
            if ROOM * self._peak > free + torch.cuda.memory_allocated(device):
                self._records = False
                return
            self._pool = torch.cuda.graph_pool_handle()
        inputs, graph, stream = self._inputs(arguments), torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):  # other threads may pin memory
                result = self.function(*inputs)
        except torch.OutOfMemoryError:
            self._records = False
        except RuntimeError as error:
            self._records = False
            _recover(stream, self._pool)
            reason = " ".join(str(error).split())
            warnings.warn(f"this network cannot be recorded as a CUDA graph and runs slower ({reason})", stacklevel=3)
        else:
            self._graphs[keys] = graph, result


def _shape(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.stride(), tensor.dtype


def _recover(stream: torch.cuda.Stream, pool: Any) -> None:
    """Undo what torch before 2.15 leaves behind if a recording fails: its stream, its memory pool, its random generator."""
    torch.cuda.set_stream(stream)
    with suppress(RuntimeError):  # raised where torch did this itself
        torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        torch._C._cuda_releasePool(stream.device_index, pool)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        torch.zeros((), device=stream.device)  # a recording that succeeds resets the generator
