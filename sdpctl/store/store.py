"""The store: put, commit, resolve, read, verify, collect.

Order of writing is blobs, manifest, index; of deleting, the reverse. A crash leaves blobs nobody points at and temporary
files, which `gc` takes. A commit holds `gc.lock` shared, `gc` holds it alone; `index.lock` is held while the index changes.
Readers hold no lock, unless a blob is missing: then they read once more, from the index on, with `gc.lock` shared, so that
what `gc` or a training removed meanwhile is not taken for damage.
"""

import errno
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
"""Blobs younger than this stay: another tool may have placed them and not yet its index entry."""

STORE_VERSION = "dev.sdpctl.store-version"
UNFINISHED = {"blobs", "tmp", "index.lock", "index.json"}
"""What there is of a store before `oci-layout`, which comes last."""


class _MissingError(IntegrityError):
    """A blob that is not there: damage, unless it was removed since the index was read."""

    def __init__(self, path: Path, digest: str) -> None:
        super().__init__(f"{path}: this blob is missing; restore it from a copy")
        self.digest = digest


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
            layout = load_json(read_regular(marker, limit=MANIFEST_BYTES))
        except FileNotFoundError:
            if not path.exists():
                raise IntegrityError(f"{path}: there is no store; `sdpctl train` makes one, --store names another") from None
            raise IntegrityError(f"{path}: this is no store (it has no oci-layout file); name another with --store") from None
        except (OSError, ValueError) as error:
            raise IntegrityError(f"{marker}: this is no store ({_reason(error)}); name another with --store") from error
        version = layout.get("imageLayoutVersion") if isinstance(layout, dict) else None
        if version != LAYOUT["imageLayoutVersion"]:
            raise IntegrityError(
                f"{path}: a store of layout version {_shown(version)}, this sdpctl reads 1.0.0; upgrade sdpctl"
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

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Hold off whatever removes blobs, while something is read; this works in a store that one may only read."""
        lock = self.path / "gc.lock"
        with ExitStack() as held:
            try:
                held.enter_context(locked(lock, shared=True, read_only=True, timeout=self.lock_timeout))
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EROFS) or os.path.lexists(lock):
                    raise ResourceError(
                        f"{lock}: this lock cannot be held ({error.strerror}); remove it, or fix its permissions"
                    ) from error
                # Where no lock file can be made, nothing can be removed either.
            yield

    # Reading

    def _index(self) -> Json:
        path = self.path / "index.json"
        try:
            index = load_json(read_regular(path, limit=DOCUMENT_BYTES))
            if index["schemaVersion"] != 2 or not isinstance(index["manifests"], list):
                raise ValueError("it is no image index of schema version 2")
            if not isinstance(annotations := index.get("annotations") or {}, dict):
                raise TypeError("its annotations are not an object")
            version = annotations.get(STORE_VERSION, "1")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{path}: this index cannot be read ({_reason(error)}); {_remedy(error)}") from error
        if version != "1":
            raise IntegrityError(f"{path}: a store of version {_shown(version)}, this sdpctl reads 1; upgrade sdpctl")
        return dict(index)

    def _entries(self) -> list[Descriptor]:
        return [Descriptor.parse(document) for document in self._index()["manifests"]]

    def count(self) -> int:
        """Return the number of entries of the index."""
        return len(self._index()["manifests"])

    def _settled(self, read: Callable[[], T]) -> T:
        """Read something; where a blob is missing, read once more while nothing can be removed.

        Raises:
            IntegrityError: where the index leads to a blob that is not there.
            NotFoundError: where what was read is in the index no more.
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
                        f"{self.path}: {missing.digest} was removed meanwhile, by `store gc` or by a training that saved "
                        "a newer one; run the command again"
                    ) from missing

    def artifacts(self) -> list[Artifact]:
        """Return every artifact of the index, in the order they were committed.

        Raises:
            IntegrityError: where a manifest is damaged.
        """
        return self._settled(lambda: [self._artifact(entry) for entry in self._entries()])

    def _artifact(self, entry: Descriptor) -> Artifact:
        if entry.size > MANIFEST_BYTES:
            raise IntegrityError(
                f"{entry.digest}: {entry.size:,} bytes, more than the {MANIFEST_BYTES:,} that a manifest may have; "
                "restore the index from a copy"
            )
        manifest = parse_manifest(self._read(entry), entry.digest)
        return Artifact(entry, manifest, entry.annotations.get(REF_NAME), entry.annotations.get(CREATED, ""))

    def resolve(self, ref: str) -> Artifact:
        """Find an artifact by tag, digest, or a prefix of a digest that only one has.

        Raises:
            NotFoundError: where none is, or several are, meant.
            IntegrityError: where its manifest is damaged.
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
            raise NotFoundError(f"{ref!r} begins {len(found)} digests: {', '.join(sorted(found))}; give more of one")
        if not found:
            hint = did_you_mean(ref, tags)
            raise NotFoundError(f"{self.path}: no artifact {ref!r}{hint}; `sdpctl store ls` lists what there is")
        return self._artifact(next(iter(found.values())))

    def tagged(self, tag: str) -> Artifact | None:
        """Return what a tag points at, if anything.

        Raises:
            IntegrityError: where its manifest is damaged.
        """

        def read() -> Artifact | None:
            entries = [entry for entry in self._entries() if entry.annotations.get(REF_NAME) == tag]
            return self._artifact(entries[0]) if entries else None

        return self._settled(read)

    def at(self, descriptor: Descriptor) -> Artifact:
        """Return the artifact a descriptor points at: an artifact's subject, say."""

        def read() -> Artifact:
            entries = [entry for entry in self._entries() if entry.digest == descriptor.digest]
            return self._artifact(entries[-1] if entries else descriptor)

        return self._settled(read)

    def has(self, descriptor: Descriptor) -> bool:
        """Say whether a blob is there: a copy that another tool made may lack an artifact's subject."""
        return os.path.lexists(self._path(descriptor.digest))

    def find(self, key: str) -> Artifact | None:
        """Return the newest artifact that a key led to."""

        def read() -> Artifact | None:
            newest_first = map(self._artifact, reversed(self._entries()))
            return next((artifact for artifact in newest_first if artifact.key == key), None)

        return self._settled(read)

    def blob(self, descriptor: Descriptor) -> bytes:
        """Read a blob and check it, size before hash.

        Raises:
            IntegrityError: where it is missing or is not what its digest says.
            NotFoundError: where it was removed since its descriptor was read.
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
                f"{path}: the content is not what its digest says ({size:,} bytes, not {descriptor.size:,}); "
                "restore it from a copy"
            )
        if hash_of(content)[0] != descriptor.digest:
            raise IntegrityError(f"{path}: the content is not what its digest says; restore it from a copy")
        return content

    def read(self, artifact: Artifact, title: str) -> bytes:
        """Read a layer by title.

        Raises:
            NotFoundError: where the artifact has no such layer, or was removed since it was looked up.
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
            if not self._whole(path, digest, size):
                file.flush()
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
                name.replace(path)
                sync_directory(self._blobs)
        return Descriptor(media_type, digest, size)

    def _whole(self, path: Path, digest: str, size: int) -> bool:
        """Say whether a blob is there and undamaged; one that is not is written anew."""
        try:
            return path.stat().st_size == size and hash_of(path)[0] == digest
        except OSError:
            return False

    def _require(self, artifact: Artifact) -> None:
        """Refuse to point at an artifact that was removed since it was looked up."""
        if not self.has(artifact.descriptor):
            raise NotFoundError(
                f"{self.path}: {artifact.digest} was removed meanwhile, by `store gc` or by a training that saved a newer one"
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
            kind: becomes the artifact type, `application/vnd.sdpctl.<kind>.v1+json`.
            layers: content by title; a path is copied.
            subject: what it was made from; it lives as long as this does.
            key: what led to it, for `find`.
            tag: moved to it; the artifact it pointed at stays in the index, untagged.

        Raises:
            NotFoundError: where the subject was removed since it was looked up.
            ResourceError: where the disk or its rights do not allow it.
            StoreLockedError: where another process is in the way.
            UsageError: where the tag is none.
        """
        self._check_tag(tag)
        with self._holding(shared=True):
            if subject is not None:
                self._require(subject)
            put = [(title, self._put(content, layer_type(title))) for title, content in layers.items()]
            described = [replace(layer, annotations={TITLE: title}) for title, layer in put]
            self._put(EMPTY, EMPTY_TYPE)
            manifest = make_manifest(kind, described, subject.descriptor if subject else None, key)
            parse_manifest(manifest, sha256(manifest))  # nothing is written that would not be read
            now = datetime.now(UTC).isoformat(timespec="seconds")
            return self._enter(self._put(manifest, MANIFEST_TYPE, mode=0o644), tag, now)

    def tag(self, artifact: Artifact, tag: str) -> Artifact:
        """Move a tag to an artifact."""
        self._check_tag(tag)
        with self._holding(shared=True):
            self._require(artifact)
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
            live = {descriptor.digest for descriptor in self._walk(self._entries())}
            for descriptor in (artifact.descriptor, *artifact.blobs()):
                if descriptor.digest not in live:
                    self._path(descriptor.digest).unlink(missing_ok=True)

    # Keeping house

    def _walk(self, entries: Iterable[Descriptor]) -> Iterator[Descriptor]:
        """Yield all that entries lead to, each manifest once, before it is read."""
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
                continue  # another tool copied a child without its subject
            artifact = self._artifact(descriptor)
            yield from artifact.content()
            waiting.extend(artifact.manifests())

    def gc(self, *, dry_run: bool = False, untagged: bool = False, grace: float = GRACE_SECONDS) -> GcReport:
        """Remove blobs that nothing points at, and what crashed writers left.

        Args:
            dry_run: only say what would go; a store that one may only read suffices.
            untagged: let artifacts without a tag go too, unless another is made from them.
            grace: seconds; younger blobs and files stay.

        Raises:
            IntegrityError: where a manifest is damaged, since what it needs is not known; nothing is removed.
        """
        with self._undisturbed() if dry_run else self._holding():
            before = time.time() - grace
            blobs = _older(self._blobs, before)  # before the index is read: what is committed from here on is not listed
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
        """Check everything; yield a line for each problem."""
        problems, sizes, missing = self._problems()
        if missing:
            with self._undisturbed():
                problems, sizes, _ = self._problems()
        yield from problems
        for name in sorted(entry.name for entry in os.scandir(self._blobs)):
            path = self._blobs / name
            digest = f"sha256:{name}"
            if not DIGEST.fullmatch(digest):
                yield f"{path}: nothing of that name belongs here"
                continue
            try:
                if digest in sizes and path.stat().st_size not in sizes[digest]:
                    continue  # said above; it may be too large to be read
                if hash_of(path)[0] != digest:
                    yield f"{path}: the content is not what its digest says"
            except FileNotFoundError:
                continue  # said above, unless it was removed meanwhile
            except OSError as error:
                yield f"{path}: this blob cannot be read ({error.strerror})"
        for path in sorted(self._blobs.parent.iterdir()):
            if path != self._blobs:
                yield f"{path}: nothing of that name belongs here"

    def _problems(self) -> tuple[list[str], dict[str, set[int]], bool]:
        """Return what is wrong with what the index leads to, the sizes by digest, and whether a blob is missing.

        What is missing may have been removed since the index was read.
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
                problems.append(f"{path}: the tag {tag!r} is there twice")
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
        """Say what is wrong with a blob, content aside."""
        try:
            status = self._path(blob.digest).stat()
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        if not stat.S_ISREG(status.st_mode):
            return "is not a regular file"
        return None if status.st_size == blob.size else f"has {status.st_size} bytes, not {blob.size}"


_LINEAGE = "'s lineage"


def _older(folder: Path, before: float) -> dict[Path, int]:
    """Return the files of a folder that were last changed before a time, with their sizes."""
    found: dict[Path, int] = {}
    try:
        for entry in os.scandir(folder):
            with suppress(FileNotFoundError):  # a writer has just given it its name
                status = entry.stat(follow_symlinks=False)
                if status.st_mtime < before and not stat.S_ISDIR(status.st_mode):
                    found[Path(entry.path)] = status.st_size
    except FileNotFoundError:
        return {}  # a copy that a different tool made has no folder for temporary files
    except OSError as error:
        raise IntegrityError(f"{folder}: this folder cannot be read ({error.strerror}); {_remedy(error)}") from error
    return found


def _reason(error: Exception) -> str:
    return str(error.strerror) if isinstance(error, OSError) else str(error)


def _remedy(error: Exception) -> str:
    unreadable = isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM)
    return "fix its permissions" if unreadable else "restore it from a copy"


def _shown(value: object) -> str:
    """Return a foreign value as a short text."""
    return printable(str(value))[:40]
