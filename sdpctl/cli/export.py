"""`sdpctl export`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdpctl.cli.command import WRITES, Session, command
from sdpctl.cli.files import check_output, write_file, write_folder
from sdpctl.cli.options import InstanceName, MaxLatency, MaxMacs, NoCalibrate, Ref, comma_separated, complete_tags
from sdpctl.cli.row_table import scaled
from sdpctl.export.catalog import CARD, FORMATS, OPSETS, FormatInfo

if TYPE_CHECKING:
    from sdpctl.store import Artifact


class PrecisionName(StrEnum):
    """Precision of the exported files."""

    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"


class RuntimeName(StrEnum):
    """A second runtime that checks the exported files."""

    openvino = "openvino"


def complete_formats(incomplete: str) -> Iterator[tuple[str, str]]:
    """Yield the formats whose names begin with a text, each with its summary."""
    yield from ((form.name, form.summary) for form in FORMATS.values() if form.name.startswith(incomplete))


@command("export", *WRITES)
def export(
    session: Session,
    ref: Ref,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="; ".join(f"{form.name}: {form.summary}" for form in FORMATS.values()) + ". onnx by default.",
            autocompletion=complete_formats,
            show_default=False,
        ),
    ] = None,
    instance: InstanceName = None,
    max_macs: MaxMacs = None,
    max_latency_ms: MaxLatency = None,
    from_search: Annotated[
        str | None,
        typer.Option(
            "--from-search",
            metavar="TAG",
            help="Export the best instance of a search; a bundle or an onnx-folder also gets its Pareto front and full.",
            autocompletion=complete_tags,
            show_default=False,
        ),
    ] = None,
    instances: Annotated[
        str | None,
        typer.Option(
            "--instances",
            metavar="LIST",
            help="Instances of a bundle or an onnx-folder: all, pareto, or a list.",
            show_default=False,
        ),
    ] = None,
    raw_input: Annotated[
        bool, typer.Option("--raw-input", help="Take uint8 pixels as input; the graph normalises them.")
    ] = False,
    precision: Annotated[
        PrecisionName | None,
        typer.Option(
            "--precision",
            help="fp32 (default), fp16, or int8, quantised with ranges of training images; onnx only.",
            show_default=False,
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop",
            metavar="POINTS",
            help="Refuse a precision that loses more top-1 on the test images, in percentage points; 1.0 by default.",
            show_default=False,
        ),
    ] = None,
    opset: Annotated[
        int | None,
        typer.Option(
            "--opset",
            metavar="N",
            help=f"Version of the ONNX operators, {OPSETS[0]} to {OPSETS[-1]}; the exporter's own by default.",
            show_default=False,
        ),
    ] = None,
    check: Annotated[
        RuntimeName | None,
        typer.Option("--check", help="Also check the file in this runtime.", show_default=False),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help=f"NAME.{', .'.join(form.suffix for form in FORMATS.values())} by default.",
            show_default=False,
        ),
    ] = None,
    no_calibrate: NoCalibrate = False,
) -> None:
    """Write one instance as ONNX or .pt2, several as a bundle or a folder of ONNX graphs, or a cascade of instances.

    The instance is that of --instance (full by default), the most accurate one within a budget, or the best of a search.
    A cascade is one that `sdpctl search --cascade` chose: the best, or the most accurate within --max-macs on average.
    The exported network is run on real images and compared before it is committed as NAME.export.FORMAT.HEX.
    """
    from sdpctl.cli.tables import export_table
    from sdpctl.export.settings import SEVERAL, ExportSettings
    from sdpctl.stages.export import Export, export_files
    from sdpctl.stages.export_request import ExportRequest
    from sdpctl.stages.layers import read_document
    from sdpctl.stages.network import open_network

    if form is not None:
        FORMATS.find(form)
    context = session.context
    artifact = context.store.resolve(ref)
    request = ExportRequest(
        form=form,
        instance=instance,
        max_macs=max_macs,
        max_latency_ms=max_latency_ms,
        from_search=from_search,
        instances=instances if instances in SEVERAL else comma_separated(instances),
        raw_input=raw_input,
        precision=precision,
        max_drop=max_drop,
        opset=opset,
        check=check,
    ).of(ref, artifact.kind)
    made: Artifact | None = artifact
    if artifact.kind == "export":
        request.check_copied(ref, session.overrides)
        described = read_document(context.store, artifact)
        lower = (described.get("precision") or {}).get("name", "fp32")
        target = export_target(file, described["name"], described["format"], lower)
        target.check(force=session.force)
    else:
        network = open_network(ref, context, request.overrides(session.overrides))
        section = network.recipe.export or ExportSettings()
        target = export_target(file, network.name, section.format, section.precision)
        target.check(force=session.force)
        stage = Export(
            network,
            search=request.from_search,
            cascade=request.cascade,
            max_latency_ms=request.max_latency_ms,
            calibrates=not no_calibrate,
        )
        made = session.plan.run(stage)
    if made is None:
        session.planned()
        return
    exported = read_document(context.store, made)
    files = export_files(made, context)
    if not session.dry_run:
        target.write(files)
        session.output.note(f"{target.path}: {scaled(sum(map(len, files.values())))}B")
    shown = {"file": str(target.path)} | exported | ({"dry_run": True} if session.dry_run else {})
    session.artifact(made, shown, [export_table(str(made.tag), exported)])


@dataclass(frozen=True)
class ExportTarget:
    """The target of an export: a file with its card, or a folder.

    Args:
        path: path of the file, or of the folder if the format holds several instances.
        form: the format.
    """

    path: Path
    form: FormatInfo

    @property
    def card(self) -> Path:
        """Path of the model card, beside the file of one instance."""
        return self.path.with_name(f"{self.path.name}.md") if self.path.name else self.path

    def check(self, *, force: bool) -> None:
        """Refuse a target that exists or cannot be written.

        Raises:
            UsageError: if the target may not be replaced, or cannot be written.
        """
        check_output(self.path, member=self.form.member, force=force)
        if self.form.member is None:
            check_output(self.card, force=force)

    def write(self, files: Mapping[str, bytes]) -> None:
        """Write the files of an export.

        Args:
            files: content by name.

        Raises:
            ResourceError: if a file cannot be written.
        """
        if self.form.member is not None:
            write_folder(self.path, files)
        else:
            write_file(self.path, files[self.form.files[0]])
            write_file(self.card, files[CARD])


def export_target(file: Path | None, name: str, form: str, precision: str) -> ExportTarget:
    """Return the target of an export.

    Args:
        file: path that the command line names; None for the default path.
        name: name of the network; the default path begins with it.
        form: name of the format.
        precision: precision of the files; the default path names one other than float32.
    """
    info = FORMATS.find(form)
    lower = "" if precision == "fp32" else f".{precision}"
    return ExportTarget(file or Path(f"{name}{lower}.{info.suffix}"), info)
