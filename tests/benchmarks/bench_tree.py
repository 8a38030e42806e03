"""Calibration and evaluation of all SDPoint instances in one tree against one instance after another.

Both sides see the same batches, already in memory; the statistics of both are compared.

python tests/benchmarks/bench_tree.py [ARCH [SIZE [BATCH]]]
"""

import copy
import sys

import torch
from paired import paired
from torch import nn

from sdpctl import create_model, sdpoint_instances
from sdpctl.engine.calibrate import calibrate
from sdpctl.engine.evaluate import evaluate

BATCHES = 2
RUNS = 5


@torch.inference_mode()
def one_by_one(model, instances, data):
    """The usual way: for each instance, reset, a pass in training mode, a pass in evaluation mode."""
    hits = {}
    for instance in instances:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
                module.reset_running_stats()
        model.train()
        for x_NCHW, _ in data:
            model(x_NCHW, instance)
        model.eval()
        hits[instance] = sum((model(x_NCHW, instance).argmax(1) == labels_N).sum().item() for x_NCHW, labels_N in data)
    return hits


def in_one_tree(model, instances, data):
    return evaluate(model, instances, data, calibrate(model, instances, data))


def main():
    arch, size, batch = (*sys.argv[1:], *("resnet18", "64", "16")[len(sys.argv) - 1 :])
    torch.manual_seed(0)
    model = create_model(arch, num_classes=10).to(memory_format=torch.channels_last)
    shape = (int(batch), 3, int(size), int(size))
    data = [
        (torch.randn(shape).to(memory_format=torch.channels_last), torch.randint(10, (int(batch),))) for _ in range(BATCHES)
    ]
    instances = sdpoint_instances(model)
    alone = copy.deepcopy(model)
    scores, hits = in_one_tree(model, instances, data), one_by_one(alone, instances, data)
    apart = [i for i in instances if abs(scores[i].top1 - 100 * hits[i] / (BATCHES * int(batch))) > 100 / int(batch)]
    assert not apart, f"more than one image a batch differs: {apart}"
    print(f"{arch} at {size} px, {len(instances)} instances, {BATCHES} batches of {batch} images, float32, channels_last")
    print(paired(lambda: in_one_tree(model, instances, data), lambda: one_by_one(alone, instances, data), runs=RUNS))


if __name__ == "__main__":
    main()
