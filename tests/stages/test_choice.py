"""The choice of an instance on the holdout, and what is said of it."""

import json

import pytest

from sdpctl.kinds import NODES, RESULTS
from sdpctl.recipe.resolved import Resolved
from sdpctl.stages.calibrate import Statistics
from sdpctl.stages.choosing import pareto_front
from sdpctl.stages.network import TrainedNetwork, grid
from sdpctl.stages.stage import Stored


@pytest.fixture
def chosen(context, listener, tiny):
    """Choose among the instances of the grid, given the held-out images and the score of each instance."""
    recipe = tiny()
    instances = grid(recipe)

    def choose(images, *top1):
        rows = [
            {"instance": str(instance), "macs": 100 - k, "params": 1, "relative": 1.0, "top1": score, "loss": 0.5}
            for k, (instance, score) in enumerate(zip(instances, top1, strict=True))
        ]
        nodes = {"batches": 1, "images": 1, "instances": [str(instance) for instance in instances], "nodes": {}}
        context.require_writable()
        statistics = context.store.commit("bn-statistics", {NODES: json.dumps(nodes).encode()})
        table = context.store.commit("evaluation", {RESULTS: json.dumps({"images": images, "rows": rows}).encode()})
        network = TrainedNetwork(checkpoint=Stored(statistics), resolved=Resolved(recipe), name="tiny")
        steps = pareto_front(network, context, instances, calibrates=True)
        needed = next(steps)
        try:
            while True:
                needed = steps.send(statistics if isinstance(needed, Statistics) else table)
        except StopIteration as end:
            return [instances.index(instance) for instance in end.value], listener.notes

    return choose


def test_a_choice_among_equals_says_so_and_takes_the_cheapest(chosen):
    found, notes = chosen(143, 90.0, 90.0, 80.0)
    assert found[-1] == 1  # instance 0 is the dearest
    assert notes == ["tiny: 2 instances tie at 90.00 % on 143 held-out images; the cheapest of them is chosen"]


def test_a_clear_choice_says_nothing(chosen):
    assert chosen(143, 91.0, 90.0, 90.0)[1] == []
