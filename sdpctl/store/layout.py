"""The documents of an OCI image layout (opencontainers/image-spec 1.1): descriptors, manifests, the index.

Documents are written as canonical JSON, so that a digest depends on content alone. This module does not access the disk.
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
"""Maximum size of a manifest, in bytes: the limit of registries (distribution-spec, "Pushing Manifests")."""

TITLE_BYTES = 255
"""Maximum length of a layer's title, in bytes: the limit of file systems for a file name."""

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
    ".html": "text/html",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}

Json = dict[str, Any]


def canonical(document: object) -> bytes:
    """Return canonical JSON: sorted keys, no blanks, UTF-8, finite numbers."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256(content: bytes) -> str:
    """Return the digest of content, `sha256:<hex>`."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@dataclass(frozen=True)
class Descriptor:
    """A reference to a blob.

    Args:
        media_type: media type of the content.
        digest: `sha256:<hex>` of the content.
        size: size of the content, in bytes.
        annotations: free text by name.
        rest: all other fields, which a foreign tool wrote; they are kept.
    """

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    rest: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, document: Json) -> "Descriptor":
        """Parse a descriptor.

        Raises:
            IntegrityError: if the document is not a descriptor.
        """
        try:
            digest, size, media_type = document["digest"], document["size"], document["mediaType"]
            if not DIGEST.fullmatch(digest) or type(size) is not int or not 0 <= size < 2**63:
                raise IntegrityError(
                    f"a descriptor has an invalid digest {digest!r:.80} or size {size!r:.40}; run `sdpctl store verify`"
                )
            annotations = _strings(document.get("annotations"))
            if not isinstance(media_type, str):
                raise TypeError("its mediaType is not text")
            own = ("mediaType", "digest", "size", "annotations")
            rest = {name: value for name, value in document.items() if name not in own}
            return cls(media_type, digest, size, annotations, rest)
        except (KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(f"a descriptor is incomplete or invalid ({error}); run `sdpctl store verify`") from error

    def document(self) -> Json:
        """Return the descriptor as a JSON object."""
        plain: Json = {**self.rest, "mediaType": self.media_type, "digest": self.digest, "size": self.size}
        return plain | ({"annotations": dict(self.annotations)} if self.annotations else {})


def _strings(annotations: object) -> dict[str, str]:
    """Return annotations; none are an empty mapping.

    Raises:
        TypeError: if they are not an object that maps names to text.
    """
    if annotations is None:
        return {}
    if not isinstance(annotations, dict) or not all(isinstance(value, str) for value in annotations.values()):
        raise TypeError("its annotations do not map names to text")
    return annotations


def is_artifact_type(text: object) -> bool:
    """Return whether a text is the type of an artifact of sdpctl, of any kind and version."""
    return isinstance(text, str) and _ARTIFACT_TYPE.fullmatch(text) is not None


def check_title(title: str) -> str:
    """Check that a layer's title is a plain file name, and return it; titles become paths when layers are written as files.

    Raises:
        ValueError: if the title is not a plain file name.
    """
    if title in ("", ".", "..") or "/" in title or not title.isprintable() or len(title.encode()) > TITLE_BYTES:
        raise ValueError(f"a layer is titled {title!r:.80}, which is not a plain file name")
    return title


def parse_manifest(content: bytes, digest: str) -> Json:
    """Parse a manifest, or an index that a different tool nested, and check the types of all fields that sdpctl uses.

    Args:
        content: the bytes.
        digest: digest of the content, for the message.

    Raises:
        IntegrityError: if the content is not a manifest.
    """
    try:
        if len(content) > MANIFEST_BYTES:
            raise ValueError(f"it has {len(content):,} bytes, and a manifest has at most {MANIFEST_BYTES:,}")
        manifest = load_json(content)
        if not isinstance(manifest, dict):
            raise TypeError("it is not an object")
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
    """An artifact: a manifest of the store, and its entry in the index.

    Args:
        descriptor: descriptor of the manifest.
        manifest: the parsed manifest.
        tag: the tag by which the artifact was found, if any.
        created: time of the commit, RFC 3339; empty if a foreign tool did not record it.
    """

    descriptor: Descriptor
    manifest: Json
    tag: str | None = None
    created: str = ""

    @property
    def digest(self) -> str:
        """The digest of the manifest, which identifies the artifact."""
        return self.descriptor.digest

    @property
    def short(self) -> str:
        """The first twelve hex digits of the digest: enough to name the artifact."""
        return self.digest.removeprefix("sha256:")[:12]

    @property
    def kind(self) -> str:
        """The kind: `checkpoint`, `bn-statistics`, ...; for a foreign artifact its artifact type or media type.

        Raises:
            IntegrityError: if a newer sdpctl wrote the artifact.
        """
        artifact_type = self.manifest.get("artifactType") or self.manifest.get("mediaType", "")
        match = _ARTIFACT_TYPE.fullmatch(artifact_type)
        if match and match["version"] != "1":
            raise IntegrityError(f"{self.digest}: {artifact_type} was written by a newer sdpctl; upgrade sdpctl to read it")
        return match["kind"] if match else str(artifact_type)

    @property
    def key(self) -> str | None:
        """The key of the artifact; None if it was committed without one."""
        return (self.manifest.get("annotations") or {}).get(KEY)

    @property
    def subject(self) -> Descriptor | None:
        """The manifest of the artifact that this artifact was made from."""
        subject = self.manifest.get("subject")
        return None if subject is None else Descriptor.parse(subject)

    @property
    def layers(self) -> dict[str, Descriptor]:
        """The layers by title; a foreign layer without a title is found by its digest."""
        layers = map(Descriptor.parse, self.manifest.get("layers", []))
        return {layer.annotations.get(TITLE, layer.digest): layer for layer in layers}

    @property
    def size(self) -> int:
        """Size of the manifest and its layers together, in bytes."""
        return self.descriptor.size + sum(layer.size for layer in self.layers.values())

    @property
    def nested(self) -> list[Descriptor]:
        """The manifests of a nested index, which only foreign tools write; an artifact has none."""
        return [Descriptor.parse(document) for document in self.manifest.get("manifests", [])]

    def content(self) -> list[Descriptor]:
        """Return the config and the layers of the manifest."""
        config = self.manifest.get("config")
        pointed = [] if config is None else [Descriptor.parse(config)]
        return pointed + [Descriptor.parse(layer) for layer in self.manifest.get("layers", [])]  # titles may repeat

    def manifests(self) -> list[Descriptor]:
        """Return the manifests that this manifest points at: its subject, and those of a nested index."""
        return ([self.subject] if self.subject else []) + self.nested

    def blobs(self) -> list[Descriptor]:
        """Return every blob that the manifest points at."""
        return self.content() + self.manifests()


def layer_type(title: str) -> str:
    """Return the media type of a layer, given its title."""
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
