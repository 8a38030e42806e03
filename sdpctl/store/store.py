"""The store: put, commit, resolve, read, verify, collect.

A commit writes blobs, then the manifest, then the index; removal goes in the reverse order. A crash leaves only blobs that
nothing points at and temporary files, which `gc` removes. A commit holds `gc.lock` shared, `gc` holds it exclusively, and
`index.lock` is held while the index changes. Readers hold no lock. If a blob is missing, they read the index and the blobs once
more while they hold `gc.lock` shared. So a blob that `gc` or a training removed in the meantime is not reported as damage.
"""

import errno
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from sdpctl.errors import IntegrityError, NotFoundError, ResourceError, UsageError, did_you_mean
from sdpctl.store.files import hash_of, locked, replace_file, staged, sync_directory, writing
from sdpctl.store.layout import (
    CREATED,
    DIGEST,
    EMPTY,
    EMPTY_TYPE,
    INDEX_TYPE,
    KEY,
    LAYOUT,
    MANIFEST_BYTES,
    MANIFEST_TYPE,
    REF_NAME,
    TAG,
    TAG_MAX,
    TITLE,
    Artifact,
    Descriptor,
    Json,
    canonical,
    layer_type,
    make_manifest,
    parse_manifest,
    sha256,
)
from sdpctl.untrusted import DOCUMENT_BYTES, load_json, open_regular, printable, read_regular

T = TypeVar("T")

GRACE_SECONDS = 3600.0
"""Age below which `gc` keeps a blob, since a foreign tool may not have added its index entry yet."""

STORE_VERSION = "dev.sdpctl.store-version"
UNFINISHED = {"blobs", "tmp", "index.lock", "index.json"}
"""The only names in the folder of an unfinished store; `oci-layout` is written last."""


class _MissingError(IntegrityError):
    """A missing blob: damage, unless the blob was removed after the index was read."""

    def __init__(self, path: Path, digest: str) -> None:
        super().__init__(f"{path}: this blob is missing; restore it from a copy")
        self.digest = digest


@dataclass(frozen=True)
class GcReport:
    """The report of `gc`: the files that it removed, or would remove in a dry run.

    Args:
        entries: digests of manifests that were removed from the index.
        blobs: digests of removed blobs.
        files: names of removed temporary files.
        bytes: size of the removed blobs and files.
    """

    entries: tuple[str, ...]
    blobs: tuple[str, ...]
    files: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class Removal:
    """What `remove` did, or would do in a dry run.

    Args:
        artifact: the artifact that had the tag.
        tags: its other tags.
        made: number of artifacts that were made from it.
        blobs: digests of the blobs that were removed; empty if it has other tags or others were made from it.
        bytes: size of these blobs.
    """

    artifact: Artifact
    tags: tuple[str, ...]
    made: int
    blobs: tuple[str, ...] = ()
    bytes: int = 0


@dataclass(frozen=True)
class Arrival:
    """A manifest that came from a different store, with the tags that it is to have here.

    Args:
        descriptor: descriptor of the manifest.
        content: its bytes.
        tags: tags to move to it.
    """

    descriptor: Descriptor
    content: bytes
    tags: tuple[str, ...] = ()

    @property
    def artifact(self) -> Artifact:
        """The artifact of the manifest.

        Raises:
            IntegrityError: if the content is not a manifest.
        """
        tag = self.tags[0] if self.tags else None
        return Artifact(self.descriptor, parse_manifest(self.content, self.descriptor.digest), tag)


class Store:
    """An OCI image layout.

    Args:
        path: folder of an existing store; `Store.create` makes a new store.
        lock_timeout: seconds to wait for a lock that a different process holds.

    Raises:
        IntegrityError: if there is no store, or a newer sdpctl wrote it.
    """

    def __init__(self, path: Path, *, lock_timeout: float = 60) -> None:
        self.path = path
        self.lock_timeout = lock_timeout
        self._blobs = path / "blobs" / "sha256"
        self._staging = path / "tmp"
        self._keys: dict[str, str] = {}
        marker = path / "oci-layout"
        try:
            layout = load_json(read_regular(marker, limit=MANIFEST_BYTES))
        except FileNotFoundError:
            if not path.exists():
                raise IntegrityError(
                    f"{path}: there is no store here; `sdpctl train` makes one, and --store names a different one"
                ) from None
            raise IntegrityError(
                f"{path}: this is not a store (it has no oci-layout file); name a different one with --store"
            ) from None
        except (OSError, ValueError) as error:
            raise IntegrityError(
                f"{marker}: this is not a store ({_reason(error)}); name a different one with --store"
            ) from error
        version = layout.get("imageLayoutVersion") if isinstance(layout, dict) else None
        if version != LAYOUT["imageLayoutVersion"]:
            raise IntegrityError(
                f"{path}: this store has layout version {_shown(version)}, and this sdpctl reads 1.0.0; upgrade sdpctl"
            )
        self._index()
        try:
            os.scandir(self._blobs).close()
        except OSError as error:
            raise IntegrityError(
                f"{self._blobs}: this folder of blobs cannot be read ({error.strerror}); {_remedy(error)}"
            ) from error

    @classmethod
    def create(cls, path: Path, *, lock_timeout: float = 60) -> "Store":
        """Open a store for writing; create it if the folder is missing or empty.

        Raises:
            IntegrityError: if the folder holds something other than a store.
            ResourceError: if the folder cannot be written to.
            StoreLockedError: if a different process holds a lock for too long.
            UsageError: if the path contains a ':', which an OCI layout cannot have.
        """
        with writing(path):
            if not path.exists() or {part.name for part in path.iterdir()} <= UNFINISHED:
                if ":" in str(path):
                    raise UsageError(f"{path}: the path of an OCI layout cannot contain ':'; choose a different --store")
                (path / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
                (path / "tmp").mkdir(exist_ok=True)
                with locked(path / "index.lock", timeout=lock_timeout):
                    if not (path / "index.json").exists():
                        index = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": []}
                        index["annotations"] = {STORE_VERSION: "1"}
                        replace_file(path / "index.json", canonical(index), staging=path / "tmp")
                    if not (path / "oci-layout").exists():
                        replace_file(path / "oci-layout", canonical(LAYOUT), staging=path / "tmp")
        store = cls(path, lock_timeout=lock_timeout)
        with store._holding(shared=True), staged(store._staging):
            return store

    @contextmanager
    def _holding(self, *, shared: bool = False) -> Iterator[None]:
        """Hold `gc.lock` for writing, and create `tmp`, which a foreign tool's copy lacks."""
        with writing(self.path), locked(self.path / "gc.lock", shared=shared, timeout=self.lock_timeout):
            self._staging.mkdir(exist_ok=True)
            yield

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Keep blobs from being removed while they are read; this works in a read-only store too."""
        lock = self.path / "gc.lock"
        with ExitStack() as held:
            try:
                held.enter_context(locked(lock, shared=True, read_only=True, timeout=self.lock_timeout))
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EROFS) or os.path.lexists(lock):
                    raise ResourceError(
                        f"{lock}: this lock cannot be held ({error.strerror}); remove it, or fix its permissions"
                    ) from error
                # If no lock file can be created, nothing can be removed either.
            yield

    # Reading

    def _index(self) -> Json:
        path = self.path / "index.json"
        try:
            index = load_json(read_regular(path, limit=DOCUMENT_BYTES))
            if index["schemaVersion"] != 2 or not isinstance(index["manifests"], list):
                raise ValueError("it is not an image index of schema version 2")
            if not isinstance(annotations := index.get("annotations") or {}, dict):
                raise TypeError("its annotations are not an object")
            version = annotations.get(STORE_VERSION, "1")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{path}: this index cannot be read ({_reason(error)}); {_remedy(error)}") from error
        if version != "1":
            raise IntegrityError(f"{path}: this store has version {_shown(version)}, and this sdpctl reads 1; upgrade sdpctl")
        return dict(index)

    def _entries(self) -> list[Descriptor]:
        return [Descriptor.parse(document) for document in self._index()["manifests"]]

    def count(self) -> int:
        """Return the number of artifacts in the index; an artifact with several tags has several entries."""
        return len({entry.digest for entry in self._entries()})

    def _settled(self, read: Callable[[], T]) -> T:
        """Call `read`; if a blob is missing, call it once more while nothing can be removed.

        Raises:
            IntegrityError: if the index leads to a missing blob.
            NotFoundError: if the index no longer leads to the missing blob.
        """
        try:
            return read()
        except _MissingError:
            with self._undisturbed():
                try:
                    return read()
                except _MissingError as missing:
                    if any(descriptor.digest == missing.digest for descriptor in self._walk(self._entries())):
                        raise
                    raise NotFoundError(
                        f"{self.path}: {missing.digest} was removed in the meantime, by `store gc` or by a training that saved "
                        "a newer artifact; run the command again"
                    ) from missing

    def artifacts(self) -> list[Artifact]:
        """Return every artifact of the index, in the order in which they were committed.

        Raises:
            IntegrityError: if a manifest is damaged.
        """
        return self._settled(lambda: [self._artifact(entry) for entry in self._entries()])

    def _artifact(self, entry: Descriptor) -> Artifact:
        if entry.size > MANIFEST_BYTES:
            raise IntegrityError(
                f"{entry.digest}: this manifest has {entry.size:,} bytes, and a manifest has at most {MANIFEST_BYTES:,}; "
                "restore the index from a copy"
            )
        manifest = parse_manifest(self._read(entry), entry.digest)
        return Artifact(entry, manifest, entry.annotations.get(REF_NAME), entry.annotations.get(CREATED, ""))

    def resolve(self, ref: str) -> Artifact:
        """Find an artifact by its tag, its digest, or a unique prefix of its digest.

        Raises:
            NotFoundError: if the reference matches no artifact, or several.
            IntegrityError: if the manifest is damaged.
        """
        return self._settled(lambda: self._resolved(ref))

    def _resolved(self, ref: str) -> Artifact:
        entries = self._entries()
        tags = {entry.annotations[REF_NAME]: entry for entry in entries if REF_NAME in entry.annotations}
        if ref in tags:
            return self._artifact(tags[ref])
        prefix = f"sha256:{ref.removeprefix('sha256:')}"
        found = {e.digest: e for e in entries if len(prefix) >= len("sha256:") + 4 and e.digest.startswith(prefix)}
        if len(found) > 1:
            raise NotFoundError(f"{len(found)} digests begin with {ref!r}: {', '.join(sorted(found))}; give more digits of one")
        if not found:
            hint = did_you_mean(ref, tags)
            raise NotFoundError(f"{self.path}: there is no artifact {ref!r}{hint}; `sdpctl store ls` lists the artifacts")
        return self._artifact(next(iter(found.values())))

    def tagged(self, tag: str) -> Artifact | None:
        """Return the artifact that a tag points at; None if there is no such tag.

        Raises:
            IntegrityError: if the manifest is damaged.
        """

        def read() -> Artifact | None:
            entries = [entry for entry in self._entries() if entry.annotations.get(REF_NAME) == tag]
            return self._artifact(entries[0]) if entries else None

        return self._settled(read)

    def at(self, descriptor: Descriptor) -> Artifact:
        """Return the artifact that a descriptor points at, for example the subject of an artifact."""

        def read() -> Artifact:
            entries = [entry for entry in self._entries() if entry.digest == descriptor.digest]
            return self._artifact(entries[-1] if entries else descriptor)

        return self._settled(read)

    def has(self, descriptor: Descriptor) -> bool:
        """Return whether a blob exists; a copy made by a foreign tool may lack the subject of an artifact."""
        return os.path.lexists(self._path(descriptor.digest))

    def find(self, key: str) -> Artifact | None:
        """Return the newest artifact with a key.

        An entry of the index has the key of its artifact as an annotation. Other tools drop this annotation; in this case the
        manifest is read, once per command.
        """

        def read() -> Artifact | None:
            for entry in reversed(self._entries()):
                noted = entry.annotations.get(KEY) or self._keys.get(entry.digest)
                if noted not in (None, key):
                    continue
                artifact = self._artifact(entry)
                self._keys[entry.digest] = artifact.key or ""
                if artifact.key == key:
                    return artifact
            return None

        return self._settled(read)

    def blob(self, descriptor: Descriptor) -> bytes:
        """Read a blob, and check its size and its hash.

        Raises:
            IntegrityError: if the blob is missing, or does not match its digest.
            NotFoundError: if the blob was removed after its descriptor was read.
        """
        return self._settled(lambda: self._read(descriptor))

    def _read(self, descriptor: Descriptor) -> bytes:
        path = self._path(descriptor.digest)
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                content = file.read(size + 1) if size == descriptor.size else b""
        except FileNotFoundError:
            raise _MissingError(path, descriptor.digest) from None
        except OSError as error:
            raise IntegrityError(f"{path}: this blob cannot be read ({error.strerror}); {_remedy(error)}") from error
        if size != descriptor.size:
            raise IntegrityError(
                f"{path}: the content does not match its digest ({size:,} bytes instead of {descriptor.size:,}); "
                "restore it from a copy"
            )
        if hash_of(content)[0] != descriptor.digest:
            raise IntegrityError(f"{path}: the content does not match its digest; restore it from a copy")
        return content

    def read(self, artifact: Artifact, title: str) -> bytes:
        """Read the layer of an artifact that has this title.

        Raises:
            NotFoundError: if the artifact has no such layer, or was removed after it was looked up.
            IntegrityError: if the layer is damaged.
        """
        layers = artifact.layers
        if title not in layers:
            raise NotFoundError(f"{artifact.digest} has no layer {title!r}; it has {', '.join(layers)}")
        return self.blob(layers[title])

    def _path(self, digest: str) -> Path:
        return self._blobs / digest.removeprefix("sha256:")

    # Writing

    def _put(self, content: bytes | Path, media_type: str, *, mode: int = 0o444) -> Descriptor:
        with staged(self._staging) as (file, name):
            digest, size = hash_of(content, copy_to=file)
            path = self._path(digest)
            if not self._whole(path, digest, size):
                file.flush()
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
                name.replace(path)
                sync_directory(self._blobs)
        return Descriptor(media_type, digest, size)

    def _whole(self, path: Path, digest: str, size: int) -> bool:
        """Return whether a blob exists and is undamaged; otherwise it is written again."""
        try:
            return path.stat().st_size == size and hash_of(path)[0] == digest
        except OSError:
            return False

    def _require(self, artifact: Artifact) -> None:
        """Refuse to point at an artifact that was removed after it was looked up."""
        if not self.has(artifact.descriptor):
            raise NotFoundError(
                f"{self.path}: {artifact.digest} was removed in the meantime, by `store gc` or by a training that saved a "
                "newer artifact; run the command again"
            )

    def commit(
        self,
        kind: str,
        layers: Mapping[str, bytes | Path],
        *,
        subject: Artifact | None = None,
        key: str | None = None,
        tag: str | None = None,
    ) -> Artifact:
        """Store an artifact and move a tag to it.

        Args:
            kind: kind of the artifact; its type is `application/vnd.sdpctl.<kind>.v1+json`.
            layers: content by title; a file is copied.
            subject: the artifact that the new artifact was made from; it is kept as long as the new one.
            key: hash of everything that the content depends on; `find` looks it up.
            tag: tag to move to the new artifact; the artifact that it pointed at stays in the index, untagged.

        Raises:
            NotFoundError: if the subject was removed after it was looked up.
            ResourceError: if the disk is full, or permissions are missing.
            StoreLockedError: if a different process holds a lock for too long.
            UsageError: if the tag is invalid.
        """
        self._check_tag(tag)
        with self._holding(shared=True):
            if subject is not None:
                self._require(subject)
            put = [(title, self._put(content, layer_type(title))) for title, content in layers.items()]
            described = [replace(layer, annotations={TITLE: title}) for title, layer in put]
            self._put(EMPTY, EMPTY_TYPE)
            manifest = make_manifest(kind, described, subject.descriptor if subject else None, key)
            parse_manifest(manifest, sha256(manifest))  # refuse to write a manifest that readers would refuse
            now = datetime.now(UTC).isoformat(timespec="seconds")
            return self._enter(self._put(manifest, MANIFEST_TYPE, mode=0o644), tag, now, key)

    def tag(self, artifact: Artifact, tag: str) -> Artifact:
        """Move a tag to an artifact."""
        self._check_tag(tag)
        with self._holding(shared=True):
            self._require(artifact)
            plain = Descriptor(artifact.descriptor.media_type, artifact.digest, artifact.descriptor.size)
            return self._enter(plain, tag, artifact.created, artifact.key)

    def _check_tag(self, tag: str | None) -> None:
        if tag is not None and (not TAG.fullmatch(tag) or len(tag) > TAG_MAX):
            raise UsageError(
                f"{tag!r} is not a tag: use letters and digits, joined by single '.', '_' or '-', at most {TAG_MAX}"
            )

    def _enter(self, manifest: Descriptor, tag: str | None, created: str, key: str | None) -> Artifact:
        entered = _entry(manifest, tag, created, key)
        with self._changed_index() as entries:
            _add(entries, entered)
        return self._artifact(entered)

    # Artifacts from a different store

    def check_free(self, arrivals: Iterable[Arrival], *, force: bool) -> None:
        """Refuse tags that are invalid, or that point at a different artifact unless `force` is set.

        Raises:
            UsageError: if there is such a tag.
        """
        self._check_free(arrivals, self._entries(), force=force)

    def _check_free(self, arrivals: Iterable[Arrival], entries: Iterable[Descriptor], *, force: bool) -> None:
        taken = {entry.annotations.get(REF_NAME): entry.digest for entry in entries}
        for digest, tag in [(arrival.descriptor.digest, tag) for arrival in arrivals for tag in arrival.tags]:
            self._check_tag(tag)
            if not force and taken.get(tag, digest) != digest:
                raise UsageError(
                    f"{self.path}: the tag {tag!r} points at a different artifact, {taken[tag]}; --force moves it, or choose a "
                    "different tag"
                )

    def lacks(self, descriptor: Descriptor) -> bool:
        """Return whether a blob is missing or damaged."""
        return not self._whole(self._path(descriptor.digest), descriptor.digest, descriptor.size)

    def file_of(self, descriptor: Descriptor) -> Path:
        """Return the path of a blob after checking its size and its hash.

        Raises:
            IntegrityError: if the blob is missing or damaged.
        """
        path = self._path(descriptor.digest)
        if self.lacks(descriptor):
            raise IntegrityError(f"{path}: this blob is missing or does not match its digest; restore it from a copy")
        return path

    def receive(self, descriptor: Descriptor, pieces: Iterable[bytes], source: str) -> None:
        """Put a blob that comes from elsewhere; nothing is kept unless its size and its hash are right.

        Args:
            descriptor: descriptor of the blob.
            pieces: the content.
            source: where the content comes from, for messages.

        Raises:
            IntegrityError: if the content does not match the digest.
            ResourceError: if the disk is full, or permissions are missing.
        """
        with writing(self.path), staged(self._staging) as (file, name):
            digest, size = hashlib.sha256(), 0
            for piece in pieces:
                size += len(piece)
                if size > descriptor.size:
                    break
                digest.update(piece)
                file.write(piece)
            if size != descriptor.size or f"sha256:{digest.hexdigest()}" != descriptor.digest:
                raise IntegrityError(f"{source}: the blob {descriptor.digest} does not match its digest; nothing of it is kept")
            file.flush()
            os.fchmod(file.fileno(), 0o444)
            os.fsync(file.fileno())
            with self._holding(shared=True):
                name.replace(self._path(descriptor.digest))
                sync_directory(self._blobs)

    def adopt(self, arrivals: Iterable[Arrival], *, force: bool = False) -> list[Artifact]:
        """Enter artifacts whose blobs were received into the index, all in one step.

        Args:
            arrivals: the manifests; a subject stands before what was made from it.
            force: move a tag that points at a different artifact.

        Raises:
            NotFoundError: if a blob was removed after it was received.
            UsageError: if a tag is invalid, or points at a different artifact and `force` is not set.
        """
        arrivals = list(arrivals)
        with self._holding(shared=True):
            now = datetime.now(UTC).isoformat(timespec="seconds")
            adopted = [arrival.artifact for arrival in arrivals]
            for arrival, artifact in zip(arrivals, adopted, strict=True):
                self._put(arrival.content, arrival.descriptor.media_type, mode=0o644)
                for blob in artifact.blobs():
                    if self._problem(blob) is not None:
                        raise NotFoundError(f"{self.path}: {blob.digest} was removed in the meantime; run the command again")
            with self._changed_index() as entries:
                self._check_free(arrivals, entries, force=force)
                known = {entry.digest: entry.annotations.get(CREATED, now) for entry in entries}
                for arrival, artifact in zip(arrivals, adopted, strict=True):
                    created = known.get(artifact.digest, now)
                    for tag in arrival.tags or (None,):
                        _add(entries, _entry(arrival.descriptor, tag, created, artifact.key))
        return adopted

    @contextmanager
    def _changed_index(self) -> Iterator[list[Descriptor]]:
        """Yield the entries of the index; write them back if the caller changed them and nothing failed."""
        with locked(self.path / "index.lock", timeout=self.lock_timeout):
            index = self._index()
            entries = [Descriptor.parse(document) for document in index["manifests"]]
            before = list(entries)
            yield entries
            if entries != before:
                content = canonical(index | {"manifests": [entry.document() for entry in entries]})
                replace_file(self.path / "index.json", content, staging=self._staging)

    def discard(self, artifact: Artifact) -> None:
        """Remove an artifact that was superseded, with its tag and the blobs that no other artifact needs."""
        with self._holding():
            self._discard(artifact)

    def _discard(self, artifact: Artifact) -> None:
        with self._changed_index() as entries:
            entries[:] = _without(entries, artifact)
        for descriptor in self._freed(artifact, self._entries()):
            self._path(descriptor.digest).unlink(missing_ok=True)

    def _freed(self, artifact: Artifact, entries: Iterable[Descriptor]) -> list[Descriptor]:
        """Return the manifest and the blobs of an artifact that no entry leads to."""
        live = {descriptor.digest for descriptor in self._walk(entries)}
        return [blob for blob in (artifact.descriptor, *artifact.blobs()) if blob.digest not in live]

    def remove(self, tag: str, *, dry_run: bool = False) -> Removal:
        """Remove a tag, and its artifact if it has no other tag and nothing was made from it.

        Args:
            tag: the tag.
            dry_run: say what would be removed, and remove nothing.

        Raises:
            IntegrityError: if a manifest is damaged, so that it is unknown which blobs it needs; nothing is removed.
            NotFoundError: if there is no such tag.
        """
        with self._undisturbed() if dry_run else self._holding():
            entries = self._entries()
            tags = {entry.annotations[REF_NAME]: entry for entry in entries if REF_NAME in entry.annotations}
            if tag not in tags:
                hint = did_you_mean(tag, tags)
                raise NotFoundError(f"{self.path}: there is no tag {tag!r}{hint}; `sdpctl store ls` lists the tags")
            artifact = self._artifact(tags[tag])
            others = tuple(other for other, entry in tags.items() if entry.digest == artifact.digest and other != tag)
            digests = {entry.digest: entry for entry in entries}.values()
            made = sum(artifact.digest in {each.digest for each in self._artifact(entry).manifests()} for entry in digests)
            if others or made:
                if not dry_run:
                    with self._changed_index() as current:
                        current[:] = _without(current, artifact)
                        if not others:
                            current.append(_entry(artifact.descriptor, None, artifact.created, artifact.key))
                return Removal(artifact, others, made)
            freed = {blob.digest: blob.size for blob in self._freed(artifact, _without(entries, artifact)) if self.has(blob)}
            if not dry_run:
                self._discard(artifact)
            return Removal(artifact, others, made, tuple(freed), sum(freed.values()))

    # Maintenance

    def _walk(self, entries: Iterable[Descriptor]) -> Iterator[Descriptor]:
        """Yield every descriptor that entries lead to; each manifest once, before it is read."""
        seen: set[str] = set()
        waiting = list(entries)
        entered = {entry.digest for entry in self._entries()}
        while waiting:
            descriptor = waiting.pop()
            if descriptor.digest in seen:
                continue
            seen.add(descriptor.digest)
            yield descriptor
            if descriptor.digest not in entered and not self.has(descriptor):
                continue  # a foreign tool copied an artifact without its subject
            artifact = self._artifact(descriptor)
            yield from artifact.content()
            waiting.extend(artifact.manifests())

    def reachable(self) -> set[str]:
        """Return the digests of everything that the index leads to: artifacts, what they were made from, and their blobs.

        Raises:
            IntegrityError: if a manifest is damaged.
        """
        return self._settled(lambda: {descriptor.digest for descriptor in self._walk(self._entries())})

    def gc(self, *, dry_run: bool = False, untagged: bool = False, grace: float = GRACE_SECONDS) -> GcReport:
        """Remove blobs that nothing points at, and the temporary files of writers that crashed.

        Args:
            dry_run: report what would be removed, and remove nothing; this works in a read-only store too.
            untagged: remove artifacts without a tag too, unless a different artifact was made from them.
            grace: seconds; younger blobs and files are kept.

        Raises:
            IntegrityError: if a manifest is damaged, so that it is unknown which blobs it needs; nothing is removed.
        """
        with self._undisturbed() if dry_run else self._holding():
            before = time.time() - grace
            blobs = _older(self._blobs, before)  # before the index is read: blobs that are committed later are not listed
            files = _older(self._staging, before)
            entries = self._entries()
            kept = [entry for entry in entries if not untagged or REF_NAME in entry.annotations]
            live = {descriptor.digest for descriptor in self._walk(kept)}
            leaving = dict.fromkeys(entry.digest for entry in entries if entry.digest not in live)
            blobs = {path: size for path, size in blobs.items() if f"sha256:{path.name}" not in live}
            if not dry_run:
                with self._changed_index() as current:
                    current[:] = [entry for entry in current if entry.digest not in leaving]
                for path in (*blobs, *files):
                    path.unlink(missing_ok=True)
            names = tuple(f"sha256:{path.name}" for path in blobs)
            size = sum(blobs.values()) + sum(files.values())
            return GcReport(tuple(leaving), names, tuple(path.name for path in files), size)

    def verify(self) -> Iterator[str]:
        """Check every manifest and every blob; yield a line for each problem."""
        problems, sizes, missing = self._problems()
        if missing:
            with self._undisturbed():
                problems, sizes, _ = self._problems()
        yield from problems
        for name in sorted(entry.name for entry in os.scandir(self._blobs)):
            path = self._blobs / name
            digest = f"sha256:{name}"
            if not DIGEST.fullmatch(digest):
                yield f"{path}: this file does not belong in a store; remove it"
                continue
            try:
                if digest in sizes and path.stat().st_size not in sizes[digest]:
                    continue  # reported above; the blob may be too large to read
                if hash_of(path)[0] != digest:
                    yield f"{path}: the content does not match its digest"
            except FileNotFoundError:
                continue  # reported above, unless it was removed in the meantime
            except OSError as error:
                yield f"{path}: this blob cannot be read ({error.strerror})"
        for path in sorted(self._blobs.parent.iterdir()):
            if path != self._blobs:
                yield f"{path}: this file does not belong in a store; remove it"

    def _problems(self) -> tuple[list[str], dict[str, set[int]], bool]:
        """Return the problems of everything that the index leads to, all sizes by digest, and whether a blob is missing.

        A missing blob may have been removed after the index was read.
        """
        path = self.path / "index.json"
        problems: list[str] = []
        missing = False
        names: dict[tuple[str, int], str] = {}
        waiting: list[Descriptor] = []
        tags: set[str] = set()
        for document in self._index()["manifests"]:
            try:
                entry = Descriptor.parse(document)
            except IntegrityError as error:
                problems.append(f"{path}: {error}")
                continue
            tag = entry.annotations.get(REF_NAME)
            if tag is not None and tag in tags:
                problems.append(f"{path}: two entries have the tag {tag!r}")
            tags |= set() if tag is None else {tag}
            names.setdefault((entry.digest, entry.size), printable(tag or entry.digest))
            waiting.append(entry)
        waiting.reverse()
        checked: set[tuple[str, int]] = set()
        sizes: dict[str, set[int]] = {}
        while waiting:
            descriptor = waiting.pop()
            sizes.setdefault(descriptor.digest, set()).add(descriptor.size)
            identity = (descriptor.digest, descriptor.size)
            if identity in checked:
                continue
            checked.add(identity)
            called = names[identity]
            try:
                artifact = self._artifact(descriptor)
            except IntegrityError as error:
                problems.append(f"{called}: {error}")
                missing |= isinstance(error, _MissingError)
                continue
            for blob in artifact.content():
                sizes.setdefault(blob.digest, set()).add(blob.size)
                problem = self._problem(blob)
                problems += [f"{called}: its blob {blob.digest} {problem}"] if problem else []
                missing |= problem == "is missing"
            for manifest in artifact.manifests():
                names.setdefault((manifest.digest, manifest.size), f"{called.removesuffix(_LINEAGE)}{_LINEAGE}")
                waiting.append(manifest)
        return problems, sizes, missing

    def _problem(self, blob: Descriptor) -> str | None:
        """Return what is wrong with a blob, apart from its content; None if nothing is."""
        try:
            status = self._path(blob.digest).stat()
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        if not stat.S_ISREG(status.st_mode):
            return "is not a regular file"
        return None if status.st_size == blob.size else f"has {status.st_size} bytes instead of {blob.size}"


_LINEAGE = "'s lineage"


def _entry(manifest: Descriptor, tag: str | None, created: str, key: str | None) -> Descriptor:
    """Return the entry of the index for a manifest."""
    said = {CREATED: created, REF_NAME: tag, KEY: key}
    return replace(manifest, annotations={name: value for name, value in said.items() if value})


def _add(entries: list[Descriptor], entered: Descriptor) -> None:
    """Add an entry to those of the index; its tag, if it has one, moves to it."""
    tag, kept = entered.annotations.get(REF_NAME), []
    for entry in entries:
        same, its_tag = entry.digest == entered.digest, entry.annotations.get(REF_NAME)
        if same and (its_tag is None or its_tag == tag):
            continue  # the new entry replaces this one
        if its_tag == tag and tag is not None:
            entry = replace(entry, annotations={k: v for k, v in entry.annotations.items() if k != REF_NAME})
        kept.append(entry)
    if tag is not None or all(entry.digest != entered.digest for entry in kept):
        kept.append(entered)
    tagged = {entry.digest for entry in kept if REF_NAME in entry.annotations}
    entries[:] = [entry for entry in kept if REF_NAME in entry.annotations or entry.digest not in tagged]


def _without(entries: Iterable[Descriptor], artifact: Artifact) -> list[Descriptor]:
    """Return the entries of the index without an artifact's tag, and without the artifact if it has no other tag."""
    tags = (None, artifact.tag)
    return [entry for entry in entries if entry.digest != artifact.digest or entry.annotations.get(REF_NAME) not in tags]


def _older(folder: Path, before: float) -> dict[Path, int]:
    """Return the size of each file of a folder that was last changed before a time."""
    found: dict[Path, int] = {}
    try:
        for entry in os.scandir(folder):
            with suppress(FileNotFoundError):  # a writer has just renamed it
                status = entry.stat(follow_symlinks=False)
                if status.st_mtime < before and not stat.S_ISDIR(status.st_mode):
                    found[Path(entry.path)] = status.st_size
    except FileNotFoundError:
        return {}  # a copy made by a foreign tool has no folder for temporary files
    except OSError as error:
        raise IntegrityError(f"{folder}: this folder cannot be read ({error.strerror}); {_remedy(error)}") from error
    return found


def _reason(error: Exception) -> str:
    return str(error.strerror) if isinstance(error, OSError) else str(error)


def _remedy(error: Exception) -> str:
    unreadable = isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM)
    return "fix its permissions" if unreadable else "restore it from a copy"


def _shown(value: object) -> str:
    """Return an untrusted value as short, printable text."""
    return printable(str(value))[:40]
