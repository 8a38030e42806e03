"""Networks that work in place change nothing that another instance, or a gradient, still needs."""

import itertools

import pytest
import torch
import torch.nn.functional as F
import torchvision

from sdpctl.engine.calibrate import CalibratedNorms, calibrate
from sdpctl.instance import FULL, Instance
from sdpctl.models import create_model
from sdpctl.models.chain import batch_norm
from sdpctl.models.state import copied, tensors

NETWORKS = {
    "resnet18": {"stem": "imagenet"},
    "resnet20": {},
    "resnext50": {"stem": "small"},
    "preresnet18": {"stem": "imagenet"},
    "preresnet50": {"stem": "small"},
    "twopipe": {"widths": (6, 8, 10, 12, 14)},
}

RATIOS = (0.25, 0.5, 0.75, 0.9, 1.0)


def network(arch):
    torch.manual_seed(0)
    return create_model(arch, num_classes=5, **NETWORKS.get(arch, {}))


@pytest.mark.parametrize("ratio", [1, 0.75, 0.5])
@pytest.mark.parametrize("norms", ["calibrated", "training", "evaluation"])
@pytest.mark.parametrize("arch", NETWORKS)
def test_a_segment_leaves_the_state_that_comes_in(arch, norms, ratio, double):
    model = network(arch).train(norms == "training")
    x_NCHW = torch.randn(2, 3, 20, 18)
    instance = FULL if ratio == 1 else Instance(tuple((point, ratio) for point in model.points))
    calibrated = CalibratedNorms(model, calibrate(model, [instance], [(x_NCHW, None)]))
    state, passed = x_NCHW, []
    for segment in model.segments():
        norm = calibrated([instance.among(passed)]) if norms == "calibrated" else batch_norm
        with torch.inference_mode():
            before = copied(state)
            after = segment.body(state, norm)
            if segment.shrink is not None:
                passed.append(segment.point)
                after = segment.shrink(after, instance.ratio(segment.point))
            for now, then in zip(tensors(state), tensors(before), strict=True):
                assert torch.equal(now, then), segment.name
            state = after


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 1), (4, 4), (7, 6)])
@pytest.mark.parametrize("arch", [arch for arch in NETWORKS if arch != "twopipe"])
def test_a_bodys_result_may_be_shrunk_by_rising_ratios(arch, size, double):
    for segment in network(arch).segments():
        if segment.shrink is not None:
            out = torch.randn(2, 3, *size)
            expected = [segment.shrink(out.clone(), ratio).clone() for ratio in RATIOS]
            found = [segment.shrink(out, ratio) for ratio in RATIOS]
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), segment.name


def gradients(model, logits_NK, x_NCHW):
    return torch.autograd.grad((logits_NK**2).sum(), (x_NCHW, *model.parameters()))


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_gradients_of_a_training_step_are_torchvisions(arch, double):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, arch)(num_classes=5).train()
    ours = create_model(arch, num_classes=5, stem="imagenet").train()
    ours.load_state_dict(theirs.state_dict())
    x_NCHW = torch.randn(3, 3, 40, 36, requires_grad=True)
    mine, known = (gradients(model, model(x_NCHW), x_NCHW) for model in (ours, theirs))
    for one, other in zip(mine, known, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8 * other.abs().max().item())


@pytest.mark.parametrize(("mode", "ratio"), list(itertools.product([True, False], [1, 0.75])))
@pytest.mark.parametrize("arch", ["resnet20", "preresnet18", "preresnet50"])
def test_gradients_are_those_out_of_place(arch, mode, ratio, double, monkeypatch):
    model = network(arch).train(mode)
    x_NCHW = torch.randn(3, 3, 16, 14, requires_grad=True)
    instance = FULL if ratio == 1 else Instance(tuple((point, ratio) for point in model.points[::2]))
    ours = gradients(model, model(x_NCHW, instance), x_NCHW)
    relu, done = torch.relu, []
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: done.append("relu") or relu(x))
    monkeypatch.setattr(torch.Tensor, "add_", lambda x, y: done.append("add") or x + y)
    plain = gradients(model, model(x_NCHW, instance), x_NCHW)
    assert {"relu", "add"} == set(done)
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)
