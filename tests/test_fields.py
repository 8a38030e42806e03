"""What a table of fields accepts, and what is said of anything else."""

import json

import pytest

from sdpctl import fields

TABLE = fields.section(
    {"count": fields.whole(1, 10), "share": fields.number(0, 1), "word": fields.text(5), "tag": fields.name},
    {"kind": fields.one_of(("a", 1)), "raw": fields.truth, "list": fields.listed(fields.whole(0), 1, 2)},
)
GOOD = {"count": 1, "share": 0.5, "word": "zwölf", "tag": "v1.0"}


@pytest.mark.parametrize("more", [{}, {"kind": None}, {"kind": "a", "raw": False, "list": [0, 3]}, {"kind": 1}, {"share": 1}])
def test_what_holds(more):
    TABLE(GOOD | more, "")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"count": 0}, "count: expected a whole number from 1 to 10, found 0"),
        ({"count": 1.0}, "count: expected a whole number from 1 to 10, found 1.0"),
        ({"count": True}, "count: expected a whole number from 1 to 10, found True"),
        ({"count": 10**4000}, "count: expected"),
        ({"share": float("nan")}, "share: expected a number from 0 to 1, found nan"),
        ({"share": float("inf")}, "share: expected"),
        ({"share": "0.5"}, "share: expected"),
        ({"share": 10**400}, "share: expected"),
        ({"word": "longer"}, "word: expected text of at most 5 characters, found 'longer'"),
        ({"word": "\ud800"}, "word: expected text"),
        ({"word": None}, "word: expected text"),
        ({"tag": "../x"}, "tag: expected a name of letters, digits, '.', '_' and '-', found '../x'"),
        ({"tag": ".."}, "tag: expected a name"),
        ({"tag": "a\n"}, "tag: expected a name"),
        ({"tag": "x" * 129}, "tag: expected a name"),
        ({"kind": "b"}, "kind: expected one of a, 1, found 'b'"),
        ({"kind": True}, "kind: expected one of"),
        ({"kind": ["a"]}, "kind: expected one of"),
        ({"raw": 1}, "raw: expected true or false, found 1"),
        ({"list": []}, "list: expected a list of 1 to 2 items, found []"),
        ({"list": [1, -1]}, "list[1]: expected a whole number"),
        ({"list": "ab"}, "list: expected a list"),
        ({"\x1b[2J": 1}, r"'\x1b[2J': unknown key"),
    ],
)
def test_what_does_not_hold_is_named(change, said):
    with pytest.raises(ValueError, match=r"expected|unknown key") as refused:
        TABLE(GOOD | change, "")
    assert str(refused.value).startswith(said)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("gone", GOOD)
def test_a_missing_key_is_named(gone):
    with pytest.raises(ValueError, match=rf"^at\.{gone}: this key is missing$"):
        TABLE({key: value for key, value in GOOD.items() if key != gone}, "at")


@pytest.mark.parametrize("document", [[], "x", 3, None])
def test_what_is_not_an_object(document):
    with pytest.raises(ValueError, match=r"^the document: expected an object, found "):
        TABLE(document, "")


def test_an_open_section_does_not_look_at_other_keys():
    fields.section({"a": fields.whole(0)}, closed=False)(json.loads('{"a": 1, "b": NaN}'), "")


def test_keys_and_values_of_a_mapping():
    mapped = fields.mapped(fields.name, fields.whole(0))
    mapped({"a": 1, "b.c": 0}, "m")
    with pytest.raises(ValueError, match=r"^a key of m: expected a name"):
        mapped({"a b": 1}, "m")
    with pytest.raises(ValueError, match=r"^m\.a: expected a whole number"):
        mapped({"a": -1}, "m")


def test_a_value_that_a_table_gets_later_is_accepted():
    known = {"a": 1}
    check = fields.one_of(known)
    with pytest.raises(ValueError, match="kind: expected one of a, found 'b'"):
        check("b", "kind")
    known["b"] = 2
    check("b", "kind")
