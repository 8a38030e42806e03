"""What comes from a different store: nothing gets a name before it is checked, and all artifacts are entered at once."""

import pytest

from sdpctl.errors import IntegrityError, NotFoundError, ResourceError, UsageError
from sdpctl.store import Descriptor, Store
from sdpctl.store.layout import EMPTY, EMPTY_TYPE, MANIFEST_TYPE, make_manifest, sha256
from sdpctl.store.store import Arrival

CONTENT = b"weights" * 1000
BLOB = Descriptor("application/octet-stream", sha256(CONTENT), len(CONTENT))
CONFIG = Descriptor(EMPTY_TYPE, sha256(EMPTY), len(EMPTY))


def arrival(kind, layer, subject=None, tags=()):
    content = make_manifest(kind, [layer], subject, "key")
    return Arrival(Descriptor(MANIFEST_TYPE, sha256(content), len(content)), content, tags)


@pytest.fixture
def store(tmp_path):
    store = Store.create(tmp_path / "store")
    store.receive(CONFIG, [EMPTY], "test")
    return store


def pieces(content, size=997):
    return (content[start : start + size] for start in range(0, len(content), size))


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"!", CONTENT[:-1] + b"!", b"", CONTENT * 3])
def test_a_blob_that_does_not_match_leaves_nothing(store, content):
    with pytest.raises(IntegrityError, match=f"^host/x: the blob {BLOB.digest} does not match its digest"):
        store.receive(BLOB, pieces(content), "host/x")
    assert not store.has(BLOB)
    assert list((store.path / "tmp").iterdir()) == []


def test_a_blob_that_is_too_long_is_not_read_to_its_end(store):
    def endless():
        for number in range(100):
            assert number < 10, "read on after the size was exceeded"
            yield bytes(1000)

    with pytest.raises(IntegrityError):
        store.receive(BLOB, endless(), "host/x")


def test_a_source_that_fails_leaves_nothing(store):
    def broken():
        yield CONTENT[:1000]
        raise ResourceError("lost")

    with pytest.raises(ResourceError, match="lost"):
        store.receive(BLOB, broken(), "host/x")
    assert not store.has(BLOB)
    assert list((store.path / "tmp").iterdir()) == []


def test_a_damaged_blob_is_replaced(store):
    store.receive(BLOB, pieces(CONTENT), "host/x")
    path = store.file_of(BLOB)
    path.chmod(0o644)
    path.write_bytes(CONTENT[:-1] + b"!")
    assert store.lacks(BLOB)
    with pytest.raises(IntegrityError, match="restore it from a copy"):
        store.file_of(BLOB)
    store.receive(BLOB, pieces(CONTENT), "host/x")
    assert store.file_of(BLOB).read_bytes() == CONTENT


def test_artifacts_are_entered_together_with_their_tags(store):
    store.receive(BLOB, pieces(CONTENT), "host/x")
    first = arrival("checkpoint", BLOB, tags=("net", "copy"))
    second = arrival("profile", BLOB, first.descriptor)
    adopted = store.adopt([first, second])
    assert [artifact.digest for artifact in adopted] == [first.descriptor.digest, second.descriptor.digest]
    assert {artifact.tag: artifact.digest for artifact in store.artifacts()} == {
        "net": first.descriptor.digest,
        "copy": first.descriptor.digest,
        None: second.descriptor.digest,
    }
    assert list(store.verify()) == []
    assert store.find("key").digest == second.descriptor.digest
    index = (store.path / "index.json").read_bytes()
    store.adopt([first, second])
    assert (store.path / "index.json").read_bytes() == index, "a second time changes nothing, not even the dates"


def test_a_blob_that_was_collected_meanwhile_stops_it(store):
    store.receive(BLOB, pieces(CONTENT), "host/x")
    assert BLOB.digest in store.gc(grace=0).blobs
    store.receive(CONFIG, [EMPTY], "test")
    index = (store.path / "index.json").read_bytes()
    with pytest.raises(NotFoundError, match="run the command again"):
        store.adopt([arrival("checkpoint", BLOB, tags=("net",))])
    assert (store.path / "index.json").read_bytes() == index


def test_a_subject_that_does_not_come_along_stops_it(store):
    store.receive(BLOB, pieces(CONTENT), "host/x")
    with pytest.raises(NotFoundError):
        store.adopt([arrival("profile", BLOB, Descriptor(MANIFEST_TYPE, sha256(b"?"), 1))])
    assert store.artifacts() == []


def test_tags_of_others_are_moved_by_force_only(store):
    store.receive(BLOB, pieces(CONTENT), "host/x")
    old = store.commit("checkpoint", {"old": b"old"}, tag="net")
    new = arrival("checkpoint", BLOB, tags=("other", "net"))
    index = (store.path / "index.json").read_bytes()
    with pytest.raises(UsageError, match=rf"'net' points at a different artifact, {old.digest}"):
        store.adopt([new])
    with pytest.raises(UsageError, match="is not a tag"):
        store.adopt([arrival("checkpoint", BLOB, tags=("a/b",))], force=True)
    assert (store.path / "index.json").read_bytes() == index
    store.adopt([new], force=True)
    assert store.resolve("net").digest == new.descriptor.digest
    assert store.resolve(old.digest).tag is None
