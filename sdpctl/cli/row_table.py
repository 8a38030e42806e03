"""A table of typed rows. A terminal shows its columns; JSON and CSV have the fields of its rows."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, Literal, Self, TypeVar


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table. The name of a field that is a Python keyword gets an underscore at its end; JSON and CSV omit it."""

    def record(self) -> dict[str, Any]:
        """Return the row as JSON prints it."""
        return {field.name.removesuffix("_"): _plain(getattr(self, field.name)) for field in fields(self)}

    def cells(self) -> dict[str, Any]:
        """Return the row as CSV writes it: by default the fields of JSON."""
        return self.record()

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Self:
        """Read a row from a document, which may hold more than the row; a value that the document lacks is None."""
        return cls(**{field.name: document.get(field.name.removesuffix("_")) for field in fields(cls)})


def _plain(value: Any) -> Any:
    if isinstance(value, Row):
        return value.record()
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


SomeRow = TypeVar("SomeRow", bound=Row)
Shown = TypeVar("Shown", contravariant=True)


@dataclass(frozen=True)
class Column(Generic[Shown]):
    """A column that a terminal shows.

    Args:
        heading: text above the column.
        text: returns the text of a row in the column.
        justify: side of the column at which its text stands; numbers stand on the right.
        drop: on a narrow terminal, columns with a higher number are left out first; a column with 0 is always shown.
        folds: characters after which text may be folded; a piece that is too long is folded anywhere. `+` folds instances,
            and never breaks a piece. Empty for text that stays on one line.
    """

    heading: str
    text: Callable[[Shown], str]
    justify: Literal["left", "right"] = "left"
    drop: int = 0
    folds: str = ""


@dataclass(frozen=True)
class RowTable(Generic[SomeRow]):
    """A table of typed rows.

    Args:
        columns: the columns that a terminal shows.
        rows: the rows, in the order in which they are shown.
        title: lines above the table.
        caption: lines below the table.
        bold: returns whether a row is shown in bold.
    """

    columns: Sequence[Column[SomeRow]]
    rows: Sequence[SomeRow]
    title: Sequence[str] = ()
    caption: Sequence[str] = ()
    bold: Callable[[SomeRow], bool] = lambda _: False

    def records(self) -> list[dict[str, Any]]:
        """Return the rows as JSON prints them."""
        return [row.record() for row in self.rows]

    def csv(self) -> bytes:
        """Return the rows as a CSV file."""
        text = io.StringIO()
        records = [row.cells() for row in self.rows]
        writer = csv.DictWriter(text, list(records[0]) if records else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return text.getvalue().encode()


def scaled(value: float) -> str:
    """Write a count with three significant digits and a prefix: 4.09 G."""
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.{max(0, 3 - len(str(int(value / size))))}f} {prefix}"
    return f"{value:.0f}"
