"""Several instances in one training step: the gradients are those of separate passes, and shared work is done once."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from sdpctl.engine.cost import Costs
from sdpctl.engine.settings import DistillSettings, TrainSettings
from sdpctl.engine.together import Together
from sdpctl.engine.train import Trainer
from sdpctl.instance import FULL, Instance
from sdpctl.models import create_model

SETS = {
    "resnet20": ("full", "stem@0.5", "layer1.2@0.75", "layer2.1@0.5", "layer1.2@0.75+layer3.0@0.5"),
    "preresnet18": ("full", "maxpool@0.5", "layer2.0@0.5", "layer2.0@0.75"),
    "resnext50": ("layer1.1@0.5", "full", "maxpool@0.75"),
    "twopipe": ("full", "all@0.5", "conv2@0.75"),
    "timm/mobilenetv2_050": None,
    "timm/convnext_atto": None,
}


def network(arch):
    torch.manual_seed(0)
    return create_model(arch, num_classes=3).double().channels_last().train()


def instances_of(arch, model):
    points = model.points
    texts = SETS[arch] or ("full", f"{points[0]}@0.5", f"{points[len(points) // 2]}@0.5", f"{points[0]}@0.75")
    return [Instance.parse(text) for text in texts]


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(4, 3, 32, 32, dtype=torch.float64)


@pytest.mark.parametrize("arch", SETS)
def test_logits_and_gradients_are_those_of_separate_passes_added(arch, images):
    model, labels = network(arch), torch.tensor([0, 1, 2, 1])
    instances = instances_of(arch, model)
    torch.manual_seed(5)
    logits = Together(model)(images, instances)
    sum(F.cross_entropy(each, labels) for each in logits).backward()
    together = {name: p.grad for name, p in model.named_parameters()}
    alone = network(arch)
    for instance, found in zip(instances, logits, strict=True):
        torch.manual_seed(5)  # a network that draws its masks draws the same ones in each pass
        expected = alone(images, instance)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * float(expected.detach().abs().max()))
        F.cross_entropy(expected, labels).backward()
    separate = {name: p.grad for name, p in alone.named_parameters()}
    assert [name for name, grad in separate.items() if grad is None] == [
        name for name, grad in together.items() if grad is None
    ]
    largest = max(float(grad.abs().max()) for grad in separate.values() if grad is not None)
    for name, grad in separate.items():
        if grad is not None:  # some gradients are 0 but for rounding: those of what comes before a batch norm
            torch.testing.assert_close(together[name], grad, rtol=1e-10, atol=1e-12 * largest, msg=name)


@pytest.mark.parametrize("arch", ["resnet20", "resnext50", "timm/mobilenetv2_050"])
def test_what_instances_share_is_computed_once(arch, images):
    """The MACs that torch counts while the pass runs are those of the tree, and fewer than those of separate passes."""
    model = network(arch)
    instances, costs = instances_of(arch, model), Costs(model, (3, 32, 32))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Together(model)(images, instances)
    separate = sum(costs.of(instance).macs for instance in instances)
    bias = sum(p.numel() for name, p in model.named_parameters() if name in model.head_names[1:]) * len(instances)
    assert counter.get_total_flops() // 2 // len(images) == costs.together(instances) - bias < separate


def test_running_statistics_of_a_shared_batch_norm_are_updated_once(images):
    model, alone = network("resnet20"), network("resnet20")
    Together(model)(images, [FULL, Instance.parse("layer2.1@0.5")])
    alone(images)
    torch.testing.assert_close(model.get_buffer("layer2.1.bn2.running_mean"), alone.get_buffer("layer2.1.bn2.running_mean"))
    assert model.get_buffer("layer2.1.bn2.num_batches_tracked") == 1
    assert model.get_buffer("layer2.2.bn1.num_batches_tracked") == 2


def test_maps_are_kept_once_for_the_backward_pass(images):
    model = network("resnet20")

    def kept(*texts):
        sizes = {}

        def keep(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = Together(model)(images, [Instance.parse(text) for text in texts])
        assert logits
        return sum(sizes.values())

    full, late, pair = kept("full"), kept("layer3.1@0.5"), kept("full", "layer3.1@0.5")
    assert late > 0.9 * full
    assert pair < 1.1 * full


@pytest.mark.parametrize("ordered", [("full", "layer1.0@0.5", "stem@0.75"), ("stem@0.75", "layer1.0@0.5", "full")])
def test_the_order_of_the_instances_is_the_order_of_the_logits(ordered, images):
    model = network("resnet20")
    instances = [Instance.parse(text) for text in ordered]
    for instance, found in zip(instances, Together(model)(images, instances), strict=True):
        torch.testing.assert_close(found, model(images, instance))


@pytest.mark.parametrize("teacher", [False, True], ids=["full", "a network"])
@pytest.mark.parametrize(("weight", "temperature", "smoothing"), [(1.0, 1.0, 0.0), (0.3, 4.0, 0.1)])
def test_steps_with_distillation_equal_a_plain_loop(weight, temperature, smoothing, teacher):
    """The loss of Hinton et al. 2015, written out: the student's probabilities compared with those of the teacher."""
    drawn = [tuple(map(Instance.parse, texts)) for texts in (("full", "stem@0.5"), ("full", "stem@0.5", "layer2.1@0.75"))]
    ours, plain, known = network("resnet20"), network("resnet20"), network("resnet20").eval()
    torch.manual_seed(3)
    batches = [(torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.randint(3, (4,))) for _ in drawn]
    distill = DistillSettings(temperature=temperature, weight=weight)
    settings = TrainSettings(epochs=1, lr=0.05, momentum=0, weight_decay=0, distill=distill, label_smoothing=smoothing)
    teach = torch.no_grad()(lambda x_NCHW: known(x_NCHW)) if teacher else None
    trainer = Trainer(ours, settings, drawn.__getitem__, steps_per_epoch=2, teacher=teach)
    assert list(trainer.steps(batches)) == [1, 2]
    losses, hits = [], []
    for instances, (x_NCHW, labels_N) in zip(drawn, batches, strict=True):
        loss, taught, mean_hits = 0, known(x_NCHW).detach() if teacher else None, 0
        for instance in instances:
            logits = plain(x_NCHW, instance)
            own = F.cross_entropy(logits, labels_N, label_smoothing=smoothing)
            if taught is not None:
                p_T, p_S = (taught / temperature).softmax(1), (logits / temperature).softmax(1)
                divergence = (p_T * (p_T.log() - p_S.log())).sum(1).mean() * temperature**2
                own = (1 - weight) * own + weight * divergence
            elif not teacher:
                taught = logits.detach()
            loss = loss + own
            mean_hits += (logits.argmax(1) == labels_N).sum().item() / len(instances)
        plain.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter -= 0.05 * parameter.grad
        losses.append(loss.item() / len(instances))
        hits.append(mean_hits)
    for (name, mine), theirs in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11, msg=name)
    metrics = trainer.finish_epoch()
    assert metrics["loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert metrics["accuracy"] == pytest.approx(100 * sum(hits) / 8)
