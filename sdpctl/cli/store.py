"""`sdpctl store`."""

from typing import Annotated

import typer

from sdpctl.cli.command import READS, Session, command
from sdpctl.cli.options import Ref, complete_tags, finite
from sdpctl.cli.row_table import RowTable, scaled
from sdpctl.cli.sharing import pull, push
from sdpctl.errors import IntegrityError

store_app = typer.Typer(help="Look after the artifact store.", no_args_is_help=True)


@store_app.command("ls")
@command("store-ls", *READS)
def ls(session: Session) -> None:
    """List the artifacts, oldest first."""
    from sdpctl.cli.rows import ArtifactRow
    from sdpctl.cli.tables import artifact_table
    from sdpctl.store import Store

    rows = [
        ArtifactRow(
            tag=artifact.tag,
            digest=artifact.digest,
            kind=artifact.kind,
            subject=artifact.subject.digest if artifact.subject else None,
            bytes=artifact.size,
            created=artifact.created,
        )
        for artifact in sorted(Store(session.store).artifacts(), key=lambda artifact: artifact.created)
    ]
    table = artifact_table(rows)
    session.result({"rows": table.records()}, [table], [row.digest for row in rows])


@store_app.command("show")
@command("store-show", *READS)
def show(
    session: Session,
    ref: Ref,
    layer: Annotated[str | None, typer.Option("--layer", help="Print the text of this layer.", show_default=False)] = None,
) -> None:
    """Show the layers of an artifact, and the artifacts that it was made from."""
    from sdpctl.cli.rows import LayerRow, LineageRow
    from sdpctl.cli.tables import layer_table, lineage_table
    from sdpctl.store import Store

    store = Store(session.store)
    artifact = store.resolve(ref)
    if layer is not None:
        session.output.content(store.read(artifact, layer))
        return
    layers = [
        LayerRow(title=title, digest=blob.digest, bytes=blob.size, media_type=blob.media_type)
        for title, blob in artifact.layers.items()
    ]
    lineage: list[LineageRow] = []
    subject = artifact.subject
    while subject is not None and store.has(subject):
        ancestor = store.at(subject)
        lineage.append(LineageRow(digest=ancestor.digest, tag=ancestor.tag, kind=ancestor.kind))
        subject = ancestor.subject
    if subject is not None:
        lineage.append(LineageRow(digest=subject.digest, tag=None, kind=None))

    title = [f"{artifact.tag or artifact.digest}: {artifact.kind}, {artifact.created}", artifact.digest]
    layer_rows, lineage_rows = layer_table(title, layers), lineage_table(lineage)
    tables: list[RowTable[LayerRow] | RowTable[LineageRow]] = [layer_rows, *([lineage_rows] if lineage else [])]
    document = {"kind": artifact.kind, "created": artifact.created}
    session.artifact(artifact, document | {"layers": layer_rows.records(), "lineage": lineage_rows.records()}, tables)


@store_app.command("tag")
@command("store-tag", *READS)
def tag(
    session: Session,
    ref: Ref,
    name: Annotated[str, typer.Argument(metavar="TAG", help="The tag.", show_default=False)],
) -> None:
    """Let a tag point at an artifact."""
    from sdpctl.store import Store

    store = Store(session.store)
    artifact = store.tag(store.resolve(ref), name)
    session.output.note(f"{name} is now {artifact.digest}")
    session.result({"digest": artifact.digest, "tag": name}, digests=[artifact.digest])


@store_app.command("rm")
@command("store-rm", "dry_run", *READS)
def rm(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="TAG", help="The tag.", autocompletion=complete_tags, show_default=False)],
) -> None:
    """Remove a tag, and its artifact if it has no other tag and nothing was made from it."""
    from sdpctl.store import Store

    removal = Store(session.store).remove(name, dry_run=session.dry_run)
    digest, verb = removal.artifact.digest, "would be removed" if session.dry_run else "is removed"
    if removal.tags:
        fate = f"the artifact {digest} keeps the tag {', '.join(removal.tags)}"
    elif removal.made:
        fate = f"the artifact {digest} stays without a tag, since {removal.made} artifacts were made from it"
    else:
        fate = f"so is the artifact {digest}, {len(removal.blobs)} blobs, {scaled(removal.bytes)} bytes"
    session.output.note(f"{session.store}: the tag {name} {verb}; {fate}")
    document = {"digest": digest, "tag": name, "tags": removal.tags, "made_from_it": removal.made, "blobs": removal.blobs}
    session.result(document | {"bytes": removal.bytes, "dry_run": session.dry_run}, digests=[digest])


store_app.command("push")(push)
store_app.command("pull")(pull)


@store_app.command("verify")
@command("store-verify", *READS)
def verify(session: Session) -> None:
    """Check that every blob matches its digest and every artifact is complete; exit with 5 otherwise."""
    from sdpctl.store import Store

    store = Store(session.store)
    problems = list(store.verify())
    session.result({"problems": problems})
    if problems:
        raise IntegrityError(*problems)
    session.output.note(f"{session.store}: {store.count()} artifacts, all whole")


@store_app.command("gc")
@command("store-gc", "dry_run", *READS)
def gc(
    session: Session,
    untagged: Annotated[bool, typer.Option("--untagged", help="Remove artifacts without a tag too.")] = False,
    grace: Annotated[float, typer.Option("--grace", min=0, callback=finite, help="Minutes; younger files are kept.")] = 60,
) -> None:
    """Remove what no artifact needs: blobs, temporary files, logs, and studies of searches."""
    from sdpctl.stages.leftovers import remove_leftovers
    from sdpctl.store import Store

    store = Store(session.store)
    report = store.gc(dry_run=session.dry_run, untagged=untagged, grace=60 * grace)
    beside = remove_leftovers(store, gone=report.entries, dry_run=session.dry_run, grace=60 * grace)
    size = report.bytes + beside.bytes
    document = {"entries": report.entries, "blobs": report.blobs, "files": report.files, "bytes": size}
    document |= {"logs": beside.logs, "studies": beside.studies, "locks": beside.locks}
    session.result(document | {"dry_run": session.dry_run}, digests=[*report.entries, *report.blobs])
    for what, names in (("log of", beside.logs), ("study", beside.studies)):
        for name in names:
            session.output.note(f"{what} {name}")
    verb = "would remove" if session.dry_run else "removed"
    counts = f"{len(report.entries)} artifacts, {len(report.blobs)} blobs, {len(report.files)} temporary files, "
    counts += f"{len(beside.logs)} logs, {len(beside.studies)} studies, {len(beside.locks)} locks"
    session.output.note(f"{session.store}: {verb} {counts}, {scaled(size)} bytes")
