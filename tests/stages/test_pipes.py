"""The network in two pipes through every stage: it is an architecture like any other."""

import itertools

import pytest
import torch
from stage_calls import calibrate, document, evaluate, export, profile, run, search, train

import sdpctl
from sdpctl.engine.cost import Costs
from sdpctl.errors import InstanceError, RecipeError, RunInterruptedError
from sdpctl.instance import FULL, Instance
from sdpctl.recipe.load import parse_recipe
from sdpctl.search.environment import SearchEnv
from sdpctl.search.space import Space
from sdpctl.stages.context import Context
from sdpctl.stages.draws import make_draw
from sdpctl.stages.interruption import Interruption
from sdpctl.stages.layers import empty_model
from sdpctl.stages.network import grid, open_network

RECIPE = """
name: pipes
model: {arch: twopipe, in_channels: 1, widths: [6, 8, 10, 10, 12]}
data: {dataset: digits, image_size: 8, batch_size: 128, workers: 0, augment: crop}
sdpoint: {ratios: [0.75, 0.5]}
train: {epochs: 2, lr: 0.1, validate: {instances: [full, all@0.5], batches: 2}}
calibrate: {batches: 3}
search: {images: 60, calibration_batches: 1, rescore: 3, max_macs: 60%, evaluations: 20, ratios: [1, 0.5]}
"""


def read(*overrides):
    return parse_recipe(RECIPE, "pipes.yaml", overrides)


@pytest.fixture(scope="module")
def done(tmp_path_factory, make_listener):
    context = Context(path=tmp_path_factory.mktemp("pipes") / "store", report=make_listener())
    return context, run(read(), context)


def test_the_grid_shrinks_all_together():
    assert [str(i) for i in grid(read())] == ["full", "all@0.75", "all@0.5"]


def test_a_step_draws_a_share_for_all_or_one_for_each():
    together, each = make_draw(read()), make_draw(read("sdpoint.draw=independent"))
    drawn = [instance for step in range(3000) for instance in together(step)]
    shares = {i: drawn.count(i) / 3000 for i in grid(read())}
    assert set(drawn) == set(shares)
    assert all(abs(share - 1 / 3) < 0.04 for share in shares.values())
    assert len({each(step) for step in range(2000)}) == 3**4


def test_run_shows_every_share(done):
    context, artifacts = done
    rows = document(artifacts["eval-instances"], context)["rows"]
    assert [row["instance"] for row in rows] == ["full", "all@0.75", "all@0.5"]
    macs = [row["macs"] for row in rows]
    assert macs == sorted(macs, reverse=True)
    assert all(row["top1"] > 15 for row in rows)


def test_statistics_are_kept_by_what_the_convolutions_before_did(done):
    context, artifacts = done
    nodes = document(artifacts["calibrate-bn"], context)["nodes"]
    assert nodes["conv1@0.5"] == ["bn1"]
    assert nodes["conv1@0.5+conv2@0.5"] == ["bn2"]
    assert nodes["conv1@0.5+conv2@0.5+conv3@0.5+conv4@0.5"] == ["bn4", "bn5"]
    assert nodes["full"] == ["bn1", "bn2", "bn3", "bn4", "bn5"]


def test_the_search_finds_shares_for_each_convolution(done):
    context, artifacts = done
    result = document(artifacts["search"], context)
    assert result["space"]["points"] == ["conv1", "conv2", "conv3", "conv4"]
    assert result["space"]["networks"] == 16
    assert result["best"]["relative"] <= 0.6
    for row in result["pareto"]:
        macs = Costs(empty_model(read().model), (1, 8, 8)).of(Instance.parse(row["instance"])).macs
        assert row["macs"] == macs


def test_its_space_is_that_of_brute_force():
    costs = Costs(empty_model(read().model), (1, 9, 9))
    shares = (1.0, 0.7, 0.5, 0.45)
    space = Space(costs, dict.fromkeys(("conv1", "conv2", "conv3", "conv4"), shares))
    kept = [{share: max(1, round(width * share)) for share in shares} for width in (6, 8, 10, 10)]
    everything = {}
    for choice in itertools.product(shares, repeat=4):
        instance = Instance(tuple(zip(costs.model.points, choice, strict=True)))
        everything.setdefault(tuple(k[c] for k, c in zip(kept, choice, strict=True)), set()).add(costs.of(instance).macs)
    assert all(len(macs) == 1 for macs in everything.values())
    assert space.count() == len(everything)
    assert space.full == costs.of(FULL).macs == max(macs for (macs,) in everything.values())
    assert space.least == min(macs for (macs,) in everything.values())
    budget = (space.full + space.least) // 2
    networks = list(space.networks(budget))
    assert len(networks) == len(set(networks)) == sum(macs <= budget for (macs,) in everything.values())
    assert all(space.cost(network) == costs.of(network).macs <= budget for network in networks)
    assert space.canonical(Instance.parse("all@0.5")) == space.canonical(
        Instance.parse("+".join(f"conv{i}@0.5" for i in range(1, 5)))
    )


def test_an_agent_can_walk_it():
    from stable_baselines3.common.env_checker import check_env

    costs = Costs(empty_model(read().model), (1, 8, 8))
    space = Space(costs, dict.fromkeys(costs.model.points, (1, 0.5, 0.25)))
    env = SearchEnv(space, (space.full + space.least) // 2, lambda instances: [1.0 for _ in instances])
    check_env(env, warn=False)
    env.reset()
    for _ in range(4):
        *_, info = env.step(0)
    assert info["macs"] == costs.of(Instance.parse(info["instance"])).macs


@pytest.mark.parametrize("form", ["onnx", "torch-export", "bundle"])
def test_exports_run_outside(done, form):
    context, _ = done
    instance = "" if form == "bundle" else ", instance: conv1@0.5+conv3@0.25+conv4@0.9"
    exported = export(open_network("pipes", context, [f"export={{format: {form}{instance}}}"]), context)
    described = document(exported, context)
    assert described["network"]["widths"] == [6, 8, 10, 10, 12]
    if form == "bundle":
        model = sdpctl.load(exported.tag, store=context.path, device="cpu")
        x = torch.randn(3, 1, 8, 8)
        for option in model.instances:
            torch.testing.assert_close(
                model(x, max_macs=option.macs), model(x, instance=model.pick(max_macs=option.macs).instance)
            )
        assert [str(option.instance) for option in model.instances] == ["all@0.5", "all@0.75", "full"]


def test_random_masks_go_on_to_the_same_digest(tmp_path, make_listener, monkeypatch):
    recipe = read("model.masks=random", "train.epochs=3", "train.checkpoint.epochs=1")
    whole = Context(path=tmp_path / "whole", report=make_listener())
    finished = train(recipe, whole)
    assert finished.digest != train(read("train.epochs=3"), whole).digest
    parts = Context(path=tmp_path / "parts", report=make_listener())
    stopped = Interruption.__enter__

    def at_once(self):
        entered = stopped(self)
        entered.signum = 15
        return entered

    with monkeypatch.context() as patch:
        patch.setattr(Interruption, "__enter__", at_once)
        with pytest.raises(RunInterruptedError):
            train(recipe, parts)
    torch.manual_seed(99)
    assert train(recipe, parts, resume=True).digest == finished.digest


def test_costs_need_no_weights(done, tmp_path):
    context, _ = done
    rows = document(profile(read(), context, grid(read()), "pipes"), context)["rows"]
    assert [row["segments"][1]["name"] for row in rows] == ["conv1"] * 3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.stem=imagenet", "model.stem: twopipe has no stem to choose"),
        ("model.widths=[4, 4, 4]", "model.widths: this list should have at least 5 items"),
        ("model.widths=[4, 4, 4, 4, 0]", "model.widths.4: this should be greater than or equal to 1"),
        ("model.masks=drawn", "model.masks: this should be 'nested' or 'random'"),
        ("sdpoint.points=[conv1]", "sdpoint.points: the points of twopipe go together"),
        ("data.image_size=3", "3 px is too small for twopipe"),
        ("train.validate.instances=[conv5@0.5]", "the network has no point 'conv5'"),
    ],
)
def test_what_a_recipe_may_not_say(override, words):
    with pytest.raises(RecipeError) as caught:
        read(override)
    assert words in str(caught.value)


@pytest.mark.parametrize("key", ["widths=[4, 4, 4, 4, 4]", "masks=random"])
def test_other_networks_have_no_widths_and_masks(key):
    with pytest.raises(
        RecipeError, match=r"has no (widths|masks) to choose; remove this key, or use a network of the family twopipe"
    ):
        read("model={arch: resnet20, in_channels: 1}", f"model.{key}")


def test_a_share_of_what_is_no_convolution(done):
    context, _ = done
    opened = open_network("pipes", context)
    with pytest.raises(InstanceError, match="no point 'layer1'"):
        calibrate(opened, context, ["layer1@0.5"])
    found = evaluate(opened, context, ["all@0.5", "all@0.5+conv1@0.75"])
    assert [row["instance"] for row in document(found, context)["rows"]] == ["all@0.5", "all@0.5+conv1@0.75"]


def test_the_search_stage_takes_its_own_points(done):
    context, _ = done
    found = search(open_network("pipes", context, ["search.points=[conv2, conv3]", "search.max_macs=90%"]), context)
    assert document(found, context)["space"]["points"] == ["conv2", "conv3"]
