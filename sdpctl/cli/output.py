"""What a user sees: data on stdout, everything else on stderr; as tables, as one JSON document, or as digests only."""

import csv
import errno
import io
import json
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column as Part
from rich.text import Text

from sdpctl.cli.layout import Table
from sdpctl.errors import IntegrityError, ResourceError, UsageError
from sdpctl.fields import is_name
from sdpctl.untrusted import kind_of, printable

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

    Only regular files are replaced, and folders that hold a certain file; what a link points at counts, not the link.

    Args:
        path: of the file or folder; None for none.
        member: for a folder, the file by which one that may be replaced is known.
        force: replace what is there.

    Raises:
        UsageError: where it is there and may not be replaced, or cannot be written there.
    """
    if path is None:
        return
    wanted = "folder" if member else "file"
    if not path.name:
        raise UsageError(f"{path}: this cannot be the name of a {wanted}; choose a different path")
    try:
        there = None if not path.is_symlink() and not path.exists() else path.stat()
        place = path.resolve()
        if there is not None:
            _check_replaceable(path, there, member=member, force=force)
        if not place.parent.is_dir():
            raise UsageError(f"{path}: there is no folder {path.parent}; choose a different path, or make the folder")
    except OSError as error:
        reason = "it is a link to nothing" if error.errno in (errno.ENOENT, errno.ELOOP) else error.strerror
        raise UsageError(f"{path}: this {wanted} cannot be written ({reason}); choose a different path") from error
    if not os.access(place.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{path}: the folder {path.parent} is not writable; choose a different folder")
    if there is not None and member is not None and not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"{path}: nothing can be removed from this folder; choose a different one")


def _check_replaceable(path: Path, there: os.stat_result, *, member: str | None, force: bool) -> None:
    is_file, is_folder = stat.S_ISREG(there.st_mode), stat.S_ISDIR(there.st_mode)
    if not (is_file or is_folder):
        raise UsageError(f"{path}: this is {kind_of(there.st_mode)}, which is never replaced; choose a different name")
    if any(os.path.samestat(there, stream) for stream in _standard_streams()):
        raise UsageError(f"{path}: this is where the command's own output goes; choose a different name")
    if member is None and is_folder:
        raise UsageError(f"{path}: this is a folder; give the path of a file")
    if not force:
        raise UsageError(
            f"{path}: this {'folder' if member else 'file'} exists; --force replaces it, or choose a different path"
        )
    if member is not None and not (path / member).is_file():
        raise UsageError(
            f"{path}: this exists and is not a folder with a {member}, so --force does not replace it; choose a different path"
        )


def _standard_streams() -> Iterator[os.stat_result]:
    for descriptor in (1, 2):
        with suppress(OSError):  # a closed one is nothing that could be replaced
            yield os.fstat(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write a file in one step.

    Raises:
        ResourceError: where it cannot be written.
    """
    with _staged(path) as (place, staged):
        with staged.open("xb") as file:
            file.write(content)
        staged.replace(place)


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder of files; one that is there is replaced when the new one is whole.

    Args:
        path: of the folder.
        files: content by plain name.

    Raises:
        IntegrityError: for a name that leads elsewhere; nothing is written.
        ResourceError: where it cannot be written.
    """
    for name in files:
        if not is_name(name):
            raise IntegrityError(f"{path}: {name!r} is not the name of a file in it; nothing was written")
    with _staged(path) as (place, staged), _staged(path, "old") as (_, before):
        staged.mkdir()
        for name, content in files.items():
            (staged / name).write_bytes(content)
        if place.exists():
            place.rename(before)
        try:
            staged.rename(place)
        except BaseException:
            if before.exists():
                before.rename(place)
            raise


@contextmanager
def _staged(path: Path, word: str = "new") -> Iterator[tuple[Path, Path]]:
    """Yield the path with links resolved, and a temporary sibling path; remove whatever is left at the latter."""
    try:
        place = path.resolve()
        staged = place.with_name(f".{place.name[:40]}.{word}.{secrets.token_hex(4)}")  # not to be foreseen by others
        try:
            yield place, staged
        finally:
            if staged.is_dir():
                shutil.rmtree(staged)
            staged.unlink(missing_ok=True)
    except OSError as error:
        raise ResourceError(f"{path}: this cannot be written ({error.strerror or error}); choose a different path") from error


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
