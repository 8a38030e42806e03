"""The worker processes that load batches: how they start, end, and send batches.

Batches are sent through pipes. Torch uses shared memory, which hangs if /dev/shm is too small, as in containers, and leaves
sockets behind when a process is killed. A pipe is equally fast if the allocator keeps freed memory.
"""

import errno
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import popen_fork
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

from sdpctl.data.settle import settle
from sdpctl.errors import LoaderError
from sdpctl.signals import STOPPING


@dataclass(frozen=True)
class Parcel:
    """A batch sent by a worker: arrays are copied through the pipe, whereas torch would put tensors into shared memory.

    Args:
        parts: tensors of the batch, as arrays.
    """

    parts: tuple[NDArray[Any], ...]

    @classmethod
    def pack(cls, batch: object) -> object:
        """Return a tuple of tensors as a parcel, and anything else unchanged."""
        return cls(tuple(part.numpy() for part in batch)) if isinstance(batch, tuple) else batch

    def unpacked(self) -> tuple[Tensor, ...]:
        """Return the tensors."""
        return tuple(torch.from_numpy(np.asarray(part)) for part in self.parts)

    def pin_memory(self) -> tuple[Tensor, ...]:
        """Return the tensors in pinned memory; called by torch's pinning thread."""
        return tuple(part.pin_memory() for part in self.unpacked())


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
        dataset: returns batches as tuples of tensors, or errors that the caller raises.
        workers: number of worker processes; with 0, this process loads.
        options: further arguments of `DataLoader`.
    """

    def __init__(self, dataset: "Dataset[Any]", *, workers: int, **options: Any) -> None:
        super().__init__(
            dataset,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=Parcel.pack if workers else _as_it_is,
            worker_init_fn=settle,
            multiprocessing_context=_Workers() if workers else None,
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
    """Yield the batches of a loader.

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
        yield batch.unpacked() if isinstance(batch, Parcel) else batch


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
