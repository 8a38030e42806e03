"""Stopping on a signal: the first signal requests a clean stop, the second one ends the process at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any, TypeVar

from sdpctl.signals import heeded, let_the_next_one_kill

T = TypeVar("T")


class Interruption:
    """A context in which a stopping signal only sets `signum`; the work checks `signum` at points where it can stop cleanly.

    A signal that came too late for the last check is sent again at the exit, to the handler that was installed before.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for signum in heeded():
                self._before[signum] = signal.signal(signum, self._asked)
        return self

    def _asked(self, signum: int, _: FrameType | None) -> None:
        self.signum = signum
        let_the_next_one_kill()

    def between(self, items: Iterable[T], stop: Callable[[int], object]) -> Iterator[T]:
        """Yield items; once a signal has come, call `stop` with it before the next item."""
        for item in items:
            if self.signum is not None:
                stop(self.signum)
            yield item

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        if kind is None and self.signum in self._before:
            os.kill(os.getpid(), self.signum)
