"""The choice of an instance on the holdout, and what is said of it."""

import pytest

from sdpctl.pipeline.choice import front
from sdpctl.pipeline.context import grid


@pytest.fixture
def opened(monkeypatch, context, listener, tiny):
    """What `front` is given, with a table of held-out images in which the scores are set."""
    recipe = tiny()
    instances = grid(recipe)

    def choose(images, *top1):
        rows = [
            {"instance": str(instance), "macs": 100 - k, "top1": score}
            for k, (instance, score) in enumerate(zip(instances, top1, strict=True))
        ]
        monkeypatch.setattr("sdpctl.pipeline.choice.calibrated", lambda *_: instances)
        monkeypatch.setattr("sdpctl.pipeline.choice.evaluated", lambda *_: {"rows": rows, "images": images})
        found = front(type("Opened", (), {"name": "tiny", "recipe": recipe}), context, instances)
        return [instances.index(instance) for instance in found], listener.notes

    return choose


def test_a_choice_among_equals_says_so_and_takes_the_cheapest(opened):
    found, notes = opened(143, 90.0, 90.0, 80.0)
    assert found[-1] == 1  # instance 0 is the dearest
    assert notes == ["tiny: 2 instances tie at 90.00 % on 143 held-out images; the cheapest of them is chosen"]


def test_a_clear_choice_says_nothing(opened):
    assert opened(143, 91.0, 90.0, 90.0)[1] == []
