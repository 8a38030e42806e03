"""The environment against the checkers of both libraries, figures worked by hand, and every network run on its own."""

import itertools
import math
import random
import re
from collections import namedtuple
from functools import cache
from pathlib import Path

import gymnasium.utils.env_checker
import numpy as np
import pytest
import stable_baselines3.common.env_checker
import torch
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from scipy.stats import kstest

from sdpctl.engine.cost import Costs, profile
from sdpctl.errors import BudgetError
from sdpctl.instance import Instance
from sdpctl.models import create_model
from sdpctl.search.environment import ENTRIES, NAME, Budgets, SearchEnv
from sdpctl.search.lockstep import LockstepEnv
from sdpctl.search.space import Space

NETS = {
    "resnet20": (
        {"name": "resnet20", "in_channels": 1},
        (1, 14, 10),
        {"stem": (1, 0.75, 0.5), "layer1.1": (1, 0.5), "layer2.0": (1, 0.8, 0.6, 0.4), "layer3.1": (1, 0.5)},
    ),
    "resnet18": (
        {"name": "resnet18", "stem": "imagenet"},
        (3, 40, 56),
        {"maxpool": (1, 0.75), "layer1.1": (1, 0.75, 0.5), "layer2.0": (1,), "layer4.1": (1, 0.75, 0.5)},
    ),
    "preresnet18": (
        {"name": "preresnet18", "stem": "small"},
        (3, 24, 18),
        {"layer3.0": (1, 0.5), "layer3.1": (1, 0.6), "layer4.0": (1, 0.75, 0.5, 0.25)},
    ),
}

Net = namedtuple("Net", "model image space costs")


@cache
def net(name):
    """Return a network with the cost of each of its instances, by the ratios taken."""
    options, image, ratios = NETS[name]
    with torch.device("meta"):
        model = create_model(**options, num_classes=10)
    space = Space(Costs(model, image), ratios)
    taken = list(itertools.product(*space.ratios.values()))
    instances = [Instance(tuple(zip(space.points, chosen, strict=True))) for chosen in taken]
    costs = profile(model, instances, image)
    return Net(model, image, space, {chosen: costs[i] for chosen, i in zip(taken, instances, strict=True)})


def budgets(known):
    costs = sorted({cost.macs for cost in known.costs.values()})
    return [costs[0], costs[len(costs) // 4] - 1, costs[len(costs) // 2], costs[-1] - 1, costs[-1], 3 * costs[-1]]


def cases():
    return [pytest.param(name, number, id=f"{name}-{number}") for name in NETS for number in range(6)]


def by_hand(instances):
    """Return a reward that is easy to know: how many points are below 1, and as a fraction their ratios' sum."""
    return [len(instance.choices) + sum(ratio for _, ratio in instance.choices) / 100 for instance in instances]


def lockstep(space, budget, reward=by_hand, walks=2):
    return LockstepEnv(space, lambda: budget, lambda ended: reward([walk.instance for walk in ended]), walks)


# Gymnasium would also try the render modes, of which there are none, on environments made from a registered spec.
@pytest.mark.filterwarnings("ignore:.*Not able to test alternative render modes:UserWarning")
@pytest.mark.parametrize(("name", "number"), cases())
def test_both_libraries_checkers_pass(name, number):
    known = net(name)
    env = SearchEnv(known.space, budgets(known)[number], by_hand)
    gymnasium.utils.env_checker.check_env(env)
    stable_baselines3.common.env_checker.check_env(env, skip_render_check=False)


def test_a_walk_worked_by_hand():
    """resnet20 on images of 16 x 12: 0.75 at the stem, 0.5 at layer2.0, nothing at layer3.2."""
    model = create_model("resnet20", num_classes=10, in_channels=1)
    space = Space(Costs(model, (1, 16, 12)), {"stem": (1, 0.75, 0.5), "layer2.0": (1, 0.5), "layer3.2": (1, 0.5)})

    def conv(h, w, before, after):
        return 9 * h * w * before * after

    def to_layer2_0(h, w, h2, w2):
        return 6 * conv(h, w, 16, 16) + conv(h2, w2, 16, 32) + conv(h2, w2, 32, 32)

    def to_layer3_2(h, w, h2, w2):
        return 4 * conv(h, w, 32, 32) + conv(h2, w2, 32, 64) + 5 * conv(h2, w2, 64, 64)

    stem, head = conv(16, 12, 1, 16), 64 * 10 + 10
    full = stem + to_layer2_0(16, 12, 8, 6) + to_layer3_2(8, 6, 4, 3) + head
    budget = full * 6 // 10
    first = to_layer2_0(12, 9, 6, 5)  # 12 x 9 after the stem, and every second of 9 pixels is 5
    second = to_layer3_2(3, 2, 2, 1)  # half of 5 pixels is 2, since a half is rounded to even
    most = [
        to_layer2_0(16, 12, 8, 6) + to_layer3_2(8, 6, 4, 3) + head,
        to_layer3_2(6, 5, 3, 3) + head,
        head,
        0,
    ]
    least = [
        to_layer2_0(8, 6, 4, 3) + to_layer3_2(2, 2, 1, 1) + head,
        to_layer3_2(3, 2, 2, 1) + head,
        head,
        0,
    ]
    assert stem + first + least[1] <= budget < stem + first + most[1]  # so that the budget forbids 1 at layer2.0
    segments = [stem, first, second, head]
    # what follows each point: the 3x3 layers by their channels, and the linear layer, a 1x1 layer of 10 channels
    following = [(6, 2 + 4, 6), (0, 4, 6), (0, 0, 0), None]  # 16, 32 and 64 channels
    maps = [(16, 16, 12), (32, 6, 5), (64, 2, 1), None]
    kernels, strides = [3, 3, 1, 1], [2, 2, 1, 1]
    unshrunk = [  # the MACs up to the next points if nothing more shrinks
        [to_layer2_0(16, 12, 8, 6), to_layer3_2(8, 6, 4, 3), head],
        [to_layer3_2(6, 5, 3, 3), head],
        [head],
        [],
    ]
    quarter = [1, 2, 3]  # of a walk of four parts, the part after each point
    ratios = [[1.0], [0.75], [0.75, 0.5], [0.75, 0.5, 1]]
    env = SearchEnv(space, budget, by_hand)
    observations, masks, infos = [env.reset()[0]], [env.action_masks()], []
    for action in (1, 0, 0):
        observation, _, _, _, info = env.step(action)
        observations.append(observation)
        masks.append(env.action_masks())
        infos.append(info)
    for step, observation in enumerate(observations):
        spent = sum(segments[: step + 1])
        expected = dict.fromkeys(ENTRIES, 0.0)
        expected |= {"passed": step / 3, "points left": math.log2(4 - step) / 10, "previous MACs": segments[step] / full}
        for waves in (1, 2, 4):
            angle = 2 * math.pi * waves * step / 3
            expected |= {f"sine {waves}": (1 + math.sin(angle)) / 2, f"cosine {waves}": (1 + math.cos(angle)) / 2}
        if step < 3:
            channels, height, width = maps[step]
            expected |= {"channels": math.log2(channels) / 12, "height": height / 16, "width": width / 12}
            expected |= {"kernel": math.log2(kernels[step]) / 5, "stride": math.log2(strides[step]) / 5}
            expected["next MACs"] = unshrunk[step][0] / full
            by_channels = following[step]
            count = sum(by_channels) + 1
            expected |= {"layers left": count / 20, "kernels up to 1": 1 / count, "kernels up to 3": (count - 1) / count}
            for number, limit in enumerate((16, 32, 64)):
                expected[f"up to {limit} channels"] = (by_channels[number] + (limit == 16)) / count
            for number, macs in enumerate(unshrunk[step]):
                expected[f"MACs of quarter {quarter[step + number] + 1}"] = macs / full
        left = budget - spent
        expected |= {"spent MACs": spent / full, "most MACs": most[step] / full, "least MACs": least[step] / full}
        expected |= {"budget": budget / full, "left MACs": left / full}
        expected["slack"] = min(1, (left - least[step]) / (most[step] - least[step])) if step < 2 else 1
        taken = ratios[step]
        expected |= {"size": math.prod(taken), "last ratio": taken[-1], "recent ratio": sum(taken) / len(taken)}
        expected |= {"mean ratio": sum(taken) / len(taken), "smallest ratio": min(taken)}
        expected["lowered"] = sum(ratio < 1 for ratio in taken) / len(taken)
        for number, name in enumerate(ENTRIES):
            assert observation[number] == pytest.approx(expected[name], rel=1e-6), (step, name)
    assert [mask.tolist() for mask in masks] == [[False, True, True], [False, True, False], [True, True, False], [True] * 3]
    assert [(info["proposed"], info["taken"]) for info in infos] == [(1, 1), (0, 1), (0, 0)]
    assert infos[-1]["instance"] == "stem@0.75+layer2.0@0.5"
    assert infos[-1]["macs"] == sum(segments)


@pytest.mark.parametrize(("name", "number"), cases())
def test_what_the_entries_say_of_costs_and_maps_on_random_walks(name, number):
    """Against the profile of every network that the walk can still end at."""
    known = net(name)
    space, budget = known.space, budgets(known)[number]
    full = max(cost.macs for cost in known.costs.values())
    points = [segment.point for segment in known.model.segments()]
    draw = random.Random(number)
    env = SearchEnv(space, budget, by_hand)
    for _ in range(3):
        observation, _ = env.reset()
        before, taken = 0, ()
        for step in range(len(space.points) + 1):
            assert observation in env.observation_space
            told = dict(zip(ENTRIES, observation.tolist(), strict=True))
            completions = {chosen: cost for chosen, cost in known.costs.items() if chosen[:step] == taken}
            totals = [cost.macs for cost in completions.values()]
            onward = completions[taken + (1.0,) * (len(space.points) - step)]
            ends = [points.index(point) for point in space.points[step:]] + [len(points) - 1]
            spent = sum(segment.macs for segment in onward.segments[: ends[0] + 1])
            parts = [sum(s.macs for s in onward.segments[a + 1 : b + 1]) for a, b in itertools.pairwise(ends)]
            expected = {
                "passed": step / len(space.points),
                "previous MACs": (spent - before) / full,
                "spent MACs": spent / full,
            }
            expected |= {"most MACs": (max(totals) - spent) / full, "least MACs": (min(totals) - spent) / full}
            expected |= {"left MACs": min(budget - spent, full) / full, "budget": min(budget, full) / full}
            if step < len(space.points):
                channels, height, width = onward.segments[ends[0]].out_shape
                expected |= {"channels": math.log2(channels) / 12, "next MACs": parts[0] / full}
                expected |= {"height": height / known.image[1], "width": width / known.image[2]}
                quarters = [told[f"MACs of quarter {quarter}"] for quarter in (1, 2, 3, 4)]
                assert sum(quarters) == pytest.approx(sum(parts) / full, rel=1e-5)
                assert sum(told[entry] for entry in ENTRIES if "kernels" in entry) == pytest.approx(1)
                assert sum(told[entry] for entry in ENTRIES if entry.endswith(" channels")) == pytest.approx(1)
            for entry, value in expected.items():
                assert told[entry] == pytest.approx(value, rel=1e-5, abs=1e-7), (step, entry)
            free = max(totals) - min(totals)
            slack = min(1, (budget - spent - (min(totals) - spent)) / free) if free else 1
            assert told["slack"] == pytest.approx(slack, rel=1e-5)
            before = spent
            if step < len(space.points):
                observation, _, done, truncated, info = env.step(draw.randrange(env.action_space.n))
                taken = (*taken, space.ratios[space.points[step]][info["taken"]])
                assert (done, truncated) == (step == len(space.points) - 1, False)


def test_every_network_has_observations_of_one_length():
    spaces = [net(name).space for name in NETS]
    spaces.append(Space.of("twopipe", (3, 32, 32)))
    for space in spaces:
        observation, _ = SearchEnv(space, space.full, by_hand).reset()
        assert observation.shape == (len(ENTRIES),)


def test_each_episode_draws_a_budget_from_the_range():
    known = net("resnet20")
    lowest, highest = known.space.least - 7, known.space.full
    env = SearchEnv(known.space, Budgets(lowest, highest), by_hand)
    drawn = [env.reset(seed=1 if number == 0 else None)[1]["budget"] for number in range(400)]
    assert known.space.least <= min(drawn) < max(drawn) <= highest
    assert kstest(drawn, "uniform", (known.space.least, highest - known.space.least)).pvalue > 0.01
    again = SearchEnv(known.space, Budgets(lowest, highest), by_hand)
    assert [again.reset(seed=1 if number == 0 else None)[1]["budget"] for number in range(400)] == drawn
    assert env.reset(options={"budget": highest - 1})[1] == {"budget": highest - 1}
    with pytest.raises(BudgetError, match="the cheapest costs"):
        SearchEnv(known.space, Budgets(1, known.space.least - 1), by_hand)


@pytest.mark.parametrize(("name", "number"), cases())
def test_masks_leave_what_can_meet_the_budget_and_the_nearest_of_it_is_taken(name, number):
    known = net(name)
    space, budget = known.space, budgets(known)[number]
    scored = []

    def reward(instances):
        scored.extend(instances)
        return by_hand(instances)

    env = SearchEnv(space, budget, reward)
    ends = set()

    def visit(prefix, taken):
        """Look at every walk from here, `prefix` being the actions that led here."""
        mask = env.action_masks()
        ratios = space.ratios[space.points[len(taken)]]
        allowed = [
            any(cost.macs <= budget for chosen, cost in known.costs.items() if chosen[: len(taken) + 1] == (*taken, ratio))
            for ratio in ratios
        ]
        assert mask.tolist() == allowed + [False] * (env.action_space.n - len(allowed))
        for action in range(env.action_space.n):
            env.reset()
            for earlier in prefix:
                env.step(earlier)
            already = len(scored)
            _, reward, done, _, info = env.step(action)
            assert info["proposed"] == action
            assert mask[info["taken"]]
            assert abs(info["taken"] - action) == min(abs(other - action) for other in np.flatnonzero(mask))
            chosen = (*taken, ratios[info["taken"]])
            if len(chosen) < len(space.points):
                assert (reward, done, len(scored)) == (0, False, already)
                assert set(info) == {"proposed", "taken"}
                if mask[action]:
                    visit((*prefix, action), chosen)
            else:
                instance = space.canonical(Instance(tuple(zip(space.points, chosen, strict=True))))
                assert (done, scored[already:]) == (True, [instance])
                assert reward == by_hand([instance])[0]
                assert info["instance"] == str(instance)
                assert info["macs"] == known.costs[chosen].macs
                assert env.action_masks().all()
                ends.add(chosen)

    env.reset()
    visit((), ())
    assert ends == {chosen for chosen, cost in known.costs.items() if cost.macs <= budget}


@pytest.mark.parametrize("make", [lambda *a: SearchEnv(*a, by_hand), lockstep])
def test_a_budget_that_no_network_meets(make):
    known = net("resnet20")
    with pytest.raises(BudgetError, match=f"the cheapest costs {known.space.least:,}"):
        make(known.space, known.space.least - 1)


@pytest.mark.parametrize(("name", "number"), cases())
def test_walks_in_lockstep_are_single_walks_scored_in_one_pass(name, number):
    known = net(name)
    space, budget, walks = known.space, budgets(known)[number], 5
    passes = []

    def reward(instances):
        passes.append(list(instances))
        return by_hand(instances)

    env = lockstep(space, budget, reward, walks)
    singles = [SearchEnv(space, budget, by_hand) for _ in range(walks)]
    assert (env.observation_space, env.action_space) == (singles[0].observation_space, singles[0].action_space)
    observations = env.reset()
    expected = [single.reset()[0] for single in singles]
    draw, kept = random.Random(number), []
    for episode in range(3):
        for step in range(len(space.points)):
            np.testing.assert_array_equal(observations, expected)
            np.testing.assert_array_equal(env.env_method("action_masks"), [single.action_masks() for single in singles])
            actions = [draw.randrange(env.action_space.n) for _ in range(walks)]
            assert len(passes) == episode
            observations, rewards, dones, infos = env.step(np.array(actions))
            ran = [single.step(action) for single, action in zip(singles, actions, strict=True)]
            expected = [one[0] for one in ran]
            assert dones.tolist() == [one[2] for one in ran] == [step == len(space.points) - 1] * walks
            np.testing.assert_allclose(rewards, [one[1] for one in ran], rtol=1e-6)
            last = [info.pop("terminal_observation", None) for info in infos]
            assert infos == [one[4] for one in ran]
            if dones[0]:
                np.testing.assert_array_equal(last, expected)
                kept += [(one, one.copy()) for one in last]
                assert [str(instance) for instance in passes[-1]] == [info["instance"] for info in infos]
                expected = [single.reset()[0] for single in singles]
            else:
                assert last == [None] * walks
    assert [len(instances) for instances in passes] == [walks] * 3
    for then, now in kept:
        np.testing.assert_array_equal(then, now)


def test_maskable_ppo_finds_the_masks():
    known = net("resnet20")
    env = lockstep(known.space, budgets(known)[1], walks=3)
    env.reset()
    assert is_masking_supported(env)
    np.testing.assert_array_equal(get_action_masks(env), [walk.mask() for walk in env.walks])
    (second,) = env.env_method("action_masks", indices=1)
    np.testing.assert_array_equal(second, env.walks[1].mask())
    single = SearchEnv(known.space, budgets(known)[1], by_hand)
    single.reset()
    assert is_masking_supported(single)
    np.testing.assert_array_equal(get_action_masks(single), second)


def test_walks_have_nothing_to_set_and_nothing_around_them():
    known = net("resnet20")
    env = lockstep(known.space, known.space.full, walks=3)
    assert env.env_is_wrapped(object) == [False] * 3
    assert env.env_is_wrapped(object, indices=[0, 2]) == [False] * 2
    assert env.get_attr("render_mode") == [None] * 3
    assert not env.has_attr("shape")
    with pytest.raises(AttributeError, match="a walk has no shape"):
        env.get_attr("shape")
    with pytest.raises(AttributeError, match="budget of a walk cannot be set"):
        env.set_attr("budget", 1)
    env.close()


README = Path(__file__).parents[2] / "sdpctl" / "search" / "README.md"


def test_the_readme_explains_every_entry_in_order():
    rows = re.findall(r"^\| (`.*?) \|", README.read_text(encoding="utf-8").partition("## Observation")[2], re.MULTILINE)
    assert tuple(name for row in rows for name in re.findall(r"`(.*?)`", row)) == ENTRIES


def test_the_example_with_stable_baselines_runs_as_it_stands():
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in program.splitlines() if line and not line.startswith(("import", "from"))]) <= 10
    known = {}
    exec(compile(program.replace("learn(2000)", "learn(300)"), "README.md", "exec"), known)
    env, agent = known["env"], known["agent"]
    observation, info = env.reset(options={"budget": known["budgets"].lowest})
    done = False
    while not done:
        observation, reward, done, _, step = env.step(agent.predict(observation, deterministic=True)[0])
    assert step["macs"] <= info["budget"] == known["budgets"].lowest
    assert reward == pytest.approx(step["macs"] / known["space"].full)


@pytest.mark.filterwarnings("ignore:.*alternative render modes:UserWarning")
def test_the_registered_environment_passes_both_checkers():
    space = net("resnet20").space
    env = gymnasium.make(NAME, space=space, budgets=Budgets(space.least, space.full), reward=by_hand)
    gymnasium.utils.env_checker.check_env(env.unwrapped)
    stable_baselines3.common.env_checker.check_env(env.unwrapped, skip_render_check=False)
