"""What is said of a choice among equals, or on few images."""

import pytest

from sdpctl.uncertainty import choice_notes, count_tied, few_images_note


def test_ties_are_counted_and_few_images_are_said():
    assert choice_notes([26.32, 26.32, 21.05, 26.32], 26.32, 19) == [
        "3 instances tie at 26.32 % on 19 held-out images; the cheapest of them is chosen",
        "the choice is made on held-out images; 19 images are few: one image is 5.26 percentage points",
    ]
    assert choice_notes([50.0, 49.0], 50.0, 3000) == []
    assert choice_notes([26.32], 26.32, 19) == []
    assert choice_notes([50.0, 50.0], 50.0, 3000) == [
        "2 instances tie at 50.00 % on 3,000 held-out images; the cheapest of them is chosen"
    ]


@pytest.mark.parametrize(("images", "said"), [(0, False), (1, True), (99, True), (100, False)])
def test_few_are_less_than_a_hundred(images, said):
    assert (few_images_note(images) is not None) == said


def test_only_equal_scores_tie():
    assert count_tied([1.0, 1.0, 1.0000001], 1.0) == 2
