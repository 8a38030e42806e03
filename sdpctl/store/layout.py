"""The documents of an OCI image layout (opencontainers/image-spec 1.1): descriptors, manifests, the index.

Documents are canonical JSON, so that a digest depends on content alone. Nothing here touches a disk.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sdpctl.errors import IntegrityError
from sdpctl.untrusted import load_json

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
EMPTY = b"{}"
LAYOUT = {"imageLayoutVersion": "1.0.0"}

CREATED = "org.opencontainers.image.created"
REF_NAME = "org.opencontainers.image.ref.name"
TITLE = "org.opencontainers.image.title"
KEY = "dev.sdpctl.key"

MANIFEST_BYTES = 4 * 2**20
"""Size of the largest manifest that is read, as registries limit it (distribution-spec, "Pushing Manifests")."""

TITLE_BYTES = 255
"""Length of the longest file name that file systems take."""

TAG = re.compile(r"[A-Za-z0-9]+([._-][A-Za-z0-9]+)*")
TAG_MAX = 128
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_ARTIFACT_TYPE = re.compile(r"application/vnd\.sdpctl\.(?P<kind>[a-z-]+)\.v(?P<version>\d+)\+json")
_MEDIA_TYPES = {
    ".safetensors": "application/vnd.safetensors",
    ".json": "application/json",
    ".jsonl": "application/jsonl",
    ".yaml": "application/yaml",
    ".md": "text/markdown",
}

Json = dict[str, Any]


def canonical(document: object) -> bytes:
    """Return canonical JSON: sorted keys, no blanks, UTF-8, no NaN."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256(content: bytes) -> str:
    """Return the digest of some bytes, `sha256:<hex>`."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@dataclass(frozen=True)
class Descriptor:
    """What points at a blob.

    Args:
        media_type: of the content.
        digest: `sha256:<hex>` of the content.
        size: of the content, in bytes.
        annotations: free text by name.
        rest: what else a foreign tool wrote; it is kept.
    """

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    rest: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, document: Json) -> "Descriptor":
        """Read a descriptor.

        Raises:
            IntegrityError: where the document is not a descriptor.
        """
        try:
            digest, size, media_type = document["digest"], document["size"], document["mediaType"]
            if not DIGEST.fullmatch(digest) or type(size) is not int or not 0 <= size < 2**63:
                raise IntegrityError(
                    f"a descriptor names {digest!r:.80} of size {size!r:.40}, which cannot be; run `sdpctl store verify`"
                )
            annotations = _strings(document.get("annotations"))
            if not isinstance(media_type, str):
                raise TypeError("its mediaType is not text")
            own = ("mediaType", "digest", "size", "annotations")
            rest = {name: value for name, value in document.items() if name not in own}
            return cls(media_type, digest, size, annotations, rest)
        except (KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(f"a descriptor lacks its parts ({error}); run `sdpctl store verify`") from error

    def document(self) -> Json:
        """Return the descriptor as plain data."""
        plain: Json = {**self.rest, "mediaType": self.media_type, "digest": self.digest, "size": self.size}
        return plain | ({"annotations": dict(self.annotations)} if self.annotations else {})


def _strings(annotations: object) -> dict[str, str]:
    """Return annotations, which are text by name.

    Raises:
        TypeError: where they are something else.
    """
    if annotations is None:
        return {}
    if not isinstance(annotations, dict) or not all(isinstance(value, str) for value in annotations.values()):
        raise TypeError("its annotations are not text by name")
    return annotations


def check_title(title: str) -> str:
    """Return a layer's title, which must be a plain file name: where layers become files, titles become paths.

    Raises:
        ValueError: where it is not one.
    """
    if title in ("", ".", "..") or "/" in title or not title.isprintable() or len(title.encode()) > TITLE_BYTES:
        raise ValueError(f"a layer is titled {title!r:.80}, which is not a plain file name")
    return title


def parse_manifest(content: bytes, digest: str) -> Json:
    """Read a manifest, or an index that a different tool nested, and check the shape of all that is used of it.

    Args:
        content: the bytes.
        digest: of the content, for the message.

    Raises:
        IntegrityError: where it is not a manifest.
    """
    try:
        if len(content) > MANIFEST_BYTES:
            raise ValueError(f"{len(content):,} bytes, more than the {MANIFEST_BYTES:,} that a manifest may have")
        manifest = load_json(content)
        if not isinstance(manifest, dict):
            raise TypeError("not an object")
        for name in ("mediaType", "artifactType"):
            if not isinstance(manifest.get(name, ""), str):
                raise TypeError(f"its {name} is not text")
        _strings(manifest.get("annotations"))
        parts = Artifact(Descriptor("", digest, len(content)), manifest)
        if not isinstance(manifest.get("manifests", []), list) or not isinstance(manifest.get("layers", []), list):
            raise TypeError("its manifests or layers are not a list")
        if not manifest.get("layers") and "manifests" not in manifest:
            raise ValueError("it has no layers")
        parts.blobs()
        for title in parts.layers:
            check_title(title)
        return manifest
    except (ValueError, TypeError, IntegrityError) as error:
        raise IntegrityError(f"{digest}: this is not a manifest ({error}); restore it from a copy") from error


@dataclass(frozen=True)
class Artifact:
    """A manifest of the store, and how it is reached.

    Args:
        descriptor: of the manifest.
        manifest: the parsed manifest.
        tag: the tag it was found by, if any.
        created: when it was committed, RFC 3339; empty where a foreign tool did not say.
    """

    descriptor: Descriptor
    manifest: Json
    tag: str | None = None
    created: str = ""

    @property
    def digest(self) -> str:
        """The manifest's digest: what the artifact is known by."""
        return self.descriptor.digest

    @property
    def kind(self) -> str:
        """`checkpoint`, `bn-statistics`, ...; of a foreign artifact its media type.

        Raises:
            IntegrityError: where a newer sdpctl wrote it.
        """
        artifact_type = self.manifest.get("artifactType") or self.manifest.get("mediaType", "")
        match = _ARTIFACT_TYPE.fullmatch(artifact_type)
        if match and match["version"] != "1":
            raise IntegrityError(f"{self.digest}: {artifact_type} was written by a newer sdpctl; upgrade sdpctl to read it")
        return match["kind"] if match else str(artifact_type)

    @property
    def key(self) -> str | None:
        """What led to it, where a stage committed it."""
        return (self.manifest.get("annotations") or {}).get(KEY)

    @property
    def subject(self) -> Descriptor | None:
        """The manifest it was made from."""
        subject = self.manifest.get("subject")
        return None if subject is None else Descriptor.parse(subject)

    @property
    def layers(self) -> dict[str, Descriptor]:
        """The layers by title; a foreign layer without one goes by its digest."""
        layers = map(Descriptor.parse, self.manifest.get("layers", []))
        return {layer.annotations.get(TITLE, layer.digest): layer for layer in layers}

    @property
    def size(self) -> int:
        """Bytes of the manifest and its layers."""
        return self.descriptor.size + sum(layer.size for layer in self.layers.values())

    @property
    def nested(self) -> list[Descriptor]:
        """The manifests of an index that a different tool nested; an artifact has none."""
        return [Descriptor.parse(document) for document in self.manifest.get("manifests", [])]

    def content(self) -> list[Descriptor]:
        """Return what the manifest consists of: config and layers."""
        config = self.manifest.get("config")
        pointed = [] if config is None else [Descriptor.parse(config)]
        return pointed + [Descriptor.parse(layer) for layer in self.manifest.get("layers", [])]  # two may have one title

    def manifests(self) -> list[Descriptor]:
        """Return the manifests that the manifest points at: the subject, and those of a nested index."""
        return ([self.subject] if self.subject else []) + self.nested

    def blobs(self) -> list[Descriptor]:
        """Return everything the manifest points at."""
        return self.content() + self.manifests()


def layer_type(title: str) -> str:
    """Return the media type of a layer by its title's suffix."""
    return next((kind for suffix, kind in _MEDIA_TYPES.items() if title.endswith(suffix)), "application/octet-stream")


def make_manifest(kind: str, layers: list[Descriptor], subject: Descriptor | None, key: str | None) -> bytes:
    """Return the bytes of an artifact's manifest, without a config blob (image-spec, "Guidelines for Artifact Usage")."""
    manifest: Json = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": f"application/vnd.sdpctl.{kind}.v1+json",
        "config": Descriptor(EMPTY_TYPE, sha256(EMPTY), len(EMPTY)).document(),
        "layers": [layer.document() for layer in layers],
    }
    if subject is not None:
        manifest["subject"] = Descriptor(subject.media_type, subject.digest, subject.size).document()
    if key is not None:
        manifest["annotations"] = {KEY: key}
    return canonical(manifest)
