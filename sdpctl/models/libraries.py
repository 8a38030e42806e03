"""The libraries whose networks are traced, as plain data. Needs neither torch nor the libraries."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from sdpctl.table import Table


@dataclass(frozen=True, kw_only=True)
class Library:
    """A library of networks.

    Args:
        name: the name of its package, which precedes the slash in an architecture's name.
        registers: regular expression of the decorator that registers a network in the library's source code.
        code: the library's `Networks`, as `module:class`.
    """

    name: str
    registers: str
    code: str

    @cached_property
    def networks(self) -> Sequence[str]:
        """The names of its networks, sorted; none if the library is not installed.

        The names are read from the source code, since importing a library takes seconds.
        """
        spec = find_spec(self.name)
        if spec is None or spec.origin is None:
            return ()
        registered = re.compile(rf"^{self.registers}[ \t]*\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)
        files = Path(spec.origin).parent.joinpath("models").glob("*.py")
        return sorted({name for file in files for name in registered.findall(file.read_text(encoding="utf-8"))})


LIBRARIES = Table(
    "library",
    [
        Library(
            name="torchvision",
            registers=r"@register_model\(\)",
            code="sdpctl.models.torchvision_networks:TorchvisionNetworks",
        ),
        Library(name="timm", registers=r"@register_model", code="sdpctl.models.timm_networks:TimmNetworks"),
    ],
)
