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

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
EMPTY = b"{}"
LAYOUT = {"imageLayoutVersion": "1.0.0"}

CREATED = "org.opencontainers.image.created"
REF_NAME = "org.opencontainers.image.ref.name"
TITLE = "org.opencontainers.image.title"
KEY = "dev.sdpctl.key"

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
            IntegrityError: where it is none.
        """
        try:
            digest, size = document["digest"], document["size"]
            if not DIGEST.fullmatch(digest) or not isinstance(size, int):
                raise IntegrityError(
                    f"a descriptor names {digest!r} of size {size!r}, which cannot be; run `sdpctl store verify`"
                )
            own = ("mediaType", "digest", "size", "annotations")
            rest = {name: value for name, value in document.items() if name not in own}
            annotations = dict(document.get("annotations") or {})
            return cls(document["mediaType"], digest, size, annotations, rest)
        except (KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(f"a descriptor lacks its parts ({error}); run `sdpctl store verify`") from error

    def document(self) -> Json:
        """Return the descriptor as plain data."""
        plain: Json = {**self.rest, "mediaType": self.media_type, "digest": self.digest, "size": self.size}
        return plain | ({"annotations": dict(self.annotations)} if self.annotations else {})


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
        return Descriptor.parse(subject) if subject else None

    @property
    def layers(self) -> dict[str, Descriptor]:
        """The layers by title; a foreign layer without one goes by its digest."""
        layers = map(Descriptor.parse, self.manifest.get("layers", []))
        return {layer.annotations.get(TITLE, layer.digest): layer for layer in layers}

    @property
    def size(self) -> int:
        """Bytes of the manifest and its layers."""
        return self.descriptor.size + sum(layer.size for layer in self.layers.values())

    def blobs(self) -> list[Descriptor]:
        """Return everything the manifest points at: config, layers, subject."""
        config = self.manifest.get("config")
        pointed = [Descriptor.parse(config)] if config else []
        pointed += map(Descriptor.parse, self.manifest.get("layers", []))  # two may have one title
        return pointed + ([self.subject] if self.subject else [])


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
