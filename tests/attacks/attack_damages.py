"""Damage a store, and ask it what was asked before: every answer is the one from before, or a documented failure.

Half of the damages are of bytes and files, as disks and people make them. Half are hostile documents: an index, a layout, a
manifest or a JSON layer that changed at random, with all digests and sizes mended, so that only the meaning is wrong.
"""

import copy
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from harness import Outcome, attack, run
from PIL import Image

RECIPE = """
name: tiny
model: {arch: resnet20, in_channels: 1}
data: {dataset: digits, image_size: 8, batch_size: 128, workers: 0}
sdpoint: {ratios: [0.5], points: [layer2.2]}
train: {epochs: 1, lr: 0.1, validate: {every: 0}}
calibrate: {batches: 1}
profile: {ratios: [0.5]}
"""

COMMANDS: dict[str, list[str]] = {
    "verify": ["store", "verify"],
    "ls": ["store", "ls", "--json"],
    "show": ["store", "show", "tiny.eval", "--json"],
    "gc": ["store", "gc", "--dry-run", "--json"],
    "eval": ["eval", "tiny", "--by-class", "--dry-run", "--json"],
    "predict": ["predict", "tiny", "--instance", "full", "--json", "digit.png"],
    "train": ["train", "tiny.yaml", "--dry-run", "--json"],
    "tag": ["store", "tag", "tiny", "more"],
    "collect": ["store", "gc", "--untagged", "--grace", "0"],
    "again": ["store", "verify"],
}

LONG = ("eval", "predict", "train")
"""Commands that load a network; each case runs one of them beside the quick ones."""


WRITING = ("tag", "collect", "again")
"""Commands that write, and a look at what they left."""


def build(folder: Path) -> dict[str, Any]:
    """Make the whole store, and return the answer of each command."""
    (folder / "tiny.yaml").write_text(RECIPE)
    Image.linear_gradient("L").resize((8, 8)).save(folder / "digit.png")
    made = run(["run", "tiny.yaml", "--store", "whole"], folder, limit=300)
    assert made.code == 0, made.err
    shutil.copytree(folder / "whole", folder / "store", symlinks=True)
    answers = {name: ask(name, folder) for name in COMMANDS if name not in WRITING}
    assert all(outcome.code == 0 for outcome in answers.values()), answers
    return {name: answer(name, outcome) for name, outcome in answers.items()}


def ask(name: str, folder: Path) -> Outcome:
    """Run a command on the store."""
    return run([*COMMANDS[name], "--store", "store"], folder)


def answer(name: str, outcome: Outcome) -> Any:
    """Return what a command says about content; digests, tags and times are of the index, which no hash protects."""
    if name == "verify":
        return None
    said = json.loads(outcome.out)
    keys = {"show": ("kind", "layers"), "eval": ("images", "rows"), "train": ("metrics",)}
    if name == "predict":
        return [{key: image[key] for key in ("file", "top")} for image in said["images"]]
    return {key: said.get(key) for key in keys[name]} if name in keys else said


# Damages of bytes and files


def blobs_of(store: Path) -> list[Path]:
    return sorted((store / "blobs" / "sha256").iterdir())


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    rewrite(path, bytes(content))


def truncate(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    rewrite(path, content[: rng.randrange(len(content) or 1)])


def empty(path: Path, _: random.Random) -> None:
    rewrite(path, b"")


def lengthen(path: Path, rng: random.Random) -> None:
    rewrite(path, path.read_bytes() + rng.randbytes(rng.choice((1, 5000))))


def delete(path: Path, _: random.Random) -> None:
    path.unlink()


def swap(path: Path, rng: random.Random) -> None:
    other = rng.choice([p for p in path.parent.iterdir() if p != path and p.is_file()])
    content = path.read_bytes()
    rewrite(path, other.read_bytes())
    rewrite(other, content)


def make_fifo(path: Path, _: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def make_folder(path: Path, _: random.Random) -> None:
    path.unlink()
    path.mkdir()


def link_to(target: str) -> Callable[[Path, random.Random], None]:
    def damage(path: Path, _: random.Random) -> None:
        path.unlink()
        path.symlink_to(target)

    damage.__name__ = f"link to {target}"
    return damage


def make_sparse(path: Path, _: random.Random) -> None:
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2**40)


DAMAGES = [flip, flip, truncate, empty, lengthen, delete, swap, make_fifo, make_folder, make_sparse]
DAMAGES += [link_to("/dev/zero"), link_to("nowhere"), link_to(".")]


def rewrite(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


# Hostile documents

TITLE = "org.opencontainers.image.title"
REF_NAME = "org.opencontainers.image.ref.name"

HOSTILE: list[Any] = [
    None, True, 0, -1, 1.5, -1e308, 2**63, 10**400, "", "x", "../../x", "/etc/passwd", "\x1b[31m", "a\nb", "a" * 5000, "\ud800",
    [], [[]], [None], {}, {"": ""}, {"a": {"b": []}}, "sha256:" + "0" * 64, "application/vnd.oci.image.index.v1+json",
    "application/vnd.sdpctl.checkpoint.v2+json", "full", "layer9.9@0.5", "layer2.2@1e-300", "tiny", "application/json",
]  # fmt: skip

RAW = [
    b"", b"\x00\xff", b"null", b"[]", b"{}", b"1", b'"text"', b"NaN", b"1e999", b"9" * 5000, b"[" * 100_000, b'{"a":' * 5000,
    b'{"schemaVersion": 2}', b'{"schemaVersion": 2, "manifests": {}}', b'{"schemaVersion": 2, "manifests": [[]]}',
    b"\xed\xa0\x80", b'{"schemaVersion": 2, "manifests": [], "annotations": [["a", "b"]]}', b"\xff\xfe{\x00}\x00",
    b'{"a": "\\ud800"}',
]  # fmt: skip


def places(document: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) of a document."""
    found: list[tuple[Any, Any]] = []
    waiting = [document]
    while waiting:
        container = waiting.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], dict | list):
                waiting.append(container[key])
    return found


def mutate(document: Any, rng: random.Random) -> Any:
    """Change a document at one to three random places."""
    document = json.loads(json.dumps(document))
    for _ in range(rng.randint(1, 3)):
        there = places(document)
        if not there:
            return copy.deepcopy(rng.choice(HOSTILE))
        container, key = rng.choice(there)
        match rng.randrange(6):
            case 0:
                del container[key]
            case 1:
                container[key] = [container[key]] * rng.choice((1, 2, 20))
            case 2:
                for _ in range(rng.choice((5, 70, 200))):
                    container[key] = {"a": container[key]}
            case 3:
                other, elsewhere = rng.choice(there)
                if elsewhere in (other if isinstance(other, dict) else range(len(other))):  # what was deleted is not
                    container[key] = json.loads(dump(other[elsewhere]))
            case _:
                container[key] = copy.deepcopy(rng.choice(HOSTILE))
    return document


def dump(document: Any) -> bytes:
    return json.dumps(document).encode()


def put(store: Path, content: bytes) -> dict[str, Any]:
    """Place a blob, and return what a descriptor says of it."""
    name = sha256(content).hexdigest()
    rewrite(store / "blobs" / "sha256" / name, content)
    return {"digest": f"sha256:{name}", "size": len(content)}


def hostile_file(store: Path, rng: random.Random) -> str:
    """Write a hostile index, layout or local.json."""
    path = store / rng.choice(["index.json"] * 8 + ["oci-layout", "local.json"])
    raw = rng.random() < 0.2
    rewrite(path, rng.choice(RAW) if raw else dump(mutate(json.loads(path.read_bytes()), rng)))
    return f"hostile {path.name}: {path.read_bytes()[:300]!r}"


def hostile_artifact(store: Path, rng: random.Random) -> str:
    """Change a manifest, or a layer with its manifest; the tag leads to the changed artifact."""
    index = json.loads((store / "index.json").read_bytes())
    entry = rng.choice([entry for entry in index["manifests"] if REF_NAME in entry["annotations"]])
    manifest = json.loads((store / "blobs" / "sha256" / entry["digest"][7:]).read_bytes())
    layers = [layer for layer in manifest["layers"] if layer["annotations"][TITLE].endswith((".json", ".jsonl"))]
    if layers and rng.random() < 0.5:
        layer = rng.choice(layers)
        lines = (store / "blobs" / "sha256" / layer["digest"][7:]).read_bytes().splitlines()
        number = rng.randrange(len(lines) or 1)
        changed = rng.choice(RAW) if not lines or rng.random() < 0.1 else dump(mutate(json.loads(lines[number]), rng))
        lines[number : number + 1] = [changed]
        layer |= put(store, b"\n".join(lines))
        content, what = dump(manifest), f"{layer['annotations'][TITLE]}: {changed[:300]!r}"
    else:
        content = rng.choice(RAW) if rng.random() < 0.1 else dump(mutate(manifest, rng))
        what = f"manifest: {content[:600]!r}"
    entry |= put(store, content)
    rewrite(store / "index.json", dump(index))
    return f"hostile {entry['annotations'][REF_NAME]}, {what}"


# Cases


def cases(seed: int, folder: Path) -> Iterator[list[str]]:
    """Yield for each damage what must not have happened."""
    answers = build(folder)
    store = folder / "store"
    number = 0
    while True:
        rng = random.Random(f"{seed} {number}")
        number += 1
        shutil.rmtree(store)
        shutil.copytree(folder / "whole", store, symlinks=True)
        asked = ["verify", "ls", "show", "gc", rng.choice(LONG), *WRITING]
        hostile = number % 2 == 0
        if hostile:
            what = rng.choice([hostile_file, hostile_artifact])(store, rng)
        else:
            files = [store / name for name in ("index.json", "index.json", "oci-layout", "local.json", "gc.lock", "index.lock")]
            path = rng.choice([*files, *blobs_of(store), *blobs_of(store)])
            damage = rng.choice(DAMAGES)
            damage(path, rng)
            what = f"{damage.__name__} of {path.relative_to(store)}"
        outcomes = {name: ask(name, folder) for name in asked}
        found = [f"{name}: {fault}" for name, outcome in outcomes.items() for fault in outcome.faults()]
        if outcomes["verify"].code == 0 and not what.endswith(".lock"):
            whole = ("ls", "gc", "collect", "again")
            found += [f"{name} fails, but verify says whole" for name in whole if outcomes[name].code]
        if not hostile:
            of_blob = path.parent.name == "sha256"
            if of_blob and outcomes["verify"].code != 5:
                found.append("verify does not see it")
            compared = [
                name
                for name in answers
                if name in outcomes and outcomes[name].code == 0 and not (path.name == "index.json" and name == "ls")
            ]
            for name in compared:
                said = answer(name, outcomes[name])
                if said != answers[name] and not json.loads(outcomes[name].out or "{}").get("dry_run"):
                    found.append(f"{name} answers differently: {outcomes[name].out[:300]}")
        yield [f"{what}: {fault}: {last_words(outcomes, fault)}" for fault in found]


def last_words(outcomes: dict[str, Outcome], fault: str) -> str:
    return outcomes[fault.split(":")[0].split()[0]].err.strip()[-400:]


if __name__ == "__main__":
    attack(cases, preload=["torch", "sdpctl.store", "sdpctl.prediction", "sdpctl.stages.run", "sdpctl.stages.opening"])
