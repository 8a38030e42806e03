"""Checks of untrusted documents: which keys a document must have, and what each must hold.

A check takes a value and its place in the document, such as `network.num_classes`, and raises a `ValueError` that says what was
expected at this place and what was found. This module imports the standard library only.
"""

import re
import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

Check = Callable[[Any, str], None]

MOST = 10**18
"""Maximum of a count in a document."""

_NAME = re.compile(r"[A-Za-z0-9]+([._-][A-Za-z0-9]+)*")


def _check(expected: str, holds: Callable[[Any], bool]) -> Check:
    def check(value: Any, place: str) -> None:
        if not holds(value):
            raise ValueError(f"{place}: expected {expected}, found {reprlib.repr(value)}")

    return check


def whole(low: int, high: int = MOST) -> Check:
    """Accept an integer from `low` to `high`."""
    return _check(f"a whole number from {low:,} to {high:,}", lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float) -> Check:
    """Accept a finite number from `low` to `high`."""
    return _check(f"a number from {low:g} to {high:g}", lambda value: type(value) in (int, float) and low <= value <= high)


def _is_text(value: Any, longest: int) -> bool:
    return isinstance(value, str) and len(value) <= longest and not any("\ud800" <= c <= "\udfff" for c in value)


def text(longest: int = 4096) -> Check:
    """Accept text of at most `longest` characters that can be encoded as UTF-8."""
    return _check(f"text of at most {longest:,} characters", lambda value: _is_text(value, longest))


def is_name(value: object) -> bool:
    """Return whether a value is a name that is also a valid file name, such as a tag."""
    return isinstance(value, str) and len(value) <= 128 and _NAME.fullmatch(value) is not None


name: Check = _check("a name of letters, digits, '.', '_' and '-'", is_name)
"""Accept a name that is also a valid file name."""

truth: Check = _check("true or false", lambda value: isinstance(value, bool))
"""Accept true or false."""


def one_of(values: Collection[str | int]) -> Check:
    """Accept one of several values. They are read at each check, since a table may have got new entries."""

    def check(value: Any, place: str) -> None:
        if not any(type(value) is type(known) and value == known for known in values):
            raise ValueError(f"{place}: expected one of {', '.join(map(str, values))}, found {reprlib.repr(value)}")

    return check


def name_in(table: Mapping[str, Any], noun: str) -> Check:
    """Accept the name of an entry of a table. The table is read at each check, since it may have got new entries."""
    return _check(f"the name of {noun}", lambda value: isinstance(value, str) and value in table)


def optional(check: Check) -> Check:
    """Accept null, or a value that passes a check."""

    def optionally(value: Any, place: str) -> None:
        if value is not None:
            check(value, place)

    return optionally


def listed(check: Check, low: int, high: int) -> Check:
    """Accept a list of `low` to `high` items that all pass a check."""
    length = _check(
        f"a list of {low:,} to {high:,} items", lambda value: isinstance(value, list | tuple) and low <= len(value) <= high
    )

    def listing(value: Any, place: str) -> None:
        length(value, place)
        for number, item in enumerate(value):
            check(item, f"{place}[{number}]")

    return listing


_is_object: Check = _check("an object", lambda value: isinstance(value, dict))


def mapped(key_check: Check, check: Check) -> Check:
    """Accept an object whose keys pass `key_check` and whose values pass `check`."""

    def mapping(value: Any, place: str) -> None:
        _is_object(value, place)
        for key, item in value.items():
            key_check(key, f"a key of {place}")
            check(item, f"{place}.{key}")

    return mapping


def section(required: Mapping[str, Check], absent: Mapping[str, Check] | None = None, *, closed: bool = True) -> Check:
    """Accept an object with certain keys.

    Args:
        required: the check of each key that the object must have.
        absent: the check of each key that may be absent or null.
        closed: refuse all other keys.
    """
    lenient = {key: optional(check) for key, check in (absent or {}).items()}

    def sectioned(value: Any, place: str) -> None:
        _is_object(value, place or "the document")
        for key in required:
            if key not in value:
                raise ValueError(f"{_at(place, key)}: this key is missing")
        for key, item in value.items():
            check = required.get(key) or lenient.get(key)
            if check is not None:
                check(item, _at(place, key))
            elif closed:
                raise ValueError(f"{_at(place, reprlib.repr(key))}: unknown key")

    return sectioned


def _at(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key
