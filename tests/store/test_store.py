"""The store's verbs, one writer at a time."""

import itertools
import json
import os
import stat
import time
from pathlib import Path

import pytest

from sdpctl.errors import IntegrityError, NotFoundError, UsageError
from sdpctl.store import Artifact, Store
from sdpctl.store.layout import TITLE, Descriptor, make_manifest, sha256


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store")


def commit(store: Store, content: str, tag: str | None = None, subject: Artifact | None = None) -> Artifact:
    """Commit an artifact of one layer."""
    return store.commit("profile", {"costs.json": content.encode()}, tag=tag, subject=subject)


def tags_of(store: Store) -> list[tuple[str, str | None]]:
    return [(artifact.digest, artifact.tag) for artifact in store.artifacts()]


def blobs_in(store: Store) -> set[str]:
    return {f"sha256:{path.name}" for path in (store.path / "blobs" / "sha256").iterdir()}


def needs(*artifacts: Artifact) -> set[str]:
    """Return the digests of what artifacts consist of."""
    return {digest for a in artifacts for digest in (a.digest, *(blob.digest for blob in a.blobs()))}


def make_old(path: Path) -> None:
    hours_ago = time.time() - 7200
    os.utime(path, (hours_ago, hours_ago))


# Committing and reading


def test_layers_read_back_from_bytes_and_from_files(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(range(256)) * 8192)  # more than one chunk
    layers = {"model.safetensors": file, "notes.md": "größer".encode(), "empty.json": b""}
    artifact = store.commit("checkpoint", layers, tag="digits")
    assert store.read(artifact, "model.safetensors") == file.read_bytes()
    assert store.read(artifact, "notes.md").decode() == "größer"
    assert store.read(artifact, "empty.json") == b""
    assert list(artifact.layers) == list(layers)
    assert (artifact.kind, artifact.subject, artifact.key) == ("checkpoint", None, None)
    assert file.exists()


def test_an_unknown_layer_is_said_with_the_known_ones(store: Store) -> None:
    with pytest.raises(NotFoundError, match=r"no layer 'model\.onnx'; it has costs\.json"):
        store.read(commit(store, "1"), "model.onnx")


def test_a_committed_artifact_is_the_resolved_one(store: Store) -> None:
    parent = commit(store, "parent", "parent")
    child = store.commit("export", {"card.md": b"text"}, subject=parent, key="k", tag="child")
    found = Store(store.path).resolve("child")
    assert found == child
    assert found.subject is not None
    assert store.at(found.subject) == parent


@pytest.mark.parametrize("ref", ["digits", "{digest}", "{hex}", "{digest:.15}", "{hex:.8}", "{hex:.4}"])
def test_an_artifact_is_found_by_tag_digest_and_prefix(store: Store, ref: str) -> None:
    artifact = commit(store, "1", "digits")
    ref = ref.format(digest=artifact.digest, hex=artifact.digest.removeprefix("sha256:"))
    assert store.resolve(ref).digest == artifact.digest


@pytest.mark.parametrize("ref", ["{hex:.3}", "sha256:{hex:.3}", "sha256:", "sha256", "", "{hex}0", "{hex:.8}xyz"])
def test_what_is_no_prefix_of_four_digits_finds_nothing(store: Store, ref: str) -> None:
    artifact = commit(store, "1", "digits")
    with pytest.raises(NotFoundError, match="no artifact"):
        store.resolve(ref.format(hex=artifact.digest.removeprefix("sha256:")))


def test_a_prefix_that_two_digests_have_is_ambiguous(store: Store) -> None:
    seen: dict[str, str] = {}
    for number in itertools.count():  # by the birthday paradox a few hundred manifests suffice
        content = str(number).encode()
        layer = Descriptor("application/json", sha256(content), len(content), {TITLE: "costs.json"})
        prefix = sha256(make_manifest("profile", [layer], None, None)).removeprefix("sha256:")[:4]
        if prefix in seen:
            break
        seen[prefix] = str(number)
    first, second = commit(store, seen[prefix]), commit(store, str(number))
    with pytest.raises(NotFoundError, match="2 digests begin with") as caught:
        store.resolve(prefix)
    assert first.digest in str(caught.value)
    assert second.digest in str(caught.value)
    assert store.resolve(first.digest).digest == first.digest


def test_a_tag_goes_before_a_prefix(store: Store) -> None:
    first = commit(store, "1")
    tag = first.digest.removeprefix("sha256:")[:6]
    second = commit(store, "2", tag)
    assert store.resolve(tag).digest == second.digest


def test_an_unknown_tag_brings_the_nearest_to_mind(store: Store) -> None:
    commit(store, "1", "digits.bn")
    with pytest.raises(NotFoundError, match=r"no artifact 'digit\.bn' \(did you mean 'digits\.bn'\?\)"):
        store.resolve("digit.bn")


# Tags


def test_a_moved_tag_leaves_the_old_artifact_untagged(store: Store) -> None:
    old, new = commit(store, "1", "digits"), commit(store, "2", "digits")
    assert tags_of(store) == [(old.digest, None), (new.digest, "digits")]
    assert store.resolve("digits").digest == new.digest
    assert store.read(store.resolve(old.digest), "costs.json") == b"1"


def test_a_tag_moves_back(store: Store) -> None:
    old, new = commit(store, "1", "digits"), commit(store, "2", "digits")
    store.tag(old, "digits")
    assert tags_of(store) == [(new.digest, None), (old.digest, "digits")]


def test_an_artifact_may_have_two_tags(store: Store) -> None:
    artifact = commit(store, "1", "one")
    assert store.tag(artifact, "two").tag == "two"
    assert tags_of(store) == [(artifact.digest, "one"), (artifact.digest, "two")]
    assert store.resolve(artifact.digest).digest == artifact.digest


def test_committing_the_same_again_changes_nothing_but_the_time(store: Store) -> None:
    first, again = commit(store, "1", "digits"), commit(store, "1", "digits")
    untagged = commit(store, "1")
    assert first.digest == again.digest == untagged.digest
    assert tags_of(store) == [(first.digest, "digits")]


def test_a_tag_replaces_the_untagged_entry(store: Store) -> None:
    commit(store, "1")
    artifact = commit(store, "1", "digits")
    assert tags_of(store) == [(artifact.digest, "digits")]


BAD_TAGS = ["", " ", "a b", "a/b", "a:b", ".a", "a.", "a..b", "a.-b", "-a", "a\n", "ä", "a" * 129]


@pytest.mark.parametrize("tag", BAD_TAGS)
def test_a_bad_tag_is_refused(store: Store, tag: str) -> None:
    with pytest.raises(UsageError, match="is not a tag"):
        commit(store, "1", tag)
    assert tags_of(store) == []


def test_a_bad_tag_is_refused_for_an_artifact_that_is_there(store: Store) -> None:
    artifact = commit(store, "1", "good")
    with pytest.raises(UsageError, match="is not a tag"):
        store.tag(artifact, "a b")
    assert tags_of(store) == [(artifact.digest, "good")]


def test_a_commit_that_a_bad_tag_stops_leaves_nothing(store: Store) -> None:
    with pytest.raises(UsageError):
        commit(store, "1", "a b")
    assert blobs_in(store) == set()


@pytest.mark.parametrize("tag", ["a", "7", "a" * 128, "resnet20.export.onnx.0123456789ab", "a-b_c.D"])
def test_a_good_tag_is_taken(store: Store, tag: str) -> None:
    assert store.resolve(tag if commit(store, "1", tag) else "").tag == tag


# Keys


def test_find_returns_the_newest_of_a_key(store: Store) -> None:
    assert store.find("k") is None
    store.commit("profile", {"costs.json": b"1"}, key="k")
    newest = store.commit("profile", {"costs.json": b"2"}, key="k")
    store.commit("profile", {"costs.json": b"3"}, key="other")
    found = store.find("k")
    assert found is not None
    assert found.digest == newest.digest
    assert found.key == "k"


# Discarding


def test_discard_removes_an_artifact_and_its_blobs(store: Store) -> None:
    kept = commit(store, "kept", "kept")
    store.discard(commit(store, "gone", "gone"))
    assert tags_of(store) == [(kept.digest, "kept")]
    assert blobs_in(store) == needs(kept)


def test_discard_leaves_what_another_artifact_shares(store: Store) -> None:
    gone = store.commit("checkpoint", {"shared.json": b"shared", "own.json": b"own"}, tag="gone")
    kept = store.commit("checkpoint", {"shared.json": b"shared"}, tag="kept")
    store.discard(gone)
    assert blobs_in(store) == needs(kept)
    assert store.read(kept, "shared.json") == b"shared"


def test_discard_leaves_a_subject_to_its_child(store: Store) -> None:
    parent = commit(store, "parent", "parent")
    child = commit(store, "child", "child", subject=parent)
    store.discard(parent)
    assert tags_of(store) == [(child.digest, "child")]
    assert child.subject is not None
    assert store.read(store.at(child.subject), "costs.json") == b"parent"
    assert list(store.verify()) == []


def test_discarding_a_child_leaves_its_subject(store: Store) -> None:
    parent = commit(store, "parent", "parent")
    store.discard(commit(store, "child", "child", subject=parent))
    assert blobs_in(store) == needs(parent)


def test_discard_leaves_an_artifact_that_has_another_tag(store: Store) -> None:
    artifact = commit(store, "1", "one")
    store.tag(artifact, "two")
    store.discard(store.resolve("one"))
    assert tags_of(store) == [(artifact.digest, "two")]
    assert blobs_in(store) == needs(artifact)


def test_discarding_what_a_tag_has_left_removes_it(store: Store) -> None:
    old = commit(store, "1", "digits")
    new = commit(store, "2", "digits")
    store.discard(old)
    assert tags_of(store) == [(new.digest, "digits")]
    assert blobs_in(store) == needs(new)


# Collecting


def orphan(store: Store, content: bytes = b"orphan") -> Path:
    """Place a blob that nothing points at."""
    path = store.path / "blobs" / "sha256" / sha256(content).removeprefix("sha256:")
    path.write_bytes(content)
    return path


def test_gc_removes_what_nothing_points_at(store: Store) -> None:
    kept = commit(store, "1", "kept")
    path = orphan(store)
    report = store.gc(grace=0)
    assert report.blobs == (f"sha256:{path.name}",)
    assert report.bytes == len(b"orphan")
    assert (report.entries, report.files) == ((), ())
    assert blobs_in(store) == needs(kept)


def test_a_dry_run_says_the_same_and_removes_nothing(store: Store) -> None:
    commit(store, "1", "moved")
    commit(store, "2", "moved")
    orphan(store)
    (store.path / "tmp" / "left").write_bytes(b"left")
    blobs, index = blobs_in(store), (store.path / "index.json").read_bytes()
    said = store.gc(dry_run=True, untagged=True, grace=0)
    assert said.entries
    assert said.blobs
    assert said.files == ("left",)
    assert blobs_in(store) == blobs
    assert (store.path / "index.json").read_bytes() == index
    assert (store.path / "tmp" / "left").exists()
    assert store.gc(untagged=True, grace=0) == said


def test_the_grace_keeps_young_blobs_and_files(store: Store) -> None:
    young, old = orphan(store, b"young"), orphan(store, b"old")
    young_file, old_file = store.path / "tmp" / "young", store.path / "tmp" / "old"
    young_file.touch()
    old_file.touch()
    make_old(old)
    make_old(old_file)
    report = store.gc()
    assert report.blobs == (f"sha256:{old.name}",)
    assert report.files == ("old",)
    assert young.exists()
    assert young_file.exists()


def test_gc_keeps_untagged_artifacts_unless_told(store: Store) -> None:
    old, new = commit(store, "1", "digits"), commit(store, "2", "digits")
    assert store.gc(grace=0).entries == ()
    assert blobs_in(store) == needs(old, new)
    assert store.gc(untagged=True, grace=0).entries == (old.digest,)
    assert tags_of(store) == [(new.digest, "digits")]
    assert blobs_in(store) == needs(new)


def test_an_index_that_does_not_change_is_not_written(store: Store) -> None:
    kept = commit(store, "1", "digits")
    before = (store.path / "index.json").stat().st_mtime_ns
    store.gc(grace=0)
    store.tag(kept, "digits")
    assert (store.path / "index.json").stat().st_mtime_ns == before


def test_the_subject_of_a_tagged_child_survives_with_its_own_subject(store: Store) -> None:
    grandparent = commit(store, "grandparent")
    parent = commit(store, "parent", subject=grandparent)
    child = commit(store, "child", "child", subject=parent)
    lonely = commit(store, "lonely")
    assert store.gc(untagged=True, grace=0).entries == (lonely.digest,)
    assert blobs_in(store) == needs(grandparent, parent, child)
    assert [digest for digest, _ in tags_of(store)] == [grandparent.digest, parent.digest, child.digest]


def test_gc_of_a_damaged_store_removes_nothing(store: Store) -> None:
    artifact = commit(store, "1", "digits")
    orphan(store)
    manifest = store.path / "blobs" / "sha256" / artifact.digest.removeprefix("sha256:")
    manifest.chmod(0o644)
    manifest.write_bytes(b"{}")
    before = blobs_in(store)
    with pytest.raises(IntegrityError):
        store.gc(grace=0)
    assert blobs_in(store) == before


def test_gc_walks_through_an_index_that_another_tool_nested(store: Store) -> None:
    artifact = commit(store, "1", "digits")
    path = store.path / "index.json"
    index = json.loads(path.read_bytes())
    nested = json.dumps({"schemaVersion": 2, "manifests": index["manifests"]}).encode()
    orphan(store, nested)
    media_type = "application/vnd.oci.image.index.v1+json"
    index["manifests"] = [{"mediaType": media_type, "digest": sha256(nested), "size": len(nested)}]
    path.write_text(json.dumps(index))
    assert store.gc(grace=0).blobs == ()
    assert blobs_in(store) == needs(artifact) | {sha256(nested)}
    assert list(store.verify()) == []


# Files


def test_blobs_are_read_only_and_manifests_are_not(store: Store) -> None:
    artifact = commit(store, "1", "digits")
    modes = {f"sha256:{p.name}": stat.S_IMODE(p.stat().st_mode) for p in (store.path / "blobs" / "sha256").iterdir()}
    assert modes.pop(artifact.digest) == 0o644
    assert set(modes.values()) == {0o444}
    assert stat.S_IMODE((store.path / "index.json").stat().st_mode) == 0o644


def test_nothing_temporary_stays(store: Store) -> None:
    commit(store, "1", "digits")
    commit(store, "1", "again")
    assert list((store.path / "tmp").iterdir()) == []


def test_a_blob_cut_short_is_written_anew(store: Store) -> None:
    artifact = commit(store, "content", "digits")
    path = store.path / "blobs" / "sha256" / sha256(b"content").removeprefix("sha256:")
    path.chmod(0o644)
    path.write_bytes(b"con")
    commit(store, "content", "digits")
    assert store.read(artifact, "costs.json") == b"content"


def test_a_path_with_a_colon_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot contain ':'"):
        Store.create(tmp_path / "a:b")
    assert not (tmp_path / "a:b").exists()


def test_creating_a_store_again_opens_it(store: Store) -> None:
    artifact = commit(store, "1", "digits")
    assert Store.create(store.path).resolve("digits").digest == artifact.digest


def test_an_empty_folder_becomes_a_store(tmp_path: Path) -> None:
    assert Store.create(tmp_path).artifacts() == []
