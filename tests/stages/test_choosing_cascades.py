"""The choice of a cascade as a stage: what it commits, that its figures are those of what runs, and when it refuses."""

import dataclasses
import json
import os
import re
import shutil
import signal
from itertools import accumulate, pairwise

import pytest
import torch
from stage_calls import calibrate, document, evaluate, run
from test_keys import key_of

from sdpctl.cascade import Cascade
from sdpctl.engine.calibrate import CalibratedNorms
from sdpctl.engine.cascade import CascadeRun, added_macs
from sdpctl.engine.cost import Costs
from sdpctl.engine.tree import Tree
from sdpctl.errors import BudgetError, DataError, DivergedError, NotFoundError, RecipeError, RunInterruptedError, UsageError
from sdpctl.instance import FULL, Instance
from sdpctl.plan import Plan
from sdpctl.stages import cascade as module
from sdpctl.stages.cascade import ChooseCascade, chosen_cascades
from sdpctl.stages.context import Context
from sdpctl.stages.documents import check_cascade, check_evaluation
from sdpctl.stages.evaluate import Evaluate
from sdpctl.stages.layers import read_statistics
from sdpctl.stages.network import named, open_network
from sdpctl.stages.opening import open_data, open_model

TEXTS = ["full", "stem@0.5", "layer2.0@0.5"]


def choose(context, *overrides, ref="tiny", force=False):
    network = open_network(ref, context, [f"cascade.{override}" for override in overrides])
    return Plan(context, force=force).run(ChooseCascade(network))


@pytest.fixture(scope="module")
def first(evaluated, make_once, make_listener):
    """A choice at 80 % of the MACs: its store, its artifact, what was said."""

    def fill(path):
        shutil.copytree(evaluated, path, dirs_exist_ok=True)
        context = Context(path=path, report=make_listener())
        choose(context, "max_macs=80%")
        (path / "notes.json").write_text(json.dumps(context.report.notes))

    path = make_once("tiny-cascade", fill)
    context = Context(path=path, report=make_listener())
    return context, context.store.resolve("tiny.cascade"), json.loads((path / "notes.json").read_text())


def play(context, row, split):
    """Run a row's cascade or instance on a split; return the accuracy, the loss, the mean MACs and the shares that leave."""
    network = open_network("tiny", context).with_data(context)
    model, device = open_model(context.store.resolve("tiny"), network.recipe, context, images=64)
    data = open_data(network.recipe, device, context)
    norms = CalibratedNorms(model, read_statistics(context.store, context.store.resolve("tiny.bn"), model))
    batches = list(data.test(100) if split == "test" else data.holdout(100))
    costs = Costs(model, (1, 8, 8))
    log_p, left = [], []
    with torch.inference_mode():
        for x_NCHW, _ in batches:
            if "cascade" in row:
                log_p_NK, left_N = CascadeRun(model, Cascade.parse(row["cascade"]), norms)(x_NCHW)
            else:
                instance = Instance.parse(row["instance"])
                log_p_NK = Tree(model, [instance]).walk(x_NCHW, norms)[instance].log_softmax(1)
                left_N = torch.zeros(len(x_NCHW), dtype=torch.int64)
            log_p.append(log_p_NK)
            left.append(left_N)
    log_p_NK, left_N, labels_N = torch.cat(log_p), torch.cat(left), torch.cat([labels for _, labels in batches])
    if "cascade" in row:
        spent = list(accumulate(added_macs(Cascade.parse(row["cascade"]), costs)))
    else:
        spent = [costs.of(Instance.parse(row["instance"])).macs]
    top1 = 100 * (log_p_NK.argmax(1) == labels_N).double().mean().item()
    loss = -log_p_NK[range(len(labels_N)), labels_N].double().mean().item()
    macs = torch.tensor(spent)[left_N].double().mean().item()
    return top1, loss, macs, [100 * (left_N == number).double().mean().item() for number in range(len(spent))]


def test_the_figures_are_those_of_what_runs(first):
    context, artifact, _ = first
    chosen = document(artifact, context)
    assert (artifact.kind, artifact.tag, sorted(artifact.layers)) == (
        "cascade",
        "tiny.cascade",
        ["cascade.json", "recipe.yaml"],
    )
    assert artifact.subject.digest == context.store.resolve("tiny.bn").digest
    full = chosen["full"]["macs"]
    assert chosen["budget"] == {"text": "80%", "macs": int(0.8 * full)}
    rows = [chosen["best"], chosen["single"], chosen["full"], *chosen["front"]]
    assert "cascade" in rows[0]
    assert rows[2]["instance"] == "full"
    for row in rows:
        top1, loss, macs, left = play(context, row, "test")
        assert row["top1"] == pytest.approx(top1)
        assert row["loss"] == pytest.approx(loss, rel=1e-4)
        assert row["macs"] == round(macs)
        assert row["relative"] == pytest.approx(macs / full)
        top1, _, macs, heldout_left = play(context, row, "holdout")
        assert row["heldout_top1"] == pytest.approx(top1)
        if "cascade" in row:
            assert row["left"] == pytest.approx(left)
            assert row["heldout_left"] == pytest.approx(heldout_left)
            assert row["heldout_macs"] == round(macs)
            assert row["worst_macs"] == sum(row["member_macs"])
            assert min(heldout_left) >= 1
    assert chosen["best"]["heldout_macs"] <= chosen["budget"]["macs"]


def test_the_front_gets_more_accurate_with_its_cost(first):
    context, artifact, _ = first
    chosen = document(artifact, context)
    front = [(row.get("heldout_macs", row["macs"]), row["heldout_top1"]) for row in chosen["front"]]
    assert front == sorted(front)
    assert all(one[1] < other[1] for one, other in pairwise(front))
    assert front[-1][1] >= max(chosen["full"]["heldout_top1"], chosen["best"]["heldout_top1"])
    texts = [
        row.get("cascade") or row["instance"] for row in [chosen["best"], chosen["single"], *chosen["front"], chosen["full"]]
    ]
    assert [str(one) for one in chosen_cascades(artifact, context, ["stem", "layer2.0"])] == list(dict.fromkeys(texts))


def test_what_a_user_is_told(first):
    _, _, notes = first
    assert sum("takes" in note and "ms on this machine" in note for note in notes) == 2
    assert notes[-1].startswith("tiny.cascade: ")
    assert re.search(r"[23] of 3 instances chosen on \d+ images, [0-9a-f]{12}$", notes[-1])


def test_a_second_choice_is_found_and_force_does_it_again(first, tmp_path, listener):
    there, artifact, _ = first
    shutil.copytree(there.path, tmp_path / "store")
    context = Context(path=tmp_path / "store", report=listener)
    assert choose(context, "max_macs=80%").digest == artifact.digest
    assert listener.notes == [f"tiny.cascade: in the store already, {artifact.short}"]
    assert choose(context, "max_macs=80%", force=True).digest == artifact.digest  # the same content again
    assert len(listener.notes) > 2
    assert list(context.store.verify()) == []


def test_a_choice_within_a_second_budget_leaves_the_first_under_its_budget(first, tmp_path, listener):
    there, most, _ = first
    shutil.copytree(there.path, tmp_path / "store")
    context = Context(path=tmp_path / "store", report=listener)

    def tags():
        return {artifact.tag: artifact.digest for artifact in context.store.artifacts() if artifact.kind == "cascade"}

    assert tags() == {"tiny.cascade": most.digest, "tiny.cascade.80pct": most.digest}
    less = choose(context, "max_macs=60%")
    after = {"tiny.cascade": less.digest, "tiny.cascade.60pct": less.digest, "tiny.cascade.80pct": most.digest}
    assert (less.tag, tags()) == ("tiny.cascade", after)
    index = (context.path / "index.json").read_bytes()
    dry = dataclasses.replace(context, dry_run=True)
    assert (choose(dry, "max_macs=80%").tag, choose(dry, "max_macs=70%")) == ("tiny.cascade.80pct", None)
    assert (context.path / "index.json").read_bytes() == index
    again = choose(context, "max_macs=80%", ref="tiny.cascade.60pct")
    assert (again.digest, again.tag) == (most.digest, "tiny.cascade")
    assert tags() == after | {"tiny.cascade": most.digest}


@pytest.mark.usefixtures("done")
def test_what_the_key_contains(context):
    def key(*overrides):
        return key_of(ChooseCascade(open_network("tiny", context, overrides)), context)

    plain = key()
    changes = ["max_macs=80%", "members=2", "averaged=true", "averaged=false", "images=100", "instances=[stem@0.5]"]
    keys = {plain, *(key(f"cascade.{change}") for change in changes)}
    assert len(keys) == 1 + len(changes)
    assert key("cascade={}") == key("data.workers=1") == key("search.evaluations=7") == plain


@pytest.mark.usefixtures("done")
def test_listed_instances_are_the_candidates_besides_full(context):
    chosen = document(choose(context, "instances=[layer2.0@0.75]", "max_macs=97%"), context)
    assert chosen["candidates"] == ["full", "layer2.0@0.75"]
    assert chosen["best"]["cascade"].split("@")[0].removeprefix("mean/") == "layer2.0"
    with pytest.raises(RecipeError, match=r"cascade\.instances\.0: layer9@0\.5: the network has no point 'layer9'"):
        choose(context, "instances=[layer9@0.5]")


@pytest.mark.usefixtures("done")
def test_members_and_averages_as_set(context):
    for averaged in (True, False):
        chosen = document(choose(context, "members=2", f"averaged={str(averaged).lower()}", "max_macs=none"), context)
        rows = [row for row in [chosen["best"], *chosen["front"]] if "cascade" in row]
        assert all(Cascade.parse(row["cascade"]).averaged is averaged for row in rows)
        assert all(len(Cascade.parse(row["cascade"]).members) == 2 for row in rows)
        assert chosen["budget"] == {"text": None, "macs": None}


@pytest.mark.usefixtures("done")
def test_a_budget_that_no_cascade_meets_is_refused(context):
    with pytest.raises(BudgetError, match=r"--max-macs 10%: no cascade is within [\d,]+ MACs on average; .* stem@0\.5, takes"):
        choose(context, "max_macs=10%")
    network = open_network("tiny", context)
    model, _ = open_model(context.store.resolve("tiny"), network.recipe, context, images=64)
    cheapest = Costs(model, (1, 8, 8)).of(Instance.parse("stem@0.5")).macs
    with pytest.raises(BudgetError, match=r"the cheapest, \S+/\S+, takes [\d,]+ \(") as refused:
        choose(context, f"max_macs={cheapest + 10}")
    named = str(refused.value).split("the cheapest, ")[1]
    row, macs = {"cascade": named.split(", takes")[0]}, int(named.split("takes ")[1].split(" ")[0].replace(",", ""))
    assert play(context, row, "holdout")[2] == pytest.approx(macs, abs=1)
    assert context.tagged("tiny.cascade") is None
    assert document(choose(context, f"max_macs={macs + 1}"), context)["best"]["heldout_macs"] <= macs + 1


def test_too_few_held_out_images(context, tiny, image_folder):
    root = image_folder(count=12)
    folder = ("data.dataset=imagefolder", "data.batch_size=4", "model.num_classes=2", f"data.root={root}", "train.epochs=0")
    run(tiny(*folder), context)
    with pytest.raises(DataError, match=r"keeps 2 images of 2 classes, too few to choose by"):
        choose(context)


@pytest.mark.usefixtures("done")
def test_a_choice_needs_two_candidates_and_two_images_of_a_class(context):
    one = r"^cascade\.instances: a cascade has at least two members, and full is the only candidate; add an instance$"
    for budget in ("none", "50%"):
        with pytest.raises(RecipeError, match=one):
            choose(context, "instances=[full]", f"max_macs={budget}")
    with pytest.raises(RecipeError, match=r"^cascade\.images: 19 images are too few to choose by; .* for each class, 20$"):
        choose(context, "images=19")
    calibrate(open_network("tiny", context), context, ["full"])
    for budget in ("none", "50%"):
        with pytest.raises(UsageError, match=r"^tiny: a cascade has at least two members, and these statistics cover full"):
            choose(context, f"max_macs={budget}", ref="tiny.bn")
    assert context.tagged("tiny.cascade") is None


@pytest.mark.usefixtures("done")
def test_few_held_out_images_are_told(context):
    choose(context, "images=50")
    assert any("the choice is made on held-out images; 50 images are few" in note for note in context.report.notes)
    assert document(context.store.resolve("tiny.cascade"), context)["heldout_images"] == 50


@pytest.mark.usefixtures("done")
def test_a_network_whose_logits_are_not_finite(context, monkeypatch):
    def broken(*_, **__):
        logits_INK = torch.zeros(3, 139, 10)
        logits_INK[1, 5] = float("nan")
        return logits_INK, torch.zeros(139, dtype=torch.int64)

    monkeypatch.setattr(module.SharedNetwork, "logits", broken)
    with pytest.raises(DivergedError, match=r"the logits of stem@0\.5 are not finite"):
        choose(context)


@pytest.mark.usefixtures("done")
def test_statistics_without_full(context):
    calibrate(open_network("tiny", context), context, ["stem@0.5", "layer2.0@0.5"])
    with pytest.raises(NotFoundError, match="these statistics do not cover full"):
        choose(context, ref="tiny.bn")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.usefixtures("done")
def test_a_signal_leaves_nothing_behind(context, monkeypatch, signum, code):
    timed = module.timed

    def signalled(batches, **options):
        os.kill(os.getpid(), signum)
        return timed(batches, **options)

    before = {artifact.digest for artifact in context.store.artifacts()}
    monkeypatch.setattr(module, "timed", signalled)
    with pytest.raises(RunInterruptedError, match="nothing is kept") as stopped:
        choose(context)
    assert stopped.value.exit_code == code
    assert {artifact.digest for artifact in context.store.artifacts()} == before
    assert list(context.store.verify()) == []
    monkeypatch.undo()
    assert choose(context).kind == "cascade"


@pytest.mark.usefixtures("done")
def test_run_makes_the_cascade_of_a_recipe(context, tiny):
    made = run(tiny("cascade={max_macs: 80%, members: 2}"), context)
    assert list(made) == ["train", "calibrate-bn", "eval-instances", "cascade"]
    assert document(made["cascade"], context)["budget"]["text"] == "80%"
    assert made["cascade"].digest == choose(context, "max_macs=80%", "members=2").digest


def test_a_choice_without_a_holdout_is_refused(tiny):
    with pytest.raises(RecipeError, match="a cascade is chosen on the holdout: use 10%, or more"):
        tiny("cascade={}", "data.holdout=0", "train.validate.every=0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"best": None}, "best: expected an object"),
        ({"full": {"instance": "full"}}, r"full\.macs: this key is missing"),
        ({"front": []}, "front: expected a list of 1 to"),
        ({"budget": {"macs": -1}}, r"budget\.macs: expected a whole number"),
        ({"candidates": ["stem"]}, r"candidates\[0\]: 'stem' is not an instance"),
    ],
)
def test_a_document_that_is_not_valid(first, change, message):
    context, artifact, _ = first
    chosen = document(artifact, context)
    check_cascade(chosen, "")
    check_cascade(chosen | {"single": None}, "")
    with pytest.raises(ValueError, match=message):
        check_cascade(chosen | change, "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cascade": "stem@0.50:0.9/full"}, r"best\.cascade: this cascade is written stem@0\.5:0\.9/full"),
        ({"left": [100.0] * 16}, r"best\.left: expected a number for each of"),
        ({"member_macs": [1, 2, 3, 4]}, r"best\.member_macs: expected a number for each of"),
        ({"heldout_left": [50, 500]}, r"best\.heldout_left\[1\]: expected a number from 0 to 100"),
        ({"surplus": 1}, "'surplus': unknown key"),
    ],
)
def test_a_row_that_is_not_valid(first, change, message):
    context, artifact, _ = first
    chosen = document(artifact, context)
    with pytest.raises(ValueError, match=message):
        check_cascade(chosen | {"best": chosen["best"] | change}, "")


def test_full_is_named_once(first):
    context, artifact, _ = first
    assert document(artifact, context)["candidates"] == TEXTS
    assert FULL in chosen_cascades(artifact, context, ["stem", "layer2.0"])


# Evaluation of cascades


def test_cascades_are_evaluated_beside_instances(first, tmp_path, make_listener):
    there, artifact, _ = first
    shutil.copytree(there.path, tmp_path / "store")
    context = Context(path=tmp_path / "store", report=make_listener())
    chosen = document(artifact, context)
    texts = ["stem@0.5:0.9/full", chosen["best"]["cascade"]]
    network = open_network("tiny", context)
    for split in ("test", "holdout"):
        stage = Evaluate(network, named(TEXTS, ["stem", "layer2.0"]), split, cascades=[Cascade.parse(text) for text in texts])
        with_cascades = document(Plan(context).run(stage), context)
        plain = document(evaluate(network, context, TEXTS, split), context)
        assert {key: value for key, value in with_cascades.items() if key != "cascades"} == plain
        for text, row in zip(texts, with_cascades["cascades"], strict=True):
            top1, loss, macs, left = play(context, {"cascade": text}, split)
            assert (row["cascade"], row["macs"], row["params"]) == (text, round(macs), plain["rows"][0]["params"])
            assert (row["top1"], row["left"]) == (pytest.approx(top1), pytest.approx(left))
            assert row["loss"] == pytest.approx(loss, rel=1e-4)
            assert row["top5"] >= row["top1"]
    assert {key: chosen["best"][f"heldout_{key}"] for key in ("top1", "macs", "left")}.items() <= row.items()


@pytest.mark.usefixtures("done")
def test_an_evaluation_without_cascades_has_the_key_that_it_had(context):
    network = open_network("tiny", context)
    plain = key_of(Evaluate(network), context)
    assert key_of(Evaluate(network, cascades=[]), context) == plain
    assert context.by_key(plain).digest == context.store.resolve("tiny.eval").digest
    assert key_of(Evaluate(network, cascades=[Cascade.parse("stem@0.5:0.9/full")]), context) != plain


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"left": [50.0, 25.0, 25.0]}, r"cascades\[0\]\.left: expected a number for each of 2 members, found 3"),
        ({"macs": 0}, r"cascades\[0\]\.macs: expected a whole number"),
        ({"cascade": "full"}, r"cascades\[0\]\.cascade: a cascade has 2 to 16 members, got 1"),
    ],
)
def test_a_table_with_a_cascade_that_is_not_valid(change, message):
    cost = {"macs": 9, "params": 4, "relative": 1.0, "top1": 50.0, "top5": None, "loss": 1.5}
    cascade = {"cascade": "stem@0.5:0.9/full", "worst_macs": 12, "member_macs": [3, 9], "left": [50.0, 50.0]} | cost
    table = {"images": 4, "rows": [cost | {"instance": "full"}]}
    check_evaluation(table | {"cascades": [cascade]}, "")
    with pytest.raises(ValueError, match=message):
        check_evaluation(table | {"cascades": [cascade | change]}, "")
