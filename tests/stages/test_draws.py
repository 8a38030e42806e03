"""Budgeted draws: the MACs that the steps of a training draw."""

from collections import Counter
from itertools import product
from math import sqrt

import numpy as np
import pytest
from scipy.stats import kstest, uniform

from sdpctl.engine import compile as compiling
from sdpctl.engine.cost import Costs
from sdpctl.engine.distributed import ALONE
from sdpctl.engine.train import Trainer
from sdpctl.errors import BudgetError, UsageError
from sdpctl.instance import FULL, Instance
from sdpctl.models import create_model, empty_model
from sdpctl.recipe.load import parse_recipe
from sdpctl.stages import draws
from sdpctl.stages.draws import make_draw, training_macs
from sdpctl.stages.shared import make_trainer

RECIPE = """
name: budgeted
model: {arch: resnet20, num_classes: 10}
data: {dataset: cifar10, image_size: 32}
sdpoint: {draw: budgeted}
"""
STEPS = 1500
PIPES = ("model={arch: twopipe, widths: [6, 8, 10, 10, 12], num_classes: 10}", "data.image_size=8")


def read(*overrides):
    return parse_recipe(RECIPE, "budgeted.yaml", overrides)


class Priced(dict):
    """The MACs of instances, each counted once."""

    def __init__(self, recipe):
        size = recipe.data.image_size
        self.costs = Costs(empty_model(recipe.model), (3, size, size))

    def __missing__(self, instance):
        self[instance] = self.costs.of(instance).macs
        return self[instance]


@pytest.fixture(scope="module")
def priced():
    return Priced(read())


def drawn(recipe, steps=STEPS):
    draw = make_draw(recipe)
    return [instance for step in range(steps) for instance in draw(step)]


def cheapest(recipe, priced):
    lowest = min(recipe.ratios)
    return priced[Instance(tuple((point, lowest) for point in recipe.points))]


@pytest.mark.parametrize("budgets", [None, "30%..100%", "30%..90%", "10M..30M"])
def test_the_macs_of_the_steps_are_uniform_over_the_range(budgets, priced):
    """By Kolmogorov and Smirnov: at a level of 0.1 %, the distance of n uniform numbers is below 1.95 / sqrt(n)."""
    recipe = read(*([f"sdpoint.budgets={budgets}"] if budgets else []))
    full = priced[FULL]
    ends = {None: (cheapest(recipe, priced), full), "30%..100%": (0.3 * full, full), "30%..90%": (0.3 * full, 0.9 * full)}
    lowest, highest = ends.get(budgets, (10e6, 30e6))
    steps = drawn(recipe)
    assert len(steps) == STEPS
    macs = np.array([priced[instance] for instance in steps])
    assert lowest <= macs.min()
    assert macs.max() <= highest
    assert kstest(macs, uniform(lowest, highest - lowest).cdf).statistic < 1.95 / sqrt(STEPS)
    assert macs.mean() == pytest.approx((lowest + highest) / 2, abs=4 * (highest - lowest) / sqrt(12 * STEPS))


def test_any_number_of_points_shrinks_at_every_ratio(priced):
    steps = drawn(read())
    assert set(range(7)) <= set(Counter(len(instance.choices) for instance in steps))
    assert {choice for instance in steps for choice in instance.choices} >= set(product(read().points[:-1], (0.5, 0.75)))
    assert STEPS / 100 < steps.count(FULL) < STEPS / 20


def test_independent_draws_are_not_uniform(priced):
    """The test above can fail."""
    macs = [priced[instance] for instance in drawn(read("sdpoint.draw=independent"))]
    lowest = cheapest(read(), priced)
    assert kstest(macs, uniform(lowest, priced[FULL] - lowest).cdf).statistic > 0.3


@pytest.mark.parametrize(
    ("budgets", "lowest", "highest"), [("50%..50.5%", 0.5, 0.505), ("20300k..20.5M", 20.3e6, 20.5e6), ("7M..30%", 7e6, 0.3)]
)
def test_a_range_of_any_width_is_respected(budgets, lowest, highest, priced):
    macs = {priced[instance] for instance in drawn(read(f"sdpoint.budgets={budgets}"), 200)}
    lowest, highest = (end if end > 1 else end * priced[FULL] for end in (lowest, highest))
    assert lowest <= min(macs) <= max(macs) <= highest
    assert len(macs) > 5


def test_a_step_that_finds_no_network_takes_one_of_the_range(priced, monkeypatch):
    monkeypatch.setattr(draws, "TRIES", 0)
    (instance,) = set(drawn(read("sdpoint.budgets=50%..50.5%"), 5))
    assert 0.5 <= priced[instance] / priced[FULL] <= 0.505


def test_a_range_at_the_top_gives_full():
    assert set(drawn(read("sdpoint.budgets=98%..100%"), 100)) == {FULL}
    assert set(drawn(read("sdpoint.budgets=100%..200%"), 100)) == {FULL}


def test_a_range_begins_at_the_cheapest_network(priced):
    least = cheapest(read(), priced)
    begun = drawn(read("sdpoint.budgets=0.1%..60%"), 200)
    assert begun == drawn(read(f"sdpoint.budgets={least}..60%"), 200)
    assert begun != drawn(read("sdpoint.budgets=10%..60%"), 200)
    assert {priced[instance] for instance in drawn(read(f"sdpoint.budgets=1..{least}"), 20)} == {least}


@pytest.mark.parametrize(
    ("budgets", "found"),
    [("1%..2%", "405,"), ("110%..120%", "44,"), ("20300001..20300002", "20,300,001 to 20,300,002"), ("99%..99.9%", "40,")],
)
def test_a_range_without_networks_is_refused(budgets, found, priced):
    with pytest.raises(BudgetError) as caught:
        make_draw(read(f"sdpoint.budgets={budgets}"))
    (line,) = caught.value.lines
    assert line.startswith(f"sdpoint.budgets={budgets}: no network with {found}")
    least, full = cheapest(read(), priced), priced[FULL]
    assert line.endswith(
        f" was found; the networks of these points and ratios have {least:,} to {full:,} MACs: change the range, or give more "
        "points or ratios"
    )
    assert caught.value.exit_code == 8


def test_a_share_above_a_number_of_macs_is_refused():
    with pytest.raises(UsageError, match=r"'50%\.\.1M' is not a range of budgets of this network: 50% is 20,"):
        make_draw(read("sdpoint.budgets=50%..1M"))


def test_a_step_depends_on_the_seed_alone():
    forwards, backwards = make_draw(read()), make_draw(read())
    assert [forwards(step) for step in range(60)] == [backwards(step) for step in reversed(range(60))][::-1]
    other = make_draw(read("seed=1"))
    assert [forwards(step) for step in range(60)] != [other(step) for step in range(60)]


def test_only_the_points_and_ratios_of_the_recipe_are_drawn():
    recipe = read("sdpoint.points=stem,layer2.0", "sdpoint.ratios=[0.5]")
    one, two = Instance.parse("stem@0.5"), Instance.parse("layer2.0@0.5")
    assert set(drawn(recipe, 400)) == {FULL, one, two, Instance(one.choices + two.choices)}


def test_the_shares_of_two_pipes_are_drawn_each_by_itself():
    recipe = read(*PIPES, "sdpoint.budgets=60%..90%")
    priced, steps = Priced(recipe), drawn(recipe, 1000)
    macs = np.array([priced[instance] for instance in steps]) / priced[FULL]
    assert 0.6 <= macs.min() <= macs.max() <= 0.9
    assert max(len(instance.choices) for instance in steps) > 1
    counts, _ = np.histogram(macs, bins=3, range=(0.6, 0.9))  # there are 81 networks, too few for narrower bins
    assert counts.min() > 250


def test_the_macs_of_a_budgeted_training_are_those_of_its_steps(priced):
    recipe = read("sdpoint.budgets=30%..100%")
    assert training_macs(recipe, 25) == 3 * sum(priced[instance] for instance in drawn(recipe, 25))


def test_recipes_without_budgets_say_nothing_of_them():
    for draw in ("single", "independent", "budgeted"):
        assert "budgets" not in read(f"sdpoint.draw={draw}").identity()["sdpoint"]
    assert read("sdpoint.budgets=").identity() == read().identity()
    assert read("sdpoint.budgets= 30% ..90%").identity()["sdpoint"]["budgets"] == "30%..90%"


@pytest.mark.parametrize(("draw", "dynamic"), [("single", False), ("pair", False), ("independent", True), ("budgeted", True)])
def test_one_graph_takes_the_many_sizes_of_a_training(draw, dynamic, monkeypatch):
    made = []
    monkeypatch.setattr(compiling, "compiles", lambda *_, **__: True)
    monkeypatch.setattr(compiling, "Compiled", lambda _, dynamic: made.append(dynamic))
    data = type("Data", (), {"steps_per_epoch": 3, "class_weights": None})
    trainer = make_trainer(create_model("resnet20", num_classes=10), read(f"sdpoint.draw={draw}"), data, ALONE)
    assert isinstance(trainer, Trainer)
    assert made == [dynamic]
