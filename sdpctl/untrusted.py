"""Input that somebody else may have written: read within limits, shown without its control characters.

Importing this needs nothing but the standard library.
"""

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

DEPTH = 64
"""Nested lists and objects that a JSON document may have; the deepest that sdpctl writes has eight."""

DOCUMENT_BYTES = 256 * 2**20
"""Size of the largest JSON document that is read; an index of 30,000 artifacts has 10 MiB."""


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, and never wait for a FIFO or read from a device.

    Raises:
        OSError: where the file cannot be opened, or is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(0, f"not a regular file but {kind_of(mode)}", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def kind_of(mode: int) -> str:
    """Say what a file is by its mode, with an article."""
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


def read_regular(path: Path, *, limit: int | None = None) -> bytes:
    """Read a regular file.

    Args:
        path: of the file.
        limit: bytes; a larger file is refused before it is read.

    Raises:
        OSError: where the file cannot be read, is not a regular file, or is larger than the limit.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise OSError(0, f"{size:,} bytes, more than the {limit:,} that are read", str(path))
        return file.read()


def load_json(content: bytes | str) -> Any:
    """Read a JSON document of limited size and depth, in UTF-8, whose numbers are finite and whose text can be written.

    Raises:
        ValueError: where the content is not JSON, too large, or nested too deeply.
    """
    if len(content) > DOCUMENT_BYTES:
        raise ValueError(f"{len(content):,} bytes, more than the {DOCUMENT_BYTES:,} that are read")
    try:
        text = content if isinstance(content, str) else content.decode()
        document = json.loads(text, parse_constant=_number, parse_float=_number)
        if _SURROGATE.search(text):
            json.dumps(document, ensure_ascii=False).encode()  # refuses half of a pair, which is not a character
    except RecursionError:
        raise ValueError(f"nested more than {DEPTH} levels deep") from None
    level = [document]
    for _ in range(DEPTH):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return document
    raise ValueError(f"nested more than {DEPTH} levels deep")


def _number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def printable(text: str) -> str:
    r"""Return text without control characters: each is replaced by its escape, such as `\x1b` or `\n`.

    Terminals obey escape sequences, tables break at newlines, and bidirectional marks reorder what stands beside them.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_path(path: Path) -> str:
    """Return a path with its control characters escaped, for a message: other programs and people choose names of files."""
    return printable(str(path))
