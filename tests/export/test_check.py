"""The bounds on both sides, and running outside: what comes back is what the network itself gives."""

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch
from cascade_options import cascade_option
from torch import nn

from sdpctl.engine.calibrate import CalibratedNorms, calibrate
from sdpctl.engine.tensors import tensors_to_bytes
from sdpctl.engine.tree import Tree
from sdpctl.errors import IntegrityError, SdpctlError
from sdpctl.export import torch_export
from sdpctl.export.catalog import CARD, FORMATS
from sdpctl.export.check import Agreement, compare, latency
from sdpctl.export.description import Description, Input, Option
from sdpctl.export.format import CHUNK, Source, format_of
from sdpctl.instance import FULL, Instance
from sdpctl.models import create_model
from sdpctl.models.settings import ModelSettings

INSTANCES = (Instance.parse("stem@0.5"), FULL)
CASCADE = cascade_option("stem@0.5:0.9/full", (1, 1), 2)
GRAPHS = {"onnx-cascade": ("member0.onnx", "member1.onnx"), "onnx-folder": tuple(f"graph{n}.onnx" for n in range(4))}


def agreement(difference=0.0, scale=0.5, top1=100.0):
    return Agreement(100, difference, scale, top1)


@pytest.mark.parametrize(
    ("found", "holds"),
    [
        (agreement(), True),
        (agreement(difference=0.99e-4), True),
        (agreement(difference=1.01e-4), False),
        (agreement(difference=1.01e-4, scale=0.001), False),
        (agreement(difference=0.99e-4, scale=0.001), True),
        (agreement(difference=1.99e-3, scale=20), True),
        (agreement(difference=2.01e-3, scale=20), False),
        (agreement(top1=99.0), True),
        (agreement(top1=98.99), False),
        (agreement(difference=float("nan")), False),
        (agreement(difference=float("inf")), False),
        (agreement(scale=float("nan"), difference=float("nan")), False),
    ],
)
def test_an_agreement_holds_within_both_bounds(found, holds):
    assert found.holds is holds
    if holds:
        assert found.require("net") is found
    else:
        with pytest.raises(IntegrityError, match=r"^net: run outside, its logits differ .* nothing was written"):
            found.require("net")


def logits(seed=0, count=100, instances=2):
    return np.random.default_rng(seed).normal(size=(instances, count, 5)).astype(np.float32)


def test_equal_logits_agree():
    wanted = logits()
    found = compare(wanted, wanted.copy())
    assert found == Agreement(100, 0.0, float(np.abs(wanted).max()), 100.0)
    assert found.holds


def test_the_largest_difference_counts_whichever_way_it_goes():
    wanted = logits()
    for sign in (1, -1):
        got = wanted.copy()
        got[1, 57, 3] += sign * 0.25
        got[0, 5, 0] -= sign * 0.125
        assert compare(wanted, got).difference == pytest.approx(0.25, rel=1e-5)
        assert not compare(wanted, got).holds


def test_the_scale_is_the_largest_magnitude_of_what_was_wanted():
    wanted = logits()
    wanted[0, 3, 2] = -40
    assert compare(wanted, np.zeros_like(wanted)).scale == 40


@pytest.mark.parametrize(("changed", "holds"), [(1, True), (2, True), (3, False)])
def test_a_class_in_a_hundred_may_change(changed, holds):
    wanted = np.zeros((2, 100, 5), dtype=np.float32)
    wanted[..., 2] = 1e-5
    got = wanted.copy()
    got[1, :changed, 4] = 2e-5
    found = compare(wanted, got)
    assert found.top1 == pytest.approx(100 - changed / 2)
    assert found.holds is holds


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["wanted", "got"])
def test_a_logit_that_is_not_finite_never_agrees(value, side):
    pair = {"wanted": logits(), "got": logits()}
    pair[side][0, 7, int(pair[side][0, 7].argmax() if value > 0 else pair[side][0, 7].argmin())] = value
    assert not compare(**pair).holds
    if side == "got":
        assert compare(**pair).difference == float("inf")


@cache
def made():
    """Return a chain, its statistics and the files of every format."""
    torch.manual_seed(1)
    model = create_model("resnet20", num_classes=7, in_channels=1).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
    statistics = calibrate(model, INSTANCES, [(torch.randn(8, 1, 8, 8), None)])
    option = {"params": 2, "relative": 1.0, "top1": 3.0, "top5": None, "loss": 4.0, "heldout_top1": 5.0}
    description = Description(
        name="net",
        network=ModelSettings(arch="resnet20", num_classes=7, in_channels=1, stem="small"),
        input=Input(size=8, resize=8, mean=(0.4,), std=(0.2,)),
        classes=tuple("abcdefg"),
        options=tuple(Option(instance=instance, macs=macs, **option) for macs, instance in enumerate(INSTANCES, 1)),
        full_macs=2,
        checkpoint="1",
        statistics="2",
        test_images=80,
        heldout_images=40,
    )
    files = {}
    for form, info in FORMATS.items():
        options = description.options if info.several or info.graphs else description.options[:1]
        source = Source(
            model=model,
            statistics=statistics,
            description=dataclasses.replace(description, options=options, cascades=(CASCADE,) if info.graphs else ()),
            weights=lambda: tensors_to_bytes(model.state_dict()),
            card="card",
        )
        files[form] = format_of(form).write(source)
    return model, statistics, files


def run(form, files, images):
    return format_of(form).run(files, images)


def test_a_comparison_of_no_image_is_refused():
    results = np.ones((1, 3, 2), dtype=np.float32)
    with pytest.raises(IntegrityError, match="no image can be compared"):
        compare(results, results, np.zeros(3, dtype=bool))


@pytest.mark.parametrize("form", FORMATS)
def test_a_format_writes_the_files_that_the_table_names(form):
    graphs = len(GRAPHS.get(form, ()))
    assert sorted(made()[2][form]) == sorted([*FORMATS[form].names(graphs), CARD])
    assert sorted(FORMATS[form].names(graphs)) == sorted([*FORMATS[form].files, *GRAPHS.get(form, ())])
    assert made()[2][form][CARD] == b"card"


@pytest.mark.parametrize(
    ("form", "count"), [("onnx", 1), ("onnx", CHUNK), ("onnx", 33), ("torch-export", 33), ("bundle", 33), ("onnx-folder", 33)]
)
def test_what_runs_outside_agrees_with_the_network(form, count):
    model, statistics, files = made()
    images = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(count))
    instances = INSTANCES if FORMATS[form].several else INSTANCES[:1]
    with torch.inference_mode():
        tree = Tree(model, instances).walk(images, CalibratedNorms(model, statistics))
    wanted = torch.stack([tree[instance] for instance in instances]).numpy()
    got = run(form, files[form], images.numpy())
    assert got.shape == wanted.shape
    assert compare(wanted, got).require(form).images == count
    assert count == 1 or not compare(wanted, got[:, ::-1]).holds


def test_a_program_that_does_not_run():
    with pytest.raises(SdpctlError, match=r"does not run in a separate process \(\w+.*: .+\); nothing was written"):
        run("torch-export", {"model.pt2": b"nothing"}, np.zeros((1, 1, 8, 8), dtype=np.float32))


def test_a_program_that_needs_the_package_is_refused(monkeypatch):
    monkeypatch.setattr(torch_export, "_PROGRAM", "import sys; sys.modules['sdpctl'] = sys;" + torch_export._PROGRAM)
    with pytest.raises(SdpctlError, match=r"\(sdpctl was needed\)"):
        run("torch-export", made()[2]["torch-export"], np.zeros((1, 1, 8, 8), dtype=np.float32))


def test_a_damaged_bundle_does_not_run():
    files = made()[2]["bundle"]
    with pytest.raises(SdpctlError, match=r"does not run in a separate process .*card\.md does not match SHA256SUMS"):
        run("bundle", files | {"card.md": b"another"}, np.zeros((1, 1, 8, 8), dtype=np.float32))


@pytest.mark.parametrize("size", [None, 9])
def test_an_onnx_file_that_does_not_run(size):
    files = {"model.onnx": b"nothing"} if size is None else made()[2]["onnx"]
    with pytest.raises(SdpctlError, match="does not run"):
        run("onnx", files, np.zeros((1, 1, size or 8, 8), dtype=np.float32))


@pytest.mark.parametrize("form", [form for form, info in FORMATS.items() if info.latency])
def test_latency_is_the_median_without_the_first_two_calls(form, monkeypatch):
    image = np.zeros((1, 1, 8, 8), dtype=np.float32)
    call = format_of(form).one_call(made()[2][form], image)
    with torch.inference_mode():
        np.testing.assert_allclose(np.asarray(call()).reshape(1, 1, 7), run(form, made()[2][form], image), atol=1e-5)
    assert 0 < latency(call, runs=3) < float("inf")
    readings = iter([0, 100, 0, 100, 0, 0.007, 0, 0.001, 0, 0.004])
    monkeypatch.setattr("time.perf_counter", lambda: next(readings))
    assert latency(call, runs=3) == pytest.approx(4)
    assert list(readings) == []
