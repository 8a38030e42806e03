"""Figures computed with the public SDPoint code, its defects mended: see tests/golden/README.md."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sdpctl.engine.calibrate import CalibratedNorms, calibrate
from sdpctl.engine.cost import profile
from sdpctl.engine.settings import WalkSettings
from sdpctl.engine.tree import Tree
from sdpctl.instance import Instance
from sdpctl.models import create_model
from sdpctl.sdpoint import sdpoint_instances

GOLDEN = sorted(Path(__file__).parent.parent.joinpath("golden").glob("*.json"))
BIAS_ADDITIONS = 10  # ptflops counts those of the linear layer, the golden figures do not


def images(seed, count):
    return torch.tensor(np.random.default_rng(seed).standard_normal((count, 3, 96, 96)))


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request, double, fill):
    figures = json.loads(request.param.read_text())
    return figures, fill(create_model(figures["arch"], num_classes=10).eval())


def test_there_are_golden_figures():
    assert [path.stem for path in GOLDEN] == ["preresnet18", "preresnet50", "resnet18", "resnext50"]


def test_every_instance_gives_the_golden_logits(golden):
    figures, model = golden
    assert {row["instance"] for row in figures["instances"]} == set(map(str, sdpoint_instances(model)))
    x_NCHW = images(7, 2)
    with torch.inference_mode():
        for row in figures["instances"]:
            torch.testing.assert_close(model(x_NCHW, row["instance"])[0], torch.tensor(row["logits"]), rtol=1e-9, atol=1e-11)


def test_every_instance_costs_the_golden_macs(golden):
    figures, model = golden
    costs = profile(model, [Instance.parse(row["instance"]) for row in figures["instances"]], (3, 96, 96))
    counted = {str(instance): cost.macs for instance, cost in costs.items()}
    assert counted == {row["instance"]: row["macs_96"] + BIAS_ADDITIONS for row in figures["instances"]}


@pytest.mark.parametrize("estimator", ["cumulative", "ema"])
def test_calibration_gives_the_golden_logits(golden, estimator):
    figures, model = golden
    wanted = [Instance.parse(row["instance"]) for row in figures["calibrated"]]
    batches = [(images(100 + i, 4), torch.zeros(4)) for i in range(3)]
    statistics = calibrate(model, wanted, batches, WalkSettings(estimator=estimator))
    with torch.inference_mode():
        logits = Tree(model, wanted).walk(images(7, 2), CalibratedNorms(model, statistics))
    for instance, row in zip(wanted, figures["calibrated"], strict=True):
        torch.testing.assert_close(logits[instance][0], torch.tensor(row[estimator]), rtol=1e-9, atol=1e-11)
