"""Reading recipes: YAML 1.2, overrides, and errors that say where.

PyYAML reads YAML 1.1, where `1e-4` is a string, `no` is false and a key given twice silently wins. Its scanner and parser
are used; scalars are resolved by YAML 1.2's core schema here, and each value remembers its line and column.
"""

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from sdpctl.data.catalog import DATASETS
from sdpctl.errors import RecipeError, UsageError, did_you_mean
from sdpctl.recipe.schema import Location, Problem, Recipe

_OCTAL = r"0o[0-7]+"
_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"

_SCALARS: tuple[tuple[re.Pattern[str], Any], ...] = (
    (re.compile(r"null|Null|NULL|~|"), lambda _: None),
    (re.compile(r"true|True|TRUE|false|False|FALSE"), lambda text: text.lower() == "true"),
    (re.compile(r"[-+]?[0-9]+"), int),
    (re.compile(rf"{_OCTAL}|0x[0-9a-fA-F]+"), lambda text: int(text, 0)),
    (re.compile(_FLOAT), float),
    (re.compile(r"[-+]?\.(inf|Inf|INF)"), lambda text: float(text.replace(".", ""))),
    (re.compile(r"\.(nan|NaN|NAN)"), lambda _: float("nan")),
)
"""YAML 1.2.2, section 10.3.2: core schema tag resolution."""


@dataclass
class _Document:
    """Plain data with the places its keys and values came from."""

    source: str
    data: Any = None
    keys: dict[Location, str] = field(default_factory=dict)
    values: dict[Location, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def place(self, location: Location, *, of_key: bool = False) -> str:
        """Return the most exact place known of a location: its own, or that of the section it is in."""
        places = self.keys if of_key else self.values
        while location and location not in places:
            location = location[:-1]
            places = self.keys
        return places.get(location, self.source)


def parse_yaml(text: str, source: str) -> _Document:
    """Read one YAML 1.2 document into plain data with places.

    Raises:
        RecipeError: where the text is no YAML at all.
    """
    document = _Document(source)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        document.data = {} if node is None else _plain(node, (), document)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise RecipeError([f"{place}: this is no YAML: {error.problem or error.context}"]) from error
    except RecursionError as error:
        raise RecipeError([f"{source}: this is nested too deeply for a recipe"]) from error
    except yaml.YAMLError as error:
        raise RecipeError([f"{source}: this is no YAML: {' '.join(str(error).split())}"]) from error
    return document


def _place(node: yaml.Node, source: str) -> str:
    return f"{source}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"


def _plain(node: yaml.Node, location: Location, document: _Document, above: tuple[yaml.Node, ...] = ()) -> Any:
    if any(node is other for other in above):
        raise RecipeError([f"{_place(node, document.source)}: {_dotted(location)}: this alias is of what it stands in"])
    above = (*above, node)
    document.values[location] = _place(node, document.source)
    if isinstance(node, yaml.SequenceNode):
        return tuple(_plain(child, (*location, i), document, above) for i, child in enumerate(node.value))
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, child in node.value:
            key = str(key_node.value)
            place = _place(key_node, document.source)
            if key in mapping:
                first = document.keys[(*location, key)]
                document.problems.append(f"{place}: {_dotted((*location, key))}: this key is given twice, first at {first}")
            document.keys[(*location, key)] = place
            mapping[key] = _plain(child, (*location, key), document, above)
        return mapping
    assert isinstance(node, yaml.ScalarNode)
    if node.style is None:
        for pattern, convert in _SCALARS:
            if pattern.fullmatch(node.value):
                return convert(node.value)
    return node.value


def _dotted(location: Location) -> str:
    return ".".join(map(str, location))


def _override(document: _Document, assignment: str) -> None:
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise UsageError(f"--set {assignment}: write --set section.key=value, for example --set train.epochs=5")
    location = tuple(path.split("."))
    place = re.sub(r"(://[^@:]*:).*(?=@)|(?<=password=)[^&]*", r"\1***", f"--set {assignment}")  # not for the terminal
    parsed = parse_yaml(text, place)
    document.problems += parsed.problems
    if not isinstance(document.data, dict):
        return
    part: dict[str, Any] = document.data
    for depth, key in enumerate(location[:-1], 1):
        if not isinstance(part.get(key), dict):
            part[key] = {}
            document.keys[location[:depth]] = place
        part = part[key]
    part[location[-1]] = parsed.data
    for places in (document.keys, document.values):
        for known in [known for known in places if known[: len(location)] == location]:
            del places[known]
        places[location] = place


def _sections(location: Location) -> type[BaseModel] | None:
    section: type[BaseModel] | None = Recipe
    for key in location:
        if section is None:
            return None
        known = {info.alias or name: info.annotation for name, info in section.model_fields.items()}
        options = [known.get(str(key)), *getattr(known.get(str(key)), "__args__", ())]
        section = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
    return section


def _line(document: _Document, location: Location, message: str, *, of_key: bool = False) -> str:
    return f"{document.place(location, of_key=of_key)}: {_dotted(location) + ': ' if location else ''}{message}"


def _explain(document: _Document, error: Mapping[str, Any]) -> str:
    location: Location = error["loc"]
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        section = _sections(location[:-1])
        known = [info.alias or name for name, info in section.model_fields.items()] if section else []
        hint = did_you_mean(str(location[-1]), known) or f"; known here: {', '.join(known)}"
        return _line(document, location, f"unknown key{hint}", of_key=True)
    if kind == "missing":
        return _line(document, location, "this key is required")
    if kind == "value_error":
        return _line(document, location, str(error["ctx"]["error"]))
    if kind == "string_pattern_mismatch":
        wanted = {
            "name": "is no name: use letters, digits, '-' and '_'; it becomes the tag",
            "device": "is no device: use auto, cpu, cuda or cuda:N",
        }
        return _line(document, location, f"{value!r} {wanted[str(location[-1])]}")
    if kind in ("byte_size", "byte_size_unit"):
        return _line(document, location, f"{value!r} is no size: use 2GiB, 512MB or a number of bytes")
    message = (
        re.sub(r" or instance of \w+", "", error["msg"])
        .replace("Input should be", "this should be")
        .replace("Tuple should", "this list should")
        .replace(" after validation", "")
        .replace("valid dictionary", "section of keys")
        .replace("valid tuple", "list")
    )
    if kind == "literal_error":
        message += did_you_mean(str(value), re.findall(r"'([^']*)'", error["ctx"]["expected"]))
    return _line(document, location, f"{message}, got {json.dumps(value)}" if not isinstance(value, dict) else message)


def _without(data: Any, location: Location) -> None:
    for key in location[:-1]:
        data = data.get(key, {})
    data.pop(location[-1], None)


def _within(inner: Location, outer: Location) -> bool:
    return len(inner) > len(outer) and inner[: len(outer)] == outer


def _validated(document: _Document) -> Recipe:
    """Validate, and report every problem of keys and between keys at once."""
    lines = list(document.problems)
    try:
        recipe: Recipe | None = Recipe.model_validate(document.data)
    except ValidationError as error:
        errors = error.errors()
        errors = [e for e in errors if e["type"] != "too_short" or not any(_within(o["loc"], e["loc"]) for o in errors)]
        lines += [_explain(document, e) for e in errors]
        remaining = copy.deepcopy(document.data) | {"name": "any"}  # no problem between keys concerns the name
        for e in errors:
            if e["loc"] == ("name",):
                continue
            _without(remaining, e["loc"][: next((i for i, key in enumerate(e["loc"]) if isinstance(key, int)), None)])
        try:
            recipe = Recipe.model_validate(remaining)
        except ValidationError:
            recipe = None
    between: Sequence[Problem] = list(recipe.problems()) if recipe else ()
    lines += [_line(document, location, message) for location, message in between]
    if lines or recipe is None:
        raise RecipeError(lines)
    known = DATASETS[recipe.data.dataset].num_classes
    return recipe.with_classes(known) if recipe.model.num_classes is None and known is not None else recipe


def parse_recipe(text: str, source: str, overrides: Sequence[str] = (), local: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe from text.

    Args:
        text: YAML 1.2.
        source: what errors call it.
        overrides: `section.key=value`, the value YAML; each beats the text.
        local: `section.key` and values that hold where the text says nothing.

    Raises:
        RecipeError: with every problem, each with its place.
        UsageError: for an override that is no assignment.
    """
    document = parse_yaml(text, source)
    if not isinstance(document.data, dict):
        raise RecipeError([f"{source}: a recipe is a mapping of keys, such as `name: digits`"])
    for path, value in (local or {}).items():
        *sections, key = path.split(".")
        part = document.data
        for section in sections:
            part = part.setdefault(section, {})
        part.setdefault(key, value)
    for assignment in overrides:
        _override(document, assignment)
    return _validated(document)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a file; see `parse_recipe`.

    Raises:
        UsageError: where there is no such file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(
            f"{path}: this recipe cannot be read ({reason}); `sdpctl recipe ls` lists those in ./recipes"
        ) from error
    return parse_recipe(text, str(path), overrides)


def dump_yaml(data: Any) -> str:
    """Write plain data as YAML that reads back the same."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    return text


class _Dumper(yaml.SafeDumper):
    """Writes floats and quotes texts so that YAML 1.2 and 1.1 both read back what was meant."""


def _float(dumper: _Dumper, value: float) -> yaml.ScalarNode:
    text = repr(value)
    if "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(float, _float)
for _tag, _pattern in (("int", _OCTAL), ("float", _FLOAT)):
    # Text that only YAML 1.2 reads as a number must be quoted.
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), list("-+.0123456789"))
