"""What the key of a stage contains, when it is looked up, and with what the work is done."""

from dataclasses import replace

import pytest
from stage_calls import calibrate, evaluate, run, search

from sdpctl.errors import DataError
from sdpctl.plan import Plan
from sdpctl.search.scoring import Scorer
from sdpctl.stages.calibrate import Calibrate
from sdpctl.stages.evaluate import Evaluate
from sdpctl.stages.export import Export
from sdpctl.stages.network import open_network
from sdpctl.stages.search import Search
from sdpctl.stages.train import Train


def key_of(stage, context):
    """Return the key of a stage, once all that it needs is there."""
    plan, steps = Plan(context), stage.steps(context)
    try:
        needed = next(steps)
        while True:
            needed = steps.send(plan.need(needed))
    except StopIteration as end:
        return end.value.key


@pytest.mark.parametrize(
    "change",
    ["seed=1", "model.shortcut=projection", "data.holdout=20%", "sdpoint.ratios=[0.75]", "sdpoint=off", "train.lr=0.05"],
)
def test_the_key_of_a_training_contains_every_section_that_it_depends_on(tiny, context, change):
    assert key_of(Train(tiny(change)), context) != key_of(Train(tiny()), context)


@pytest.mark.parametrize(
    "change", ["name=different", "calibrate.batches=1", "evaluate.batch_size=7", "profile={}", "device=cpu"]
)
def test_the_key_of_a_training_contains_nothing_else(tiny, context, change):
    assert key_of(Train(tiny(change)), context) == key_of(Train(tiny()), context)


@pytest.mark.usefixtures("is_trained")
def test_the_key_of_statistics_contains_the_data(context):
    small, large = (open_network("tiny", context, [f"data.image_size={size}"]) for size in (8, 12))
    assert key_of(Calibrate(small), context) != key_of(Calibrate(large), context)


@pytest.mark.parametrize("command", [calibrate, evaluate])
def test_data_that_was_set_is_looked_at_before_the_key_is_looked_up(tiny, context, image_folder, command):
    """The fingerprint that the recipe promises is in the key, and the store has what the key led to."""
    root, different = image_folder(), image_folder("different", shade=77)
    folder = ("data.dataset=imagefolder", "data.batch_size=4", "model.num_classes=2", f"data.root={root}", "train.epochs=0")
    run(tiny(*folder), context)
    with pytest.raises(DataError, match="this is not the data that was used before"):
        command(open_network("tiny", context, [f"data.root={different}"]), context)


@pytest.mark.usefixtures("is_trained")
def test_the_key_of_a_search_contains_how_the_winners_are_calibrated(context):
    two, three = (open_network("tiny", context, [f"calibrate.batches={batches}"]) for batches in (2, 3))
    assert key_of(Search(two), context) != key_of(Search(three), context)


@pytest.mark.usefixtures("done")
def test_the_key_of_an_export_contains_the_name_that_stands_in_its_card(context):
    network = open_network("tiny", context)
    assert key_of(Export(network), context) != key_of(Export(replace(network, name="renamed")), context)


class EndedError(Exception):
    """Ends a search before it scores anything."""


@pytest.fixture
def scorer(monkeypatch):
    """End a search when its scorer is made; return the attributes of the scorer."""
    seen = {}

    def end(self, *arguments, **options):
        build(self, *arguments, **options)
        seen.update(vars(self))
        raise EndedError

    build = Scorer.__init__
    monkeypatch.setattr(Scorer, "__init__", end)
    return seen


@pytest.mark.usefixtures("is_trained", "quick_sqlite")
@pytest.mark.parametrize("keep", ["full", "null"])
def test_a_search_scores_full_as_the_recipe_asks(context, scorer, keep):
    with pytest.raises(EndedError):
        search(open_network("tiny", context, [f"calibrate.keep={keep}"]), context)
    assert scorer["settings"].keep_full == (keep == "full")


@pytest.mark.usefixtures("is_trained", "quick_sqlite")
@pytest.mark.parametrize(("asked", "first", "more"), [(60, 60, 83), (1000, 71, 72)])
def test_held_out_images_are_left_for_the_best_networks(context, scorer, asked, first, more):
    """143 images are held out; every network is scored on at most half of them."""
    with pytest.raises(EndedError):
        search(open_network("tiny", context, [f"search.images={asked}"]), context)
    counts = [sum(len(labels) for _, labels in batches) for batches in (scorer["images"], scorer["more_images"]())]
    assert counts == [first, more]


@pytest.mark.usefixtures("is_trained")
def test_the_key_of_a_table_contains_its_split(context):
    network = open_network("tiny", context)
    test, holdout = (key_of(Evaluate(network, split=split), context) for split in ("test", "holdout"))
    assert test != holdout
