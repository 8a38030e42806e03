"""What int8 and fp16 cost in accuracy, and save in size and time, in onnxruntime against float32.

With a store: accuracy on all test images, file size, and time of instances of a trained network. Without: the time of an
untrained network, whose accuracy means nothing.

python tests/benchmarks/bench_precision.py STORE TAG DATA INSTANCE...
python tests/benchmarks/bench_precision.py ARCH SIZE
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from sdpctl import create_model
from sdpctl.engine.calibrate import calibrate
from sdpctl.export.network import INPUT, OUTPUT, OneInstance, trace
from sdpctl.export.onnx import onnx_session, program_to_onnx
from sdpctl.export.precision import to_fp16, to_int8
from sdpctl.instance import FULL

LOWER = ("fp16", "int8")

CALLS = {1: 60, 32: 4}
"""Calls of one measurement, by batch size."""

PAIRS = 15


def session(content):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def seconds(run, images, calls):
    began = time.perf_counter()
    for _ in range(calls):
        run.run(None, {INPUT: images})
    return (time.perf_counter() - began) / calls


def ratios(lower, full, images, calls):
    """Return the median milliseconds of both, and how many times faster the lower precision is: median, least, most."""
    seconds(lower, images, 2), seconds(full, images, 2)
    pairs = [(seconds(lower, images, calls), seconds(full, images, calls)) for _ in range(PAIRS)]
    found = sorted(b / a for a, b in pairs)
    mine, theirs = (1000 * statistics.median(side) for side in zip(*pairs, strict=True))
    return f"{theirs:.2f} | {mine:.2f} | {statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"


def times(name, files, shape):
    """Print a row of times for each lower precision and batch size."""
    full = session(files["fp32"])
    for precision in LOWER:
        lower = session(files[precision])
        for batch, calls in CALLS.items():
            images = np.random.default_rng(0).standard_normal((batch, *shape), dtype=np.float32)
            print(f"| {name} | {precision} | {batch} | {ratios(lower, full, images, calls)} |", flush=True)


def exported(store, tag, data, instance, precision, folder):
    """Export by the command, and return the file's content and what the command says about it."""
    file = Path(folder) / f"{precision}.onnx"
    command = [sys.executable, "-m", "sdpctl", "export", tag, "--store", store, "--set", f"data.root={data}", "--json"]
    command += ["--instance", instance, "--precision", precision, "-o", str(file)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return file.read_bytes(), json.loads(done.stdout)


def trained(store, tag, data, *instances):
    rows = []
    for instance in instances:
        with tempfile.TemporaryDirectory() as folder:
            made = {p: exported(store, tag, data, instance, p, folder) for p in ("fp32", *LOWER)}
        files = {precision: content for precision, (content, _) in made.items()}
        accuracies = {precision: made[precision][1]["precision"] for precision in LOWER}
        top1 = [f"{accuracies['int8']['float32_top1']:.2f}", *(f"{accuracies[p]['top1']['onnxruntime']:.2f}" for p in LOWER)]
        sizes = [f"{len(files[precision]) / 1000:.0f}" for precision in ("fp32", *LOWER)]
        rows.append((instance, files, f"| `{instance}` | {' | '.join(top1 + sizes)} |"))
    print("| instance | float32 top-1 | fp16 | int8 | float32 kB | fp16 | int8 |\n|---|---|---|---|---|---|---|")
    for _, _, row in rows:
        print(row)
    print("\n| instance | precision | batch | float32 ms | ms | times faster |\n|---|---|---|---|---|---|")
    for instance, files, _ in rows:
        takes = onnx_session(files["fp32"]).get_inputs()[0].shape
        times(f"`{instance}`", files, tuple(takes[1:]))


def untrained(arch, size):
    torch.manual_seed(0)
    model, shape = create_model(arch, num_classes=1000).eval(), (3, int(size), int(size))
    images = torch.randn(32, *shape)
    found = calibrate(model, [FULL], [(images, torch.zeros(32))])
    program = trace(OneInstance(model, FULL, found), (torch.zeros(2, *shape),))
    files = {"fp32": program_to_onnx(program, [INPUT], [OUTPUT], {})}
    files |= {"fp16": to_fp16(files["fp32"]), "int8": to_int8(files["fp32"], images.numpy(), batch=32, name=INPUT)}
    print(", ".join(f"{precision} {len(content) / 1e6:.1f} MB" for precision, content in files.items()))
    print("| network | precision | batch | float32 ms | ms | times faster |\n|---|---|---|---|---|---|")
    times(f"{arch} at {size} px", files, shape)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        untrained(*sys.argv[1:])
    else:
        trained(*sys.argv[1:])
