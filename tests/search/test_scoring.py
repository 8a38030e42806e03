"""Scores against each network calibrated and evaluated alone, rewards against their formulas."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import randomise_norms

from sdpctl.engine.calibrate import calibrate, running_statistics
from sdpctl.engine.cost import Costs
from sdpctl.engine.evaluate import Score, evaluate
from sdpctl.engine.settings import WalkSettings
from sdpctl.instance import FULL, Instance
from sdpctl.models import create_model
from sdpctl.search.scoring import Scorer, make_reward, pooled
from sdpctl.search.space import Space

NETWORKS = [
    Instance.parse(text)
    for text in ("full", "layer1.0@0.5", "layer1.0@0.5+layer2.0@0.75", "stem@0.75", "stem@0.75+layer3.0@0.5")
]


def batches(count, size, seed):
    draw = torch.Generator().manual_seed(seed)
    shape = size, 1, 12, 12
    return [
        (torch.randn(shape, generator=draw, dtype=torch.float64), torch.randint(7, (size,), generator=draw))
        for _ in range(count)
    ]


CALIBRATION, IMAGES, MORE = batches(2, 8, 1), batches(3, 10, 2), batches(5, 10, 3)


class Ticks:
    def __init__(self):
        self.count = 0

    def __call__(self):
        self.count += 1


@pytest.fixture
def model(double):
    torch.manual_seed(0)
    return randomise_norms(create_model("resnet20", num_classes=7, in_channels=1))


def scorer_of(model, tick=lambda: None, more=lambda: iter(MORE), **settings):
    return Scorer(model, iter(CALIBRATION), iter(IMAGES), more, WalkSettings(**settings), tick=tick)


def alone(model, network, images):
    return evaluate(model, [network], images, calibrate(model, [network], CALIBRATION))[network]


def near(score):
    return Score(score.images, *(pytest.approx(value, rel=1e-10, abs=1e-10) for value in (score.top1, score.top5, score.loss)))


def test_scores_are_those_of_each_network_alone(model):
    scores = scorer_of(model).score(NETWORKS)
    assert list(scores) == NETWORKS
    for network, score in scores.items():
        assert score == near(alone(model, network, IMAGES))
    assert len({score.loss for score in scores.values()}) == len(NETWORKS)
    assert {score.images for score in scores.values()} == {30}


def test_full_keeps_the_networks_own_statistics_where_that_is_asked_for(model):
    scorer = scorer_of(model, keep_full=True)
    for scores, images in ((scorer.score([FULL]), IMAGES), (scorer.score_more([FULL]), MORE)):
        assert scores[FULL] == near(evaluate(model, [FULL], images, running_statistics(model))[FULL])
    assert scorer_of(model).score([FULL])[FULL].loss != scorer.score([FULL])[FULL].loss


def test_the_other_images_are_other_images_with_the_same_calibration(model):
    scores = scorer_of(model).score_more(NETWORKS)
    for network, score in scores.items():
        assert score == near(alone(model, network, MORE))
        assert score.images == 50


def test_networks_that_wait_are_scored_in_one_pass_and_each_once(model, monkeypatch):
    runs, tick = [], Ticks()
    monkeypatch.setattr("sdpctl.search.scoring.evaluate", lambda *a, **k: runs.append(list(a[1])) or evaluate(*a, **k))
    scorer = scorer_of(model, tick)
    assert scorer.score([]) == {}
    first = scorer.score(NETWORKS[:3])
    assert tick.count == len(CALIBRATION) + len(IMAGES)
    assert scorer.score(NETWORKS[2::-1]) == first
    assert tick.count == len(CALIBRATION) + len(IMAGES)
    second = scorer.score(NETWORKS[1:])
    assert list(second) == NETWORKS[1:]
    assert tick.count == 2 * (len(CALIBRATION) + len(IMAGES))
    assert second[NETWORKS[1]] is first[NETWORKS[1]]
    assert runs == [NETWORKS[:3], NETWORKS[3:]]
    scorer.score_more(NETWORKS[:2])
    assert tick.count == 3 * len(CALIBRATION) + 2 * len(IMAGES) + len(MORE)
    scorer.score_more(NETWORKS[1:3])
    scorer.score_more(NETWORKS[:3])
    assert runs[2:] == [NETWORKS[:2], [NETWORKS[2]]]
    assert tick.count == 4 * len(CALIBRATION) + 2 * len(IMAGES) + 2 * len(MORE)


def test_what_is_known_from_elsewhere_is_not_scored(model):
    tick = Ticks()
    scorer = scorer_of(model, tick)
    there = Score(30, 99.0, 100.0, 0.1)
    scorer.known[FULL] = there
    assert scorer.score([FULL]) == {FULL: there}
    assert tick.count == 0
    assert scorer.score_more([FULL])[FULL] == near(alone(model, FULL, MORE))


def test_the_model_is_left_as_it_was(model):
    model.train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    scorer = scorer_of(model)
    scorer.score(NETWORKS)
    scorer.score_more(NETWORKS)
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_the_precision_is_that_of_calibration_and_scoring(model):
    model.float()
    calibration, images = ([(x_NCHW.float(), labels_N) for x_NCHW, labels_N in part] for part in (CALIBRATION, IMAGES))
    losses = {}
    for precision in ("fp32", "bf16"):
        scorer = Scorer(model, calibration, images, lambda: MORE, WalkSettings(precision=precision), tick=lambda: None)
        score = scorer.score([FULL])[FULL]
        statistics = calibrate(model, [FULL], calibration, WalkSettings(precision=precision))
        assert score == near(evaluate(model, [FULL], images, statistics, WalkSettings(precision=precision))[FULL])
        losses[precision] = score.loss
    assert losses["fp32"] != losses["bf16"]


def space():
    costs = Costs(create_model("resnet20", num_classes=7, in_channels=1), (1, 12, 12))
    return Space(costs, {"layer1.0": (1, 0.5)})


@pytest.mark.parametrize("text", ["full", "layer1.0@0.5"])
def test_the_three_rewards(text):
    where, instance, score = space(), Instance.parse(text), Score(1000, 62.5, None, 1.0)
    macs = where.costs.of(instance).macs
    assert make_reward("accuracy", 3.0, where)(instance, score) == 62.5
    assert make_reward("amc", 3.0, where)(instance, score) == pytest.approx(-0.375 * math.log(macs), rel=1e-12)
    assert make_reward("branch", 3000.0, where)(instance, score) == pytest.approx(62.5 - 3000 * macs / 1e9, rel=1e-12)


def test_what_each_reward_prefers():
    where, shrunk = space(), Instance.parse("layer1.0@0.5")
    better, worse = Score(1000, 62.6, None, 1.0), Score(1000, 62.5, None, 1.0)
    assert make_reward("accuracy", 1.0, where)(FULL, better) > make_reward("accuracy", 1.0, where)(shrunk, worse)
    assert make_reward("amc", 1.0, where)(FULL, better) < make_reward("amc", 1.0, where)(shrunk, worse)
    gmacs = (where.full - where.cost(shrunk)) / 1e9
    for weight, full_wins in ((0.09 / gmacs, True), (0.11 / gmacs, False)):
        reward = make_reward("branch", weight, where)
        assert (reward(FULL, better) > reward(shrunk, worse)) == full_wins


outcomes = st.lists(st.tuples(st.booleans(), st.booleans(), st.floats(0, 20)), min_size=1, max_size=30)


def scored(images):
    """Return the score on images of which is known whether they were right, among five, and their loss."""
    top1, top5, loss = (sum(column) / len(images) for column in zip(*images, strict=True))
    return Score(len(images), 100 * top1, 100 * top5, loss)


@given(outcomes, outcomes)
def test_a_pooled_score_is_that_on_all_images(first, second):
    assert pooled(scored(first), scored(second)) == near(scored(first + second))


def test_few_classes_have_no_pooled_top5():
    assert pooled(Score(10, 40.0, None, 2.0), Score(30, 80.0, None, 1.0)) == Score(40, 70.0, None, 1.25)
