"""The signals that ask a command to stop. This module imports the standard library only."""

import os
import signal

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Sent by Ctrl-C; by `kill`, SLURM, systemd and docker; and when a terminal closes."""


def heeded() -> list[signal.Signals]:
    """Return the stopping signals that this process does not ignore; `nohup` or a shell's `&` makes it ignore some."""
    return [signum for signum in STOPPING if signal.getsignal(signum) is not signal.SIG_IGN]


def let_the_next_one_kill() -> None:
    """Restore the default action of the stopping signals, so that the next signal ends the process at once.

    SIGHUP is ignored from now on, since the kernel and the shell each send one when a terminal closes. Under torchrun all are
    ignored: it passes on a signal that its processes may have received already, and kills those that do not end in time.
    """
    ignored = STOPPING if "TORCHELASTIC_RUN_ID" in os.environ else (signal.SIGHUP,)
    for signum in heeded():
        signal.signal(signum, signal.SIG_IGN if signum in ignored else signal.SIG_DFL)
