"""Compare what the kernels compute in Triton's interpreter with torch's batch norm in float64; `test_kernels.py` runs this."""

import sys

import torch
import torch.nn.functional as F
from networks import randomise_norms

from sdpctl import create_model, sdpoint_instances
from sdpctl.engine import calibrate as calibration
from sdpctl.engine.calibrate import calibrate
from sdpctl.engine.evaluate import evaluate
from sdpctl.engine.finetune import finetune
from sdpctl.engine.kernels import gather, in_rows, transform
from sdpctl.engine.settings import FinetuneSettings, WalkSettings
from sdpctl.engine.tree import Tree
from sdpctl.instance import Instance


def apart(found, expected):
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def kernels():
    """Maps with few and many channels and pixels, in parts and whole, biased away from zero, of both dtypes."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator)

    for branches, images, channels, height, width, dtype in [
        (3, 2, 5, 3, 4, torch.float32),
        (1, 2, 1, 1, 1, torch.float32),
        (4, 3, 300, 2, 2, torch.float32),
        (2, 8, 16, 33, 32, torch.float32),
        (2, 16, 64, 17, 16, torch.bfloat16),
    ]:
        x_NCHW = in_rows((drawn(branches * images, channels, height, width) * 2 + 5).to(dtype))
        plus_NCHW = in_rows(drawn(*x_NCHW.shape).to(dtype))
        mean_RC, var_RC = drawn(branches + 2, channels), drawn(branches + 2, channels).abs() + 0.5
        expected = mean_RC.double(), var_RC.double()
        nodes_B = torch.tensor([branches + 1, *range(branches - 1)])
        kept_B = torch.zeros(branches, dtype=torch.int64)
        kept_B[-1] = branches > 1
        own = images == 3 or dtype == torch.bfloat16  # each branch has a weight and a bias of its own
        weight, bias = (drawn(branches, channels) if own else drawn(channels) for _ in range(2))
        mean_BC, scale_BC = gather(x_NCHW, mean_RC, var_RC, nodes_B, kept_B, torch.tensor(0.3), weight, 1e-5)
        for plus, relu, in_place in [(None, False, False), (plus_NCHW, True, False), (None, True, True)]:
            given = x_NCHW.clone(memory_format=torch.preserve_format)
            out = torch.full_like(given, torch.nan) if not in_place else given
            transform(given, mean_BC, scale_BC, bias, out_NCHW=out, plus_NCHW=plus, relu=relu)
            for i, (node, x) in enumerate(zip(nodes_B.tolist(), x_NCHW.chunk(branches), strict=True)):
                running = expected[0][node].clone(), expected[1][node].clone()
                affine = (side.expand(branches, channels)[i].double() for side in (weight, bias))
                wanted = F.batch_norm(x.double(), *running, *affine, not kept_B[i], 0.3, 1e-5)
                wanted = wanted if plus is None else wanted + plus.chunk(branches)[i].double()
                wanted = wanted.relu() if relu else wanted
                worst = apart(out.chunk(branches)[i], wanted)
                assert worst < (1e-2 if dtype == torch.bfloat16 else 1e-5), (x_NCHW.shape, dtype, worst)
                assert apart(mean_RC[node], running[0]) < 1e-6
                assert apart(var_RC[node], running[1]) < 1e-5
    nan = in_rows(torch.tensor([1.0, torch.nan, -1.0, 2.0]).view(2, 1, 1, 2))
    transform(nan, torch.zeros(1, 1), torch.ones(1, 1), None, out_NCHW=nan, relu=True)
    assert nan.flatten().isnan().tolist() == [False, True, False, False]  # a rectifier hides no fault


def walked(arch, settings, finetuned=()):
    torch.manual_seed(0)
    model = create_model(arch, num_classes=3).channels_last()
    randomise_norms(model)
    grid = sdpoint_instances(model)[::3]
    batches = [(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])) for _ in range(2)]
    chosen = list(map(Instance.parse, finetuned))
    grid += [instance for instance in chosen if instance not in grid]
    section = FinetuneSettings(instances=finetuned, steps=2, lr=0.1)
    tuned = finetune(Tree(model, grid), lambda _: batches, section, chosen)
    found = []
    for fuses in (lambda _: False, lambda x: x.dtype == torch.float32):
        calibration.fuses = fuses
        statistics = calibrate(model, grid, batches, settings, tuned=tuned)
        found.append((statistics, evaluate(model, grid, batches, statistics)))
    (there, scores), (here, ours) = found
    for key, mean in there.mean.items():
        assert apart(here.mean[key], mean.double()) < 1e-5, key
        assert apart(here.var[key], there.var[key].double()) < 1e-5, key
    for instance in grid:
        assert abs(ours[instance].loss / scores[instance].loss - 1) < 1e-5


def networks():
    for arch in ("resnet20", "preresnet18", "twopipe"):
        walked(arch, WalkSettings())


def kept():
    walked("resnet20", WalkSettings(keep_full=True, estimator="ema"))


def finetuned():
    walked("resnet20", WalkSettings(), ("stem@0.5", "layer2.0@0.5", "full"))
    walked("twopipe", WalkSettings(), ("all@0.5",))


{"kernels": kernels, "networks": networks, "kept": kept, "finetuned": finetuned}[sys.argv[1]]()
