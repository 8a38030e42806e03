"""What an instance at half the MACs saves where it is used: its time in onnxruntime against that of `full`.

Weights are fresh and statistics those of noise, which time does not depend on.

python tests/benchmarks/bench_export.py [ARCH [SIZE]]
"""

import sys

import torch
from paired import paired

from sdpctl import create_model, sdpoint_instances
from sdpctl.engine.calibrate import calibrate
from sdpctl.engine.cost import profile
from sdpctl.export.description import Description, Input, Option
from sdpctl.export.network import INPUT, OneInstance
from sdpctl.export.onnx import onnx_session, to_onnx
from sdpctl.instance import FULL
from sdpctl.models.settings import ModelSettings

CALLS = {1: 20, 8: 5}
"""Calls of one measurement, by batch size."""

RUNS = 7


def session_of(model, arch, size, instance, cost, statistics):
    network = ModelSettings(arch=arch, num_classes=1000, in_channels=3, stem=model.stem)
    takes = Input(size=size, resize=size, mean=(0.5,) * 3, std=(0.25,) * 3)
    option = Option(instance=instance, macs=cost.macs, params=cost.params, relative=1, top1=0, top5=None, loss=0)
    described = Description(
        name=arch,
        network=network,
        input=takes,
        classes=(),
        options=(option,),
        full_macs=cost.macs,
        checkpoint="",
        statistics="",
        test_images=0,
        heldout_images=0,
    )
    return onnx_session(to_onnx(OneInstance(model, instance, statistics), described))


def main():
    arch, size = (*sys.argv[1:], *("resnet50", "224")[len(sys.argv) - 1 :])
    torch.manual_seed(0)
    model = create_model(arch).eval()
    costs = profile(model, sdpoint_instances(model), (3, int(size), int(size)))
    half = min(costs, key=lambda instance: abs(costs[instance].macs / costs[FULL].macs - 0.5))
    shape = (3, int(size), int(size))
    statistics = calibrate(model, [FULL, half], [(torch.randn(4, *shape), torch.zeros(4))])
    full, cheap = (session_of(model, arch, int(size), i, costs[i], statistics) for i in (FULL, half))
    print(
        f"{arch} at {size} px, ONNX in onnxruntime, float32: {half} has {costs[half].macs:,} of {costs[FULL].macs:,} MACs, "
        f"ratio {costs[FULL].macs / costs[half].macs:.2f}"
    )
    for batch, calls in CALLS.items():
        images = torch.randn(batch, *shape).numpy()

        def run(session, images=images, calls=calls):
            for _ in range(calls):
                session.run(None, {INPUT: images})

        result = paired(lambda run=run: run(cheap), lambda run=run: run(full), runs=RUNS)
        print(f"batch {batch}, {calls} calls, ours {half}, the alternative full: {result}")


if __name__ == "__main__":
    main()
