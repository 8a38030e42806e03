"""The network in two pipes, against a plain one that computes both pipes for every channel and throws half away."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from networks import randomise_norms
from torch import nn

from sdpctl import Instance, create_model, sdpoint_instances
from sdpctl.engine.calibrate import calibrate
from sdpctl.engine.cost import Costs, count_macs
from sdpctl.engine.evaluate import evaluate
from sdpctl.models.chain import shrunk
from sdpctl.models.state import map_shape
from sdpctl.models.twopipe import spread

WIDTHS = (6, 8, 10, 12, 14)
SIZES = [(8, 8), (9, 9), (12, 7), (13, 16), (14, 14), (30, 33), (4, 5)]


def network(*, masks="nested", seed=0, classes=7, channels=2):
    torch.manual_seed(seed)
    model = create_model("twopipe", num_classes=classes, in_channels=channels, widths=WIDTHS, masks=masks).double()
    return randomise_norms(model, bias=1, mean=1, var=(0.5, 2))


def nested(shares):
    """Return for each convolution which outputs are full: the first ones, all of the last."""
    kept = [max(1, round(share * width)) for share, width in zip((*shares, 1), WIDTHS, strict=True)]
    return [torch.arange(width) < k for width, k in zip(WIDTHS, kept, strict=True)]


def plain(model, x_l, masks, running=None):
    """Compute both pipes for every channel; what lives elsewhere is set to zero before the next convolution."""
    x_s, full = None, torch.ones(x_l.shape[1], dtype=torch.bool)
    for number, mask in enumerate(masks, 1):
        kernel, bn = model.get_parameter(f"conv{number}.weight"), model.get_submodule(f"bn{number}")
        x_l = F.pad(x_l, (0, x_l.shape[3] % 2, 0, x_l.shape[2] % 2))
        if x_s is None:
            x_s = x_l.new_zeros(*x_l.shape[:2], x_l.shape[2] // 2, x_l.shape[3] // 2)
        from_l = F.conv2d(x_l * full[:, None, None], kernel, padding=1)
        from_s = F.conv2d(x_s * ~full[:, None, None], kernel, padding=1)
        outs = [from_l + from_s.repeat_interleave(2, 2).repeat_interleave(2, 3), F.avg_pool2d(from_l, 2) + from_s]
        for i, out in enumerate(outs):
            mean, var = bn.running_mean.clone(), bn.running_var.clone()
            outs[i] = F.relu(F.batch_norm(out, mean, var, bn.weight, bn.bias, model.training, 0.1, bn.eps))
            if running is not None:
                mine = mask if i == 0 else ~mask
                running.setdefault(number, torch.zeros(2, len(mask), dtype=torch.float64))[:, mine] = torch.stack([mean, var])[
                    :, mine
                ]
        x_l, x_s, full = *outs, mask
        if number in (2, 4):
            x_l, x_s = F.max_pool2d(x_l, 2), F.max_pool2d(x_s, 2, ceil_mode=True)
    return F.linear(x_l.mean((2, 3)), model.fc.weight, model.fc.bias)


def instance(shares):
    return Instance(tuple((f"conv{i}", share) for i, share in enumerate(shares, 1)))


def gradients(model, logits, x):
    return torch.autograd.grad((logits**2).sum(), (x, *model.parameters()))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shares", [(1, 1, 1, 1), (0.5,) * 4, (0.25, 0.75, 0.1, 0.9), (0.01,) * 4, (1, 0.5, 1, 0.01)])
def test_outputs_and_gradients_are_those_of_the_equations(shares, size):
    model = network().eval()
    x = torch.randn(3, 2, *size, dtype=torch.float64, requires_grad=True)
    ours, theirs = model(x, instance(shares)), plain(model, x, nested(shares))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradients(model, ours, x), gradients(model, theirs, x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("size", [(8, 8), (9, 14)])
@pytest.mark.parametrize("shares", [(0.5,) * 4, (0.25, 0.75, 1, 0.9)])
def test_a_training_step_with_random_masks_is_that_of_the_equations(shares, size, monkeypatch):
    model, drawn, randperm = network(masks="random").train(), [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *a, **k: drawn.append(randperm(*a, **k)) or drawn[-1])
    x = torch.randn(5, 2, *size, dtype=torch.float64, requires_grad=True)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    ours = model(x, instance(shares))
    mine = gradients(model, ours, x)
    after = {name: buffer.clone() for name, buffer in model.named_buffers()}
    kept = [shrunk(width, share) for width, share in zip(WIDTHS, shares, strict=False)]
    masks = [torch.isin(torch.arange(width), order[:k]) for width, order, k in zip(WIDTHS, drawn, kept, strict=False)]
    assert len(drawn) == 4
    assert any(not torch.equal(mask, first) for mask, first in zip(masks, nested(shares), strict=False))
    running: dict[int, torch.Tensor] = {}
    model.load_state_dict(before, strict=False)
    theirs = plain(model, x, [*masks, torch.ones(WIDTHS[-1], dtype=torch.bool)], running)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    torch.testing.assert_close(mine, gradients(model, theirs, x), rtol=1e-9, atol=1e-10)
    for number, (mean, var) in running.items():
        torch.testing.assert_close(after[f"bn{number}.running_mean"], mean)
        torch.testing.assert_close(after[f"bn{number}.running_var"], var)


def test_random_masks_are_for_training_alone():
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    random, first = network(masks="random").eval(), network().eval()
    torch.testing.assert_close(random(x, "all@0.5"), first(x, "all@0.5"), rtol=0, atol=0)
    random.train()
    assert not torch.equal(random(x, "all@0.5"), random(x, "all@0.5"))


def test_the_spread_kernel_averages():
    weight, x = torch.randn(3, 2, 3, 3, dtype=torch.float64), torch.randn(4, 2, 10, 6, dtype=torch.float64)
    averaged = F.avg_pool2d(F.conv2d(x, weight, padding=1), 2)
    torch.testing.assert_close(F.conv2d(x, spread(weight), stride=2, padding=1), averaged)


@pytest.mark.parametrize("size", [(8, 8), (9, 14), (32, 32)])
@pytest.mark.parametrize("shares", [(1, 1, 1, 1), (0.5,) * 4, (0.25, 0.75, 0.1, 0.9)])
def test_macs_are_those_of_the_formula_and_of_ptflops(shares, size):
    model = network(channels=3).float().to("meta").eval()
    height, width = size
    channels, full, expected = 3, 3, 0
    for number, (outs, share) in enumerate(zip(WIDTHS, (*shares, 1), strict=True), 1):
        h, w = (height + 1) // 2, (width + 1) // 2
        a, b, k, rest = full, channels - full, shrunk(outs, share), outs - shrunk(outs, share)
        expected += h * w * (36 * k * a + 9 * k * b + 16 * rest * a + 9 * rest * b)
        height, width, channels, full = 2 * h, 2 * w, outs, k
        if number in (2, 4):
            height, width = h, w
    expected += WIDTHS[-1] * 7 + 7
    chosen = instance(shares)
    cost = Costs(model, (3, *size)).of(chosen)
    assert cost.macs == expected

    class Whole(nn.Module):
        def forward(self, state):
            return model(state, chosen)

    assert count_macs(Whole(), map_shape((3, *size))) == expected
    assert cost.params == sum(parameter.numel() for parameter in model.parameters())


def test_all_stands_for_every_convolution():
    model = network().eval()
    assert model.points == ("conv1", "conv2", "conv3", "conv4")
    assert [str(i) for i in sdpoint_instances(model, (0.75, 0.5))] == ["full", "all@0.75", "all@0.5"]
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x, "all@0.5"), model(x, instance((0.5,) * 4)), rtol=0, atol=0)
    torch.testing.assert_close(model(x, "all@0.5+conv2@0.75"), model(x, instance((0.5, 0.75, 0.5, 0.5))), rtol=0, atol=0)


@torch.inference_mode()
def test_the_tree_gives_what_each_instance_gives_alone():
    model = network()
    batches = [(torch.randn(4, 2, 9, 10, dtype=torch.float64), torch.randint(7, (4,))) for _ in range(3)]
    instances = [*sdpoint_instances(model, (0.75, 0.5)), *map(instance, itertools.product((1, 0.5), repeat=4))]
    statistics = calibrate(model, instances, batches)
    scores = evaluate(model, instances, batches, statistics)
    assert list(scores) == list(dict.fromkeys(instances))
    for one in instances:
        alone = network()
        for module in alone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
        for number, (x, _) in enumerate(batches, 1):
            for module in alone.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 1 / number
            alone.train()(x, one)
        alone.eval()
        losses = [F.cross_entropy(alone(x, one), labels) for x, labels in batches]
        assert scores[one].loss == pytest.approx(torch.stack(losses).mean().item(), abs=1e-10)
