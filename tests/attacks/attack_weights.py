"""Files of weights that are damaged, or made to hurt whoever imports them."""

import json
import os
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from harness import attack, run
from safetensors.torch import save_file

from sdpctl.models import create_model

SOUND = create_model("resnet20", num_classes=10, in_channels=1).state_dict()
with torch.device("meta"):
    create_model("resnet20")  # loads what torch needs for it, once for all children


def mutated(random_: random.Random, folder: Path) -> str:
    """Write one hostile file, and return its name."""
    state = {name: tensor.clone() for name, tensor in SOUND.items()}
    name = random_.choice(list(state))
    kind = random_.choice(["flip", "cut", "expand", "names", "nested", "types", "header", "packed", "special"])
    path = folder / random_.choice(["w.pth", "w.safetensors"])
    path.unlink(missing_ok=True)
    if kind == "expand":
        state[name] = torch.zeros(1).expand(*(random_.choice([0, 1, 7, 1 << 15]) for _ in range(random_.randint(1, 4))))
        path = path.with_suffix(".pth")
    elif kind == "names":
        words = ["module.", "_orig_mod.", "ema.", "\x1b[2J", "\n", "." * random_.randint(1, 9999), "\u202e", "fc.", "shortcut."]
        prefix = "".join(random_.choices(words, k=random_.randint(1, 4)))
        state = {prefix + key if random_.random() < 0.9 else key: tensor for key, tensor in state.items()}
    elif kind == "types":
        types = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64]
        weight = random_.choice([key for key, tensor in state.items() if tensor.is_floating_point()])
        state[weight].fill_(random_.choice([float("nan"), float("inf"), 3e38, 0.0]))
        state[name] = state[name].to(random_.choice(types))
    if kind == "special":
        random_.choice([lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero"), path.mkdir])()
        return path.name
    if kind == "header":
        size = random_.choice([8, 1 << 30, 1 << 62])
        text = json.dumps({"a": {"dtype": "F32", "shape": [random_.choice([2, 1 << 40])], "data_offsets": [0, size]}}).encode()
        path = path.with_suffix(".safetensors")
        path.write_bytes(random_.choice([len(text), 1 << 40]).to_bytes(8, "little") + text + bytes(8))
        return path.name
    if path.suffix == ".pth":
        content: object = state
        for _ in range(random_.randint(0, 4) if kind == "nested" else 0):
            content = {random_.choice(["state_dict", "model", "ema", "x\x1b[31m", 5]): content, "more": [content]}
        torch.save(content, path, _use_new_zipfile_serialization=random_.random() < 0.7)
    else:
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    data = bytearray(path.read_bytes())
    if kind == "flip":
        for _ in range(random_.choice([1, 10, 1000])):
            data[random_.randrange(len(data))] = random_.randrange(256)
        path.write_bytes(data)
    elif kind == "cut":
        path.write_bytes(data[: random_.randrange(len(data))])
    elif kind == "packed" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as plain, zipfile.ZipFile(folder / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed:
            for member in plain.infolist():
                packed.writestr(member.filename, bytes(len(plain.read(member))))
        return "packed.pth"
    return path.name


def cases(seed: int, folder: Path) -> Iterator[list[str]]:
    """Yield for each file what went wrong when it was imported."""
    random_, number = random.Random(seed), 0
    while True:
        number += 1
        inside = folder / str(number)
        inside.mkdir()
        outcome = run(["import", "--arch", "resnet20", mutated(random_, inside), "--store", "store"], inside)
        faults = outcome.faults()
        if not outcome.err.replace("\n", "").isprintable():
            faults.append("control characters on the terminal")
        if outcome.err.count("\n") > 15:
            faults.append(f"{outcome.err.count(chr(10))} lines")
        yield [f"{fault}: {outcome.err[:300]}" for fault in faults]


if __name__ == "__main__":
    attack(cases, preload=["sdpctl.stages.import_weights", "sdpctl.engine.weights"])
