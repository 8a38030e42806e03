"""Agents as artifacts: what a training commits, what others make of it, what is refused, and how it ends after a kill."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from command import called
from other_search import another_search
from safetensors.torch import load, save
from stage_calls import search, train

from sdpctl.errors import IntegrityError, NotFoundError, RecipeError, UsageError
from sdpctl.instance import FULL, Instance
from sdpctl.kinds import AGENT_DOCUMENT, POLICY
from sdpctl.plan import Plan
from sdpctl.recipe.load import parse_recipe
from sdpctl.search.environment import ENTRIES
from sdpctl.search.scoring import Scorer
from sdpctl.search.study import open_storage
from sdpctl.stages import search as stages_search
from sdpctl.stages.agent import TrainAgent
from sdpctl.stages.context import Context
from sdpctl.stages.layers import read_agent, read_document, read_records
from sdpctl.stages.network import open_network

pytestmark = pytest.mark.usefixtures("quick_sqlite")

POINTS = ["stem", *(f"layer{i}.{j}" for i in (1, 2, 3) for j in (0, 1, 2))]
SCORED = (f"search.points=[{', '.join(POINTS)}]", "search.images=60", "search.calibration_batches=1", "search.rescore=3")
LEARNING = (
    *SCORED,
    "search.strategy=ppo",
    "search.budgets=30%..90%",
    "search.evaluations=32",
    "search.agent.imagined=64",
    "search.agent.hidden=[16]",
)


def learn(context, *overrides, force=False):
    network = open_network("tiny", context, [*LEARNING, *overrides])
    return Plan(context, force=force).run(TrainAgent(network, anew=force))


def propose(context, *overrides, ref="tiny", evaluations=0):
    asked = ("search.strategy=agent", "search.policy=tiny.agent", f"search.evaluations={evaluations}")
    artifact = search(open_network(ref, context, [*SCORED, *asked, *overrides]), context)
    return read_document(context.store, artifact)


@pytest.fixture(scope="module")
def taught(trained, make_once, make_listener):
    """A store with the tiny network and its agent."""

    def fill(path):
        shutil.copytree(trained, path, dirs_exist_ok=True)
        learn(Context(path=path, report=make_listener()))

    return make_once("tiny-taught", fill)


@pytest.fixture
def context(taught, tmp_path, listener):
    shutil.copytree(taught, tmp_path / "store")
    return Context(path=tmp_path / "store", report=listener)


def test_what_is_committed(context):
    artifact = context.store.resolve("tiny.agent")
    document = read_document(context.store, artifact)
    full = document["space"]["full"]
    assert artifact.kind == "agent"
    assert artifact.subject.digest == context.store.resolve("tiny").digest
    assert (document["strategy"], document["ratios"], document["evaluations"]) == ("ppo", [1.0, 0.75, 0.5], 32)
    budgets = [row["budget"] for row in document["proposals"]]
    assert (budgets[0], budgets[-1], len(budgets)) == (int(0.3 * full), int(0.9 * full), 13)
    assert all(row["macs"] <= row["budget"] for row in document["proposals"])
    assert {(row["heldout"]["images"], row["test"]["images"]) for row in document["proposals"]} == {(143, 359)}
    scored = {row["instance"]: row["reward"] for row in read_records(context.store, artifact, "trials.jsonl")}
    assert len(scored) == 32
    curve = read_records(context.store, artifact, "curve.jsonl")
    assert curve[-1]["evaluations"] == 32
    assert all(a["evaluations"] < b["evaluations"] for a, b in pairwise(curve))

    table = load(context.store.read(artifact, "rollouts.safetensors"))
    steps, walks = len(POINTS), len(table["walk"]) // len(POINTS)
    assert walks >= 32
    assert table["state"].shape == table["next_state"].shape == (walks * steps, len(ENTRIES))
    whole = {name: column.reshape(walks, steps, *column.shape[1:]) for name, column in table.items()}
    torch.testing.assert_close(whole["state"][:, 1:], whole["next_state"][:, :-1], rtol=0, atol=0)
    torch.testing.assert_close(whole["state"][:, 0, 0], torch.zeros(walks), rtol=0, atol=0)
    torch.testing.assert_close(whole["next_state"][:, -1, 0], torch.ones(walks), rtol=0, atol=0)
    assert not whole["reward"][:, :-1].any()
    space = space_of(context)
    for taken, reward, budget in zip(whole["taken"], whole["reward"][:, -1], whole["budget"][:, 0], strict=True):
        choices = [(point, document["ratios"][action]) for point, action in zip(POINTS, taken.tolist(), strict=True)]
        network = space.canonical(Instance(tuple(choices)))
        assert reward.item() == pytest.approx(scored[str(network)])
        assert budget >= int(0.3 * full)


def space_of(context):
    from sdpctl.stages.search import SearchSpace

    return SearchSpace(open_network("tiny", context, LEARNING), context).space


def test_it_is_trained_once_and_again_to_the_same_digest(context, monkeypatch):
    before = context.store.resolve("tiny.agent")
    monkeypatch.setattr(Scorer, "score", None)
    assert learn(context).digest == before.digest
    monkeypatch.undo()
    assert learn(context, force=True).digest == before.digest
    dry = replace(context, dry_run=True)
    assert learn(dry).digest == before.digest
    assert learn(dry, "search.agent.lr=0.01") is None  # it would be trained


def test_the_first_proposal_is_the_answer_without_an_evaluation(context):
    for budget in ("35%", "62%"):
        result = propose(context, f"search.max_macs={budget}")
        assert result["evaluations"] == 1  # scored for the table alone
        assert [row["run"] for row in result["runs"]] == ["agent"]
        assert result["best"]["macs"] <= result["budget"]["macs"]
    assert context.tagged("tiny.search.35pct").digest != context.tagged("tiny.search.62pct").digest


def test_the_table_shows_the_answers_of_the_agent(context):
    document = read_document(context.store, context.store.resolve("tiny.agent"))
    for row in document["proposals"][::6]:
        best = propose(context, f"search.max_macs={row['budget']}")["best"]
        assert (best["instance"], best["macs"], best["heldout"]) == (row["instance"], row["macs"], row["heldout"])


@pytest.mark.parametrize(
    ("overrides", "known"),
    [
        ([], True),
        (["calibrate.image_size=10", "evaluate.image_size=10"], False),
        (["search.points=[layer1.0, layer2.0, layer3.0, layer3.1]"], False),
        (["search.reward=amc"], False),
        (["search.reward=branch", "search.weight=2.0"], False),
    ],
)
def test_earlier_scores_count_for_the_same_network_size_and_reward(context, monkeypatch, overrides, known):
    read = []
    monkeypatch.setattr(stages_search, "read_agent", lambda *_, known: read.append(known) or read_agent(*_, known=known))
    propose(context, *overrides)
    assert read == [known]


def test_more_evaluations_refine_the_proposals(context):
    first = propose(context)["best"]["instance"]
    result = propose(context, evaluations=12)
    runs = {row["run"]: row for row in result["runs"]}
    assert runs["agent"]["evaluations"] == runs["random"]["evaluations"] == 12
    asked = {
        row["instance"]
        for row in read_records(context.store, context.store.resolve("tiny.search"), "trials.jsonl")
        if "agent.0" in row["runs"]
    }
    assert first in asked


OTHER = """
name: other
seed: 5
model: {arch: resnet32, in_channels: 1}
data: {dataset: digits, image_size: 12, batch_size: 128, workers: 0, augment: crop}
sdpoint: {ratios: [0.5]}
train: {epochs: 0}
calibrate: {batches: 3}
"""


def test_it_proposes_for_a_different_network_image_size_and_checkpoint(context):
    train(parse_recipe(OTHER, "other.yaml"), context)
    asked = ["search.strategy=agent", "search.policy=tiny.agent", "search.evaluations=0", "search.calibration_batches=1"]
    result = read_document(context.store, search(open_network("other", context, asked), context))
    assert result["best"]["macs"] <= result["budget"]["macs"] == int(0.5 * result["space"]["full"])


FRESH = """
import sys
from pathlib import Path
import numpy as np
from sdpctl.cli.output import Output
from sdpctl.search.problem import Problem
from sdpctl.stages.context import Context
from sdpctl.stages.layers import read_agent
from sdpctl.stages.network import open_network
from sdpctl.stages.search import SearchSpace
context = Context(path=Path(sys.argv[1]), report=Output())
space = SearchSpace(open_network("tiny", context, sys.argv[2:]), context).space
for known in (False, True):
    agent = read_agent(context.store, context.store.resolve("tiny.agent"), known=known)
    for share in (0.3, 0.5, 0.8):
        problem = Problem(space, int(share * space.full), 1, 0)
        print(*map(str, agent.proposals(problem, {}, np.random.default_rng(1))), sep=",")
"""


def test_a_fresh_process_proposes_the_same(context, capsys, monkeypatch):
    command = [sys.executable, "-c", FRESH, str(context.path), *LEARNING]
    fresh = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    monkeypatch.setattr(sys, "argv", ["", str(context.path), *LEARNING])
    exec(compile(FRESH, "fresh", "exec"), {})
    assert capsys.readouterr().out == fresh
    lines = fresh.splitlines()
    assert len(set(lines)) == 6
    assert all(len(line.split(",")) > 5 for line in lines)


def replaced(context, **layers):
    """Commit the agent with other layers in place of its own; return a context whose `tiny.agent` it is."""
    artifact = context.store.resolve("tiny.agent")
    content = {title: context.store.read(artifact, title) for title in artifact.layers} | layers
    context.store.commit("agent", content, subject=context.store.resolve("tiny"), tag="tiny.agent")


def changed_policy(context, change):
    artifact = context.store.resolve("tiny.agent")
    weights = load(context.store.read(artifact, POLICY))
    return save(change(weights))


class Hostile:
    def __reduce__(self):
        return os.system, ("touch run-by-a-pickle",)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda weights: weights | {"0.weight": torch.zeros(16, 3)}, r"0\.weight is F32 \[16, 3\], expected F32"),
        (lambda weights: {name: w for name, w in weights.items() if name != "1.bias"}, r"1\.bias"),
        (lambda weights: weights | {"2.weight": torch.zeros(1)}, r"2\.weight"),
        (lambda weights: weights | {"1.bias": torch.full((3,), float("nan"))}, r"1\.bias holds values that are not finite"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused(context, change, told):
    replaced(context, **{POLICY: changed_policy(context, change)})
    with pytest.raises(IntegrityError, match=told):
        propose(context)


def test_a_pickle_in_place_of_a_policy_is_refused_and_not_run(context, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    replaced(context, **{POLICY: pickle.dumps(Hostile())})
    with pytest.raises(IntegrityError, match=r"policy\.safetensors does not fit agent\.json"):
        propose(context)
    assert not (tmp_path / "run-by-a-pickle").exists()


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("hidden", [10**9], "hidden"),
        ("activation", "os.system", "activation"),
        ("actions", 0, "actions"),
        ("temperature", 0, "temperature"),
        ("entries", "passed", "entries"),
    ],
)
def test_a_document_of_a_stranger_is_refused(context, key, value, told):
    document = read_document(context.store, context.store.resolve("tiny.agent"))
    document["policy"][key] = value
    replaced(context, **{AGENT_DOCUMENT: json.dumps(document).encode()})
    with pytest.raises(IntegrityError, match=told):
        propose(context)


def test_an_agent_of_other_observations_or_ratios_is_refused(context):
    with pytest.raises(
        UsageError, match=r"chooses among the ratios 1, 0\.75, 0\.5, and .* has 1, 0\.5; give --ratios 1,0\.75,0\.5"
    ):
        propose(context, "search.ratios=[1, 0.5]")
    document = read_document(context.store, context.store.resolve("tiny.agent"))
    document["policy"]["entries"] = document["policy"]["entries"][::-1]
    replaced(context, **{AGENT_DOCUMENT: json.dumps(document).encode()})
    with pytest.raises(UsageError, match=r"was trained on the observations of a different version of sdpctl; train it again"):
        propose(context)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["search.strategy=surrogate"], r"search\.budgets: .*set search\.strategy to dqn, ppo or reinforce"),
        (["search.compare=[ppo, dqn]"], r"search\.budgets: an agent learns a range"),
        (["search.seeds=2"], r"search\.seeds: one agent is trained"),
        (["search.evaluations=1"], r"search\.evaluations: 1 is too few"),
        (["search.policy=tiny.agent"], r"search\.policy: only the strategy agent has a policy"),
        (["search.budgets=90%..30%"], r"write the lower budget first"),
    ],
)
def test_keys_that_do_not_go_together(context, overrides, told):
    with pytest.raises(RecipeError, match=told):
        learn(context, *overrides)


def test_options_override_the_range_of_a_recipe(context):
    text = OTHER.replace("other", "ranged") + "search: {strategy: ppo, budgets: 30%..90%}\n"
    train(parse_recipe(text, "ranged.yaml"), context)
    for options, tag in (
        ([], "ranged.agent"),
        (["--max-macs", "40%"], "ranged.search"),
        (["--agent", "tiny.agent"], "ranged.search"),
    ):
        done = called(context.path.parent, "search", "ranged", "--store", context.path, "--dry-run", "--json", *options)
        assert done.returncode == 0, done.stderr
        assert [step["tag"] for step in json.loads(done.stdout)["plan"]][-1] == tag


def test_what_is_not_an_agent(context):
    with pytest.raises(NotFoundError, match=r"search\.policy=tiny is of kind checkpoint, not an agent"):
        propose(context, "search.policy=tiny")
    with pytest.raises(UsageError, match=r"the same ratios at every point; remove search\.ratios_at"):
        learn(context, "search.ratios_at={stem: [1, 0.5]}")


def test_killed_and_gone_on_to_the_same_digest_scoring_nothing_twice(trained, taught, tmp_path, listener, monkeypatch):
    store = shutil.copytree(trained, tmp_path / "store")
    open_storage(f"sqlite:///{store / 'studies.sqlite'}").engine.dispose()
    with another_search(store, tmp_path / "log", LEARNING, dies=2) as killed:
        killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    context, passes, score = Context(path=store, report=listener), [], Scorer.score

    def watched(self, instances):
        passes.append([str(instance) for instance in instances if instance not in self.known and instance != FULL])
        return score(self, instances)

    monkeypatch.setattr(Scorer, "score", watched)
    assert learn(context).digest == Context(path=taught, report=listener).store.resolve("tiny.agent").digest
    networks = [*(tmp_path / "log").read_text().split(), *chain(*passes)]
    assert len(set(networks)) == len(networks) >= 32


def test_proposals_for_a_known_network_are_ranked_by_what_was_scored(context):
    space = space_of(context)
    artifact = context.store.resolve("tiny.agent")
    from sdpctl.search.problem import Problem
    from sdpctl.search.proxy import Proxy

    agent = read_agent(context.store, artifact, known=True)
    problem = Problem(space, int(0.6 * space.full), 1, 0)
    ranked = agent.proposals(problem, {}, np.random.default_rng(0))
    proxy = Proxy(space, agent.rewards)
    expected = proxy.features(ranked) @ proxy.ridge.coef_
    assert expected.tolist() == sorted(expected, reverse=True)
    assert {network for network in agent.rewards if space.cost(network) <= problem.budget} <= set(ranked)
    assert all(space.cost(network) <= problem.budget for network in ranked)
