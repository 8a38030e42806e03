"""The grid of instances, and what the training steps draw."""

from collections import Counter
from math import sqrt

import pytest

from sdpctl.instance import FULL, Instance
from sdpctl.models.registry import architecture
from sdpctl.sdpoint import draw_independent, draw_listed, draw_single, sdpoint_instances


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
    observed = Counter(map(str, map(draw, range(draws))))
    share = draws / (len(points) + 1)
    expected = {"full": share} | {f"{point}@{ratio}": share / 2 for point in points for ratio in two}
    assert observed["layer1.0@0.5"] > 0
    assert chi_square(observed, expected) < chi_square_bound(len(expected) - 1)


def test_independent_draws_shrink_each_point_with_probability_p():
    draws, points, p = 20_000, architecture("resnet18").points(), 0.3
    draw = draw_independent(points, (0.5, 0.75), seed=3, p=p)
    drawn = [draw(step) for step in range(draws)]
    for point in points:
        observed = Counter(instance.ratio(point) for instance in drawn)
        expected = {1.0: draws * (1 - p), 0.5: draws * p / 2, 0.75: draws * p / 2}
        assert chi_square(observed, expected) < chi_square_bound(2, z=4)
    shrunk = Counter(len(instance.choices) for instance in drawn)
    assert {0, 1, 2, 3} <= set(shrunk)


def test_listed_draws_are_uniform_over_the_list():
    draws, texts = 20_000, ["full", "maxpool@0.5", "layer1.0@0.75+layer3.1@0.5", "layer2.1@0.5", "layer4.0@0.5"]
    draw = draw_listed([Instance.parse(text) for text in texts], seed=3)
    observed = Counter(map(str, map(draw, range(draws))))
    expected = dict.fromkeys(texts, draws / len(texts))
    assert chi_square(observed, expected) < chi_square_bound(len(expected) - 1)


def test_a_listed_draw_depends_on_seed_and_step_alone():
    listed = [Instance.parse(text) for text in ("full", "layer1.0@0.5", "layer2.0@0.5")]
    forwards, backwards = draw_listed(listed, seed=1), draw_listed(listed, seed=1)
    assert [forwards(step) for step in range(50)] == [backwards(step) for step in reversed(range(50))][::-1]
    assert [forwards(step) for step in range(50)] != [draw_listed(listed, seed=2)(step) for step in range(50)]
    assert {draw_listed(listed[:1], seed=1)(step) for step in range(9)} == {FULL}


def test_a_draw_depends_on_seed_and_step_alone():
    points = architecture("resnet18").points()
    forwards, backwards = draw_single(points, (0.5,), seed=1), draw_single(points, (0.5,), seed=1)
    assert [forwards(step) for step in range(50)] == [backwards(step) for step in reversed(range(50))][::-1]
    other = draw_single(points, (0.5,), seed=2)
    assert [forwards(step) for step in range(50)] != [other(step) for step in range(50)]
