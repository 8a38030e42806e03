"""What a worker process does first. This module needs no torch."""

import ctypes
import multiprocessing
import os
import signal
import sys

from sdpctl.signals import STOPPING

_PR_SET_PDEATHSIG = 1  # sys/prctl.h


def settle(_: int = 0) -> None:
    """Prepare a worker: it ignores stop signals, which its parent handles, and is killed when its parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = multiprocessing.parent_process()
        if parent is not None and os.getppid() != parent.pid:
            os._exit(1)  # the parent died before prctl
    for signum in STOPPING:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
