"""Completion of tags, also beside a store that somebody else has written."""

import json
from types import SimpleNamespace

import pytest

from sdpctl.cli.options import complete_tags

NAME = "org.opencontainers.image.ref.name"


def completed(folder, incomplete=""):
    return list(complete_tags(SimpleNamespace(params={"store": folder}), incomplete))


def test_tags_that_a_terminal_would_obey_are_not_offered(tmp_path):
    tags = ["digits", "digits.bn", "a\x1b[2Jb", "c\nd", "", 7, None]
    entries = [{"annotations": {NAME: tag}} for tag in tags] + [{}, {"annotations": None}]
    (tmp_path / "index.json").write_text(json.dumps({"manifests": entries}))
    assert completed(tmp_path) == ["digits", "digits.bn"]
    assert completed(tmp_path, "digits.") == ["digits.bn"]


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"manifests": 1}', b'{"manifests": [1]}', b"[" * 100_000])
def test_a_damaged_index_completes_nothing(tmp_path, content):
    (tmp_path / "index.json").write_bytes(content)
    assert completed(tmp_path) == []
    assert completed(tmp_path / "nowhere") == []
