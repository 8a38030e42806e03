import json
import os

import pytest

from sdpctl.untrusted import DEPTH, load_json, open_regular, printable, read_regular


def test_regular_file_is_read(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    assert read_regular(tmp_path / "file") == b"content"
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link") == b"content"


def test_fifo_folder_and_device_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, kind in (("fifo", "a FIFO"), ("zero", "a device"), (".", "a folder")):
        with pytest.raises(OSError, match=f"not a regular file but {kind}") as error:
            open_regular(tmp_path / name)
        assert error.value.strerror == f"not a regular file but {kind}"


def test_missing_file_keeps_its_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "absent")


def test_large_file_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="at most 10 are read"):
        read_regular(tmp_path / "sparse", limit=10)


def test_json_is_read():
    assert load_json(b'{"a": [1, 2.5, "x", null]}') == {"a": [1, 2.5, "x", None]}


@pytest.mark.parametrize("depth", [DEPTH + 1, 900, 100_000])
def test_deep_json_is_refused(depth):
    with pytest.raises(ValueError, match="nested more than"):
        load_json(b"[" * depth + b"]" * depth)


def test_json_may_be_as_deep_as_the_limit():
    assert load_json(b"[" * DEPTH + b"]" * DEPTH)


def test_number_of_many_digits_is_refused():
    with pytest.raises(ValueError, match="digits"):
        load_json("1" * 5000)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Hosen für Männer", "Hosen für Männer"),
        ("猫 🐈", "猫 🐈"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("two\nlines\r\t", r"two\nlines\r\t"),
        ("right\u202eleft", r"right\u202eleft"),
        ("\udcff", r"\udcff"),
        ("\x9b31m", r"\x9b31m"),
    ],
)
def test_control_characters_are_escaped(text, shown):
    assert printable(text) == shown
    json.dumps(printable(text)).encode()


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"loss": -Infinity}', "1e999", "-1e999"])
def test_number_that_is_not_finite_is_refused(text):
    with pytest.raises(ValueError, match="not a finite number"):
        load_json(text)


@pytest.mark.parametrize("content", [b"\xff", '"text"'.encode("utf-16"), b'"\xed\xa0\x80"', rb'{"a": "\ud800"}', rb'"\uDFFF"'])
def test_text_that_cannot_be_written_as_utf_8_is_refused(content):
    with pytest.raises(ValueError, match="utf-8"):
        load_json(content)


def test_a_surrogate_pair_is_a_character():
    assert load_json(rb'"\ud83d\udc08"') == "🐈"
