"""The processes that load batches: how they live, how they die, and how batches come from them.

Batches come through pipes. Torch's own way, shared memory, hangs where /dev/shm is too small, as in containers, and leaves
sockets behind where a process is killed; a pipe is as fast where freed memory is kept.
"""

import ctypes
import errno
import multiprocessing
import os
import signal
import sys
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

from sdpctl.errors import LoaderError
from sdpctl.signals import STOPPING

_PR_SET_PDEATHSIG = 1  # sys/prctl.h


@dataclass(frozen=True)
class Parcel:
    """A batch on its way from a process: arrays, which are copied through the pipe, where tensors would be shared.

    Args:
        parts: the tensors of the batch, as arrays.
    """

    parts: tuple[NDArray[Any], ...]

    @classmethod
    def pack(cls, batch: object) -> object:
        """Return a batch of tensors as a parcel, and anything else as it is."""
        return cls(tuple(part.numpy() for part in batch)) if isinstance(batch, tuple) else batch

    def unpacked(self) -> tuple[Tensor, ...]:
        """Return the tensors."""
        return tuple(torch.from_numpy(np.asarray(part)) for part in self.parts)

    def pin_memory(self) -> tuple[Tensor, ...]:
        """Return the tensors in pinned memory; torch's thread calls this."""
        return tuple(part.pin_memory() for part in self.unpacked())


if TYPE_CHECKING:
    _AnyQueue = Queue[Any]
else:
    _AnyQueue = Queue  # not subscriptable when it runs


class _Queue(_AnyQueue):
    @staticmethod
    def _on_queue_feeder_error(error: BaseException, _: object) -> None:
        if multiprocessing.parent_process() is not None:
            os._exit(1)  # what cannot be sent would be waited for in vain; a death is noticed
        raise error


class _Popen(popen_fork.Popen):
    def terminate(self) -> None:
        self.kill()  # SIGTERM is ignored


class _Worker(ForkProcess):
    """A process that ends when the command has no more use for it, and at no signal that asks the command to stop."""

    def start(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # until the child has no handler of its parent's any more
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> _Popen:  # noqa: N802  multiprocessing's name
        return _Popen(process_obj)


class _Workers(ForkContext):
    """What a `DataLoader` makes its processes and queues with."""

    Process = _Worker

    def Queue(self, maxsize: int = 0) -> "_Queue":  # noqa: N802  multiprocessing's name
        """Return a queue whose sender dies of what it cannot send."""
        return _Queue(maxsize, ctx=self.get_context())


def _settle(_: int) -> None:
    """Begin a worker's life: it leaves signals to its parent, which stops the work in order, and dies with it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = multiprocessing.parent_process()
        if parent is not None and os.getppid() != parent.pid:
            os._exit(1)  # it died before that
    for signum in STOPPING:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


class _Batches(_MultiProcessingDataLoaderIter):
    def __init__(self, loader: "DataLoader[Any]") -> None:
        try:
            super().__init__(loader)
        except BaseException:
            for worker in getattr(self, "_workers", ()):
                worker.kill()
            self._shutdown = True  # else torch's finaliser misses what is not there yet
            raise


class Loader(DataLoader[Any]):
    """Torch's loader, with processes as they are here; `received` is the way to its batches.

    Args:
        dataset: of batches of tensors, as tuples, or of errors to be raised where a batch is used.
        workers: processes; 0 loads in this one.
        options: as for `DataLoader`.
    """

    def __init__(self, dataset: "Dataset[Any]", *, workers: int, **options: Any) -> None:
        super().__init__(
            dataset,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=Parcel.pack if workers else _as_it_is,
            worker_init_fn=_settle,
            multiprocessing_context=_Workers() if workers else None,
            **options,
        )

    def _get_iterator(self) -> _BaseDataLoaderIter:
        return _Batches(self) if self.num_workers else super()._get_iterator()


def _as_it_is(batch: object) -> object:
    return batch


class _Deaths:
    """Holds back what torch raises when a worker dies, until a batch is waited for.

    Torch raises it in the handler of SIGCHLD, wherever the main thread is: a training step would be torn apart.
    """

    def __init__(self) -> None:
        self.waiting = False
        self.error: RuntimeError | None = None
        self._torchs: Callable[[int, FrameType | None], object] | None = None

    def watch(self) -> None:
        """Stand in front of torch's handler, once there is one."""
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
        """Wait for workers inside, and be told of their death."""
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
    """Yield what a loader loads.

    Raises:
        LoaderError: where a worker died, or could not be started.
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
            raise  # a worker's code raised it, and torch sent it here
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        reason = "/dev/shm is full" if full else (isinstance(error, OSError) and error.strerror) or str(error).rstrip(". ")
        raise LoaderError(
            f"a process that loads data died or could not be started ({reason}), perhaps for want of memory; "
            "set data.workers=0 to load without such processes, or fewer, or a smaller data.batch_size"
        ) from error
