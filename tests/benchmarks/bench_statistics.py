"""What the images of a calibration, and the fine-tuning of an instance, make of the accuracy on the test split.

python tests/benchmarks/bench_statistics.py TAG --store DIR --set data.root=/where/it/is

Nothing is written to the store.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from sdpctl.cli.output import Output
from sdpctl.data.settings import Preparation
from sdpctl.engine.calibrate import Statistics, calibrate
from sdpctl.engine.cost import Costs
from sdpctl.engine.evaluate import evaluate
from sdpctl.engine.finetune import Tuned, finetune
from sdpctl.engine.settings import FinetuneSettings
from sdpctl.engine.tree import Tree
from sdpctl.instance import FULL, Instance
from sdpctl.stages.context import Context
from sdpctl.stages.network import grid, open_network
from sdpctl.stages.opening import open_network as open_shared

IMAGES = 4096


class Measured:
    """A trained network whose statistics are varied.

    Args:
        tag: the tag of a checkpoint.
        store: the folder of its store.
        overrides: overrides of its recipe.
        batch_size: number of images of a test batch.
    """

    def __init__(self, tag: str, store: Path, overrides: Sequence[str], batch_size: int = 500) -> None:
        context = Context(path=store, report=Output(quiet=True))
        network = open_network(tag, context, overrides)
        self.recipe, self.batch_size = network.recipe, batch_size
        shared = open_shared(context.lineage(context.store.resolve(tag))[-1], self.recipe, context, images=batch_size)
        self.model, self.data, self.grid = shared.model, shared.data, grid(self.recipe)
        size = self.recipe.scored_size
        costs = Costs(self.model, (self.recipe.model.in_channels, size, size))
        self.macs = {instance: costs.of(instance).macs for instance in self.grid}
        by_cost = sorted(self.grid, key=lambda instance: self.macs[instance])
        half = min(self.grid, key=lambda instance: abs(self.macs[instance] - self.macs[FULL] / 2))
        self.chosen = list(dict.fromkeys([*by_cost[:2], half, FULL]))

    def share(self, instance: Instance) -> float:
        """Return the MACs of an instance, in per cent of those of `full`."""
        return 100 * self.macs[instance] / self.macs[FULL]

    def gathered(self, batches: int, preparation: Preparation, tuned: Tuned | None = None) -> Statistics:
        """Return the statistics of the chosen instances."""
        images = self.data.calibration(batches, preparation)
        return calibrate(self.model, self.chosen, images, self.recipe.calibration, tuned=tuned or {})

    def top1(self, statistics: Statistics, split: str = "test") -> Mapping[Instance, float]:
        """Return the accuracy of each chosen instance on the test images or the held-out ones, in per cent."""
        images = self.data.test(self.batch_size) if split == "test" else self.data.holdout(self.batch_size)
        scores = evaluate(self.model, self.chosen, images, statistics, self.recipe.evaluation)
        return {instance: score.top1 for instance, score in scores.items()}

    def tuned(self, instance: Instance, settings: FinetuneSettings) -> tuple[Tuned, float]:
        """Return the fine-tuned parameters of an instance in the tree of all, and the seconds that it took."""
        began, preparation = time.monotonic(), self.recipe.preparation
        tuned = finetune(
            Tree(self.model, self.grid),
            lambda chosen: self.data.finetuning(str(chosen), settings.steps, preparation),
            settings,
            [instance],
            precision=self.recipe.calibrate.precision,
        )
        return tuned, time.monotonic() - began


def table_of_images(measured: Measured) -> None:
    """Print the accuracy with statistics of several numbers of images, sizes of a batch, and augmentations."""
    print("images  batches of  augmented ", *(f"{instance} ({measured.share(instance):.0f} %)" for instance in measured.chosen))
    size, image_size = measured.recipe.data.batch_size, measured.recipe.preparation.image_size
    counted = [(8, size), (IMAGES // size, size), (128, size), (IMAGES // 32, 32), (IMAGES // 512, 512)]
    for augmented in (True, False):
        for batches, batch_size in counted:
            preparation = Preparation(batch_size=batch_size, image_size=image_size, augmented=augmented)
            statistics = measured.gathered(batches, preparation)
            top1 = measured.top1(statistics)
            accuracies = "  ".join(f"{top1[instance]:.2f}" for instance in measured.chosen)
            print(f"{statistics.images:6,}  {batch_size:10}  {'yes' if augmented else 'no':9}  {accuracies}", flush=True)


def table_of_finetuning(measured: Measured, rates: Sequence[float], steps: Sequence[int]) -> None:
    """Print the accuracy of each chosen instance before and after a fine-tuning."""
    preparation, batches = measured.recipe.preparation, measured.recipe.calibrate.batches
    plain = measured.gathered(batches, preparation)
    before = {split: measured.top1(plain, split) for split in ("holdout", "test")}
    print("instance  MACs  steps  images  lr  held-out before  after  test before  after  seconds")
    for instance in measured.chosen:
        for count in steps:
            for rate in rates:
                settings = FinetuneSettings(instances=(str(instance),), steps=count, lr=rate)
                tuned, seconds = measured.tuned(instance, settings)
                statistics = measured.gathered(batches, preparation, tuned)
                after = [measured.top1(statistics, split) for split in ("holdout", "test")]
                for other in measured.chosen:
                    assert other == instance or after[1][other] == before["test"][other]
                print(
                    f"{instance}  {measured.share(instance):.0f} %  {count}  {count * preparation.batch_size:,}  {rate:g}  "
                    f"{before['holdout'][instance]:.2f}  {after[0][instance]:.2f}  {before['test'][instance]:.2f}  "
                    f"{after[1][instance]:.2f}  {seconds:.0f}",
                    flush=True,
                )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tag", help="the tag of a trained network")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01])
    parser.add_argument("--steps", type=int, nargs="+", default=[300])
    arguments = parser.parse_args()
    measured = Measured(arguments.tag, arguments.store, arguments.overrides)
    table_of_images(measured)
    table_of_finetuning(measured, arguments.rates, arguments.steps)


if __name__ == "__main__":
    main()
