"""The store: put, commit, resolve, read, verify, collect.

Order of writing is blobs, manifest, index; of deleting, the reverse. A crash leaves blobs nobody points at and temporary
files, which `gc` takes. A commit holds `gc.lock` shared, `gc` holds it alone; `index.lock` is held while the index changes.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from sdpctl.errors import IntegrityError, NotFoundError, UsageError, did_you_mean
from sdpctl.store.files import hash_of, locked, replace_file, staged, sync_directory, writing
from sdpctl.store.layout import (
    CREATED,
    DIGEST,
    EMPTY,
    EMPTY_TYPE,
    INDEX_TYPE,
    LAYOUT,
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
)

GRACE_SECONDS = 3600.0
"""Blobs younger than this stay: another tool may have placed them and not yet its index entry."""

STORE_VERSION = "dev.sdpctl.store-version"
UNFINISHED = {"blobs", "tmp", "index.lock", "index.json"}
"""What there is of a store before `oci-layout`, which comes last."""


@dataclass(frozen=True)
class GcReport:
    """What a collection removed, or would.

    Args:
        entries: digests of manifests that left the index.
        blobs: digests of blobs that went.
        files: names of temporary files that went.
        bytes: how much room that makes.
    """

    entries: tuple[str, ...]
    blobs: tuple[str, ...]
    files: tuple[str, ...]
    bytes: int


class Store:
    """An OCI image layout.

    Args:
        path: of an existing store; `Store.create` makes one.
        lock_timeout: seconds to wait for another process.

    Raises:
        IntegrityError: where there is no store, or a newer sdpctl wrote it.
    """

    def __init__(self, path: Path, *, lock_timeout: float = 60) -> None:
        self.path = path
        self.lock_timeout = lock_timeout
        self._blobs = path / "blobs" / "sha256"
        self._staging = path / "tmp"
        marker = path / "oci-layout"
        try:
            layout = json.loads(marker.read_bytes())
        except FileNotFoundError:
            if not path.exists():
                raise IntegrityError(f"{path}: there is no store; `sdpctl train` makes one, --store names another") from None
            raise IntegrityError(f"{path}: this is no store (it has no oci-layout file); name another with --store") from None
        except (OSError, ValueError) as error:
            raise IntegrityError(f"{marker}: this is no store ({error}); name another with --store") from error
        version = layout.get("imageLayoutVersion") if isinstance(layout, dict) else None
        if version != LAYOUT["imageLayoutVersion"]:
            raise IntegrityError(f"{path}: a store of layout version {version}, this sdpctl reads 1.0.0; upgrade sdpctl")
        self._index()

    @classmethod
    def create(cls, path: Path, *, lock_timeout: float = 60) -> "Store":
        """Open the store of that path for writing, making it where there is nothing yet.

        Raises:
            IntegrityError: where something else is there.
            ResourceError: where it cannot be written to.
            StoreLockedError: where another process is in the way.
            UsageError: for a path with a ':', which an OCI layout cannot have.
        """
        with writing(path):
            if not path.exists() or {part.name for part in path.iterdir()} <= UNFINISHED:
                if ":" in str(path):
                    raise UsageError(f"{path}: an OCI layout's path has no ':'; choose another --store")
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
        """Hold `gc.lock` for writing; another tool's copy has no `tmp` yet."""
        with writing(self.path), locked(self.path / "gc.lock", shared=shared, timeout=self.lock_timeout):
            self._staging.mkdir(exist_ok=True)
            yield

    # Reading

    def _index(self) -> Json:
        path = self.path / "index.json"
        try:
            index = json.loads(path.read_bytes())
            if index["schemaVersion"] != 2 or not isinstance(index["manifests"], list):
                raise ValueError("it is no image index of schema version 2")
            version = dict(index.get("annotations") or {}).get(STORE_VERSION, "1")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{path}: this index cannot be read ({error}); restore it from a copy") from error
        if version != "1":
            raise IntegrityError(f"{path}: a store of version {version}, this sdpctl reads 1; upgrade sdpctl")
        return dict(index)

    def _entries(self) -> list[Descriptor]:
        return [Descriptor.parse(document) for document in self._index()["manifests"]]

    def artifacts(self) -> list[Artifact]:
        """Return every artifact of the index, in the order they were committed.

        Raises:
            IntegrityError: where a manifest is damaged.
        """
        return [self._artifact(entry) for entry in self._entries()]

    def _artifact(self, entry: Descriptor) -> Artifact:
        content = self.blob(entry)
        try:
            manifest = json.loads(content)
            if not isinstance(manifest, dict) or not isinstance(manifest.get("layers", []), list):
                raise ValueError("no object with a list of layers")
        except ValueError as error:
            raise IntegrityError(f"{entry.digest}: this is no manifest ({error}); run `sdpctl store verify`") from error
        return Artifact(entry, manifest, entry.annotations.get(REF_NAME), entry.annotations.get(CREATED, ""))

    def resolve(self, ref: str) -> Artifact:
        """Find an artifact by tag, digest, or a prefix of a digest that only one has.

        Raises:
            NotFoundError: where none is, or several are, meant.
            IntegrityError: where its manifest is damaged.
        """
        entries = self._entries()
        tags = {entry.annotations[REF_NAME]: entry for entry in entries if REF_NAME in entry.annotations}
        if ref in tags:
            return self._artifact(tags[ref])
        prefix = f"sha256:{ref.removeprefix('sha256:')}"
        found = {e.digest: e for e in entries if len(prefix) >= len("sha256:") + 4 and e.digest.startswith(prefix)}
        if len(found) > 1:
            raise NotFoundError(f"{ref!r} begins {len(found)} digests: {', '.join(sorted(found))}; give more of one")
        if not found:
            hint = did_you_mean(ref, tags)
            raise NotFoundError(f"{self.path}: no artifact {ref!r}{hint}; `sdpctl store ls` lists what there is")
        return self._artifact(next(iter(found.values())))

    def at(self, descriptor: Descriptor) -> Artifact:
        """Return the artifact a descriptor points at: an artifact's subject, say."""
        entries = [entry for entry in self._entries() if entry.digest == descriptor.digest]
        return self._artifact(entries[-1] if entries else descriptor)

    def has(self, descriptor: Descriptor) -> bool:
        """Say whether a blob is there: a copy that another tool made may lack an artifact's subject."""
        return self._path(descriptor.digest).is_file()

    def find(self, key: str) -> Artifact | None:
        """Return the newest artifact that a key led to."""
        return next((artifact for artifact in reversed(self.artifacts()) if artifact.key == key), None)

    def blob(self, descriptor: Descriptor) -> bytes:
        """Read a blob and check it, size before hash.

        Raises:
            IntegrityError: where it is missing or is not what its digest says.
        """
        path = self._path(descriptor.digest)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise IntegrityError(f"{path}: this blob cannot be read ({error.strerror}); restore it from a copy") from error
        if len(content) != descriptor.size or hash_of(content)[0] != descriptor.digest:
            raise IntegrityError(f"{path}: the content is not what its digest says; restore it from a copy")
        return content

    def read(self, artifact: Artifact, title: str) -> bytes:
        """Read a layer by title.

        Raises:
            NotFoundError: where the artifact has no such layer.
            IntegrityError: where the layer is damaged.
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
            if not path.is_file() or path.stat().st_size != size:
                file.flush()
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
                name.replace(path)
                sync_directory(self._blobs)
        return Descriptor(media_type, digest, size)

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
            kind: becomes the artifact type, `application/vnd.sdpctl.<kind>.v1+json`.
            layers: content by title; a path is copied.
            subject: what it was made from; it lives as long as this does.
            key: what led to it, for `find`.
            tag: moved to it; the artifact it pointed at stays in the index, untagged.

        Raises:
            ResourceError: where the disk or its rights do not allow it.
            StoreLockedError: where another process is in the way.
            UsageError: where the tag is none.
        """
        self._check_tag(tag)
        with self._holding(shared=True):
            put = [(title, self._put(content, layer_type(title))) for title, content in layers.items()]
            described = [replace(layer, annotations={TITLE: title}) for title, layer in put]
            self._put(EMPTY, EMPTY_TYPE)
            manifest = make_manifest(kind, described, subject.descriptor if subject else None, key)
            now = datetime.now(UTC).isoformat(timespec="seconds")
            return self._enter(self._put(manifest, MANIFEST_TYPE, mode=0o644), tag, now)

    def tag(self, artifact: Artifact, tag: str) -> Artifact:
        """Move a tag to an artifact."""
        self._check_tag(tag)
        with self._holding(shared=True):
            plain = Descriptor(artifact.descriptor.media_type, artifact.digest, artifact.descriptor.size)
            return self._enter(plain, tag, artifact.created)

    def _check_tag(self, tag: str | None) -> None:
        if tag is not None and (not TAG.fullmatch(tag) or len(tag) > TAG_MAX):
            raise UsageError(f"{tag!r} is no tag: letters and digits, joined by single '.', '_' or '-', at most {TAG_MAX}")

    def _enter(self, manifest: Descriptor, tag: str | None, created: str) -> Artifact:
        annotations = ({CREATED: created} if created else {}) | ({REF_NAME: tag} if tag else {})
        entered = replace(manifest, annotations=annotations)
        with self._changed_index() as entries:
            kept = []
            for entry in entries:
                same, its_tag = entry.digest == manifest.digest, entry.annotations.get(REF_NAME)
                if same and (its_tag is None or its_tag == tag):
                    continue  # the new entry says the same
                if its_tag == tag and tag is not None:
                    entry = replace(entry, annotations={k: v for k, v in entry.annotations.items() if k != REF_NAME})
                kept.append(entry)
            if tag is not None or all(entry.digest != manifest.digest for entry in kept):
                kept.append(entered)
            tagged = {entry.digest for entry in kept if REF_NAME in entry.annotations}
            entries[:] = [entry for entry in kept if REF_NAME in entry.annotations or entry.digest not in tagged]
        return self._artifact(entered)

    @contextmanager
    def _changed_index(self) -> Iterator[list[Descriptor]]:
        """Give the entries, to be changed in place; they are written at the end, unless something failed."""
        with locked(self.path / "index.lock", timeout=self.lock_timeout):
            index = self._index()
            entries = [Descriptor.parse(document) for document in index["manifests"]]
            before = list(entries)
            yield entries
            if entries != before:
                content = canonical(index | {"manifests": [entry.document() for entry in entries]})
                replace_file(self.path / "index.json", content, staging=self._staging)

    def discard(self, artifact: Artifact) -> None:
        """Take an artifact out, by the tag it was found by, with the blobs nothing else needs: work that was overtaken."""
        with self._holding():
            with self._changed_index() as entries:
                tags = (None, artifact.tag)
                entries[:] = [e for e in entries if e.digest != artifact.digest or e.annotations.get(REF_NAME) not in tags]
            live = self._marked(self._entries())
            for descriptor in (artifact.descriptor, *artifact.blobs()):
                if descriptor.digest not in live:
                    self._path(descriptor.digest).unlink(missing_ok=True)

    # Keeping house

    def _marked(self, entries: Iterable[Descriptor]) -> set[str]:
        live: set[str] = set()
        waiting = list(entries)
        entered = {entry.digest for entry in self._entries()}
        while waiting:
            descriptor = waiting.pop()
            if descriptor.digest in live:
                continue
            live.add(descriptor.digest)
            if descriptor.digest not in entered and not self._path(descriptor.digest).exists():
                continue  # another tool copied a child without its subject
            if descriptor.media_type == MANIFEST_TYPE:
                waiting.extend(self._artifact(descriptor).blobs())
            elif descriptor.media_type == INDEX_TYPE:
                waiting.extend(map(Descriptor.parse, json.loads(self.blob(descriptor))["manifests"]))
        return live

    def gc(self, *, dry_run: bool = False, untagged: bool = False, grace: float = GRACE_SECONDS) -> GcReport:
        """Remove blobs that nothing points at, and what crashed writers left.

        Args:
            dry_run: only say what would go.
            untagged: let artifacts without a tag go too, unless another is made from them.
            grace: seconds; younger blobs and files stay.

        Raises:
            IntegrityError: where a manifest is damaged, since what it needs is not known; nothing is removed.
        """
        with self._holding():
            entries = self._entries()
            kept = [entry for entry in entries if not untagged or REF_NAME in entry.annotations]
            live = self._marked(kept)
            leaving = [entry.digest for entry in entries if entry not in kept and entry.digest not in live]
            before = time.time() - grace
            blobs = [p for p in self._blobs.iterdir() if f"sha256:{p.name}" not in live and p.stat().st_mtime < before]
            files = [p for p in self._staging.iterdir() if p.stat().st_mtime < before]
            size = sum(path.stat().st_size for path in (*blobs, *files))
            if not dry_run:
                with self._changed_index() as current:
                    current[:] = [entry for entry in current if entry.digest not in leaving]
                for path in (*blobs, *files):
                    path.unlink()
            names = tuple(f"sha256:{path.name}" for path in blobs)
            return GcReport(tuple(leaving), names, tuple(path.name for path in files), size)

    def verify(self) -> Iterator[str]:
        """Check everything; yield a line for each problem."""
        for path in sorted(self._blobs.iterdir()):
            if not DIGEST.fullmatch(f"sha256:{path.name}"):
                yield f"{path}: nothing of that name belongs here"
            elif not path.is_file():
                yield f"{path}: this is no file"
            elif hash_of(path)[0] != f"sha256:{path.name}":
                yield f"{path}: the content is not what its digest says"
        for path in sorted(self._blobs.parent.iterdir()):
            if path != self._blobs:
                yield f"{path}: nothing of that name belongs here"
        tags: set[str] = set()
        for entry in self._entries():
            tag = entry.annotations.get(REF_NAME)
            if tag in tags:
                yield f"{self.path / 'index.json'}: the tag {tag!r} is there twice"
            tags |= {tag} if tag else set()
            yield from self._check(entry, tag or entry.digest)

    def _check(self, entry: Descriptor, called: str) -> Iterator[str]:
        try:
            artifact = self._artifact(entry)
            for descriptor in artifact.blobs():
                path = self._path(descriptor.digest)
                if descriptor == artifact.subject:
                    continue  # checked below, with what it points at
                if not path.is_file():
                    yield f"{called}: its blob {descriptor.digest} is missing"
                elif path.stat().st_size != descriptor.size:
                    yield f"{called}: its blob {descriptor.digest} has {path.stat().st_size} bytes, not {descriptor.size}"
            if artifact.subject is not None:
                yield from self._check(artifact.subject, f"{called}'s subject")
        except IntegrityError as error:
            yield f"{called}: {error}"
