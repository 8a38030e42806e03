"""What is said of a choice among equals, or on few images."""

import pytest

from sdpctl.pipeline.choice import front
from sdpctl.pipeline.context import grid
from sdpctl.pipeline.ties import coarse, doubts, tied


def test_ties_are_counted_and_few_images_are_said():
    assert doubts([26.32, 26.32, 21.05, 26.32], 26.32, 19) == [
        "3 instances tie at 26.32 % on 19 held-out images; the cheapest of them is chosen",
        "the choice is made on held-out images; 19 images are few: one image is 5.26 percentage points",
    ]
    assert doubts([50.0, 49.0], 50.0, 3000) == []
    assert doubts([26.32], 26.32, 19) == []
    assert doubts([50.0, 50.0], 50.0, 3000) == [
        "2 instances tie at 50.00 % on 3,000 held-out images; the cheapest of them is chosen"
    ]


@pytest.mark.parametrize(("images", "said"), [(0, False), (1, True), (99, True), (100, False)])
def test_few_are_less_than_a_hundred(images, said):
    assert (coarse(images) is not None) == said


def test_only_equal_scores_tie():
    assert tied([1.0, 1.0, 1.0000001], 1.0) == 2


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
