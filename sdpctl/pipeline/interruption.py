"""Stopping on request: the first signal asks, the second leaves at once."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interruption:
    """While entered, SIGINT and SIGTERM only set `signum`; the work looks at it where it can stop cleanly."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._asked)
        return self

    def _asked(self, signum: int, _: FrameType | None) -> None:
        if self.signum is not None:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self.signum = signum

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
