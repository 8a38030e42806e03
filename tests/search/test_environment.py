"""The environment against the checkers of both libraries, figures worked by hand, and every network run on its own."""

import itertools
import random
from collections import namedtuple
from functools import cache

import gymnasium.utils.env_checker
import numpy as np
import pytest
import stable_baselines3.common.env_checker
import torch
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported

from sdpctl.engine.cost import Costs, profile
from sdpctl.errors import BudgetError
from sdpctl.instance import Instance
from sdpctl.models import create_model
from sdpctl.search.environment import FACTS, SearchEnv
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
    kernels = {"to layer2.0": 6 * 16 + 2 * 32, "to layer3.2": 4 * 32 + 6 * 64, "head": 10}
    widest = kernels["to layer3.2"]
    rows = [
        # index, channels, height, width, kernel, kernels, stride
        [0, 16 / 64, 16 / 16, 12 / 12, 3 / 3, kernels["to layer2.0"] / widest, 2 / 2],
        [1 / 3, 32 / 64, 6 / 16, 5 / 12, 3 / 3, kernels["to layer3.2"] / widest, 2 / 2],
        [2 / 3, 64 / 64, 2 / 16, 1 / 12, 1 / 3, kernels["head"] / widest, 1 / 2],
        [1, 0, 0, 0, 0, 0, 0],
    ]
    segments = [stem, first, second, head]
    decisions = [[0, 0, 0], [0.75, 0, 0], [0.75, 0.5, 0], [0.75, 0.5, 1]]
    env = SearchEnv(space, budget, by_hand)
    observations, masks, infos = [env.reset()[0]], [env.action_masks()], []
    for action in (1, 0, 0):
        observation, _, _, _, info = env.step(action)
        observations.append(observation)
        masks.append(env.action_masks())
        infos.append(info)
    for step, observation in enumerate(observations):
        spent = sum(segments[: step + 1])
        macs = [segments[step], spent, most[step], least[step], budget - spent]
        expected = [*rows[step], *(m / full for m in macs), *decisions[step]]
        np.testing.assert_allclose(observation, expected, rtol=1e-6, err_msg=f"step {step}")
    assert [mask.tolist() for mask in masks] == [[False, True, True], [False, True, False], [True, True, False], [True] * 3]
    assert [(info["proposed"], info["taken"]) for info in infos] == [(1, 1), (0, 1), (0, 0)]
    assert infos[-1]["instance"] == "stem@0.75+layer2.0@0.5"
    assert infos[-1]["macs"] == sum(segments)


LAYERS = {
    # The longest kernel side, the kernels and the stride of the layers after each point; then the most of each, the layers
    # before the first point included.
    "resnet20": ([(3, 64, 1), (3, 96, 2), (3, 4 * 32 + 4 * 64, 2), (3, 2 * 64 + 10, 1)], (3, 384, 2)),
    "resnet18": ([(3, 256, 1), (3, 3 * 128, 2), (3, 2 * 128 + 5 * 256 + 5 * 512, 4), (1, 10, 1)], (7, 4096, 4)),
    "preresnet18": ([(3, 512, 1), (3, 3 * 512, 2), (3, 2 * 512 + 10, 1)], (3, 64 + 4 * 64 + 5 * 128 + 3 * 256, 4)),
}


@pytest.mark.parametrize(("name", "number"), cases())
def test_every_entry_on_random_walks(name, number):
    known = net(name)
    space, budget = known.space, budgets(known)[number]
    full = max(cost.macs for cost in known.costs.values())
    names = [segment.name for segment in known.model.segments()]
    points = [segment.point for segment in known.model.segments()]
    channels = {segment.name: segment.out_shape[0] for segment in known.costs[(1.0,) * len(space.points)].segments}
    widest = max(channels[names[points.index(point)]] for point in space.points)
    ahead, largest = LAYERS[name]
    draw = random.Random(number)
    env = SearchEnv(space, budget, by_hand)
    for _ in range(3):
        observation, _ = env.reset()
        before, taken = 0, ()
        for step in range(len(space.points) + 1):
            assert observation in env.observation_space
            completions = {chosen: cost for chosen, cost in known.costs.items() if chosen[:step] == taken}
            totals = [cost.macs for cost in completions.values()]
            onward = completions[taken + (1.0,) * (len(space.points) - step)]
            if step < len(space.points):
                at = points.index(space.points[step])
                spent = sum(segment.macs for segment in onward.segments[: at + 1])
                shape = onward.segments[at].out_shape
                place = [shape[0] / widest, shape[1] / known.image[1], shape[2] / known.image[2]]
                place += [a / b for a, b in zip(ahead[step], largest, strict=True)]
            else:
                spent, place = onward.macs, [0] * 6
            left = min(max(budget - spent, 0), full)
            macs = [spent - before, spent, max(totals) - spent, min(totals) - spent, left]
            expected = [step / len(space.points), *place, *(m / full for m in macs), *taken]
            np.testing.assert_allclose(observation[: FACTS + step], expected, rtol=1e-6, atol=1e-7)
            assert not observation[FACTS + step :].any()
            before = spent
            if step < len(space.points):
                observation, _, done, truncated, info = env.step(draw.randrange(env.action_space.n))
                taken = (*taken, space.ratios[space.points[step]][info["taken"]])
                assert (done, truncated) == (step == len(space.points) - 1, False)


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


@pytest.mark.parametrize("make", [lambda *a: SearchEnv(*a, by_hand), lambda *a: LockstepEnv(*a, by_hand, 2)])
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

    env = LockstepEnv(space, budget, reward, walks)
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
    env = LockstepEnv(known.space, budgets(known)[1], by_hand, 3)
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
    env = LockstepEnv(known.space, known.space.full, by_hand, 3)
    assert env.env_is_wrapped(object) == [False] * 3
    assert env.env_is_wrapped(object, indices=[0, 2]) == [False] * 2
    assert env.get_attr("render_mode") == [None] * 3
    assert not env.has_attr("shape")
    with pytest.raises(AttributeError, match="a walk has no shape"):
        env.get_attr("shape")
    with pytest.raises(AttributeError, match="budget of a walk cannot be set"):
        env.set_attr("budget", 1)
    env.close()
