"""The choice of cascades against every cascade: each subset of members, and each way to split the images by confidence."""

import itertools
import math
import random

import numpy as np
import pytest
from scipy.special import softmax

from sdpctl.cascade import Cascade
from sdpctl.instance import FULL, Instance
from sdpctl.search import cascades as module
from sdpctl.search.cascades import Cascades, Logits, candidates, temperature, threshold

CLASSES = 4


def drawn(seed, *, count=4, images=14):
    """Draw instances that share prefixes like those of a chain, and logits that are right the more often the costlier."""
    draw = np.random.default_rng(seed)
    instances = [Instance(((f"layer1.{i}", 0.5),)) for i in range(count - 1)] + [FULL]
    segments = draw.integers(1, 9, count)  # the trunk, segment by segment
    trunk = segments.cumsum()
    rest = [int(draw.integers(1, 5)) for _ in instances]  # what each instance has of its own
    macs = [int(trunk[i] + rest[i]) for i in range(count)]
    shared = [[macs[i] if i == j else int(trunk[min(i, j)]) for j in range(count)] for i in range(count)]
    labels_N = draw.integers(0, CLASSES, images)
    logits = []
    for i in range(count):
        logits_NK = draw.normal(size=(images, CLASSES))
        logits_NK[np.arange(images), labels_N] += 0.5 + 0.5 * i
        logits.append((2 * logits_NK).astype(np.float32))
    return Logits(instances, macs, shared, logits, labels_N)


def played(known, cascade):
    """Run a cascade image by image; return the number of right answers, all MACs, and the number that left at each member."""
    numbers = [known.instances.index(member) for member in cascade.members]
    right = macs = 0
    left = [0] * len(numbers)
    for n, label in enumerate(known.labels):
        seen = []
        for m, i in enumerate(numbers):
            macs += known.macs[i] - max((known.shared[i][j] for j in numbers[:m]), default=0)
            seen.append(softmax(known.logits[i][n].astype(np.float64) / cascade.temperatures[m]))
            answer = np.mean(seen, axis=0) if cascade.averaged else seen[-1]
            if m == len(cascade.thresholds) or answer.max() >= cascade.thresholds[m]:
                right += int(answer.argmax() == label)
                left[m] += 1
                break
    return right, macs, left


def every_cascade(known, temperatures, members, averaged):
    """Yield every cascade of members in rising order of cost, with every threshold that makes a difference."""
    by_cost = sorted(range(len(known.instances)), key=lambda i: known.macs[i])
    for count in range(2, members + 1):
        for chosen in itertools.combinations(by_cost, count):
            at = [softmax(known.logits[i].astype(np.float64) / temperatures[i], axis=1) for i in chosen]
            answers = [np.mean(at[: m + 1], axis=0) if averaged else at[m] for m in range(count)]
            steps = []
            for answer in answers[:-1]:
                confidences = sorted(set(answer.max(1)))
                steps.append([(one + other) / 2 for one, other in itertools.pairwise(confidences)])
            for thresholds in itertools.product(*steps):
                names = tuple(known.instances[i] for i in chosen)
                yield Cascade(names, tuple(thresholds), tuple(temperatures[i] for i in chosen), averaged)


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("members", [2, 3])
def test_no_cascade_is_better_within_any_budget(members, averaged):
    seen = set()
    for seed in range(6):
        known = drawn(seed)
        images = len(known.labels)
        temperatures = [temperature(logits_NK, known.labels) for logits_NK in known.logits]
        every = [played(known, cascade) for cascade in every_cascade(known, temperatures, members, averaged)]
        costs = sorted({macs for _, macs, _ in every})
        budgets = [math.ceil(cost / images) for cost in costs[:: len(costs) // 12]] + [min(known.macs), 10**6]
        found = Cascades(known, members=members, averaged=averaged).within(budgets)
        for budget, one in zip(budgets, found, strict=True):
            within = [(right, -macs) for right, macs, left in every if macs <= budget * images and all(left)]
            if one is None:
                assert not within
                continue
            right, macs, _ = played(known, one.choice)
            assert (right, macs, images) == (one.right, one.macs, one.images)
            assert macs <= budget * images
            assert (right, -macs) == max(within)
            assert one.choice.averaged == averaged
            seen.add(len(one.choice.members))
        assert found[-2] is None
    assert seen == set(range(2, members + 1))


def test_averages_are_taken_only_where_they_are_more_accurate():
    better = 0
    for seed in range(8):
        known = drawn(seed, images=40)
        budgets = [(min(known.macs) + max(known.macs)) // 2, max(known.macs), 2 * max(known.macs)]
        either, plain, mean = (Cascades(known, averaged=way).within(budgets) for way in (None, False, True))
        for one, two, three in zip(either, plain, mean, strict=True):
            assert (one.right, -one.macs) == max((two.right, -two.macs), (three.right, -three.macs))
            assert one.choice.averaged == (one.choice == three.choice)
            better += one.choice.averaged
    assert 0 < better < 24


def test_a_grid_of_thresholds_loses_little(monkeypatch):
    """With more images than thresholds on the grid, the refined triple is as good as the exact one, or nearly."""
    known, budgets = realistic(0, 1500), [45, 60, 75]
    found = Cascades(known, averaged=False).within(budgets)
    monkeypatch.setattr(module, "_FIRST", 10**6)
    monkeypatch.setattr(module, "_SECOND", 10**6)
    exact = Cascades(known, averaged=False).within(budgets)
    for one, best in zip(found, exact, strict=True):
        assert best.right - 1 <= one.right <= best.right
    assert any(len(best.choice.members) == 3 for best in exact)


def test_the_cheapest_cascade():
    for seed in range(6):
        known = drawn(seed)
        temperatures = [temperature(logits_NK, known.labels) for logits_NK in known.logits]
        every = [played(known, cascade) for cascade in every_cascade(known, temperatures, 2, False)]
        least = Cascades(known, averaged=False).least()
        assert least.macs == min(macs for _, macs, left in every if all(left))
        assert played(known, least.choice)[:2] == (least.right, least.macs)


def test_images_with_equal_confidence_go_together():
    known = drawn(1, images=30)
    for logits_NK in known.logits:
        logits_NK[10:20] = logits_NK[10]
    cascades = Cascades(known).within(range(min(known.macs), 2 * max(known.macs)))
    chosen = [one.choice for one in cascades if one is not None]
    assert chosen
    for one in filter(None, cascades):
        right, macs, _ = played(known, one.choice)
        assert (right, macs) == (one.right, one.macs)


def test_instances_that_are_certain_of_everything():
    """No threshold lies between equal confidences, so there is no cascade."""
    known = drawn(1, images=10)
    for logits_NK in known.logits:
        logits_NK[:] = 0
        logits_NK[:, 1] = 1000
    assert Cascades(known).within([10**6]) == [None]
    assert Cascades(known).least() is None


def test_noise_moves_no_image():
    """Thresholds are far enough from all confidences for the rounding of fp32 logits."""
    draw = np.random.default_rng(0)
    for seed in range(10):
        known = drawn(seed, images=200)
        noisy = Logits(
            known.instances,
            known.macs,
            known.shared,
            [logits_NK * (1 + 3e-7 * draw.choice((-1, 1), logits_NK.shape)).astype(np.float32) for logits_NK in known.logits],
            known.labels,
        )
        for one in Cascades(known).within([(min(known.macs) + max(known.macs)) // 2, max(known.macs)]):
            assert played(noisy, one.choice) == played(known, one.choice)


def test_a_temperature_minimises_the_loss():
    draw = np.random.default_rng(5)
    logits_NK = (3 * draw.normal(size=(2000, 5))).astype(np.float32)
    labels_N = np.array([draw.choice(5, p=softmax(row / 1.7)) for row in logits_NK.astype(np.float64)])

    def loss(t):
        p_NK = softmax(logits_NK.astype(np.float64) / t, axis=1)
        return -np.log(p_NK[np.arange(2000), labels_N]).mean()

    found = temperature(logits_NK, labels_N)
    assert found == pytest.approx(1.7, rel=0.1)
    assert found == float(f"{found:.3g}")
    assert loss(found) <= min(loss(t) for t in np.geomspace(0.1, 10, 400)) + 1e-6


@pytest.mark.parametrize(
    ("above", "below", "decimal"),
    [(0.9, 0.2, 0.6), (0.91, 0.89, 0.9), (0.123456, 0.123451, 0.123453), (1.0, 0.5, 0.8), (1 - 1e-9, 1 - 5e-9, 1 - 3e-9)],
)
def test_a_threshold_is_a_short_decimal_within_the_gap(above, below, decimal):
    found = threshold(above, below)
    assert found == pytest.approx(decimal, abs=1e-12)
    assert below < found <= above


def test_candidates_are_near_the_front_and_of_all_costs():
    draw = random.Random(2)
    instances = [Instance(((f"p{i}", 0.5),)) for i in range(60)] + [FULL]
    labels_N = np.zeros(100, dtype=int)
    logits = []
    for i in range(61):
        logits_NK = np.zeros((100, 2), dtype=np.float32)
        logits_NK[: 39 + i if i % 2 == 0 else draw.randint(0, 30), 0] = 1
        logits_NK[:, 1] = 0.5
        logits.append(logits_NK)
    known = Logits(instances, [100 + i for i in range(61)], np.zeros((61, 61), dtype=int).tolist(), logits, labels_N)
    few = candidates(known, 8)
    assert few == sorted(few)
    assert len(few) == 8
    assert 0 in few
    assert 60 in few  # `full`
    assert all(i % 2 == 0 for i in few)
    assert max(b - a for a, b in itertools.pairwise(few)) <= 12
    assert set(candidates(known, 40)) >= {i for i in range(61) if i % 2 == 0}
    assert len(candidates(known, 100)) == 61


def realistic(seed, images):
    """Draw logits of five instances that share most of what makes an image hard, as those of a trained network do."""
    draw = np.random.default_rng(seed)
    instances = [Instance(((f"layer1.{i}", 0.5),)) for i in range(4)] + [FULL]
    macs = [25, 40, 60, 80, 100]
    shared = [[macs[i] if i == j else 18 * min(i, j) + 5 for j in range(5)] for i in range(5)]
    labels_N = draw.integers(0, 10, images)
    hardness_N = draw.gamma(1.5, 1.0, images)
    common_NK = draw.normal(size=(images, 10))
    logits = []
    for i in range(5):
        logits_NK = 1.2 * common_NK + 0.9 * draw.normal(size=(images, 10))
        logits_NK[np.arange(images), labels_N] += (3.2 + 0.5 * i) / (0.4 + hardness_N)
        logits.append((1.5 * logits_NK).astype(np.float32))
    return Logits(instances, macs, shared, logits, labels_N)


def part(known, rows):
    logits = [logits_NK[rows] for logits_NK in known.logits]
    return Logits(known.instances, known.macs, known.shared, logits, known.labels[rows])


def spent(known, cascade):
    """Return the MACs of each image, all images at once."""
    numbers = [known.instances.index(member) for member in cascade.members]
    p_MNK = np.stack(
        [softmax(known.logits[i].astype(np.float64) / t, axis=1) for i, t in zip(numbers, cascade.temperatures, strict=True)]
    )
    if cascade.averaged:
        p_MNK = p_MNK.cumsum(0) / np.arange(1, len(numbers) + 1)[:, None, None]
    leaves_MN = np.concatenate(
        [p_MNK[:-1].max(2) >= np.array(cascade.thresholds)[:, None], np.ones((1, p_MNK.shape[1]), dtype=bool)]
    )
    added = [known.macs[i] - max((known.shared[i][j] for j in numbers[:m]), default=0) for m, i in enumerate(numbers)]
    return np.cumsum(added)[leaves_MN.argmax(0)]


def test_the_mean_of_other_images_is_near_the_budget():
    """On 30 random splits the deviations are small, and no larger than drawing images at random makes them.

    The variance of a difference of two means is that of the cost of an image, times 1/chosen + 1/others. So the sum of the
    squared deviations in these units follows a chi-squared distribution of mean 30, whose 99.9 % quantile is 59.7.
    """
    known, budget, squares, deviations = realistic(0, 15_000), 55, [], []
    for seed in range(30):
        order_N = np.random.default_rng(seed).permutation(15_000)
        first, rest = part(known, order_N[:5000]), part(known, order_N[5000:])
        (found,) = Cascades(first, members=2).within([budget])
        assert spent(first, found.choice).mean() == found.mean_macs <= budget
        assert found.mean_macs > 0.99 * budget
        costs_N = spent(rest, found.choice)
        deviations.append(costs_N.mean() / budget - 1)
        squares.append((costs_N.mean() - found.mean_macs) ** 2 / (costs_N.var() * (1 / 5000 + 1 / 10_000)))
    assert max(map(abs, deviations)) < 0.03
    assert abs(np.mean(deviations)) < 0.005
    assert 10 < sum(squares) < 60


def test_cascades_beat_the_single_instance_on_other_images():
    """The gain is not that of choosing among many: images that nothing was chosen on have it, with two and three members."""
    gains = []
    for seed in range(4):
        known = realistic(seed, 9000)
        first, rest = part(known, np.arange(3000)), part(known, np.arange(3000, 9000))
        alone = rest.found(first.best_single(75).choice).right
        pair, triple = (Cascades(first, members=members).within([75])[0].choice for members in (2, 3))
        gains.append([(played(rest, cascade)[0] - alone) / 6000 for cascade in (pair, triple)])
    assert min(map(min, gains)) > 0.02
    assert abs(np.mean([triple - pair for pair, triple in gains])) < 0.01
