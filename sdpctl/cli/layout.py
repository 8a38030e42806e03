"""Tables that fit a terminal: text is folded, or the least important columns are left out; nothing is cut."""

import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from rich.cells import cell_len, chop_cells
from rich.text import Text

from sdpctl.untrusted import printable

GAP = 2
"""Cells between two columns."""

COMFORTABLE = 28
"""Cells of a column that folds, as long as other columns can be left out instead."""

NARROW = 16
"""Cells of a column that folds, where nothing more can be left out."""


class Column(NamedTuple):
    """A column of a table.

    Args:
        name: its heading.
        justify: where its cells stand; numbers stand on the right.
        drop: columns of a high number are left out first where the terminal is narrow; a column of 0 stays.
        folds: characters after which its cells are folded, and where a piece is too long, anywhere in it; `+` folds
            instances, of which no piece is broken; none for cells that stay on one line.
    """

    name: str
    justify: Literal["left", "right"] = "left"
    drop: int = 0
    folds: str = ""


def folded(text: str, width: int, at: str = " ") -> list[str]:
    """Fold text into lines of at most `width` cells, after some characters where there are any, else anywhere."""
    stops = re.escape(at)
    pieces = re.findall(f"[^{stops}]*[{stops}]+|[^{stops}]+", text) if at else [text]
    lines = [""]
    for piece in pieces:
        if cell_len(lines[-1] + piece.rstrip(" ")) <= width:
            lines[-1] += piece
        else:
            lines += chop_cells(piece, width) if cell_len(piece.rstrip(" ")) > width else [piece]
    return [line.rstrip(" ") for line in lines if line.strip(" ")] or [""]


class Table:
    """A table of text, without the control characters that foreign text may have.

    Args:
        title: a line, or several.
        columns: their headings, and what happens to them on a narrow terminal.
        caption: a line below, or several.
    """

    def __init__(
        self, title: str | Sequence[str], columns: Sequence[Column], caption: str | Sequence[str] | None = None
    ) -> None:
        self.title = _lines(title)
        self.columns = list(columns)
        self.caption = _lines(caption)
        self.rows: list[tuple[list[str], str]] = []

    def add_row(self, *cells: str, style: str | None = None) -> None:
        """Add a row, a cell for each column."""
        self.rows.append(([printable(cell) for cell in cells], style or ""))

    def fitted(self, width: int | None) -> Iterator[Text]:
        """Yield the lines of the table, folded to a width in cells; whole where there is none."""
        widths = self._widths(width)
        caption = list(self.caption)
        if left_out := [column.name for i, column in enumerate(self.columns) if i not in widths]:
            shows = "them" if len(left_out) > 1 else "it"
            caption.append(f"left out at {width} columns: {', '.join(left_out)}; --json or a wider terminal shows {shows}")
        yield from _styled(self.title, "italic", width)
        yield from self._row([column.name for column in self.columns], "bold", widths)
        for cells, style in self.rows:
            yield from self._row(cells, style, widths)
        yield from _styled(caption, "dim italic", width)

    def _row(self, cells: Sequence[str], style: str, widths: dict[int, int]) -> Iterator[Text]:
        parts = {i: folded(cells[i], size, self.columns[i].folds) for i, size in widths.items()}
        for k in range(max(map(len, parts.values()))):
            line = ""
            for i, size in widths.items():
                text = parts[i][k] if k < len(parts[i]) else ""
                space = " " * (size - cell_len(text))
                line += (space + text if self.columns[i].justify == "right" else text + space) + " " * GAP
            yield Text(line.rstrip(" "), style)

    def _widths(self, width: int | None) -> dict[int, int]:
        """Return the width of each column that is shown, in cells, by its place."""
        texts = [[column.name, *(cells[i] for cells, _ in self.rows)] for i, column in enumerate(self.columns)]
        full = {i: max(map(cell_len, column)) for i, column in enumerate(texts)}
        if width is None:
            return full
        shown = list(full)

        def spare(least: dict[int, int]) -> int:
            return width - sum(least[i] for i in shown) - GAP * (len(shown) - 1)

        least = {i: min(size, COMFORTABLE) if self.columns[i].folds else size for i, size in full.items()}
        while spare(least) < 0 and (dropped := max(shown, key=lambda i: self.columns[i].drop)) in self._droppable():
            shown.remove(dropped)
        if spare(least) < 0:
            least = {i: min(size, _narrowest(texts[i], self.columns[i].folds)) for i, size in full.items()}
        widths, rest = {i: least[i] for i in shown}, spare(least)
        for place, i in enumerate(order := sorted(shown, key=lambda i: full[i] - least[i])):
            more = min(full[i] - least[i], max(0, rest) // (len(order) - place))
            widths[i] += more
            rest -= more
        return widths

    def _droppable(self) -> set[int]:
        return {i for i, column in enumerate(self.columns) if column.drop}


def _narrowest(texts: Sequence[str], folds: str) -> int:
    """Return the least width of a column, in cells."""
    if folds not in ("", "+"):
        return NARROW
    return max(cell_len(piece) for text in texts for piece in (re.findall(r"[^+]*\+|[^+]+", text) if folds else [text]))


def _lines(text: str | Sequence[str] | None) -> list[str]:
    return [printable(line) for line in ([text] if isinstance(text, str) and text else text or ())]


def _styled(lines: Sequence[str], style: str, width: int | None) -> Iterator[Text]:
    for line in lines:
        yield from (Text(part, style) for part in (folded(line, width) if width else [line]))
