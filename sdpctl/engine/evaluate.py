"""Accuracy and loss of many instances, and of cascades of them, in one pass over the data.

Names of tensors: I instances, N images, K classes.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from sdpctl.bounds import TOP5_MIN_CLASSES
from sdpctl.cascade import Cascade
from sdpctl.engine.calibrate import CalibratedNorms, Statistics
from sdpctl.engine.cascade import answers
from sdpctl.engine.device import Batches, autocast
from sdpctl.engine.distributed import ALONE, Ranks
from sdpctl.engine.replay import Replay
from sdpctl.engine.settings import WalkSettings
from sdpctl.engine.tree import Tree
from sdpctl.errors import DataError, DivergedError
from sdpctl.instance import Instance
from sdpctl.models.chain import Chain


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
    """Counts hits by class; `evaluate` fills it, on the device of the images.

    Args:
        keeps: also keep the class that each instance predicts for each image.
    """

    def __init__(self, *, keeps: bool = False) -> None:
        self.keeps = keeps
        self.images_K = torch.empty(0, dtype=torch.int64)
        self.hits_KI = torch.empty(0, 0, dtype=torch.int64)
        self._labels: list[Tensor] = []
        self._predicted: list[Tensor] = []

    def add(self, labels_N: Tensor, predicted_IN: Tensor, classes: int) -> None:
        """Count the images of a batch, and those whose label an instance predicts."""
        if not len(self.images_K):
            self.images_K = torch.zeros(classes, dtype=torch.int64, device=labels_N.device)
            self.hits_KI = torch.zeros(classes, len(predicted_IN), dtype=torch.int64, device=labels_N.device)
        self.images_K.index_add_(0, labels_N, torch.ones_like(labels_N))
        self.hits_KI.index_add_(0, labels_N, (predicted_IN == labels_N).T.to(torch.int64))
        if self.keeps:
            self._labels.append(labels_N.to("cpu", torch.int32))
            self._predicted.append(predicted_IN.to("cpu", torch.int32))

    @property
    def kept(self) -> tuple[Tensor, Tensor]:
        """The labels, int32 (N,), and the predicted classes, int32 (I, N), in the order of the images."""
        return torch.cat(self._labels), torch.cat(self._predicted, dim=1)

    def _gather(self, ranks: Ranks, instances: int) -> None:
        """Gather the predictions of all ranks; of n ranks, rank r has the images r, r + n and so on."""
        own = torch.empty(1 + instances, 0, dtype=torch.int32)
        if self._labels:
            labels_N, predicted_IN = self.kept
            own = torch.cat([labels_N[None], predicted_IN])
        images = [int(each) for each in ranks.gathered(torch.tensor(own.shape[1]))]
        theirs = ranks.gathered(F.pad(own, (0, max(images) - own.shape[1])))  # all ranks send one shape
        everything = torch.empty(1 + instances, sum(images), dtype=torch.int32)
        for rank, (count, part) in enumerate(zip(images, theirs, strict=True)):
            everything[:, rank :: ranks.size] = part[:, :count]
        self._labels, self._predicted = [everything[0]], [everything[1:]]

    def add_up(self, ranks: Ranks, classes: int, instances: int) -> None:
        """Add the counts of all ranks; a rank without images has none."""
        if not ranks.several:
            return
        if self.keeps:
            self._gather(ranks, instances)
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


@dataclass(frozen=True)
class CascadeScore(Score):
    """The score of a cascade.

    Args:
        left: for each member, the number of images that it answered.
    """

    left: tuple[int, ...]

    def macs(self, member_macs: Sequence[int]) -> int:
        """Return the MACs of all images together, given the MACs that each member adds for an image that reaches it."""
        return sum(count * spent for count, spent in zip(self.left, accumulate(member_macs), strict=True))

    @property
    def shares(self) -> list[float]:
        """For each member, the share of images that it answered, in percent."""
        return [100 * count / self.images for count in self.left]


class CascadeTally:
    """Scores cascades by the logits of their members; `evaluate` fills it.

    Args:
        cascades: the cascades; duplicates count once.
    """

    def __init__(self, cascades: Iterable[Cascade]) -> None:
        self.cascades = tuple(dict.fromkeys(cascades))
        self.scores: dict[Cascade, CascadeScore] = {}
        """The score of each cascade, once all images are counted."""
        self._sums = [torch.zeros(3 + len(cascade.members), dtype=torch.float64) for cascade in self.cascades]
        """Of each cascade: hits, hits among the five likeliest classes, losses, and the images that each member answered."""

    def add(self, logits: Mapping[Instance, Tensor], labels_N: Tensor) -> None:
        """Count the images of a batch, given the logits (N, K) of all members."""
        for cascade, sums in zip(self.cascades, self._sums, strict=True):
            log_p_NK, left_N = answers(cascade, [logits[member] for member in cascade.members])
            _, sums_13 = _counted(log_p_NK[None], labels_N)
            left = torch.bincount(left_N, minlength=len(cascade.members))
            sums += torch.cat([sums_13[0].double(), left.double()]).cpu()

    def finish(self, ranks: Ranks, images: int, classes: int) -> None:
        """Add the counts of all ranks, and compute the scores."""
        for cascade, sums in zip(self.cascades, self._sums, strict=True):
            ranks.add_up(sums)
            hits, hits5, loss, *left = sums.tolist()
            top5 = 100 * hits5 / images if classes >= TOP5_MIN_CLASSES else None
            self.scores[cascade] = CascadeScore(images, 100 * hits / images, top5, loss / images, tuple(map(int, left)))


def _counted(logits_INK: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the classes with the highest logits, (I, N), and sums (I, 3) of hits, of hits among five, and of losses."""
    labels_IN = labels_N.expand(len(logits_INK), -1)
    likeliest_IN5 = logits_INK.topk(min(5, logits_INK.shape[-1])).indices
    hits_IN5 = likeliest_IN5 == labels_IN[..., None]
    losses_IN = F.cross_entropy(logits_INK.flatten(0, 1), labels_IN.flatten(), reduction="none").view_as(labels_IN)
    return likeliest_IN5[..., 0], torch.stack([hits_IN5[..., 0].sum(1), hits_IN5.sum((1, 2)), losses_IN.sum(1)], dim=1)


def _passes(
    model: Chain, tree: Tree, batches: Batches, statistics: Statistics, settings: WalkSettings
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits of all instances of a tree, (I, N, K) in at least fp32, and the labels of each batch."""
    device = next(model.parameters()).device
    norms = CalibratedNorms(model, statistics.to(device))

    def passed(x_NCHW: Tensor) -> Tensor:
        with autocast(device, settings.precision):
            return torch.cat([torch.stack(list(tree.walk(x, norms).values())) for x in tree.parts(x_NCHW)], dim=1)

    passing = Replay(passed)
    for x_NCHW, labels_N in batches:
        logits_INK = passing(x_NCHW)
        yield logits_INK.to(torch.promote_types(logits_INK.dtype, torch.float32)), labels_N


@torch.inference_mode()
def gather_logits(
    model: Chain,
    instances: Iterable[Instance],
    batches: Batches,
    statistics: Statistics,
    settings: WalkSettings = WalkSettings(),
    ranks: Ranks = ALONE,
) -> tuple[Tensor, Tensor]:
    """Return the logits of many instances on all images, and the labels, on the CPU and in the order of the images.

    Args:
        model: the chain; it is not changed.
        instances: the instances; duplicates count once.
        batches: (x_NCHW, labels_N) on the model's device; of n ranks, rank r has the images r, r + n and so on.
        statistics: statistics that cover these instances.
        settings: how the instances are run.
        ranks: the processes that share the images; all have the same logits afterwards.

    Returns:
        Logits in fp32, (I, N, K), and labels, int64 (N,).

    Raises:
        DataError: if there is no image.
        NotFoundError: if an instance has no statistics.
    """
    tree = Tree(model, instances, memory=settings.memory)
    count_of_instances = len(tree.instances)
    logits, labels = [], []
    for logits_INK, labels_N in _passes(model, tree, batches, statistics, settings):
        logits.append(logits_INK.float().cpu())
        labels.append(labels_N.cpu())
    own = [sum(map(len, labels)), logits[0].shape[-1] if logits else 0]
    counted = [each.tolist() for each in ranks.gathered(torch.tensor(own))]
    images, classes = [count for count, _ in counted], max(classes for _, classes in counted)
    if not sum(images):
        raise DataError("there is no image to evaluate")
    own_INK = torch.cat(logits, dim=1) if logits else torch.empty(count_of_instances, 0, classes)
    own_N = torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64)
    if not ranks.several:
        return own_INK, own_N
    missing = max(images) - own[0]  # all ranks send one shape
    all_INK = torch.empty(count_of_instances, sum(images), classes)
    all_N = torch.empty(sum(images), dtype=torch.int64)
    theirs = ranks.gathered(F.pad(own_INK, (0, 0, 0, missing))), ranks.gathered(F.pad(own_N, (0, missing)))
    for rank, (count, logits_INK, labels_N) in enumerate(zip(images, *theirs, strict=True)):
        all_INK[:, rank :: ranks.size], all_N[rank :: ranks.size] = logits_INK[:, :count], labels_N[:count]
    return all_INK, all_N


@torch.inference_mode()
def evaluate(
    model: Chain,
    instances: Iterable[Instance],
    batches: Batches,
    statistics: Statistics,
    settings: WalkSettings = WalkSettings(),
    tally: ClassTally | None = None,
    ranks: Ranks = ALONE,
    cascades: CascadeTally | None = None,
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
        cascades: scores cascades whose members are among the instances.

    Raises:
        DataError: if there is no image.
        DivergedError: if the loss of an instance is not finite.
        NotFoundError: if an instance has no statistics.
    """
    tree = Tree(model, instances, memory=settings.memory)
    sums = torch.zeros(len(tree.instances), 3, dtype=torch.float64, device=next(model.parameters()).device)
    images = classes = 0
    for logits_INK, labels_N in _passes(model, tree, batches, statistics, settings):
        predicted_IN, sums_I3 = _counted(logits_INK, labels_N)
        sums += sums_I3
        classes = logits_INK.shape[-1]
        if tally is not None:
            tally.add(labels_N, predicted_IN, classes)
        if cascades is not None:
            cascades.add(dict(zip(tree.instances, logits_INK, strict=True)), labels_N)
        images += len(labels_N)
    if ranks.several:
        counted = [each.tolist() for each in ranks.gathered(torch.tensor([images, classes]))]
        images, classes = sum(images for images, _ in counted), max(classes for _, classes in counted)
        sums = sums.cpu()
        ranks.add_up(sums)
        if tally is not None:
            tally.add_up(ranks, classes, len(tree.instances))
    if not images:
        raise DataError("there is no image to evaluate")
    if cascades is not None:
        cascades.finish(ranks, images, classes)
    scores = {}
    for instance, (top1, top5, loss) in zip(tree.instances, sums.cpu().tolist(), strict=True):
        score = Score(images, 100 * top1 / images, 100 * top5 / images if classes >= TOP5_MIN_CLASSES else None, loss / images)
        if not math.isfinite(loss):
            raise DivergedError(f"the loss of {instance} is {loss}: these weights cannot be used; train with a lower train.lr")
        scores[instance] = score
    return scores
