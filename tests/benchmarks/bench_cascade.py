"""Cascades chosen on some images and played on others, and the time that a shared prefix saves.

python tests/benchmarks/bench_cascade.py TAG --store DIR --set data.root=DIR --logits logits.npz

The logits of all calibrated instances on the held-out and the test images are computed once, and kept in the file. For each
random split of these images, cascades are chosen on one third and played on the other two: how far their mean MACs are from
the budget, and how accurate they are beside the best single instance that the same images choose. The cascade that is chosen on
the held-out images is timed on test images, in turns with its members one after another and with `full`.
"""

import argparse
import statistics
from pathlib import Path

import numpy as np
import torch

from sdpctl.cascade import Cascade
from sdpctl.cli.output import Output
from sdpctl.engine.calibrate import CalibratedNorms
from sdpctl.engine.cascade import CascadeRun, added_macs, answers, shared_macs
from sdpctl.engine.evaluate import gather_logits
from sdpctl.engine.tree import Tree
from sdpctl.instance import FULL, Instance
from sdpctl.plan import Plan
from sdpctl.search.cascades import Cascades, Logits
from sdpctl.stages.calibrate import Statistics
from sdpctl.stages.cascade import latencies
from sdpctl.stages.context import Context
from sdpctl.stages.layers import calibrated_instances, read_statistics
from sdpctl.stages.network import open_network
from sdpctl.stages.opening import open_data, open_model
from sdpctl.stages.profile import network_costs

BUDGETS = (35, 40, 50, 60, 70, 80)
WAYS = {"pairs": (2, False), "default": (3, None)}


class Bench:
    """A trained network, and the logits of its instances."""

    def __init__(self, options):
        context = Context(path=options.store, report=Output())
        network = open_network(options.tag, context, options.set).with_data(context)
        self.recipe = network.recipe
        checkpoint = network.checkpoint.artifact
        self.model, device = open_model(checkpoint, self.recipe, context, images=self.recipe.evaluate.batch_size)
        self.data = open_data(self.recipe, device, context)
        statistics = Plan(context).need(Statistics(network))
        self.instances = calibrated_instances(context.store, statistics)
        self.statistics = read_statistics(context.store, statistics, self.model)
        self.costs = network_costs(self.recipe.model, self.recipe.scored_size)
        self.macs = [self.costs.of(instance).macs for instance in self.instances]
        self.shared = shared_macs(self.instances, self.costs)
        self.full = self.costs.of(FULL).macs
        self.logits, self.labels = self._logits(options.logits)

    def _logits(self, file):
        """Return logits and labels of both splits, each by the name of the split."""
        texts = [str(instance) for instance in self.instances]
        if file is not None and file.exists():
            kept = np.load(file)
            assert kept["instances"].tolist() == texts
            return ({split: kept[f"{side} {split}"] for split in ("holdout", "test")} for side in ("logits", "labels"))
        size, logits, labels = self.recipe.evaluate.batch_size, {}, {}
        for split in ("holdout", "test"):
            batches = getattr(self.data, split)(size)
            found = gather_logits(self.model, self.instances, batches, self.statistics, self.recipe.evaluation)
            logits[split], labels[split] = (tensor.numpy() for tensor in found)
        if file is not None:
            kept = {f"logits {split}": value for split, value in logits.items()}
            np.savez(file, instances=texts, **kept, **{f"labels {split}": value for split, value in labels.items()})
        return logits, labels

    def known(self, logits_INK, labels_N):
        return Logits(self.instances, self.macs, self.shared, list(logits_INK), labels_N)

    def play(self, choice, logits_INK, labels_N):
        """Return accuracy in percent and mean MACs."""
        numbers = {instance: number for number, instance in enumerate(self.instances)}
        if isinstance(choice, Instance):
            number = numbers[choice]
            return 100 * float((logits_INK[number].argmax(1) == labels_N).mean()), self.macs[number]
        log_p_NK, left_N = answers(choice, [torch.from_numpy(logits_INK[numbers[member]]) for member in choice.members])
        spent = np.cumsum(added_macs(choice, self.costs))[left_N.numpy()]
        return 100 * float((log_p_NK.argmax(1).numpy() == labels_N).mean()), float(spent.mean())

    def splits(self, count):
        logits_INK = np.concatenate([self.logits["holdout"], self.logits["test"]], axis=1)
        labels_N = np.concatenate([self.labels["holdout"], self.labels["test"]])
        budgets = [self.full * share // 100 for share in BUDGETS]
        found = {(way, share): [] for way in ("single", *WAYS) for share in BUDGETS}
        for seed in range(count):
            order_N = np.random.default_rng(seed).permutation(len(labels_N))
            first, rest = order_N[: len(order_N) // 3], order_N[len(order_N) // 3 :]
            known = self.known(logits_INK[:, first], labels_N[first])
            chosen = {"single": [known.best_single(budget) for budget in budgets]}
            for way, (members, averaged) in WAYS.items():
                chosen[way] = Cascades(known, members=members, averaged=averaged).within(budgets)
            for way, choices in chosen.items():
                for share, budget, one in zip(BUDGETS, budgets, choices, strict=True):
                    if one is not None:
                        top1, macs = self.play(one.choice, logits_INK[:, rest], labels_N[rest])
                        figures = (
                            100 * one.right / one.images,
                            top1,
                            100 * (macs / budget - 1),
                            100 * (macs / one.mean_macs - 1),
                        )
                        found[way, share].append(figures)
        print(f"{count} splits: chosen on {len(first):,} images, played on {len(rest):,}")
        print("way, budget: accuracy on the images of the choice, on the others; mean MACs off the budget: median, most; ")
        print("off the mean of the images of the choice: median of the absolute values, largest")
        for (way, share), figures in found.items():
            if figures:
                own, other, off, moved = zip(*figures, strict=True)
                moved = [abs(value) for value in moved]
                print(
                    f"{way:8} {share:3} %  {statistics.fmean(own):.2f}  {statistics.fmean(other):.2f} "
                    f"(+- {statistics.pstdev(other):.2f})  {statistics.median(off):+.2f} % {max(off):+.2f} %  "
                    f"{statistics.median(moved):.2f} % {max(moved):.2f} %  n={len(figures)}"
                )

    def chosen(self, share):
        known = self.known(self.logits["holdout"], self.labels["holdout"])
        (found,) = Cascades(known).within([self.full * share // 100])
        return found

    def latency(self, share):
        found = self.chosen(share)
        cascade: Cascade = found.choice
        top1, macs = self.play(cascade, self.logits["test"], self.labels["test"])
        single = self.known(self.logits["holdout"], self.labels["holdout"]).best_single(self.full * share // 100)
        print(f"{share} %: {cascade}: test {top1:.2f} % at {100 * macs / self.full:.2f} % of the MACs")
        alone = self.play(single.choice, self.logits["test"], self.labels["test"])
        print(f"  the single instance {single.choice}: test {alone[0]:.2f} % at {100 * alone[1] / self.full:.2f} %")
        norms = CalibratedNorms(self.model, self.statistics)
        run, tree = CascadeRun(self.model, cascade, norms), Tree(self.model, [FULL])
        trees = [Tree(self.model, [member]) for member in cascade.members]

        def one_after_another(x_NCHW):
            """Run each member from the images on, on those that remain."""
            remaining = torch.arange(len(x_NCHW))
            logits = []
            for number, tree in enumerate(trees):
                own = next(iter(tree.walk(x_NCHW[remaining], norms).values()))
                logits.append(torch.zeros(len(x_NCHW), own.shape[1]))
                logits[-1][remaining] = own
                if number < len(trees) - 1:
                    part = Cascade(
                        cascade.members[: number + 2],
                        cascade.thresholds[: number + 1],
                        cascade.temperatures[: number + 2],
                        cascade.averaged,
                    )
                    _, left_N = answers(part, [*logits, logits[-1]])
                    remaining = (left_N == number + 1).nonzero()[:, 0]
                    if not len(remaining):
                        break
            return remaining

        calls = {"cascade": run, "members": one_after_another, "full": lambda x_NCHW: tree.walk(x_NCHW, norms)}
        x_NCHW, _ = next(iter(self.data.test(64, 1)))
        shared = float(np.cumsum(added_macs(cascade, self.costs))[run(x_NCHW)[1].numpy()].mean())
        plain = float(np.cumsum([self.costs.of(m).macs for m in cascade.members])[run(x_NCHW)[1].numpy()].mean())
        with torch.inference_mode():
            for batch in (1, 32):
                times = latencies(calls, torch.split(x_NCHW, batch), runs=5)
                shares = {name: value / times["full"] for name, value in times.items()}
                print(
                    f"  batch {batch}: cascade {times['cascade']:.2f} ms ({shares['cascade']:.2f} of full; MACs "
                    f"{shared / self.full:.2f}), members from the images on {times['members']:.2f} ms "
                    f"({shares['members']:.2f}; MACs {plain / self.full:.2f}), full {times['full']:.2f} ms"
                )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tag")
    parser.add_argument("--store", type=Path, default=Path(".sdpctl"))
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--logits", type=Path, help="where the logits are kept")
    parser.add_argument("--splits", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options)
    with torch.no_grad():
        for share in (40, 50, 70):
            bench.latency(share)
    bench.splits(options.splits)


if __name__ == "__main__":
    main()
