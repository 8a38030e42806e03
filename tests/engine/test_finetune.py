"""Fine-tuning of single instances, against a plain loop of torch, and what it must leave as it was."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from networks import randomise_norms
from torch import nn

from sdpctl.cascade import Cascade
from sdpctl.engine.calibrate import CalibratedNorms, calibrate
from sdpctl.engine.cascade import CascadeRun, answers
from sdpctl.engine.evaluate import evaluate
from sdpctl.engine.finetune import finetune, own_level, own_names
from sdpctl.engine.settings import FinetuneSettings
from sdpctl.engine.tensors import statistics_from_bytes, statistics_to_bytes, wanted_statistics
from sdpctl.engine.tree import Tree
from sdpctl.errors import DivergedError, IntegrityError, ModelError
from sdpctl.export.network import OneInstance
from sdpctl.instance import FULL, Instance, check_nodes
from sdpctl.models import create_model
from sdpctl.sdpoint import sdpoint_instances

EXACT = {"rtol": 1e-10, "atol": 1e-10}
CLASSES = 7
STEPS = 4


def fresh(arch, **options):
    torch.manual_seed(1)
    return randomise_norms(create_model(arch, num_classes=CLASSES, **options)).eval()


def batches(count, size, seed=0, dtype=None):
    drawn = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 24, 20, generator=drawn, dtype=dtype), torch.randint(CLASSES, (size,), generator=drawn))
        for _ in range(count)
    ]


def given(instance):
    """Return the batches of an instance, which are its own."""
    return batches(STEPS, 6, seed=sum(map(ord, str(instance))))


CASES = {
    ("resnet20", "stem@0.5"): [f"layer{i}.{j}.bn{k}" for i in (1, 2, 3) for j in (0, 1, 2) for k in (1, 2)],
    ("resnet20", "layer2.1@0.75"): [f"layer{i}.{j}.bn{k}" for i, j in ((2, 2), (3, 0), (3, 1), (3, 2)) for k in (1, 2)],
    ("resnet20", "layer3.2@0.5"): [],
    ("resnet20", "full"): [],
    ("preresnet18", "layer4.0@0.5"): ["layer4.1.bn1", "layer4.1.bn2", "bn2"],
    ("preresnet18", "full"): ["bn2"],
    ("twopipe", "all@0.75"): ["bn4", "bn5"],
    ("timm/mobilenetv3_small_100", "blocks.4.2@0.5"): None,
}


def parameters_of(norms):
    return {f"{name}.{side}" for name in norms for side in ("weight", "bias")}


def trained_alone(model, instance, names, settings, class_weights_K=None):
    """Let torch train some parameters of one instance, all others frozen; return the network."""
    alone = copy.deepcopy(model).train()
    for module in alone.modules():
        if not isinstance(module, nn.BatchNorm2d) and not any(module.children()):
            module.eval()  # dropout
    alone.training = False
    if hasattr(alone, "library_network"):
        alone.library_network.training = False
    for name, parameter in alone.named_parameters():
        parameter.requires_grad_(name in names)
    optimizer = torch.optim.SGD([p for p in alone.parameters() if p.requires_grad], lr=1.0, momentum=0.9)
    for step, (x_NCHW, labels_N) in enumerate(given(instance)):
        optimizer.param_groups[0]["lr"] = settings.lr / 2 * (1 + math.cos(step / settings.steps * math.pi))
        optimizer.zero_grad()
        F.cross_entropy(alone(x_NCHW, instance), labels_N, weight=class_weights_K).backward()
        optimizer.step()
    return alone


@pytest.mark.parametrize(("arch", "text"), CASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_each_step_is_that_of_a_plain_loop_with_the_same_frozen_parameters(double, arch, text, weighted):
    model, instance = fresh(arch), Instance.parse(text)
    tree, settings = Tree(model, sdpoint_instances(model)), FinetuneSettings(instances=(text,), steps=STEPS, lr=0.05)
    weights_K = torch.linspace(0.5, 2, CLASSES) if weighted else None
    names = set(own_names(tree, instance))
    if CASES[arch, text] is not None:
        assert names == parameters_of(CASES[arch, text]) | {"fc.weight", "fc.bias"}
    before = {name: t.clone() for name, t in model.state_dict().items()}
    tuned = finetune(tree, given, settings, [instance], class_weights_K=weights_K)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    alone = trained_alone(model, instance, names, settings, weights_K)
    node = instance.among(model.points)
    assert tuned.keys() == {(node, name) for name in names}
    for name in names:
        torch.testing.assert_close(tuned[node, name], alone.get_parameter(name), **EXACT)
        assert not torch.equal(tuned[node, name], before[name])


def test_what_an_instance_shares_is_not_its_own(double):
    """An instance that shrinks again passes the nodes in between; `full` has those after the last point of all."""
    model = fresh("resnet20")
    first, both, last = map(Instance.parse, ("stem@0.5", "stem@0.5+layer2.1@0.5", "layer2.0@0.5"))
    tree = Tree(model, [FULL, first, both, last])
    names = [segment.name for segment in tree.segments]
    assert names[own_level(tree, first)] == "layer2.2"
    assert names[own_level(tree, both)] == "layer2.2"
    assert names[own_level(tree, last)] == "layer2.1"
    assert names[own_level(tree, FULL)] == "layer2.1"
    assert names[own_level(Tree(model, [first]), first)] == "layer1.0"


def tuned_network(arch, texts, lr=0.05):
    model, data = fresh(arch), batches(2, 5, seed=3)
    grid = [*sdpoint_instances(model)]
    settings = FinetuneSettings(instances=tuple(texts), steps=STEPS, lr=lr)
    tuned = finetune(Tree(model, grid), given, settings, list(map(Instance.parse, texts)))
    return model, grid, calibrate(model, grid, data), calibrate(model, grid, data, tuned=tuned)


@pytest.mark.parametrize("arch", ["resnet20", "preresnet18", "twopipe"])
def test_the_others_are_bit_for_bit_what_they_were(arch):
    model = fresh(arch)
    texts = ["all@0.5"] if arch == "twopipe" else ["stem@0.5" if arch == "resnet20" else "maxpool@0.5", "layer2.0@0.5", "full"]
    model, grid, plain, tuned = tuned_network(arch, texts)
    mine = {Instance.parse(text).among(model.points) for text in texts}
    for side, other in ((plain.mean, tuned.mean), (plain.var, tuned.var)):
        own = {(node, name) for node, name in side if (node, f"{name}.weight") in tuned.tuned}
        assert own
        assert {key for key in side if not torch.equal(side[key], other[key])} <= own
    x_NCHW, _ = batches(1, 9, seed=8)[0]
    tree = Tree(model, grid)
    with torch.inference_mode():
        before, after = (tree.walk(x_NCHW, CalibratedNorms(model, each)) for each in (plain, tuned))
    for instance in grid:
        assert torch.equal(before[instance], after[instance]) == (instance.among(model.points) not in mine)


@pytest.mark.parametrize(("arch", "text"), [key for key in CASES if key != ("resnet20", "layer3.2@0.5")])
def test_logits_are_those_of_the_instance_trained_and_calibrated_alone(double, arch, text):
    model, instance, data = fresh(arch), Instance.parse(text), batches(2, 5, seed=3)
    grid, settings = sdpoint_instances(model), FinetuneSettings(instances=(text,), steps=STEPS, lr=0.05)
    tree = Tree(model, grid)
    names = set(own_names(tree, instance))
    tuned = finetune(tree, given, settings, [instance])
    statistics = calibrate(model, grid, data, tuned=tuned)
    alone = trained_alone(model, instance, names, settings).eval()
    norms = [module for module in alone.modules() if isinstance(module, nn.BatchNorm2d)]
    for bn in norms:
        bn.reset_running_stats()
        bn.train()
    with torch.no_grad():
        for number, (x_NCHW, _) in enumerate(data, 1):
            for bn in norms:
                bn.momentum = 1 / number  # the mean of all batches
            alone(x_NCHW, instance)
    x_NCHW, labels_N = batches(1, 4, seed=8)[0]
    alone.eval()
    with torch.inference_mode():
        expected = alone(x_NCHW, instance)
        torch.testing.assert_close(tree.walk(x_NCHW, CalibratedNorms(model, statistics))[instance], expected, **EXACT)
        torch.testing.assert_close(OneInstance(model, instance, statistics)(x_NCHW), expected, **EXACT)
    score = evaluate(model, grid, [(x_NCHW, labels_N)], statistics)[instance]
    assert score.loss == pytest.approx(F.cross_entropy(expected, labels_N).item(), rel=1e-10)


@pytest.mark.parametrize("averaged", [False, True])
def test_a_cascade_answers_by_the_classifiers_of_its_members(double, averaged):
    """Each image's answer is that of the tree's logits, whichever member has a classifier of its own."""
    model, _, plain, statistics = tuned_network("resnet20", ["layer1.1@0.5", "full"])
    norms = CalibratedNorms(model, statistics)
    cascade = Cascade.parse(("mean/" if averaged else "") + "layer1.1@0.5~2.0:0.4/stem@0.5:0.5/full")
    x_NCHW = torch.randn(12, 3, 16, 16)
    with torch.inference_mode():
        found, left = CascadeRun(model, cascade, norms)(x_NCHW)
        logits = Tree(model, cascade.members).walk(x_NCHW, norms)
    expected, member = answers(cascade, [logits[instance] for instance in cascade.members])
    assert left.tolist() == member.tolist()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    with torch.inference_mode():
        without, _ = CascadeRun(model, cascade, CalibratedNorms(model, plain))(x_NCHW)
    assert not torch.allclose(without, found, rtol=1e-3)


def test_threads_run_one_network_at_the_same_time():
    model, grid, _, statistics = tuned_network("resnet20", ["stem@0.5", "layer1.0@0.5", "full"])
    norms, trees = CalibratedNorms(model, statistics), {instance: Tree(model, [instance]) for instance in grid}
    x_NCHW, _ = batches(1, 3, seed=8)[0]

    @torch.inference_mode()
    def run(instance):
        return trees[instance].walk(x_NCHW, norms)[instance]

    expected = {instance: run(instance) for instance in grid}
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(run, grid * 10))
    assert all(torch.equal(logits, expected[instance]) for logits, instance in zip(found, grid * 10, strict=True))


def test_the_result_depends_on_neither_the_other_instances_nor_their_order():
    _, _, _, three = tuned_network("resnet20", ["stem@0.5", "layer1.0@0.5", "full"])
    _, _, _, one = tuned_network("resnet20", ["layer1.0@0.5"])
    for key, values in one.tuned.items():
        assert torch.equal(values, three.tuned[key])
    assert one.tuned.keys() < three.tuned.keys()


def test_round_trip_and_what_is_absent_without_it():
    model, _, plain, tuned = tuned_network("resnet20", ["stem@0.5", "full"])
    content, described = statistics_to_bytes(tuned)
    assert set(described["tuned"]) == {"stem@0.5", "full"}
    check_nodes(described, "")
    wanted = wanted_statistics(described, model, "nodes.json")
    found = statistics_from_bytes(content, described, wanted, "s")
    for side in ("mean", "var", "tuned"):
        ours, theirs = getattr(found, side), getattr(tuned, side)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert "tuned" not in statistics_to_bytes(plain)[1]


HOSTILE = [
    ({"layer2.0@0.5": ["fc.weight"]}, r"tuned\.layer2\.0@0\.5: these statistics have no such instance"),
    ({"stem@0.5": ["conv1.weight"]}, "'conv1.weight' is neither of a batch norm of this node nor of the classifier"),
    ({"stem@0.5": ["bn1.weight"]}, "'bn1.weight' is neither"),
    ({"stem@0.5": ["layer1.0.bn1.running_mean"]}, "is neither"),
    ({"stem@0.5": ["fc.weight", "fc.bias"]}, "the tensor 'stem@0.5/layer1.0.bn1.* does not belong here"),
    ({"stem@0.5": ["fc.weight", "layer9.bn1.weight"]}, "'layer9.bn1.weight' is neither"),
]


@pytest.mark.parametrize(("tuned", "reason"), HOSTILE)
def test_hostile_documents(tuned, reason):
    model, data = fresh("resnet20"), batches(2, 5)
    instances = [FULL, Instance.parse("stem@0.5")]
    settings = FinetuneSettings(instances=("stem@0.5",), steps=1)
    mine = finetune(Tree(model, instances), given, settings, instances[1:])
    content, described = statistics_to_bytes(calibrate(model, instances, data, tuned=mine))
    described["tuned"] = tuned
    check_nodes(described, "")
    with pytest.raises(IntegrityError, match=reason):
        statistics_from_bytes(content, described, wanted_statistics(described, model, "nodes.json"), "s")


@pytest.mark.parametrize(
    "tuned", [[], {"stem": ["fc.weight"]}, {"stem@0.5": []}, {"stem@0.5": [7]}, {"stem@0.50": ["fc.weight"]}]
)
def test_documents_of_a_different_shape(tuned):
    _, described = statistics_to_bytes(calibrate(fresh("resnet20"), [FULL], batches(1, 4)))
    with pytest.raises(ValueError, match="tuned"):
        check_nodes(described | {"tuned": tuned}, "")


def test_values_that_are_not_finite():
    model = fresh("resnet20")
    settings = FinetuneSettings(instances=("stem@0.5",), steps=3, lr=1e30)
    with pytest.raises(DivergedError, match=r"stem@0\.5: .* is not finite after 3 steps; lower calibrate\.finetune\.lr"):
        finetune(Tree(model, [FULL, Instance.parse("stem@0.5")]), given, settings, [Instance.parse("stem@0.5")])


def test_a_network_without_a_classifier_at_its_end(monkeypatch):
    model = fresh("resnet20")
    monkeypatch.setattr(type(model), "head_names", ("conv1.weight",))
    with pytest.raises(ModelError, match="no classifier after its last point"):
        own_names(Tree(model, [FULL]), FULL)


def test_a_network_without_batch_norms_trains_its_classifier(double):
    model = fresh("timm/convnext_atto")
    instance = Instance.parse("stages.3.blocks.0@0.5")
    data = [(F.interpolate(x_NCHW, size=(64, 64)), labels_N) for x_NCHW, labels_N in batches(2, 3)]
    settings = FinetuneSettings(instances=(str(instance),), steps=2, lr=0.1)
    tree = Tree(model, [FULL, instance])
    tuned = finetune(tree, lambda _: data, settings, [instance])
    assert tuned.keys() == {(instance, name) for name in model.head_names}
    statistics = calibrate(model, tree.instances, [], tuned=tuned)
    alone = copy.deepcopy(model)
    with torch.inference_mode():
        expected = {FULL: model(data[0][0])}
        for (_, name), values in tuned.items():
            alone.get_parameter(name).copy_(values)
        expected[instance] = alone(data[0][0], instance)
        found = tree.walk(data[0][0], CalibratedNorms(model, statistics))
    for each, logits in expected.items():
        torch.testing.assert_close(found[each], logits, **EXACT)


def test_bf16_is_near_fp32():
    model = fresh("resnet20")
    tree, instance = Tree(model, sdpoint_instances(model)), Instance.parse("stem@0.5")
    settings = FinetuneSettings(instances=("stem@0.5",), steps=STEPS, lr=0.01)
    fine = finetune(tree, given, settings, [instance])
    coarse = finetune(tree, given, settings, [instance], precision="bf16")
    for key, values in fine.items():
        torch.testing.assert_close(coarse[key], values, rtol=0.02, atol=0.02)
        assert coarse[key].dtype == torch.float32
    assert any(not torch.equal(coarse[key], values) for key, values in fine.items())
