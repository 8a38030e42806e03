import warnings

import pytest
import torch

from sdpctl.engine.calibrate import calibrate
from sdpctl.engine.evaluate import evaluate
from sdpctl.engine.replay import Replay
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
    assert doubled(torch.full((1,), 7.0, device="cuda").expand(2).clone()).tolist() == [14.0] * 2
    assert total.tolist() == [17.0] * 2
    assert len(calls) == 2


@pytest.mark.gpu
def test_a_function_that_waits_for_the_device_runs_each_time_with_one_warning():
    read = Replay(lambda x: x + x.sum().item())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for value in (1.0, 2.0, 3.0):
            assert read(torch.full((2,), value, device="cuda")).tolist() == [3 * value] * 2
    assert ["CUDA graph" in str(warning.message) for warning in seen] == [True]


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
    for key, mean in exact.mean.items():
        scale = exact.var[key].max().sqrt()
        assert float((found.mean[key].cpu() - mean).abs().max() / scale) < 1e-4, key
        assert float((found.var[key].cpu() - exact.var[key]).abs().max() / exact.var[key].max()) < 1e-4, key
    for instance, score in evaluate(model, grid, there, found).items():
        assert score.loss == pytest.approx(scores[instance].loss, rel=1e-4)
