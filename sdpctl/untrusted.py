"""Untrusted input: read files and JSON documents within limits, and show text without control characters.

This module imports the standard library only.
"""

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

DEPTH = 64
"""Maximum nesting of lists and objects in a JSON document; the deepest document that sdpctl writes has eight levels."""

DOCUMENT_BYTES = 256 * 2**20
"""Maximum size of a JSON document; an index of 30,000 artifacts has 10 MiB."""


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, without waiting for a FIFO or reading from a device.

    Raises:
        OSError: if the file cannot be opened, or is not a regular file.
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
    """Return the type of a file, given its mode, as a noun with its article: `a folder`."""
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "a file of an unknown type")


def read_regular(path: Path, *, limit: int | None = None) -> bytes:
    """Read a regular file.

    Args:
        path: path of the file.
        limit: maximum size in bytes; a larger file is refused before it is read.

    Raises:
        OSError: if the file cannot be read, is not a regular file, or is larger than the limit.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise OSError(0, f"it has {size:,} bytes, and at most {limit:,} are read", str(path))
        return file.read()


def load_json(content: bytes | str) -> Any:
    """Parse a UTF-8 JSON document of limited size and depth, with finite numbers and text that can be encoded again.

    Raises:
        ValueError: if the content is not such a document.
    """
    if len(content) > DOCUMENT_BYTES:
        raise ValueError(f"it has {len(content):,} bytes, and at most {DOCUMENT_BYTES:,} are read")
    try:
        text = content if isinstance(content, str) else content.decode()
        document = json.loads(text, parse_constant=_number, parse_float=_number)
        if _SURROGATE.search(text):
            json.dumps(document, ensure_ascii=False).encode()  # fails if a surrogate is not part of a pair
    except RecursionError:
        raise ValueError(f"it is nested more than {DEPTH} levels deep") from None
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
    raise ValueError(f"it is nested more than {DEPTH} levels deep")


def _number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def printable(text: str) -> str:
    r"""Return text with each control character replaced by its escape, such as `\x1b` or `\n`.

    Otherwise a terminal would obey escape sequences, newlines would break tables, and bidirectional marks would reorder text.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_path(path: Path) -> str:
    """Return a path with its control characters escaped, for a message: other programs and people choose names of files."""
    return printable(str(path))
