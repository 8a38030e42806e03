"""The documents of the layout, checked against the image-spec with nothing but hashlib and json."""

import hashlib
import json
from pathlib import Path

import pytest

from sdpctl.errors import IntegrityError
from sdpctl.store import Artifact, Descriptor, Store
from sdpctl.store.layout import canonical, parse_manifest

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
HEX = "0123456789abcdef" * 4


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store")


def digest_of(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def blob_of(store: Store, digest: str) -> bytes:
    return (store.path / "blobs" / "sha256" / digest.split(":")[1]).read_bytes()


def described(content: bytes, media_type: str, title: str) -> dict[str, object]:
    annotations = {"org.opencontainers.image.title": title}
    return {"mediaType": media_type, "digest": digest_of(content), "size": len(content), "annotations": annotations}


def commit_pair(store: Store) -> tuple[Artifact, Artifact]:
    layers = {"model.safetensors": b"weights", "history.jsonl": b"{}\n"}
    parent = store.commit("checkpoint", layers, key="made by seed 0", tag="digits")
    return parent, store.commit("bn-statistics", {"nodes.json": b"[]"}, subject=parent, tag="digits.bn")


def test_a_new_store_is_an_empty_image_layout(store: Store) -> None:
    assert json.loads((store.path / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((store.path / "index.json").read_bytes())
    assert index["schemaVersion"] == 2
    assert index["mediaType"] == "application/vnd.oci.image.index.v1+json"
    assert index["manifests"] == []
    assert [path.name for path in (store.path / "blobs").iterdir()] == ["sha256"]


def test_a_manifest_is_what_the_spec_asks_of_an_artifact_without_config(store: Store) -> None:
    artifact, _ = commit_pair(store)
    expected = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": "application/vnd.sdpctl.checkpoint.v1+json",
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest_of(b"{}"), "size": 2},
        "layers": [
            described(b"weights", "application/vnd.safetensors", "model.safetensors"),
            described(b"{}\n", "application/jsonl", "history.jsonl"),
        ],
        "annotations": {"dev.sdpctl.key": "made by seed 0"},
    }
    content = blob_of(store, artifact.digest)
    assert content == json.dumps(expected, sort_keys=True, separators=(",", ":")).encode()
    assert artifact.digest == digest_of(content)
    assert artifact.descriptor.size == len(content)


def test_the_empty_config_is_there_as_a_blob(store: Store) -> None:
    commit_pair(store)
    assert blob_of(store, digest_of(b"{}")) == b"{}"


def test_a_subject_is_a_plain_descriptor_of_the_parents_manifest(store: Store) -> None:
    parent, child = commit_pair(store)
    manifest = json.loads(blob_of(store, child.digest))
    size = len(blob_of(store, parent.digest))
    assert manifest["subject"] == {"mediaType": MANIFEST, "digest": parent.digest, "size": size}
    assert "annotations" not in manifest


def test_tag_and_time_stand_in_the_index_alone(store: Store) -> None:
    artifact, _ = commit_pair(store)
    entry = json.loads((store.path / "index.json").read_bytes())["manifests"][0]
    assert (entry["mediaType"], entry["digest"]) == (MANIFEST, artifact.digest)
    assert entry["size"] == len(blob_of(store, artifact.digest))
    assert entry["annotations"]["org.opencontainers.image.ref.name"] == "digits"
    assert entry["annotations"]["org.opencontainers.image.created"].endswith("+00:00")
    content = blob_of(store, artifact.digest)
    assert b"digits" not in content
    assert b"created" not in content


def test_same_content_has_the_same_digest_in_every_store(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"weights")
    digests = set()
    for place, content, tag in (("here", b"weights", "first"), ("deeper/there", file, "second")):
        artifact = Store.create(tmp_path / place).commit("checkpoint", {"model.safetensors": content}, key="k", tag=tag)
        digests.add(artifact.digest)
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("kind", "layers", "key"),
    [
        ("export", {"a.json": b"1"}, "key"),
        ("profile", {"b.json": b"1"}, "key"),
        ("profile", {"a.json": b"2"}, "key"),
        ("profile", {"a.json": b"1"}, "other"),
        ("profile", {"a.json": b"1"}, None),
    ],
)
def test_other_content_has_another_digest(store: Store, kind: str, layers: dict[str, bytes], key: str | None) -> None:
    plain = store.commit("profile", {"a.json": b"1"}, key="key")
    assert store.commit(kind, layers, key=key).digest != plain.digest


@pytest.mark.parametrize(
    ("title", "media_type"),
    [
        ("model.safetensors", "application/vnd.safetensors"),
        ("costs.json", "application/json"),
        ("trials.jsonl", "application/jsonl"),
        ("recipe.yaml", "application/yaml"),
        ("card.md", "text/markdown"),
        ("model.onnx", "application/octet-stream"),
    ],
)
def test_a_layers_media_type_follows_its_title(store: Store, title: str, media_type: str) -> None:
    artifact = store.commit("export", {title: b"content"})
    assert json.loads(blob_of(store, artifact.digest))["layers"] == [described(b"content", media_type, title)]


def test_canonical_json_is_sorted_dense_utf8() -> None:
    assert canonical({"ß": [1, 2.5, None], "a": {"c": True, "b": "é"}}) == '{"a":{"b":"é","c":true},"ß":[1,2.5,null]}'.encode()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_canonical_json_has_no_numbers_that_json_lacks(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"loss": number})


def test_what_a_foreign_tool_wrote_survives_a_rewrite_of_the_index(store: Store) -> None:
    commit_pair(store)
    path = store.path / "index.json"
    index = json.loads(path.read_bytes())
    foreign = {"platform": {"os": "linux"}, "urls": ["https://example.org/a"], "artifactType": "text/plain"}
    index["manifests"][0] |= foreign
    index["manifests"][0]["annotations"]["org.example.note"] = "kept"
    index["x-foreign"] = {"also": "kept"}
    index["annotations"]["org.example.note"] = "kept too"
    path.write_text(json.dumps(index, indent=2))

    store.commit("profile", {"costs.json": b"{}"}, tag="another")

    after = json.loads(path.read_bytes())
    assert after["manifests"][:2] == index["manifests"]
    assert after["x-foreign"] == index["x-foreign"]
    assert after["annotations"] == index["annotations"]
    assert len(after["manifests"]) == 3


def test_an_index_is_canonical_too(store: Store) -> None:
    commit_pair(store)
    content = (store.path / "index.json").read_bytes()
    assert content == json.dumps(json.loads(content), sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    "document",
    [
        {"mediaType": "a/b", "size": 1},
        {"mediaType": "a/b", "digest": f"sha256:{HEX}"},
        {"digest": f"sha256:{HEX}", "size": 1},
        {"mediaType": "a/b", "digest": f"sha256:{HEX}", "size": "1"},
        {"mediaType": "a/b", "digest": f"sha256:{HEX.upper()}", "size": 1},
        {"mediaType": "a/b", "digest": f"sha256:{HEX}0", "size": 1},
        {"mediaType": "a/b", "digest": f"sha256:../../{HEX[6:]}", "size": 1},
        {"mediaType": "a/b", "digest": f"md5:{HEX}", "size": 1},
        {"mediaType": "a/b", "digest": None, "size": 1},
        None,
        [],
    ],
)
def test_what_is_no_descriptor_is_refused(document: object) -> None:
    with pytest.raises(IntegrityError, match="descriptor"):
        Descriptor.parse(document)  # type: ignore[arg-type]


def test_two_layers_of_one_title_are_both_kept_alive(store: Store) -> None:
    digest, size = digest_of(b"{}"), 2
    layers = [
        {"mediaType": "a/b", "digest": f"sha256:{hex_}", "size": 1, "annotations": {"org.opencontainers.image.title": "same"}}
        for hex_ in (HEX, HEX[::-1])
    ]
    artifact = Artifact(Descriptor(MANIFEST, digest, size), {"layers": layers})
    assert {blob.digest for blob in artifact.blobs()} == {f"sha256:{HEX}", f"sha256:{HEX[::-1]}"}


# What a reader relies on

LAYER = {"mediaType": "a/b", "digest": f"sha256:{HEX}", "size": 1}


def manifest_with(**changes: object) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "layers": [LAYER]} | changes).encode()


def titled(title: object) -> bytes:
    return manifest_with(layers=[LAYER | {"annotations": {"org.opencontainers.image.title": title}}])


@pytest.mark.parametrize("changes", [{}, {"subject": LAYER}, {"config": LAYER}, {"annotations": None}, {"artifactType": "x"}])
def test_a_foreign_manifest_is_read(changes: dict[str, object]) -> None:
    content = manifest_with(**changes)
    assert parse_manifest(content, digest_of(content)) == json.loads(content)


def test_a_nested_index_is_read() -> None:
    content = json.dumps({"schemaVersion": 2, "manifests": [LAYER]}).encode()
    artifact = Artifact(Descriptor(MANIFEST, digest_of(content), len(content)), parse_manifest(content, digest_of(content)))
    assert [nested.digest for nested in artifact.manifests()] == [f"sha256:{HEX}"]


BAD_MANIFESTS = {
    "no JSON": b"\x00",
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "many digits": b"1" * 5000,
    "NaN": manifest_with(x=float("nan")),
    "nothing in it": b"{}",
    "no layers": json.dumps({"schemaVersion": 2, "mediaType": MANIFEST}).encode(),
    "empty layers": manifest_with(layers=[]),
    "layers no list": manifest_with(layers={"a": 1}),
    "a layer no descriptor": manifest_with(layers=[LAYER, 1]),
    "a layer without digest": manifest_with(layers=[{"mediaType": "a/b", "size": 1}]),
    "a size below 0": manifest_with(layers=[LAYER | {"size": -1}]),
    "a size that is true": manifest_with(layers=[LAYER | {"size": True}]),
    "a size beyond any file": manifest_with(layers=[LAYER | {"size": 10**400}]),
    "a media type that is a number": manifest_with(layers=[LAYER | {"mediaType": 1}]),
    "annotations of a layer a list": manifest_with(layers=[LAYER | {"annotations": [["a", "b"]]}]),
    "a title that is a number": titled(1),
    "artifactType a number": manifest_with(artifactType=1),
    "mediaType a list": manifest_with(mediaType=[]),
    "annotations a list": manifest_with(annotations=[1]),
    "a key that is a number": manifest_with(annotations={"dev.sdpctl.key": 1}),
    "config a text": manifest_with(config="x"),
    "subject a text": manifest_with(subject="x"),
    "subject empty": manifest_with(subject={}),
    "manifests no list": manifest_with(manifests={}),
    "manifests no descriptors": manifest_with(manifests=[1]),
    "too large": b" " * 2**22 + manifest_with(),
}


@pytest.mark.parametrize("name", BAD_MANIFESTS)
def test_a_manifest_of_another_shape_is_refused(name: str) -> None:
    with pytest.raises(IntegrityError, match=f"sha256:{HEX}: this is not a manifest") as caught:
        parse_manifest(BAD_MANIFESTS[name], f"sha256:{HEX}")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("title", ["model.safetensors", "größer.json", "a b", "...", ".hidden", "x" * 255])
def test_a_title_is_a_plain_file_name(title: str) -> None:
    content = titled(title)
    assert parse_manifest(content, digest_of(content))


@pytest.mark.parametrize(
    "title",
    ["", ".", "..", "../../x", "/abs/x", "a/b", "x/", "a\nb", "\x1b[31m", "a\x00", "\x85", "\u202ex", "x" * 256, "ß" * 128],
)
def test_a_title_that_is_not_a_plain_file_name_is_refused(title: str) -> None:
    with pytest.raises(IntegrityError, match="is not a plain file name"):
        parse_manifest(titled(title), f"sha256:{HEX}")


def test_a_store_does_not_write_what_it_would_not_read(store: Store) -> None:
    with pytest.raises(IntegrityError, match="is not a plain file name"):
        store.commit("export", {"../model.onnx": b"x"}, tag="out")
    assert store.artifacts() == []
