"""The libraries' own networks, and an obvious way to run their instances: what traced networks are compared with."""

import copy
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from ptflops import get_model_complexity_info
from torch import Tensor, nn

from sdpctl.engine.calibrate import CalibratedNorms, calibrate
from sdpctl.engine.cost import Cost, profile
from sdpctl.engine.tree import Tree
from sdpctl.instance import FULL, Instance
from sdpctl.models import create_model
from sdpctl.models.chain import Chain

RATIOS = (0.5, 0.75, 0.6, 0.9)

DROPS = (nn.Dropout, nn.Dropout2d)


def library_network(arch: str, num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Build a network by the library's own function."""
    library, _, name = arch.partition("/")
    if library == "timm":
        return timm.create_model(name, num_classes=num_classes, in_chans=in_channels)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)


def norms(network: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """Return the batch norms of a network that have running statistics, by name."""
    found = {name: module for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}
    return {name: module for name, module in found.items() if module.running_mean is not None}


@torch.no_grad()
def fill(network: nn.Module, x_NCHW: Tensor) -> nn.Module:
    """Draw every weight and statistic so that each one matters to the result: no layer scale of 1e-6, no weight of zero.

    The running statistics are those of the images, times a factor for each channel.
    """
    for name, parameter in network.named_parameters():
        fan = parameter.numel() // len(parameter) if parameter.dim() else 1
        if parameter.dim() > 1 and fan > 1:
            parameter.normal_(0, (1.5 / fan) ** 0.5)
        elif name.rpartition(".")[2] in ("bias", "beta"):
            parameter.normal_(0, 0.1)
        else:
            parameter.uniform_(0.5, 1.5)
    momentums = {bn: bn.momentum for bn in norms(network).values()}
    for bn in momentums:
        bn.momentum = 1.0
    network.train()(x_NCHW)
    for bn, momentum in momentums.items():
        bn.momentum = momentum
        bn.running_var.mul_(torch.empty_like(bn.running_var).uniform_(0.8, 1.25)).add_(1e-3)
        bn.running_mean.add_(torch.randn_like(bn.running_mean) * bn.running_var.sqrt() / 10)
    return network.eval()


def main_output(out: Any) -> Tensor:
    """Return the logits of a result that may contain those of auxiliary classifiers."""
    return out if isinstance(out, Tensor) else next(iter(out.values())) if isinstance(out, dict) else out[0]


@contextmanager
def hooked(network: nn.Module, instance: Instance) -> Iterator[nn.Module]:
    """Let a library's network run as an instance: hooks shrink the results of its modules."""
    calls: list[str] = []

    def hook(point: str, ratio: float) -> Any:
        def shrink(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            calls.append(point)
            return F.adaptive_avg_pool2d(out, [max(1, round(side * ratio)) for side in out.shape[2:]])

        return shrink

    handles = [network.get_submodule(point).register_forward_hook(hook(point, ratio)) for point, ratio in instance.choices]
    try:
        yield network
    finally:
        for handle in handles:
            handle.remove()
    wanted = [point for point, _ in instance.choices]
    assert set(calls) == set(wanted), f"hooks of {instance} ran at {sorted(set(calls))}"
    assert len({calls.count(point) for point in wanted}) <= 1, f"a module of {instance} runs several times"


@torch.no_grad()
def alone(
    network: nn.Module, instance: Instance, batches: Sequence[Tensor], x_NCHW: Tensor
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Calibrate and run one instance of a library's network by itself.

    Returns:
        The logits, (N, K), and the mean and variance of each batch norm.
    """
    own = {bn: (bn.running_mean.clone(), bn.running_var.clone(), bn.momentum) for bn in norms(network).values()}
    with hooked(network.eval(), instance):
        for bn in own:
            bn.train()
            bn.reset_running_stats()
            bn.momentum = None  # a cumulative average
        for batch in batches:
            network(batch)
        logits = main_output(network.eval()(x_NCHW))
    found = {name: (bn.running_mean.clone(), bn.running_var.clone()) for name, bn in norms(network).items()}
    for bn, (mean, var, momentum) in own.items():
        bn.running_mean.copy_(mean)
        bn.running_var.copy_(var)
        bn.momentum = momentum
    return logits, found


@torch.no_grad()
def macs(network: nn.Module, instance: Instance, x_NCHW: Tensor) -> int:
    """Count the MACs of one image for an instance of a library's network.

    On the CPU, ptflops would not count the matrix products of attention, which are one operation there.
    """
    with hooked(network, instance):
        count, _ = get_model_complexity_info(
            copy.deepcopy(network).to("meta"),
            (1,),
            as_strings=False,
            print_per_layer_stat=False,
            backend="aten",
            input_constructor=lambda _: x_NCHW[:1].to("meta"),
        )
    assert count is not None
    return int(count)


def costs(model: Chain, instances: Sequence[Instance], image_size: Sequence[int]) -> dict[Instance, Cost]:
    """Count the costs of instances by the tree's own means, which expect that float32 is torch's default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        return profile(model, instances, image_size)
    finally:
        torch.set_default_dtype(before)


def draw_instances(points: Sequence[str], seed: str, count: int = 5) -> list[Instance]:
    """Draw instances with two or three points below 1, which leave at least 0.4 of a side."""
    random_ = random.Random(seed)
    drawn: dict[Instance, None] = {}
    while len(drawn) < count:
        choices = [(point, random_.choice(RATIOS)) for point in random_.sample(points, random_.randint(2, 3))]
        if math.prod(ratio for _, ratio in choices) >= 0.4:
            drawn[Instance(tuple(choices))] = None
    return list(drawn)


def apart(one: Tensor, other: Tensor, scale: float = 0.0) -> float:
    """Return the largest difference of two tensors, relative to the largest number in the second, or to `scale` if larger."""
    assert one.shape == other.shape
    if not one.numel():
        return 0.0
    difference = (one.double() - other.double()).abs().max().item()
    size = max(other.double().abs().max().item(), scale)
    return difference / size if size else difference


def step(network: nn.Module, x_NCHW: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Run a step of training with fixed draws; return the logits and the gradients of the images and all parameters."""
    images = x_NCHW.clone().requires_grad_()
    torch.manual_seed(1)
    logits = main_output(network.train()(images))
    network.zero_grad(set_to_none=True)
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()
    network.eval()
    return logits.detach(), images.grad, {n: p.grad for n, p in network.named_parameters() if p.grad is not None}


def pair(arch: str, size: int, images: int = 4) -> tuple[Chain, nn.Module, Tensor]:
    """Build a traced network and the library's own with the same weights, and draw images. The default dtype is float64."""
    torch.manual_seed(0)
    x_NCHW = torch.randn(images, 3, size, size)
    theirs = fill(library_network(arch), x_NCHW)
    ours = create_model(arch, num_classes=10).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, x_NCHW


def compare_full(ours: Chain, theirs: nn.Module, x_NCHW: Tensor) -> dict[str, float]:
    """Return how far a traced network is from the library's: in evaluation, and in a step of training."""
    with torch.inference_mode():
        known, found = main_output(theirs(x_NCHW)), ours(x_NCHW)
        assert known.isfinite().all()
        apart_now = {"evaluation": apart(found, known)}
    with torch.no_grad():
        several = not isinstance(theirs.train()(x_NCHW), Tensor)
        theirs.eval()
        theirs.load_state_dict(ours.state_dict())  # the running statistics changed
    if several:  # auxiliary classifiers, which ours lacks, draw from the same generator
        for module in (*ours.modules(), *theirs.modules()):
            if isinstance(module, DROPS):
                module.p = 0.0
    logits, images, gradients = step(theirs, x_NCHW)
    mine, our_images, our_gradients = step(ours, x_NCHW)
    used = {name for segment in ours.segments() for name in ours.norms(segment)}
    assert our_gradients.keys() == gradients.keys()
    largest = max(g.abs().max().item() for g in gradients.values())
    apart_now["training"] = apart(mine, logits)
    apart_now["gradients"] = max(
        apart(our_images, images), *(apart(our_gradients[n], g, largest * 1e-3) for n, g in gradients.items())
    )
    statistics = [0.0]
    for name in used:
        one, other = ours.get_submodule(name), theirs.get_submodule(name)
        statistics += [apart(one.running_mean, other.running_mean, 1e-3), apart(one.running_var, other.running_var)]
        assert torch.equal(one.num_batches_tracked, other.num_batches_tracked)
    return {**apart_now, "statistics": max(statistics)}


def compare_instances(ours: Chain, theirs: nn.Module, x_NCHW: Tensor, instances: Sequence[Instance]) -> dict[str, float]:
    """Return how far instances in one tree are from each instance alone: logits, statistics, and MACs."""
    theirs.load_state_dict(ours.state_dict())
    for parameter in ours.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    batches = [torch.randn_like(x_NCHW) for _ in range(2)]
    last = [batch.to(memory_format=torch.channels_last) for batch in (*batches, x_NCHW)]
    every = [FULL, *instances]
    statistics = calibrate(ours, every, [(batch, torch.zeros(len(batch))) for batch in last[:-1]])
    with torch.inference_mode():
        logits = Tree(ours, every).walk(last[-1], CalibratedNorms(ours, statistics))
    counted_here = costs(ours, instances, x_NCHW.shape[1:])
    far, far_statistics, far_macs = 0.0, 0.0, 0.0
    for instance in instances:
        known, known_statistics = alone(theirs, instance, batches, x_NCHW)
        far = max(far, apart(logits[instance], known))
        passed: list[str] = []
        for segment in ours.segments():
            node = instance.among(passed)
            passed += [segment.point] if segment.point else []
            for name in ours.norms(segment):
                for one, other in zip(statistics.at(node, name), known_statistics[name], strict=True):
                    far_statistics = max(far_statistics, apart(one, other, 1e-3))
        counted = macs(theirs, instance, x_NCHW)
        far_macs = max(far_macs, abs(counted_here[instance].macs / counted - 1))
    return {"instances": far, "instance statistics": far_statistics, "MACs": far_macs}
