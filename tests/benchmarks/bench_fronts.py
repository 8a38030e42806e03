"""One network at many costs against smaller networks trained alone: accuracy at equal cost and equal training compute.

    python tests/benchmarks/bench_fronts.py STORE --set data.root=DIR --set data.download=false
    python tests/benchmarks/bench_fronts.py STORE --photos --set data.root=DIR

Trains what the store lacks (hours on a CPU), calibrates, evaluates, searches, and prints the tables in Markdown. Everything is
kept in the store, so an interrupted run continues. `--train-only` stops before the tables, `--jobs N` trains N networks at a
time, `--seeds 0,1,2` says which seeds. Instances, sizes, cascades and searched networks are chosen on held-out images; the
tables show the accuracy on the test images. A cell is the mean over the seeds, with the least and the most in parentheses.

`--latency` prints one more table for the first seed (CIFAR-10 only): the accuracy within shares of the time that the plain
network takes in onnxruntime for one image. Every network is exported, and all of them take turns on the same test images.
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

import onnxruntime
from torchvision.datasets import CIFAR10

from sdpctl.recipe.load import load_recipe
from sdpctl.stages.draws import training_macs

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
BUDGETS = (25, 35, 50, 70, 100)
"""Per cent of the MACs of the plain network."""

LEEWAY = 0.005
"""Share of these MACs by which a network may exceed a budget, since no width has exactly 25 % of them. Searches have none."""

OFF = "sdpoint=off"
PAIR = ("sdpoint.draw=pair", "train.lr=0.05")
SANDWICH = ("sdpoint.draw=sandwich", "train.lr=0.04")
"""The losses of a step are added, so the learning rate is lower than that of one instance."""

PHOTOS_SANDWICH = ("sdpoint.draw=sandwich", "train.lr=0.02")
TAUGHT = ("train.distill.weight=0.5",)


@dataclass(frozen=True)
class Training:
    """A network that is trained.

    Args:
        name: first part of its tag.
        keys: how its recipe differs.
        sizes: sizes of the images, in pixels, at which a plain network is also evaluated.
    """

    name: str
    keys: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()

    @property
    def plain(self) -> bool:
        return OFF in self.keys


@dataclass(frozen=True)
class Comparison:
    """The trainings on one data set.

    Args:
        recipe: file name of the recipe.
        plain: the plain network.
        narrower: plain networks with fewer channels.
        shallower: plain networks with fewer blocks.
        ours: the networks with many costs.
    """

    recipe: str
    plain: Training
    narrower: tuple[Training, ...]
    shallower: tuple[Training, ...]
    ours: tuple[Training, ...] = field(default=())

    @property
    def trainings(self) -> tuple[Training, ...]:
        return (self.plain, *self.narrower, *self.shallower, *self.ours)


CIFAR = Comparison(
    "cifar10-fronts.yaml",
    Training("plain-full", (OFF,), sizes=(16, 18, 20, 22, 24, 26, 28)),
    tuple(Training(f"narrow-{width}", (OFF, f"model.width=0.{width}")) for width in (50, 59, 70, 84)),
    tuple(Training(f"shallow-{depth}", (OFF, f"model.arch=resnet{depth}")) for depth in (8, 14)),
    (
        Training("single", ("train.epochs=59",)),
        Training("pair", ("train.epochs=36", *PAIR, *TAUGHT)),
        Training("sandwich", (*SANDWICH, *TAUGHT)),
        Training("sandwich-untaught", SANDWICH),
        Training("sandwich-57", ("train.epochs=57", *SANDWICH, *TAUGHT)),
    ),
)
PHOTOS = Comparison(
    "clothing-resnet18.yaml",
    Training("photos-plain", (OFF,), sizes=(64, 72, 88, 104)),
    tuple(Training(f"photos-narrow-{width}", (OFF, f"model.width=0.{width}")) for width in (48, 58, 70, 83)),
    (),
    (
        Training("photos-single", ("train.epochs=119",)),
        Training("photos-pair", ("train.epochs=72", "sdpoint.draw=pair", "train.lr=0.025", *TAUGHT)),
        Training("photos-sandwich", (*PHOTOS_SANDWICH, *TAUGHT)),
        Training("photos-sandwich-untaught", PHOTOS_SANDWICH),
    ),
)


class Store:
    """Runs commands of sdpctl in one store.

    Args:
        path: folder of the store.
        comparison: the trainings.
        keys: overrides for every training, such as where the images are.
    """

    def __init__(self, path: Path, comparison: Comparison, keys: list[str]) -> None:
        self.path, self.comparison, self.keys = path, comparison, keys

    def call(self, *words: str, ok: tuple[int, ...] = (0,)) -> dict:
        command = [sys.executable, "-m", "sdpctl", *words, "--store", str(self.path), "--json", "-q"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode not in ok:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
        return json.loads(done.stdout) if done.returncode == 0 else {}

    def train(self, training: Training, seed: int) -> None:
        own = (*training.keys, f"seed={seed}", f"name={training.name}-{seed}", *self.keys)
        sets = [word for key in own for word in ("--set", key)]
        self.call("train", str(RECIPES / self.comparison.recipe), *sets)
        print(f"{training.name}-{seed}", file=sys.stderr, flush=True)

    def recipe(self, training: Training):
        return load_recipe(RECIPES / self.comparison.recipe, [*training.keys, *self.keys])

    def rows(self, tag: str, *options: str, split: str = "test") -> list[dict]:
        return self.call("eval-instances", tag, "--split", split, *options)["rows"]


def compute(store: Store, training: Training) -> float:
    """Return the compute of a training as a multiple of the plain network's."""
    return _steps_macs(store, training) / _steps_macs(store, store.comparison.plain)


def _steps_macs(store: Store, training: Training) -> float:
    recipe, steps = store.recipe(training), 2000
    return recipe.train.epochs * training_macs(recipe.changed(model={"num_classes": 10}), steps) / steps


def within(options: list[tuple[float, float, float]], share: float) -> float | None:
    """Return the test accuracy of the option that is best on held-out images among those within a share of the MACs.

    Args:
        options: (share of the MACs, accuracy on held-out images, accuracy on test images) of each.
        share: the budget, as a share of the MACs of the plain network.
    """
    known = [option for option in options if option[0] <= share + LEEWAY]
    return max(known, key=lambda option: option[1])[2] if known else None


def scored(store: Store, tag: str, full: int, *options: str) -> list[tuple[float, float, float]]:
    """Return (share of the MACs, held-out accuracy, test accuracy) of every row of an evaluation."""
    held = {row["instance"]: row["top1"] for row in store.rows(tag, *options, split="holdout")}
    return [(row["macs"] / full, held[row["instance"]], row["top1"]) for row in store.rows(tag, *options)]


def columns(store: Store, seed: int) -> dict[str, list[float | None]]:
    """Return the test accuracy at each budget by column, for one seed."""
    comparison, found = store.comparison, {}
    plain = f"{comparison.plain.name}-{seed}"
    only = ("--instances", "full")
    full = store.rows(plain, *only)[0]["macs"]
    shares = [budget / 100 for budget in BUDGETS]

    def column(options: list[tuple[float, float, float]]) -> list[float | None]:
        return [within(options, share) for share in shares]

    whole = scored(store, plain, full, *only)
    for called, trainings in (("narrower", comparison.narrower), ("shallower", comparison.shallower)):
        if trainings:
            own = [option for t in trainings for option in scored(store, f"{t.name}-{seed}", full, *only)]
            found[f"{called}, trained alone"] = column(own + whole)
    smaller = list(whole)
    for size in comparison.plain.sizes:
        sizes = ("--set", f"calibrate.image_size={size}", "--set", f"evaluate.image_size={size}")
        smaller += scored(store, plain, full, *only, *sizes)
    found["plain, smaller images"] = column(smaller)
    for training in comparison.ours:
        tag = f"{training.name}-{seed}"
        found[f"{training.name}: instance"] = column(scored(store, tag, full))
        searched, cascaded = [], []
        for budget in BUDGETS:
            limit = ("--max-macs", f"{budget}%")
            result = store.call("search", tag, *limit, ok=(0, 8))
            searched.append(result["best"]["test_top1"] if result else None)
            result = store.call("search", tag, "--cascade", *limit, ok=(0, 8))
            cascaded.append(result["best"]["top1"] if result else None)
        found[f"{training.name}: searched"], found[f"{training.name}: cascade"] = searched, cascaded
    return found


def sessions(store: Store, seed: int, folder: Path) -> dict[str, list[tuple[object, float, float]]]:
    """Export the networks of one seed; return (a call of one image, held-out accuracy, test accuracy) of each by column."""
    comparison, found = store.comparison, {}
    plain = f"{comparison.plain.name}-{seed}"
    only = ("--instances", "full")

    def exported(tag: str, instance: str, *options: str) -> object:
        path = folder / f"{tag}-{instance}-{'-'.join(options[1::2])}.onnx"
        store.call("export", tag, "--instance", instance, "--raw-input", "--output", str(path), *options)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda image: session.run(None, {session.get_inputs()[0].name: image})

    def column(tag: str, *options: str, instances: tuple[str, ...] = only) -> list[tuple[object, float, float]]:
        held = {row["instance"]: row["top1"] for row in store.rows(tag, *instances, *options, split="holdout")}
        rows = store.rows(tag, *instances, *options)
        return [(exported(tag, row["instance"], *options), held[row["instance"]], row["top1"]) for row in rows]

    whole = column(plain)
    for called, trainings in (("narrower", comparison.narrower), ("shallower", comparison.shallower)):
        found[f"{called}, trained alone"] = [*whole, *(one for t in trainings for one in column(f"{t.name}-{seed}"))]
    found["plain"] = whole
    for training in comparison.ours:
        tag = f"{training.name}-{seed}"
        found[f"{training.name}: instance"] = column(tag, instances=())
        cascades = {}
        for budget in range(20, 101, 5):
            path = folder / f"{tag}-cascade-{budget}"
            words = ("--format", "onnx-cascade", "--raw-input", "--max-macs", f"{budget}%", "--output", str(path))
            if store.call("export", tag, *words, ok=(0, 8)):
                program = runpy.run_path(str(path / "run.py"))
                figures = json.loads((path / "policy.json").read_text())["figures"]
                cascades[figures["cascade"]] = (program["classify"], figures["heldout_top1"], figures["top1"])
        found[f"{training.name}: cascade"] = list(cascades.values())
    return found


def latencies(found: dict[str, list[tuple[object, float, float]]], images: list) -> dict[str, list[tuple[float, float, float]]]:
    """Replace each call by its mean time for one image, as a share of the plain network's; the calls take turns."""
    calls = {id(call): call for options in found.values() for call, _, _ in options}
    seconds = dict.fromkeys(calls, 0.0)
    for image in images:
        for key, call in calls.items():
            took = []
            for _ in range(3):
                began = time.perf_counter()
                call(image)
                took.append(time.perf_counter() - began)
            seconds[key] += median(took)
    plain = seconds[id(found["plain"][0][0])]
    print(f"\nthe plain network takes {1000 * plain / len(images):.2f} ms", flush=True)
    return {name: [(seconds[id(call)] / plain, held, test) for call, held, test in own] for name, own in found.items()}


def by_instance(store: Store, seeds: list[int]) -> None:
    """Print the test accuracy of every instance by training."""
    ours = store.comparison.ours
    found = [[store.rows(f"{training.name}-{seed}") for seed in seeds] for training in ours]
    print(f"\n| instance | MACs | {' | '.join(t.name for t in ours)} |\n|---|---|{'---|' * len(ours)}")
    for number, row in enumerate(found[0][0]):
        cells = [cell([rows[number]["top1"] for rows in own]) for own in found]
        print(f"| `{row['instance']}` | {100 * row['relative']:.1f} % | {' | '.join(cells)} |")


def cell(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    return f"{fmean(known):.2f} ({min(known):.2f} to {max(known):.2f})" if len(known) > 1 else f"{known[0]:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("--photos", action="store_true")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="", help="names of trainings, separated by commas")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--set", action="append", default=[], dest="keys")
    options = parser.parse_args()
    comparison = PHOTOS if options.photos else CIFAR
    store = Store(options.store, comparison, options.keys)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    chosen = [t for t in comparison.trainings if not options.only or t.name in options.only.split(",")]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda work: store.train(*work), [(t, seed) for seed in seeds for t in chosen]))
    if options.train_only:
        return
    found = [columns(store, seed) for seed in seeds]
    print(f"| | {' | '.join(f'{budget} %' for budget in BUDGETS)} |\n|---|{'---|' * len(BUDGETS)}")
    for name in found[0]:
        cells = [cell([each[name][i] for each in found]) for i in range(len(BUDGETS))]
        print(f"| {name} | {' | '.join(cells)} |")
    if options.latency:
        root = load_recipe(RECIPES / comparison.recipe, options.keys).data.root
        tested = CIFAR10(root, train=False).data[:200].transpose(0, 3, 1, 2).copy()
        with tempfile.TemporaryDirectory() as folder:
            timed = latencies(sessions(store, seeds[0], Path(folder)), [image[None] for image in tested])
        print(f"\n| of the time | {' | '.join(f'{budget} %' for budget in BUDGETS)} |\n|---|{'---|' * len(BUDGETS)}")
        for name, own in timed.items():
            print(f"| {name} | {' | '.join(cell([within(own, budget / 100)]) for budget in BUDGETS)} |")
    by_instance(store, seeds)
    print("\n| training | compute |\n|---|---|")
    for training in comparison.trainings:
        print(f"| {training.name} | {compute(store, training):.2f} |")
    five = sum(compute(store, training) for training in (comparison.plain, *comparison.narrower))
    print(f"| the plain network and all narrower ones | {five:.2f} |")


if __name__ == "__main__":
    main()
