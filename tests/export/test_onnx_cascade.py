"""A written cascade, run by its own program, against its members calibrated and run alone by PyTorch."""

import hashlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import cache

import numpy as np
import onnx
import pytest
import torch
from cascade_options import cascade_option
from test_network import alone, calibration, describe, images, network

from sdpctl.cascade import Cascade
from sdpctl.engine.calibrate import calibrate
from sdpctl.engine.cascade import added_macs
from sdpctl.engine.cost import Costs
from sdpctl.export.format import Source
from sdpctl.export.network import OneInstance
from sdpctl.export.onnx_cascade import OnnxCascadeFormat
from sdpctl.models.settings import ModelSettings

CASES = {
    # The second and the third member both continue the first, at different points; uint8 pixels; averaged.
    "branches": ("resnet8", {"in_channels": 3, "stem": "small"}, 13, "mean/layer2.0@0.5:0.75/stem@0.5~0.8:0.55/full~1.2", True),
    # The third member continues the second, which continues the first.
    "chain": (
        "preresnet18",
        {"in_channels": 3, "stem": "small", "width": 0.25},
        12,
        "stem@0.75:0.55/layer2.0@0.5~1.3:0.65/full",
        False,
    ),
    # The state is a pytree of two maps.
    "pytree": (
        "twopipe",
        {"in_channels": 1, "widths": (8, 12, 16, 16, 24)},
        15,
        "conv1@0.5+conv2@0.25:0.23/conv1@0.5~0.5",
        False,
    ),
}


@cache
def made(case):
    """Return the source of a cascade's export, and its files."""
    arch, options, size, text, raw = CASES[case]
    cascade, model = Cascade.parse(text), network(arch, **options).eval()
    member_macs = added_macs(cascade, Costs(model, (options["in_channels"], size, size)))
    described = replace(
        describe(arch, cascade.members[0], options["in_channels"], options.get("stem", "small"), size, raw=raw),
        network=ModelSettings(arch=arch, num_classes=7, **options),
        cascades=(cascade_option(text, member_macs, 246_912),),
    )
    statistics = calibrate(model, cascade.members, calibration(options["in_channels"], size))
    source = Source(model=model, statistics=statistics, description=described, weights=lambda: b"", card="# A card\n")
    return source, OnnxCascadeFormat().write(source)


def given(case, count):
    """Return images as the export takes them, and normalised."""
    _, options, size, _, raw = CASES[case]
    if not raw:
        x_NCHW = images(count, options["in_channels"], size, seed=3)
        return x_NCHW.numpy(), x_NCHW
    takes = made(case)[0].description.input
    pixels = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (takes.mean, takes.std))
    return pixels.numpy(), (pixels / 255 - mean) / std


def by_members(case, x_NCHW):
    """Return probabilities and the member that answers, from each member alone, image by image."""
    _, options, size, text, _ = CASES[case]
    cascade, source = Cascade.parse(text), made(case)[0]
    probabilities = []
    for member, temperature in zip(cascade.members, cascade.temperatures, strict=True):
        with torch.no_grad():
            if case == "pytree":  # PyTorch gathers no statistics of a part of a batch norm
                logits = OneInstance(source.model, member, source.statistics)(x_NCHW)
            else:
                logits = alone(source.model, member, calibration(options["in_channels"], size))(x_NCHW, member)
        probabilities.append(torch.softmax(logits.double() / temperature, 1).numpy())
    answers, left = [], []
    for n in range(len(x_NCHW)):
        for number, threshold in enumerate((*cascade.thresholds, 0)):
            seen = [p[n] for p in probabilities[: number + 1]]
            answer = sum(seen) / len(seen) if cascade.averaged else seen[-1]
            assert abs(answer.max() - threshold) > 1e-5, "rounding might decide differently"
            if answer.max() >= threshold:
                break
        answers.append(answer)
        left.append(number)
    return np.array(answers), np.array(left)


CLASSIFY = """
import sys
import numpy
import run
probabilities, left = run.classify(numpy.load("images.npy"))
numpy.savez("answers.npz", probabilities=probabilities, left=left)
assert not {"torch", "onnx", "sdpctl"} & set(sys.modules)
"""


@pytest.fixture(params=CASES)
def folder(request, tmp_path):
    for name, content in made(request.param)[1].items():
        (tmp_path / name).write_bytes(content)
    return request.param, tmp_path


def test_the_program_answers_as_the_members_do_alone(folder):
    case, path = folder
    given_as, x_NCHW = given(case, 64)
    answers, left = by_members(case, x_NCHW)
    assert len(set(left)) == len(Cascade.parse(CASES[case][3]).members), "no image leaves at one of the members"
    for count in (64, 1, 0):
        np.save(path / "images.npy", given_as[:count])
        subprocess.run([sys.executable, "-c", CLASSIFY], cwd=path, check=True, timeout=120)
        with np.load(path / "answers.npz") as found:
            np.testing.assert_allclose(found["probabilities"], answers[:count].reshape(-1, 7), atol=1e-5)
            assert found["left"].tolist() == left[:count].tolist()
            assert found["left"].dtype == np.int64


def test_the_format_runs_what_it_wrote(folder):
    case, _ = folder
    given_as, x_NCHW = given(case, 20)
    probabilities = OnnxCascadeFormat().run(made(case)[1], given_as)
    assert probabilities.shape == (1, 20, 7)
    np.testing.assert_allclose(probabilities[0], by_members(case, x_NCHW)[0], atol=1e-5)


def test_the_command_line_names_classes_members_and_costs(folder):
    case, path = folder
    given_as, x_NCHW = given(case, 8)
    answers, left = by_members(case, x_NCHW)
    np.save(path / "images.npy", given_as)
    elsewhere = path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "../run.py", "../images.npy"], cwd=elsewhere, capture_output=True, text=True, check=True, timeout=120
    )
    lines = done.stdout.splitlines()
    (option,), description = made(case)[0].description.cascades, made(case)[0].description
    members = option.cascade.members
    for n in range(8):
        name = description.classes[answers[n].argmax()]
        assert lines[n].startswith(f"{n}: {name} (")
        assert lines[n].endswith(f", by member {left[n]}, {members[left[n]]}")
    mean = np.mean([sum(option.member_macs[: number + 1]) for number in left])
    assert lines[8] == f"{mean:,.0f} MACs an image on average, {mean / description.full_macs:.1%} of `full`"


def graph_macs(content):
    """Return the MACs of a graph's convolutions and matrix products for one image, by the shapes that onnx infers."""
    model = onnx.load_from_string(content)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*inferred.value_info, *inferred.output)}
    weights = {w.name: list(w.dims) for w in model.graph.initializer}
    macs = 0
    for node in model.graph.node:
        if node.op_type == "Conv":
            _, height, width = shapes[node.output[0]][1:]
            macs += height * width * math.prod(weights[node.input[1]])
        elif node.op_type == "Gemm":
            macs += math.prod(weights[node.input[1]]) + shapes[node.output[0]][1]  # with its bias
    return macs


def test_a_graph_computes_what_its_member_adds_and_no_more(folder):
    case, _ = folder
    files = made(case)[1]
    policy = json.loads(files["policy.json"])
    assert [graph_macs(files[member["file"]]) for member in policy["members"]] == [m["macs"] for m in policy["members"]]
    assert all(graph_macs(files["member0.onnx"]) > m["macs"] for m in policy["members"][2:])


def test_the_policy_says_what_a_program_needs():
    source, files = made("branches")
    policy = json.loads(files["policy.json"])
    first, second, third = policy["members"]
    assert (policy["schema"], policy["averaged"], policy["classes"]) == (
        "sdpctl.onnx-cascade/1",
        True,
        list(source.description.classes),
    )
    assert [m["instance"] for m in policy["members"]] == ["layer2.0@0.5", "stem@0.5", "full"]
    assert [m["threshold"] for m in policy["members"]] == [0.75, 0.55, None]
    assert [m["temperature"] for m in policy["members"]] == [1.0, 0.8, 1.2]
    assert first["inputs"] == ["images"]
    assert first["outputs"] == ["logits", *second["inputs"], *third["inputs"]]
    assert second["outputs"] == third["outputs"] == ["logits"]
    assert policy["input"] == json.loads(json.dumps(source.description.input.document()))
    assert policy["figures"]["cascade"] == CASES["branches"][3]


def test_the_hashes_are_those_of_the_files(folder):
    case, _ = folder
    files = made(case)[1]
    lines = dict(line.split("  ")[::-1] for line in files["SHA256SUMS"].decode().splitlines())
    assert lines == {name: hashlib.sha256(content).hexdigest() for name, content in files.items() if name != "SHA256SUMS"}


def test_bytes_depend_on_content_alone():
    source, files = made("pytree")
    assert OnnxCascadeFormat().write(source) == files
    assert not [name for name, content in files.items() if b"/sdpctl/" in content]
