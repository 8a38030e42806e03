"""`store rm`: a tag goes, and its artifact if nothing needs it."""

import pytest
from command import called, document, one_line

from sdpctl.errors import IntegrityError, NotFoundError
from sdpctl.store import Store


@pytest.fixture
def store(tmp_path):
    store = Store.create(tmp_path / ".sdpctl")
    checkpoint = store.commit("checkpoint", {"model": b"weights", "recipe": b"shared"}, key="c", tag="digits")
    store.commit("evaluation", {"results": b"[1]", "recipe": b"shared"}, subject=checkpoint, key="e", tag="digits.eval")
    return store


def blobs(store):
    return {path.name for path in (store.path / "blobs" / "sha256").iterdir()}


def test_a_tag_takes_its_artifact_along(store):
    before, evaluation = blobs(store), store.resolve("digits.eval")
    removal = store.remove("digits.eval")
    gone = {evaluation.digest, evaluation.layers["results"].digest}
    assert set(removal.blobs) == gone
    assert removal.bytes == evaluation.descriptor.size + 3
    assert blobs(store) == before - {digest.removeprefix("sha256:") for digest in gone}, "a shared blob stays"
    assert [artifact.tag for artifact in store.artifacts()] == ["digits"]
    assert list(store.verify()) == []


def test_what_others_were_made_from_stays_without_a_tag(store):
    checkpoint = store.resolve("digits")
    removal = store.remove("digits")
    assert (removal.made, removal.blobs) == (1, ())
    assert store.resolve(checkpoint.digest).tag is None
    assert store.find("c").digest == checkpoint.digest
    store.remove("digits.eval")
    assert store.gc(untagged=True, grace=0).entries == (checkpoint.digest,)


def test_an_artifact_with_a_second_tag_stays(store):
    store.tag(store.resolve("digits.eval"), "copy")
    removal = store.remove("digits.eval")
    assert (removal.tags, removal.blobs) == (("copy",), ())
    assert [artifact.tag for artifact in store.artifacts()] == ["digits", "copy"]


def test_a_dry_run_removes_nothing(store):
    before = (store.path / "index.json").read_bytes(), blobs(store)
    planned = store.remove("digits.eval", dry_run=True)
    assert ((store.path / "index.json").read_bytes(), blobs(store)) == before
    assert planned == store.remove("digits.eval")


@pytest.mark.parametrize("name", ["digit", "sha256", "", "digits.eva"])
def test_only_a_tag_is_removed(store, name):
    with pytest.raises(NotFoundError, match="there is no tag"):
        store.remove(name)
    with pytest.raises(NotFoundError):
        store.remove(store.resolve("digits").digest)


def test_damage_elsewhere_stops_it(store):
    path = store.path / "blobs" / "sha256" / store.resolve("digits").digest.removeprefix("sha256:")
    path.write_bytes(b"{}")
    before = (store.path / "index.json").read_bytes(), blobs(store)
    with pytest.raises(IntegrityError):
        store.remove("digits.eval")
    assert ((store.path / "index.json").read_bytes(), blobs(store)) == before


def test_the_command_says_what_became_of_the_artifact(store, tmp_path):
    done = called(tmp_path, "store", "rm", "digits", "--dry-run")
    assert "would be removed; the artifact" in done.stderr
    assert "1 artifacts were made from it" in done.stderr
    said = document(tmp_path, "store", "rm", "digits.eval")
    assert (said["tag"], len(said["blobs"]), said["dry_run"]) == ("digits.eval", 2, False)
    one_line(called(tmp_path, "store", "rm", "digits.eval"), 4, "did you mean 'digits'?")
