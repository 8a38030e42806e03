"""`sdpctl store`."""

from typing import Annotated, Any

import typer

from sdpctl.cli.layout import Column, Table
from sdpctl.cli.options import DEFAULT_STORE, DryRun, Json, Quiet, Ref, StorePath, finite
from sdpctl.cli.output import Output, scaled
from sdpctl.errors import IntegrityError

store_app = typer.Typer(help="Look after the artifact store.", no_args_is_help=True)


@store_app.command("ls")
def ls(store: StorePath = DEFAULT_STORE, json_: Json = False, quiet: Quiet = False) -> None:
    """List the artifacts, oldest first."""
    from sdpctl.store import Store

    output = Output(json_mode=json_, quiet=quiet)
    rows: list[dict[str, Any]] = [
        {
            "tag": artifact.tag,
            "digest": artifact.digest,
            "kind": artifact.kind,
            "subject": artifact.subject.digest if artifact.subject else None,
            "bytes": artifact.size,
            "created": artifact.created,
        }
        for artifact in sorted(Store(store).artifacts(), key=lambda artifact: artifact.created)
    ]
    columns = [
        Column("tag", folds="."),
        Column("digest"),
        Column("kind", drop=1),
        Column("subject", drop=4),
        Column("bytes", "right", drop=2),
        Column("created", drop=3),
    ]
    table = Table("", columns)
    for row in rows:
        digests = (row["digest"][7:19], (row["subject"] or "")[7:19])
        table.add_row(row["tag"] or "", digests[0], row["kind"], digests[1], scaled(row["bytes"]), row["created"])
    output.result("store-ls", {"rows": rows}, [table], [row["digest"] for row in rows])


@store_app.command("show")
def show(
    ref: Ref,
    layer: Annotated[str | None, typer.Option("--layer", help="Print this layer's text.", show_default=False)] = None,
    store: StorePath = DEFAULT_STORE,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show an artifact: its layers, and what it was made from."""
    from sdpctl.store import Store

    output = Output(json_mode=json_, quiet=quiet)
    opened = Store(store)
    artifact = opened.resolve(ref)
    if layer is not None:
        output.content(opened.read(artifact, layer))
        return
    lineage = [artifact]
    while (subject := lineage[-1].subject) is not None and opened.has(subject):
        lineage.append(opened.at(subject))
    document: dict[str, Any] = {
        "digest": artifact.digest,
        "tag": artifact.tag,
        "kind": artifact.kind,
        "created": artifact.created,
        "layers": [
            {"title": t, "digest": d.digest, "bytes": d.size, "media_type": d.media_type} for t, d in artifact.layers.items()
        ],
        "lineage": [{"digest": a.digest, "tag": a.tag, "kind": a.kind} for a in lineage[1:]],
    }
    if subject is not None:
        document["lineage"].append({"digest": subject.digest, "tag": None, "kind": None})
    title = [f"{artifact.tag or artifact.digest}: {artifact.kind}, {artifact.created}", artifact.digest]
    columns = [Column("layer", folds="."), Column("digest", drop=1), Column("bytes", "right"), Column("media type", folds="/")]
    layers = Table(title, columns)
    for name, descriptor in artifact.layers.items():
        layers.add_row(name, descriptor.digest[7:19], f"{descriptor.size:,}", descriptor.media_type)
    tables = [layers]
    if document["lineage"]:
        made_from = Table(["", "made from"], [Column("kind"), Column("digest"), Column("tag", folds=".")])
        for link in document["lineage"]:
            made_from.add_row(link["kind"] or "(not here)", link["digest"][7:19], link["tag"] or "")
        tables.append(made_from)
    output.result("store-show", document, tables, [artifact.digest])


@store_app.command("tag")
def tag(
    ref: Ref,
    name: Annotated[str, typer.Argument(metavar="TAG", help="The tag that will point at it.", show_default=False)],
    store: StorePath = DEFAULT_STORE,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Let a tag point at an artifact."""
    from sdpctl.store import Store

    output = Output(json_mode=json_, quiet=quiet)
    opened = Store(store)
    artifact = opened.tag(opened.resolve(ref), name)
    output.note(f"{name} is now {artifact.digest}")
    output.result("store-tag", {"digest": artifact.digest, "tag": name}, digests=[artifact.digest])


@store_app.command("verify")
def verify(store: StorePath = DEFAULT_STORE, json_: Json = False, quiet: Quiet = False) -> None:
    """Check that every blob is what its digest says and every artifact is whole; exit 5 where not."""
    from sdpctl.store import Store

    output = Output(json_mode=json_, quiet=quiet)
    opened = Store(store)
    problems = list(opened.verify())
    output.result("store-verify", {"problems": problems})
    if problems:
        raise IntegrityError(*problems)
    output.note(f"{store}: {opened.count()} artifacts, all whole")


@store_app.command("gc")
def gc(
    untagged: Annotated[bool, typer.Option("--untagged", help="Remove artifacts without a tag too.")] = False,
    grace: Annotated[float, typer.Option("--grace", min=0, callback=finite, help="Minutes; younger files are kept.")] = 60,
    dry_run: DryRun = False,
    store: StorePath = DEFAULT_STORE,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove what no artifact needs."""
    from sdpctl.store import Store

    output = Output(json_mode=json_, quiet=quiet)
    report = Store(store).gc(dry_run=dry_run, untagged=untagged, grace=60 * grace)
    document = {"entries": report.entries, "blobs": report.blobs, "files": report.files, "bytes": report.bytes}
    output.result("store-gc", document | {"dry_run": dry_run}, digests=[*report.entries, *report.blobs])
    did = "would remove" if dry_run else "removed"
    counts = f"{len(report.entries)} artifacts, {len(report.blobs)} blobs, {len(report.files)} temporary files"
    output.note(f"{store}: {did} {counts}, {scaled(report.bytes)} bytes")
