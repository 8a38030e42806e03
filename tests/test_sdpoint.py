"""The grid of instances, and what the training steps draw."""

from collections import Counter
from math import sqrt

import pytest

from sdpctl.errors import UsageError
from sdpctl.instance import FULL, Instance
from sdpctl.models.registry import architecture
from sdpctl.sdpoint import draw_beside, draw_independent, draw_listed, draw_single, sdpoint_instances


def only(instances):
    """Return the one instance of a step."""
    (instance,) = instances
    return instance


@pytest.mark.parametrize(
    ("arch", "count"), [("resnet18", 19), ("preresnet50", 35), ("preresnet101", 69), ("resnext101", 69), ("preresnet200", 135)]
)
def test_the_grid(arch, count):
    points = architecture(arch).points()
    grid = sdpoint_instances(type("Network", (), {"grid_points": points}))
    assert len(grid) == len(set(grid)) == count
    assert grid[0] == FULL
    assert {str(instance) for instance in grid[1:]} == {f"{point}@{ratio}" for point in points for ratio in (0.5, 0.75)}


def chi_square(observed: Counter, expected: dict) -> float:
    assert set(observed) <= set(expected)
    return sum((observed[outcome] - count) ** 2 / count for outcome, count in expected.items())


def chi_square_bound(degrees: int, z: float = 3.1) -> float:
    """Upper quantile (99.9 %) of chi-square by Wilson and Hilferty's approximation."""
    return degrees * (1 - 2 / (9 * degrees) + z * sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize("arch", ["resnet18", "preresnet50", "resnet20"])
def test_single_draws_are_uniform_over_full_and_every_point(arch):
    draws, points, two = 20_000, architecture(arch).points(), (0.5, 0.75)
    draw = draw_single(points, two, seed=3)
    observed = Counter(str(only(draw(step))) for step in range(draws))
    share = draws / (len(points) + 1)
    expected = {"full": share} | {f"{point}@{ratio}": share / 2 for point in points for ratio in two}
    assert observed["layer1.0@0.5"] > 0
    assert chi_square(observed, expected) < chi_square_bound(len(expected) - 1)


def test_independent_draws_shrink_each_point_with_probability_p():
    draws, points, p = 20_000, architecture("resnet18").points(), 0.3
    draw = draw_independent(points, (0.5, 0.75), seed=3, p=p)
    drawn = [only(draw(step)) for step in range(draws)]
    for point in points:
        observed = Counter(instance.ratio(point) for instance in drawn)
        expected = {1.0: draws * (1 - p), 0.5: draws * p / 2, 0.75: draws * p / 2}
        assert chi_square(observed, expected) < chi_square_bound(2, z=4)
    shrunk = Counter(len(instance.choices) for instance in drawn)
    assert {0, 1, 2, 3} <= set(shrunk)


def test_listed_draws_are_uniform_over_the_list():
    draws, texts = 20_000, ["full", "maxpool@0.5", "layer1.0@0.75+layer3.1@0.5", "layer2.1@0.5", "layer4.0@0.5"]
    draw = draw_listed([Instance.parse(text) for text in texts], seed=3)
    observed = Counter(str(only(draw(step))) for step in range(draws))
    expected = dict.fromkeys(texts, draws / len(texts))
    assert chi_square(observed, expected) < chi_square_bound(len(expected) - 1)


def test_a_listed_draw_depends_on_seed_and_step_alone():
    listed = [Instance.parse(text) for text in ("full", "layer1.0@0.5", "layer2.0@0.5")]
    forwards, backwards = draw_listed(listed, seed=1), draw_listed(listed, seed=1)
    assert [forwards(step) for step in range(50)] == [backwards(step) for step in reversed(range(50))][::-1]
    assert [forwards(step) for step in range(50)] != [draw_listed(listed, seed=2)(step) for step in range(50)]
    assert {draw_listed(listed[:1], seed=1)(step) for step in range(9)} == {(FULL,)}


def test_a_draw_depends_on_seed_and_step_alone():
    points = architecture("resnet18").points()
    forwards, backwards = draw_single(points, (0.5,), seed=1), draw_single(points, (0.5,), seed=1)
    assert [forwards(step) for step in range(50)] == [backwards(step) for step in reversed(range(50))][::-1]
    other = draw_single(points, (0.5,), seed=2)
    assert [forwards(step) for step in range(50)] != [other(step) for step in range(50)]


WEIGHTS = {"full": 3.0, "maxpool": 0.0, "layer1.0": 2.0, "layer1.1": 0.5}


def test_weighted_single_draws_have_the_share_of_their_weights():
    draws, points = 20_000, ("maxpool", "layer1.0", "layer1.1")
    draw = draw_single(points, (0.5, 0.75), seed=3, weights=WEIGHTS)
    observed = Counter(str(only(draw(step))) for step in range(draws))
    share = draws / 5.5
    expected = {"full": 3 * share} | {f"{p}@{r}": WEIGHTS[p] / 2 * share for p in points[1:] for r in (0.5, 0.75)}
    assert chi_square(observed, expected) < chi_square_bound(len(expected) - 1)


def test_a_pair_is_full_and_a_point_drawn_uniformly():
    draws, points = 20_000, architecture("resnet20").points()
    draw = draw_beside((FULL,), points, (0.5, 0.75), seed=3, drawn=1)
    drawn = [draw(step) for step in range(draws)]
    assert {step[0] for step in drawn} == {FULL}
    observed = Counter(str(only(step[1:])) for step in drawn)
    expected = {f"{point}@{ratio}": draws / (2 * len(points)) for point in points for ratio in (0.5, 0.75)}
    assert chi_square(observed, expected) < chi_square_bound(len(expected) - 1)


def test_a_sandwich_has_the_fixed_instances_and_different_ones_by_weight():
    points, cheapest = ("maxpool", "layer1.0", "layer1.1"), Instance.parse("maxpool@0.5")
    draw = draw_beside((FULL, cheapest), points, (0.5,), seed=3, drawn=1, weights=WEIGHTS | {"maxpool": 7.0})
    drawn = [draw(step) for step in range(20_000)]
    assert {step[:2] for step in drawn} == {(FULL, cheapest)}
    observed = Counter(str(only(step[2:])) for step in drawn)
    expected = {"layer1.0@0.5": 20_000 * 2 / 2.5, "layer1.1@0.5": 20_000 * 0.5 / 2.5}
    assert chi_square(observed, expected) < chi_square_bound(1)
    both = draw_beside((FULL, cheapest), points, (0.5,), seed=3, drawn=2)
    assert all(set(both(step)) == {FULL, cheapest, *(Instance.parse(f"{p}@0.5") for p in points[1:])} for step in range(50))
    assert both(17) == draw_beside((FULL, cheapest), points, (0.5,), seed=3, drawn=2)(17)


def test_very_unequal_weights_draw_every_instance_that_is_asked_for():
    weights = {"maxpool": 1e6, "layer1.0": 1e-6, "layer1.1": 0.0}
    draw = draw_beside((FULL,), tuple(weights), (0.5, 0.75), seed=3, drawn=4, weights=weights)
    expected = {f"{point}@{ratio}" for point in ("maxpool", "layer1.0") for ratio in (0.5, 0.75)}
    assert [{str(instance) for instance in draw(step)[1:]} for step in range(20)] == [expected] * 20


def test_two_drawn_instances_are_drawn_without_replacement():
    """The first by its weight, the second by its weight among the others; in network order."""
    weights = {"maxpool": 3.0, "layer1.0": 2.0, "layer1.1": 1.0}
    draw = draw_beside((FULL,), tuple(weights), (0.5,), seed=3, drawn=2, weights=weights)
    observed = Counter(" ".join(map(str, draw(step)[1:])) for step in range(20_000))
    expected = {}
    for a, b in (("maxpool", "layer1.0"), ("maxpool", "layer1.1"), ("layer1.0", "layer1.1")):
        share = weights[a] / 6 * weights[b] / (6 - weights[a]) + weights[b] / 6 * weights[a] / (6 - weights[b])
        expected[f"{a}@0.5 {b}@0.5"] = 20_000 * share
    assert chi_square(observed, expected) < chi_square_bound(2)


def test_more_than_there_are_cannot_be_drawn():
    with pytest.raises(UsageError, match="a step draws 2 of the instances that are not in every step, and there are 1"):
        draw_beside((FULL,), ("maxpool", "layer1.0"), (0.5,), seed=3, drawn=2, weights={"maxpool": 0.0, "layer1.0": 1.0})
