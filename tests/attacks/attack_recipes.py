"""Mutate the shipped recipes and what is set for them, and let the command line read them.

Each must be refused in lines that can be read, or mean what YAML 1.2 says; what `recipe show` prints must mean the same again.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from harness import Outcome, attack, run

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
SCHEMA = json.loads((FOLDER / "schema.json").read_text(encoding="utf-8"))


def keys(section: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """Yield the dotted keys of a section of the schema, and of the sections in it."""
    for name, info in section["properties"].items():
        yield before + name
        for option in (info, *info.get("anyOf", ())):
            if "$ref" in option:
                yield from keys(SCHEMA["$defs"][option["$ref"].rpartition("/")[2]], f"{before}{name}.")


KEYS = (*keys(SCHEMA), "search.ratios_at.stem")

VALUES: dict[str, Any] = {
    "0": 0,
    "1": 1,
    "-1": -1,
    "-0": 0,
    "+7": 7,
    "007": 7,
    "0o17": 15,
    "0x1F": 31,
    "10": 10,
    "12": 12,
    "64": 64,
    "9" * 19: 10**19 - 1,
    "9" * 30: 10**30 - 1,
    str(2**63): 2**63,
    str(2**64): 2**64,
    "1_000": "1_000",
    "0b11": "0b11",
    "0.5": 0.5,
    ".5": 0.5,
    "5.": 5.0,
    "1e-4": 1e-4,
    "1E3": 1000.0,
    "1e22": 1e22,
    "5e-324": 5e-324,
    "-0.0": -0.0,
    "null": None,
    "~": None,
    "true": True,
    "FALSE": False,
    "no": "no",
    "yes": "yes",
    "on": "on",
    "off": "off",
    "'12'": "12",
    '"1e-4"': "1e-4",
    "'it''s'": "it's",
    "2024-01-01": "2024-01-01",
    "12:30": "12:30",
    "=": "=",
    '"\\u00fc"': "ü",
    "10%": "10%",
    "stem@0.5": "stem@0.5",
    "full": "full",
    "[full, 'stem@0.5']": ["full", "stem@0.5"],
    "[0.5, 0.75]": [0.5, 0.75],
    "[1, 0.5]": [1, 0.5],
    "[stem]": ["stem"],
    "[]": [],
    "[5, 0x8]": [5, 8],
}
"""Values as they are written, and what YAML 1.2 says they are."""

HOSTILE = (
    *("1e999", "-1e999", "1e-999", ".inf", "-.inf", ".nan", "9" * 5000, "0x" + "f" * 5000, "0o" + "7" * 5000),
    *("1" + "0" * 400, "0." + "0" * 400 + "1", "1e" + "9" * 400, "99" * 60 + "%", "1e400%", "nan%", "9" * 400 + "GiB", "2.GiB"),
    *('"\\UFFFFFFFF"', '"\\ud800"', '"\\0"', '"\\e[31m"', '"\\n"', "'\x1b'", "\x00", "\x85", "\u2028", "\ufeff", "\u202e"),
    *("!!python/object/apply:os.system [echo]", "!!binary aGk=", "!x y", "!!int '3'", "!!set {a}", "!!float nan", "*nowhere"),
    *("&a [*a]", "&a {<<: *a}", "<<: 3", "{<<: [1]}", "{a: {b: {c: 1}}}", "[" * 450 + "]" * 450, "{a: " * 450 + "}" * 450),
    *("? [a]", "{? [a] : b}", "{1: 2}", "{~: 2}", "{'': 2}", "[[]]", "[{}]", "{}", '"unclosed', "'", "|\n  text", ">\n  a"),
    *("layer\u00b2@0.5", "layer" + "1" * 5000 + "@0.5", "stem@nan", "stem@1e-400", "layer1.0@0_5", "@", "%", "é" * 300),
    *("+".join(["stem@0.5"] * 50), "/dev/zero", "~nosuch/x", "a" * 300, "a/" * 3000, "x" * 100_000, "a\\b", "0.5,0.75"),
    *("postgresql://u:p@h/x", "sqlite:////dev/zero", "stem,layer2.0", "all,", ","),
)

TOKENS = (
    *":{}[],&*#?|-<>=!%@`'\"\\~\n\t ",
    "<<: ",
    "- ",
    "---\n",
    "...\n",
    "x-a: &a ",
    "*a",
    ": ",
    "\r\n",
    "\x00",
    "\xff",
    "😀",
)


def byte_flips(text: str, draw: random.Random) -> bytes:
    """Change some bytes."""
    content = bytearray(text.encode())
    for _ in range(draw.randint(1, 6)):
        content[draw.randrange(len(content))] = draw.choice((draw.randrange(256), draw.randrange(32, 127)))
    return bytes(content)


def tokens(text: str, draw: random.Random) -> bytes:
    """Insert, remove, repeat or move parts of the text."""
    for _ in range(draw.randint(1, 4)):
        at, length = draw.randrange(len(text) + 1), draw.randint(1, 12)
        part, without = text[at : at + length], text[:at] + text[at + length :]
        to = draw.randrange(len(without) + 1)
        inserted, repeated = draw.choice(TOKENS), part * 3
        moved = without[:to] + part + without[to:]
        text = draw.choice((text[:at] + inserted + text[at:], without, text[:at] + repeated + text[at:], moved))
    return text.encode()


def lines(text: str, draw: random.Random) -> bytes:
    """Remove, repeat, exchange and indent lines: keys move between sections."""
    rows = [row for row in text.splitlines() if not row.startswith("#")]
    for _ in range(draw.randint(1, 3)):
        i, j = draw.randrange(len(rows)), draw.randrange(len(rows))
        match draw.randrange(4):
            case 0 if len(rows) > 2:
                del rows[i]
            case 1:
                rows.insert(j, rows[i])
            case 2:
                rows[i], rows[j] = rows[j], rows[i]
            case _:
                rows[i] = " " * draw.randint(1, 3) + rows[i]
    return ("\n".join(rows) + "\n").encode()


def encodings(text: str, draw: random.Random) -> bytes:
    """Write the text in a different encoding, or with different line ends."""
    encoding = draw.choice(("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252"))
    ends = draw.choice(("\n", "\r\n", "\r", "\n\n"))
    content = text.replace("#", "# Größe", 1).replace("\n", ends).encode(encoding)
    return content if draw.random() < 0.7 else content[: draw.randrange(len(content))]


def anchors(text: str, draw: random.Random) -> bytes:
    """Add anchors, aliases and merge keys, few or far too many."""
    count, width = draw.choice(((2, 2), (3, 3), (12, 9), (400, 1), (40, 9)))
    form = draw.choice(("[{}]", "{{<<: [{}]}}", "{{a: [{}]}}"))
    rows = [f"x-a0: &a0 {draw.choice(('[1, 2]', '{epochs: 2}', 'x', '{lr: 0.2, <<: {epochs: 3}}'))}"]
    rows += [f"x-a{i}: &a{i} {form.format(', '.join([f'*a{i - 1}'] * width))}" for i in range(1, count)]
    some, last = f"*a{draw.randrange(count)}", f"*a{count - 1}"
    use = draw.choice(("", f"train: {{<<: {some}}}\n", f"train:\n  <<: [*a0, {last}]\n", "<<: *a0\n"))
    kept = [row for row in text.splitlines() if not (use.startswith("train") and row.startswith("train"))]
    return ("\n".join([*rows, *kept]) + "\n" + use).encode()


def nesting(text: str, draw: random.Random) -> bytes:
    """Add a deep or long value."""
    opened, closed = draw.choice((("[", "]"), ("{a: ", "}"), ("- ", ""), ("? ", ""), ("[{a: ", "}]"), ("\n- ", "")))
    depth = draw.choice((3, 30, 63, 65, 450, 20_000))
    key = draw.choice(("x-a", "extra", *SCHEMA["properties"]))
    return f"{text}{key}: {opened * depth}1{closed * draw.choice((depth, depth - 1))}\n".encode()


def damage(text: str, draw: random.Random) -> bytes:
    """Cut, double or join texts, or write something that was never a recipe."""
    other = draw.choice(RECIPES).read_text(encoding="utf-8")
    plain = {"name": "a", "model": {"arch": "resnet20"}, "data": {"dataset": "digits"}}
    whole = (
        text[: draw.randrange(len(text))],
        text + other,
        f"{text}---\n{other}",
        json.dumps(plain),
        json.dumps(plain, indent=2),
    )
    large = text.encode() + b"#" * draw.choice((2**19, 2**20, 2**21))
    return draw.choice((*(part.encode() for part in whole), large, draw.randbytes(draw.randint(0, 3000)), b"PK\x03\x04\0", b""))


MUTATIONS: tuple[Callable[[str, random.Random], bytes], ...]
MUTATIONS = (byte_flips, tokens, tokens, lines, encodings, anchors, nesting, damage)


def with_value(text: str, key: str, value: str) -> str:
    """Return the recipe with another value at a key; its section keeps what else stands there on one line."""
    top, *below = key.split(".")
    kept, inner = [], ""
    for row in text.splitlines():
        if not row.startswith(f"{top}:"):
            kept.append(row)
        elif len(below) == 1 and row.endswith("}") and f"{below[0]}:" not in row:
            inner = f", {row[row.index('{') + 1 : -1]}"
    for name in reversed(below):
        value, inner = f"{{{name}: {value}{inner}}}", ""
    return "\n".join([*kept, f"{top}: {value}"]) + "\n"


def canonical(recipe: Mapping[str, Any]) -> str:
    """Return the recipe as text that tells 1 from 1.0."""
    return json.dumps(recipe, sort_keys=True)


def shown(recipe: Mapping[str, Any], key: str) -> Any:
    """Return the value that a recipe has at a key; None where it has none."""
    part: Any = recipe
    for name in key.split("."):
        part = part.get(name) if isinstance(part, dict) else None
    return part


def agrees(there: Any, said: Any, key: str) -> bool:
    """Say whether a value that is shown is the one that was said."""
    if isinstance(said, str) and said.endswith("%") and isinstance(there, float):
        return there == float(said[:-1]) / 100
    if key.endswith("max_macs") and isinstance(said, int | float):
        return bool(there == (f"{said:.0f}" if isinstance(said, float) else str(said)))
    if said is None:  # a default stands there, or nothing
        return True
    if isinstance(said, bool) or isinstance(there, bool):
        return there is said
    if isinstance(there, list) and not isinstance(said, list):  # where a list is expected, --set takes a single value
        return bool(there == [said])
    if isinstance(there, float) and isinstance(said, int):  # the nearest double-precision number
        return there == float(said)
    return bool(there == said)


def judged(path: Path, words: list[str], key: str = "", said: Any = None) -> Iterator[str]:
    """Run the commands that read a recipe, and yield what went wrong."""
    folder = path.parent
    show = run(["recipe", "show", path.name, *words, "--json"], folder)
    outcomes = [show]
    if show.code == 0:
        recipe = json.loads(show.out)["recipe"]
        plain = run(["recipe", "show", path.name, *words], folder)
        (folder / "again.yaml").write_text(plain.out, encoding="utf-8")
        again = run(["recipe", "show", "again.yaml", "--json"], folder)
        outcomes += [plain, again]
        if again.code or canonical(json.loads(again.out)["recipe"]) != canonical(recipe):
            yield f"does not read back the same: {again.err[:300]!r}"
        if key and not agrees(shown(recipe, key), said, key):
            yield f"{key} is {said!r}, and is shown as {shown(recipe, key)!r}"
        outcomes += [run([command, path.name, *words, "--dry-run"], folder) for command in ("profile-flops", "run")]
        if recipe["data"]["dataset"] != "digits" and outcomes[-1].code not in (2, 7):
            yield f"run without its data ends with {outcomes[-1].code}"
    for outcome in outcomes:
        yield from (f"{outcome.arguments[0]}: {fault}: {outcome.err[-300:]!r}" for fault in faults(outcome, path))


def faults(outcome: Outcome, path: Path) -> list[str]:
    """Return what must not happen when a recipe is read."""
    named = "init" in " ".join(outcome.arguments) + path.read_text(encoding="utf-8", errors="replace")
    # a checkpoint that is named is looked for in a store; the plan of a search knows whether its budget can be met
    found = outcome.faults({0, 2, 3, 7, 8} | ({4, 5} if named else set()))
    said = outcome.err.splitlines() if outcome.code else []
    found += [f"a line that cannot be read: {line[:300]!r}" for line in said if len(line) > 2000 or not line.isprintable()]
    if outcome.code == 3:
        found += [f"a line without its place: {line!r}" for line in said if path.name not in line and "--set" not in line]
    return found


def cases(seed: int, folder: Path) -> Iterator[list[str]]:
    """Mutate without end."""
    draw, path = random.Random(seed), folder / "mutant.yaml"
    while True:
        source = draw.choice(RECIPES)
        text = source.read_text(encoding="utf-8")
        kind = draw.choice(("mutation", "mutation", "value", "hostile", "value set", "hostile set"))
        key, said, words = draw.choice(KEYS), None, list[str]()
        if kind == "mutation":
            mutate = draw.choice(MUTATIONS)
            content, kind, key = mutate(text, draw), mutate.__name__, ""
        else:
            value = draw.choice(HOSTILE if "hostile" in kind else tuple(VALUES))
            said = VALUES.get(value)
            content = text.encode() if "set" in kind else with_value(text, key, value).encode()
            if "set" in kind:
                words = ["--set", f"{key}={value}".replace("\0", "")]  # which no argument can hold
        path.write_bytes(content)
        begin = f"{source.name}, {kind} {key} {str(words)[:200]}"
        yield [f"{begin}: {fault}; the file ends with {content[-400:]!r}" for fault in judged(path, words, key, said)]


if __name__ == "__main__":
    modules = ("sklearn.datasets", "sdpctl.recipe.load", "sdpctl.models", "sdpctl.stages.run", "sdpctl.data.loader")
    attack(cases, preload=["torch", *modules])
