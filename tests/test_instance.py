from collections import Counter
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdpctl.errors import InstanceError
from sdpctl.instance import FULL, Instance, draw_independent, draw_listed, draw_single, pareto_optimal, sdpoint_instances
from sdpctl.models.registry import ARCHITECTURES, architecture

ratios = st.floats(min_value=1e-6, max_value=1, allow_nan=False)
point_names = st.sampled_from(architecture("resnet101").points())
instances = st.dictionaries(point_names, ratios).map(lambda choices: Instance(tuple(choices.items())))


@given(instances)
def test_text_reads_back_as_the_same_instance(instance):
    assert Instance.parse(str(instance)) == instance


@given(st.dictionaries(point_names, ratios).flatmap(lambda d: st.tuples(st.just(d), st.permutations(list(d.items())))))
def test_order_of_writing_does_not_matter(case):
    choices, shuffled = case
    assert Instance(tuple(choices.items())) == Instance(tuple(shuffled))


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("full", "full"),
        ("layer2.3@0.5", "layer2.3@0.5"),
        ("layer3.2@0.5+layer1.0@0.75", "layer1.0@0.75+layer3.2@0.5"),
        ("layer3.10@0.5+layer3.2@0.5", "layer3.2@0.5+layer3.10@0.5"),
        ("layer1.0@0.5+maxpool@.75", "maxpool@0.75+layer1.0@0.5"),
        ("layer1.0@5e-1 + stem@0.5", "stem@0.5+layer1.0@0.5"),
        ("layer1.0@1", "full"),
        ("layer1.0@1.0+layer1.1@0.5", "layer1.1@0.5"),
    ],
)
def test_canonical_text(text, canonical):
    assert str(Instance.parse(text)) == canonical


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_canonical_order_is_network_order(arch):
    points = architecture(arch).points()
    everything = Instance(tuple((point, 0.5) for point in reversed(points)))
    assert [point for point, _ in everything.choices] == list(points)


@pytest.mark.parametrize(
    "text", ["", "layer1.0", "@0.5", "layer1.0@", "layer1.0@x", "layer1.0@0", "layer1.0@1.5", "layer1.0@-1", "layer1.0@nan"]
)
def test_what_is_no_instance(text):
    with pytest.raises(InstanceError):
        Instance.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "layer\u00b2@0.5",
        "layer\u0663@0.5",
        "layer1.0@\u0660.\u0665",
        "layer1.0@0.5_0",
        f"layer{'1' * 5000}@0.5",
        f"layer1.0@0.{'1' * 5000}",
        "x" * 100_000,
        "+".join(f"layer1.{i}@0.5" for i in range(20_000)),
    ],
)
def test_hostile_text_is_no_instance_and_is_cut(text):
    with pytest.raises(InstanceError) as caught:
        Instance.parse(text)
    assert len(str(caught.value)) < 250


def test_a_point_given_twice():
    with pytest.raises(InstanceError, match=r"layer1\.0 is given twice"):
        Instance.parse("layer1.0@0.5+layer1.0@0.75")


def test_a_point_the_network_lacks():
    with pytest.raises(InstanceError, match=r"no point 'layer9\.0'; it has maxpool, layer1\.0"):
        Instance.parse("layer9.0@0.5").check(architecture("resnet18").points())


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


@given(st.dictionaries(instances, st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_pareto_optimal_is_what_nothing_beats(scored):
    def beaten(cost, score):
        return any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in scored.values())

    assert pareto_optimal(scored) == {instance for instance, both in scored.items() if not beaten(*both)}


@pytest.mark.parametrize("point", ["a²", "layer" + "1" * 5000, "x" * 201])
def test_a_point_is_named_by_few_plain_letters_and_digits(point):
    with pytest.raises(InstanceError, match="is not an instance"):
        Instance.parse(f"{point}@0.5")


def test_an_endless_text_is_not_an_instance():
    with pytest.raises(InstanceError, match=r"is not an instance: it has 80,004 characters"):
        Instance.parse("full" + "+a@0.5xx" * 10_000)
