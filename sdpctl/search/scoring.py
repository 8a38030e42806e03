"""Scoring on held-out images: the networks of a batch are calibrated and evaluated together, in one pass of the tree."""

import math
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from sdpctl.engine.calibrate import calibrate
from sdpctl.engine.device import Batches
from sdpctl.engine.distributed import ALONE, Ranks
from sdpctl.engine.evaluate import Score, evaluate
from sdpctl.engine.settings import WalkSettings
from sdpctl.errors import UsageError, shown
from sdpctl.instance import FULL, Instance
from sdpctl.models.chain import Chain
from sdpctl.search.catalog import REWARDS
from sdpctl.search.rewards import Facts
from sdpctl.search.space import Space


def make_reward(name: str, weight: float, space: Space) -> Callable[[Instance, Score], float]:
    """Return the function that gives the reward of a network and its score.

    The function raises a `UsageError` if the reward of a network is not a finite number.

    Args:
        name: name of the reward, or an expression.
        weight: weight of `branch`, in percentage points per GMAC.
        space: gives the MACs of a network.

    Raises:
        UsageError: if there is no such reward, or if it needs more classes than the network has.
    """
    info = REWARDS.find(name)
    (classes,) = space.costs.of(FULL).segments[-1].out_shape
    if (refused := info.refused(classes)) is not None:
        raise UsageError(f"search.reward={shown(name)}: {refused}")
    function = info.function

    def reward(instance: Instance, score: Score) -> float:
        macs, top5 = space.cost(instance), math.nan if score.top5 is None else score.top5
        facts = Facts(score.top1, top5, score.loss, macs, macs / 1e9, macs / space.full)
        try:
            value = function(facts, weight)
            problem = None if math.isfinite(value) else f"it is {value}"
        except (ArithmeticError, ValueError) as error:
            problem = str(error)
        if problem is not None:
            known = ", ".join(f"{key} is {fact:g}" for key, fact in facts._asdict().items() if key in info.uses)
            raise UsageError(
                f"search.reward={shown(name)}: the reward of {instance} is not a finite number, where {known} ({problem}); "
                "choose a different reward"
            )
        return value

    return reward


def pooled(first: Score, second: Score) -> Score:
    """Return the score on the images of both scores together."""
    images = first.images + second.images

    def mean(a: float, b: float) -> float:
        return (a * first.images + b * second.images) / images

    top5 = None if first.top5 is None or second.top5 is None else mean(first.top5, second.top5)
    return Score(images, mean(first.top1, second.top1), top5, mean(first.loss, second.loss))


class Scorer:
    """Scores networks; each network is scored once.

    Args:
        model: the chain; it is not changed.
        calibration: batches for the BatchNorm statistics of each network, augmented as in training; they are not read for a
            chain without batch norms.
        images: held-out images on which every network is scored.
        more: returns other held-out images, for the best few networks.
        settings: how networks are run, to calibrate and to score them.
        tick: called after each batch.
        ranks: the processes that score together; each has batches of its own.
        announce: called before each pass with the networks to score, and whether the other images are used.
    """

    def __init__(
        self,
        model: Chain,
        calibration: Batches,
        images: Batches,
        more: Callable[[], Batches],
        settings: WalkSettings = WalkSettings(),
        *,
        tick: Callable[[], None],
        ranks: Ranks = ALONE,
        announce: Callable[[Sequence[Instance], bool], None] = lambda *_: None,
    ) -> None:
        self.model, self.settings, self.tick = model, settings, tick
        self.ranks, self.announce = ranks, announce
        # These are decoded once for the whole search; the other images are used a few times at most.
        self.calibration = list(calibration) if model.batch_norms else []
        self.images, self.more_images = list(images), more
        self.known: dict[Instance, Score] = {}
        """Scores on the first images, including scores from other processes."""
        self.known_more: dict[Instance, Score] = {}
        """Scores on the other images."""

    def score(self, instances: Sequence[Instance]) -> dict[Instance, Score]:
        """Score networks on the first images; unknown networks are scored in one pass."""
        return self._score(instances, self.known, lambda: self.images, more=False)

    def score_more(self, instances: Sequence[Instance]) -> dict[Instance, Score]:
        """Score networks on the other images."""
        return self._score(instances, self.known_more, self.more_images, more=True)

    def score_on_all(self, instances: Sequence[Instance]) -> dict[Instance, Score]:
        """Score networks on the first and the other images together."""
        first, more = self.score(instances), self.score_more(instances)
        return {instance: pooled(first[instance], more[instance]) for instance in instances}

    def _score(
        self, instances: Sequence[Instance], known: dict[Instance, Score], images: Callable[[], Batches], *, more: bool
    ) -> dict[Instance, Score]:
        fresh = [instance for instance in instances if instance not in known]
        if fresh:
            self.announce(fresh, more)
            calibration, scored = self._ticking(self.calibration), self._ticking(images())
            statistics = calibrate(self.model, fresh, calibration, self.settings, self.ranks)
            known |= evaluate(self.model, fresh, scored, statistics, self.settings, ranks=self.ranks)
        return {instance: known[instance] for instance in instances}

    def _ticking(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            yield batch
            self.tick()
