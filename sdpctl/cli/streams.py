"""Standard streams whose failures do not stop the work: closed, full, gone, or with an encoding that lacks a character."""

import errno
import io
import os
import select
import sys
from typing import Any, TextIO


class _Stream(io.FileIO):
    """A file descriptor that never raises: it keeps the first failure, and drops everything written afterwards."""

    failure: OSError | None = None

    def write(self, content: Any, /) -> int:
        """Write everything, even to a non-blocking descriptor."""
        rest = memoryview(content).cast("B")
        size = len(rest)
        try:
            while rest and self.failure is None:
                written = super().write(rest)
                if written is None:
                    select.select([], [self], [])
                else:
                    rest = rest[written:]
        except OSError as error:
            self.failure = error
        return size


def open_streams() -> None:
    """Replace standard output and standard error by streams that never raise, and open standard descriptors that are closed.

    Otherwise the next file to be opened, such as a blob, would get the descriptor of a closed stream and receive the output.
    Streams that were replaced already are left alone.
    """
    # A closed standard output is opened for reading, so that writing fails and `unwritten` reports the lost output.
    for descriptor, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _lasting(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _lasting(sys.stderr, 2)


def _lasting(stream: TextIO | None, descriptor: int) -> TextIO:
    if stream is not None:
        stream.flush()
    raw = _Stream(descriptor, "w", closefd=False)
    return io.TextIOWrapper(
        raw,
        encoding="utf-8" if stream is None else stream.encoding,
        errors="backslashreplace",
        line_buffering=raw.isatty(),
        write_through=descriptor == 2,  # no buffer either: a signal handler may write during a write
    )


def unwritten() -> str | None:
    """Return why standard output could not be written; None on success, or if the reader closed the pipe, as `head` does."""
    sys.stdout.flush()
    raw = getattr(sys.stdout, "buffer", None)
    failure = raw.failure if isinstance(raw, _Stream) else None
    return None if failure is None or failure.errno == errno.EPIPE else failure.strerror
