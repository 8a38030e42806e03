"""Standard streams that are closed, full or gone, and encodings that lack a character."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdpctl.store import Store

SMOKE = Path(__file__).parent.parent.parent / "recipes" / "smoke.yaml"


def in_a_shell(folder, redirections, *arguments):
    """Run the command line with a shell's redirections."""
    script = f'"$@" {redirections}; exit ${{PIPESTATUS[0]}}'
    command = ["bash", "-c", script, "bash", sys.executable, "-m", "sdpctl", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    for word in ("Traceback", "bug", "Exception ignored"):
        assert word not in done.stderr
    return done


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder whose store holds one artifact of many pages."""
    folder = tmp_path_factory.mktemp("stored")
    Store.create(folder / ".sdpctl").commit("other", {"text": b"a line\n" * 50_000}, key="0" * 64, tag="it")
    return folder


COMMANDS = {
    "a table": ("store", "ls"),
    "a document": ("store", "ls", "--json"),
    "digests": ("store", "ls", "-q"),
    "a layer": ("store", "show", "it", "--layer", "text"),
    "help": ("--help",),
}


@pytest.mark.parametrize(
    ("name", "closed"), [*((name, ">/dev/full") for name in COMMANDS), ("a table", ">&-"), ("a layer", "<&- >&-")]
)
def test_standard_output_that_cannot_be_written_is_said(stored, name, closed):
    done = in_a_shell(stored, closed, *COMMANDS[name])
    assert done.returncode == 7
    (line,) = done.stderr.splitlines()
    reason = "No space left on device" if "full" in closed else "Bad file descriptor"
    assert line.startswith(f"sdpctl: standard output cannot be written ({reason}); ")


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full"])
@pytest.mark.parametrize("name", ["a table", "help"])
def test_without_standard_error_the_result_is_there(stored, name, closed):
    done = in_a_shell(stored, closed, *COMMANDS[name])
    assert done.returncode == 0
    assert done.stdout == in_a_shell(stored, "", *COMMANDS[name]).stdout


@pytest.mark.parametrize("closed", [">&- 2>&-", ">/dev/full 2>/dev/full"])
def test_without_any_stream_only_the_exit_code_is_left(stored, closed):
    assert in_a_shell(stored, closed, "store", "ls").returncode == 7
    assert in_a_shell(stored, closed, "store", "show", "nothing").returncode == 4


@pytest.mark.parametrize("name", ["a table", "a layer", "help"])
def test_a_reader_that_goes_away_is_no_failure(stored, name):
    done = in_a_shell(stored, "| true", *COMMANDS[name])
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.parametrize("closed", ["2>/dev/full", ">&- 2>&-"])
def test_the_work_is_done_and_no_blob_receives_what_is_printed(tmp_path, closed):
    assert in_a_shell(tmp_path, closed, "train", SMOKE).returncode == 0
    store = Store(tmp_path / ".sdpctl")
    assert [artifact.tag for artifact in store.artifacts()] == ["smoke"]
    assert list(store.verify()) == []


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", r"M\xe4nner \u25b6"), ("latin-1", r"Männer \u25b6"), ("utf-8", "Männer ▶")]
)
def test_a_character_that_the_encoding_lacks_is_escaped(tmp_path, encoding, shown):
    folder = tmp_path / "Männer ▶"
    folder.mkdir()
    (folder / "it.yaml").write_bytes(SMOKE.read_bytes())

    def listed(*arguments):
        command = [sys.executable, "-m", "sdpctl", "recipe", "ls", *map(str, arguments)]
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        return subprocess.run(command, env=environment, capture_output=True, check=False)

    assert shown in listed(folder).stdout.decode(encoding)
    failed = listed(folder / "nowhere")
    assert failed.returncode == 2
    assert shown in failed.stderr.decode(encoding)
    (row,) = json.loads(listed(folder, "--json").stdout.decode("ascii"))["rows"]
    assert row["recipe"] == str(folder / "it.yaml")
