"""The tree against each instance run alone, by the model's own batch norms and PyTorch's own running statistics."""

import copy
import math
import random

import pytest
import torch
from networks import randomise_norms
from sklearn.metrics import recall_score
from torch import nn

from sdpctl.engine.calibrate import CalibratedNorms, calibrate
from sdpctl.engine.evaluate import ClassTally, evaluate
from sdpctl.engine.settings import WalkSettings
from sdpctl.engine.tree import Tree
from sdpctl.errors import DataError, DivergedError, InstanceError, NotFoundError
from sdpctl.instance import FULL, Instance
from sdpctl.models import create_model
from sdpctl.models.chain import finished
from sdpctl.sdpoint import sdpoint_instances

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def batches(count, size, classes=7, seed=0):
    torch.manual_seed(seed)
    return [(torch.randn(size, 3, 24, 20), torch.randint(classes, (size,))) for _ in range(count)]


def fresh(arch, **options):
    torch.manual_seed(1)
    return randomise_norms(create_model(arch, num_classes=7, **options))


def calibrated_alone(model, instance, data, momentum):
    """Let PyTorch gather one instance's statistics."""
    alone = copy.deepcopy(model).train()
    for module in alone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
            if momentum is None:
                module.reset_running_stats()
    with torch.no_grad():
        for x_NCHW, _ in data:
            alone(x_NCHW, instance)
    return alone.eval()


def several_points(model, count):
    draw = random.Random(5)
    return [
        Instance(tuple((point, draw.choice((0.5, 0.75, 0.6))) for point in model.points if draw.random() < 0.4))
        for _ in range(count)
    ]


@pytest.fixture(params=["resnet18", "preresnet18", "resnet20", "resnext50"])
def model(request, double):
    return fresh(request.param, **({} if request.param == "resnet20" else {"stem": "imagenet"}))


@pytest.mark.parametrize(("estimator", "momentum"), [("cumulative", None), ("ema", 0.1)])
def test_statistics_and_logits_equal_each_instance_alone(model, estimator, momentum):
    grid = sdpoint_instances(model)
    wanted = [*grid[:: max(1, len(grid) // 12)], *several_points(model, 6)]
    data, (x_NCHW, _) = batches(2, 4), batches(1, 3, seed=9)[0]
    passed = {}
    for number, segment in enumerate(model.segments()):
        passed |= dict.fromkeys(model.norms(segment), tuple(s.point for s in model.segments()[:number] if s.point))
    expected = {}
    for instance in wanted:
        alone = calibrated_alone(model, instance, data, momentum)
        norms = [alone.get_submodule(name) for name in passed]
        with torch.inference_mode():
            logits = alone(x_NCHW, instance)
        expected[instance] = logits, torch.cat([n.running_mean for n in norms]), torch.cat([n.running_var for n in norms])
    for memory in (2**40, Tree(model, wanted).needs(data[0][0])):  # ample, and the least
        statistics = calibrate(model, wanted, data, WalkSettings(estimator=estimator, memory=memory))
        with torch.inference_mode():
            logits = Tree(model, wanted, memory=memory).walk(x_NCHW, CalibratedNorms(model, statistics))
        for instance, figures in expected.items():
            nodes = [(instance.among(points), name) for name, points in passed.items()]
            mean, var = (torch.cat([side[node] for node in nodes]) for side in (statistics.mean, statistics.var))
            for found, figure in zip((logits[instance], mean, var), figures, strict=True):
                torch.testing.assert_close(found, figure, **EXACT)


def test_each_body_runs_once_for_each_node_and_not_once_for_each_instance(double):
    model = fresh("resnet20")
    wanted = sdpoint_instances(model)
    bodies = []

    def count(bn, x_NCHW, *, own, plus=None, relu=False):
        return finished(bn(x_NCHW), plus, relu)

    def counting(nodes):
        bodies.append(len(nodes))
        return count

    tree = Tree(model.eval(), wanted)
    with torch.inference_mode():
        tree.walk(torch.randn(2, 3, 32, 32), counting)
    points = len(model.points)
    nodes = [1 + 2 * passed for passed in range(points)] + [1 + 2 * points]  # full, and both ratios of each point passed
    assert sum(bodies) == sum(nodes) == len(list(tree.nodes()))
    assert sum(bodies) < len(wanted) * len(model.segments())


def test_the_model_is_left_as_it_was(double):
    model = fresh("resnet20").train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    wanted, data = sdpoint_instances(model), batches(2, 4)
    evaluate(model, wanted, data, calibrate(model, wanted, data))
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_evaluation_counts_every_image_once(double):
    model = fresh("resnet20")
    wanted = [FULL, Instance.parse("layer2.0@0.5")]
    statistics = calibrate(model, wanted, batches(2, 8))
    data = batches(3, 5) + batches(1, 2, seed=4)  # the last batch is smaller
    scores = evaluate(model, wanted, data, statistics)
    for instance in wanted:
        alone = calibrated_alone(model, instance, batches(2, 8), None)
        with torch.inference_mode():
            logits = torch.cat([alone(x, instance) for x, _ in data])
        labels = torch.cat([y for _, y in data])
        ranks = logits.argsort(1, descending=True)
        assert scores[instance].images == 17
        assert scores[instance].top1 == pytest.approx(100 * (ranks[:, 0] == labels).double().mean().item(), abs=1e-12)
        assert scores[instance].top5 == pytest.approx(100 * (ranks[:, :5] == labels[:, None]).any(1).double().mean().item())
        log_p = logits - logits.exp().sum(1, keepdim=True).log()
        assert scores[instance].loss == pytest.approx(-log_p[range(17), labels].mean().item(), rel=1e-10)


def test_hits_are_counted_by_class(double):
    """The accuracy on the images of one class is the recall of the class."""
    model, tally = fresh("resnet20"), ClassTally()
    wanted = [FULL, Instance.parse("stem@0.5"), Instance.parse("layer2.0@0.5")]
    statistics = calibrate(model, wanted, batches(2, 8))
    data = [(x_NCHW, labels_N % 5 + 2 * (labels_N % 5 > 2)) for x_NCHW, labels_N in [*batches(6, 9), *batches(1, 4, seed=4)]]
    scores = evaluate(model, wanted, data, statistics, tally=tally)
    labels = torch.cat([labels_N for _, labels_N in data])
    assert tally.images == [labels.tolist().count(label) for label in range(7)]
    assert tally.images[3:5] == [0, 0]
    for instance, by_class in zip(scores, tally.top1(), strict=True):
        alone = calibrated_alone(model, instance, batches(2, 8), None)
        with torch.inference_mode():
            predicted = torch.cat([alone(x_NCHW, instance).argmax(1) for x_NCHW, _ in data])
        recalls = recall_score(labels, predicted, labels=range(7), average=None, zero_division=float("nan"))
        assert by_class == [None if math.isnan(recall) else pytest.approx(100 * recall, rel=1e-12) for recall in recalls]
        assert 0 < scores[instance].top1 < 100
    assert scores == evaluate(model, wanted, data, statistics)


@pytest.mark.parametrize(("classes", "has_top5"), [(5, False), (6, True)])
def test_fewer_than_six_classes_have_no_top5(classes, has_top5):
    torch.manual_seed(0)
    model = create_model("resnet20", num_classes=classes)
    data = batches(1, 8, classes=classes)
    score = evaluate(model, [FULL], data, calibrate(model, [FULL], data))[FULL]
    assert (score.top5 is not None) == has_top5


def test_bf16_is_near_fp32():
    model = fresh("resnet20")
    wanted, data = sdpoint_instances(model), batches(4, 16)
    fine = evaluate(model, wanted, data, calibrate(model, wanted, data))
    bf16 = WalkSettings(precision="bf16")
    coarse = evaluate(model, wanted, data, calibrate(model, wanted, data, bf16), bf16)
    for instance in wanted:
        assert coarse[instance].loss == pytest.approx(fine[instance].loss, rel=0.05)
        assert coarse[instance].loss != fine[instance].loss


def test_a_calibration_batch_of_one():
    with pytest.raises(DataError, match=r"one image has no variance to estimate: set data\.batch_size"):
        calibrate(fresh("resnet20"), [FULL], batches(2, 1))


def test_nothing_to_calibrate_with():
    with pytest.raises(DataError, match="no full batch"):
        calibrate(fresh("resnet20"), [FULL], [])


def test_nothing_to_evaluate():
    model = fresh("resnet20")
    with pytest.raises(DataError, match="no image"):
        evaluate(model, [FULL], [], calibrate(model, [FULL], batches(1, 4)))


def test_an_instance_without_statistics():
    model = fresh("resnet20")
    data = batches(1, 4)
    statistics = calibrate(model, [FULL], data)
    with pytest.raises(NotFoundError, match=r"no BatchNorm statistics of layer2\.1\.bn1 after layer2\.0@0\.5"):
        evaluate(model, [Instance.parse("layer2.0@0.5")], data, statistics)


def test_weights_that_are_not_finite():
    model = fresh("resnet20")
    data = batches(1, 4)
    statistics = calibrate(model, [FULL], data)
    model.fc.bias.data[0] = float("nan")
    with pytest.raises(DivergedError, match="loss of full is nan"):
        evaluate(model, [FULL], data, statistics)


def test_an_instance_of_another_network():
    with pytest.raises(InstanceError, match="no point 'maxpool'"):
        Tree(fresh("resnet20"), [Instance.parse("maxpool@0.5")])
