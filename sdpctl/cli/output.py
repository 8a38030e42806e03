"""The output of commands: the result on stdout as tables, one JSON document or digests; all messages on stderr."""

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Column as Part
from rich.text import Text

from sdpctl.cli.layout import Layout
from sdpctl.cli.row_table import RowTable
from sdpctl.errors import UsageError
from sdpctl.untrusted import printable

BAR_FITS, CLOCK_FITS = 80, 100
"""Width in columns from which a terminal has room for a bar, and for the elapsed time."""

BETWEEN = 0.1
"""Minimum number of seconds between two updates of a bar: a million of them would take longer than what they show."""


def say(*lines: str) -> None:
    """Print lines on standard error with control characters escaped; a terminal folds them at words."""
    console = Console(stderr=True)
    for line in lines:
        console.print(Text(printable(line)), soft_wrap=not sys.stderr.isatty())


class Output:
    """The only class that prints results and notes; control characters are escaped in all output for people.

    Args:
        json_mode: print the result as one JSON document.
        quiet: print digests only.
        verbose: print details too.

    Raises:
        UsageError: if both JSON and digests are asked for.
    """

    def __init__(self, *, json_mode: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        if json_mode and quiet:
            raise UsageError("--json and --quiet exclude each other; give one of them")
        self.mode: Literal["human", "json", "quiet"] = "json" if json_mode else "quiet" if quiet else "human"
        self.verbose = verbose
        self.out, self.err = Console(), Console(stderr=True)
        self._bar: Bar | None = None

    # The stages' Reporter

    def note(self, text: str) -> None:
        """Print a line that every user wants to read; nothing in quiet mode."""
        if self.mode != "quiet":
            self.err.print(Text(printable(text)), soft_wrap=not sys.stderr.isatty())

    def detail(self, text: str) -> None:
        """Print a line that only a user of `--verbose` wants to read."""
        if self.verbose:
            self.note(text)

    @contextmanager
    def progress(self, text: str, total: int, done: int = 0) -> Iterator["_Progress"]:
        """Show a bar with the remaining time on a terminal; show nothing elsewhere."""
        if self.mode == "quiet" or not sys.stderr.isatty() or self.err.is_dumb_terminal:
            yield _Progress(None, text)
            return
        if self._bar is not None:  # a terminal shows one display at a time
            task = self._bar.add_task(printable(text), total=total, completed=done)
            yield _Progress(self._bar, text, task)
            self._bar.remove_task(task)
            return
        whole = Part(no_wrap=True)
        columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False, table_column=Part(overflow="fold"))]
        columns += [BarColumn(bar_width=min(40, (self.err.width - 56) // 2))] if self.err.width >= BAR_FITS else []
        columns += [MofNCompleteColumn(table_column=whole)]
        columns += [TimeElapsedColumn(table_column=whole)] if self.err.width >= CLOCK_FITS else []
        columns += [TextColumn("left", table_column=whole), TimeRemainingColumn(table_column=whole)]
        with Bar(*columns, console=self.err, transient=True, refresh_per_second=4, speed_estimate_period=120) as bar:
            self._bar = bar
            try:
                yield (shown := _Progress(bar, text, bar.add_task(printable(text), total=total, completed=done)))
                shown.draw()
            finally:
                self._bar = None

    # Results

    def result(
        self, command: str, document: Mapping[str, Any], tables: Sequence[RowTable[Any]] = (), digests: Sequence[str] = ()
    ) -> None:
        """Print the result of a command.

        Args:
            command: names the schema of the document, `sdpctl.<command>/1`.
            document: printed with `--json`.
            tables: printed without `--json` and `--quiet`.
            digests: printed with `--quiet`, one per line.
        """
        if self.mode == "json":
            json.dump({"schema": f"sdpctl.{command}/1"} | dict(document), sys.stdout, indent=2)
            sys.stdout.write("\n")
        elif self.mode == "quiet":
            for digest in digests:
                sys.stdout.write(f"{printable(digest)}\n")
        else:
            for table in tables:
                for line in Layout(table).lines(self.out.width if sys.stdout.isatty() else None):
                    self.out.print(line, soft_wrap=True)

    def content(self, content: bytes) -> None:
        """Print the content of a file: the bytes themselves, or on a terminal text with control characters escaped."""
        if sys.stdout.isatty():
            lines = content.decode(errors="backslashreplace").split("\n")
            sys.stdout.write("\n".join(map(printable, lines)))
        else:
            sys.stdout.flush()
            sys.stdout.buffer.write(content)


class _Progress:
    def __init__(self, bar: Bar | None, text: str, task: TaskID | None = None) -> None:
        self.bar, self.text, self.task = bar, text, task
        self.steps, self.drawn, self.beside = 0, -math.inf, ""

    def advance(self, text: str = "") -> None:
        """Move the bar one step on, and show a text beside it; steps that follow each other quickly are drawn together."""
        self.steps += 1
        self.beside = text
        if time.monotonic() - self.drawn >= BETWEEN:
            self.draw()

    def draw(self) -> None:
        """Draw the steps that were not drawn yet."""
        if self.bar is not None and self.task is not None and self.steps:
            description = printable(f"{self.text} {self.beside}".rstrip())
            self.bar.update(self.task, advance=self.steps, description=description)
            self.steps, self.drawn = 0, time.monotonic()
