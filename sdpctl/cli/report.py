"""`sdpctl report`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sdpctl import fields
from sdpctl.cli.command import WRITES, Session, command
from sdpctl.cli.files import check_output, write_file
from sdpctl.cli.options import complete_tags
from sdpctl.cli.row_table import scaled
from sdpctl.errors import UsageError
from sdpctl.untrusted import DOCUMENT_BYTES, load_json, printable_path, read_regular


class ReportForm(StrEnum):
    """The format of a report."""

    html = "html"
    png = "png"
    svg = "svg"


@command("report", *WRITES)
def report(
    session: Session,
    refs: Annotated[
        list[str],
        typer.Argument(
            metavar="REF...",
            help="Tags or digests: a checkpoint with all its tables, or an evaluation, a search, an agent or a cascade.",
            autocompletion=complete_tags,
            show_default=False,
        ),
    ],
    form: Annotated[
        ReportForm | None,
        typer.Option(
            "--format",
            help="html: one page with everything; png, svg: the chart of cost against accuracy. html by default.",
            show_default=False,
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="PATH", help="NAME.report.FORMAT by default.", show_default=False),
    ] = None,
    latency: Annotated[
        list[Path] | None,
        typer.Option(
            "--latency",
            metavar="FILE",
            help="A table of latencies, latency.json, for the page; may be repeated, one for each network in order.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show networks in one page for a browser, or in a picture: cost against accuracy, tables, curves, where they come from.

    The page is made of the tables in the store; no image is run. It needs no network. Several REFs are shown over one another.
    Commits the page as NAME.report; latencies are in the written file only.
    """
    from sdpctl.report.page import with_latencies
    from sdpctl.report.settings import ReportSettings
    from sdpctl.stages.report import Report, shown_by

    context = session.context
    shown = shown_by(refs, context, session.overrides)
    section = shown[0].network.recipe.report or ReportSettings()
    stage = Report(shown, section.format if form is None else form.value)
    path = file or Path(f"{shown[0].network.name}.{stage.title}")
    check_output(path, force=session.force)
    if latency and stage.form != "html":
        raise UsageError(f"--latency: a chart in the format {stage.form} has no latencies; leave this option out, or use html")
    tables = [read_latencies(each) for each in latency or ()]
    artifact = session.plan.run(stage)
    if artifact is None:
        session.planned()
        return
    content = context.store.read(artifact, stage.title)
    if tables:
        content = with_latencies(content, tables)
    if not session.dry_run:
        write_file(path, content)
        session.output.note(f"{path}: {scaled(len(content))}B")
    session.artifact(artifact, {"file": str(path), "format": stage.form, "bytes": len(content)})


def read_latencies(path: Path) -> dict[str, float]:
    """Read a table of latencies: milliseconds per image by the text of an instance, of the smallest batch that was measured.

    Raises:
        UsageError: if the file cannot be read or is not such a table.
    """
    try:
        document = load_json(read_regular(path, limit=DOCUMENT_BYTES))
        _LATENCIES(document, "")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"--latency {printable_path(path)}: this is not a table of latencies ({reason})") from error
    smallest = min(row["batch"] for row in document["rows"])
    return {row["instance"]: row["median_ms"] / row["batch"] for row in document["rows"] if row["batch"] == smallest}


_LATENCIES: fields.Check = fields.section(
    {
        "rows": fields.listed(
            fields.section(
                {"instance": fields.text(), "batch": fields.whole(1, 2**20), "median_ms": fields.number(0, 1e9)}, closed=False
            ),
            1,
            100_000,
        )
    },
    closed=False,
)
