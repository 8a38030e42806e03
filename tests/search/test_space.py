"""The space against brute force: every instance of a small network run on its own, its convolutions counted by hooks."""

import itertools
from collections import namedtuple
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import randomise_norms
from torch import nn

from sdpctl.engine.cost import Costs, profile
from sdpctl.errors import BudgetError, InstanceError, UsageError
from sdpctl.instance import FULL, Instance
from sdpctl.models import create_model
from sdpctl.models.chain import batch_norm
from sdpctl.sdpoint import sdpoint_instances
from sdpctl.search.space import Space

NETS = {
    "resnet20": (
        {"name": "resnet20", "in_channels": 1},
        (1, 13, 11),
        {"layer3.1": (1, 0.75, 0.5), "stem": (1, 0.75, 0.5), "layer1.1": (1, 0.75, 0.5), "layer2.0": (1, 0.75, 0.5)},
    ),
    "resnet18": (
        {"name": "resnet18", "stem": "imagenet"},
        (3, 44, 36),
        {
            "maxpool": (0.5, 1, 0.75),
            "layer1.0": (1, 0.9, 0.4, 0.3),
            "layer2.1": (1, 0.5),
            "layer3.0": (1,),
            "layer4.1": (1, 0.3),
        },
    ),
    "preresnet18": (
        {"name": "preresnet18", "stem": "small"},
        (3, 16, 9),
        {"stem": (1, 0.5), "layer1.1": (1, 0.8, 0.7, 0.6), "layer2.0": (1, 0.75), "layer2.1": (1, 0.75), "layer4.0": (0.5, 1)},
    ),
}

Brute = namedtuple("Brute", "model image points ratios space macs networks")


def build(name="resnet20", **options):
    return create_model(name, num_classes=10, **options)


def run(model, image, instance):
    """Run an instance; return its MACs, counted as it runs, and the size that every segment hands on."""
    counted = []

    def count(module, _, out):
        counted.append(out.numel() * module.weight[0].numel() + (0 if module.bias is None else out.numel()))

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    state, sizes = torch.empty((1, *image), device="meta"), []
    for segment in model.segments():
        state = segment.body(state, batch_norm)
        if segment.shrink is not None:
            state = segment.shrink(state, instance.ratio(segment.point))
        sizes.append(tuple(state.shape[1:]))
    for hook in hooks:
        hook.remove()
    return sum(counted), tuple(sizes)


@cache
def brute_force(net):
    options, image, ratios = NETS[net]
    with torch.device("meta"):
        model = build(**options).eval()
    points = [point for point in model.points if point in ratios]
    instances = [
        Instance(tuple(zip(points, chosen, strict=True))) for chosen in itertools.product(*(ratios[p] for p in points))
    ]
    ran = {instance: run(model, image, instance) for instance in instances}
    macs, networks = ({instance: both[side] for instance, both in ran.items()} for side in (0, 1))
    return Brute(model, image, points, ratios, Space(Costs(model, image), ratios), macs, networks)


def budgets(brute):
    """Return budgets between networks, at one, and just below one."""
    costs = sorted(set(brute.macs.values()))
    middle = [costs[len(costs) * k // 5] for k in range(1, 5)]
    return [costs[0], costs[1] - 1, *middle, *(macs - 1 for macs in middle), costs[-1] - 1, costs[-1], 2 * costs[-1]]


def ratios_of(brute, instance):
    return tuple(instance.ratio(point) for point in brute.points)


@pytest.fixture(params=NETS)
def brute(request):
    return brute_force(request.param)


def test_every_instance_costs_what_it_costs_when_run(brute):
    costs = profile(brute.model, brute.macs, brute.image)
    for instance, macs in brute.macs.items():
        assert brute.space.cost(instance) == costs[instance].macs == macs
        assert tuple(segment.out_shape for segment in costs[instance].segments) == brute.networks[instance]


def test_the_cheapest_and_the_full_network(brute):
    assert brute.space.least == min(brute.macs.values())
    assert brute.space.full == brute.macs[FULL] == max(brute.macs.values())


def test_points_stand_in_network_order_and_ratios_fall():
    space = Space(Costs(build(), (3, 8, 8)), {"layer3.0": [0.5, 1, 0.75, 0.5], "stem": [1], "layer1.0": (0.5, 1.0)})
    assert space.points == ("stem", "layer1.0", "layer3.0")
    assert space.ratios == {"stem": (1.0,), "layer1.0": (1.0, 0.5), "layer3.0": (1.0, 0.75, 0.5)}


def test_every_network_within_the_budget_is_listed_once(brute):
    for budget in budgets(brute):
        listed = list(brute.space.networks(budget))
        assert len(set(listed)) == len(listed)
        found = [brute.networks[instance] for instance in listed]
        assert len(set(found)) == len(found)
        assert set(found) == {network for instance, network in brute.networks.items() if brute.macs[instance] <= budget}
    assert list(brute.space.networks(min(brute.macs.values()) - 1)) == []


def test_the_list_begins_with_full_and_has_the_larger_ratios_first(brute):
    listed = [ratios_of(brute, instance) for instance in brute.space.networks(brute.space.full)]
    assert set(listed[0]) == {1.0}
    assert listed == sorted(listed, reverse=True)


def test_networks_are_counted_once(brute):
    assert brute.space.count() == len(set(brute.networks.values())) < len(brute.networks)


def test_nine_blocks_have_fewer_networks_than_instances():
    def sizes(ratios):
        size, passed = 32, []
        for number, ratio in enumerate(ratios):
            size = -(-size // 2) if number in (3, 6) else size
            size = max(1, round(size * ratio))
            passed.append(size)
        return tuple(passed)

    three = (1, 0.75, 0.5)
    costs = Costs(build(), (3, 32, 32))
    space = Space(costs, {point: three for point in costs.model.points if point != "stem"})
    assert space.count() == len({sizes(ratios) for ratios in itertools.product(three, repeat=9)}) == 2165


def test_what_lies_ahead_is_known_at_every_place_of_every_walk(brute):
    """A ratio is allowed where a network within the budget lies behind it; the instances reached are those within."""
    space = brute.space
    completions = {}
    for instance, macs in brute.macs.items():
        taken = ratios_of(brute, instance)
        for passed in range(len(taken) + 1):
            completions.setdefault(taken[:passed], []).append(macs)
    for budget in budgets(brute):
        reached = set()

        def walk(position, spent, taken, budget=budget, reached=reached):
            assert (spent + position.least, spent + position.most) == (min(completions[taken]), max(completions[taken]))
            if position.number == len(brute.points):
                assert spent == completions[taken][0]
                assert not position.onward
                reached.add(taken)
                return
            ratios = space.ratios[brute.points[position.number]]
            allowed = [spent + after.macs + after.least <= budget for after in position.onward]
            assert allowed == [min(completions[*taken, ratio]) <= budget for ratio in ratios]
            assert any(allowed)
            for ratio, after, within in zip(ratios, position.onward, allowed, strict=True):
                if within:
                    walk(after, spent + after.macs, (*taken, ratio))

        walk(space.start, space.start.macs, ())
        assert reached == {ratios_of(brute, instance) for instance, macs in brute.macs.items() if macs <= budget}


def test_the_instances_of_one_network_have_one_canonical_form_with_the_largest_ratios(brute):
    listed = set(brute.space.networks(brute.space.full))
    together = {}
    for instance, network in brute.networks.items():
        together.setdefault(network, []).append(instance)
    for instances in together.values():
        (canonical,) = {brute.space.canonical(instance) for instance in instances}
        assert canonical in listed
        assert brute.space.canonical(canonical) == canonical
        assert ratios_of(brute, canonical) == tuple(map(max, zip(*(ratios_of(brute, i) for i in instances), strict=True)))


@pytest.mark.parametrize("net", NETS)
def test_networks_differ_in_their_logits_and_instances_of_one_do_not(net, double):
    brute = brute_force(net)
    torch.manual_seed(3)
    model = randomise_norms(build(**NETS[net][0]).eval(), bias=0.3)
    x_NCHW = torch.randn(2, *brute.image)
    with torch.inference_mode():
        logits = {instance: model(x_NCHW, instance) for instance in brute.networks}
    doubles = [instance for instance in logits if brute.space.canonical(instance) != instance]
    assert doubles
    for instance in doubles:
        torch.testing.assert_close(logits[instance], logits[brute.space.canonical(instance)], rtol=1e-12, atol=1e-12)
    flat = torch.stack([logits[network].flatten() for network in brute.space.networks(brute.space.full)])
    assert torch.nn.functional.pdist(flat, p=float("inf")).min() > 1e-6


any_ratio = st.one_of(st.sampled_from((1.0, 0.9, 0.8, 0.75, 0.7, 0.6, 0.55, 0.5, 0.45, 0.25)), st.floats(0.01, 1))


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(list(NETS)), st.data())
def test_an_instance_with_other_points_and_ratios_has_the_canonical_form_of_its_network(net, data):
    brute = brute_force(net)
    chosen = data.draw(st.dictionaries(st.sampled_from(brute.model.points), any_ratio, max_size=4))
    instance = Instance(tuple(chosen.items()))
    canonical = brute.space.canonical(instance)
    macs, network = run(brute.model, brute.image, instance)
    assert instance == canonical or run(brute.model, brute.image, canonical) == (macs, network)
    assert brute.space.cost(instance) == brute.space.cost(canonical) == macs
    assert brute.space.canonical(canonical) == canonical
    same = next((other for other, known in brute.networks.items() if known == network), None)
    if same is not None:
        assert canonical == brute.space.canonical(same)


def test_a_ratio_outside_the_space_is_written_as_that_of_the_space_which_leads_to_the_same_size():
    """At 6 x 6, 0.7 (4.2) and 0.6 (3.6) both keep 4 pixels; 0.75 would too, by rounding half to even."""
    space = Space(Costs(build(), (3, 6, 6)), {"layer1.0": (1, 0.7)})
    for text, canonical in (
        ("layer1.0@0.6", "layer1.0@0.7"),
        ("layer1.0@0.75", "layer1.0@0.7"),
        ("layer1.0@0.95", "full"),
        ("layer1.0@0.5", "layer1.0@0.5"),
        ("layer1.1@0.95", "full"),
        ("layer1.1@0.5", "layer1.1@0.5"),
        ("layer1.0@0.6+layer3.2@0.75", "layer1.0@0.7"),  # 1 pixel is left there, and stays
    ):
        assert str(space.canonical(Instance.parse(text))) == canonical


def test_the_instances_of_the_method_are_in_the_space_of_all_points():
    costs = Costs(build(), (3, 8, 8))
    space = Space(costs, dict.fromkeys(costs.model.points, (1, 0.75, 0.5)))
    listed = set(space.networks(space.full))
    assert {space.canonical(instance) for instance in sdpoint_instances(costs.model)} <= listed


def test_the_layers_between_points():
    costs = Costs(build("resnet18", stem="imagenet"), (3, 32, 32))
    space = Space(costs, dict.fromkeys(("maxpool", "layer1.1", "layer3.0"), (1, 0.5)))
    parts = [(sorted(part.sides), sorted(part.channels), part.kernel) for part in space.layers]
    assert parts == [  # the convolution of a shortcut counts too
        ([7], [64], 7),
        ([3] * 4, [64] * 4, 3),
        ([1] * 2 + [3] * 6, [128] * 5 + [256] * 3, 3),
        ([1] * 2 + [3] * 6, [10] + [256] * 2 + [512] * 5, 3),
    ]


def test_a_space_by_the_name_of_a_network():
    space = Space.of("resnet20", (1, 14, 10), ratios=(1, 0.5), points=["stem", "layer2.0"], num_classes=7)
    with torch.device("meta"):
        model = create_model("resnet20", num_classes=7, in_channels=1)
    assert (space.full, space.points) == (profile(model, [FULL], (1, 14, 10))[FULL].macs, ("stem", "layer2.0"))
    assert Space.of(model, (1, 14, 10)).points == tuple(model.points)


def test_a_space_without_points_has_one_network():
    space = Space(Costs(build(), (3, 8, 8)), {})
    assert list(space.networks(space.full)) == [FULL]
    assert (space.count(), space.least) == (1, space.full)


def test_a_point_the_network_lacks():
    with pytest.raises(InstanceError, match=r"no point 'stm' \(did you mean 'stem'\?\); it has stem, layer1\.0, "):
        Space(Costs(build(), (3, 8, 8)), {"stm": (1, 0.5)})


@pytest.mark.parametrize("ratios", [(), (0.5,), (1, 0), (1, -0.5), (1, 1.5), (1, float("nan"))])
def test_ratios_without_1_or_outside_their_range(ratios):
    with pytest.raises(UsageError, match=r"layer1\.0: ratios are above 0 and at most 1, and 1 is among them; got \["):
        Space(Costs(build(), (3, 8, 8)), {"stem": (1, 0.5), "layer1.0": ratios})


def test_a_budget_that_no_network_meets(brute):
    least = min(brute.macs.values())
    brute.space.require(least)
    with pytest.raises(BudgetError) as error:
        brute.space.require(least - 1)
    assert error.value.exit_code == 8
    text = f"at most {least - 1:,} MACs: the cheapest costs {least:,} ({100 * least / brute.macs[FULL]:.1f} % of `full`)"
    assert text in str(error.value)
