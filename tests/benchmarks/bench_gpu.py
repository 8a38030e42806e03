"""How fast the main jobs are on a GPU, against a plain way to do the same: one table.

python tests/benchmarks/bench_gpu.py [--photos DIR] [--cifar DIR] [--small] [PART ...]

Parts: training, tree, loading; all by default. For training and the tree, images are random and already on the device, so that
nothing waits for files. Loading is `bench_loader.py` on the images of DIR. `--small` takes tiny networks and images of its own
and compiles nothing, so that the script can be tried anywhere; its figures mean nothing.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile

from sdpctl import FULL, create_model, sdpoint_instances
from sdpctl.engine.calibrate import calibrate
from sdpctl.engine.compile import Compiled
from sdpctl.engine.evaluate import evaluate
from sdpctl.engine.settings import TrainSettings, WalkSettings
from sdpctl.engine.train import Trainer
from sdpctl.randomness import stream


@dataclass(frozen=True)
class Case:
    """A network, its images and how many of them."""

    arch: str
    size: int
    batch: int
    stem: str = "imagenet"
    batches: int = 16

    def network(self, device):
        torch.manual_seed(0)
        return create_model(self.arch, num_classes=1000, stem=self.stem).to(device)

    def images(self, device):
        generator = torch.Generator().manual_seed(1)
        x_NCHW = torch.randn(self.batch, 3, self.size, self.size, generator=generator).to(device)
        labels_N = torch.randint(1000, (self.batch,), generator=generator).to(device)
        return x_NCHW, labels_N

    def __str__(self):
        return f"{self.arch} {self.size} px, batch {self.batch}"


TRAINED = [Case("resnet50", 224, 256)]
WALKED = [Case("resnet50", 224, 256), Case("preresnet101", 64, 128)]
SMALL = [Case("resnet20", 8, 4, "small", 2)]


def waited(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(device, work, runs):
    """Time each of some runs, after one that does not count."""
    work()
    times = []
    for _ in range(runs):
        waited(device)
        began = time.perf_counter()
        work()
        waited(device)
        times.append(time.perf_counter() - began)
    return times


def spread(values, digits=0):
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def quotient(theirs, ours):
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    return f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


# Training


def plain_steps(case, device, *, bf16, compiled, steps):
    """A loop as anyone would write it."""
    model = case.network(device).train()
    x_NCHW, labels_N = case.images(device)
    if bf16:
        model, x_NCHW = model.to(memory_format=torch.channels_last), x_NCHW.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=device.type == "cuda")
    forward = torch.compile(lambda x: model(x)) if compiled else model

    def work():
        for _ in range(steps):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits_NK = forward(x_NCHW)
            loss = F.cross_entropy(logits_NK.float(), labels_N)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return work


KINDS = {"full": (FULL,), "a mean SDPoint step": (), "a mean pair with full": (FULL,)}
"""Kinds of training steps, with the instances of every step; the last two have an instance of the grid besides."""


def our_steps(case, device, *, compiled, kind, steps):
    """The loop that `sdpctl train` runs; except with `full` alone, every instance once, in an order that means nothing."""
    model = case.network(device)
    always = KINDS[kind]
    grid = [instance for instance in sdpoint_instances(model) if instance not in always]
    order = [(*always, instance) for instance in stream(0, "benchmark").sample(grid, len(grid))]
    order = [always] if kind == "full" else order
    settings = TrainSettings(epochs=10**6, lr=0.01, precision="bf16")
    forward = Compiled(model, dynamic=False) if compiled else None
    trainer = Trainer(model, settings, lambda step: order[step % len(order)], 10**6, compiled=forward)
    x_NCHW, labels_N = case.images(device)
    x_NCHW = x_NCHW.to(memory_format=torch.channels_last)
    count = steps if kind == "full" else len(grid)

    def work():
        for _ in trainer.steps([(x_NCHW, labels_N)] * count):
            pass
        return count

    return work, trainer


def training(device, options, table):
    small, runs = options.small, options.runs
    for case in SMALL if small else TRAINED:
        steps = 2 if small else 20
        ways = {
            "plain loop, float32, NCHW": plain_steps(case, device, bf16=False, compiled=False, steps=steps),
            "plain loop, bfloat16": plain_steps(case, device, bf16=True, compiled=False, steps=steps),
        }
        if not small:
            ways["plain loop, bfloat16, torch.compile"] = plain_steps(case, device, bf16=True, compiled=True, steps=steps)
        rates = {}
        for name, work in ways.items():
            rates[name] = [steps * case.batch / took for took in seconds(device, work, runs)]
        for compiled in (False,) if small else (False, True):
            for kind in KINDS:
                began = time.perf_counter()
                work, trainer = our_steps(case, device, compiled=compiled, kind=kind, steps=steps)
                count = work()
                waited(device)
                first = time.perf_counter() - began
                name = f"ours, {kind}{', compiled' if compiled else ''}"
                rates[name] = [count * case.batch / took for took in seconds(device, work, runs)]
                if compiled:
                    print(f"{name}: {trainer.graphs} graphs, the first {count} steps took {first:.0f} s", flush=True)
        against = "plain loop, bfloat16" if small else "plain loop, bfloat16, torch.compile"
        for name, found in rates.items():
            note = f"{median(found) / median(rates[against]):.2f} of the {against}"
            table.add_row(f"training {case}: {name}", f"{spread(found)} images/s", note)
            print(name, spread(found), flush=True)


# The tree


def one_by_one(model, case, device, batch, *, bf16):
    """Calibrate and evaluate one instance after another, each on one batch, as the public code does; return the losses."""
    x_NCHW, labels_N = batch
    x_NCHW = x_NCHW.contiguous(memory_format=torch.channels_last if bf16 else torch.contiguous_format)

    @torch.inference_mode()
    def work():
        losses = {}
        for instance in sdpoint_instances(model):
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = None
                    module.reset_running_stats()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                model.train()(x_NCHW, instance)
                logits_NK = model.eval()(x_NCHW, instance)
            losses[instance] = F.cross_entropy(logits_NK.float(), labels_N)
        return losses

    return work


def together(model, batch, batches, precision):
    grid = sdpoint_instances(model)

    def work():
        statistics = calibrate(model, grid, [batch] * batches, WalkSettings(precision=precision))
        scores = evaluate(model, grid, [batch] * batches, statistics, WalkSettings(precision=precision))
        return {instance: score.loss for instance, score in scores.items()}

    return work


def kernels_share(device, work):
    """Return the share of the wall time in which kernels run."""
    if device.type != "cuda":
        return float("nan")
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        waited(device)
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    busy, until = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / (until - spans[0][0])


def tree(device, options, table):
    runs = options.runs
    for case in SMALL if options.small else WALKED:
        batch = case.images(device)
        model = case.network(device)
        x_NCHW = batch[0].contiguous(memory_format=torch.channels_last)
        grid = sdpoint_instances(model)
        torch.backends.cudnn.allow_tf32 = False
        exact = one_by_one(model, case, device, batch, bf16=False)()
        torch.backends.cudnn.allow_tf32 = True
        alone = {"one by one, float32, NCHW": seconds(device, one_by_one(model, case, device, batch, bf16=False), runs)}
        model = case.network(device).channels_last()
        alone["one by one, bfloat16, channels_last"] = seconds(device, one_by_one(model, case, device, batch, bf16=True), runs)
        for name, found in alone.items():
            table.add_row(f"{case}, {len(grid)} instances: {name}", f"{spread(found, 3)} s a batch", "")
        for precision in ("fp32", "bf16"):
            batches = case.batches if precision == "bf16" else max(2, case.batches // 4)
            work = together(model, (x_NCHW, batch[1]), batches, precision)
            losses = together(model, (x_NCHW, batch[1]), 1, precision)()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            found = [took / batches for took in seconds(device, work, runs)]
            apart = max(abs(losses[instance] - float(exact[instance])) / float(exact[instance]) for instance in grid)
            notes = [f"{quotient(there, found)} times faster than {name}" for name, there in alone.items()]
            notes.append(f"losses within {apart:.0e} of one by one in float32")
            if device.type == "cuda":
                share = kernels_share(device, work)
                notes.append(f"kernels run {share:.0%} of the time, peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
            table.add_row(
                f"{case}, {len(grid)} instances: ours, {precision}, {batches} batches",
                f"{spread(found, 3)} s a batch",
                "\n".join(notes),
            )
            print(case, precision, spread(found, 3), notes, flush=True)


# The loader


def loading(device, options, table):
    script = [sys.executable, Path(__file__).with_name("bench_loader.py"), "--device", device.type]
    folders = [word for name in ("photos", "cifar") if (folder := getattr(options, name)) for word in (f"--{name}", folder)]
    chosen = ["--small"] if options.small else folders
    if not chosen:
        table.add_row("loading", "", "not measured: name images with --photos or --cifar")
        return
    done = subprocess.run([*script, *chosen], stdout=subprocess.PIPE, text=True, check=True)
    for line in done.stdout.splitlines():
        name, _, figures = line.partition(": ")
        table.add_row(f"loading {name}", figures, "the alternative: ImageFolder or CIFAR10, PIL, DataLoader, as many workers")


PARTS = {"training": training, "tree": tree, "loading": loading}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=list(PARTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--photos")
    parser.add_argument("--cifar")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    device = torch.device(options.device)
    device = torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    table = Table("what", "measured", "against", title=f"{where}, torch {torch.__version__}", show_lines=True)
    for part in options.parts or PARTS:
        PARTS[part](device, options, table)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
