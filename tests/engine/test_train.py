import copy
import math

import pytest
import torch
import torch.nn.functional as F

from sdpctl.engine.device import pick_device
from sdpctl.engine.settings import TrainSettings
from sdpctl.engine.train import Trainer, learning_rate
from sdpctl.errors import DivergedError, ResourceError
from sdpctl.instance import FULL
from sdpctl.models import create_model
from sdpctl.sdpoint import draw_single


def batches(count, seed=0):
    torch.manual_seed(seed)
    return [(torch.randn(8, 3, 16, 16), torch.randint(4, (8,))) for _ in range(count)]


def network():
    torch.manual_seed(2)
    return create_model("resnet20", num_classes=4)


def test_milestones():
    settings = TrainSettings(epochs=115, lr=0.1, milestones=(40, 75, 105))
    rates = [learning_rate(settings, epoch * 10, 10) for epoch in (0, 39, 40, 74, 75, 104, 105, 114)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001], rel=1e-12)
    assert learning_rate(settings, 399, 10) == 0.1


def test_cosine_after_a_warm_up():
    settings = TrainSettings(epochs=10, lr=0.4, schedule="cosine", warmup_epochs=2)
    rates = [learning_rate(settings, step, 5) for step in range(50)]
    assert rates[:10] == pytest.approx([0.04 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(0.4)
    assert rates[30] == pytest.approx(0.2)
    assert rates[49] == pytest.approx(0.2 * (1 + math.cos(math.pi * 39 / 40)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_steps_equal_a_plain_loop(double, smoothing):
    settings = TrainSettings(epochs=1, lr=0.05, momentum=0.9, weight_decay=1e-3, milestones=(1,), label_smoothing=smoothing)
    ours, plain = network(), network()
    draw = draw_single(ours.points, (0.5, 0.75), seed=4)
    data = batches(4)
    trainer = Trainer(ours, settings, draw, steps_per_epoch=4)
    assert list(trainer.steps(data)) == [1, 2, 3, 4]

    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    losses, hits = [], 0
    for step, (x_NCHW, labels_N) in enumerate(data):
        logits = plain(x_NCHW, draw(step))
        log_p = F.log_softmax(logits.float(), 1)
        target = F.one_hot(labels_N, 4) * (1 - smoothing) + smoothing / 4
        loss = -(target * log_p).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        hits += (logits.argmax(1) == labels_N).sum().item()
    for (name, mine), theirs in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7, msg=name)
    metrics = trainer.finish_epoch()
    assert metrics["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert metrics["accuracy"] == 100 * hits / 32
    assert metrics["lr"] == 0.05


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_goes_on_to_the_same_bits(precision):
    settings = TrainSettings(epochs=2, lr=0.05, precision=precision)
    data = batches(6)

    def trainer(model):
        return Trainer(model, settings, draw_single(model.points, (0.5,), seed=0), steps_per_epoch=6)

    whole = trainer(network())
    list(whole.steps(data))
    first = trainer(network())
    list(first.steps(data[:3]))
    kept = copy.deepcopy((first.model.state_dict(), first.state()))
    second = trainer(network())
    second.model.load_state_dict(kept[0])
    second.load_state(kept[1])
    assert second.step == 3
    list(second.steps(data[3:]))
    for name, t in whole.model.state_dict().items():
        assert torch.equal(t, second.model.state_dict()[name]), name
    for name, t in whole.state().items():
        assert torch.equal(t, second.state()[name]), name
    assert whole.finish_epoch() == second.finish_epoch()


def test_the_first_bad_step_is_named():
    data = batches(5)
    data[2][0][0, 0, 0, 0] = float("nan")
    trainer = Trainer(network(), TrainSettings(epochs=1, lr=0.05), lambda _: FULL, steps_per_epoch=5)
    list(trainer.steps(data))
    with pytest.raises(DivergedError, match=r"not finite at step 3 \(epoch 1\)"):
        trainer.check_finite()


def test_weights_that_are_not_finite_are_no_good_checkpoint():
    trainer = Trainer(network(), TrainSettings(epochs=1, lr=0.05), lambda _: FULL, steps_per_epoch=5)
    list(trainer.steps(batches(1)))
    trainer.check_finite()
    next(trainer.model.parameters()).data[0] = float("inf")
    with pytest.raises(DivergedError, match="weights are not finite after step 1"):
        trainer.check_finite()


def test_a_device_that_is_not_there():
    with pytest.raises(ResourceError, match=r"device 'cuda:77' cannot be used here .* set device=auto"):
        pick_device("cuda:77")
    with pytest.raises(ResourceError, match="device 'toaster'"):
        pick_device("toaster")
    assert pick_device("cpu") == torch.device("cpu")
