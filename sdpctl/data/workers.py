"""The worker processes that load batches: how they start, end, and hand over batches.

A worker writes a batch into a slot of anonymous memory that it shares with its parent, and sends the number of the slot through
a pipe. Torch uses files in /dev/shm instead, which hang if /dev/shm is too small, as in containers, and are left behind when a
process is killed. Anonymous memory is not in /dev/shm, and the kernel frees it with the last process. A batch that is larger
than a slot is sent through the pipe as a whole.
"""

import errno
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from mmap import mmap
from multiprocessing import popen_fork
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

from sdpctl.data.settle import settle
from sdpctl.errors import LoaderError
from sdpctl.signals import STOPPING

PREFETCHED = 2
"""Number of batches that a worker may load ahead."""


_ALIGNED = 64
"""Each tensor in a slot begins at a multiple of this number of bytes."""


def slot_size(*sizes: int) -> int:
    """Return the size of a slot for tensors of these sizes, in bytes."""
    return sum(_aligned(size) for size in sizes)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


@dataclass(frozen=True)
class _Place:
    """The place of a tensor in shared memory.

    Args:
        offset: offset of its first byte.
        dtype: its dtype.
        shape: its shape; of a tensor in channels_last, the shape (N, H, W, C).
        channels_last: whether it is in channels_last.
    """

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    channels_last: bool

    def view(self, memory: mmap | bytearray) -> Tensor:
        """Return the tensor, which shares the memory."""
        count = prod(self.shape)
        flat = torch.frombuffer(memory, dtype=self.dtype, count=count, offset=self.offset) if count else torch.empty(0)
        tensor = flat.to(self.dtype).view(self.shape)
        return tensor.permute(0, 3, 1, 2) if self.channels_last else tensor


@dataclass(frozen=True)
class Parcel:
    """A batch sent by a worker.

    Args:
        places: places of the tensors.
        content: the memory of a batch that does not fit into a slot; None for a batch in a slot.
    """

    places: tuple[_Place, ...]
    content: bytearray | None = None

    def unpacked(self, memory: mmap) -> tuple[Tensor, ...]:
        """Return the tensors; those in a slot share its memory."""
        return tuple(place.view(memory if self.content is None else self.content) for place in self.places)


class _Task(NamedTuple):
    """The keys of a batch, and the slot that it is written to."""

    slot: int
    keys: Any


class _Tasks(Sampler[Any]):
    """Numbers the batches of a sampler by slots, one after the other.

    Args:
        batches: yields the keys of each batch.
        slots: number of slots.
    """

    def __init__(self, batches: Iterable[Any], slots: int) -> None:
        self.batches, self.slots = batches, slots

    def __iter__(self) -> Iterator[_Task]:
        return (_Task(number % self.slots, keys) for number, keys in enumerate(self.batches))


class _Packed(Dataset[object]):
    """Writes the batches of a data set into slots.

    Args:
        dataset: returns batches as tuples of tensors, or errors.
        memory: the memory of all slots.
        size: size of a slot, in bytes.
    """

    def __init__(self, dataset: Any, memory: mmap, size: int) -> None:
        self.dataset, self.memory, self.size = dataset, memory, size

    def __getitems__(self, task: _Task) -> object:
        """Return a batch as a parcel, and anything else unchanged."""
        batch = self.dataset.__getitems__(task.keys)
        if not isinstance(batch, tuple):
            return batch
        needed = slot_size(*(part.nbytes for part in batch))
        content = bytearray(needed) if needed > self.size else None
        places, offset = [], task.slot * self.size if content is None else 0
        for part in batch:
            channels_last = part.dim() == 4 and part.is_contiguous(memory_format=torch.channels_last)
            shape = (part.shape[0], *part.shape[2:], part.shape[1]) if channels_last else part.shape
            place = _Place(offset, part.dtype, tuple(shape), channels_last)
            place.view(self.memory if content is None else content).copy_(part)
            places.append(place)
            offset += _aligned(part.nbytes)
        return Parcel(tuple(places), content)


if TYPE_CHECKING:
    _AnyQueue = Queue[Any]
else:
    _AnyQueue = Queue  # not subscriptable at run time


class _Queue(_AnyQueue):
    @staticmethod
    def _on_queue_feeder_error(error: BaseException, _: object) -> None:
        if multiprocessing.parent_process() is not None:
            os._exit(1)  # the parent would wait forever for the batch, but notices a death
        raise error


class _Popen(popen_fork.Popen):
    def terminate(self) -> None:
        self.kill()  # workers ignore SIGTERM


class _Worker(ForkProcess):
    """A worker process. It ignores the signals that stop the command, and ends when its parent ends it."""

    def start(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # until the child has replaced the inherited handlers
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> _Popen:  # noqa: N802  multiprocessing's name
        return _Popen(process_obj)


class _Workers(ForkContext):
    """The multiprocessing context of a `DataLoader`: makes its processes and queues."""

    Process = _Worker

    def Queue(self, maxsize: int = 0) -> "_Queue":  # noqa: N802  multiprocessing's name
        """Return a queue whose sender exits when it cannot send an item."""
        return _Queue(maxsize, ctx=self.get_context())


def _begin(number: int) -> None:
    """Prepare a worker, which prints nothing."""
    settle(number)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libjpeg prints a line for damage that does not keep it from decoding


class _Batches(_MultiProcessingDataLoaderIter):
    def __init__(self, loader: "DataLoader[Any]") -> None:
        try:
            super().__init__(loader)
        except BaseException:
            for worker in getattr(self, "_workers", ()):
                worker.kill()
            self._shutdown = True  # otherwise torch's finaliser fails on missing attributes
            raise


class Loader(DataLoader[Any]):
    """A `DataLoader` with this module's workers; iterate over it with `received`.

    Args:
        dataset: its method `__getitems__` returns batches as tuples of tensors, or errors that the caller raises.
        workers: number of worker processes; with 0, this process loads.
        batches: yields the keys of each batch.
        size: size of a slot in bytes, by `slot_size`.

    Raises:
        LoaderError: if there is not enough memory for the slots.
    """

    def __init__(self, dataset: "Dataset[Any]", *, workers: int, batches: Iterable[Any], size: int) -> None:
        slots = PREFETCHED * workers + 1  # the additional slot holds the batch that `received` yielded last
        with _explained():
            self.memory = mmap(-1, max(1, slots * size)) if workers else mmap(-1, 1)
        options: dict[str, Any] = {"prefetch_factor": PREFETCHED, "multiprocessing_context": _Workers()} if workers else {}
        super().__init__(
            _Packed(dataset, self.memory, size) if workers else dataset,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_as_it_is,
            worker_init_fn=_begin,
            batch_sampler=_Tasks(batches, slots) if workers else batches,
            generator=torch.Generator(),  # otherwise each pass draws from the global generator
            **options,
        )

    def _get_iterator(self) -> _BaseDataLoaderIter:
        return _Batches(self) if self.num_workers else super()._get_iterator()


def _as_it_is(batch: object) -> object:
    return batch


class _Deaths:
    """Delays the error that torch raises when a worker dies, until a batch is awaited.

    Torch raises it in the SIGCHLD handler, at any point of the main thread, even in the middle of a training step.
    """

    def __init__(self) -> None:
        self.waiting = False
        self.error: RuntimeError | None = None
        self._torchs: Callable[[int, FrameType | None], object] | None = None

    def watch(self) -> None:
        """Wrap torch's SIGCHLD handler, once torch has installed it."""
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler) and handler != self._told and threading.current_thread() is threading.main_thread():
            self._torchs = handler
            signal.signal(signal.SIGCHLD, self._told)

    def _told(self, signum: int, frame: FrameType | None) -> None:
        try:
            if self._torchs is not None:
                self._torchs(signum, frame)
        except RuntimeError as error:
            if self.waiting:
                raise
            self.error = error

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Raise a delayed error, and let torch raise inside the block."""
        self.waiting = True
        try:
            if (error := self.error) is not None:
                self.error = None
                raise error
            yield
        finally:
            self.waiting = False


_DEATHS = _Deaths()
_END = object()


def received(loader: Loader) -> Iterator[Any]:
    """Yield the batches of a loader. The tensors of a batch are overwritten when the next batch is asked for.

    Raises:
        LoaderError: if a worker died or could not be started.
    """
    if not loader.num_workers:
        yield from loader
        return
    with _explained(), _DEATHS.awaited():
        batches = iter(loader)
    _DEATHS.watch()
    while True:
        with _explained(), _DEATHS.awaited():
            batch = next(batches, _END)
        if batch is _END:
            return
        yield batch.unpacked(loader.memory) if isinstance(batch, Parcel) else batch


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        if str(error).startswith("Caught "):
            raise  # raised by code in a worker, and forwarded by torch
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        reason = "/dev/shm is full" if full else (isinstance(error, OSError) and error.strerror) or str(error).rstrip(". ")
        raise LoaderError(
            f"a process that loads data died or could not be started ({reason}), perhaps for lack of memory; "
            "lower data.workers (0 loads without such processes) or data.batch_size"
        ) from error
