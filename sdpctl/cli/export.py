"""`sdpctl export`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from sdpctl.budget import Budget
from sdpctl.cli.options import (
    DEFAULT_STORE,
    DryRun,
    Force,
    InstanceName,
    Json,
    MaxLatency,
    MaxMacs,
    NoCalibrate,
    Quiet,
    Ref,
    Set,
    StorePath,
    Verbose,
    comma_separated,
    complete_tags,
)
from sdpctl.cli.output import Output, check_output, scaled, write_file, write_folder
from sdpctl.cli.tables import export_table
from sdpctl.errors import UsageError
from sdpctl.export.catalog import CARD, FORMATS
from sdpctl.instance import Instance


def complete_formats(incomplete: str) -> Iterator[tuple[str, str]]:
    """Yield the formats that begin with a text, each with a few words on it."""
    yield from ((form.name, form.summary) for form in FORMATS.values() if form.name.startswith(incomplete))


def export(
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
            help="Export the best instance of a search; in a bundle its Pareto front and full too.",
            autocompletion=complete_tags,
            show_default=False,
        ),
    ] = None,
    instances: Annotated[
        str | None,
        typer.Option("--instances", metavar="LIST", help="Instances of a bundle: all, pareto, or a list.", show_default=False),
    ] = None,
    raw_input: Annotated[bool, typer.Option("--raw-input", help="Take uint8 pixels; the graph normalises them.")] = False,
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
    set_: Set = None,
    force: Force = False,
    dry_run: DryRun = False,
    store: StorePath = DEFAULT_STORE,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write one instance as ONNX or .pt2, or many as a bundle.

    Which one: --instance (full by default), the most accurate within a budget, or the best of a search.
    It is run outside on real images before it is kept. Commits it as NAME.export.FORMAT.HEX.
    """
    from sdpctl.export.settings import ExportSettings
    from sdpctl.pipeline.context import Context, open_artifact
    from sdpctl.pipeline.export import export as stage
    from sdpctl.pipeline.export import export_files
    from sdpctl.pipeline.instances import document

    if form is not None:
        FORMATS.find(form)
    output = Output(json_mode=json_, quiet=quiet, verbose=verbose)
    context = Context(path=store, report=output, force=force, dry_run=dry_run, calibrates=not no_calibrate)
    artifact = context.store.resolve(ref)
    ways = {"--instance": instance, "--max-macs": max_macs, "--max-latency-ms": max_latency_ms, "--from-search": from_search}
    if len(given := [name for name, value in (ways | {"--instances": instances}).items() if value is not None]) > 1:
        raise UsageError(f"{given[0]} and {given[1]} exclude each other; give one")
    if artifact.kind == "search" and not given:
        from_search = ref
    said: dict[str, Any] = {
        "format": form,
        "instance": _instance(instance),
        "max_macs": None if max_macs is None else Budget.parse(max_macs).text,
        "instances": _instances(instances),
        "raw_input": raw_input or None,
    }
    asked = [f"export.{key}={json.dumps(value)}" for key, value in said.items() if value is not None]
    fresh = ["export={}"] if asked or max_latency_ms is not None or from_search is not None else []  # it says all of it, then
    if artifact.kind == "export":
        if fresh or set_:
            raise UsageError(
                f"{ref} is an export already; give the checkpoint to export again, or leave all options out to write its files"
            )
        opened, chosen, name = None, document(artifact, context)["format"], document(artifact, context)["name"]
    else:
        opened = open_artifact(ref, context, [*fresh, *(set_ or ()), *asked])
        chosen, name = (opened.recipe.export or ExportSettings()).format, opened.name
    info = FORMATS.find(chosen)
    path = file or Path(f"{name}.{info.suffix}")
    card = path.with_name(f"{path.name}.md") if path.name else path
    check_output(path, member=info.member, force=force)
    if info.member is None:
        check_output(card, force=force)
    made = artifact if opened is None else stage(opened, context, search=from_search, max_latency_ms=max_latency_ms)
    if made is None:
        output.result("export", {"dry_run": True})
        return
    exported = document(made, context)
    files = export_files(made, context)
    if not dry_run:
        if info.member is None:
            write_file(path, files[info.files[0]])
            write_file(card, files[CARD])
        else:
            write_folder(path, files)
        output.note(f"{path}: {scaled(sum(map(len, files.values())))}B")
    shown = {"digest": made.digest, "tag": made.tag, "file": str(path)} | exported | ({"dry_run": True} if dry_run else {})
    output.result("export", shown, [export_table(str(made.tag), exported)], [made.digest])


def _instance(text: str | None) -> str | None:
    return None if text is None else str(Instance.parse(text))


def _instances(text: str | None) -> str | list[str] | None:
    if text in (None, "all", "pareto"):
        return text
    return [str(Instance.parse(part)) for part in comma_separated(text) or ()]
