"""What lies beside the blobs, and a store that one may only read."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from stage_calls import document, evaluate, run, train

from sdpctl.errors import IntegrityError, ResourceError
from sdpctl.stages.context import Context
from sdpctl.stages.network import open_network

NOBODY = 65534


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[]", b"1", b'{"a": 1}', b'{"a": NaN}', b'{"a": {}', b"[" * 100_000, b"1" * 5000],
)
def test_a_damaged_local_json_is_one_line_that_says_what_to_do(tmp_path, listener, content):
    (tmp_path / "local.json").write_bytes(content)
    with pytest.raises(
        IntegrityError, match=r"local\.json: this file cannot be read .*; remove it and name the data"
    ) as caught:
        Context(path=tmp_path, report=listener).workspace.local("a")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("target", [None, "/dev/zero", "."])
def test_what_is_not_a_file_in_its_place_is_said_at_once(tmp_path, listener, target):
    for name in ("local.json", "files.sqlite"):
        os.mkfifo(tmp_path / name) if target is None else (tmp_path / name).symlink_to(target)
    with pytest.raises(IntegrityError, match=r"local\.json: this file cannot be read \(not a regular file"):
        Context(path=tmp_path, report=listener).workspace.local("a")


@pytest.mark.parametrize("target", [None, "/dev/zero", ".", "nowhere"])
def test_the_hashes_of_data_are_kept_in_a_file_only(tmp_path, tiny, image_folder, listener, target):
    path = tmp_path / "store" / "files.sqlite"
    path.parent.mkdir()
    os.mkfifo(path) if target is None else path.symlink_to(target)
    recipe = tiny("data.dataset=imagefolder", f"data.root={image_folder()}", "model.num_classes=2", "model.in_channels=3")
    with pytest.raises(IntegrityError, match=r"files\.sqlite: this is not a regular file; remove it"):
        Context(path=path.parent, report=listener).workspace.resolve(recipe)


def test_a_log_that_is_a_fifo_is_not_waited_for(tmp_path, listener):
    (tmp_path / "logs").mkdir()
    os.mkfifo(tmp_path / "logs" / "digits.jsonl")
    with pytest.raises(ResourceError, match="cannot write there"):
        Context(path=tmp_path, report=listener).workspace.log("digits", event="epoch")


def test_a_copy_without_a_folder_for_temporary_files_remembers_too(context, tiny):
    context.path.mkdir()
    fingerprint = context.workspace.resolve(tiny()).fingerprint
    assert context.workspace.local(fingerprint)["data.workers"] == 0


@contextmanager
def read_only(path: Path) -> Iterator[None]:
    """Take the right to write from all that a store consists of, and root's right to ignore that."""
    root = os.geteuid() == 0
    there = [path, *path.rglob("*")]
    modes = [(item, item.stat().st_mode) for item in [*there, *path.parents]]
    for item in there:
        item.chmod(item.stat().st_mode & ~0o222)
    for folder in path.parents:
        if root and folder.stat().st_mode & 0o011 != 0o011:  # the way there is open to all
            folder.chmod(folder.stat().st_mode | 0o011)
    try:
        if root:
            os.seteuid(NOBODY)
        yield
    finally:
        if root:
            os.seteuid(0)
        for item, mode in modes:
            if item in there or item.stat().st_mode != mode:
                item.chmod(mode)


def test_a_store_that_one_may_only_read_gives_the_answers_it_has(tiny, evaluated, tmp_path, make_listener):
    path = shutil.copytree(evaluated, tmp_path / "store")
    recipe = tiny("profile={}")

    def fresh() -> Context:
        return Context(path=path, report=make_listener())

    done = run(recipe, fresh())
    before = {item: item.stat().st_mtime_ns for item in path.rglob("*")}
    with read_only(path):
        assert {name: a.digest for name, a in run(recipe, fresh()).items()} == {name: a.digest for name, a in done.items()}
        assert train(recipe, fresh()) == done["train"]
        context = fresh()
        found = evaluate(open_network("tiny", context), context)
        assert found == done["eval-instances"]
        assert document(found, context)["rows"]
        for work in (
            lambda: train(recipe, fresh(), force=True),
            lambda: run(tiny("seed=1"), fresh()),
            lambda: evaluate(open_network("tiny", context, ["evaluate.batch_size=7"]), context),
        ):
            with pytest.raises(ResourceError, match=r"cannot write there \(Permission denied\)"):
                work()
    assert {item: item.stat().st_mtime_ns for item in path.rglob("*")} == before
