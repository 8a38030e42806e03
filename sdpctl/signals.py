"""The signals that ask a command to stop. Needs nothing but the standard library, and prints nothing."""

import signal

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C; what `kill`, SLURM, systemd and docker send; a terminal that closes."""


def heeded() -> list[signal.Signals]:
    """Return the stopping signals that this process was not started to ignore, as by `nohup` or a shell's `&`."""
    return [signum for signum in STOPPING if signal.getsignal(signum) is not signal.SIG_IGN]


def let_the_next_one_kill() -> None:
    """Give the stopping signals back to the system, so that a second one ends the process at once.

    SIGHUP is ignored from here on: when a terminal closes, the kernel and the shell each send one.
    """
    for signum in heeded():
        signal.signal(signum, signal.SIG_IGN if signum is signal.SIGHUP else signal.SIG_DFL)
