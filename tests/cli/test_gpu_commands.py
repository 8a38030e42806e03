"""The commands on a CUDA device against the CPU."""

import pytest
import torch
from command import called, document, one_line

import sdpctl

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
TINY = """
name: tiny
model: {arch: resnet20, in_channels: 1}
data: {dataset: digits, image_size: 8, batch_size: 128, workers: 0, augment: crop}
sdpoint: {ratios: [0.5], points: [stem, layer2.0]}
train: {epochs: 1, lr: 0.1, validate: {instances: [full, layer2.0@0.5], batches: 2}}
calibrate: {batches: 3}
"""


@pytest.fixture(autouse=True)
def without_tf32():
    """Let convolutions compute in full float32: cuDNN rounds their factors to TF32 by default."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def allocations():
    """Return how often this process has allocated memory of the device."""
    return torch.cuda.memory_stats().get("allocation.all.allocated", 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_run_takes_the_device_and_scores_as_the_cpu_does(tmp_path, recipe, workers):
    before = allocations()
    made = document(tmp_path, "run", recipe, "--set", f"device={DEVICE}", "--set", f"data.workers={workers}")
    assert allocations() > before
    on_gpu = {row["instance"]: row for row in made["eval-instances"]["rows"]}
    assert on_gpu.keys() == {"full", "stem@0.5", "layer2.0@0.5"}
    again = document(tmp_path, "eval", "tiny", "--force", "--set", "device=cpu")
    for row in again["rows"]:
        found = on_gpu[row["instance"]]
        assert found["macs"] == row["macs"]
        assert found["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert found["top1"] == pytest.approx(row["top1"], abs=100 / 359 + 1e-9)  # two logits may be equal but for rounding
    gpu, cpu = (sdpctl.load("tiny", store=tmp_path / ".sdpctl", device=device) for device in (DEVICE, "cpu"))
    x_NCHW = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    for option in cpu.instances:
        found, wanted = (loaded(x_NCHW, instance=option.instance) for loaded in (gpu, cpu))
        assert found.device.type == DEVICE
        assert (found.cpu() - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_auto_is_the_cuda_device(tmp_path, recipe):
    before = allocations()
    document(tmp_path, "train", recipe, "--set", "device=auto")
    assert allocations() > before


def test_a_full_device_is_one_line(tmp_path, recipe):
    torch.cuda.init()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    room = 32 * 2**20  # the network fits, and a tenth of the maps of a batch
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total)
    try:
        done = called(tmp_path, "train", recipe, "-q", "--set", f"device={DEVICE}", "--set", "data.batch_size=1024")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    one_line(done, 7, "out of memory (CUDA out of memory", "lower data.batch_size")
