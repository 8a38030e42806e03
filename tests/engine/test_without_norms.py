"""Networks without batch norms, and batch norms without weights of their own or without a momentum."""

import copy

import pytest
import torch
from torch import nn

from sdpctl.engine.calibrate import CalibratedNorms, calibrate
from sdpctl.engine.evaluate import evaluate
from sdpctl.engine.tensors import statistics_from_bytes, statistics_to_bytes, wanted_statistics
from sdpctl.engine.tree import Tree
from sdpctl.errors import IntegrityError
from sdpctl.instance import FULL, Instance, check_nodes
from sdpctl.models.chain import Chain, Segment, average_shrink
from sdpctl.sdpoint import sdpoint_instances

EXACT = {"rtol": 1e-10, "atol": 1e-10}


class Toy(Chain):
    """Three convolutions, each followed by a norm of its own kind, and a head."""

    draws_in_training = False

    def __init__(self, norms):
        super().__init__()
        for number, norm in enumerate(norms):
            self.add_module(f"conv{number}", nn.Conv2d(3 if number == 0 else 8, 8, 3, padding=1))
            if norm is not None:
                self.add_module(f"norm{number}", norm)
        self.fc = nn.Linear(8, 4)
        self.blocks = len(norms)

    def segments(self):
        return *(self._block(number) for number in range(self.blocks)), self._head()

    def _block(self, number):
        conv, norm = self.get_submodule(f"conv{number}"), getattr(self, f"norm{number}", None)

        def body(state, apply):
            state = conv(state)
            if isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
                state = apply(norm, state)
            elif norm is not None:
                state = norm(state)
            return state.relu()

        names = (f"conv{number}", *([f"norm{number}"] if norm is not None else []))
        return Segment(name=f"block{number}", modules=names, body=body, point=f"block{number}", shrink=average_shrink)

    def _head(self):
        return Segment(name="head", modules=("fc",), body=lambda state, _: self.fc(state.mean((2, 3))))


def unread():
    raise AssertionError("a batch was read")
    yield


def batches(count, size, seed=0):
    torch.manual_seed(seed)
    return [(torch.randn(size, 3, 9, 9), torch.randint(4, (size,))) for _ in range(count)]


def without_batch_norms():
    torch.manual_seed(1)
    return Toy([None, nn.GroupNorm(2, 8), nn.BatchNorm2d(8, track_running_stats=False)])


def test_no_batch_is_read_for_a_network_without_running_statistics(double):
    model = without_batch_norms()
    grid = sdpoint_instances(model)
    statistics = calibrate(model, grid, unread())
    assert (statistics.batches, statistics.images, statistics.mean, statistics.var) == (0, 0, {}, {})
    data = batches(2, 5)
    scores = evaluate(model.eval(), grid, data, statistics)
    for instance, score in scores.items():
        with torch.no_grad():
            hits = sum((model(x_NCHW, instance).argmax(1) == labels_N).sum().item() for x_NCHW, labels_N in data)
        assert score.top1 == pytest.approx(100 * hits / 10)
    assert len(scores) == len(grid) == 7


def test_empty_statistics_are_kept_and_read_again(double):
    model = without_batch_norms()
    grid = sdpoint_instances(model)
    content, described = statistics_to_bytes(calibrate(model, grid, unread()))
    check_nodes(described, "")
    assert described["nodes"] == {}
    wanted = wanted_statistics(described, model, "a file")
    again = statistics_from_bytes(content, described, wanted, "a file")
    assert (again.instances, again.mean, again.var) == (tuple(grid), {}, {})


def test_empty_statistics_do_not_fit_a_network_with_batch_norms(double):
    _, described = statistics_to_bytes(calibrate(without_batch_norms(), [FULL], unread()))
    with pytest.raises(IntegrityError, match=r"nodes.full: the statistics of norm0 are missing"):
        wanted_statistics(described, Toy([nn.BatchNorm2d(8), None, None]), "a file")


def test_batch_norms_without_weights_or_momentum_equal_each_instance_alone(double):
    torch.manual_seed(1)
    model = Toy([nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8, momentum=None), nn.BatchNorm2d(8)])
    instances = [FULL, Instance.parse("block0@0.5"), Instance.parse("block0@0.75+block1@0.5")]
    data, (x_NCHW, _) = batches(3, 6), batches(1, 4, seed=2)[0]
    statistics = calibrate(model, instances, data)
    with torch.inference_mode():
        logits = Tree(model, instances).walk(x_NCHW, CalibratedNorms(model, statistics))
    for instance in instances:
        alone = copy.deepcopy(model).train()
        for module in alone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        with torch.no_grad():
            for images_NCHW, _ in data:
                alone(images_NCHW, instance)
            expected = alone.eval()(x_NCHW, instance)
        torch.testing.assert_close(logits[instance], expected, **EXACT)


def test_channels_of_a_batch_norm_without_weights(double):
    from sdpctl.models.chain import batch_norm

    bn = nn.BatchNorm2d(8, affine=False).eval()
    bn.running_mean.normal_()
    x_NCHW = torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(batch_norm(bn, x_NCHW[:, 2:5], slice(2, 5)), bn(x_NCHW)[:, 2:5], **EXACT)
