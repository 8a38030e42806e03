"""What a user sees: data on stdout, everything else on stderr; as tables, as one JSON document, or as digests only."""

import csv
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column as Part
from rich.text import Text

from sdpctl.cli.layout import Table
from sdpctl.errors import ResourceError, UsageError
from sdpctl.untrusted import printable

BAR_FITS, CLOCK_FITS = 80, 100
"""Columns of a terminal on which a bar, and the time that has passed, have room beside what is being done."""


def say(*lines: str) -> None:
    """Print lines on standard error, without control characters, and on a terminal folded at words."""
    console = Console(stderr=True)
    for line in lines:
        console.print(Text(printable(line)), soft_wrap=not sys.stderr.isatty())


class Output:
    """The one place that prints; whatever it prints for a person is without control characters.

    Args:
        json_mode: one JSON document on stdout.
        quiet: digests only.
        verbose: details too.
    """

    def __init__(self, *, json_mode: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        if json_mode and quiet:
            raise UsageError("--json and --quiet exclude each other; give one of them")
        self.mode: Literal["human", "json", "quiet"] = "json" if json_mode else "quiet" if quiet else "human"
        self.verbose = verbose
        self.out, self.err = Console(), Console(stderr=True)

    # The pipeline's Reporter

    def note(self, text: str) -> None:
        """Say what a user wants to know."""
        if self.mode != "quiet":
            self.err.print(Text(printable(text)), soft_wrap=not sys.stderr.isatty())

    def detail(self, text: str) -> None:
        """Say what a curious user wants to know."""
        if self.verbose:
            self.note(text)

    @contextmanager
    def progress(self, text: str, total: int, done: int = 0) -> Iterator["_Progress"]:
        """Show a bar with the time left on a terminal, nothing elsewhere."""
        if self.mode == "quiet" or not sys.stderr.isatty() or self.err.is_dumb_terminal:
            yield _Progress(None, text)
            return
        whole = Part(no_wrap=True)
        columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False, table_column=Part(overflow="fold"))]
        columns += [BarColumn(bar_width=min(40, (self.err.width - 56) // 2))] if self.err.width >= BAR_FITS else []
        columns += [MofNCompleteColumn(table_column=whole)]
        columns += [TimeElapsedColumn(table_column=whole)] if self.err.width >= CLOCK_FITS else []
        columns += [TextColumn("left", table_column=whole), TimeRemainingColumn(table_column=whole)]
        with Bar(*columns, console=self.err, transient=True, refresh_per_second=4, speed_estimate_period=120) as bar:
            bar.add_task(printable(text), total=total, completed=done)
            yield _Progress(bar, text)

    # Results

    def result(
        self, command: str, document: Mapping[str, Any], tables: Sequence[Table] = (), digests: Sequence[str] = ()
    ) -> None:
        """Print what a command found out.

        Args:
            command: names the document's schema, `sdpctl.<command>/1`.
            document: what `--json` prints.
            tables: what a person sees.
            digests: what `--quiet` prints, a line each.
        """
        if self.mode == "json":
            json.dump({"schema": f"sdpctl.{command}/1"} | dict(document), sys.stdout, indent=2)
            sys.stdout.write("\n")
        elif self.mode == "quiet":
            for digest in digests:
                sys.stdout.write(f"{printable(digest)}\n")
        else:
            for table in tables:
                for line in table.fitted(self.out.width if sys.stdout.isatty() else None):
                    self.out.print(line, soft_wrap=True)

    def content(self, content: bytes) -> None:
        """Print the text of a file: its very bytes, but without control characters on a terminal."""
        if sys.stdout.isatty():
            lines = content.decode(errors="backslashreplace").split("\n")
            sys.stdout.write("\n".join(map(printable, lines)))
        else:
            sys.stdout.flush()
            sys.stdout.buffer.write(content)


class _Progress:
    def __init__(self, bar: Bar | None, text: str) -> None:
        self.bar, self.text = bar, text

    def advance(self, text: str = "") -> None:
        """Count one more, and show what is worth knowing of it."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], advance=1, description=printable(f"{self.text} {text}".rstrip()))


def scaled(value: float) -> str:
    """Write a count with three significant digits and a prefix: 4.09 G."""
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.{max(0, 3 - len(str(int(value / size))))}f} {prefix}"
    return f"{value:.0f}"


def check_output(path: Path | None, *, member: str | None = None, force: bool) -> None:
    """Refuse an output that exists or cannot be written, before any work is done.

    Args:
        path: of the file or folder; None for none.
        member: for a folder, the file by which one that may be replaced is known.
        force: replace what is there.

    Raises:
        UsageError: where it is there and may not be replaced, or cannot be written there.
    """
    if path is None:
        return
    if not path.name:
        raise UsageError(f"{path}: this cannot be the name of a {'folder' if member else 'file'}; choose a different path")
    if member is None and path.is_dir():
        raise UsageError(f"{path}: this is a folder; give the path of a file")
    if path.exists() and not force:
        raise UsageError(
            f"{path}: this {'folder' if member else 'file'} exists; --force replaces it, or choose a different path"
        )
    if member is not None and path.exists() and not (path / member).is_file():
        raise UsageError(
            f"{path}: this exists and is not a folder with a {member}, so --force does not replace it; choose a different path"
        )
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}; choose a different path, or make the folder")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{path}: the folder {path.parent} is not writable; choose a different folder")


def write_file(path: Path, content: bytes) -> None:
    """Write a file in one step.

    Raises:
        ResourceError: where it cannot be written.
    """
    with _staged(path) as staged:
        staged.write_bytes(content)
        staged.replace(path)


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder of files; one that is there is replaced when the new one is whole.

    Raises:
        ResourceError: where it cannot be written.
    """
    path = path.resolve()  # what a link points at is replaced, not the link
    with _staged(path) as staged, _staged(path, "old") as before:
        staged.mkdir()
        for name, content in files.items():
            (staged / name).write_bytes(content)
        if path.exists():
            path.rename(before)
        try:
            staged.rename(path)
        except BaseException:
            if before.exists():
                before.rename(path)
            raise


@contextmanager
def _staged(path: Path, word: str = "new") -> Iterator[Path]:
    """Yield a temporary sibling path, and remove whatever is left there."""
    staged = path.with_name(f".{path.name}.{word}.{os.getpid()}")
    try:
        yield staged
    except OSError as error:
        raise ResourceError(f"{path}: this cannot be written ({error.strerror or error}); choose a different path") from error
    finally:
        if staged.is_dir():
            shutil.rmtree(staged)
        staged.unlink(missing_ok=True)


def write_csv(path: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows, in one step.

    Raises:
        ResourceError: where the file cannot be written.
    """
    if path is None:
        return
    text = io.StringIO()
    names = [name for row in rows[:1] for name, value in row.items() if not isinstance(value, list)]
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue().encode())
