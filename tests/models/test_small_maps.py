"""Convolutions of maps of few pixels: rows or not, the numbers are those of F.conv2d."""

import pytest
import torch
import torch.nn.functional as F

from sdpctl.models.convolution import FEW, Conv2d
from sdpctl.models.resnet import conv

SIDES = [(1, 1), (1, 5), (2, 2), (3, 4), (4, 4), (5, 4)]


def calls(monkeypatch):
    """Note the shapes that reach F.conv2d."""
    seen, conv2d = [], F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda x, *others: seen.append(tuple(x.shape)) or conv2d(x, *others))
    return seen


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("sides", SIDES)
def test_map_and_gradients_are_those_of_a_plain_convolution(sides, memory_format):
    torch.manual_seed(0)
    layer = conv(6, 10, 1).double().to(memory_format=memory_format)
    given = torch.randn(7, 6, *sides, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    plain, weight = given.detach().clone().requires_grad_(), layer.weight.detach().clone().requires_grad_()
    out, expected = layer(given), F.conv2d(plain, weight)
    assert out.shape == expected.shape
    assert out.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    towards = torch.randn_like(expected)
    out.backward(towards)
    expected.backward(towards)
    torch.testing.assert_close(given.grad, plain.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sides", SIDES)
def test_only_few_pixels_are_taken_as_rows(sides, monkeypatch):
    layer, x_NCHW = conv(6, 10, 1), torch.randn(7, 6, *sides).to(memory_format=torch.channels_last)
    seen = calls(monkeypatch)
    layer(x_NCHW)
    height, width = sides
    assert seen == [(1, 6, 7 * height, width) if height * width <= FEW else (7, 6, height, width)]


@pytest.mark.parametrize("layer", [conv(6, 10, 3), conv(6, 10, 1, 2), Conv2d(6, 10, 1, groups=2, bias=False)])
def test_other_convolutions_are_not(layer, monkeypatch):
    x_NCHW = torch.randn(7, 6, 2, 2).to(memory_format=torch.channels_last)
    seen = calls(monkeypatch)
    layer(x_NCHW)
    assert seen == [(7, 6, 2, 2)]


def test_an_exported_graph_has_the_convolution_alone():
    x_NCHW = torch.randn(7, 6, 2, 2).to(memory_format=torch.channels_last)
    graph = torch.export.export(conv(6, 10, 1), (x_NCHW,)).graph
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [torch.ops.aten.conv2d.default]
