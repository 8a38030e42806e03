import warnings

import pytest
import torch

from sdpctl.engine.calibrate import calibrate
from sdpctl.engine.compile import Compiled
from sdpctl.engine.evaluate import evaluate
from sdpctl.engine.replay import Replay
from sdpctl.engine.settings import DistillSettings, TrainSettings
from sdpctl.engine.teacher import Teacher
from sdpctl.engine.train import Trainer
from sdpctl.instance import Instance
from sdpctl.models import create_model
from sdpctl.sdpoint import sdpoint_instances


def test_on_a_cpu_the_function_itself_runs_each_time():
    calls = []
    doubled = Replay(lambda x: calls.append(1) or 2 * x)
    for value in (1.0, 2.0, 3.0):
        assert torch.equal(doubled(torch.full((2,), value)), torch.full((2,), 2 * value))
    assert len(calls) == 3


@pytest.mark.gpu
def test_a_gpu_computes_from_python_twice_and_replays_with_the_values_of_each_call():
    calls, total = [], torch.zeros(2, device="cuda")

    def counted(x):
        calls.append(1)
        total.add_(x)
        return 2 * x

    doubled = Replay(counted)
    for value in (1.0, 2.0, 3.0, 4.0):
        assert doubled(torch.full((2,), value, device="cuda")).tolist() == [2 * value] * 2
    assert total.tolist() == [10.0] * 2
    assert len(calls) == 2


@pytest.mark.gpu
def test_plain_values_are_part_of_what_is_recorded():
    scaled = Replay(lambda x, y, factor: factor * x + y)
    one = torch.ones(3, device="cuda")
    for factor in (2.0, 5.0, 2.0, 5.0, 2.0, 5.0):
        assert scaled(one, 10 * one, factor).tolist() == [factor + 10] * 3
    assert len(scaled._graphs) == 2


@pytest.mark.gpu
def test_a_function_that_waits_for_the_device_runs_each_time_with_one_warning():
    random = Replay(lambda x: x + torch.rand_like(x))
    for _ in range(3):
        random(torch.zeros(2, device="cuda"))
    read = Replay(lambda x: x + x.sum().item())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for value in (1.0, 2.0, 3.0):
            assert read(torch.full((2,), value, device="cuda")).tolist() == [3 * value] * 2
    assert ["CUDA graph" in str(warning.message) for warning in seen] == [True]
    assert torch.rand(2, device="cuda").max() < 1  # torch's generator, other graphs and the allocator are as they were
    assert len(random._graphs) == 1
    assert 0 < random(torch.zeros(2, device="cuda")).max() < 1
    del read
    large = torch.empty(2**28, device="cuda")
    reserved = torch.cuda.memory_reserved()
    del large
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved - 2**30


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["resnet18", "preresnet50", "twopipe", "timm/resnet18", "timm/mobilenetv3_small_050"])
def test_a_gpu_calibrates_and_scores_as_a_cpu_does_in_float64(arch, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    model = create_model(arch, num_classes=7).channels_last()
    grid, images = sdpoint_instances(model), torch.randn(5, 12, 3, 64, 64)
    labels = torch.arange(12) % 7
    batches = [(x.contiguous(memory_format=torch.channels_last), labels) for x in images]
    exact = calibrate(model.double(), grid, [(x.double(), labels) for x, _ in batches])
    scores = evaluate(model, grid, [(x.double(), labels) for x, _ in batches], exact)
    model, there = model.float().to("cuda"), [(x.to("cuda"), labels.to("cuda")) for x, _ in batches]
    found = calibrate(model, grid, there)  # the first batch from Python, the second recorded, the others replayed
    for key, mean in exact.mean.items():  # each norm magnifies the rounding of float32 before it
        scale = exact.var[key].max().sqrt()
        assert float((found.mean[key].cpu() - mean).abs().max() / scale) < 1e-3, key
        assert float((found.var[key].cpu() - exact.var[key]).abs().max() / exact.var[key].max()) < 1e-3, key
    for instance, score in evaluate(model, grid, there, found).items():
        assert score.loss == pytest.approx(scores[instance].loss, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("taught", ["", "by full", "by a network"])
@pytest.mark.filterwarnings("default")  # torch's compiler raises and ignores some warnings of its own
def test_a_replayed_training_has_the_bits_of_one_that_is_not_replayed(taught, compiled, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    full, early, late = (Instance.parse(text) for text in ("full", "layer2.0@0.5", "layer3.0@0.5"))
    steps = [(full, early), (full, early, late)] if taught else [(full,), (early,)]
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(8, 3, 32, 32, generator=generator).cuda(), torch.arange(8).cuda() % 3) for _ in range(8)]
    ends, recorded = [], []
    for replays in (True, False):
        torch.manual_seed(0)
        model = create_model("timm/resnet18" if not compiled else "resnet20", num_classes=3).cuda().channels_last()
        forward = Compiled(model, dynamic=False) if compiled else None
        settings = TrainSettings(lr=0.01, precision="bf16", distill=DistillSettings(temperature=2.0) if taught else None)
        known = create_model("resnet20", num_classes=3).cuda() if taught == "by a network" else None
        teacher = None if known is None else Teacher(known, batches)
        trainer = Trainer(model, settings, lambda step: steps[step % 2], 8, compiled=forward, teacher=teacher)
        trainer._passing._records = replays
        for _ in trainer.steps(batches):
            pass
        recorded.append(len(trainer._passing._graphs))
        ends.append((trainer.finish_epoch(), {name: t.cpu() for name, t in model.state_dict().items()}))
    assert recorded == [2, 0]
    assert ends[0][0] == ends[1][0]
    for name, tensor in ends[1][1].items():
        assert torch.equal(ends[0][1][name], tensor), name
