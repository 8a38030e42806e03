"""Standard streams that cannot fail the work: closed, full, gone, or without a character that is to be written."""

import errno
import io
import os
import select
import sys
from typing import Any, TextIO


class _Stream(io.FileIO):
    """A file descriptor on which nothing fails: the first failure is kept, and what is written after it is dropped."""

    failure: OSError | None = None

    def write(self, content: Any, /) -> int:
        """Write everything, also where the descriptor does not block."""
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
    """Make standard output and standard error streams that raise nothing, and open the descriptors that are closed.

    Otherwise the next file that is opened, such as a blob, has the descriptor of a closed stream, and receives what is printed.
    Streams that something else stands in for are left as they are.
    """
    # What a closed standard output should have shown is lost, which `unwritten` must notice: writing there fails.
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
        write_through=descriptor == 2,  # and no buffer: a handler of signals may write while something is written
    )


def unwritten() -> str | None:
    """Return why standard output could not be written; None where it was, or where its reader went away as `head` does."""
    sys.stdout.flush()
    raw = getattr(sys.stdout, "buffer", None)
    failure = raw.failure if isinstance(raw, _Stream) else None
    return None if failure is None or failure.errno == errno.EPIPE else failure.strerror
