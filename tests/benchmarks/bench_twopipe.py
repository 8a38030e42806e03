"""What the shares of `twopipe` save: the time of a batch at `all@r` against that of `full`, beside the MACs.

python tests/benchmarks/bench_twopipe.py [SIZE [BATCH]]
"""

import sys

import torch
from paired import paired

from sdpctl import FULL, Instance, create_model
from sdpctl.engine.cost import profile

SHARES = (0.75, 0.5, 0.25)
RUNS = 7


@torch.inference_mode()
def main():
    size, batch = (*map(int, sys.argv[1:]), *(32, 64)[len(sys.argv) - 1 :])
    torch.manual_seed(0)
    model = create_model("twopipe", num_classes=10).eval().to(memory_format=torch.channels_last)
    x_NCHW = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    instances = [Instance.parse(f"all@{share}") for share in SHARES]
    costs = profile(model, [FULL, *instances], (3, size, size))
    print(f"twopipe at {size} px, batches of {batch} images, float32, channels_last; ours all@r, the alternative full")
    for instance in instances:
        result = paired(lambda i=instance: model(x_NCHW, i), lambda: model(x_NCHW), runs=RUNS)
        print(f"{instance}: ratio of MACs {costs[FULL].macs / costs[instance].macs:.2f}, {result}")


if __name__ == "__main__":
    main()
