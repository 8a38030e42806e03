"""The cost of a training step with several instances: together, against one pass after another, by MACs and by the clock.

    python tests/benchmarks/bench_together.py [--network resnet20|resnet50] [--runs 5]

Both ways compute the same gradients, which is checked in float64 first. A round takes every kind of step in turn, each over the
whole grid of instances once; the ratios are those of one round to the plain steps of the same round.
"""

import argparse
import copy
import time
from statistics import median

import torch
import torch.nn.functional as F

from sdpctl.engine.allocator import keep_freed_memory
from sdpctl.engine.cost import Costs
from sdpctl.engine.device import autocast
from sdpctl.engine.settings import TrainSettings
from sdpctl.engine.together import Together
from sdpctl.engine.train import Trainer
from sdpctl.instance import FULL
from sdpctl.models import create_model
from sdpctl.sdpoint import sdpoint_instances

NETWORKS = {"resnet20": (10, 32, 128), "resnet50": (1000, 224, 16)}  # classes, pixels, images a batch
CPU = torch.device("cpu")


def network(name):
    torch.manual_seed(0)
    return create_model(name, num_classes=NETWORKS[name][0]).channels_last()


def images(name, dtype=torch.float32):
    classes, pixels, batch = NETWORKS[name]
    torch.manual_seed(1)
    x_NCHW = torch.randn(batch, 3, pixels, pixels, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return x_NCHW, torch.randint(classes, (batch,))


def kinds(grid, cheapest):
    """Return the instances of each step, by kind of step: each kind goes through the grid once."""
    drawn = [instance for instance in grid if instance not in (FULL, cheapest)]
    return {
        "plain": [(FULL,)] * len(grid),
        "SDPoint": [(instance,) for instance in grid],
        "pair": [(FULL, instance) for instance in grid[1:]],
        "sandwich": [(FULL, cheapest, instance) for instance in drawn],
    }


def together(name, steps):
    settings = TrainSettings(epochs=10**6, lr=0.01, precision="bf16")
    trainer = Trainer(network(name), settings, lambda step: steps[step % len(steps)], 10**6)
    batch = images(name)

    def work():
        for _ in trainer.steps([batch] * len(steps)):
            pass

    return work


def separate(name, steps):
    """The same gradients as `together`, by a forward and a backward pass for each instance."""
    model, (x_NCHW, labels_N) = network(name).train(), images(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)

    def work():
        for instances in steps:
            optimizer.zero_grad()
            for instance in instances:
                with autocast(CPU, "bf16"):
                    logits_NK = model(x_NCHW, instance)
                F.cross_entropy(logits_NK.float(), labels_N).backward()
            optimizer.step()

    return work


def largest_difference(name, steps):
    """Return the largest difference of a gradient between both ways, in float64, as a share of the largest gradient."""
    classes, pixels, _ = NETWORKS[name]
    ours = network(name).double().train()
    theirs = copy.deepcopy(ours)
    worst = 0.0
    for instances in steps:
        x_NCHW, labels_N = torch.randn(4, 3, pixels, pixels, dtype=torch.float64), torch.randint(classes, (4,))
        ours.zero_grad(), theirs.zero_grad()
        sum(F.cross_entropy(logits, labels_N) for logits in Together(ours)(x_NCHW, instances)).backward()
        for instance in instances:
            F.cross_entropy(theirs(x_NCHW, instance), labels_N).backward()
        pairs = [(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)]
        scale = max(float(b.abs().max()) for _, b in pairs)
        worst = max(worst, *(float((a - b).abs().max()) / scale for a, b in pairs))
    return worst


def spread(values):
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    keep_freed_memory()
    name = options.network
    model = network(name)
    grid = sdpoint_instances(model)
    costs = Costs(model, (3, NETWORKS[name][1], NETWORKS[name][1]))
    cheapest = min(grid, key=lambda instance: costs.of(instance).macs)
    listed = kinds(grid, cheapest)
    for kind in ("pair", "sandwich"):
        print(f"{kind}: largest difference of a gradient {largest_difference(name, listed[kind][:: len(grid) // 5]):.1e}")
    works = {kind: together(name, steps) for kind, steps in listed.items()}
    works |= {f"{kind}, separate passes": separate(name, listed[kind]) for kind in ("pair", "sandwich")}
    seconds = {kind: [] for kind in works}
    for run in range(options.runs + 1):
        for kind, work in works.items():
            began = time.perf_counter()
            work()
            if run:  # the first round warms up
                seconds[kind].append((time.perf_counter() - began) / len(listed[kind.partition(",")[0]]))
    full = costs.of(FULL).macs
    for kind, taken in seconds.items():
        steps = listed[kind.partition(",")[0]]
        alone = "separate" in kind
        macs = sum(sum(costs.of(i).macs for i in step) if alone else costs.together(step) for step in steps) / len(steps)
        ratios = [mine / plain for mine, plain in zip(taken, seconds["plain"], strict=True)]
        print(f"{kind}: {macs / full:.2f} of the MACs of a plain step, {spread(ratios)} of its time, {median(taken):.3f} s")


if __name__ == "__main__":
    main()
