"""Tables of entries that are chosen by name: architectures, data sets, strategies, formats, kinds of artifacts.

A table is plain data. The recipe schema, shell completion, `--help` and the code all read the same table, and reading it needs
no torch. An entry that needs heavy imports names its code as `module:attribute`, which `load` imports on first use.
"""

from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any, Generic, Protocol, TypeVar

from sdpctl.errors import UsageError, did_you_mean, shown


class Named(Protocol):
    """An entry of a table."""

    @property
    def name(self) -> str:
        """The name by which a user chooses the entry."""


Entry = TypeVar("Entry", bound=Named)


class Table(Mapping[str, Entry], Generic[Entry]):
    """Entries by name, in the order in which they were added.

    Args:
        noun: what an entry is, in the singular: `data set`.
        entries: the first entries.
        listed_by: a command that lists the names; without one, an error lists them itself.
    """

    pattern: str | None = None
    """Regular expression of the names of further entries, which an iteration leaves out."""

    def __init__(self, noun: str, entries: Iterable[Entry] = (), *, listed_by: str | None = None) -> None:
        self.noun = noun
        self.listed_by = listed_by
        self._entries: dict[str, Entry] = {}
        for entry in entries:
            self.add(entry)

    def add(self, entry: Entry) -> Entry:
        """Add an entry and return it.

        Raises:
            ValueError: if the table already has an entry with this name.
        """
        if entry.name in self._entries:
            raise ValueError(f"there is already a {self.noun} {entry.name!r}")
        self._entries[entry.name] = entry
        return entry

    def remove(self, name: str) -> None:
        """Remove an entry."""
        del self._entries[name]

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def unknown(self, name: str) -> str:
        """Return the message for a name that is not in the table, with the nearest name and a way to list all names."""
        names = f"`{self.listed_by}` lists them" if self.listed_by else f"choose one of {', '.join(self)}"
        return f"there is no {self.noun} {shown(name)}{did_you_mean(name, self)}; {names}"

    def find(self, name: str) -> Entry:
        """Return the entry of a name.

        Raises:
            UsageError: if there is no such entry; the message suggests the nearest name.
        """
        if name not in self:
            raise UsageError(self.unknown(name))
        return self[name]


def load(place: str) -> Any:
    """Import an object, given as `module:attribute`."""
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute)
