"""`sdpctl report`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sdpctl.cli.command import WRITES, Session, command
from sdpctl.cli.files import check_output, write_file
from sdpctl.cli.options import complete_tags
from sdpctl.cli.row_table import scaled


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
) -> None:
    """Show networks in one page for a browser, or in a picture: cost against accuracy, tables, curves, where they come from.

    The page is made of the tables in the store; no image is run. It needs no network. Several REFs are shown over one another.
    Commits the page as NAME.report.
    """
    from sdpctl.report.settings import ReportSettings
    from sdpctl.stages.report import Report, shown_by

    context = session.context
    shown = shown_by(refs, context, session.overrides)
    section = shown[0].network.recipe.report or ReportSettings()
    stage = Report(shown, section.format if form is None else form.value)
    path = file or Path(f"{shown[0].network.name}.{stage.title}")
    check_output(path, force=session.force)
    artifact = session.plan.run(stage)
    if artifact is None:
        session.planned()
        return
    content = context.store.read(artifact, stage.title)
    if not session.dry_run:
        write_file(path, content)
        session.output.note(f"{path}: {scaled(len(content))}B")
    session.artifact(artifact, {"file": str(path), "format": stage.form, "bytes": len(content)})
