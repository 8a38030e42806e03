"""The libraries whose networks are traced, as plain data. Needs neither torch nor the libraries."""

import re
from collections.abc import Mapping, Sequence
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
        renames: regular expression of the code that lists earlier names of networks; None if there are none.
        code: the library's `Networks`, as `module:class`.
    """

    name: str
    registers: str
    renames: str | None = None
    code: str

    @cached_property
    def networks(self) -> Sequence[str]:
        """The names of its networks, sorted; none if the library is not installed."""
        registered = re.compile(rf"^{self.registers}[ \t]*\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)
        return sorted({name for source in self._sources for name in registered.findall(source)})

    @cached_property
    def renamed(self) -> Mapping[str, str]:
        """The current name of each network that the library still knows by an earlier name."""
        if self.renames is None:
            return {}
        entries = [entry for source in self._sources for entry in re.findall(self.renames, source, re.MULTILINE | re.DOTALL)]
        pairs = [pair for entry in entries for pair in re.findall(r"'(\w+)'\s*:\s*'(\w+)[\w.]*'", entry)]
        return {old: new for old, new in pairs if new in self.networks}

    @cached_property
    def _sources(self) -> list[str]:
        """The source code of its networks: the names are read from it, since importing a library takes seconds."""
        spec = find_spec(self.name)
        if spec is None or spec.origin is None:
            return []
        return [file.read_text(encoding="utf-8") for file in sorted(Path(spec.origin).parent.joinpath("models").glob("*.py"))]


LIBRARIES = Table(
    "library",
    [
        Library(
            name="torchvision",
            registers=r"@register_model\(\)",
            code="sdpctl.models.torchvision_networks:TorchvisionNetworks",
        ),
        Library(
            name="timm",
            registers=r"@register_model",
            renames=r"^register_model_deprecations\(__name__, \{(.*?)\}\)",
            code="sdpctl.models.timm_networks:TimmNetworks",
        ),
    ],
)
