"""What a damaged store says: the problem by name, never a traceback."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from sdpctl.cli.options import complete_tags
from sdpctl.errors import IntegrityError, ResourceError
from sdpctl.store import Artifact, Store
from sdpctl.store.layout import EMPTY, EMPTY_TYPE, MANIFEST_TYPE, TITLE, Descriptor, make_manifest, sha256

NOBODY = 65534


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store with one artifact, `digits`, and what was made from it, `digits.bn`."""
    store = Store.create(tmp_path_factory.mktemp("whole") / "store")
    checkpoint = store.commit("checkpoint", {"model.safetensors": b"some weights"}, tag="digits")
    store.commit("bn-statistics", {"nodes.json": b"[1, 2, 3]"}, subject=checkpoint, tag="digits.bn")
    return store.path


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Store:
    """Return a copy to be damaged."""
    return Store(shutil.copytree(whole, tmp_path / "store"))


def sdpctl(*arguments: str | Path, code: int) -> list[str]:
    """Run the command line, check its exit code, and return the lines of stderr."""
    command = [sys.executable, "-m", "sdpctl", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert "Traceback" not in ended.stdout + ended.stderr
    assert ended.returncode == code, ended.stderr
    return ended.stderr.splitlines()


def file_of(store: Store, digest: str) -> Path:
    return store.path / "blobs" / "sha256" / digest.removeprefix("sha256:")


def place(store: Store, content: bytes) -> str:
    """Place a blob as another tool would."""
    file_of(store, sha256(content)).write_bytes(content)
    return sha256(content)


def change_index(store: Store, change: Callable[[dict[str, object]], object]) -> None:
    path = store.path / "index.json"
    index = json.loads(path.read_bytes())
    change(index)
    path.write_text(json.dumps(index))


# Damaged blobs


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() + b"\n")


def lose(path: Path) -> None:
    path.unlink()


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def put_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def put_socket(path: Path) -> None:
    path.unlink()
    here = Path.cwd()
    os.chdir(path.parent)  # the address of a socket is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)
    os.chdir(here)


def link_to_zero(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def make_huge(path: Path) -> None:
    path.chmod(0o644)
    os.truncate(path, 2**42)


def layer_of(artifact: Artifact) -> str:
    return artifact.layers["model.safetensors"].digest


def config_of(artifact: Artifact) -> str:
    return str(artifact.manifest["config"]["digest"])


def manifest_of(artifact: Artifact) -> str:
    return artifact.digest


@pytest.mark.parametrize(
    "damage",
    [flip, cut, lengthen, lose, replace_by_folder, put_fifo, put_socket, link_to_zero, link_to_nothing, make_huge],
)
@pytest.mark.parametrize("part", [layer_of, config_of, manifest_of])
def test_a_damaged_blob_is_named_and_not_read(
    store: Store, part: Callable[[Artifact], str], damage: Callable[[Path], None]
) -> None:
    artifact = store.resolve("digits")
    digest = part(artifact)
    assert list(store.verify()) == []
    damage(file_of(store, digest))
    problems = list(store.verify())
    assert problems
    assert all(digest.removeprefix("sha256:") in problem for problem in problems), problems
    descriptor = next(d for d in (artifact.descriptor, *artifact.blobs()) if d.digest == digest)
    with pytest.raises(IntegrityError, match=digest.removeprefix("sha256:")):
        store.blob(descriptor)


def test_a_damaged_layer_is_not_read(store: Store) -> None:
    flip(file_of(store, layer_of(store.resolve("digits"))))
    with pytest.raises(IntegrityError, match="does not match its digest"):
        store.read(store.resolve("digits"), "model.safetensors")


def test_a_damaged_manifest_is_not_resolved(store: Store) -> None:
    flip(file_of(store, store.resolve("digits").digest))
    with pytest.raises(IntegrityError, match="does not match its digest"):
        store.resolve("digits")
    assert store.resolve("digits.bn").kind == "bn-statistics"


def test_a_missing_subject_is_one_problem_of_its_child(store: Store) -> None:
    parent = store.resolve("digits")
    change_index(store, lambda index: index["manifests"].pop(0))  # type: ignore[attr-defined]
    file_of(store, parent.digest).unlink()
    problems = list(store.verify())
    assert len(problems) == 1, problems
    assert "digits.bn" in problems[0]
    assert parent.digest.removeprefix("sha256:") in problems[0]


def test_a_damaged_blob_is_healed_by_committing_its_content_again(store: Store) -> None:
    flip(file_of(store, layer_of(store.resolve("digits"))))
    assert list(store.verify()) != []
    store.commit("checkpoint", {"model.safetensors": b"some weights"}, tag="digits")
    assert list(store.verify()) == []


def test_a_disk_that_cannot_read_is_one_line(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr("sdpctl.store.store.open_regular", fail)
    monkeypatch.setattr("sdpctl.store.files.open_regular", fail)
    with pytest.raises(IntegrityError, match=r"cannot be read \(Input/output error\); restore it from a copy"):
        store.artifacts()
    assert any("cannot be read (Input/output error)" in problem for problem in store.verify())


def test_a_lineage_of_any_length_is_checked(store: Store) -> None:
    link = store.resolve("digits").descriptor
    for number in range(1500):
        config = Descriptor(EMPTY_TYPE, sha256(EMPTY), len(EMPTY), {TITLE: f"{number}.json"})
        manifest = make_manifest("profile", [config], link, None)
        link = Descriptor(MANIFEST_TYPE, place(store, manifest), len(manifest))
    change_index(store, lambda index: index["manifests"].append(link.document()))  # type: ignore[attr-defined]
    assert list(store.verify()) == []
    store.gc(grace=0)
    assert list(store.verify()) == []
    cut(file_of(store, layer_of(store.resolve("digits"))))
    change_index(store, lambda index: index["manifests"].pop(0))  # type: ignore[attr-defined]
    assert any(f"{link.digest}'s lineage" in problem or "digits.bn's lineage" in problem for problem in store.verify())


def test_what_a_nested_index_leads_to_is_checked(store: Store) -> None:
    def nest(index: dict[str, object]) -> None:
        content = json.dumps({"schemaVersion": 2, "manifests": index["manifests"]}).encode()
        digest, size = place(store, content), len(content)
        index["manifests"] = [{"mediaType": "application/vnd.oci.image.index.v1+json", "digest": digest, "size": size}]

    layer = layer_of(store.resolve("digits"))
    change_index(store, nest)
    assert list(store.verify()) == []
    lose(file_of(store, layer))
    (problem,) = store.verify()
    assert f"its blob {layer} is missing" in problem


# Things that do not belong


@pytest.mark.parametrize("stray", ["blobs/notes.txt", "blobs/sha512/", "blobs/sha256/notes.txt", "blobs/sha256/ABC/"])
def test_what_does_not_belong_under_blobs_is_named(store: Store, stray: str) -> None:
    path = store.path / stray
    if stray.endswith("/"):
        path.mkdir()
    else:
        path.write_text("stray")
    problems = list(store.verify())
    assert len(problems) == 1, problems
    assert problems[0] == f"{path}: this file does not belong in a store; remove it"
    assert store.read(store.resolve("digits"), "model.safetensors") == b"some weights"


def test_files_beside_the_layout_are_nobodys_business(store: Store) -> None:
    (store.path / "README.md").write_text("beside")
    assert list(store.verify()) == []


@pytest.mark.parametrize("content", [b"no JSON", b"[]", b"1", b'"text"', b'{"layers": 1}', b'{"layers": [1]}', b"\xff"])
def test_an_entry_that_points_at_no_manifest_is_one_problem(store: Store, content: bytes) -> None:
    entry = {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": place(store, content), "size": len(content)}
    change_index(store, lambda index: index["manifests"].append(entry))  # type: ignore[attr-defined]
    problems = list(store.verify())
    assert len(problems) == 1, problems
    assert sha256(content).removeprefix("sha256:") in problems[0]


def test_a_size_that_does_not_hold_is_a_problem(store: Store) -> None:
    change_index(store, lambda index: index["manifests"][0].update(size=1))  # type: ignore[index]
    assert any("digits" in problem for problem in store.verify())
    with pytest.raises(IntegrityError, match="does not match its digest"):
        store.resolve("digits")


def test_a_tag_that_stands_twice_is_a_problem(store: Store) -> None:
    change_index(store, lambda index: index["manifests"].append(index["manifests"][0]))  # type: ignore[attr-defined, index]
    problems = list(store.verify())
    assert len(problems) == 1
    assert "two entries have the tag 'digits'" in problems[0]


# Stores that cannot be opened


def write(name: str, content: bytes) -> Callable[[Store], None]:
    def damage(store: Store) -> None:
        (store.path / name).write_bytes(content)

    return damage


def remove(name: str) -> Callable[[Store], None]:
    def damage(store: Store) -> None:
        (store.path / name).unlink()

    return damage


def newer_store(store: Store) -> None:
    change_index(store, lambda index: index["annotations"].update({"dev.sdpctl.store-version": "2"}))  # type: ignore[attr-defined]


UNREADABLE = {
    "index: no text": (write("index.json", b"\x00\xff"), "index cannot be read"),
    "index: cut short": (write("index.json", b'{"schemaVersion": 2, "manif'), "index cannot be read"),
    "index: empty": (write("index.json", b""), "index cannot be read"),
    "index: a list": (write("index.json", b"[]"), "index cannot be read"),
    "index: no manifests": (write("index.json", b'{"schemaVersion": 2}'), "index cannot be read"),
    "index: manifests no list": (write("index.json", b'{"schemaVersion": 2, "manifests": {}}'), "index cannot be read"),
    "index: no schema version": (write("index.json", b'{"manifests": []}'), "index cannot be read"),
    "index: odd annotations": (
        write("index.json", b'{"schemaVersion": 2, "manifests": [], "annotations": [1]}'),
        "index cannot be read",
    ),
    "index: gone": (remove("index.json"), "index cannot be read"),
    "store: newer": (newer_store, "this store has version 2, and this sdpctl reads 1; upgrade sdpctl"),
    "layout: gone": (remove("oci-layout"), "no oci-layout file"),
    "layout: newer": (write("oci-layout", b'{"imageLayoutVersion": "2.0.0"}'), "layout version 2.0.0"),
    "layout: garbage": (write("oci-layout", b"\xff"), "this is not a store"),
    "layout: a list": (write("oci-layout", b"[]"), "layout version None"),
    "layout: deep": (write("oci-layout", b"[" * 100_000), "nested more than"),
    "layout: huge": (lambda store: make_huge(store.path / "oci-layout"), "and at most"),
    "layout: a FIFO": (lambda store: put_fifo(store.path / "oci-layout"), "not a regular file but a FIFO"),
    "layout: endless": (lambda store: link_to_zero(store.path / "oci-layout"), "not a regular file but a device"),
    "layout: escapes": (write("oci-layout", b'{"imageLayoutVersion": "\\u001b[31m\\n"}'), r"version \\x1b\[31m\\n, and this"),
    "index: deep": (write("index.json", b"[" * 100_000), "index cannot be read.*nested more than"),
    "index: many digits": (write("index.json", b"1" * 5000), "index cannot be read.*digits"),
    "index: NaN": (write("index.json", b'{"schemaVersion": 2, "manifests": [], "x": NaN}'), "index cannot be read.*finite"),
    "index: half a pair": (
        write("index.json", b'{"schemaVersion": 2, "manifests": [], "x": "\\ud800"}'),
        "index cannot be read",
    ),
    "index: pairs": (
        write("index.json", b'{"schemaVersion": 2, "manifests": [], "annotations": [["a", 1]]}'),
        "cannot be read",
    ),
    "index: huge": (lambda store: make_huge(store.path / "index.json"), "index cannot be read.*and at most"),
    "index: a FIFO": (lambda store: put_fifo(store.path / "index.json"), "index cannot be read.*but a FIFO"),
    "index: a socket": (lambda store: put_socket(store.path / "index.json"), "index cannot be read"),
    "index: endless": (lambda store: link_to_zero(store.path / "index.json"), "index cannot be read.*but a device"),
    "index: a folder": (lambda store: replace_by_folder(store.path / "index.json"), "index cannot be read"),
    "blobs: gone": (lambda store: shutil.rmtree(store.path / "blobs"), "folder of blobs cannot be read"),
    "blobs: no sha256": (lambda store: shutil.rmtree(store.path / "blobs" / "sha256"), "folder of blobs cannot be read"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_store_that_cannot_be_read_is_not_opened(store: Store, name: str) -> None:
    damage, message = UNREADABLE[name]
    damage(store)
    before = contents(store)
    for opening in (Store, Store.create):
        with pytest.raises(IntegrityError, match=message) as caught:
            opening(store.path)
        assert len(str(caught.value).splitlines()) == 1
    assert contents(store) == before


def contents(store: Store) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in store.path.rglob("*") if path.is_file() and path.stat().st_size < 2**20}


DIGEST = f"sha256:{64 * 'a'}"


@pytest.mark.parametrize("name", [name for name in UNREADABLE if name.startswith("index")])
def test_completion_of_a_tag_offers_nothing_then(store: Store, name: str) -> None:
    asked = SimpleNamespace(params={"store": store.path})
    assert list(complete_tags(asked, "digits")) == ["digits", "digits.bn"]  # type: ignore[arg-type]
    UNREADABLE[name][0](store)
    assert list(complete_tags(asked, "digits")) == []  # type: ignore[arg-type]


def test_verify_reads_every_manifest_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = store.resolve("digits")
    for number in range(20):
        parent = store.commit("profile", {"costs.json": str(number).encode()}, subject=parent, tag=f"digits.{number}")
    read: list[str] = []
    before = Store._read
    monkeypatch.setattr(Store, "_read", lambda self, descriptor: read.append(descriptor.digest) or before(self, descriptor))
    assert list(store.verify()) == []
    monkeypatch.undo()
    assert sorted(read) == sorted(artifact.digest for artifact in store.artifacts())


@pytest.mark.parametrize(
    "entry",
    [
        1,
        None,
        [],
        {},
        {"mediaType": "a/b", "digest": "sha256:..", "size": 1},
        {"mediaType": "a/b", "digest": DIGEST, "size": -1},
        {"mediaType": "a/b", "digest": DIGEST, "size": 1, "annotations": {"org.opencontainers.image.ref.name": 1}},
    ],
)
def test_an_entry_that_is_no_descriptor_is_said_so(store: Store, entry: object) -> None:
    change_index(store, lambda index: index["manifests"].append(entry))  # type: ignore[attr-defined]
    with pytest.raises(IntegrityError, match="a descriptor"):
        store.artifacts()
    with pytest.raises(IntegrityError, match="a descriptor"):
        store.commit("profile", {"costs.json": b"{}"}, tag="more")
    (problem,) = store.verify()
    assert "index.json: a descriptor" in problem


def test_a_manifest_larger_than_any_is_not_read(store: Store) -> None:
    entry = {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": place(store, b" " * 2**23), "size": 2**23}
    change_index(store, lambda index: index["manifests"].append(entry))  # type: ignore[attr-defined]
    with pytest.raises(IntegrityError, match="a manifest has at most 4,194,304"):
        store.artifacts()
    assert any("at most 4,194,304" in problem for problem in store.verify())


@pytest.mark.parametrize("damage", [put_fifo, link_to_zero, replace_by_folder])
@pytest.mark.parametrize("lock", ["gc.lock", "index.lock"])
def test_a_lock_that_is_not_a_file_is_one_line_and_no_wait(store: Store, lock: str, damage: Callable[[Path], None]) -> None:
    artifact = store.resolve("digits")
    damage(store.path / lock)
    with pytest.raises(ResourceError, match=r"lock is not a regular file|Is a directory"):
        store.tag(artifact, "more")
    assert list(store.verify()) == []


def test_a_folder_of_other_things_is_not_made_a_store(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(IntegrityError, match="no oci-layout file"):
        Store.create(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_store_that_is_not_there_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="there is no store"):
        Store(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_an_artifact_of_a_newer_sdpctl_asks_for_an_upgrade(store: Store) -> None:
    content = json.dumps(store.resolve("digits").manifest | {"artifactType": "application/vnd.sdpctl.checkpoint.v2+json"})
    digest = place(store, content.encode())
    change_index(store, lambda index: index["manifests"][0].update(digest=digest, size=len(content)))  # type: ignore[index]
    with pytest.raises(IntegrityError, match="newer sdpctl; upgrade"):
        _ = store.resolve("digits").kind
    (line,) = sdpctl("store", "show", "digits", "--store", store.path, code=5)
    assert "newer sdpctl; upgrade" in line


# Without the right to write


@contextmanager
def without_rights(path: Path) -> Iterator[None]:
    """Take the right to write into a folder, and root's right to ignore that."""
    folders = [path, *(folder for folder in path.rglob("*") if folder.is_dir())]
    root = os.geteuid() == 0
    modes = [(folder, folder.stat().st_mode) for folder in path.parents]
    closed = [(folder, mode) for folder, mode in modes if root and mode & 0o011 != 0o011]
    for folder, mode in closed:  # the way there is open to all
        folder.chmod(mode | 0o011)
    for folder in folders:
        folder.chmod(0o555)
    try:
        if root:
            os.seteuid(NOBODY)
        yield
    finally:
        if root:
            os.seteuid(0)
        for folder in folders:
            folder.chmod(0o755)
        for folder, mode in reversed(closed):
            folder.chmod(mode)


def test_a_store_without_the_right_to_write_reads_and_says_so(store: Store) -> None:
    with without_rights(store.path):
        opened = Store(store.path)
        artifact = opened.resolve("digits")
        assert opened.read(artifact, "model.safetensors") == b"some weights"
        assert list(opened.verify()) == []
        for write_there in (
            lambda: Store.create(store.path),
            lambda: opened.commit("profile", {"costs.json": b"{}"}, tag="more"),
            lambda: opened.tag(artifact, "more"),
        ):
            with pytest.raises(ResourceError, match=r"cannot write there \(Permission denied\)"):
                write_there()
    assert [artifact.tag for artifact in store.artifacts()] == ["digits", "digits.bn"]


def test_a_store_without_the_right_to_write_is_collected_on_paper(store: Store) -> None:
    place(store, b"orphan")
    for copied in (False, True):
        if copied:  # by a tool that leaves out what is not of the layout
            shutil.rmtree(store.path / "tmp")
            (store.path / "gc.lock").unlink()
        with without_rights(store.path):
            assert store.gc(dry_run=True, grace=0).blobs == (sha256(b"orphan"),)
            with pytest.raises(ResourceError, match="Permission denied"):
                store.gc(grace=0)


@pytest.mark.parametrize("lock", [True, False])
def test_a_missing_blob_of_a_store_without_the_right_to_write_is_damage(store: Store, lock: bool) -> None:
    lose(file_of(store, layer_of(store.resolve("digits"))))
    if not lock:
        (store.path / "gc.lock").unlink()
    with without_rights(store.path):
        with pytest.raises(IntegrityError, match="this blob is missing"):
            store.read(store.resolve("digits"), "model.safetensors")
        (problem,) = store.verify()
    assert "is missing" in problem


@contextmanager
def closed(path: Path) -> Iterator[None]:
    """Let nobody read something, and take root's right to ignore that."""
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        with without_rights(path.parent):
            path_mode = path.stat().st_mode & 0o777
            assert path_mode == 0 or path.is_dir()
            yield
    finally:
        path.chmod(mode)


@pytest.mark.parametrize("name", ["index.json", "oci-layout", "blob"])
def test_what_may_not_be_read_is_one_line_that_says_so(store: Store, name: str) -> None:
    path = file_of(store, store.resolve("digits").digest) if name == "blob" else store.path / name
    with closed(path), pytest.raises(IntegrityError, match="Permission denied") as caught:
        Store(store.path).artifacts()
    assert len(str(caught.value).splitlines()) == 1
    assert Store(store.path).artifacts()


def test_verify_names_a_blob_that_may_not_be_read(store: Store) -> None:
    path = file_of(store, store.resolve("digits").digest)
    with closed(path):
        problems = list(store.verify())
    assert f"{path}: this blob cannot be read (Permission denied)" in problems


def test_a_store_is_not_made_where_one_may_not_write(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    with without_rights(folder), pytest.raises(ResourceError, match="Permission denied"):
        Store.create(folder / "store")
    assert list(folder.iterdir()) == []


def test_a_store_is_not_made_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="Not a directory"):
        Store.create(tmp_path / "file" / "store")


# The command line


def test_verify_of_a_whole_store_exits_0(store: Store) -> None:
    (line,) = sdpctl("store", "verify", "--store", store.path, code=0)
    assert line == f"{store.path}: 2 artifacts, all whole"


@pytest.mark.parametrize(("part", "damage"), [(layer_of, flip), (config_of, lose), (manifest_of, cut)])
def test_verify_prints_a_line_for_each_problem_and_exits_5(
    store: Store, part: Callable[[Artifact], str], damage: Callable[[Path], None]
) -> None:
    digest = part(store.resolve("digits"))
    damage(file_of(store, digest))
    (store.path / "blobs" / "stray").touch()
    problems = list(store.verify())
    assert len(problems) >= 2
    lines = sdpctl("store", "verify", "--store", store.path, code=5)
    assert lines == [f"sdpctl: {problem}" for problem in problems]


@pytest.mark.parametrize(
    "command",
    [["ls"], ["show", "digits"], ["tag", "digits", "more"], ["verify"], ["gc"], ["gc", "--dry-run"]],
    ids=lambda command: "-".join(command),
)
@pytest.mark.parametrize("name", ["blobs: no sha256", "index: a FIFO"])
def test_no_command_of_the_store_trips_over_it(store: Store, command: list[str], name: str) -> None:
    damage, _ = UNREADABLE[name]
    damage(store)
    (line,) = sdpctl("store", *command, "--store", store.path, code=5)
    assert "cannot be read" in line


@pytest.mark.parametrize("name", ["index: cut short", "store: newer", "layout: gone", "layout: newer"])
def test_a_store_that_cannot_be_read_is_one_line_and_exits_5(store: Store, name: str) -> None:
    damage, message = UNREADABLE[name]
    damage(store)
    (line,) = sdpctl("store", "ls", "--store", store.path, code=5)
    assert message in line


def test_a_store_that_is_not_there_is_one_line_and_exits_5(tmp_path: Path) -> None:
    (line,) = sdpctl("store", "verify", "--store", tmp_path / "nowhere", code=5)
    assert "there is no store" in line


def test_a_damaged_layer_is_one_line_and_exits_5(store: Store) -> None:
    flip(file_of(store, layer_of(store.resolve("digits"))))
    (line,) = sdpctl("store", "show", "digits", "--layer", "model.safetensors", "--store", store.path, code=5)
    assert "does not match its digest" in line


def test_an_unknown_artifact_is_one_line_and_exits_4(store: Store) -> None:
    (line,) = sdpctl("store", "show", "digit", "--store", store.path, code=4)
    assert "did you mean 'digits'?" in line


def test_a_store_that_cannot_be_written_is_one_line_and_exits_7(store: Store) -> None:
    (store.path / "tmp").rmdir()
    (store.path / "tmp").touch()
    (line,) = sdpctl("store", "tag", "digits", "more", "--store", store.path, code=7)
    assert "cannot write there" in line


def test_a_bad_tag_is_one_line_and_exits_2(store: Store) -> None:
    (line,) = sdpctl("store", "tag", "digits", "a b", "--store", store.path, code=2)
    assert "is not a tag" in line
