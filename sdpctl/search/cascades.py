"""Choose cascades: members, thresholds and temperatures, from the logits of instances on held-out images.

All images are answered from stored logits, so that thousands of cascades are compared in seconds. A cascade has two or three
members, in rising order of their MACs. Of each pair of candidates every threshold is tried. Of each triple the first threshold
is tried on a grid, and the second one exactly; around the best triples, every first threshold is then tried. The mean number of
MACs of the chosen cascade never exceeds the budget on these images.

Names of arrays: C candidates, L later members, N images, K classes, B budgets.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from sdpctl.cascade import Cascade
from sdpctl.instance import FULL, Instance

MOST_CANDIDATES = 24
"""Maximum number of candidates; further instances are left out, see `candidates`."""

_TRIPLE_WORK = 2e9
"""Maximum number of probabilities that are added up to average three members; it limits the number of candidates."""

_GRID = 32
"""Number of first thresholds that are tried for every triple."""

_LEAST_SHARE = 0.01
"""Minimum share of the images that each member answers: a member for a handful of images fits the noise of these images."""

_TEMPERATURES = (0.05, 20.0)

_CERTAIN = 1 - 1e-9
"""Confidences above are taken as equal: the digits in which they differ are rounding noise."""

_GAP = 2e-5
"""Minimum difference of the log-odds of two confidences for a threshold between them; logits in fp32 are less exact."""

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Found:
    """An instance or a cascade with its results on the held-out images.

    Args:
        choice: the instance or cascade.
        right: number of images that it answers correctly.
        macs: MACs of all images together.
        images: number of images.
    """

    choice: Instance | Cascade
    right: int
    macs: int
    images: int

    @property
    def mean_macs(self) -> float:
        """Mean MACs per image."""
        return self.macs / self.images


@dataclass(frozen=True, eq=False)
class Logits:
    """Instances and their logits on held-out images.

    Args:
        instances: the instances; `full` is among them.
        macs: MACs per image of each instance.
        shared: for each two instances the MACs of the prefix that they share.
        logits: logits of each instance, each (N, K).
        labels: the labels.
    """

    instances: Sequence[Instance]
    macs: Sequence[int]
    shared: Sequence[Sequence[int]]
    logits: Sequence[NDArray[np.float32]]
    labels: Ints

    @cached_property
    def right(self) -> list[int]:
        """For each instance the number of images whose label has the highest logit."""
        return [int((logits_NK.argmax(1) == self.labels).sum()) for logits_NK in self.logits]

    def found(self, instance: Instance) -> Found:
        """Return the results of a single instance."""
        number = self.instances.index(instance)
        return Found(instance, self.right[number], self.macs[number] * len(self.labels), len(self.labels))

    def best_single(self, budget: int) -> Found | None:
        """Return the most accurate instance within a budget, of several the cheapest; None if no instance is within.

        Args:
            budget: maximum MACs per image.
        """
        within = [self.found(instance) for instance, macs in zip(self.instances, self.macs, strict=True) if macs <= budget]
        return min(within, key=lambda found: (-found.right, found.macs), default=None)


@dataclass(frozen=True)
class _Cut:
    """A cascade by the numbers of its members among the candidates, and of the images that leave at each but the last."""

    right: int
    macs: int
    members: tuple[int, ...]
    leave: tuple[int, ...]
    averaged: bool

    @property
    def rank(self) -> tuple[int, int, int, bool]:
        """The best first: the most accurate, of these the cheapest, the one with the fewest members, one without averages."""
        return -self.right, self.macs, len(self.members), self.averaged


def temperature(logits_NK: NDArray[np.float32], labels: Ints) -> float:
    """Return the temperature with the least mean cross-entropy (Guo et al. 2017), rounded to three significant digits."""
    rows = np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        log_p_NK = log_softmax(logits_NK.astype(np.float64) / np.exp(log_temperature), axis=1)
        return -float(log_p_NK[rows, labels].mean())

    low, high = np.log(_TEMPERATURES)
    best = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-3})
    return float(f"{np.exp(best.x):.3g}")


def threshold(above: float, below: float) -> float:
    """Return the shortest decimal in the middle half of the gap between two confidences."""
    quarter = (above - below) / 4
    found = (round((above + below) / 2, digits) for digits in range(1, 17))
    return next(decimal for decimal in found if below + quarter <= decimal <= above - quarter)


def candidates(known: Logits, most: int) -> list[int]:
    """Return the numbers of the instances that may be members, in rising order of their MACs, `full` among them.

    If there are more than `most`, those stay that are the least below the Pareto front of MACs and accuracy; of more
    instances on the front, evenly many of all costs stay.
    """
    order = sorted(range(len(known.instances)), key=lambda i: (known.macs[i], -known.right[i]))
    full = known.instances.index(FULL)
    ceiling, below = -1, {}
    for i in order:
        ceiling = max(ceiling, known.right[i])
        below[i] = ceiling - known.right[i]
    nearest = sorted((i for i in order if i != full), key=lambda i: below[i])[: most - 1]
    front = [i for i in order if i != full and below[i] == 0]
    if len(front) > most - 1:
        nearest = [front[round(k)] for k in np.linspace(0, len(front) - 1, most - 1)]
    return [i for i in order if i == full or i in nearest]


class Cascades:
    """The cascades of some instances.

    Args:
        known: the instances and their logits.
        members: maximum number of members, 2 or 3.
        averaged: whether members are averaged; None chooses what is more accurate.
    """

    def __init__(self, known: Logits, *, members: int = 3, averaged: bool | None = None) -> None:
        images, classes = known.logits[0].shape
        work = int((6 * _TRIPLE_WORK / (images * classes)) ** (1 / 3)) if members > 2 else MOST_CANDIDATES
        chosen = candidates(known, max(4, min(MOST_CANDIDATES, work)))
        self.images, self.members = images, members
        self.least_images = max(1, round(_LEAST_SHARE * images))
        """Minimum number of images that each member answers."""
        self.instances = [known.instances[i] for i in chosen]
        """The candidates, in rising order of their MACs."""
        self._macs = [known.macs[i] for i in chosen]
        self._shared = [[known.shared[i][j] for j in chosen] for i in chosen]
        self._labels = known.labels
        self._temperatures = [temperature(known.logits[i], known.labels) for i in chosen]
        self._p_NK = [
            np.exp(log_softmax(known.logits[i].astype(np.float64) / t, axis=1))
            for i, t in zip(chosen, self._temperatures, strict=True)
        ]
        self._ways = (False, True) if averaged is None else (averaged,)

    def within(self, budgets: Sequence[int]) -> list[Found | None]:
        """Return the most accurate cascade within each budget; None if no cascade is within.

        Args:
            budgets: maximum mean MACs per image.
        """
        best: list[_Cut | None] = [None] * len(budgets)
        limits_B = np.array(budgets, dtype=np.int64) * self.images
        for averaged in self._ways:
            for first in range(len(self.instances) - 1):
                for found in self._beginning_with(first, averaged, limits_B):
                    best = [_better(one, other) for one, other in zip(best, found, strict=True)]
        refined = [cut if cut is None else self._refined(cut, limit) for cut, limit in zip(best, limits_B, strict=True)]
        return [None if cut is None else self._found(cut) for cut in refined]

    def least(self) -> Found | None:
        """Return the cascade with the fewest mean MACs, in which almost all images leave at the first member.

        None if there is no cascade, since the confidences of each candidate are equal, or since there is a single candidate.
        """
        cuts = []
        for first in range(len(self.instances) - 1):
            right_N, order_N, allowed = self._first(first)
            if not allowed.any():
                continue
            leave = int(np.flatnonzero(allowed)[-1])
            for last in range(first + 1, len(self.instances)):
                right_last_N, _ = self._answers((first, last), averaged=self._ways[0])
                right = int(right_N[order_N[:leave]].sum() + right_last_N[order_N[leave:]].sum())
                macs = self.images * self._macs[first] + (self.images - leave) * self._added((first, last))
                cuts.append(_Cut(right, macs, (first, last), (leave,), self._ways[0]))
        return self._found(min(cuts, key=lambda cut: (cut.macs, cut.rank))) if cuts else None

    def _added(self, members: tuple[int, ...]) -> int:
        """Return the MACs that the last member adds to those of the members before it."""
        *earlier, last = members
        return self._macs[last] - max((self._shared[last][other] for other in earlier), default=0)

    def _answers(self, members: tuple[int, ...], *, averaged: bool) -> tuple[Bools, Floats]:
        """Return whether the answer of the last member is right, and its confidence, on all images."""
        p_NK = self._p_NK[members[-1]]
        if averaged and len(members) > 1:
            p_NK = sum((self._p_NK[member] for member in members[1:]), self._p_NK[members[0]]) / len(members)
        return p_NK.argmax(1) == self._labels, p_NK.max(1)

    def _first(self, member: int) -> tuple[Bools, Ints, Bools]:
        """Return which images a first member answers correctly, their order by falling confidence, and the allowed cuts."""
        right_N, confidence_N = self._answers((member,), averaged=False)
        order_N = np.argsort(-confidence_N, kind="stable")
        return right_N, order_N, _cuts(confidence_N[order_N], self.least_images)

    def _beginning_with(self, first: int, averaged: bool, limits_B: Ints) -> Iterator[list[_Cut | None]]:
        """Yield the best cascades with a first member: the best pairs, and the best triples with each second member."""
        right_N, order_N, allowed = self._first(first)
        later = range(first + 1, len(self.instances))
        answers = [self._answers((first, other), averaged=averaged) for other in later]
        spent = self.images * self._macs[first]
        ends = _Ends(order_N, allowed, right_N, 0, spent)
        rights_LN = np.stack([right for right, _ in answers])
        added = [self._added((first, other)) for other in later]
        yield ends.best(rights_LN, added, limits_B, [(first, other) for other in later], (), averaged)
        allowed_cuts = np.flatnonzero(allowed)
        if self.members < 3 or not len(allowed_cuts):
            return
        grid = dict.fromkeys(allowed_cuts[np.linspace(0, len(allowed_cuts) - 1, _GRID).round().astype(int)].tolist())
        for second, (right_second_N, confidence_second_N) in zip(later, answers, strict=True):
            thirds = range(second + 1, len(self.instances))
            if not thirds:
                continue
            rights_LN = np.stack([self._answers((first, second, third), averaged=averaged)[0] for third in thirds])
            yield from self._triples(
                (first, second),
                list(thirds),
                list(grid),
                right_N,
                order_N,
                right_second_N,
                confidence_second_N,
                rights_LN,
                averaged,
                limits_B,
            )

    def _triples(
        self,
        pair: tuple[int, int],
        thirds: list[int],
        leaves: list[int],
        right_N: Bools,
        order_N: Ints,
        right_second_N: Bools,
        confidence_second_N: Floats,
        rights_LN: Bools,
        averaged: bool,
        limits_B: Ints,
    ) -> Iterator[list[_Cut | None]]:
        """Yield the best triples that begin with a pair, for each number of images that leave at the first member."""
        second_N = np.argsort(-confidence_second_N, kind="stable")
        added_second = self._added(pair)
        added = [self._added((*pair, third)) for third in thirds]
        for leave in leaves:
            stays = np.ones(self.images, dtype=bool)
            stays[order_N[:leave]] = False
            rest = second_N[stays[second_N]]
            allowed = _cuts(confidence_second_N[rest], self.least_images)
            spent = self.images * self._macs[pair[0]] + len(rest) * added_second
            ends = _Ends(rest, allowed, right_second_N, int(right_N[order_N[:leave]].sum()), spent)
            yield ends.best(rights_LN, added, limits_B, [(*pair, third) for third in thirds], (leave,), averaged)

    def _refined(self, cut: _Cut, limit: int) -> _Cut:
        """Return the best triple with the members of a triple, of all first thresholds near its own."""
        if len(cut.members) < 3:
            return cut
        first, second, third = cut.members
        right_N, order_N, allowed = self._first(first)
        cuts = np.flatnonzero(allowed)
        place, step = int(np.searchsorted(cuts, cut.leave[0])), -(-len(cuts) // _GRID)
        leaves = cuts[max(0, place - step) : place + step + 1].tolist()
        right_second_N, confidence_second_N = self._answers((first, second), averaged=cut.averaged)
        rights_LN = self._answers(cut.members, averaged=cut.averaged)[0][None]
        limits_B = np.array([limit], dtype=np.int64)
        triples = self._triples(
            (first, second),
            [third],
            leaves,
            right_N,
            order_N,
            right_second_N,
            confidence_second_N,
            rights_LN,
            cut.averaged,
            limits_B,
        )
        best: _Cut | None = cut
        for (found,) in triples:
            best = _better(best, found)
        assert best is not None
        return best

    def _found(self, cut: _Cut) -> Found:
        """Return the cascade of a cut."""
        remaining, thresholds = np.arange(self.images), []
        for number, leave in enumerate(cut.leave):
            _, confidence_N = self._answers(cut.members[: number + 1], averaged=cut.averaged)
            sorted_N = np.sort(confidence_N[remaining])[::-1]
            thresholds.append(threshold(float(sorted_N[leave - 1]), float(sorted_N[leave])))
            remaining = remaining[confidence_N[remaining] < thresholds[-1]]
        members = tuple(self.instances[member] for member in cut.members)
        temperatures = tuple(self._temperatures[member] for member in cut.members)
        cascade = Cascade(members, tuple(thresholds), temperatures, cut.averaged)
        return Found(cascade, cut.right, cut.macs, self.images)


def _cuts(confidence_N: Floats, least: int) -> Bools:
    """Return after how many images a threshold may lie, bool (N + 1), given their falling confidences.

    Args:
        confidence_N: the confidences.
        least: minimum number of images on each side of a threshold.
    """
    clipped_N = np.minimum(confidence_N, _CERTAIN)
    odds_N = np.log(clipped_N) - np.log1p(-clipped_N)
    allowed = np.zeros(len(confidence_N) + 1, dtype=bool)
    allowed[1:-1] = odds_N[:-1] - odds_N[1:] >= _GAP
    allowed[:least] = allowed[len(allowed) - least :] = False
    return allowed


@dataclass(frozen=True, eq=False)
class _Ends:
    """The last two members of cascades: an image leaves at the last but one, or is answered by the last.

    Args:
        rest: the images that reach the last but one member, in falling order of their confidence there.
        allowed: after how many of them a threshold may lie.
        right_N: whether the last but one member is right, on all images.
        answered: number of images that earlier members answered correctly.
        spent: MACs of all images before the last member.
    """

    rest: Ints
    allowed: Bools
    right: Bools
    answered: int
    spent: int

    def best(
        self,
        rights_LN: Bools,
        added: Sequence[int],
        limits_B: Ints,
        members: Sequence[tuple[int, ...]],
        leave: tuple[int, ...],
        averaged: bool,
    ) -> list[_Cut | None]:
        """Return the best cascade within each budget, over all last members and all last thresholds.

        Args:
            rights_LN: whether each last member is right.
            added: MACs that each last member adds for an image.
            limits_B: maximum MACs of all images together.
            members: all members of each cascade.
            leave: numbers of images that leave at earlier members.
            averaged: whether members are averaged.
        """
        count = len(self.rest)
        unit = np.int32 if (len(self.right) + 1) ** 2 < 2**31 else np.int64
        leaving = self.answered + self.right[self.rest].cumsum(dtype=unit)
        going_LN = rights_LN[:, self.rest].cumsum(1, dtype=unit)
        right_LN = leaving + going_LN[:, -1:] - going_LN  # once the first 1, 2, ..., N images leave
        key_LN = np.where(self.allowed[1:], right_LN * unit(count) + np.arange(count, dtype=unit), unit(-1))
        best_LN = np.maximum.accumulate(key_LN[:, ::-1], axis=1)[:, ::-1]  # over this and all larger numbers that leave
        added_L = np.array(added, dtype=np.int64)
        slack_B = limits_B - self.spent
        fewest_LB = np.clip(count - slack_B // np.maximum(added_L, 1)[:, None], 1, count)
        found_LB = np.where(slack_B >= 0, np.take_along_axis(best_LN, fewest_LB - 1, axis=1), -1).astype(np.int64)
        right_LB, leave_LB = found_LB // count, found_LB % count + 1
        macs_LB = self.spent + (count - leave_LB) * added_L[:, None]
        cuts: list[_Cut | None] = []
        for budget in range(len(limits_B)):
            most = right_LB[:, budget].max()
            if most < 0:
                cuts.append(None)
                continue
            equal = np.flatnonzero(right_LB[:, budget] == most)
            one = int(equal[macs_LB[equal, budget].argmin()])
            last = int(leave_LB[one, budget])
            cuts.append(_Cut(int(most), int(macs_LB[one, budget]), members[one], (*leave, last), averaged))
        return cuts


def _better(one: _Cut | None, other: _Cut | None) -> _Cut | None:
    """Return the better of two cascades; None if there is none."""
    known = [cut for cut in (one, other) if cut is not None]
    return min(known, key=lambda cut: cut.rank, default=None)
