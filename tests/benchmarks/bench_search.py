"""Search strategies on a real landscape: every network of a space scored once, then each strategy replayed on that table.

    python tests/benchmarks/bench_search.py score STORE TAG TABLE.npz       # a few minutes on two cores
    python tests/benchmarks/bench_search.py replay TABLE.npz --evaluations 64,150 --seeds 30
    python tests/benchmarks/bench_search.py budgets TABLE.npz --evaluations 64,150,500 --seeds 30
    python tests/benchmarks/bench_search.py transfer TABLE.npz OTHER.npz --evaluations 150 --seeds 30

`score` takes a resnet20 trained on CIFAR-10 and its nine blocks, at ratios 1, 0.75 and 0.5, and keeps which network is right on
which image: of the holdout, to search with, and of the test split, the truth that regret is measured by. It also times the tree
against one network after another, on a sample of the networks and the same batches.

`replay` draws, for each seed, 1,000 held-out images to score on and 3,000 others to score the best eight on. A strategy gets
the first scores as it asks for them; its winner's regret is how many points of test accuracy the best network within the budget
is ahead of it. `everything` is the noise floor: the winner by the same images where all networks were scored.

`budgets` asks for the best network at each of the budgets 30, 35, ..., 90 % of the MACs, with N evaluations in all. An agent
learns the whole range from them; a strategy gets a thirteenth for each budget. The figure is the mean regret over the budgets,
the area under the regret curve. Rows of an agent: `policy`, the walk of the policy alone; `agent`, its first proposal; both
without a further evaluation; and `agent, best 8`, whose eight first proposals are scored on the same images as the best eight
of a strategy. `regression` has no agent: N networks near budgets of the range, and the regression's best of 300 candidates.

`transfer` trains the agent on one table, of one network and image size, and lets it propose for another (`score` with another
tag or `--size`), without any evaluation there and with a few, against random networks near the budget.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from numpy.typing import NDArray

from sdpctl import Instance, create_model
from sdpctl.cli.output import Output
from sdpctl.engine.calibrate import CalibratedNorms, calibrate
from sdpctl.engine.cost import Costs
from sdpctl.engine.device import autocast
from sdpctl.engine.settings import WalkSettings
from sdpctl.engine.tree import Tree
from sdpctl.models.chain import Chain
from sdpctl.randomness import stream
from sdpctl.search.agents import Learned, learn
from sdpctl.search.catalog import STRATEGIES
from sdpctl.search.kept import Agent
from sdpctl.search.problem import Evaluations, Problem, Spent
from sdpctl.search.proxy import Proxy
from sdpctl.search.run import load_strategy
from sdpctl.search.space import Space
from sdpctl.search.strategies import Strategy
from sdpctl.stages.context import Context
from sdpctl.stages.layers import read_model
from sdpctl.stages.network import open_network
from sdpctl.stages.opening import open_data

FIRST, MORE, CALIBRATION, GROUP, SAMPLE, BEST = 1000, 3000, 4, 700, 24, 8


def nine_blocks(size: int = 32) -> Space:
    """Return the space: the blocks of resnet20 at an image size."""
    costs = Costs(create_model("resnet20", num_classes=10), (3, size, size))
    return Space(costs, {point: (1, 0.75, 0.5) for point in costs.model.points if point != "stem"})


@torch.inference_mode()
def hits(model: Chain, networks: list[Instance], calibration: list[Any], batches: Iterable[Any]) -> NDArray[np.bool_]:
    """Return which network is right on which image, (networks, images)."""
    tree = Tree(model, networks)
    norms = CalibratedNorms(model, calibrate(model, networks, calibration, WalkSettings(precision="bf16")))
    parts = []
    for x_NCHW, labels_N in batches:
        with autocast(x_NCHW.device, "bf16"):
            logits = tree.walk(x_NCHW, norms)
        parts.append(torch.stack([logits[network].argmax(1) == labels_N for network in networks]))
    return torch.cat(parts, dim=1).numpy()


def score(store: Path, tag: str, table: Path, pairs: int, size: int) -> None:
    """Score every network; time the tree against one network after another, in pairs."""
    context = Context(path=store, report=Output())
    opened = open_network(tag, context, [f"calibrate.image_size={size}", f"evaluate.image_size={size}"] if size != 32 else [])
    data = open_data(opened.recipe, torch.device("cpu"), context)
    checkpoint = context.lineage(context.store.resolve(tag))[-1]
    model = read_model(context.store, checkpoint, opened.recipe.model).to(memory_format=torch.channels_last).eval()
    space = nine_blocks(size)
    networks = list(space.networks(space.full))
    calibration, first = list(data.calibration(CALIBRATION, opened.recipe.preparation)), list(data.holdout_part(0, FIRST, 250))
    ratios = []
    for run in range(pairs + 1 if pairs else 0):  # the first warms up
        began = time.perf_counter()
        hits(model, networks, calibration, first)
        tree = (time.perf_counter() - began) / len(networks)
        sample = stream(run, "sample").sample(networks, SAMPLE)
        began = time.perf_counter()
        for network in sample:
            hits(model, [network], calibration, first)
        alone = (time.perf_counter() - began) / SAMPLE
        print(f"a network: tree {1000 * tree:.1f} ms, alone {1000 * alone:.0f} ms, ratio {alone / tree:.1f}", flush=True)
        ratios.append(alone / tree)
    if ratios := sorted(ratios[1:]):
        spread = f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f}, {pairs} pairs)"
        print(f"{len(networks)} networks in one tree, ratio {spread}")
    parts = {"held_out": lambda: data.holdout(250), "test": lambda: data.test(250)}
    groups = [networks[i : i + GROUP] for i in range(0, len(networks), GROUP)]
    right = {
        name: np.packbits(np.concatenate([hits(model, group, calibration, batches()) for group in groups]), axis=1)
        for name, batches in parts.items()
    }
    np.savez(table, size=size, networks=np.array([str(network) for network in networks]), **right)


class Landscape:
    """The table, within a budget."""

    def __init__(self, table: Path, share: float) -> None:
        with np.load(table) as arrays:
            networks = [Instance.parse(str(text)) for text in arrays["networks"]]
            size = int(arrays["size"]) if "size" in arrays else 32
            held_out, test = (np.unpackbits(arrays[name], axis=1) for name in ("held_out", "test"))
        self.space = nine_blocks(size)
        self.budget = int(share * self.space.full)
        within = [i for i, network in enumerate(networks) if self.space.cost(network) <= self.budget]
        self.networks = [networks[i] for i in within]
        self.held_out = held_out[within]
        self.truth = dict(zip(self.networks, 100 * test[within].mean(1), strict=True))
        self.ideal = max(self.truth.values())

    def scores(self, seed: int) -> tuple[dict[Instance, float], dict[Instance, float]]:
        """Return each network's score on the first images of a seed, and on all of them."""
        order = np.random.default_rng(seed).permutation(self.held_out.shape[1])
        first = 100 * self.held_out[:, order[:FIRST]].mean(1)
        both = 100 * self.held_out[:, order[: FIRST + MORE]].mean(1)
        return dict(zip(self.networks, first, strict=True)), dict(zip(self.networks, both, strict=True))

    def regret(self, asked: Iterable[Instance], first: dict[Instance, float], both: dict[Instance, float], best: int) -> float:
        """Return what the winner of the networks asked for is behind the best there is."""
        top = sorted(asked, key=lambda network: -first[network])[:best]
        return self.ideal - self.truth[max(top, key=lambda network: both[network])]


def show(name: str, count: int, regrets: list[float], seconds: float) -> None:
    medians = np.median(np.random.default_rng(0).choice(regrets, (5000, len(regrets))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    print(
        f"{name:24} {count:6} {statistics.median(regrets):7.2f} {low:7.2f} to {high:4.2f} {max(regrets):6.2f} {seconds:6.1f}",
        flush=True,
    )


def replay(table: Path, names: list[str], evaluations: list[int], seeds: int, share: float) -> None:
    """Print the regret of each strategy."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)
    land = Landscape(table, share)
    print(
        f"{len(land.networks)} networks within {100 * share:g} % of the MACs; the best has {land.ideal:.2f} % on the test split"
    )
    print(f"{'strategy':24} {'scored':>6} {'median':>7} {'95 % interval':>15} {'worst':>6} {'s':>6}")
    drawn = [land.scores(seed) for seed in range(seeds)]
    for name, best in (("one scoring", 1), ("everything", BEST)):
        show(name, len(land.networks), [land.regret(land.networks, *scores, best) for scores in drawn], 0)
    for count in evaluations:
        for name in names:
            began, regrets = time.perf_counter(), []
            for seed, (first, both) in enumerate(drawn):
                known: dict[Instance, float] = {}

                def answer(
                    wanted: Iterable[Instance],
                    limit: int,
                    known: dict[Instance, float] = known,
                    first: dict[Instance, float] = first,
                ) -> dict[Instance, float]:
                    fresh = {network: first[network] for network in list(wanted)[: limit - len(known)]}
                    known |= fresh
                    return fresh

                with contextlib.suppress(Spent):
                    load_strategy(name)(Problem(land.space, land.budget, count, seed), Evaluations(count, answer))
                assert len(known) <= count
                regrets.append(land.regret(known, first, both, BEST))
            show(name, count, regrets, (time.perf_counter() - began) / seeds)


def answers(land: "Landscapes", name: str, count: int, seed: int) -> dict[str, list[float]]:
    """Return the regret at each budget, by row of the table, of a strategy or an agent with a number of evaluations in all."""
    _, both = land.scores[seed]

    def scored(problem: Problem, propose: Strategy) -> dict[Instance, float]:
        return land.asked(problem, propose, seed)

    space, budgets = land.space, land.budgets
    ranged = Problem(space, budgets[-1], count, seed, lowest=budgets[0])
    if name == "regression":
        known = scored(ranged, load_strategy("random"))
        proxy, found = Proxy(space, known), []
        for budget in budgets:
            problem = Problem(space, budget, count, seed)
            pool = [*problem.candidates(stream(seed, "pool"), 300, set()), *known]
            pool = [network for network in pool if space.cost(network) <= budget]
            found.append(pool[int(np.argmax(proxy.features(pool) @ proxy.ridge.coef_))])
        return {name: [land.regret(budget, network) for budget, network in zip(budgets, found, strict=True)]}
    if not STRATEGIES[name].learns:
        regrets = []
        for budget in budgets:
            known = scored(Problem(space, budget, count // len(budgets), seed), load_strategy(name))
            regrets.append(land.regret(budget, land.winner(known, seed)))
        return {name: regrets}
    learned: list[Learned] = []
    known = scored(ranged, lambda problem, score: learned.append(learn(name, problem, score)))
    policy = learned[0].policy
    agent = Agent(policy, (1.0, 0.75, 0.5), known)
    walks = policy.walks(space, budgets)
    lists = [agent.proposals(Problem(space, b, 1, seed), {}, np.random.default_rng(seed)) for b in budgets]
    return {
        f"{name}: policy": [land.regret(b, walk.instance) for b, walk in zip(budgets, walks, strict=True)],
        f"{name}: agent": [land.regret(b, own[0]) for b, own in zip(budgets, lists, strict=True)],
        f"{name}: agent, best 8": [
            land.regret(b, max(own[:BEST], key=lambda network: both[network])) for b, own in zip(budgets, lists, strict=True)
        ],
    }


class Landscapes:
    """The table, with the best network of each budget."""

    def __init__(self, table: Path, seeds: int) -> None:
        whole = Landscape(table, 1.0)
        self.space, self.truth = whole.space, whole.truth
        self.budgets = [int(self.space.full * share / 100) for share in range(30, 91, 5)]
        self.ideal = {
            budget: max(top1 for network, top1 in self.truth.items() if self.space.cost(network) <= budget)
            for budget in self.budgets
        }
        self.scores = [whole.scores(seed) for seed in range(seeds)]

    def regret(self, budget: int, network: Instance) -> float:
        """Return what a network is behind the best within a budget."""
        assert self.space.cost(network) <= budget
        return self.ideal[budget] - self.truth[network]

    def asked(self, problem: Problem, propose: Strategy, seed: int) -> dict[Instance, float]:
        """Return the networks that a strategy asks for, with the scores of a seed."""
        first, known = self.scores[seed][0], dict[Instance, float]()

        def answer(wanted: Iterable[Instance], limit: int) -> dict[Instance, float]:
            fresh = {network: first[network] for network in list(wanted)[: limit - len(known)]}
            known.update(fresh)
            return fresh

        with contextlib.suppress(Spent):
            propose(problem, Evaluations(problem.evaluations, answer))
        assert len(known) <= problem.evaluations
        return known

    def winner(self, known: dict[Instance, float], seed: int) -> Instance:
        """Return the best of the best few networks on more images."""
        top = sorted(known, key=lambda network: -known[network])[:BEST]
        return max(top, key=lambda network: self.scores[seed][1][network])


def over_budgets(table: Path, names: list[str], evaluations: list[int], seeds: int) -> None:
    """Print the mean regret over all budgets of each way to spend a number of evaluations."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)
    land = Landscapes(table, seeds)
    print(f"{'answers by':24} {'scored':>6} {'median':>7} {'95 % interval':>15} {'worst':>6} {'s':>6}")
    for count in evaluations:
        for name in names:
            began, found = time.perf_counter(), [answers(land, name, count, seed) for seed in range(seeds)]
            seconds = (time.perf_counter() - began) / seeds
            for row in found[0]:
                show(row, count, [statistics.fmean(each[row]) for each in found], seconds)


def transferred(table: Path, other: Path, name: str, count: int, seeds: int) -> None:
    """Print the mean regret over all budgets on another landscape than that of the agent."""
    torch.set_num_threads(1)
    home, away = Landscapes(table, seeds), Landscapes(other, seeds)
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        learned: list[Learned] = []
        problem = Problem(home.space, home.budgets[-1], count, seed, lowest=home.budgets[0])
        home.asked(problem, lambda problem, score, learned=learned: learned.append(learn(name, problem, score)), seed)
        agent = Agent(learned[0].policy, (1.0, 0.75, 0.5))
        rows: dict[str, list[float]] = {}
        for budget in away.budgets:
            for evaluations in (0, 16, 64):
                for who, propose in (("agent", load_strategy("agent")), ("random", load_strategy("random"))):
                    trial = Problem(away.space, budget, max(1, evaluations), seed, trained=agent)
                    winner = away.winner(away.asked(trial, propose, seed), seed)
                    rows.setdefault(f"{who}, {evaluations}", []).append(away.regret(budget, winner))
        for row, regrets in rows.items():
            found.setdefault(row, []).append(statistics.fmean(regrets))
    for row, regrets in found.items():
        show(row, count, regrets, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    scoring = commands.add_parser("score")
    scoring.add_argument("store", type=Path)
    scoring.add_argument("tag")
    scoring.add_argument("table", type=Path)
    scoring.add_argument("--pairs", type=int, default=5)
    scoring.add_argument("--size", type=int, default=32)
    replaying = commands.add_parser("replay")
    replaying.add_argument("table", type=Path)
    replaying.add_argument("--strategies", default=",".join(name for name in STRATEGIES if name not in ("exhaustive", "agent")))
    replaying.add_argument("--evaluations", default="64,150")
    replaying.add_argument("--seeds", type=int, default=30)
    replaying.add_argument("--budget", type=float, default=0.5)
    many = commands.add_parser("budgets")
    many.add_argument("table", type=Path)
    many.add_argument("--strategies", default="ppo,dqn,reinforce,regression,surrogate,random,tpe")
    many.add_argument("--evaluations", default="64,150,500")
    many.add_argument("--seeds", type=int, default=30)
    moving = commands.add_parser("transfer")
    moving.add_argument("table", type=Path)
    moving.add_argument("other", type=Path)
    moving.add_argument("--strategies", default="ppo")
    moving.add_argument("--evaluations", default="150")
    moving.add_argument("--seeds", type=int, default=30)
    given = parser.parse_args()
    if given.command == "score":
        score(given.store, given.tag, given.table, given.pairs, given.size)
        return
    counts = [int(count) for count in given.evaluations.split(",")]
    if given.command == "transfer":
        for name, count in product(given.strategies.split(","), counts):
            transferred(given.table, given.other, name, count, given.seeds)
    elif given.command == "budgets":
        over_budgets(given.table, given.strategies.split(","), counts, given.seeds)
    else:
        replay(given.table, given.strategies.split(","), counts, given.seeds, given.budget)


if __name__ == "__main__":
    main()
