"""A client that others wrote reads the store, copies out of it, and copies into it."""

import subprocess
import sys
from pathlib import Path

import pytest
from outside import needs

from sdpctl.store import Store

pytestmark = needs("skopeo")

TAGS = ["digits", "digits.bn", "digits.eval", "digits.profile"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Return a store with an artifact of each kind; the tests only read it."""
    store = Store.create(tmp_path_factory.mktemp("skopeo") / "store")
    layers: dict[str, bytes] = {"model.safetensors": bytes(range(256)), "history.jsonl": b"{}\n", "recipe.yaml": b"seed: 0\n"}
    checkpoint = store.commit("checkpoint", layers, key="k", tag="digits")
    statistics = store.commit(
        "bn-statistics", {"statistics.safetensors": b"statistics", "nodes.json": b"[]"}, subject=checkpoint, tag="digits.bn"
    )
    store.commit("evaluation", {"results.json": b'{"rows":[]}'}, subject=statistics, tag="digits.eval")
    store.commit("profile", {"costs.json": b'{"rows":[]}'}, tag="digits.profile")
    return store


def skopeo(*arguments: str) -> bytes:
    ended = subprocess.run(["skopeo", "--insecure-policy", *arguments], capture_output=True, check=False, timeout=60)
    assert ended.returncode == 0, ended.stderr.decode()
    return ended.stdout


def copy(source: Path, tag: str, target: Path, as_tag: str | None = None) -> None:
    skopeo("copy", f"oci:{source}:{tag}", f"oci:{target}:{as_tag or tag}")


def sdpctl_store(*arguments: str | Path) -> tuple[int, str, list[str]]:
    """Run `sdpctl store`; return exit code, stdout, and the lines of stderr."""
    command = [sys.executable, "-m", "sdpctl", "store", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert "Traceback" not in ended.stderr
    return ended.returncode, ended.stdout, ended.stderr.splitlines()


@pytest.fixture
def copied(store: Store, tmp_path: Path) -> Store:
    """Return what skopeo makes of all tags."""
    for tag in TAGS:
        copy(store.path, tag, tmp_path / "copied")
    return Store(tmp_path / "copied")


@pytest.fixture
def orphaned(store: Store, tmp_path: Path) -> Store:
    """Return what skopeo makes of the statistics alone: it copies no subject."""
    copy(store.path, "digits.bn", tmp_path / "orphaned")
    return Store(tmp_path / "orphaned")


@pytest.mark.parametrize("tag", TAGS)
def test_skopeo_reads_the_manifests_very_bytes(store: Store, tag: str) -> None:
    manifest = store.path / "blobs" / "sha256" / store.resolve(tag).digest.removeprefix("sha256:")
    assert skopeo("inspect", "--raw", f"oci:{store.path}:{tag}") == manifest.read_bytes()


def test_a_copy_resolves_to_the_same_digests_and_content(store: Store, copied: Store) -> None:
    for tag in TAGS:
        ours, theirs = store.resolve(tag), copied.resolve(tag)
        assert theirs.digest == ours.digest
        assert (theirs.kind, theirs.key, theirs.subject) == (ours.kind, ours.key, ours.subject)
        assert list(theirs.layers) == list(ours.layers)
        for title in ours.layers:
            assert copied.read(theirs, title) == store.read(ours, title)
    assert list(copied.verify()) == []


def test_the_command_line_reads_a_copy(copied: Store) -> None:
    code, out, _ = sdpctl_store("ls", "--store", copied.path)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == TAGS
    code, out, _ = sdpctl_store("show", "digits.eval", "--store", copied.path)
    assert code == 0
    assert "made from" in out
    code, _, err = sdpctl_store("verify", "--store", copied.path)
    assert (code, err) == (0, [f"{copied.path}: 4 artifacts, all whole"])


def test_we_write_into_a_copy(store: Store, copied: Store) -> None:
    assert copied.gc(untagged=True, grace=0).blobs == ()
    copied.tag(copied.resolve("digits"), "renamed")
    Store(copied.path).commit("profile", {"costs.json": b"new"}, tag="new")
    assert copied.resolve("renamed").digest == store.resolve("digits").digest
    assert copied.read(copied.resolve("new"), "costs.json") == b"new"
    assert list(copied.verify()) == []


def test_a_copy_without_its_subject_is_read_and_its_lack_is_named(store: Store, orphaned: Store) -> None:
    artifact = orphaned.resolve("digits.bn")
    assert orphaned.read(artifact, "statistics.safetensors") == b"statistics"
    problems = list(orphaned.verify())
    assert len(problems) == 1, problems
    assert store.resolve("digits").digest.removeprefix("sha256:") in problems[0]
    code, out, _ = sdpctl_store("show", "digits.bn", "--store", orphaned.path)
    assert code == 0
    assert store.resolve("digits").digest.removeprefix("sha256:")[:12] in out


def test_a_copy_without_its_subject_is_collected(orphaned: Store) -> None:
    stray = orphaned.path / "blobs" / "sha256" / ("0" * 64)
    stray.touch()
    assert orphaned.gc(grace=0).blobs == (f"sha256:{stray.name}",)
    assert orphaned.read(orphaned.resolve("digits.bn"), "nodes.json") == b"[]"


def test_skopeo_copies_into_our_store(store: Store, tmp_path: Path) -> None:
    other = Store.create(tmp_path / "other")
    kept = other.commit("profile", {"costs.json": b"kept"}, tag="kept")
    moved = other.commit("profile", {"costs.json": b"moved"}, tag="digits")
    for tag in TAGS:
        copy(store.path, tag, other.path)

    for tag in TAGS:
        assert other.resolve(tag).digest == store.resolve(tag).digest
    assert other.resolve("kept") == kept
    assert other.resolve(moved.digest).tag is None
    assert list(other.verify()) == []

    assert other.gc(untagged=True, grace=0).entries == (moved.digest,)
    assert {artifact.tag for artifact in other.artifacts()} == {"kept", *TAGS}
    assert list(other.verify()) == []
    other.commit("profile", {"costs.json": b"more"}, tag="more")
    assert skopeo("inspect", "--raw", f"oci:{other.path}:digits") == skopeo("inspect", "--raw", f"oci:{store.path}:digits")
