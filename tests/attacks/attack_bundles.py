"""Hostile bundles and exports: what they say is mutated, and every hash is made anew, so that only their meaning is wrong.

The answer of a bundle that is still accepted must be the one of the untouched bundle. Nothing may be written but what was asked
for, and no command may take more memory than the files call for.
"""

import copy
import hashlib
import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness import attack, run
from PIL import Image

RECIPE = """
name: net
model: {arch: resnet20, in_channels: 1}
data: {dataset: digits, image_size: 8, batch_size: 128, workers: 0}
sdpoint: {ratios: [0.5], points: [stem, layer3.0]}
train: {epochs: 1, lr: 0.1}
calibrate: {batches: 2}
"""
MEMBERS = ("bundle.json", "card.md", "statistics.safetensors", "model.safetensors")
PEAK_KIB = 1_500_000
"""The most that a command may take; one that answers takes a third, nearly all of it torch."""

NESTED = "NESTED"
VALUES: list[Any] = [
    *(-1, 0, 1, 2, 3, 17, 10**8, 10**30, 1e308, 1e-320, 0.5, float("nan"), float("inf"), True, None),
    *("", "x", "full", "../../canary", "layer3.0@0.5", "stem@0.5", "layer9.9@0.5", "stem@1e-300", "all@0.5", "stem@nan"),
    *(
        "a" * 100_000,
        "\x1b[2J",
        "a\nb",
        "`<script>`",
        "\ud800",
        "\u202e",
        "stem@0." + "5" * 50,
        "twopipe",
        "preresnet50",
        "imagenet",
    ),
    *([], {}, [[]], ["a"], [None], [0], [float("nan")], {"full": ["bn1"]}, [1] * 10_000, NESTED),
]
TITLES = (
    "../canary",
    "../../canary",
    "/CANARY",
    "..",
    ".",
    "",
    "model.onnx/x",
    "a\x00b",
    "x" * 300,
    "card.md",
    "\x1b[31m",
    "bundle.json",
)

Files = dict[str, bytes]


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value of a document."""
    items = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def mutated_json(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Return a document with one value changed, and where."""
    document = json.loads(content)
    *way, key = path = draw.choice(list(places(document)))
    parent = document
    for step in way:
        parent = parent[step]
    kind = draw.choice(["value"] * 6 + ["delete", "extra", "twice", "text", "nudge", "key", "whole"])
    if kind == "value":
        parent[key] = copy.deepcopy(draw.choice(VALUES))
    elif kind == "delete":
        del parent[key]
    elif kind == "extra" and isinstance(parent, dict):
        parent[draw.choice(["licence", "", "\x1b[0m", "__class__"])] = draw.choice(VALUES)
    elif kind == "twice" and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[key]))
    elif kind == "text":
        parent[key] = str(parent[key])
    elif kind == "nudge" and isinstance(parent[key], int | float):
        parent[key] = parent[key] * draw.choice([-1, 2, 1000, 10**12])
    elif kind == "key" and isinstance(parent, dict):
        parent[draw.choice([text for text in VALUES if isinstance(text, str)])] = parent.pop(key)
    else:
        other = draw.choice(
            [b"", b"[]", b"{}", b"null", b"7", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 5000, b"1" * 6000, content[:-9]]
        )
        return other, "whole"
    deep = "[" * 200 + "]" * 200
    return json.dumps(document).replace(f'"{NESTED}"', deep).encode(), ".".join(map(str, path))


def mutated_tensors(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Return a safetensors file whose header or values are changed, and what was."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = draw.choice([name for name in header if name != "__metadata__"])
    entry, kinds = (
        header[name],
        ["dtype", "shape", "offsets", "delete", "extra", "rename", "length", "cut", "longer", "nan", "whole"],
    )
    kind = draw.choice(kinds)
    if kind == "dtype":
        entry["dtype"] = draw.choice(["F64", "F16", "BF16", "I32", "F8_E8M0", "F4", "X", "", 7, None, ["F32"]])
    elif kind == "shape":
        other = (
            [*entry["shape"], 1],
            [*entry["shape"][::-1], 2],
            [-1],
            [10**18],
            [2**64],
            [],
            "x",
            None,
            [1.5],
            [[1]],
            [0, 2**62],
        )
        entry["shape"] = draw.choice(other)
    elif kind == "offsets":
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = draw.choice(
            [[0, end - begin], [begin, end + 4], [end, begin], [begin, 2**63], [-4, 0], [0], "x", None]
        )
    elif kind == "delete":
        del header[name]
    elif kind == "extra":
        header[draw.choice(["extra", "\x1b[0m", "a" * 10_000])] = {
            "dtype": "F32",
            "shape": [0],
            "data_offsets": [len(data)] * 2,
        }
    elif kind == "rename":
        header[draw.choice(["extra", "conv1.weight", "full/bn1.running_mean"])] = header.pop(name)
    elif kind == "cut":
        return content[: draw.choice([0, 3, 8, 9, 8 + length, len(content) - 1, len(content) // 2])], kind
    elif kind == "longer":
        return content + bytes(draw.choice([1, 4, 10**6])), kind
    elif kind == "nan":
        begin, end = entry["data_offsets"]
        bad = draw.choice([b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff"])  # NaN, minus infinity
        data = data[:begin] + bad * ((end - begin) // 4) + data[begin + (end - begin) // 4 * 4 :]
    elif kind == "whole":
        return draw.choice(
            [b"", b"{}", draw.randbytes(1000), b"\xff" * 100, b"[" * 100_000, (2**63).to_bytes(8, "little")]
        ), kind
    written = json.dumps(header).encode()
    size = draw.choice([0, 1, length * 2, 2**40, 2**64 - 1]) if kind == "length" else len(written)
    return size.to_bytes(8, "little") + written + data, f"{kind} of {name}"


def mutate(name: str, content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Return a changed file, and what was changed."""
    if name.endswith(".safetensors"):
        return mutated_tensors(content, draw)
    if name.endswith(".json"):
        return mutated_json(content, draw)
    return draw.choice([b"", b"\xff\xfe", b"name: [", content + content, draw.randbytes(300)]), "whole"


def replace_member(path: Path, draw: random.Random) -> str:
    """Put something that is not a regular file, or is a huge one, in a file's place; return what."""
    kind = draw.choice(["FIFO", "/dev/zero", "/dev/null", "folder", "loop", "missing", "sparse", "dangling"])
    path.unlink()
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        path.touch()
        os.truncate(path, 40 * 2**30)
    elif kind != "missing":
        path.symlink_to({"loop": path.name, "dangling": "nowhere"}.get(kind, kind))
    return kind


def summed(folder: Path) -> None:
    """Write the hashes that belong to the files of a bundle."""
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in MEMBERS]
    (folder / "SHA256SUMS").write_text("".join(lines))


class Layout:
    """A store whose artifacts are changed, every digest with them."""

    def __init__(self, path: Path) -> None:
        self.path, self.blobs = path, path / "blobs" / "sha256"
        self.index = json.loads((path / "index.json").read_bytes())
        self.moved: dict[str, dict[str, Any]] = {}

    def put(self, content: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        if not (self.blobs / digest).exists():
            (self.blobs / digest).write_bytes(content)
        return {"digest": f"sha256:{digest}", "size": len(content)}

    def read(self, descriptor: dict[str, Any]) -> bytes:
        return (self.blobs / descriptor["digest"].removeprefix("sha256:")).read_bytes()

    def change(self, kind: str, change: Callable[[list[tuple[str, bytes]]], None]) -> None:
        """Change the layers, (title, content), of each artifact of a kind, and the subjects of what is made from them."""
        for entry in self.index["manifests"]:
            before, manifest = entry["digest"], json.loads(self.read(entry))
            if f".{kind}." in manifest["artifactType"]:
                title = "org.opencontainers.image.title"
                layers = [(layer["annotations"][title], self.read(layer)) for layer in manifest["layers"]]
                change(layers)
                manifest["layers"] = [
                    {"mediaType": "application/x", **self.put(content), "annotations": {title: name}}
                    for name, content in layers
                ]
            if (subject := manifest.get("subject")) and subject["digest"] in self.moved:
                subject |= self.moved[subject["digest"]]
            self.moved[before] = self.put(json.dumps(manifest).encode())
            entry |= self.moved[before]
        (self.path / "index.json").write_text(json.dumps(self.index))


class Attack:
    """The untouched network, and what is done with copies of it.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.case = folder, folder / "case"
        (folder / "recipe.yaml").write_text(RECIPE)
        Image.linear_gradient("L").resize((20, 16)).save(folder / "image.png")
        self.tags = {}
        choose = ["search", "net", "--cascade", "--max-macs", "99%"]
        for words in (["train", "recipe.yaml"], choose, ["export", "net", "--format", "bundle"], ["export", "net"]):
            done = run([*words, "--json"], folder, limit=300)
            assert done.code == 0, done.err
            self.tags[words[-1]] = json.loads(done.out)["tag"]
        self.answers = {text: self.answer(folder, "net.bundle", "--instance", text) for text in self.instances()}
        assert self.answer(folder, "net.bundle", "--cascade")

    def instances(self) -> list[str]:
        document = json.loads((self.folder / "net.bundle" / "bundle.json").read_bytes())
        return [option["instance"] for option in document["options"]]

    def answer(self, folder: Path, ref: str, *words: str) -> list[float]:
        done = run(["predict", ref, self.folder / "image.png", "--json", *words], folder, limit=60)
        assert done.code == 0, done.err
        return shares(json.loads(done.out))

    def bundle(self, draw: random.Random) -> list[str]:
        """Predict with a hostile bundle."""
        bundle = self.case / "b"
        shutil.copytree(self.folder / "net.bundle", bundle)
        name = draw.choice([*MEMBERS[:1] * 6, *MEMBERS[2:] * 3, "SHA256SUMS", "replaced"])
        if name == "replaced":
            name = draw.choice([*MEMBERS, "SHA256SUMS"])
            what = replace_member(bundle / name, draw)
        else:
            content, what = mutate(name, (bundle / name).read_bytes(), draw)
            (bundle / name).write_bytes(content)
            if name != "SHA256SUMS":
                summed(bundle)
        return self.predicted("b", f"{name}: {what}")

    def store(self, draw: random.Random) -> list[str]:
        """Export, or predict with, what a hostile store holds."""
        shutil.copytree(self.folder / ".sdpctl", self.case / ".sdpctl")
        kind = draw.choice(["export", "export", "export", "checkpoint", "bn-statistics", "evaluation", "cascade", "cascade"])
        said: list[str] = []

        def change(layers: list[tuple[str, bytes]]) -> None:
            number = draw.randrange(len(layers))
            title, content = layers[number]
            way = draw.choice(["content", "content", "title", "delete", "extra"])
            if way == "content":
                content, what = mutate(title, content, draw)
                layers[number] = title, content
            elif way == "delete":
                what = str(layers.pop(number)[0])
            else:
                what = draw.choice(TITLES).replace("CANARY", str(self.case / "canary").lstrip("/"))
                layers[number if way == "title" else len(layers) :] = [(what, content)]
            said.append(f"{way} of {kind} {title}: {what[:60]!r}")

        Layout(self.case / ".sdpctl").change(kind, change)
        form = draw.choice(["bundle", "net"])
        if kind == "export" and (form == "net" or draw.random() < 0.5):
            return self.exported(self.tags[form], ", ".join(said))
        return self.predicted(self.tags["bundle"] if kind == "export" else "net", ", ".join(said))

    def exported(self, tag: str, what: str) -> list[str]:
        done = run(["export", tag, "--force", "--store", "../.sdpctl"], self.case / "work")
        found = [f"export, {what}: {fault}: {done.err[-300:]}" for fault in done.faults()]
        written = {path.name for path in (self.case / "work").iterdir()} - {"net.onnx", "net.onnx.md", "net.bundle"}
        if written or (done.code and any((self.case / "work").iterdir())):
            found.append(f"export, {what}: wrote {sorted(written)} with exit code {done.code}")
        return found

    def predicted(self, ref: str, what: str) -> list[str]:
        if "cascade" in what:
            done = run(["predict", ref, self.folder / "image.png", "--json", "--cascade"], self.case)
            return [f"predict --cascade, {what}: {fault}: {done.err[-300:]}" for fault in done.faults()]
        done = run(["predict", ref, self.folder / "image.png", "--json"], self.case)
        found = [f"predict, {what}: {fault}: {done.err[-300:]}" for fault in done.faults()]
        if done.code == 0 and not any(part in what for part in ("input.", "recipe.yaml")):
            document = json.loads(done.out)
            wanted = self.answers.get(document["instance"])
            if wanted is None or max(abs(a - b) for a, b in zip(shares(document), wanted, strict=True)) > 1e-6:
                found.append(f"predict, {what}: a different answer, {document}")
        return found

    def cases(self, seed: int) -> Iterator[list[str]]:
        number = 0
        while True:
            draw = random.Random(seed * 10**6 + number)
            number += 1
            shutil.rmtree(self.case, ignore_errors=True)
            (self.case / "work").mkdir(parents=True)
            (self.case / "canary").write_text("alive")
            outside = set(self.folder.parent.iterdir())
            found = (self.bundle if draw.random() < 0.7 else self.store)(draw)
            if (self.case / "canary").read_text() != "alive" or set(self.folder.parent.iterdir()) != outside:
                found.append("something was written outside")
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            if peak > PEAK_KIB:
                found.append(f"a command took {peak:,} KiB")
            yield found


def shares(document: dict[str, Any]) -> list[float]:
    """Return the probabilities of an answer."""
    return [likely["probability"] for image in document["images"] for likely in image["top"]]


def cases(seed: int, folder: Path) -> Iterator[list[str]]:
    inner = folder / "inner"
    inner.mkdir()
    yield from Attack(inner).cases(seed)


if __name__ == "__main__":
    attack(cases, preload=["sdpctl.prediction", "sdpctl.runtime", "sdpctl.stages.export", "sdpctl.stages.train"])
