"""A loss that grows is said once, and a healthy training hears nothing."""

import math

import pytest
from stage_calls import train

from sdpctl.stages.train import grows

HEALTHY = {
    "digits": [2.6312, 2.2304, 1.9, 1.4, 1.1],
    "smoke": [2.1489, 0.9559],
    "slow": [2.303, 2.304, 2.301, 2.31],
    "noise far below guessing": [0.05, 0.12, 0.04, 0.2],
    "a bad start": [8.0, 3.4, 2.6, 2.2],
}
GROWING = {
    "from the first epoch on": [2.4, 3.1],
    "after a good start": [2.1, 1.8, 2.9],
    "after a bad start": [7.6544, 7.2131, 199.5344],
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_loss_does_not_grow(name):
    losses = HEALTHY[name]
    assert not any(grows(losses[:n], 10) for n in range(1, len(losses) + 1))


@pytest.mark.parametrize("name", GROWING)
def test_a_loss_that_grows(name):
    *before, _ = losses = GROWING[name]
    assert grows(losses, 10)
    assert not grows(before, 10)


def test_a_loss_below_that_of_guessing_may_rise():
    assert not grows([0.1, 1.09 * math.log(1000)], 1000)
    assert grows([0.1, 1.11 * math.log(1000)], 1000)


def warnings(listener):
    return [note for note in listener.notes if "the loss grows" in note]


@pytest.fixture
def losing(monkeypatch):
    """Let every epoch say that its loss was twice that of the epoch before."""
    from sdpctl.engine.train import Trainer

    def doubled(self):
        self.check_finite()
        return {"loss": 2.0**self.epoch, "accuracy": 10.0, "lr": 0.1}

    monkeypatch.setattr(Trainer, "finish_epoch", doubled)


def test_the_warning_comes_once_and_says_what_to_set(losing, tiny, context, listener):
    train(tiny("train.epochs=3", "train.validate.every=0"), context)
    (warning,) = warnings(listener)
    assert warning == (
        "tiny: the loss grows, from 2 to 4; guessing among 10 classes has 2.303. train.lr=0.1 is probably too high; stop, and "
        "try again with --set train.lr=0.01"
    )


def test_nothing_is_said_in_the_warm_up(losing, tiny, context, listener):
    train(tiny("train.epochs=3", "train.validate.every=0", "train.warmup_epochs=3"), context)
    assert warnings(listener) == []
