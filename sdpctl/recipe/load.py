"""Read recipes: YAML within limits, overrides, and errors with their place."""

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import islice
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from sdpctl.data.catalog import DATASETS
from sdpctl.errors import RecipeError, UsageError, did_you_mean, shortened, shown
from sdpctl.export.settings import SEVERAL
from sdpctl.recipe.document import BYTES, FLOAT, OCTAL, Document, decode, dotted, parse_yaml
from sdpctl.recipe.schema import Location, Problem, Recipe, recipe_type
from sdpctl.untrusted import DEPTH, open_regular, printable

EXTENSION = "x-"
"""Prefix of top-level keys that only hold anchors for merge keys and aliases; their values are not read."""

_MOST_PROBLEMS = 20
"""Maximum number of problems in one error."""


def _override(document: Document, assignment: str) -> None:
    path, equals, text = assignment.partition("=")
    location = tuple(path.split("."))
    without_password = re.sub(r"(://[^@:]*:).*(?=@)|(?<=password=)[^&]*", r"\1***", f"--set {assignment}")
    place = shortened(printable(without_password), 200)
    if not equals or not path.isprintable() or not all(location) or len(location) > DEPTH:
        raise UsageError(f"{place}: write --set section.key=value, for example --set train.epochs=5")
    parsed = _parsed(text, place, location)
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


def _parsed(text: str, place: str, location: Location) -> Document:
    """Read the value of an override; if the key takes a list, `a,b` is read as `[a, b]`."""
    parsed = parse_yaml(text, place)
    value = parsed.data
    scalar = isinstance(value, str | int | float) and not isinstance(value, bool) and value not in SEVERAL
    if scalar and any(get_origin(kind) is tuple for kind in _kinds(location)):
        return parse_yaml(f"[{text}\n]", place)
    return parsed


def _kinds(location: Location) -> list[Any]:
    """Return the types that the schema allows at a location."""
    kinds: list[Any] = [recipe_type()]
    for key in location:
        below: list[Any] = []
        for kind in kinds:
            if (keys := _keys(kind)) is not None:
                below += [keys[key]] if key in keys else []
            elif get_origin(kind) is dict:
                below.append(get_args(kind)[1])
        kinds = [kind for annotation in below for kind in _alternatives(annotation)]
    return kinds


def _keys(kind: Any) -> dict[str, Any] | None:
    """Return the keys of a section and the type of each; None if the type is not a section."""
    if isinstance(kind, type) and issubclass(kind, Recipe):
        return {name: info.annotation for name, info in kind.model_fields.items()}
    return {field.name: field.type for field in fields(kind)} if is_dataclass(kind) else None


def _alternatives(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for alternative in get_args(annotation):
            yield from _alternatives(alternative)
    else:
        yield annotation


def _line(document: Document, location: Location, message: str, *, of_key: bool = False) -> str:
    return f"{document.place(location, of_key=of_key)}: {dotted(location)}{shortened(printable(message), 1000)}"


def _explain(document: Document, error: Mapping[str, Any]) -> str:
    location: Location = error["loc"]
    kind, value = error["type"], error["input"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):  # of the recipe itself, and of a section
        known = [key for section in _kinds(location[:-1]) for key in _keys(section) or ()]
        hint = did_you_mean(str(location[-1]), known) or f"; known here: {', '.join(known)}"
        if len(location) == 1 and document.values.get(location) in document.anchored:
            hint += f"; a key that only holds anchors begins with {EXTENSION}"
        return _line(document, location, f"unknown key{hint}", of_key=True)
    if kind == "missing":
        return _line(document, location, "this key is required")
    if kind == "value_error":
        return _line(document, location, str(error["ctx"]["error"]))
    if kind == "string_pattern_mismatch":
        wanted = {
            "name": "is not a name: use letters, digits, '-' and '_'; it becomes the tag",
            "device": "is not a device: use auto, cpu, cuda or cuda:N",
        }
        return _line(document, location, f"{shown(value)} {wanted[str(location[-1])]}")
    if kind in ("byte_size", "byte_size_unit"):
        return _line(document, location, f"{shown(value)} is not a size: use 2GiB, 512MB or a number of bytes")
    message = (
        re.sub(r"dictionary or an instance of \w+", "section of keys", error["msg"])
        .replace("Input should be", "this should be")
        .replace("Tuple should", "this list should")
        .replace("String should", "this should")
        .replace(" after validation", "")
        .replace("valid dictionary", "section of keys")
        .replace("valid tuple", "list")
    )
    if kind == "literal_error":
        message += did_you_mean(str(value), re.findall(r"'([^']*)'", error["ctx"]["expected"]))
    got = f", got {shortened(json.dumps(value, ensure_ascii=False))}" if not isinstance(value, dict) else ""
    return _line(document, location, message + got)


def _without(data: dict[str, Any], location: Location) -> None:
    """Remove a value, or the innermost value around it: the location of a mistake may go on beyond the value."""
    *sections, key = location
    for section in sections:
        inner = data.get(str(section))
        if not isinstance(inner, dict):
            key = section
            break
        data = inner
    data.pop(str(key), None)


def _within(inner: Location, outer: Location) -> bool:
    return len(inner) > len(outer) and inner[: len(outer)] == outer


def _validated(document: Document) -> Recipe:
    """Validate a document, and report the problems of single keys and between keys together."""
    lines = list(document.problems)
    try:
        recipe: Recipe | None = recipe_type().model_validate(document.data)
    except ValidationError as error:
        errors = error.errors()
        errors = [e for e in errors if e["type"] != "too_short" or not any(_within(o["loc"], e["loc"]) for o in errors)]
        lines += [_explain(document, e) for e in errors[: _MOST_PROBLEMS + 1]]
        remaining = copy.deepcopy(document.data) | {"name": "any"}  # no problem between keys concerns the name
        for e in errors:
            if e["loc"] == ("name",):
                continue
            _without(remaining, e["loc"][: next((i for i, key in enumerate(e["loc"]) if isinstance(key, int)), None)])
        try:
            recipe = recipe_type().model_validate(remaining)
        except ValidationError:
            recipe = None
    between: Iterator[Problem] = islice(recipe.problems(), _MOST_PROBLEMS + 1) if recipe else iter(())
    lines += [_line(document, location, message) for location, message in between]
    if len(lines) > _MOST_PROBLEMS:
        lines[_MOST_PROBLEMS:] = [f"{document.source}: there are more problems; solve these first"]
    if lines or recipe is None:
        raise RecipeError(lines)
    known = DATASETS[recipe.data.dataset].num_classes
    return recipe.changed(model={"num_classes": known}) if recipe.model.num_classes is None and known is not None else recipe


def parse_recipe(text: str, source: str, overrides: Sequence[str] = (), local: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe from text.

    Args:
        text: YAML 1.2.
        source: name of the text in errors.
        overrides: `section.key=value` with a YAML value; overrides take precedence over the text.
        local: values by `section.key`, for keys that the text does not set.

    Raises:
        RecipeError: if the recipe is not valid; the error lists every problem with its place.
        UsageError: if an override is not an assignment.
    """
    document = parse_yaml(text, source)
    document.data = {} if document.data is None else document.data
    if not isinstance(document.data, dict):
        raise RecipeError([f"{source}: a recipe is a mapping of keys, such as `name: digits`"])
    for key in [key for key in document.data if key.startswith(EXTENSION)]:
        del document.data[key]
    for path, value in (local or {}).items():
        *sections, key = path.split(".")
        part = document.data
        for section in sections:
            part = part.setdefault(section, {}) if isinstance(part, dict) else None
        if isinstance(part, dict):  # anything else is reported by `_validated`
            part.setdefault(key, value)
    for assignment in overrides:
        _override(document, assignment)
    return _validated(document)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a file; see `parse_recipe`.

    Raises:
        UsageError: if the file cannot be read.
    """
    source = printable(str(path))
    try:
        with open_regular(path) as file:
            content = file.read(BYTES + 1)
    except OSError as error:
        raise UsageError(
            f"{source}: this recipe cannot be read ({error.strerror}); `sdpctl recipe ls` lists the recipes in ./recipes"
        ) from error
    return parse_recipe(decode(content, source), source, overrides)


def dump_yaml(data: Any) -> str:
    """Return plain data as YAML that is read back as the same data."""
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
for _tag, _pattern in (("int", OCTAL), ("float", FLOAT)):
    # Text that only YAML 1.2 reads as a number must be quoted.
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), list("-+.0123456789"))
