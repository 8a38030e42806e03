"""What is known about traced networks, kept between runs: to trace a network, its library must be imported, which is slow.

The facts are kept in `sdpctl/networks` in the user's cache folder (`XDG_CACHE_HOME`, or `~/.cache`), a file for each. The name
of a file depends on the versions of the library and of torch and on the code that traces. The files may be removed at any time.
"""

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sdpctl.table import load

_CODE = ("graph.py", "traced.py", "tracing.py")


def find_out(function: str, arch: Any, *arguments: Any) -> Any:
    """Return the result of a function of `sdpctl.models.traced`, from the cache folder or by calling it.

    Args:
        function: name of the function; its result is plain data.
        arch: the architecture, the function's first argument.
        arguments: its other arguments, plain data.

    Raises:
        ModelError: if the function raises it; an error is not kept.
    """
    path = _path(function, arch.family, arch.network, arguments)
    with suppress(OSError, ValueError, KeyError, TypeError):  # it is not there, or damaged: it is made again
        return json.loads(path.read_bytes())["found"]
    found = load(f"sdpctl.models.traced:{function}")(arch, *arguments)
    with suppress(OSError):  # a folder that cannot be written costs time, and nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(descriptor, "w") as file:
            json.dump({"function": function, "network": arch.name, "arguments": arguments, "found": found}, file)
        Path(temporary).replace(path)
    return found


def _path(function: str, library: str, network: str, arguments: tuple[Any, ...]) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    known = json.dumps([function, library, network, arguments, version(library), version("torch"), _code()])
    return Path(home, "sdpctl", "networks", f"{hashlib.sha256(known.encode()).hexdigest()}.json")


@cache
def _code() -> str:
    """Return a hash of the code that traces networks."""
    return hashlib.sha256(b"".join(Path(__file__).with_name(name).read_bytes() for name in _CODE)).hexdigest()
