"""What it costs that a network is traced: timm's resnet50 as a traced network against this package's own resnet50.

python tests/benchmarks/bench_traced.py [--size 64] [--batch 32] [--runs 7]

Both networks compute the same `full`, and their instances have equal MACs. They are run in turn: steps of training, each with
a drawn instance, and calibrating and evaluating the whole grid. The ratio is the time of `resnet50` by that of `timm/resnet50`:
below 1, the traced network is slower. Then the time of tracing itself, in a process of its own.
"""

import argparse
import subprocess
import sys

import torch
from paired import paired

from sdpctl import FULL, create_model, sdpoint_instances
from sdpctl.engine.allocator import keep_freed_memory
from sdpctl.engine.calibrate import calibrate
from sdpctl.engine.cost import profile
from sdpctl.engine.evaluate import evaluate
from sdpctl.engine.settings import WalkSettings
from sdpctl.instance import Instance

NETWORKS = ("timm/resnet50", "resnet50")

TRACING = """
import resource, time
from sdpctl.models.registry import architecture
from sdpctl.models.traced import networks, traced
from sdpctl.models.libraries import LIBRARIES
networks(LIBRARIES["timm"])
began = time.perf_counter()
points = len([piece for piece in traced(architecture("{arch}")).pieces if piece.point])
took, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(f"tracing {arch}: {{points}} points, {{took:.2f}} s; peak memory {{peak:.0f}} MiB, the weights would take {bytes:.0f}")
"""


def build(arch):
    """Build a network whose batch norms all matter: timm starts the last one of each block at zero."""
    torch.manual_seed(0)
    model = create_model(arch, num_classes=100).to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def training(model, x_NCHW, labels_N, instances):
    """Return a function that makes one step with each of some instances."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def steps():
        model.train()
        for instance in instances:
            optimiser.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(model(x_NCHW, instance), labels_N).backward()
            optimiser.step()

    return steps


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    keep_freed_memory()
    ours, theirs = map(build, NETWORKS)
    theirs.load_state_dict(ours.state_dict())
    shape = (3, options.size, options.size)
    assert profile(ours, [FULL], shape)[FULL].macs == profile(theirs, [FULL], shape)[FULL].macs
    assert ours.points == theirs.points
    x_NCHW = torch.randn(options.batch, *shape).to(memory_format=torch.channels_last)
    labels_N = torch.randint(100, (options.batch,))
    what = f"{options.size} px, batches of {options.batch}, {torch.get_num_threads()} threads"
    drawn = [FULL, Instance(((ours.points[3], 0.5),)), Instance(((ours.points[8], 0.75),))]

    grid, data = sdpoint_instances(ours), [(x_NCHW, labels_N)]
    losses = {}
    for precision in ("fp32", "bf16"):
        settings = WalkSettings(precision=precision)

        def both(model, settings=settings):
            model.eval()
            losses[model] = evaluate(model, grid, data, calibrate(model, grid, data, settings), settings)

        result = paired(lambda: both(ours), lambda: both(theirs), runs=options.runs)
        apart = abs(losses[ours][FULL].loss / losses[theirs][FULL].loss - 1)  # at its points resnet50 pools before the ReLU
        print(
            f"calibrate and evaluate {len(grid)} instances, {precision}, {what}: {result}; full's losses differ by {apart:.0e}"
        )
    steps = [training(model, x_NCHW, labels_N, drawn) for model in (ours, theirs)]
    print(f"three steps of training, fp32, {what}: {paired(*steps, runs=options.runs)}")
    for arch in ("timm/resnet50", "timm/tf_efficientnetv2_s", "torchvision/densenet121"):
        weights = sum(p.nbytes for p in create_model(arch).parameters()) / 2**20
        subprocess.run([sys.executable, "-c", TRACING.format(arch=arch, bytes=weights)], check=True)


if __name__ == "__main__":
    main()
