"""End a command when a signal asks for it."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from sdpctl.errors import RunInterruptedError
from sdpctl.signals import heeded, let_the_next_one_kill

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

AGAIN = 0.01
"""Seconds until a signal that Python dropped is raised again."""


class _Stopped(SystemExit):
    """Raised by the handler; passes every `except Exception`, while `finally` and `with` still clean up."""


@contextmanager
def stoppable() -> Iterator[None]:
    """End the work inside at the first stopping signal; a second signal kills the process.

    Raises:
        RunInterruptedError: after a signal; if the work itself raised this error with a message of its own, that error is kept.
    """
    asked: list[int] = []

    def stop(signum: int, _: FrameType | None) -> None:
        asked.append(signum)
        let_the_next_one_kill()
        raise _Stopped

    def again(*_: object) -> None:
        raise _Stopped

    def dropped(unraisable: "UnraisableHookArgs") -> None:
        # Python drops exceptions raised in finalisers and in callbacks of weak references; an import runs thousands of those.
        if not isinstance(unraisable.exc_value, _Stopped):
            sys.__unraisablehook__(unraisable)
            return
        signal.signal(signal.SIGALRM, again)
        signal.setitimer(signal.ITIMER_REAL, AGAIN)

    hook, sys.unraisablehook = sys.unraisablehook, dropped
    for signum in heeded():
        signal.signal(signum, stop)
    try:
        yield
    except BaseException as error:
        ended = isinstance(error, SystemExit) and not isinstance(error, _Stopped)
        if not asked or ended or isinstance(error, RunInterruptedError):
            raise
        # A library may have replaced this exception by a different error.
        text = "interrupted; all results finished before are in the store, and the same command continues from there"
        raise RunInterruptedError(asked[0], text) from None
    finally:
        let_the_next_one_kill()  # the remaining work takes no time: no handler raises any more
        sys.unraisablehook = hook
