"""Search strategies on a real landscape: every network of a space scored once, then each strategy replayed on that table.

    python tests/benchmarks/bench_search.py score STORE TAG TABLE.json      # about a quarter of an hour on two cores
    python tests/benchmarks/bench_search.py replay TABLE.json --evaluations 64,150 --seeds 30

`score` takes a trained resnet20 and its nine blocks, at ratios 1, 0.75 and 0.5. Each network is scored on 1,000 held-out
images, on 3,000 others of the holdout, and on the test split, which is the truth that regret is measured by. It also times
the tree against one network after another, on a sample of the networks and the same batches.

`replay` gives each strategy the first scores as they are asked for, scores its best eight on the others, and takes the
winner's regret: how many points of test accuracy the best network within the budget is ahead of it. Beside the strategies
stands `everything`: the winner by the same two scorings where all networks were scored, which no strategy can reliably beat.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch

from sdpctl import Instance, create_model
from sdpctl.cli.output import Output
from sdpctl.engine.calibrate import calibrate
from sdpctl.engine.cost import Costs
from sdpctl.engine.evaluate import evaluate
from sdpctl.pipeline.artifacts import read_model
from sdpctl.pipeline.context import Context, open_artifact
from sdpctl.pipeline.inputs import open_data
from sdpctl.randomness import stream
from sdpctl.search.problem import Evaluations, Problem, Spent
from sdpctl.search.search import STRATEGIES, strategy
from sdpctl.search.space import Space

FIRST, MORE, CALIBRATION, GROUP, SAMPLE = 1000, 3000, 4, 700, 24


def nine_blocks() -> Space:
    """Return the space: the blocks of resnet20 at 32 px."""
    costs = Costs(create_model("resnet20", num_classes=10), (3, 32, 32))
    return Space(costs, {point: (1, 0.75, 0.5) for point in costs.model.points if point != "stem"})


def score(store: Path, tag: str, table: Path) -> None:
    """Score every network, and time the tree."""
    context = Context(path=store, report=Output())
    opened = open_artifact(tag, context)
    data = open_data(opened.recipe, torch.device("cpu"))
    model = read_model(context.store, opened.checkpoint, opened.recipe.model).to(memory_format=torch.channels_last).eval()
    space = nine_blocks()
    networks = list(space.networks(space.full))
    calibration = list(data.calibration(CALIBRATION))
    parts: dict[str, Callable[[], Iterable[Any]]] = {
        "first": lambda: data.holdout_part(0, FIRST, 250),
        "more": lambda: data.holdout_part(FIRST, FIRST + MORE, 250),
        "test": lambda: data.test(250),
    }

    def scored(some: list[Instance], batches: Iterable[Any]) -> dict[Instance, float]:
        gathered = calibrate(model, some, calibration, precision="bf16")
        return {i: s.top1 for i, s in evaluate(model, some, batches, gathered, precision="bf16").items()}

    first = list(parts["first"]())
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    scored(networks, first)
    seconds["tree, all networks"] = time.perf_counter() - began
    sample = stream(0, "sample").sample(networks, SAMPLE)
    began = time.perf_counter()
    for network in sample:
        scored([network], first)
    seconds[f"one by one, {SAMPLE} networks"] = time.perf_counter() - began
    print(json.dumps(seconds, indent=1), flush=True)
    results: dict[str, dict[str, float]] = {str(network): {} for network in networks}
    for name, batches in parts.items():
        began = time.perf_counter()
        for i in range(0, len(networks), GROUP):
            for network, top1 in scored(networks[i : i + GROUP], batches()).items():
                results[str(network)][name] = top1
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    table.write_text(json.dumps({"tag": tag, "seconds": seconds, "networks": results}))


def replay(table: Path, names: list[str], evaluations: list[int], seeds: int, share: float) -> None:
    """Print the regret of each strategy."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)
    scores = {Instance.parse(text): row for text, row in json.loads(table.read_text())["networks"].items()}
    space = nine_blocks()
    budget = int(share * space.full)
    within = {network: row for network, row in scores.items() if space.cost(network) <= budget}
    ideal = max(row["test"] for row in within.values())
    print(
        f"{len(scores)} networks, {len(within)} within {100 * share:g} %; the best of them has {ideal:.2f} % on the test split"
    )
    print(f"{'strategy':12} {'evals':>5} {'median':>7} {'95 % interval':>15} {'worst':>6} {'asked':>6} {'s':>6}")

    def winner(known: Iterable[Instance], best: int = 8) -> Instance:
        top = sorted(known, key=lambda network: -scores[network]["first"])[:best]
        return max(top, key=lambda n: FIRST * scores[n]["first"] + MORE * scores[n]["more"])

    def show(name: str, count: int, regrets: list[float], asked: float, each: float) -> None:
        numbers = np.random.default_rng(0)
        medians = np.median(numbers.choice(regrets, (2000, len(regrets))), axis=1)
        low, high = np.percentile(medians, [2.5, 97.5])
        middle = statistics.median(regrets)
        line = f"{name:12} {count:5} {middle:7.2f} {low:6.2f} to {high:5.2f} {max(regrets):6.2f} {asked:6.0f} {each:6.1f}"
        print(line, flush=True)

    # The noise floor: another draw of the images. Each scoring is redrawn with the spread of so many images.
    numbers = np.random.default_rng(0)
    network_list = list(within)
    test = np.array([within[network]["test"] for network in network_list])
    floor = {}
    for kind, best in (("one scoring", 1), ("everything", 8)):
        floor[kind] = []
        for _ in range(seeds):
            noisy = [test + numbers.normal(0, np.sqrt(test * (100 - test) / n)) for n in (FIRST, MORE)]
            top = np.argsort(-noisy[0])[:best]
            floor[kind].append(ideal - test[max(top, key=lambda i: FIRST * noisy[0][i] + MORE * noisy[1][i])])
        show(kind, len(within), floor[kind], len(within), 0)
    show("as measured", len(within), [ideal - scores[winner(within)]["test"]], len(within), 0)
    for count in evaluations:
        for name in names:
            began, regrets, asked = time.perf_counter(), [], []
            for seed in range(seeds):
                known: dict[Instance, float] = {}

                def answer(
                    wanted: Iterable[Instance], limit: int, known: dict[Instance, float] = known
                ) -> dict[Instance, float]:
                    fresh = {network: scores[network]["first"] for network in list(wanted)[: limit - len(known)]}
                    known |= fresh
                    return fresh

                with contextlib.suppress(Spent):
                    strategy(name)(Problem(space, budget, count, seed), Evaluations(count, answer))
                regrets.append(ideal - scores[winner(known)]["test"])
                asked.append(len(known))
            show(name, count, regrets, statistics.mean(asked), (time.perf_counter() - began) / seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    scoring = commands.add_parser("score")
    scoring.add_argument("store", type=Path)
    scoring.add_argument("tag")
    scoring.add_argument("table", type=Path)
    replaying = commands.add_parser("replay")
    replaying.add_argument("table", type=Path)
    replaying.add_argument("--strategies", default=",".join(name for name in STRATEGIES if name != "exhaustive"))
    replaying.add_argument("--evaluations", default="64,150")
    replaying.add_argument("--seeds", type=int, default=30)
    replaying.add_argument("--budget", type=float, default=0.5)
    given = parser.parse_args()
    if given.command == "score":
        score(given.store, given.tag, given.table)
    else:
        counts = [int(count) for count in given.evaluations.split(",")]
        replay(given.table, given.strategies.split(","), counts, given.seeds, given.budget)


if __name__ == "__main__":
    main()
