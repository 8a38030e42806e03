"""The strategies on landscapes that are functions of the instance: what they may ask for, and what they find."""

import math
import random
import statistics
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import chain, pairwise

import numpy as np
import optuna
import pytest
import torch

from sdpctl.engine.cost import Costs
from sdpctl.engine.evaluate import Score
from sdpctl.instance import FULL, Instance
from sdpctl.models import create_model
from sdpctl.randomness import stream
from sdpctl.search import agents
from sdpctl.search.catalog import BASELINE, STRATEGIES
from sdpctl.search.environment import ENTRIES, SearchEnv
from sdpctl.search.kept import Agent
from sdpctl.search.policy import Policy, Shaped
from sdpctl.search.problem import IDLE, Evaluations, Problem, Spent
from sdpctl.search.run import fixed_list, load_strategy, ranking
from sdpctl.search.settings import AgentSettings
from sdpctl.search.space import Space
from sdpctl.search.strategies import NETWORKS_PER_PASS

WARM = [name for name in STRATEGIES if name not in ("uniform", "exhaustive", "agent")]
LEARNING = [name for name, strategy in STRATEGIES.items() if strategy.learns]
SIX = ("layer1.0", "layer1.1", "layer1.2", "layer2.0", "layer2.1", "layer2.2")
NINE = (*SIX, "layer3.0", "layer3.1", "layer3.2")


@pytest.fixture(autouse=True)
def _quiet():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


@cache
def space(size=24, points=SIX):
    """Return a space of three ratios at each point; by default it has 435 networks."""
    with torch.device("meta"):
        model = create_model("resnet20", num_classes=10, in_channels=1)
    return Space(Costs(model, (1, size, size)), dict.fromkeys(points, (1, 0.75, 0.5)))


def tiny():
    """Return a space of few networks."""
    return space(12, ("layer1.0", "layer2.0"))


def problem_of(where, share, evaluations, seed=0):
    return Problem(where, None if share is None else int(share * where.full), evaluations, seed)


def rugged(instance):
    """Return a reward to which neighbouring points contribute together."""
    parts = [f"{point}@{ratio}" for point, ratio in instance.choices]
    return sum(stream(0, part).random() for part in parts) - sum(stream(1, *pair).random() for pair in pairwise(parts))


def constant(instance):
    return 1.0


def additive(landscape):
    """Return a reward to which each point contributes by itself, for better or worse."""

    def reward(instance):
        return sum(stream(landscape, point, str(ratio)).uniform(-1, 1) for point, ratio in instance.choices)

    return reward


def untrained():
    """Return an agent that prefers ratio 1 and has learned nothing else."""
    shaped = Shaped(3, (8,), "tanh", 1.0)
    weights = {name: torch.zeros(tensor.shape) for name, tensor in shaped.blank().items()}
    weights["1.bias"][0] = 2
    return Agent(Policy(shaped, weights), (1.0, 0.75, 0.5))


def play(name, problem, reward=rugged):
    """Let a strategy run to its end; return what it asked for, in order."""
    asked = []
    if name == "agent":
        problem = replace(problem, trained=untrained())

    def answer(wanted, limit):
        assert limit == problem.evaluations
        fresh = wanted[: limit - len(asked)]
        asked.extend(fresh)
        return {instance: reward(instance) for instance in fresh}

    with suppress(Spent):
        load_strategy(name)(problem, Evaluations(problem.evaluations, answer))
    return asked


def random_states():
    _, keys, *rest = np.random.get_state()
    return random.getstate(), (keys.tolist(), *rest), torch.get_rng_state().tolist(), torch.get_num_threads()


@pytest.mark.parametrize("share", [0.5, None], ids=["half", "no budget"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_asks_for_distinct_networks_within_the_budget_until_the_evaluations_are_used_up(name, share):
    problem = problem_of(space(), share, 24)
    within = set(space().networks(problem.limit))
    assert len(within) > 24
    for reward in (rugged, constant):
        asked = play(name, problem, reward)
        assert len(asked) == len(set(asked)) == 24
        assert set(asked) <= within


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_is_a_function_of_its_seed_and_touches_no_other_randomness(name):
    runs = []
    for seed, elsewhere in ((3, 1), (3, 2), (4, 2)):
        random.seed(elsewhere)
        np.random.seed(elsewhere)
        torch.manual_seed(elsewhere)
        before = random_states()
        runs.append(play(name, problem_of(space(), 0.5, 40, seed)))
        assert random_states() == before
    assert runs[0] == runs[1]
    assert (runs[2] == runs[0]) == (name == "exhaustive")


@pytest.mark.parametrize("share", [0.5, None], ids=["half", "no budget"])
def test_all_strategies_but_three_begin_with_the_same_networks_near_the_budget(share):
    problem = problem_of(space(), share, 26, seed=5)
    assert problem.warm_start == 13
    begun = {name: play(name, problem)[:13] for name in STRATEGIES}
    same = begun[BASELINE]
    assert {name for name in STRATEGIES if begun[name] == same} == set(WARM)
    if share is not None:
        assert sum(space().cost(network) >= 0.8 * problem.limit for network in same) >= 12


@pytest.mark.parametrize(("evaluations", "warm"), [(2, 1), (3, 1), (40, 20), (64, 32), (65, 32), (1000, 32)])
def test_half_of_the_evaluations_and_at_most_32_are_warm_start(evaluations, warm):
    assert problem_of(space(), 0.5, evaluations).warm_start == warm


@pytest.mark.parametrize("evaluations", [2, 3])
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_fewest_evaluations_that_a_recipe_may_ask_for(name, evaluations):
    assert len(play(name, problem_of(space(), 0.5, evaluations))) == evaluations


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_ends_where_nothing_new_is_left(name, monkeypatch):
    monkeypatch.setattr("sdpctl.search.problem.IDLE", 8)
    few = tiny()
    networks = list(few.networks(few.full))
    assert len(networks) == few.count() < 10
    asked = play(name, problem_of(few, None, 50), few.cost)
    assert len(asked) == len(set(asked)) >= 2
    assert set(asked) <= set(networks)
    cheapest = networks[-1]
    assert few.cost(cheapest) == few.least
    assert play(name, Problem(few, few.least, 50, 0)) == [cheapest]


@pytest.mark.parametrize("share", [0.9, 1.0, 1.5])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_loose_budget_leaves_no_evaluation_unused(name, share):
    """Few networks are near such a budget; hundreds are within."""
    assert len(play(name, problem_of(space(), share, 24))) == 24


def test_exhaustive_asks_for_every_network_and_a_list_for_those_it_has():
    networks = list(space(32, NINE).networks(space(32, NINE).full))
    passes = []

    def answer(wanted, limit):
        passes.append(list(wanted))
        return dict.fromkeys(wanted, 0.0)

    problem = problem_of(space(32, NINE), None, 10_000)
    load_strategy("exhaustive")(problem, Evaluations(10_000, answer))
    assert list(chain(*passes)) == networks
    assert all(len(asked) <= NETWORKS_PER_PASS for asked in passes)
    passes.clear()
    fixed_list(networks[:600])(problem, Evaluations(10_000, answer))
    assert passes == [networks[:NETWORKS_PER_PASS], networks[NETWORKS_PER_PASS:600]]


@pytest.mark.parametrize("share", [0.3, 0.4, 0.5, 0.7])
def test_networks_near_the_budget_use_most_of_it_and_never_exceed_it(share):
    problem = problem_of(space(), share, 24)
    draws = [problem.near_budget(stream(number, "test")) for number in range(200)]
    assert set(draws) <= set(space().networks(problem.budget))
    assert statistics.mean(space().cost(network) >= 0.8 * problem.budget for network in draws) >= 0.95
    assert len(set(draws)) > 10


def test_without_a_budget_networks_are_drawn_at_every_cost():
    problem = problem_of(space(), None, 24)
    costs = [space().cost(problem.near_budget(stream(number, "test"))) for number in range(200)]
    per_quarter = np.histogram(costs, 4, (space().least, space().full))[0]
    assert per_quarter.min() > 20


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0, None])
def test_candidates_are_new_and_lie_near_the_budget_and_then_below_it(share):
    where = space(32, NINE)
    problem = problem_of(where, share, 24)
    seen = set(problem.candidates(stream(0, "test"), 10, set()))
    earlier = set(seen)
    assert len(earlier) == 10
    found = problem.candidates(stream(1, "test"), 150, seen)
    assert len(found) == len(set(found)) == 150
    assert not earlier & set(found)
    assert seen == earlier | set(found)
    assert seen <= set(where.networks(problem.limit))
    if share is not None:
        near = [0.8 < where.cost(network) / problem.limit < 1 for network in (*earlier, *found)]
        assert sum(near) >= 10


def test_uniform_walks_reach_every_network_within_the_budget_and_no_other():
    few = tiny()
    for budget in (few.least, (few.least + few.full) // 2, few.full):
        problem = Problem(few, budget, 24, 0)
        assert {problem.uniform(stream(number, "test")) for number in range(100)} == set(few.networks(budget))


def test_distinct_draws_are_new_and_end_where_nothing_new_comes():
    few = tiny()
    problem, numbers = Problem(few, few.full, 24, 0), stream(0, "test")
    networks = set(few.networks(few.full))
    seen = {FULL}
    first = problem.distinct(problem.uniform, numbers, 2, seen)
    assert len(set(first)) == 2
    assert seen == {FULL, *first}
    rest = problem.distinct(problem.uniform, numbers, 50, seen)
    assert len(rest) == len(networks) - 3
    assert seen == networks
    assert problem.distinct(problem.uniform, numbers, 50, seen) == []


def test_the_surrogate_finds_the_best_of_additive_landscapes():
    """The best networks are near the budget, and shrink at several points."""
    where = space(32, NINE)
    regrets = {"surrogate": [], "random": [], "uniform": []}
    for landscape in (5, 11):
        reward = additive(landscape)
        best = max(where.networks(where.full // 2), key=reward)
        assert where.cost(best) >= 0.8 * (where.full // 2)
        assert len(best.choices) >= 3
        for name, all_of_them in regrets.items():
            for seed in range(4):
                all_of_them.append(reward(best) - max(map(reward, play(name, problem_of(where, 0.5, 64, seed), reward))))
    assert regrets["surrogate"].count(0) > 5
    assert 3 * statistics.mean(regrets["surrogate"]) < statistics.mean(regrets["random"]) < statistics.mean(regrets["uniform"])


@pytest.mark.parametrize(
    ("name", "evaluations"),
    [("surrogate", 64), ("dqn", 100), ("ppo", 200), ("reinforce", 200), ("tpe", 120), ("nsga2", 120), ("greedy", 120)],
)
def test_what_learns_asks_for_better_networks_in_the_end_than_in_the_beginning(name, evaluations):
    where, reward = space(32, NINE), additive(5)
    settings = AgentSettings(lr=1e-2) if name == "reinforce" else AgentSettings()  # it makes one step for each batch
    problem = replace(problem_of(where, 0.5, evaluations), agent=settings)
    rewards = list(map(reward, play(name, problem, reward)))
    baseline = list(map(reward, play("random", problem_of(where, 0.5, evaluations), reward)))
    assert rewards[:32] == baseline[:32]
    assert statistics.mean(rewards[-30:]) > max(statistics.mean(baseline[:32]), statistics.mean(baseline[-30:])) + 0.2


def test_the_replay_memory_holds_the_actions_taken(monkeypatch):
    problem = problem_of(space(), 0.4, 48)
    caught, differing = [], 0

    class Watched(agents._SearchDQN):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            caught.append(self)

        def _store_transition(self, replay_buffer, buffer_action, new_obs, reward, dones, infos):
            nonlocal differing
            assert buffer_action.tolist() == [info["proposed"] for info in infos]
            differing += sum(info["proposed"] != info["taken"] for info in infos)
            super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    monkeypatch.setattr(agents, "_SearchDQN", Watched)
    asked = play("dqn", problem)
    assert differing > 0
    (agent,) = caught
    memory, points = agent.replay_buffer, space().points
    warm = [rugged(network) for network in asked[:24]]
    remembered, last_ratio = [], ENTRIES.index("last ratio")
    walks = [[] for _ in range(problem.agent.walks)]
    for row in range(memory.pos):
        for walk, ratios in enumerate(walks):
            before, after = memory.observations[row, walk], memory.next_observations[row, walk]
            passed = round(before[0] * len(points))
            assert passed == row % len(points)
            ratios.append(float(after[last_ratio]))
            assert ratios[-1] == space().ratios[points[passed]][memory.actions[row, walk, 0]]
            assert before[last_ratio] == (ratios[-2] if passed else 1)
            assert after[0] == np.float32((passed + 1) / len(points))
            last = passed == len(points) - 1
            assert memory.dones[row, walk] == last
            if last:
                network = space().canonical(Instance(tuple(zip(points, ratios, strict=True))))
                ratios.clear()
                remembered.append(network)
                standard = (rugged(network) - statistics.mean(warm)) / statistics.pstdev(warm)
                assert memory.rewards[row, walk] == pytest.approx(standard, abs=1e-5)
            else:
                assert memory.rewards[row, walk] == 0
    assert remembered[:24] == asked[:24]
    assert set(remembered) <= set(asked)
    assert len(remembered) > 24


def before_learning(name, problem, monkeypatch):
    """Return an agent as it is when it is about to learn."""
    caught = []
    agent = agents.MaskablePPO if name == "ppo" else agents.DQN
    monkeypatch.setattr(agent, "learn", lambda self, *_, **__: caught.append(self))
    play(name, problem)
    return caught[0]


def test_the_policy_begins_near_ratio_1_and_with_the_better_half_of_the_warm_start(monkeypatch):
    problem = problem_of(space(), 0.5, 40)
    warm = sorted(play("random", problem)[:20], key=rugged)
    worse, better = warm[:10], warm[10:]

    def log_probability(agent, network):
        env, total = SearchEnv(space(), problem.limit, lambda _: [0.0]), 0.0
        observation, _ = env.reset()
        for point in space().points:
            action = space().ratios[point].index(network.ratio(point))
            inputs = (torch.tensor(np.array([a])) for a in (observation, action, env.action_masks()))
            total += agent.policy.evaluate_actions(*inputs)[1].item()
            observation = env.step(action)[0]
        return total

    def mean(agent, networks):
        return statistics.mean(log_probability(agent, network) for network in networks)

    cloned = before_learning("ppo", problem, monkeypatch)
    assert mean(cloned, better) > mean(cloned, worse) + 0.5
    monkeypatch.setattr(agents, "_clone", lambda *_: None)
    fresh = before_learning("ppo", problem, monkeypatch)
    assert mean(cloned, better) > mean(fresh, better) + 0.5
    start = SearchEnv(space(), problem.limit, lambda _: [0.0])
    observation = torch.tensor(start.reset()[0][None])
    assert start.action_masks().all()
    first = fresh.policy.get_distribution(observation).distribution.probs[0, 0].item()
    assert first == pytest.approx(math.exp(2) / (math.exp(2) + 2), abs=0.03)


def test_exploration_mostly_keeps_ratio_1_and_lessens(monkeypatch):
    """What is best is said to be action 9: half of the actions at first, and a fifth in the end, are others."""
    problem = problem_of(space(), 0.5, 40)
    agent = before_learning("dqn", problem, monkeypatch)
    monkeypatch.setattr(agent.policy, "predict", lambda observation, state, *_: (np.full(len(observation), 9), state))
    many = np.zeros((20_000, len(ENTRIES)), dtype=np.float32)
    for used, rate in ((0, 0.5), (0.5, 0.25), (0.9, 0.2)):
        agent.progress = lambda used=used: used
        counts = np.bincount(agent.predict(many)[0], minlength=10) / len(many)
        expected = np.array([rate * 4 / 6, rate * 1 / 6, rate * 1 / 6, 0, 0, 0, 0, 0, 0, 1 - rate])
        np.testing.assert_allclose(counts, expected, atol=0.015)


@pytest.mark.parametrize("name", LEARNING)
def test_every_step_may_have_the_reward_of_the_network(name, monkeypatch):
    settings = AgentSettings(reward="every-step", gamma=0.0)
    problem = replace(problem_of(space(), 0.5, 48), agent=settings)
    kept = []
    if name == "dqn":
        monkeypatch.setattr(agents.DQN, "train", lambda self, *_, **__: kept.append(self.replay_buffer))
    else:

        def train(self):
            buffer = self.rollout_buffer
            kept.append((buffer.rewards.copy(), buffer.returns.reshape(buffer.rewards.shape).copy()))

        monkeypatch.setattr(agents.MaskablePPO, "train", train)
    asked = play(name, problem)
    warm = [rugged(network) for network in asked[:24]]
    expected = {(rugged(network) - statistics.mean(warm)) / statistics.pstdev(warm) for network in asked}
    points = len(space().points)
    if name == "dqn":
        rewards = kept[-1].rewards[3 * points : kept[-1].pos]
    else:
        rewards, returns = kept[-1]
        np.testing.assert_allclose(returns, rewards, atol=1e-5)
    for walk in rewards[:points].T:
        assert set(walk) == {walk[0]}
        assert min(abs(walk[0] - value) for value in expected) < 1e-5


@pytest.mark.parametrize("name", LEARNING)
def test_an_agent_learns_a_range_of_budgets_from_few_evaluations(name):
    """Where each point's contribution is its own, against networks drawn near the same budgets."""
    where, reward = space(32, NINE), additive(5)
    lowest, highest = int(0.3 * where.full), int(0.9 * where.full)
    problem = replace(problem_of(where, 0.9, 96), lowest=lowest)
    known = {}

    def answer(wanted, limit):
        fresh = {network: reward(network) for network in wanted[: limit - len(known)]}
        known.update(fresh)
        return fresh

    learned = agents.learn(name, problem, Evaluations(96, answer))
    assert len(known) == 96
    assert [row["evaluations"] for row in learned.curve] == sorted({row["evaluations"] for row in learned.curve})
    assert learned.curve[-1]["evaluations"] == 96
    assert {walk.instance for walk, _ in learned.walks} == set(known)
    assert all(value == known[walk.instance] for walk, value in learned.walks)
    assert all(lowest <= walk.budget <= highest and walk.spent <= walk.budget for walk, _ in learned.walks)
    agent, gains = Agent(learned.policy, (1.0, 0.75, 0.5), known), []
    for share in range(30, 91, 10):
        within = problem_of(where, share / 100, 10)
        first = agent.proposals(within, {}, np.random.default_rng(0))[0]
        assert where.cost(first) <= within.limit
        drawn = within.candidates(stream(1, "near"), 30, set())
        gains.append(reward(first) - statistics.mean(reward(network) for network in drawn))
    assert min(gains) > 0
    assert statistics.mean(gains) > 1


def test_a_range_ends_when_nothing_new_is_proposed():
    few = tiny()
    problem = replace(problem_of(few, 1, 500), lowest=few.least, agent=AgentSettings(imagined=64))
    asked = play("ppo", problem)
    assert len(asked) == len(set(asked)) <= few.count()
    assert len(asked) > few.count() / 2


def test_the_imagined_walks_cost_no_evaluations_and_all_ranges_are_warm():
    problem = replace(problem_of(space(), 0.9, 40), lowest=int(0.3 * space().full), agent=AgentSettings(imagined=64))
    asked = play("reinforce", problem)
    assert len(asked) == 40
    shares = [space().cost(network) / space().full for network in asked[:20]]
    assert min(shares) < 0.5 < 0.7 < max(shares) <= 0.9


def test_every_strategy_has_code():
    assert all(callable(load_strategy(name)) for name in STRATEGIES)


def evaluations_of(table, limit):
    """Return evaluations that look rewards up, with what they looked up, batch by batch."""
    batches = []

    def answer(wanted, limit):
        batches.append(list(wanted))
        return {instance: table[instance] for instance in wanted if instance in table}

    return Evaluations(limit, answer), batches


A, B, C = (Instance.parse(f"layer1.{block}@0.5") for block in range(3))


def test_a_network_is_asked_for_once():
    score, batches = evaluations_of({A: 1.0, B: 2.0, C: 3.0}, 10)
    assert score([A, B, A]) == [1.0, 2.0, 1.0]
    assert score([B, C]) == [2.0, 3.0]
    assert score([A]) == [1.0]
    assert batches == [[A, B], [C]]
    assert score.rewards == {A: 1.0, B: 2.0, C: 3.0}


def test_the_last_evaluation_ends_a_strategy():
    score, _ = evaluations_of({A: 1.0, B: 2.0}, 2)
    score([A])
    with pytest.raises(Spent):
        score([B])
    assert score.rewards == {A: 1.0, B: 2.0}


def test_a_network_that_is_left_out_ends_a_strategy():
    score, _ = evaluations_of({A: 1.0}, 10)
    with pytest.raises(Spent):
        score([A, B])
    assert score.rewards == {A: 1.0}


def test_what_others_scored_counts():
    score = Evaluations(2, lambda wanted, limit: {A: 1.0, C: 3.0})
    with pytest.raises(Spent):
        score([A])
    assert score.rewards == {A: 1.0, C: 3.0}


def test_asking_for_nothing_new_for_a_long_time_ends_a_strategy():
    score, _ = evaluations_of({A: 1.0, B: 2.0}, 10)
    score([A])
    for _ in range(IDLE - 1):
        score([A])
    score([B])
    for _ in range(IDLE - 1):
        score([A, B])
    with pytest.raises(Spent):
        score([B])


def test_the_best_is_the_cheaper_of_equals_and_then_the_first_by_name():
    key = ranking(problem_of(space(), 0.5, 24), lambda instance, score: score.top1)
    names = ["layer2.0@0.5", "layer3.2@0.5", "layer1.0@0.75", "layer1.0@0.5", "full"]  # that of layer3.2 saves nothing
    scores = dict(zip(map(Instance.parse, names), (50.0, 70.0, 70.0, 70.0, 70.0), strict=True))
    order = [str(instance) for instance, _ in sorted(((i, Score(10, top1, None, 1.0)) for i, top1 in scores.items()), key=key)]
    assert order == ["layer1.0@0.5", "layer1.0@0.75", "full", "layer3.2@0.5", "layer2.0@0.5"]
