"""Push artifacts to a registry, and pull them: an artifact, all it was made from, and on request all that was made from it.

Blobs go first, then the manifests, a subject before what was made from it, then the lists of referrers, and tags last. A
command that ends early leaves blobs that its next call finds. Everything that arrives is checked against its digest.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sdpctl.errors import IntegrityError, NotFoundError, ResourceError, UsageError
from sdpctl.store.address import Address
from sdpctl.store.layout import (
    MANIFEST_BYTES,
    MANIFEST_TYPE,
    TAG,
    Artifact,
    Descriptor,
    Json,
    is_artifact_type,
    parse_manifest,
)
from sdpctl.store.store import Arrival, Store
from sdpctl.untrusted import printable

if TYPE_CHECKING:
    from sdpctl.store.registry import Registry

MANIFESTS = 1000
"""Maximum number of artifacts that one pull fetches."""

Watch = Callable[[int], None]
"""Receives the number of bytes that were sent or received."""


@dataclass(frozen=True)
class Shared:
    """An artifact that is pushed or pulled.

    Args:
        arrival: its manifest, with the tags that it gets.
        there: whether the other side has the manifest already.
    """

    arrival: Arrival
    there: bool

    @property
    def artifact(self) -> Artifact:
        """The artifact."""
        return self.arrival.artifact


@dataclass(frozen=True)
class Transfer:
    """What a push or a pull does.

    Args:
        address: address in the registry.
        shared: the artifacts, a subject before what was made from it.
        blobs: the blobs that the other side lacks.
        digest: digest of the artifact that was asked for.
    """

    address: Address
    shared: tuple[Shared, ...]
    blobs: tuple[Descriptor, ...]
    digest: str

    @property
    def bytes(self) -> int:
        """Size of the blobs that the other side lacks."""
        return sum(blob.size for blob in self.blobs)


def _blobs_of(artifacts: Iterable[Artifact]) -> list[Descriptor]:
    """Return the configs and layers of artifacts, each once."""
    return list({blob.digest: blob for artifact in artifacts for blob in artifact.content()}.values())


# Push


def plan_push(store: Store, artifact: Artifact, registry: "Registry", *, recursive: bool, force: bool) -> Transfer:
    """Find out what a push has to send.

    Args:
        store: the store.
        artifact: the artifact.
        registry: the repository, with the tag that the artifact gets.
        recursive: send everything that was made from the artifact too. A tag `digits.eval` of such an artifact becomes
            `v1.eval`, if `digits` becomes `v1`.
        force: move tags that point at a different artifact.

    Raises:
        IntegrityError: if a part of the lineage is missing or damaged.
        UsageError: if a tag of the registry points at a different artifact and `force` is not set.
    """
    address = registry.address
    wanted = _with_descendants(store, artifact) if recursive else [artifact]
    tags = {artifact.digest: [address.reference]}
    for tag, digest in _tags_below(store, artifact.tag).items() if recursive else ():
        if digest in {each.digest for each in wanted}:
            tags.setdefault(digest, []).append(address.with_tag(address.reference + tag).reference)
    shared = []
    for each in _in_order(store, wanted):
        if not is_artifact_type(each.manifest.get("artifactType")):
            raise UsageError(f"{each.digest} is not an artifact of sdpctl but {each.kind!r}; copy it with skopeo")
        content = store.blob(each.descriptor)
        plain = Descriptor(each.descriptor.media_type, each.digest, each.descriptor.size)
        arrival = Arrival(plain, content, tuple(tags.get(each.digest, ())))
        for tag in arrival.tags:
            _check_tag(registry, tag, each.digest, force=force)
        shared.append(Shared(arrival, registry.has_manifest(each.digest)))
    blobs = [blob for blob in _blobs_of(each.artifact for each in shared) if not registry.has_blob(blob)]
    for blob in blobs:
        store.file_of(blob)  # nothing is sent if a part is damaged here
    return Transfer(address, tuple(shared), tuple(blobs), artifact.digest)


def _check_tag(registry: "Registry", tag: str, digest: str, *, force: bool) -> None:
    found = registry.manifest(tag)
    if found is not None and found[1] != digest and not force:
        raise UsageError(
            f"{registry.address.with_tag(tag)}: this tag points at a different artifact, {found[1]}; --force moves it, or "
            "choose a different tag"
        )


def _with_descendants(store: Store, artifact: Artifact) -> list[Artifact]:
    """Return an artifact and everything in the store that was made from it."""
    found = {artifact.digest: artifact}
    known = {each.digest: each for each in store.artifacts()}.values()
    while new := [a for a in known if a.digest not in found and any(s.digest in found for s in a.manifests())]:
        found |= {each.digest: each for each in new}
    return list(found.values())


def _tags_below(store: Store, tag: str | None) -> dict[str, str]:
    """Return the digests of the tags that begin with a tag and a dot, by the rest of the tag: `.eval`."""
    names = {artifact.tag: artifact.digest for artifact in store.artifacts() if artifact.tag}
    return {name.removeprefix(tag): digest for name, digest in names.items() if tag and name.startswith(f"{tag}.")}


def _in_order(store: Store, artifacts: Iterable[Artifact]) -> list[Artifact]:
    """Return artifacts and everything that they were made from, a subject first."""
    order: dict[str, Artifact] = {}
    for artifact in artifacts:
        chain, waiting = [], [artifact]
        while waiting:
            each = waiting.pop()
            if each.digest not in order:
                chain.append(each)
                waiting += [store.at(descriptor) for descriptor in each.manifests()]
        order |= {each.digest: each for each in reversed(chain)}
    return list(order.values())


def push(store: Store, registry: "Registry", transfer: Transfer, watch: Watch) -> None:
    """Send what a registry lacks, move the tags, and check where they point.

    Args:
        store: the store.
        registry: the repository.
        transfer: what `plan_push` found out.
        watch: receives the number of bytes after each piece.

    Raises:
        IntegrityError: if a tag does not point at what was sent.
    """
    for blob in transfer.blobs:
        registry.send_blob(blob, store.file_of(blob), watch)
    for each in transfer.shared:
        if not each.there:
            registry.put_manifest(each.arrival.descriptor.digest, each.arrival.content)
    for each in transfer.shared:
        artifact = each.artifact
        if artifact.subject is not None:
            registry.add_referrer(artifact.subject.digest, _referrer(artifact))
    for each in reversed(transfer.shared):
        for tag in each.arrival.tags:
            registry.put_manifest(tag, each.arrival.content)
            found = registry.manifest(tag)
            if found is None or found[1] != each.arrival.descriptor.digest:
                raise IntegrityError(
                    f"{registry.address.with_tag(tag)}: the registry does not have what was sent; check that this is "
                    "the address of a registry"
                )


def _referrer(artifact: Artifact) -> Json:
    """Return the descriptor by which an artifact is listed among the referrers of its subject."""
    manifest = artifact.manifest
    told = {name: manifest[name] for name in ("artifactType", "annotations") if name in manifest}
    return Descriptor(MANIFEST_TYPE, artifact.digest, artifact.descriptor.size).document() | told


# Pull


def plan_pull(store: Store | None, registry: "Registry", tag: str | None, *, recursive: bool, force: bool) -> Transfer:
    """Fetch the manifests that a pull needs, and find out which blobs the store lacks.

    Args:
        store: the store; None if there is none yet.
        registry: the repository, with the tag or the digest of the artifact.
        tag: tag that the artifact gets here; None for no tag.
        recursive: fetch everything that was made from the artifact too. A tag `v1.eval` of the registry becomes
            `digits.eval`, if `v1` becomes `digits`.
        force: move tags that point at a different artifact.

    Raises:
        IntegrityError: if what the registry sends is damaged, or is not an artifact of sdpctl.
        NotFoundError: if the registry does not have the artifact.
        UsageError: if a tag of the store points at a different artifact and `force` is not set.
    """
    address = registry.address
    found = registry.manifest(address.reference)
    if found is None:
        raise NotFoundError(f"{address}: there is no such artifact in the registry; check the address")
    arrivals: dict[str, Arrival] = {}
    asked = _arrival(found[0], found[1], address)
    _fetch_lineage(registry, asked, arrivals)
    if recursive:
        _fetch_referrers(registry, asked, arrivals)
    tags = {asked.descriptor.digest: [tag] if tag else []}
    if recursive and tag and address.tag:
        for name in registry.tags():
            rest = name.removeprefix(address.tag)
            if (
                rest != name
                and rest.startswith(".")
                and TAG.fullmatch(tag + rest)
                and (there := registry.manifest(name)) is not None
            ):
                tags.setdefault(there[1], []).append(tag + rest)
    named = [replace(arrival, tags=tuple(tags.get(digest, ()))) for digest, arrival in arrivals.items()]
    if store is not None:
        store.check_free(named, force=force)
    shared = [Shared(each, store is not None and not store.lacks(each.descriptor)) for each in named]
    blobs = _blobs_of(each.artifact for each in shared)
    lacking = [blob for blob in blobs if store is None or store.lacks(blob)]
    return Transfer(address, tuple(shared), tuple(lacking), asked.descriptor.digest)


def _arrival(content: bytes, digest: str, address: Address) -> Arrival:
    """Check a manifest that a registry sent.

    Raises:
        IntegrityError: if the content is not the manifest of an artifact of sdpctl.
    """
    try:
        manifest = parse_manifest(content, digest)
    except IntegrityError:
        raise IntegrityError(f"{address}: {digest} is not a manifest that sdpctl can read; check the address") from None
    found = manifest.get("artifactType") or (manifest.get("config") or {}).get("mediaType") or manifest.get("mediaType", "")
    if not is_artifact_type(found) or "manifests" in manifest:
        raise IntegrityError(
            f"{address}: {digest} is not an artifact of sdpctl but {printable(str(found))[:80]!r}; check the address"
        )
    arrival = Arrival(Descriptor(MANIFEST_TYPE, digest, len(content)), content)
    arrival.artifact.kind  # noqa: B018  raises if a newer sdpctl made the artifact
    return arrival


def _fetch_lineage(registry: "Registry", last: Arrival, arrivals: dict[str, Arrival]) -> None:
    """Fetch the manifests of everything that an artifact was made from; add them and its own, the subjects first."""
    chain = [last]
    while (subject := chain[-1].artifact.subject) is not None and subject.digest not in arrivals:
        chain.append(_fetched(registry, subject))
        if len(chain) + len(arrivals) > MANIFESTS:
            raise IntegrityError(
                f"{registry.address}: more than {MANIFESTS:,} artifacts belong to this one; pull a different one"
            )
    arrivals.update({arrival.descriptor.digest: arrival for arrival in reversed(chain)})


def _fetched(registry: "Registry", descriptor: Descriptor) -> Arrival:
    found = registry.manifest(descriptor.digest) if descriptor.size <= MANIFEST_BYTES else None
    if found is None:
        raise NotFoundError(
            f"{registry.address}: the registry does not have {descriptor.digest}, which belongs to this artifact; push the "
            "artifact again with `sdpctl store push`"
        )
    if len(found[0]) != descriptor.size:
        raise IntegrityError(f"{registry.address}: the size of {descriptor.digest} is not what an artifact says; push it again")
    return _arrival(*found, registry.address)


def _fetch_referrers(registry: "Registry", first: Arrival, arrivals: dict[str, Arrival]) -> None:
    """Fetch the manifests of everything that was made from an artifact, and add them after their subjects."""
    waiting = [first.descriptor.digest]
    while waiting:
        subject = waiting.pop()
        for descriptor in _own(registry.referrers(subject)):
            if descriptor.digest in arrivals:
                continue
            arrival = _fetched(registry, descriptor)
            made_from = arrival.artifact.subject
            if made_from is None or made_from.digest != subject:
                raise IntegrityError(
                    f"{registry.address}: {descriptor.digest} is listed as made from {subject}, but was not; pull without "
                    "--recursive"
                )
            _fetch_lineage(registry, arrival, arrivals)
            waiting.append(descriptor.digest)


def _own(documents: Iterable[Json]) -> Iterator[Descriptor]:
    """Yield the descriptors of artifacts of sdpctl; other programs attach signatures and the like."""
    for document in documents:
        if is_artifact_type(document.get("artifactType")):
            yield Descriptor.parse(document)


def pull(store: Store, registry: "Registry", transfer: Transfer, watch: Watch, *, force: bool) -> None:
    """Fetch the blobs that the store lacks, and enter the artifacts into its index in one step.

    Args:
        store: the store.
        registry: the repository.
        transfer: what `plan_pull` found out.
        watch: receives the number of bytes after each piece.
        force: move tags that point at a different artifact.

    Raises:
        IntegrityError: if what the registry sends does not match its digest.
        ResourceError: if the disk has not enough space.
    """
    free = shutil.disk_usage(store.path).free
    if transfer.bytes > free:
        raise ResourceError(
            f"{store.path}: {transfer.bytes:,} bytes are to be fetched, and the disk has {free:,} left; make room"
        )

    def watched(pieces: Iterable[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            watch(len(piece))
            yield piece

    for blob in transfer.blobs:
        store.receive(blob, watched(registry.pieces(blob)), str(transfer.address))
    store.adopt([each.arrival for each in transfer.shared], force=force)
