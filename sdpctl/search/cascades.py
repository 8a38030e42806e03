"""Choose cascades: members, thresholds and temperatures, from the logits of instances on held-out images.

All images are answered from stored logits, so that thousands of cascades are compared in seconds. A cascade has two or three
members, in rising order of their MACs. Of each pair of candidates every threshold is tried, and of each triple a grid of first
and second thresholds; around the best triples, every first threshold is then tried with every second one. The mean number of
MACs of the chosen cascade never exceeds the budget on these images.

Names of arrays: L later members, N images, K classes, B budgets, P places of a threshold.
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

_FIRST, _SECOND = 32, 256
"""Numbers of first and of second thresholds that are tried for every triple, before the best triples are refined."""

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
        found = []
        for first in range(len(self.instances) - 1):
            right_N, order_N, cuts_P = self._first(first)
            if not len(cuts_P):
                continue
            leave = int(cuts_P[-1])
            for last in range(first + 1, len(self.instances)):
                right_last_N, _ = self._answers((first, last), averaged=self._ways[0])
                right = int(right_N[order_N[:leave]].sum() + right_last_N[order_N[leave:]].sum())
                macs = self.images * self._macs[first] + (self.images - leave) * self._added((first, last))
                found.append(_Cut(right, macs, (first, last), (leave,), self._ways[0]))
        return self._found(min(found, key=lambda cut: (cut.macs, cut.rank))) if found else None

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

    def _first(self, member: int) -> tuple[Bools, Ints, Ints]:
        """Return which images a first member answers correctly, their order by falling confidence, and how many may leave."""
        right_N, confidence_N = self._answers((member,), averaged=False)
        order_N = np.argsort(-confidence_N, kind="stable")
        return right_N, order_N, _cuts(confidence_N[order_N], self.least_images)

    def _beginning_with(self, first: int, averaged: bool, limits_B: Ints) -> Iterator[list[_Cut | None]]:
        """Yield the best cascades with a first member: the best pairs, and the best triples with each second member."""
        right_N, order_N, cuts_P = self._first(first)
        later = range(first + 1, len(self.instances))
        members = [(first, other) for other in later]
        rights_LN = np.stack([self._answers(pair, averaged=averaged)[0] for pair in members])
        ends = _Ends(order_N, cuts_P, right_N, 0, self.images * self._macs[first])
        yield ends.best(rights_LN, [self._added(pair) for pair in members], limits_B, members, (), averaged)
        if self.members < 3:
            return
        leaves = _spread(cuts_P, _FIRST).tolist()
        for second in later[:-1]:
            yield from self._triples((first, second), later[second - first :], leaves, _SECOND, limits_B, averaged=averaged)

    def _triples(
        self, pair: tuple[int, int], thirds: Sequence[int], leaves: Sequence[int], most: int, limits_B: Ints, *, averaged: bool
    ) -> Iterator[list[_Cut | None]]:
        """Yield the best triples that begin with a pair, for each number of images that leave at the first member.

        Args:
            pair: the first two members.
            thirds: the last members.
            leaves: numbers of images that leave at the first member.
            most: maximum number of second thresholds.
            limits_B: maximum MACs of all images together.
            averaged: whether members are averaged.
        """
        right_first_N, order_N, _ = self._first(pair[0])
        right_N, confidence_N = self._answers(pair, averaged=averaged)
        second_N = np.argsort(-confidence_N, kind="stable")
        members = [(*pair, third) for third in thirds]
        rights_LN = np.stack([self._answers(triple, averaged=averaged)[0] for triple in members])
        added, added_second = [self._added(triple) for triple in members], self._added(pair)
        for leave in leaves:
            stays_N = np.ones(self.images, dtype=bool)
            stays_N[order_N[:leave]] = False
            rest = second_N[stays_N[second_N]]
            cuts_P = _spread(_cuts(confidence_N[rest], self.least_images), most)
            spent = self.images * self._macs[pair[0]] + len(rest) * added_second
            ends = _Ends(rest, cuts_P, right_N, int(right_first_N[order_N[:leave]].sum()), spent)
            yield ends.best(rights_LN, added, limits_B, members, (leave,), averaged)

    def _refined(self, cut: _Cut, limit: int) -> _Cut:
        """Return the best triple with the members of a triple, of all first thresholds near its own and all second ones."""
        if len(cut.members) < 3:
            return cut
        first, second, third = cut.members
        _, _, cuts_P = self._first(first)
        place, step = int(np.searchsorted(cuts_P, cut.leave[0])), -(-len(cuts_P) // _FIRST)
        leaves = cuts_P[max(0, place - step) : place + step + 1].tolist()
        limits_B = np.array([limit], dtype=np.int64)
        triples = self._triples((first, second), [third], leaves, self.images, limits_B, averaged=cut.averaged)
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


def _cuts(confidence_N: Floats, least: int) -> Ints:
    """Return how many images may leave, rising: those numbers at which a threshold lies between two confidences.

    Args:
        confidence_N: the falling confidences of the images.
        least: minimum number of images that leave, and that stay.
    """
    clipped_N = np.minimum(confidence_N, _CERTAIN)
    odds_N = np.log(clipped_N) - np.log1p(-clipped_N)
    cuts = np.flatnonzero(odds_N[:-1] - odds_N[1:] >= _GAP) + 1
    return cuts[(cuts >= least) & (cuts <= len(confidence_N) - least)]


def _spread(cuts: Ints, most: int) -> Ints:
    """Return at most so many cuts, at equal distances."""
    return cuts if len(cuts) <= most else cuts[np.linspace(0, len(cuts) - 1, most).round().astype(int)]


@dataclass(frozen=True, eq=False)
class _Ends:
    """The last two members of cascades: the second to last member answers an image, or passes it to the last member.

    Args:
        rest: the images that reach the second to last member, in falling order of their confidence there.
        cuts: the numbers of them that may leave, rising.
        right: whether the second to last member is right, on all images.
        answered: number of images that earlier members answered correctly.
        spent: MACs of all images before the last member.
    """

    rest: Ints
    cuts: Ints
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
        if not len(self.cuts):
            return [None] * len(limits_B)
        starts, places = np.concatenate([[0], self.cuts]), len(self.cuts)
        leaving_P = np.add.reduceat(self.right[self.rest], starts, dtype=np.int64).cumsum()[:-1]
        going_LP = np.add.reduceat(rights_LN[:, self.rest], starts, axis=1, dtype=np.int64)[:, :0:-1].cumsum(1)[:, ::-1]
        key_LP = (self.answered + leaving_P + going_LP) * places + np.arange(places)
        best_LP = np.maximum.accumulate(key_LP[:, ::-1], axis=1)[:, ::-1]  # over this cut and all later ones
        added_L = np.array(added, dtype=np.int64)
        slack_B = limits_B - self.spent
        fewest_LB = np.searchsorted(self.cuts, len(self.rest) - slack_B // np.maximum(added_L, 1)[:, None])
        within_LB = (slack_B >= 0) & (fewest_LB < places)
        found_LB = np.take_along_axis(best_LP, np.minimum(fewest_LB, places - 1), axis=1)
        right_LB = np.where(within_LB, found_LB // places, -1)
        leave_LB = self.cuts[found_LB % places]
        macs_LB = self.spent + (len(self.rest) - leave_LB) * added_L[:, None]
        most_B = right_LB.max(0)
        one_B = np.where(right_LB == most_B, macs_LB, np.iinfo(np.int64).max).argmin(0)
        places_B = np.arange(len(limits_B))
        figures = zip(one_B, most_B, macs_LB[one_B, places_B], leave_LB[one_B, places_B], strict=True)
        return [
            None if most < 0 else _Cut(int(most), int(macs), members[one], (*leave, int(last)), averaged)
            for one, most, macs, last in figures
        ]


def _better(one: _Cut | None, other: _Cut | None) -> _Cut | None:
    """Return the better of two cascades; None if there is none."""
    known = [cut for cut in (one, other) if cut is not None]
    return min(known, key=lambda cut: cut.rank, default=None)
