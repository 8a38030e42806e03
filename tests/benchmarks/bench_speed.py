"""How fast the main jobs are, against a plain way to do the same: one table.

Each way runs in a process of its own, and they take turns: a plain loop as of the public code is one process in float32 and
NCHW with torch's and the C library's own settings, ours is what the commands run. `bound` is the least time that the
convolutions of our way could take, at the best rate that a convolution reaches on this machine, by the time it took; for
loading, the time that decoding alone takes on as many cores.

python tests/benchmarks/bench_speed.py --photos DIR --cifar DIR [--runs 5] [PART ...]

DIR are an image folder of ten classes (train/CLASS/*.jpg, val/CLASS/*.jpg) and the folder in which CIFAR-10's is. Parts:
instances, memory, loading, training, scaling, search, startup; all by default.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

from sdpctl import FULL, create_model, sdpoint_instances
from sdpctl.data.files import locate
from sdpctl.data.images import decode
from sdpctl.data.loader import ImageData
from sdpctl.data.settings import DataSettings
from sdpctl.engine.allocator import keep_freed_memory
from sdpctl.engine.calibrate import calibrate
from sdpctl.engine.compile import Compiled
from sdpctl.engine.cost import Costs
from sdpctl.engine.evaluate import evaluate
from sdpctl.engine.settings import TrainSettings, WalkSettings
from sdpctl.engine.train import Trainer
from sdpctl.engine.tree import Tree
from sdpctl.randomness import stream
from sdpctl.sdpoint import draw_independent

NETWORKS = {  # architecture, pixels, data, images a batch
    "resnet50": ("resnet50", 224, "photos", 16),
    "preresnet101": ("preresnet101", 64, "photos", 64),
    "resnet18": ("resnet18", 32, "cifar", 128),
    "resnet20": ("resnet20", 32, "cifar", 256),
}
TRAINED = {"resnet50": ("resnet50", 224, "photos", 32), "resnet18": ("resnet18", 32, "cifar", 128)}
STEPS = {"resnet50": 4, "resnet18": 16}
BF16 = WalkSettings(precision="bf16")


def data_of(kind, size, batch, options):
    dataset = "imagefolder" if kind == "photos" else "cifar10"
    augment = "resized-crop" if kind == "photos" else "crop-flip"
    root = Path(options.photos if kind == "photos" else options.cifar)
    settings = DataSettings(dataset=dataset, root=str(root), image_size=size, augment=augment, batch_size=batch)
    return ImageData(settings, locate(dataset, root), torch.device("cpu"), in_channels=3, seed=0)


def network(arch, size):
    torch.manual_seed(0)
    return create_model(arch, num_classes=10, stem="small" if size == 32 else "imagenet")


# One side of a comparison: a function that prepares and returns what is timed, which returns what it found.


def instances_plain(name, options):
    arch, size, kind, batch = NETWORKS[name]
    model, data = network(arch, size), data_of(kind, size, batch, options)
    list(data.calibration(1))

    def reset():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
                module.reset_running_stats()

    @torch.no_grad()
    def work():
        losses = {}
        for instance in sdpoint_instances(model):
            reset()
            model.train()
            for x_NCHW, _ in data.calibration(1):
                model(x_NCHW.contiguous(), instance)
            model.eval()
            for x_NCHW, labels_N in data.test(batch, 1):
                losses[str(instance)] = F.cross_entropy(model(x_NCHW.contiguous(), instance), labels_N).item()
        return losses

    return work


def instances_ours(name, options, precision):
    arch, size, kind, batch = NETWORKS[name]
    keep_freed_memory()
    model, data = network(arch, size).to(memory_format=torch.channels_last), data_of(kind, size, batch, options)
    list(data.calibration(1))

    def work():
        grid = sdpoint_instances(model)
        statistics = calibrate(model, grid, data.calibration(1), WalkSettings(precision=precision))
        scores = evaluate(model, grid, data.test(batch, 1), statistics, WalkSettings(precision=precision))
        return {str(instance): score.loss for instance, score in scores.items()}

    return work


def kibibytes(field):
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)).split()[1])


def held(name, options, way):
    """Peak memory beyond that of the process with the network: `full` alone as usual, all instances, or depth first."""
    arch, size, kind, batch = NETWORKS[name]
    if way != "plain":
        keep_freed_memory()
    model, data = network(arch, size), data_of(kind, size, batch, options)
    model = model if way == "plain" else model.to(memory_format=torch.channels_last)
    ((x_NCHW, labels_N),) = data.calibration(1)
    grid = sdpoint_instances(model)
    with torch.no_grad():
        model(x_NCHW[:2], FULL)
    least = Tree(model, grid).needs(x_NCHW)  # imports what the meta device needs, once

    @torch.inference_mode()
    def work():
        ctypes.CDLL(None).malloc_trim(0)  # what the data left behind
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = kibibytes("VmRSS")
        if way == "plain":
            model.eval()(x_NCHW.contiguous(), FULL)
        else:
            memory = least if way == "least" else None
            statistics = calibrate(model, grid, [(x_NCHW, labels_N)], WalkSettings(memory=memory))
            evaluate(model, grid, [(x_NCHW, labels_N)], statistics, WalkSettings(memory=memory))
        return (kibibytes("VmHWM") - before) / 1024

    return work


def training_plain(name, options):
    arch, size, kind, batch = TRAINED[name]
    model, data = network(arch, size).train(), data_of(kind, size, batch, options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    batches = endless(data)
    next(batches)

    def work():
        losses = []
        for _ in range(STEPS[name]):
            x_NCHW, labels_N = next(batches)
            loss = F.cross_entropy(model(x_NCHW.contiguous()), labels_N)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    return work


def training_ours(name, options, draw, compiled=False):
    arch, size, kind, batch = TRAINED[name]
    keep_freed_memory()
    model, data = network(arch, size), data_of(kind, size, batch, options)
    grid = sdpoint_instances(model) if draw == "sdpoint" else [FULL]
    order = stream(0, "benchmark").sample(grid, len(grid))  # every instance as often, in an order that means nothing
    settings = TrainSettings(epochs=1000, lr=0.01, precision="bf16")
    forward = Compiled(model, dynamic=False) if compiled else None
    trainer = Trainer(model, settings, lambda step: (order[step % len(order)],), data.steps_per_epoch, compiled=forward)
    batches = endless(data)
    next(batches)
    count = len(grid) if draw == "sdpoint" else STEPS[name]

    def work():
        losses, waited, began = [], 0.0, time.perf_counter()

        def taken():
            nonlocal waited
            for _ in range(count):
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
                yield batch

        before = 0.0
        for _ in trainer.steps(taken()):
            total = trainer.state()["sums"][0].item() / batch
            losses.append(total - before)
            before = total
        took = time.perf_counter() - began
        trainer._sums.zero_()
        return {"losses": losses, "waited": waited / took, "steps": count}

    return work


def endless(data):
    epoch = 0
    while True:
        yield from data.training(epoch)
        epoch += 1


LOADED = {"photos": (224, 64), "cifar": (32, 128)}  # pixels, images a batch
BATCHES = 20


def loading_plain(kind, options):
    size, batch = LOADED[kind]
    crop = transforms.RandomResizedCrop(size) if kind == "photos" else transforms.RandomCrop(size, padding=size // 8)
    steps = [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.25,) * 3)]
    transform = transforms.Compose(steps)
    if kind == "photos":
        images = datasets.ImageFolder(Path(options.photos) / "train", transform)
    else:
        images = datasets.CIFAR10(options.cifar, transform=transform)
    images = Subset(images, range(0, len(images), len(images) // (BATCHES * batch))[: BATCHES * batch])
    loader = DataLoader(images, batch, shuffle=True, num_workers=2, persistent_workers=True)
    return lambda: sum(len(labels_N) for _, labels_N in loader)


def loading_ours(kind, options):
    size, batch = LOADED[kind]
    data = data_of(kind, size, batch, options)
    return lambda: sum(len(labels_N) for _, labels_N in data.training(0, data.steps_per_epoch - BATCHES))


def decoding(kind, options):
    """Decode as many photographs on one core, the least that a loader must do."""
    paths = sorted(Path(options.photos).glob("train/*/*.jpg"))[: BATCHES * LOADED[kind][1]]
    return lambda: sum(decode(path, "RGB").width > 0 for path in paths)


SIDES = {
    "instances-plain": instances_plain,
    "instances-ours": instances_ours,
    "held": held,
    "loading-plain": loading_plain,
    "loading-ours": loading_ours,
    "decoding": decoding,
    "training-plain": training_plain,
    "training-ours": training_ours,
}


class Side:
    """A process that does one side of a comparison whenever it is asked."""

    def __init__(self, options, *words):
        given = ["--photos", options.photos, "--cifar", options.cifar, "--side", *words]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *given], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self):
        """Return the seconds it took, and what was found."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a side of the comparison ended with exit code {self.process.wait()}")
        return json.loads(line)

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def answer(options):
    work = SIDES[options.side[0]](*options.side[1:2], options, *options.side[2:])
    for _ in sys.stdin:
        began = time.perf_counter()
        found = work()
        print(json.dumps([time.perf_counter() - began, found]), flush=True)


def in_turn(sides, runs, *, warm):
    """Ask all sides in turn; those in `warm` once before, which does not count."""
    for name in warm:
        sides[name].ask()
    answers = {name: [] for name in sides}
    for _ in range(runs):
        for name, side in sides.items():
            answers[name].append(side.ask())
    for side in sides.values():
        side.end()
    return answers


def spread(theirs, ours):
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    return f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def best_rate(dtype):
    """MACs a second of the best of a few convolutions, with memory that is there."""
    rates = []
    for channels, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
        x = torch.randn(16, channels, size, size).to(dtype).to(memory_format=torch.channels_last)
        w = torch.randn(channels, channels, 3, 3).to(dtype).to(memory_format=torch.channels_last)
        times = []
        for _ in range(15):
            began = time.perf_counter()
            with torch.inference_mode():
                F.conv2d(x, w, padding=1)
            times.append(time.perf_counter() - began)
        rates.append(16 * size**2 * channels**2 * 9 / median(times))
    return max(rates)


def tree_macs(arch, size):
    """MACs of an image in the tree of the grid: each node's body once."""
    model = network(arch, size)
    grid, costs = sdpoint_instances(model), Costs(model, (3, size, size))
    passed, total = [], 0
    for index, segment in enumerate(model.segments()):
        alike = {instance.among(passed): instance for instance in grid}
        total += sum(costs.of(instance).segments[index].macs for instance in alike.values())
        passed += [segment.point] if segment.point else []
    return total, {instance: costs.of(instance).macs for instance in grid}


def instances(options, table, rate):
    for name, (arch, size, kind, batch) in NETWORKS.items():
        sides = {
            "plain": Side(options, "instances-plain", name),
            "fp32": Side(options, "instances-ours", name, "fp32"),
            "bf16": Side(options, "instances-ours", name, "bf16"),
        }
        answers = in_turn(sides, options.runs, warm=("fp32", "bf16"))
        macs, alone = tree_macs(arch, size)
        seconds = {side: [took for took, _ in answers[side]] for side in answers}
        there, here = answers["plain"][-1][1], answers["fp32"][-1][1]
        apart = max(abs(here[key] / there[key] - 1) for key in there)
        for precision in ("fp32", "bf16"):
            took = median(seconds[precision])
            bound = 2 * batch * macs / rate[precision] / took
            what = f"{arch} {size} px, {len(alone)} instances, {precision}, {kind}, {batch} + {batch} images"
            note = f"losses equal within {apart:.0e}" if precision == "fp32" else ""
            note += f" MACs {sum(alone.values()) / macs:.2f} times fewer"
            add(table, what, took, median(seconds["plain"]), spread(seconds["plain"], seconds[precision]), f"{bound:.0%}", note)


def memory(options, table, rate):
    for name, (arch, size, _, batch) in NETWORKS.items():
        found = {}
        for way in ("plain", "default", "least"):
            side = Side(options, "held", name, way)
            found[way] = side.ask()[1]
            side.end()
        note = f"full alone {found['plain']:.0f} MiB, all instances {found['default']:.0f}, depth first {found['least']:.0f}"
        ratio = f"{found['default'] / found['plain']:.2f} and {found['least'] / found['plain']:.2f}"
        table.add_row(f"memory beyond the network's, {arch} {size} px, {batch} images", "", "", ratio, "", note)


def loading(options, table, rate):
    for kind, (size, batch) in LOADED.items():
        sides = {"plain": Side(options, "loading-plain", kind), "ours": Side(options, "loading-ours", kind)}
        if kind == "photos":
            sides["decoding"] = Side(options, "decoding", kind)
        answers = in_turn(sides, options.runs, warm=tuple(sides))
        seconds = {side: [took for took, _ in answers[side]] for side in answers}
        assert len({found for side in answers.values() for _, found in side}) == 1  # as many images
        took = median(seconds["ours"])
        bound = f"{median(seconds['decoding']) / 2 / took:.0%}" if "decoding" in seconds else ""
        note = f"{BATCHES * batch / took:,.0f} images/s"
        what = f"loading {kind} to {size} px, augmented, 2 workers, {BATCHES} batches of {batch}"
        add(table, what, took, median(seconds["plain"]), spread(seconds["plain"], seconds["ours"]), bound, note)


def training(options, table, rate):
    for name, (arch, size, kind, batch) in TRAINED.items():
        sides = {
            "plain": Side(options, "training-plain", name),
            "ours": Side(options, "training-ours", name, "full"),
        }
        answers = in_turn(sides, options.runs, warm=("plain", "ours"))
        seconds = {side: [took for took, _ in answers[side]] for side in answers}
        sides = {
            "compiled": Side(options, "training-ours", name, "full", "compiled"),
            "ours": Side(options, "training-ours", name, "full"),
        }
        compiled = in_turn(sides, options.runs, warm=("compiled", "ours"))
        each = {side: [took for took, _ in compiled[side]] for side in compiled}
        what = f"training {arch} {size} px with train.compile against without"
        add(table, what, median(each["compiled"]), median(each["ours"]), spread(each["ours"], each["compiled"]), "", "")
        _, alone = tree_macs(arch, size)
        took, steps = median(seconds["ours"]), STEPS[name]
        bound = 3 * steps * batch * alone[FULL] / rate["bf16"] / took
        losses = [sum(answers["plain"][-1][1]) / steps, sum(answers["ours"][-1][1]["losses"]) / steps]
        waited = median(found["waited"] for _, found in answers["ours"])
        note = f"{steps * batch / took:.1f} images/s, waits {waited:.1%}; last losses {losses[1]:.3f}, plain {losses[0]:.3f}"
        what = f"training {arch} {size} px, {kind}, batch {batch}, {steps} steps"
        add(table, what, took, median(seconds["plain"]), spread(seconds["plain"], seconds["ours"]), f"{bound:.0%}", note)

        sides = {
            "sdpoint": Side(options, "training-ours", name, "sdpoint"),
            "full": Side(options, "training-ours", name, "full"),
        }
        answers = in_turn(sides, options.runs, warm=("sdpoint", "full"))
        each = {side: [took / found["steps"] for took, found in answers[side]] for side in answers}
        expected = alone[FULL] * len(alone) / sum(alone.values())
        note = f"expected MACs: {expected:.2f} times fewer"
        what = f"a mean SDPoint step of {arch} {size} px against the plain network's"
        add(table, what, median(each["sdpoint"]), median(each["full"]), spread(each["full"], each["sdpoint"]), "", note)


def timed(work, runs):
    work()
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return times


def scaling(options, table, rate):
    keep_freed_memory()
    model = network("preresnet101", 64).to(memory_format=torch.channels_last)
    grid = sdpoint_instances(model)
    x_NCHW = torch.randn(64, 3, 64, 64).to(memory_format=torch.channels_last)
    labels_N = torch.randint(10, (64,))

    def both(chosen, images):
        data = [(x_NCHW[:images], labels_N[:images])]
        return lambda: evaluate(model, chosen, data, calibrate(model, chosen, data, BF16), BF16)

    alone = median(timed(both([FULL], 32), options.runs))
    for count, images in ((1, 32), (5, 32), (19, 32), (35, 32), (69, 32), (69, 8), (69, 64)):
        chosen = grid if count == len(grid) else grid[:: len(grid) // count][:count]
        took = median(timed(both(chosen, images), options.runs))
        note = f"{1000 * took / images / count:.2f} ms for an image and instance; {took / alone:.1f} times `full` and 32 images"
        table.add_row(
            f"preresnet101 64 px, bf16, {count} instances, {images} + {images} images", f"{took:.3f} s", "", "", "", note
        )


def search(options, table, rate):
    keep_freed_memory()
    model = network("resnet20", 32).to(memory_format=torch.channels_last)
    candidates = [draw_independent(model.points, (0.5, 0.75), 0, 0.4)(i) for i in range(32)]
    data = [(torch.randn(250, 3, 32, 32).to(memory_format=torch.channels_last), torch.randint(10, (250,))) for _ in range(2)]
    first = None
    for together in (1, 8, 32):
        groups = [candidates[i : i + together] for i in range(0, 8 if together == 1 else 32, together)]

        def work(groups=groups):
            for group in groups:
                evaluate(model, group, data, calibrate(model, group, data, BF16), BF16)

        count = sum(len(group) for group in groups)
        rates = [60 * count / took for took in timed(work, options.runs)]
        first = first or median(rates)
        note = f"{median(rates):.0f} candidates a minute ({min(rates):.0f} to {max(rates):.0f})"
        ratio = f"{median(rates) / first:.2f}"
        table.add_row(f"search, resnet20 32 px, bf16, 500 + 500 images, {together} a pass", "", "", ratio, "", note)


def startup(options, table, rate):
    from sdpctl.store import Store

    with tempfile.TemporaryDirectory() as folder:
        store = Store.create(Path(folder))
        for i in range(1000):
            store.commit(
                "profile", {"costs.json": json.dumps({"rows": [], "i": i}).encode()}, key=f"{i:064x}", tag=f"n{i}.profile"
            )
        for words in (["--help"], ["store", "ls", "--store", folder], ["profile-flops", "resnet50"]):
            command = [sys.executable, "-X", "importtime", "-m", "sdpctl", *words]
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
            loaded = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
            heavy = [
                name for name in ("torch", "torchvision", "pydantic", "rich", "ptflops", "optuna", "onnx") if name in loaded
            ]
            run = [sys.executable, "-m", "sdpctl", *words]
            times = timed(
                lambda run=run, folder=folder: subprocess.run(run, capture_output=True, check=True, cwd=folder), options.runs
            )
            shown = "sdpctl " + " ".join("STORE" if word == folder else word for word in words)
            note = (
                f"{min(times):.2f} to {max(times):.2f} s; {len(loaded)} modules, of the large ones {', '.join(heavy) or 'none'}"
            )
            table.add_row(shown, f"{median(times):.2f} s", "", "", "", note)


def add(table, what, ours, theirs, ratio, bound, note):
    table.add_row(what, f"{ours:.3f} s", f"{theirs:.3f} s", ratio, bound, note)


PARTS = {part.__name__: part for part in (instances, memory, loading, training, scaling, search, startup)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True)
    parser.add_argument("--cifar", required=True)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--side", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("parts", nargs="*", metavar="PART")
    options = parser.parse_args()
    if options.side:
        answer(options)
        return
    rate = {"fp32": best_rate(torch.float32), "bf16": best_rate(torch.bfloat16)}
    console = Console(width=220)
    rates = ", ".join(f"{name} {macs / 1e9:.0f}" for name, macs in rate.items())
    table = Table(
        title=f"{torch.get_num_threads()} threads; the best convolution, GMAC/s: {rates}; ratios of {options.runs} pairs"
    )
    for heading in ("what", "ours", "the alternative", "times faster", "bound", ""):
        table.add_column(heading)
    for name in options.parts or PARTS:
        PARTS[name](options, table, rate)
        print(f"{name}: done", file=sys.stderr)
    console.print(table)


if __name__ == "__main__":
    main()
