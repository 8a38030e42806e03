"""`sdpctl latency`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdpctl.cli.command import Session, command
from sdpctl.cli.files import write_file
from sdpctl.cli.options import comma_separated, complete_points
from sdpctl.errors import UsageError, shown

if TYPE_CHECKING:
    from sdpctl.export.latency import Latencies

LARGEST_BATCH = 4096


@command("latency", "csv", "force", "json_", "quiet")
def latency(
    session: Session,
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="BUNDLE|FILE...",
            help="Folders of bundles and onnx-folders, .onnx files and .pt2 files.",
            readable=False,
            show_default=False,
        ),
    ],
    batch: Annotated[str, typer.Option("--batch", metavar="LIST", help="Numbers of images of a call, e.g. 1,8.")] = "1",
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, max=1024, help="Threads of the library; its default otherwise.", show_default=False),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, max=100_000, help="Number of calls that count.")] = 30,
    instances: Annotated[
        str | None,
        typer.Option(
            "--instances",
            metavar="LIST",
            help="Comma-separated; all instances of a folder by default. The table of a part is only shown.",
            autocompletion=complete_points,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Measure the latency of exported networks on this machine.

    The table of a folder is kept in its latency.json, by which --max-latency-ms of `predict`, and of the program of an
    onnx-folder, then choose on this machine.
    """
    from sdpctl.cli.rows import LatencyRow
    from sdpctl.cli.tables import latency_table
    from sdpctl.export.run_folder import LATENCY, machine_text

    batches, names = _sizes(batch), comma_separated(instances)
    rows: list[LatencyRow] = []
    shown_files = []
    for path in files:
        found = _measured(path, batches, repeats, threads, names)
        kept = path.is_dir() and names is None
        if kept:
            write_file(path / LATENCY, found.document())
            session.output.note(f"{path / LATENCY}: `--max-latency-ms` uses this table on this machine")
        measured_on = machine_text(found.machine)
        for row in found.rows:
            macs = found.macs.get(row["instance"])
            relative = None if macs is None or not found.full_macs else macs / found.full_macs
            rows.append(LatencyRow(file=str(path), macs=macs, relative=relative, measured_on=measured_on, **row))
        shown_files.append({"file": str(path), "machine": dict(found.machine), "kept": kept})
    table = latency_table(rows, repeats)
    session.write_csv(table)
    session.result({"files": shown_files, "repeats": repeats, "rows": table.records()}, [table])


def _measured(path: Path, batches: list[int], repeats: int, threads: int | None, names: list[str] | None) -> "Latencies":
    """Measure one export.

    Raises:
        UsageError: if the path is not an export whose latency can be measured, or instances are named for a single file.
    """
    from sdpctl.export import latency as exports
    from sdpctl.export.bundle import is_bundle
    from sdpctl.export.catalog import FORMATS
    from sdpctl.export.run_folder import TABLE, cores

    if not path.exists():
        raise UsageError(f"{path}: there is no such file or folder; `sdpctl export` writes one")
    if (path / TABLE).is_file():
        return exports.measure_onnx_folder(path, batches, repeats, threads, names)
    if is_bundle(path):
        from sdpctl.runtime import measure_bundle

        return measure_bundle(path, batches, repeats, threads, names)
    for form in FORMATS.values():
        if form.holds_cascade and (path / str(form.member)).is_file():
            raise UsageError(f"{path}: the latency of a cascade depends on the images; measure an onnx-folder or a bundle")
    if path.is_dir() or path.suffix not in (".onnx", ".pt2"):
        raise UsageError(f"{path}: this is not a bundle, an onnx-folder, an .onnx file or a .pt2 file")
    if names is not None:
        raise UsageError(f"--instances: {path} holds one network; leave this option out")
    if path.suffix == ".onnx":
        return exports.measure_onnx(path, batches, repeats, threads or cores())
    return exports.measure_pt2(path, batches, repeats, threads)


def _sizes(text: str) -> list[int]:
    """Return the batch sizes of the command line.

    Raises:
        UsageError: if one is not a whole number from 1, or occurs twice.
    """
    parts = comma_separated(text) or []
    sizes = [int(part) for part in parts if part.isascii() and part.isdecimal() and 1 <= int(part[:9]) <= LARGEST_BATCH]
    if len(set(sizes)) < len(parts):
        raise UsageError(f"--batch {shown(text)}: give different numbers from 1 to {LARGEST_BATCH}, for example --batch 1,8")
    return sizes
