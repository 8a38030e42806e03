"""`sdpctl store push` and `sdpctl store pull`."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from sdpctl.cli.command import READS, Session, command
from sdpctl.cli.options import Ref
from sdpctl.cli.row_table import scaled
from sdpctl.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from sdpctl.store.address import Address
    from sdpctl.store.registry import Registry
    from sdpctl.store.sharing import Transfer

AddressText = Annotated[
    str,
    typer.Argument(metavar="ADDRESS", help="The place in a registry: oci://HOST/REPOSITORY:TAG.", show_default=False),
]
Recursive = Annotated[bool, typer.Option("--recursive", "-r", help="Include everything that was made from the artifact.")]
PlainHttp = Annotated[bool, typer.Option("--plain-http", help="Use http; it is always used for localhost.")]
MoveTags = Annotated[bool, typer.Option("--force", help="Move tags that point at a different artifact.")]

MIB = 2**20


@command("store-push", "dry_run", *READS)
def push(
    session: Session,
    ref: Ref,
    address: AddressText,
    recursive: Recursive = False,
    plain_http: PlainHttp = False,
    force: MoveTags = False,
) -> None:
    """Send an artifact, and all it was made from, to a registry."""
    from sdpctl.store import Store
    from sdpctl.store.address import Address
    from sdpctl.store.sharing import plan_push
    from sdpctl.store.sharing import push as send

    place = Address.parse(address)
    if place.tag is None:
        raise UsageError(f"{place}: an artifact is pushed under a tag; give oci://{place.host}/{place.repository}:TAG")
    store = Store(session.store)
    artifact = store.resolve(ref)
    with _registry(place, plain_http) as registry:
        transfer = plan_push(store, artifact, registry, recursive=recursive, force=force)
        if not session.dry_run:
            with _moving(session, f"sending to {place.host}", transfer) as watch:
                send(store, registry, transfer, watch)
    _tell(session, transfer, "sent", tag=place.tag)


@command("store-pull", "dry_run", *READS)
def pull(
    session: Session,
    address: AddressText,
    tag: Annotated[
        str | None,
        typer.Argument(metavar="[TAG]", help="The tag here; by default that of the registry.", show_default=False),
    ] = None,
    recursive: Recursive = False,
    plain_http: PlainHttp = False,
    force: MoveTags = False,
) -> None:
    """Fetch an artifact, and all it was made from, from a registry."""
    from sdpctl.store import Store
    from sdpctl.store.address import Address
    from sdpctl.store.sharing import plan_pull
    from sdpctl.store.sharing import pull as fetch

    place = Address.parse(address)
    tag = tag or place.tag
    if tag is None:
        raise UsageError(f"{place}: this address has no tag; give the tag that the artifact gets here: ADDRESS TAG")
    there = os.path.lexists(session.store)
    store = (Store if session.dry_run else Store.create)(session.store) if there else None
    with _registry(place, plain_http) as registry:
        transfer = plan_pull(store, registry, tag, recursive=recursive, force=force)
        if not session.dry_run:
            store = store or Store.create(session.store)
            with _moving(session, f"fetching from {place.host}", transfer) as watch:
                fetch(store, registry, transfer, watch, force=force)
    _tell(session, transfer, "fetched", tag=tag)


def _registry(address: "Address", plain_http: bool) -> "Registry":
    """Open a repository.

    Raises:
        ResourceError: if oras is not installed.
    """
    try:
        from sdpctl.store.registry import Registry
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("oras", "requests", "jsonschema"):
            raise
        raise ResourceError(
            f"{address}: a registry needs oras, which is not installed; pip install 'sdpctl[sharing]'"
        ) from error
    return Registry(address, plain_http=plain_http)


@contextmanager
def _moving(session: Session, text: str, transfer: "Transfer") -> Iterator[Callable[[int], None]]:
    """Show how many MiB were moved, and yield the function that counts bytes."""
    done = 0
    with session.output.progress(f"{text}, MiB", -(-transfer.bytes // MIB)) as bar:

        def watch(count: int) -> None:
            nonlocal done
            for _ in range((done + count) // MIB - done // MIB):
                bar.advance()
            done += count

        yield watch


def _tell(session: Session, transfer: "Transfer", verb: str, *, tag: str) -> None:
    """Print what was moved, or would be moved in a dry run."""
    from sdpctl.cli.rows import SharedRow
    from sdpctl.cli.tables import shared_table

    rows = []
    for each in transfer.shared:
        artifact = each.artifact
        rows.append(
            SharedRow(tag=artifact.tag, digest=artifact.digest, kind=artifact.kind, bytes=artifact.size, there=each.there)
        )
    table = shared_table(rows)
    moved = f"{len(transfer.blobs)} blobs ({scaled(transfer.bytes)} bytes) {'would be ' if session.dry_run else ''}{verb}"
    session.output.note(f"{transfer.address}: {len(rows)} artifacts, {moved}")
    document = {"digest": transfer.digest, "tag": tag, "address": str(transfer.address), "artifacts": table.records()}
    blobs = [blob.digest for blob in transfer.blobs]
    session.result(document | {"blobs": blobs, "bytes": transfer.bytes, "dry_run": session.dry_run}, [table], [transfer.digest])
