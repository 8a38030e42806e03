"""A CUDA device against the CPU: to rounding in float64, and to 1e-5 of the largest value in float32 without TF32."""

import pytest
import torch
from networks import randomise_norms

from sdpctl.engine.calibrate import CalibratedNorms, calibrate
from sdpctl.engine.device import pick_device
from sdpctl.engine.evaluate import evaluate
from sdpctl.engine.settings import TrainSettings
from sdpctl.engine.train import Trainer
from sdpctl.engine.tree import Tree
from sdpctl.instance import Instance
from sdpctl.models import create_model
from sdpctl.sdpoint import draw_single

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
INSTANCES = [Instance.parse(text) for text in ("full", "layer1.0@0.5", "layer2.1@0.75", "layer1.0@0.5+layer3.0@0.75")]
CLASSES = 7
SHARES = {torch.float64: 1e-11, torch.float32: 1e-5}
"""The difference that is allowed, as a share of the largest value."""


@pytest.fixture(autouse=True)
def without_tf32():
    """Let convolutions compute in full float32: cuDNN rounds their factors to TF32 by default."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def on_both(arch, dtype):
    """Return the same network on the CPU and on the CUDA device."""
    torch.manual_seed(1)
    options = {"num_classes": CLASSES} | ({} if arch == "resnet20" else {"stem": "small"})
    network = randomise_norms(create_model(arch, **options)).to(dtype).channels_last().eval()
    other = create_model(arch, **options).to(dtype)
    other.load_state_dict(network.state_dict())
    return network, other.to(pick_device(DEVICE)).channels_last().eval()


def batches(dtype, count, device="cpu"):
    generator = torch.Generator().manual_seed(3)
    made = [
        (torch.randn(6, 3, 20, 24, generator=generator, dtype=dtype), torch.randint(CLASSES, (6,), generator=generator))
        for _ in range(count)
    ]
    return [(x_NCHW.to(device), labels_N.to(device)) for x_NCHW, labels_N in made]


def check_close(found, wanted):
    assert found.device.type == DEVICE
    assert wanted.device.type == "cpu"
    assert found.shape == wanted.shape
    assert (found.cpu() - wanted).abs().max() <= SHARES[wanted.dtype] * wanted.abs().max()


@pytest.mark.parametrize("dtype", SHARES, ids=["float64", "float32"])
@pytest.mark.parametrize("arch", ["resnet20", "preresnet18", "resnext50"])
@torch.inference_mode()
def test_logits(arch, dtype):
    on_cpu, on_gpu = on_both(arch, dtype)
    ((x_NCHW, _),) = batches(dtype, 1)
    for instance in INSTANCES:
        check_close(on_gpu(x_NCHW.to(DEVICE), instance), on_cpu(x_NCHW, instance))


# Of deep networks on small maps in float32, calibration magnifies rounding: statistics of few values divide small differences.
@pytest.mark.parametrize(
    ("arch", "dtype"), [("resnet20", torch.float32), ("resnet20", torch.float64), ("preresnet18", torch.float64)], ids=str
)
def test_calibration_and_evaluation(arch, dtype):
    on_cpu, on_gpu = on_both(arch, dtype)
    wanted = calibrate(on_cpu, INSTANCES, batches(dtype, 3))
    found = calibrate(on_gpu, INSTANCES, batches(dtype, 3, DEVICE))
    assert found.mean.keys() == wanted.mean.keys()
    for key in wanted.mean:
        check_close(found.mean[key], wanted.mean[key])
        check_close(found.var[key], wanted.var[key])
    x_NCHW, _ = batches(dtype, 1)[0]
    with torch.inference_mode():
        walked = [
            Tree(model, INSTANCES).walk(x, CalibratedNorms(model, statistics))
            for model, x, statistics in ((on_gpu, x_NCHW.to(DEVICE), found), (on_cpu, x_NCHW, wanted))
        ]
    assert list(walked[0]) == list(walked[1]) == INSTANCES
    for instance in INSTANCES:
        check_close(walked[0][instance], walked[1][instance])
    expected = evaluate(on_cpu, INSTANCES, batches(dtype, 4), wanted)
    scores = evaluate(on_gpu, INSTANCES, batches(dtype, 4, DEVICE), found)
    for instance, score in scores.items():
        assert score.images == expected[instance].images == 24
        assert score.loss == pytest.approx(expected[instance].loss, rel=SHARES[dtype])
        assert score.top1 == expected[instance].top1


@pytest.mark.parametrize("options", [{}, {"ema": 0.5}, {"mixup": 0.2, "cutmix": 1.0}], ids=["plain", "ema", "mixed"])
def test_steps_of_a_training(options):
    settings, trainers = TrainSettings(epochs=1, lr=0.05, **options), []
    for model, device in zip(on_both("resnet20", torch.float64), ("cpu", DEVICE), strict=True):
        trainer = Trainer(model, settings, draw_single(model.points, (0.5, 0.75), seed=4), steps_per_epoch=3)
        assert list(trainer.steps(batches(torch.float64, 3, device))) == [1, 2, 3]
        trainers.append(trainer)
    on_cpu, on_gpu = trainers
    wanted = on_cpu.evaluated.state_dict()
    for name, value in on_gpu.evaluated.state_dict().items():
        if value.is_floating_point():
            check_close(value, wanted[name])
    assert on_gpu.finish_epoch() == pytest.approx(on_cpu.finish_epoch(), rel=1e-9)


def test_steps_of_a_training_in_bfloat16():
    settings, losses = TrainSettings(epochs=1, lr=0.01, precision="bf16"), []
    for model, device in zip(on_both("resnet20", torch.float32), ("cpu", DEVICE), strict=True):
        trainer = Trainer(model, settings, lambda _: INSTANCES[1:2], steps_per_epoch=3)
        assert list(trainer.steps(batches(torch.float32, 3, device))) == [1, 2, 3]
        losses.append(trainer.finish_epoch()["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)  # eight bits of each product
