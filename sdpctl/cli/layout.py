"""Tables as lines of text that fit a terminal: text is folded, or the least important columns are left out; nothing is cut."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from rich.cells import cell_len, chop_cells
from rich.text import Text

from sdpctl.cli.row_table import RowTable
from sdpctl.untrusted import printable

GAP = 2
"""Width in cells of the space between two columns."""

COMFORTABLE = 28
"""Minimum width in cells of a column that folds, as long as other columns can be left out instead."""

NARROW = 16
"""Minimum width in cells of a column that folds, once no more columns can be left out."""


def folded(text: str, width: int, at: str = " ") -> list[str]:
    """Fold text into lines of at most `width` cells, after one of the characters `at` if possible, otherwise anywhere."""
    stops = re.escape(at)
    pieces = re.findall(f"[^{stops}]*[{stops}]+|[^{stops}]+", text) if at else [text]
    lines = [""]
    for piece in pieces:
        if cell_len(lines[-1] + piece.rstrip(" ")) <= width:
            lines[-1] += piece
        else:
            lines += chop_cells(piece, width) if cell_len(piece.rstrip(" ")) > width else [piece]
    return [line.rstrip(" ") for line in lines if line.strip(" ")] or [""]


class Layout:
    """The text of a table, with control characters escaped, and how it is laid out."""

    def __init__(self, table: RowTable[Any]) -> None:
        self.columns = list(table.columns)
        self.title = [printable(line) for line in table.title]
        self.caption = [printable(line) for line in table.caption]
        self.rows: list[tuple[list[str], str]] = [
            ([printable(column.text(row)) for column in table.columns], "bold" if table.bold(row) else "") for row in table.rows
        ]

    def lines(self, width: int | None) -> Iterator[Text]:
        """Yield the lines of the table, fitted to a width in cells; at their full width for None."""
        widths = self._widths(width)
        caption = list(self.caption)
        if left_out := [column.heading for i, column in enumerate(self.columns) if i not in widths]:
            shows = "them" if len(left_out) > 1 else "it"
            caption.append(f"left out at {width} columns: {', '.join(left_out)}; --json or a wider terminal shows {shows}")
        yield from _styled(self.title, "italic", width)
        yield from self._row([column.heading for column in self.columns], "bold", widths)
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
        """Return the width in cells of each column that is shown, by the index of the column."""
        texts = [[column.heading, *(cells[i] for cells, _ in self.rows)] for i, column in enumerate(self.columns)]
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
    """Return the minimum width of a column in cells."""
    if folds not in ("", "+"):
        return NARROW
    return max(cell_len(piece) for text in texts for piece in (re.findall(r"[^+]*\+|[^+]+", text) if folds else [text]))


def _styled(lines: Sequence[str], style: str, width: int | None) -> Iterator[Text]:
    for line in lines:
        yield from (Text(part, style) for part in (folded(line, width) if width else [line]))
