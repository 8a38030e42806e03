import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

from sdpctl.engine.device import pick_device
from sdpctl.engine.settings import TrainSettings
from sdpctl.engine.train import Trainer, learning_rate
from sdpctl.errors import DivergedError, ResourceError
from sdpctl.instance import FULL
from sdpctl.models import create_model
from sdpctl.randomness import derive
from sdpctl.sdpoint import draw_single


def batches(count, seed=0):
    torch.manual_seed(seed)
    return [(torch.randn(8, 3, 16, 16), torch.randint(4, (8,))) for _ in range(count)]


def network():
    torch.manual_seed(2)
    return create_model("resnet20", num_classes=4)


def test_milestones():
    settings = TrainSettings(epochs=115, lr=0.1, milestones=(40, 75, 105))
    rates = [learning_rate(settings.lr, settings, epoch * 10, 10) for epoch in (0, 39, 40, 74, 75, 104, 105, 114)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001], rel=1e-12)
    assert learning_rate(settings.lr, settings, 399, 10) == 0.1


def test_cosine_after_a_warm_up():
    settings = TrainSettings(epochs=10, lr=0.4, schedule="cosine", warmup_epochs=2)
    rates = [learning_rate(settings.lr, settings, step, 5) for step in range(50)]
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
        logits = plain(x_NCHW, *draw(step))
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


def test_the_average_of_the_weights_is_torchs():
    settings, data = TrainSettings(epochs=1, lr=0.05), batches(6)
    draw = draw_single(network().points, (0.5, 0.75), seed=4)
    averaging = Trainer(network(), dataclasses.replace(settings, ema=0.8), draw, steps_per_epoch=6)
    plain = Trainer(network(), settings, draw, steps_per_epoch=6)
    assert plain.evaluated is plain.model
    wanted = AveragedModel(plain.model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    for _ in zip(averaging.steps(data), plain.steps(data), strict=True):
        wanted.update_parameters(plain.model)
        trained, raw = averaging.model.state_dict(), plain.model.state_dict()
        for name, average in averaging.evaluated.state_dict().items():
            assert torch.equal(trained[name], raw[name])
            assert torch.equal(average, wanted.module.state_dict()[name] if average.is_floating_point() else raw[name]), name
    first = "conv1.weight"
    assert not torch.equal(averaging.evaluated.state_dict()[first], trained[first])


def moved(settings, steps=1):
    """Train by plain gradient steps; return how far each parameter moves in the last one, as a multiple of its gradient."""
    model, data = network(), batches(steps)
    trainer = Trainer(model, dataclasses.replace(settings, momentum=0, weight_decay=0), lambda _: (FULL,), steps_per_epoch=4)
    for _ in trainer.steps(data[:-1]):
        pass
    copied = copy.deepcopy(model).train()
    F.cross_entropy(copied(data[-1][0]), data[-1][1]).backward()
    list(trainer.steps(data[-1:]))
    after = dict(model.named_parameters())
    return {
        name: (((before - after[name]).detach() * before.grad).sum() / before.grad.square().sum()).item()
        for name, before in copied.named_parameters()
    }


def test_the_body_has_a_rate_of_its_own():
    for settings, body in ((TrainSettings(lr=0.05), 0.05), (TrainSettings(lr=0.05, lr_body=0.002), 0.002)):
        for name, rate in moved(settings).items():
            assert rate == pytest.approx(0.05 if name.startswith("fc.") else body, rel=0.02), name
    frozen = moved(TrainSettings(lr=0.05, lr_body=0))
    assert {name for name, rate in frozen.items() if rate != 0} == {"fc.weight", "fc.bias"}


def test_the_rate_decays_from_the_last_segment_to_the_first():
    segments = ["conv1", *(f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)), "fc"]
    depth = {"bn1": 0} | {segment: i for i, segment in enumerate(segments)}
    rates = moved(TrainSettings(lr=0.05, layer_decay=0.7))
    assert len(rates) == len(list(network().parameters()))
    for name, rate in rates.items():
        segment = name.split(".")[0] if name.split(".")[0] in depth else ".".join(name.split(".")[:2])
        assert rate == pytest.approx(0.05 * 0.7 ** (10 - depth[segment]), rel=0.02), name


def test_all_rates_follow_the_schedule_and_the_warm_up():
    for steps in (1, 2, 3, 4, 6):
        settings = TrainSettings(epochs=2, lr=0.1, lr_body=0.01, warmup_epochs=0.5, schedule="cosine")
        trainer = Trainer(network(), settings, lambda _: (FULL,), steps_per_epoch=4)
        list(trainer.steps(batches(steps)))
        factor = 0.5 if steps == 1 else (1 + math.cos(math.pi * (steps - 3) / 6)) / 2 if steps > 2 else 1
        assert sorted(group["lr"] for group in trainer.optimizer.param_groups) == pytest.approx([0.01 * factor, 0.1 * factor])


def test_equal_rates_change_no_bit():
    plain, same, flat = (
        Trainer(network(), TrainSettings(epochs=1, lr=0.05, **rates), lambda _: (FULL,), steps_per_epoch=4)
        for rates in ({}, {"lr_body": 0.05}, {"layer_decay": 1.0})
    )
    for trainer in (plain, same, flat):
        list(trainer.steps(batches(4)))
    for name, t in plain.model.state_dict().items():
        assert torch.equal(t, same.model.state_dict()[name])
        assert torch.equal(t, flat.model.state_dict()[name])


MIXES = {
    "mixup": ({"mixup": 0.4}, lambda: [v2.MixUp(alpha=0.4, num_classes=4)]),
    "cutmix": ({"cutmix": 1.0}, lambda: [v2.CutMix(alpha=1.0, num_classes=4)]),
    "both": ({"mixup": 0.2, "cutmix": 1.0}, lambda: [v2.MixUp(alpha=0.2, num_classes=4), v2.CutMix(alpha=1.0, num_classes=4)]),
}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mix", MIXES)
def test_mixing_is_torchvisions(double, mix, weighted, smoothing):
    keys, transforms = MIXES[mix]
    weights = torch.tensor([0.5, 2.0, 1.0, 1.5], dtype=torch.float32) if weighted else None
    settings = TrainSettings(epochs=1, lr=0.005, weight_decay=0, momentum=0, label_smoothing=smoothing, **keys)
    ours, plain, data = network(), network(), batches(8)
    trainer = Trainer(ours, settings, lambda _: (FULL,), steps_per_epoch=8, seed=3, class_weights_K=weights)
    torch.manual_seed(77)  # must not matter
    list(trainer.steps(data))

    optimizer, mixing = torch.optim.SGD(plain.parameters(), lr=0.005), v2.RandomChoice(transforms())
    losses, hits, seen = [], 0, set()
    for step, (x_NCHW, labels_N) in enumerate(data):
        torch.manual_seed(derive(3, "mix", step))
        mixed_NCHW, targets_NK = mixing(x_NCHW, labels_N)
        assert not torch.equal(mixed_NCHW, x_NCHW)
        seen.add("cutmix" if ((mixed_NCHW == x_NCHW) | (mixed_NCHW == x_NCHW.roll(1, 0))).all() else "mixup")
        logits = plain(mixed_NCHW)
        target = targets_NK * (1 - smoothing) + smoothing / 4
        loss = -(target * F.log_softmax(logits, 1) * (1 if weights is None else weights)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        hits += (logits.argmax(1) == targets_NK.argmax(1)).sum().item()
    assert seen == ({"mixup", "cutmix"} if mix == "both" else {mix})
    for (name, mine), theirs in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=name)
    metrics = trainer.finish_epoch()
    assert metrics["loss"] == pytest.approx(sum(losses) / 8, rel=1e-5)
    assert metrics["accuracy"] == 100 * hits / 64


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classes_are_weighted_in_the_loss(smoothing):
    weights = torch.tensor([0.5, 2.0, 1.0, 1.5])
    x_NCHW, labels_N = batches(1)[0]
    settings = TrainSettings(epochs=1, label_smoothing=smoothing)
    trainer = Trainer(network(), settings, lambda _: (FULL,), steps_per_epoch=1, class_weights_K=weights)
    list(trainer.steps([(x_NCHW, labels_N)]))
    log_p_NK = F.log_softmax(network()(x_NCHW), 1)
    target_NK = F.one_hot(labels_N, 4) * (1 - smoothing) + smoothing / 4
    loss = -(target_NK * log_p_NK * weights).sum() / weights[labels_N].sum()
    assert trainer.finish_epoch()["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_batches_are_mixed_by_the_seed_and_the_step():
    first, same, other = (
        Trainer(network(), TrainSettings(epochs=1, mixup=0.4), lambda _: (FULL,), steps_per_epoch=2, seed=seed)
        for seed in (0, 0, 1)
    )
    for trainer in (first, same, other):
        list(trainer.steps(batches(1)))
    weights = [trainer.model.state_dict()["conv1.weight"] for trainer in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


FINE_TUNING = {"ema": 0.9, "lr_body": 0.01, "mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1}


@pytest.mark.parametrize("keys", [{}, {"precision": "bf16"}, FINE_TUNING, {"ema": 0.9, "layer_decay": 0.8}])
def test_a_training_goes_on_to_the_same_bits(keys):
    settings = TrainSettings(epochs=2, **({"lr": 0.05} | keys))
    data = batches(6)

    def trainer(model):
        return Trainer(model, settings, draw_single(model.points, (0.5,), seed=0), steps_per_epoch=6)

    whole = trainer(network())
    list(whole.steps(data))
    first = trainer(network())
    list(first.steps(data[:3]))
    kept = copy.deepcopy((first.evaluated.state_dict(), first.state()))
    second = trainer(network())
    second.evaluated.load_state_dict(kept[0])
    second.load_state(kept[1])
    assert second.step == 3
    list(second.steps(data[3:]))
    for name, t in whole.evaluated.state_dict().items():
        assert torch.equal(t, second.evaluated.state_dict()[name]), name
    for name, t in whole.state().items():
        assert torch.equal(t, second.state()[name]), name
    assert whole.finish_epoch() == second.finish_epoch()


def test_the_first_bad_step_is_named():
    data = batches(5)
    data[2][0][0, 0, 0, 0] = float("nan")
    trainer = Trainer(network(), TrainSettings(epochs=1, lr=0.05), lambda _: (FULL,), steps_per_epoch=5)
    list(trainer.steps(data))
    with pytest.raises(DivergedError, match=r"not finite at step 3 \(epoch 1\)"):
        trainer.check_finite()


def test_weights_that_are_not_finite_are_no_good_checkpoint():
    trainer = Trainer(network(), TrainSettings(epochs=1, lr=0.05), lambda _: (FULL,), steps_per_epoch=5)
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
