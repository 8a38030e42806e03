"""Accuracy and loss of many instances in one pass over the data.

Names of tensors: I instances, N images, K classes.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sdpctl.engine.calibrate import CalibratedNorms, Statistics
from sdpctl.engine.device import Batches, autocast
from sdpctl.engine.distributed import ALONE, Ranks
from sdpctl.engine.replay import Replay
from sdpctl.engine.settings import WalkSettings
from sdpctl.engine.tree import Tree
from sdpctl.errors import DataError, DivergedError
from sdpctl.instance import Instance
from sdpctl.models.chain import Chain

TOP5_MIN_CLASSES = 6
"""Minimum number of classes for top-5 accuracy; with fewer classes it is always 100 %."""


@dataclass(frozen=True)
class Score:
    """The score of one instance.

    Args:
        images: number of images, each seen once.
        top1: percentage of images whose label has the highest logit.
        top5: percentage of images whose label has one of the five highest logits; None with fewer than six classes.
        loss: mean cross-entropy, in nats.
    """

    images: int
    top1: float
    top5: float | None
    loss: float


class ClassTally:
    """Counts hits by class; `evaluate` fills it, on the device of the images."""

    def __init__(self) -> None:
        self.images_K = torch.empty(0, dtype=torch.int64)
        self.hits_KI = torch.empty(0, 0, dtype=torch.int64)

    def add(self, labels_N: Tensor, hits_IN: Tensor, classes: int) -> None:
        """Count the images of a batch, and those whose label has the highest logit of an instance."""
        if not len(self.images_K):
            self.images_K = torch.zeros(classes, dtype=torch.int64, device=labels_N.device)
            self.hits_KI = torch.zeros(classes, len(hits_IN), dtype=torch.int64, device=labels_N.device)
        self.images_K.index_add_(0, labels_N, torch.ones_like(labels_N))
        self.hits_KI.index_add_(0, labels_N, hits_IN.T.to(torch.int64))

    def add_up(self, ranks: Ranks, classes: int, instances: int) -> None:
        """Add the counts of all ranks; a rank without images has none."""
        if not ranks.several:
            return
        own = torch.zeros(classes, 1 + instances, dtype=torch.int64)
        if len(self.images_K):
            own = torch.cat([self.images_K[:, None], self.hits_KI], dim=1).cpu()
        ranks.add_up(own)
        self.images_K, self.hits_KI = own[:, 0], own[:, 1:]

    @property
    def images(self) -> list[int]:
        """The number of images of each class."""
        images: list[int] = self.images_K.tolist()
        return images

    def top1(self) -> list[list[float | None]]:
        """Return the top-1 accuracy of each class in percent by instance, in the order of `evaluate`; None without images."""
        images = self.images
        return [
            [100 * hit / count if count else None for hit, count in zip(hits, images, strict=True)]
            for hits in self.hits_KI.T.tolist()
        ]


@torch.inference_mode()
def evaluate(
    model: Chain,
    instances: Iterable[Instance],
    batches: Batches,
    statistics: Statistics,
    settings: WalkSettings = WalkSettings(),
    tally: ClassTally | None = None,
    ranks: Ranks = ALONE,
) -> dict[Instance, Score]:
    """Score many instances, each with its own BatchNorm statistics.

    Args:
        model: the chain; it is not changed.
        instances: the instances to score.
        batches: (x_NCHW, labels_N) on the model's device, with the test transform, every image once; of several ranks, each has
            images of its own, perhaps none.
        statistics: statistics that cover these instances.
        settings: how the instances are run; the loss is always computed in at least fp32.
        tally: receives the hits by class; not counted by default.
        ranks: the processes that share the images; all have the same scores afterwards.

    Raises:
        DataError: if there is no image.
        DivergedError: if the loss of an instance is not finite.
        NotFoundError: if an instance has no statistics.
    """
    tree = Tree(model, instances, memory=settings.memory)
    device = next(model.parameters()).device
    norms = CalibratedNorms(model, statistics.to(device))

    def passed(x_NCHW: Tensor) -> Tensor:
        with autocast(device, settings.precision):
            return torch.cat([torch.stack(list(tree.walk(x, norms).values())) for x in tree.parts(x_NCHW)], dim=1)

    passing = Replay(passed)
    sums = torch.zeros(len(tree.instances), 3, dtype=torch.float64, device=device)
    images = classes = 0
    for x_NCHW, labels_N in batches:
        logits_INK = passing(x_NCHW)
        logits_INK = logits_INK.to(torch.promote_types(logits_INK.dtype, torch.float32))
        classes = logits_INK.shape[-1]
        labels_IN = labels_N.expand(len(logits_INK), -1)
        hits_IN5 = logits_INK.topk(min(5, classes)).indices == labels_IN[..., None]
        losses_IN = F.cross_entropy(logits_INK.flatten(0, 1), labels_IN.flatten(), reduction="none").view_as(labels_IN)
        sums += torch.stack([hits_IN5[..., 0].sum(1), hits_IN5.sum((1, 2)), losses_IN.sum(1)], dim=1)
        if tally is not None:
            tally.add(labels_N, hits_IN5[..., 0], classes)
        images += len(x_NCHW)
    if ranks.several:
        counted = [each.tolist() for each in ranks.gathered(torch.tensor([images, classes]))]
        images, classes = sum(images for images, _ in counted), max(classes for _, classes in counted)
        sums = sums.cpu()
        ranks.add_up(sums)
        if tally is not None:
            tally.add_up(ranks, classes, len(tree.instances))
    if not images:
        raise DataError("there is no image to evaluate")
    scores = {}
    for instance, (top1, top5, loss) in zip(tree.instances, sums.cpu().tolist(), strict=True):
        score = Score(images, 100 * top1 / images, 100 * top5 / images if classes >= TOP5_MIN_CLASSES else None, loss / images)
        if not math.isfinite(loss):
            raise DivergedError(f"the loss of {instance} is {loss}: these weights cannot be used; train with a lower train.lr")
        scores[instance] = score
    return scores
