"""profile-flops on all 135 instances of preresnet200 against one ptflops run for each instance.

python tests/benchmarks/bench_profile.py
"""

import torch
from paired import paired
from ptflops import get_model_complexity_info
from torch import nn

from sdpctl import create_model, sdpoint_instances
from sdpctl.engine.cost import profile

SHAPE = (3, 224, 224)
RUNS = 3


class Alone(nn.Module):
    """One instance as a module of its own."""

    def __init__(self, model, instance):
        super().__init__()
        self.model, self.instance = model, instance

    def forward(self, x_NCHW):
        return self.model(x_NCHW, self.instance)


def one_by_one(model, instances):
    return {
        instance: get_model_complexity_info(
            Alone(model, instance),
            SHAPE,
            as_strings=False,
            print_per_layer_stat=False,
            backend="aten",
            input_constructor=lambda shape: torch.empty((1, *shape), device="meta"),
        )
        for instance in instances
    }


def main():
    with torch.device("meta"):
        model = create_model("preresnet200")
    instances = sdpoint_instances(model)
    ours = {instance: (cost.macs, cost.params) for instance, cost in profile(model, instances, SHAPE).items()}
    assert ours == one_by_one(model, instances), "the counts differ"
    print(f"preresnet200: {len(instances)} instances, the same integers")
    print(paired(lambda: profile(model, instances, SHAPE), lambda: one_by_one(model, instances), runs=RUNS))


if __name__ == "__main__":
    main()
