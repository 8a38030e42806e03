"""Reading YAML: what YAML 1.2 says, merge keys, and the limits within which a recipe is read."""

import codecs
import math

import pytest

from sdpctl.errors import RecipeError
from sdpctl.recipe.document import BYTES, CHARACTERS, NODES, decode, parse_yaml


def data(text):
    return parse_yaml(text, "r.yaml").data


def refusal(text):
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text, "r.yaml")
    (line,) = caught.value.problems
    return line


CORE_SCHEMA = [
    *((text, None) for text in ("null", "Null", "NULL", "~", "")),
    *((text, True) for text in ("true", "True", "TRUE")),
    *((text, False) for text in ("false", "False", "FALSE")),
    *[("0", 0), ("-19", -19), ("+12", 12), ("007", 7), ("0o7", 7), ("0o17", 15), ("0x3A", 58), ("0x1F", 31), ("0xff", 255)],
    *[("0.", 0.0), ("-0.0", -0.0), (".5", 0.5), ("+12e03", 12000.0), ("-2E+05", -200000.0), ("1e-4", 1e-4), ("1e3", 1000.0)],
    *[(".inf", math.inf), ("-.Inf", -math.inf), ("+.INF", math.inf)],
    *((text, text) for text in ("no", "No", "NO", "yes", "on", "off", "Off", "y", "n", "nULL", "tRUE", "NaN", "inf")),
    *(
        (text, text)
        for text in ("12:30", "1:2:3", "2024-01-01", "1_000", "0b11", "0o8", "-0o7", "0xG", "1e", ".", "+.nan", "=")
    ),
]
"""YAML 1.2.2, section 10.3.2, and what YAML 1.1 would read as something other than a string."""


@pytest.mark.parametrize(("text", "value"), CORE_SCHEMA)
def test_plain_scalars(text, value):
    assert repr(data(f"key: {text}\n")["key"]) == repr(value)


@pytest.mark.parametrize("text", [".nan", ".NaN", ".NAN"])
def test_not_a_number(text):
    assert math.isnan(data(f"key: {text}")["key"])


@pytest.mark.parametrize(
    ("text", "value"), [("'12'", "12"), ('"1e-4"', "1e-4"), ("'null'", "null"), ('""', ""), ("|\n  12", "12")]
)
def test_quoted_and_block_scalars_are_strings(text, value):
    assert data(f"key: {text}")["key"] == value


class TestMergeKeys:
    BASE = "x-base: &b {epochs: 2, lr: 0.1}\n"

    @pytest.mark.parametrize(
        ("section", "merged"),
        [
            ("{<<: *b}", {"epochs": 2, "lr": 0.1}),
            ("{<<: *b, lr: 0.2}", {"epochs": 2, "lr": 0.2}),
            ("{lr: 0.2, <<: *b}", {"epochs": 2, "lr": 0.2}),
            ("{<<: [{lr: 0.3, gamma: 1}, *b]}", {"epochs": 2, "lr": 0.3, "gamma": 1}),
            ("{<<: [*b, {lr: 0.3, gamma: 1}]}", {"epochs": 2, "lr": 0.1, "gamma": 1}),
            ("{<<: {<<: *b, lr: 0.4}, gamma: 1}", {"epochs": 2, "lr": 0.4, "gamma": 1}),
            ("{<<: []}", {}),
            ("{'<<': 3}", {"<<": 3}),
        ],
    )
    def test_own_keys_beat_merged_ones_and_earlier_merges_later_ones(self, section, merged):
        assert data(f"{self.BASE}train: {section}\n")["train"] == merged

    def test_errors_point_at_the_value_that_was_merged(self):
        document = parse_yaml(f"{self.BASE}train: {{<<: *b}}\n", "r.yaml")
        assert document.place(("train", "lr")) == "r.yaml:1:28"
        assert document.place(("train", "lr"), of_key=True) == "r.yaml:1:24"

    @pytest.mark.parametrize("value", ["3", "[3]", "text", "", "[[*b]]"])
    def test_only_sections_are_merged(self, value):
        assert "the value of a merge key must be a section or a list of sections" in refusal(
            f"{self.BASE}train: {{<<: {value}}}\n"
        )

    def test_a_merge_key_given_twice(self):
        (problem,) = parse_yaml(f"{self.BASE}train: {{<<: *b, <<: *b}}\n", "r.yaml").problems
        assert problem == "r.yaml:2:17: train.<<: this key is given twice; the first is at r.yaml:2:9"


def aliases(count, first, next_):
    """Return keys of which each refers nine times, or once, to the one before."""
    return "".join([f"a0: &a0 {first}\n", *(f"a{i}: &a{i} {next_(f'*a{i - 1}')}\n" for i in range(1, count))])


NUMBER = "characters; a number has at most 100"
RANGE = "is out of the range of a double-precision number"
IN_ITSELF = "this value contains an alias that refers to the value itself; write the value out"
TOO_MUCH = f"with its aliases expanded, this recipe has more than {NODES:,} keys and values of {CHARACTERS:,} characters"
TOO_DEEP = "nested too deeply; at most 64 levels are read"

BEYOND_THE_LIMITS = {
    "an alias bomb": (aliases(12, "[x, x, x]", lambda a: f"[{', '.join([a] * 9)}]"), TOO_MUCH),
    "a bomb of merge keys": (aliases(12, "{}", lambda a: f"{{<<: [{', '.join([a] * 9)}]}}"), TOO_MUCH),
    "a bomb of text": (f"a: &a {'x' * 100_000}\nb: [*a, *a, *a]\n", TOO_MUCH),
    "a long text": (f"a: {'x' * (CHARACTERS + 1)}\n", TOO_MUCH),
    "a long chain of aliases": (aliases(1000, "[x]", lambda a: f"[{a}]"), TOO_DEEP),
    "a long chain of merge keys": (aliases(1000, "{x: 1}", lambda a: f"{{<<: {a}}}"), TOO_DEEP),
    "lists in lists": (f"a: {'[' * 450}{']' * 450}\n", TOO_DEEP),
    "sections in sections": (f"a: {'{a: ' * 450}1{'}' * 450}\n", TOO_DEEP),
    "lists that never end": ("[" * 100_000, TOO_DEEP),
    "a long list": (f"a: [{'1, ' * NODES}]\n", f"a recipe has at most {NODES:,} keys and values; this one exceeds the limit"),
    "5,000 digits": (f"a: {'9' * 5000}\n", f"r.yaml:1:4: a: this number has 5,000 {NUMBER}"),
    "5,000 hexadecimal digits": (
        f"a: 0x{'f' * 5000}\n",
        "r.yaml:1:4: a: this number has 5,002 characters; a number has at most 100",
    ),
    "400 zeros": (f"a: 0.{'0' * 400}1\n", f"r.yaml:1:4: a: this number has 403 {NUMBER}"),
    "overflow": ("a: -1.5e999\n", f"r.yaml:1:4: a: -1.5e999 {RANGE}"),
    "overflow of a fraction": ("a: .9e999\n", f"r.yaml:1:4: a: .9e999 {RANGE}"),
    "underflow": ("a: 1e-400\n", f"r.yaml:1:4: a: 1e-400 {RANGE}"),
    "a list in itself": (
        "a: &a [1, *a]\n",
        f"r.yaml:1:4: a.1: {IN_ITSELF}",
    ),
    "a section merged into itself": (
        "a: &a {<<: *a}\n",
        f"r.yaml:1:4: a: {IN_ITSELF}",
    ),
}


@pytest.mark.parametrize(("text", "message"), BEYOND_THE_LIMITS.values(), ids=BEYOND_THE_LIMITS)
def test_beyond_the_limits(text, message):
    line = refusal(text)
    assert message in line
    assert line.startswith("r.yaml:")
    assert len(line) < 500


def test_within_the_limits():
    numbers = ", ".join(["1"] * (NODES - 4))
    assert len(data(f"a: [{numbers}]\n")["a"]) == NODES - 4
    assert data(f"a: {'9' * 100}\n")["a"] == 10**100 - 1
    assert data(f"a: {'[' * 60}{']' * 60}\n")


@pytest.mark.parametrize("text", ["0e999", "0.0e-999", "-.0", "0"])
def test_zero_is_in_range(text):
    assert data(f"a: {text}\n")["a"] == 0


NOT_ALLOWED = "is not allowed in a recipe; remove it"
NO_TAGS = "and put text in quotes"
NO_ESCAPE = "this is not YAML: an escape or a version is out of range"

NOT_OF_A_RECIPE = {
    "an escape of no character": (
        'a: "\\UFFFFFFFF"\n',
        f"r.yaml:1:7: {NO_ESCAPE}",
    ),
    "a version": ("%YAML 1." + "9" * 5000 + "\n--- 1\n", f"{NO_ESCAPE}"),
    "half a character": ('a: "\\ud83d"\n', f"r.yaml:1:4: a: the character \\ud83d {NOT_ALLOWED}"),
    "an escape sequence": ('a: "\\e[31m"\n', f"r.yaml:1:4: a: the character \\x1b {NOT_ALLOWED}"),
    "an escape sequence in a key": (
        'a: {"\\e[31m": 1}\n',
        f"r.yaml:1:5: a: the character \\x1b {NOT_ALLOWED}",
    ),
    "NUL": ('a: "\\0"\n', f"r.yaml:1:4: a: the character \\x00 {NOT_ALLOWED}"),
    "lines": ("a: |\n  b\n  c\n", f"r.yaml:1:4: a: the character \\n {NOT_ALLOWED}"),
    "raw NUL": ("a: 1\r\n\nb: \0\n", f"r.yaml:3:4: the character \\x00 {NOT_ALLOWED}"),
    "a line break of YAML 1.1": ("a: b\u2028c\n", f"r.yaml:1:5: the character \\u2028 {NOT_ALLOWED}"),
    "a byte order mark in the text": (
        "a: 1\n\ufeffb: 2\n",
        f"r.yaml:2:1: the character \\ufeff {NOT_ALLOWED}",
    ),
    "a raw surrogate": ("a: \udcff\n", f"r.yaml:1:4: the character \\udcff {NOT_ALLOWED}"),
    "a Python object": (
        "a: !!python/object:os.system {}\n",
        f"r.yaml:1:4: a recipe cannot have YAML tags; remove !!python/object:os.system, {NO_TAGS}",
    ),
    "a tag of its own": ("a: !b c\n", f"r.yaml:1:4: a recipe cannot have YAML tags; remove !b, {NO_TAGS}"),
    "a set": ("a: !!set {b}\n", f"r.yaml:1:4: a recipe cannot have YAML tags; remove !!set, {NO_TAGS}"),
    "a list as a key": ("? [a]\n: 1\n", "r.yaml:1:3: a key must be a word, such as `name`"),
    "a section as a key": ("a:\n  ? {b: c}\n  : 1\n", "r.yaml:2:5: a: a key must be a word, such as `name`"),
    "nothing as a key": ("? \n: 1\n", "r.yaml:1:2: a key must be a word, such as `name`"),
    "two documents": (
        "a: 1\n---\nb: 2\n",
        "r.yaml:2:1: a recipe is a single YAML document; remove this `---` and everything after it",
    ),
}


@pytest.mark.parametrize(("text", "message"), NOT_OF_A_RECIPE.values(), ids=NOT_OF_A_RECIPE)
def test_what_does_not_belong_in_a_recipe(text, message):
    assert message in refusal(text)


def test_a_long_alias_is_cut():
    assert len(refusal(f"a: *{'b' * 10_000}\n")) < 300


@pytest.mark.parametrize("start", [b"", codecs.BOM_UTF8])
def test_utf8(start):
    assert decode(start + "a: Größe 😀\n".encode(), "r.yaml") == "a: Größe 😀\n"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_utf16_is_named(encoding):
    with pytest.raises(RecipeError) as caught:
        decode("name: a\n".encode(encoding), "r.yaml")
    assert caught.value.problems == ["r.yaml:1:1: this file is UTF-16 or UTF-32, not UTF-8; save the recipe as UTF-8"]


def test_other_encodings_are_said_where_they_differ():
    with pytest.raises(RecipeError) as caught:
        decode("a: 1\r\nb: für\n".encode() + "c: für\n".encode("latin-1"), "r.yaml")
    assert caught.value.problems == ["r.yaml:3:5: byte 0xfc is not UTF-8; save the recipe as UTF-8"]


def test_large_files():
    assert decode(b" " * BYTES, "r.yaml") == " " * BYTES
    with pytest.raises(RecipeError, match=r"r\.yaml: this file has [0-9,]+ bytes, and a recipe has at most 1,048,576"):
        decode(b" " * (BYTES + 1), "r.yaml")
