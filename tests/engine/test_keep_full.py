"""Calibration that keeps the network's own statistics on the path of `full`, against each instance run alone."""

import copy

import pytest
import torch
from networks import randomise_norms

from sdpctl.engine.calibrate import CalibratedNorms, calibrate
from sdpctl.engine.settings import WalkSettings
from sdpctl.engine.tree import Tree
from sdpctl.instance import FULL, Instance
from sdpctl.models import create_model
from sdpctl.sdpoint import sdpoint_instances

EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(params=["resnet20", "preresnet18"])
def model(request, double):
    torch.manual_seed(1)
    return randomise_norms(create_model(request.param, num_classes=7, stem="small"))


def batches(count, seed=0):
    torch.manual_seed(seed)
    return [(torch.randn(4, 3, 10, 12), torch.randint(7, (4,))) for _ in range(count)]


def node_of(model, segment, instance):
    """Return the part of an instance that lies before a segment."""
    before = model.segments()[: [s.name for s in model.segments()].index(segment.name)]
    return instance.among(s.point for s in before if s.point)


def gathered_alone(model, instance, data, momentum):
    """Let PyTorch gather the statistics behind the first point that shrinks; before it the network is as in evaluation."""
    alone = copy.deepcopy(model).eval()
    for segment in alone.segments():
        if node_of(alone, segment, instance) != FULL:
            for bn in alone.norms(segment).values():
                bn.momentum = momentum
                if momentum is None:
                    bn.reset_running_stats()
                bn.train()
    with torch.no_grad():
        for x_NCHW, _ in data:
            alone(x_NCHW, instance)
    return alone.eval()


def wanted_of(model):
    points, grid = model.points, sdpoint_instances(model)
    several = [f"{points[0]}@0.75+{points[-2]}@0.5", f"{points[2]}@0.5+{points[3]}@0.5"]
    return [FULL, *grid[1 :: len(grid) // 4], *map(Instance.parse, several)]


def test_the_path_of_full_is_the_networks_own_to_the_bit(model):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    statistics = calibrate(model, wanted_of(model), batches(2), WalkSettings(keep_full=True))
    for segment in model.segments():
        for name, bn in model.norms(segment).items():
            mean, var = statistics.at(FULL, name)
            assert torch.equal(mean, bn.running_mean)
            assert torch.equal(var, bn.running_var)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_full_is_the_network_in_evaluation(model):
    (x_NCHW, _) = batches(1, seed=9)[0]
    statistics = calibrate(model, [FULL], batches(1), WalkSettings(keep_full=True))
    with torch.inference_mode():
        logits = Tree(model, [FULL]).walk(x_NCHW, CalibratedNorms(model, statistics))[FULL]
        torch.testing.assert_close(logits, model.eval()(x_NCHW), **EXACT)


@pytest.mark.parametrize(("estimator", "momentum"), [("cumulative", None), ("ema", 0.1)])
def test_what_lies_behind_a_point_equals_each_instance_alone(model, estimator, momentum):
    data, (x_NCHW, _) = batches(3), batches(1, seed=9)[0]
    wanted = wanted_of(model)
    statistics = calibrate(model, wanted, data, WalkSettings(estimator=estimator, keep_full=True))
    with torch.inference_mode():
        logits = Tree(model, wanted).walk(x_NCHW, CalibratedNorms(model, statistics))
    for instance in wanted:
        alone = gathered_alone(model, instance, data, momentum)
        for segment in model.segments():
            for name in model.norms(segment):
                mean, var = statistics.at(node_of(model, segment, instance), name)
                torch.testing.assert_close(mean, alone.get_submodule(name).running_mean, **EXACT)
                torch.testing.assert_close(var, alone.get_submodule(name).running_var, **EXACT)
        with torch.inference_mode():
            torch.testing.assert_close(logits[instance], alone(x_NCHW, instance), **EXACT)


def test_without_it_full_is_gathered_too(model):
    statistics = calibrate(model, [FULL], batches(2))
    kept = [
        torch.equal(statistics.at(FULL, name)[0], bn.running_mean)
        for s in model.segments()
        for name, bn in model.norms(s).items()
    ]
    assert not any(kept)
