"""Read YAML 1.2 within limits into plain data, with the line and column of each key and value.

PyYAML reads YAML 1.1, where `1e-4` is a string, `no` is false, and the last of several equal keys wins silently. This module
uses PyYAML's scanner and parser, and resolves scalars by the core schema of YAML 1.2. It reads the merge keys of YAML 1.1
(`<<: *anchor`) too.
"""

import codecs
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from sdpctl.errors import RecipeError, shortened
from sdpctl.recipe.schema import Location
from sdpctl.untrusted import DEPTH, printable

BYTES = 2**20
"""Maximum size of a recipe; the shipped recipes have less than 1 KiB."""

NODES = 10_000
"""Maximum number of keys and values of a recipe; those behind an alias count each time."""

CHARACTERS = 2**18
"""Maximum number of characters of all keys and values together; those behind an alias count each time."""

DIGITS = 100
"""Maximum length of a number, in characters; the `repr` of a float has at most 24."""

MERGE = "<<"

OCTAL = r"0o[0-7]+"
FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"

_SCALARS: tuple[tuple[re.Pattern[str], Any], ...] = (
    (re.compile(r"null|Null|NULL|~|"), lambda _: None),
    (re.compile(r"true|True|TRUE|false|False|FALSE"), lambda text: text.lower() == "true"),
    (re.compile(r"[-+]?[0-9]+"), int),
    (re.compile(rf"{OCTAL}|0x[0-9a-fA-F]+"), lambda text: int(text, 0)),
    (re.compile(FLOAT), float),
    (re.compile(r"[-+]?\.(inf|Inf|INF)"), lambda text: float(text.replace(".", ""))),
    (re.compile(r"\.(nan|NaN|NAN)"), lambda _: float("nan")),
)
"""YAML 1.2.2, section 10.3.2: core schema tag resolution."""

_LINE_BREAK = re.compile(r"\r\n|\r|\n")
_UNREADABLE = re.compile("[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
"""Characters that YAML does not allow, and those that are line breaks in YAML 1.1 only: NEL, LS and PS."""

_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\ud800-\udfff]")
"""Characters that YAML does not allow, but that an escape sequence can produce."""


@dataclass
class Document:
    """Plain data with the places of its keys and values in the source."""

    source: str
    data: Any = None
    keys: dict[Location, str] = field(default_factory=dict)
    values: dict[Location, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    anchored: set[str] = field(default_factory=set)
    """Places of the values that have an anchor; an alias can repeat them."""

    def place(self, location: Location, *, of_key: bool = False) -> str:
        """Return the place of a location; if it is not known, return that of the nearest enclosing section."""
        places = self.keys if of_key else self.values
        while location and location not in places:
            location = location[:-1]
            places = self.keys
        return places.get(location, self.source)


def dotted(location: Location) -> str:
    """Return a location as a prefix of an error message: `train.lr: `, or an empty string for the whole recipe."""
    return shortened(".".join(shortened(printable(str(key)), 40) for key in location), 200) + (": " if location else "")


def decode(content: bytes, source: str) -> str:
    """Decode the bytes of a recipe.

    Raises:
        RecipeError: if the content is too large, or not UTF-8.
    """
    if len(content) > BYTES:
        raise RecipeError([f"{source}: this file has {len(content):,} bytes, and a recipe has at most {BYTES:,}"])
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content[:4]:
        raise RecipeError([f"{source}:1:1: this file is UTF-16 or UTF-32, not UTF-8; save the recipe as UTF-8"])
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = _place_in(error.object[: error.start].decode(errors="replace"), source)
        raise RecipeError(
            [f"{place}: byte 0x{error.object[error.start]:02x} is not UTF-8; save the recipe as UTF-8"]
        ) from error


def _place_in(before: str, source: str) -> str:
    lines = _LINE_BREAK.split(before)
    return f"{source}:{len(lines)}:{len(lines[-1]) + 1}"


def parse_yaml(text: str, source: str) -> Document:
    """Parse one YAML 1.2 document into plain data with places.

    Raises:
        RecipeError: if the text is not YAML, or exceeds a limit.
    """
    if unreadable := _UNREADABLE.search(text):
        place = _place_in(text[: unreadable.start()], source)
        raise RecipeError([f"{place}: the character {printable(unreadable[0])} is not allowed in a recipe; remove it"])
    composer = _Composer(text, source)
    try:
        node = composer.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = _place(mark, source) if mark else source
        if error.problem == "but found another document":
            raise RecipeError(
                [f"{place}: a recipe is a single YAML document; remove this `---` and everything after it"]
            ) from error
        what = shortened(printable(error.problem or error.context or ""), 200)
        raise RecipeError([f"{place}: this is not YAML: {what}"]) from error
    except (ValueError, OverflowError) as error:  # PyYAML converts escapes and versions without checking their range
        place = _place(composer.get_mark(), source)
        raise RecipeError([f"{place}: this is not YAML: an escape or a version is out of range"]) from error
    reader = _Reader(Document(source, anchored=composer.anchored))
    reader.document.data = None if node is None else reader.plain(node, ())
    return reader.document


def _place(mark: yaml.Mark, source: str) -> str:
    return f"{source}:{mark.line + 1}:{mark.column + 1}"


class _Composer(yaml.SafeLoader):
    """Composes nodes within limits; an alias counts as one node."""

    def __init__(self, text: str, source: str) -> None:
        super().__init__(text)
        self.source = source
        self.anchored: set[str] = set()
        self._nodes = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        place = _place(event.start_mark, self.source)
        self._nodes += 1
        if self._nodes > NODES:
            raise RecipeError([f"{place}: a recipe has at most {NODES:,} keys and values; this one exceeds the limit"])
        if self._depth > DEPTH:
            raise RecipeError([f"{place}: this value is nested too deeply; at most {DEPTH} levels are read"])
        if (tag := getattr(event, "tag", None)) is not None:
            shown = shortened(printable(tag.replace("tag:yaml.org,2002:", "!!")), 40)
            raise RecipeError([f"{place}: a recipe cannot have YAML tags; remove {shown}, and put text in quotes"])
        if not isinstance(event, yaml.AliasEvent) and event.anchor is not None:
            self.anchored.add(place)
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Reader:
    """Converts nodes to plain data within limits; nodes behind an alias count each time.

    Args:
        document: receives the places and the problems.
    """

    def __init__(self, document: Document) -> None:
        self.document = document
        self._nodes = self._characters = 0

    def plain(self, node: yaml.Node, location: Location, above: tuple[yaml.Node, ...] = ()) -> Any:
        """Return the plain data of a node.

        Args:
            node: a scalar, a list or a mapping.
            location: location of the node in the document.
            above: the nodes that contain this node.

        Raises:
            RecipeError: if the node is invalid, or exceeds a limit.
        """
        above = self._enter(node, location, above)
        self.document.values[location] = self._place(node)
        if isinstance(node, yaml.SequenceNode):
            return tuple(self.plain(child, (*location, i), above) for i, child in enumerate(node.value))
        if isinstance(node, yaml.MappingNode):
            mapping: dict[str, Any] = {}
            for key, (key_node, child) in self._entries(node, location, above).items():
                self.document.keys[(*location, key)] = self._place(key_node)
                mapping[key] = self.plain(child, (*location, key), above)
            return mapping
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node, location)

    def _place(self, node: yaml.Node) -> str:
        return _place(node.start_mark, self.document.source)

    def _refused(self, node: yaml.Node, location: Location, message: str) -> RecipeError:
        return RecipeError([f"{self._place(node)}: {dotted(location)}{message}"])

    def _enter(self, node: yaml.Node, location: Location, above: tuple[yaml.Node, ...]) -> tuple[yaml.Node, ...]:
        if any(node is other for other in above):
            raise self._refused(
                node, location, "this value contains an alias that refers to the value itself; write the value out"
            )
        if len(above) > DEPTH:
            raise self._refused(
                node, location, f"with its aliases expanded, this value is nested too deeply; at most {DEPTH} levels are read"
            )
        self._nodes += 1
        if isinstance(node, yaml.ScalarNode):
            self._characters += len(node.value)
        if self._nodes > NODES or self._characters > CHARACTERS:
            limits = f"{NODES:,} keys and values of {CHARACTERS:,} characters"
            raise self._refused(node, location, f"with its aliases expanded, this recipe has more than {limits}")
        return (*above, node)

    def _entries(
        self, mapping: yaml.MappingNode, location: Location, above: tuple[yaml.Node, ...]
    ) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """Return key and value nodes by key; own keys override merged keys, and earlier merges override later ones."""
        entries: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        merges: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key_node, child in mapping.value:
            self._enter(key_node, location, above)
            key = self._key(key_node, location)
            found = merges if key == MERGE and key_node.style is None else entries
            if key in found:
                first = self._place(found[key][0])
                self.document.problems.append(
                    f"{self._place(key_node)}: {dotted((*location, key))}this key is given twice; the first is at {first}"
                )
            found[key] = key_node, child
        for _, merged in merges.values():
            for other in self._merged(merged, location, above):
                for key, pair in self._entries(other, location, self._enter(other, location, above)).items():
                    entries.setdefault(key, pair)
        return entries

    def _key(self, node: yaml.Node, location: Location) -> str:
        if not isinstance(node, yaml.ScalarNode) or not node.value:
            raise self._refused(node, location, "a key must be a word, such as `name`")
        self._check_text(node, location)
        return str(node.value)

    def _merged(self, node: yaml.Node, location: Location, above: tuple[yaml.Node, ...]) -> Iterator[yaml.MappingNode]:
        several = isinstance(node, yaml.SequenceNode)
        above = self._enter(node, location, above) if several else above
        for child in node.value if several else [node]:
            if not isinstance(child, yaml.MappingNode):
                raise self._refused(
                    child, location, "the value of a merge key must be a section or a list of sections: `<<: *anchor`"
                )
            yield child

    def _check_text(self, node: yaml.ScalarNode, location: Location) -> None:
        if control := _CONTROL.search(node.value):
            shown = printable(control[0])
            raise self._refused(node, location, f"the character {shown} is not allowed in a recipe; remove it")

    def _scalar(self, node: yaml.ScalarNode, location: Location) -> Any:
        text = node.value
        self._check_text(node, location)
        if node.style is not None:
            return text
        for pattern, convert in _SCALARS:
            if pattern.fullmatch(text):
                if len(text) > DIGITS:
                    message = f"this number has {len(text):,} characters; a number has at most {DIGITS}"
                    raise self._refused(node, location, message)
                value = convert(text)
                if isinstance(value, float) and _out_of_range(value, text):
                    raise self._refused(node, location, f"{text} is out of the range of a double-precision number")
                return value
        return text


def _out_of_range(value: float, text: str) -> bool:
    mantissa = re.split("[eE]", text)[0]
    return (math.isinf(value) and text[-1].isdigit()) or (value == 0 and mantissa.strip("+-0.") != "")
