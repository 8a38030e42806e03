"""A whole run: what its plan says beforehand, and which tags its stages move."""

import dataclasses
import re
import shutil

import pytest
from stage_calls import evaluate, planned, train

from sdpctl.plan import Step
from sdpctl.stages.network import open_network

EVERYTHING = (
    "profile={}",
    "search={images: 60, calibration_batches: 1}",
    "export={format: bundle, instances: [pareto]}",
)


@pytest.fixture
def dry(context):
    return dataclasses.replace(context, dry_run=True)


def tags(context):
    return {artifact.tag: artifact.digest for artifact in context.store.artifacts() if artifact.tag}


TO_TRAIN = Step(
    "tiny",
    "checkpoint",
    None,
    "train resnet20 (269,434 params) on 1,295 images of digits, 2 epochs of 10 steps, 1.21e+10 MACs, on cpu",
)
TO_CALIBRATE = Step("tiny.bn", "bn-statistics", None, "calibrate 3 instances on at most 384 images")
TO_EVALUATE = Step("tiny.eval", "evaluation", None, "evaluate 3 instances on 359 images")
TO_COUNT = Step("tiny.profile", "profile", None, "count the cost of 3 instances")
TO_SEARCH = Step(
    "tiny.search",
    "search",
    None,
    "search 7 networks of 2 points, at most 1,258,309 MACs (50.0 %), by exhaustive",
)
TO_CHOOSE = Step("tiny.holdout", "evaluation", None, "evaluate 3 instances on 143 images")
TO_EXPORT = Step(
    "tiny.export.bundle",
    "export",
    None,
    "export the best instances on held-out images as bundle, checked on at most 32 images",
)


def without_keys(steps):
    """Return a plan without the keys in its reasons; tests/test_plan.py looks at those."""
    return [dataclasses.replace(step, reason=re.sub(r"(of its key) [0-9a-f]{12}$", r"\1", step.reason)) for step in steps]


def because(step, reason):
    return dataclasses.replace(step, reason=reason)


NOTHING = "the store has no artifact of its key"


def test_the_plan_of_a_run_names_every_stage_and_why(tiny, trained, context, dry):
    recipe = tiny(*EVERYTHING, "device=cpu")
    first = "tiny is made first"
    assert without_keys(planned(recipe, dry)) == [
        because(TO_TRAIN, NOTHING),
        because(TO_CALIBRATE, first),
        because(TO_EVALUATE, first),
        because(TO_COUNT, NOTHING),
        because(TO_SEARCH, first),
        because(TO_EXPORT, first),
    ]
    assert not context.path.exists()
    shutil.copytree(trained, context.path)
    checkpoint = train(recipe, context)
    first = "tiny.bn is made first"
    assert without_keys(planned(recipe, dry)) == [
        Step("tiny", "checkpoint", checkpoint.digest),
        because(TO_CALIBRATE, NOTHING),
        because(TO_EVALUATE, first),
        because(TO_COUNT, NOTHING),
        because(TO_SEARCH, NOTHING),
        because(TO_EXPORT, first),
    ]
    assert set(tags(context)) == {"tiny"}


def test_the_plan_shows_what_is_there_by_its_digest_and_what_is_made_on_the_way(tiny, context, dry, done):
    there = [Step(artifact.tag, artifact.kind, artifact.digest) for artifact in done.values()]
    assert planned(tiny(), dry) == there
    recipe = tiny("export={format: bundle, instances: [pareto]}")
    train(recipe, context)  # the same weights, with this recipe
    evaluate(open_network("tiny", context), context)
    now = tags(context)
    assert planned(recipe, dry)[:3] == [Step(step.tag, step.kind, now[step.tag]) for step in there]
    assert without_keys(planned(recipe, dry))[3:] == [
        because(TO_CHOOSE, NOTHING),
        because(TO_EXPORT, "tiny.holdout is made first"),
    ]


@pytest.mark.usefixtures("is_trained")
@pytest.mark.parametrize(("instances", "taken"), [(None, {"tiny.bn"}), (["stem@0.5"], set())])
def test_statistics_on_the_way_take_a_free_tag_if_they_are_of_the_whole_grid(context, instances, taken):
    table = evaluate(open_network("tiny", context), context, instances, "holdout")
    assert context.store.at(table.subject).kind == "bn-statistics"
    assert set(tags(context)) == {"tiny", "tiny.holdout"} | taken


def test_an_evaluation_moves_the_tags_of_an_older_checkpoint_together(tiny, context, done):
    train(tiny("train.epochs=0"), context)
    before = {command: artifact.digest for command, artifact in done.items()}
    assert (tags(context)["tiny.bn"], tags(context)["tiny.eval"]) == (before["calibrate-bn"], before["eval-instances"])
    table = evaluate(open_network("tiny", context), context, ["full"])
    assert tags(context)["tiny.eval"] == table.digest != before["eval-instances"]
    assert tags(context)["tiny.bn"] == table.subject.digest != before["calibrate-bn"]
