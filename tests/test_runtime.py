"""The runtime against each instance calibrated alone by PyTorch, a brute force over the options, and torchvision."""

import copy
import dataclasses
import gc
import random
import re
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from cascade_options import cascade_option
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import randomise_norms
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from sdpctl.cascade import Cascade
from sdpctl.engine.calibrate import calibrate
from sdpctl.errors import BudgetError, DataError, InstanceError, NotFoundError, ResourceError, UsageError
from sdpctl.export.bundle import Bundle
from sdpctl.export.description import Description, Input, Option
from sdpctl.instance import FULL, Instance
from sdpctl.models import create_model
from sdpctl.models.settings import ModelSettings
from sdpctl.runtime import Runtime

SIZE = 10
INSTANCES = {  # with MACs, and top-1 on held-out and on test images, which must not decide
    Instance.parse("stem@0.5"): (600_000, 81.0, 99.0),
    Instance.parse("layer1.0@0.5+layer2.0@0.75"): (750_000, 84.0, 98.0),
    Instance.parse("layer1.0@0.5"): (900_000, 90.0, 97.0),
    Instance.parse("layer2.1@0.5"): (1_200_000, 88.0, 96.0),
    Instance.parse("stem@0.75"): (1_200_000, 90.0, 95.0),
    Instance.parse("layer3.0@0.5"): (1_900_000, 95.0, 94.0),
    FULL: (2_400_001, 95.0, 93.0),
}
CHEAPEST = next(iter(INSTANCES))

CASCADES = {  # with the MACs that each member adds, held-out shares in per cent, and top-1 on held-out and on test images
    "stem@0.5:0.7/layer1.0@0.5": ((600_000, 850_000), (60.0, 40.0), 91.0, 99.0),
    "stem@0.5~1.5:0.6/layer2.1@0.5:0.8/full~0.7": ((600_000, 1_100_000, 900_000), (50.0, 30.0, 20.0), 94.0, 98.0),
    "mean/layer1.0@0.5:0.7/layer2.1@0.5~0.8:0.65/stem@0.75:0.6/full": (
        (900_000, 1_000_000, 1_150_000, 900_000),
        (55.0, 25.0, 10.0, 10.0),
        94.0,
        97.0,
    ),
}
TEXTS = tuple(CASCADES)


def option_of(text):
    member_macs, left, heldout_top1, top1 = CASCADES[text]
    return cascade_option(text, member_macs, 2_400_001, left=left, heldout_top1=heldout_top1, top1=top1)


def calibration(channels):
    draw = torch.Generator().manual_seed(5)
    return [(torch.randn(8, channels, SIZE, SIZE, generator=draw), None) for _ in range(2)]


@cache
def trained(channels):
    torch.manual_seed(1)
    model = create_model("resnet20", num_classes=7, in_channels=channels)
    randomise_norms(model, bias=0.3, mean=1, var=(0.2, 3))
    model.fc.weight.data.normal_(0, 0.2)
    return model


@cache
def bundle(channels=1):
    model = trained(channels)
    description = Description(
        name="net",
        network=ModelSettings(arch="resnet20", num_classes=7, in_channels=channels, stem="small"),
        input=Input(size=SIZE, resize=SIZE + 3, mean=(0.4, 0.5, 0.6)[:channels], std=(0.2, 0.3, 0.25)[:channels]),
        classes=tuple("abcdefg"),
        options=tuple(
            Option(
                instance=instance,
                macs=macs,
                params=9,
                relative=macs / 2_400_001,
                top1=top1,
                top5=1.0,
                loss=1,
                heldout_top1=held,
            )
            for instance, (macs, held, top1) in INSTANCES.items()
        ),
        full_macs=2_400_001,
        checkpoint="1",
        statistics="2",
        test_images=80,
        heldout_images=40,
        cascades=tuple(map(option_of, TEXTS)),
    )
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return Bundle(description, weights, calibrate(model, INSTANCES, calibration(channels)))


def opened(channels=1, **changes):
    source = bundle(channels)
    return Runtime(dataclasses.replace(source, description=dataclasses.replace(source.description, **changes)), device="cpu")


def with_heldout(heldout):
    """Open the same network with other accuracies."""
    options = bundle().description.options
    return opened(options=tuple(dataclasses.replace(o, heldout_top1=h) for o, h in zip(options, heldout, strict=True)))


@cache
def alone(channels, instance):
    """Let PyTorch gather one instance's statistics."""
    model = copy.deepcopy(trained(channels)).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        for x_NCHW, _ in calibration(channels):
            model(x_NCHW, instance)
    return model.eval()


def expected(x_NCHW, instance):
    with torch.no_grad():
        return alone(x_NCHW.shape[1], instance)(x_NCHW, instance)


def images(count, channels=1, seed=0):
    return torch.randn(count, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return opened()


@pytest.fixture
def clocked(monkeypatch):
    """Return a network whose instances take as long as its clock is told, and a function that tells it."""
    model, now, times = opened(), [0.0], {}
    run = model._run

    def slow(x_NCHW, instance):
        milliseconds = times[instance]
        now[0] += (milliseconds.pop(0) if isinstance(milliseconds, list) else milliseconds) / 1000
        return run(x_NCHW, instance)

    monkeypatch.setattr(model, "_run", slow)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return model, times.update


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("instance", INSTANCES, ids=str)
def test_each_instance_is_what_it_is_when_calibrated_alone(channels, instance):
    model = opened(channels)
    for count in (1, 4):
        x_NCHW = images(count, channels)
        for named in (instance, str(instance)):
            logits = model(x_NCHW, instance=named)
            torch.testing.assert_close(logits, expected(x_NCHW, instance), rtol=1e-4, atol=1e-4)
            assert (logits.shape, logits.dtype) == ((count, 7), torch.float32)


def test_instances_differ_so_that_a_wrong_one_would_be_seen():
    x_NCHW = images(4)
    logits = [expected(x_NCHW, instance) for instance in INSTANCES]
    assert min((a - b).abs().max() for i, a in enumerate(logits) for b in logits[:i]) > 0.01


@pytest.mark.parametrize("change", ["channels last", "strided", "float64", "gradient"])
def test_layout_and_type_of_the_images_do_not_matter(model, change):
    x_NCHW = images(3)
    other = {
        "channels last": lambda: x_NCHW.to(memory_format=torch.channels_last),
        "strided": lambda: x_NCHW.mT.contiguous().mT,
        "float64": x_NCHW.double,
        "gradient": lambda: x_NCHW.clone().requires_grad_(),
    }[change]()
    before = other.detach().clone()
    torch.testing.assert_close(model(other, instance="stem@0.5"), expected(x_NCHW, CHEAPEST), rtol=1e-4, atol=1e-4)
    assert torch.equal(other.detach(), before)


def test_an_empty_batch_gives_no_logits(model):
    for instance in INSTANCES:
        assert model(images(0), instance=instance).shape == (0, 7)
    assert model(images(0), max_macs="50%").shape == (0, 7)


def brute_force(options, limit):
    within = [option for option in options if option.macs <= limit]
    best = max(option.heldout_top1 for option in within)
    return min((option for option in within if option.heldout_top1 == best), key=lambda option: option.macs)


budgets = st.one_of(
    st.integers(1, 3_000_000).map(lambda macs: (macs, macs)),
    st.sampled_from([macs + more for macs, _, _ in INSTANCES.values() for more in (-1, 0, 1)]).map(lambda macs: (macs, macs)),
    st.integers(1, 30_000).map(lambda count: (f"{count / 10000:.4f}M", count * 100)),
    st.integers(1, 3000).map(lambda count: (f"{count}k", count * 1000)),
    st.integers(1, 1500).map(lambda tenths: (f"{tenths / 10}%", int(Fraction(tenths, 1000) * 2_400_001))),
)


@settings(deadline=None)  # the first example builds the network
@given(budget=budgets, heldout=st.lists(st.sampled_from([0.0, 50.0, 50.25, 99.0]), min_size=7, max_size=7))
def test_the_pick_is_the_most_accurate_within_the_budget_and_the_cheaper_of_two_as_good(budget, heldout):
    given_as, limit = budget
    model = picking()
    options = tuple(
        dataclasses.replace(option, heldout_top1=top1)
        for option, top1 in zip(bundle().description.options, heldout, strict=True)
    )
    model.description = dataclasses.replace(model.description, options=options)
    if limit < 600_000:
        with pytest.raises(BudgetError):
            model.pick(max_macs=given_as)
    else:
        wanted = brute_force(options, limit)
        found = model.pick(max_macs=given_as)
        assert (found.heldout_top1, found.macs) == (wanted.heldout_top1, wanted.macs)


@cache
def picking():
    return opened()


def test_a_call_runs_what_pick_names(model):
    x_NCHW = images(2)
    for macs in sorted({macs for macs, _, _ in INSTANCES.values()}):
        instance = model.pick(max_macs=macs).instance
        assert torch.equal(model(x_NCHW, max_macs=macs), model(x_NCHW, instance=instance))
    assert torch.equal(model(x_NCHW), model(x_NCHW, instance="layer3.0@0.5"))


def test_without_a_budget_the_most_accurate_is_picked(model):
    assert model.pick().instance == Instance.parse("layer3.0@0.5")


def test_what_is_known_of_the_network(model):
    assert [option.instance for option in model.instances] == list(INSTANCES)
    assert model.classes == tuple("abcdefg")
    assert not model.network.training


def test_a_budget_that_nothing_meets_names_the_cheapest(model):
    for ask in (lambda: model.pick(max_macs="599.999k"), lambda: model(images(1), max_macs=599_999)):
        with pytest.raises(
            BudgetError, match=r"^no instance is within 599,999 MACs; the cheapest, stem@0\.5, takes 600,000 MACs$"
        ):
            ask()


@pytest.mark.parametrize("budget", [{"max_macs": "50%"}, {"max_latency_ms": 5}, {"max_macs": 1, "max_latency_ms": 1}])
def test_an_instance_beside_a_budget(model, budget):
    for ask in (lambda: model.pick(instance="full", **budget), lambda: model(images(1), instance=FULL, **budget)):
        with pytest.raises(UsageError, match="an instance and a budget exclude each other; give one"):
            ask()


@pytest.mark.parametrize("text", ["stem@0.4", "layer1.0@0.75", "maxpool@0.5", "layer1.0@0.5+layer2.0@0.5"])
def test_an_instance_that_is_not_in_the_bundle(model, text):
    with pytest.raises(
        NotFoundError, match=re.escape(f"net has no instance {text}; it has stem@0.5, layer1.0@0.5+layer2.0@0.75,")
    ):
        model(images(1), instance=text)


@pytest.mark.parametrize("arguments", [{"max_macs": "fast"}, {"max_macs": 0}, {"max_macs": -5}, {"instance": "nonsense"}])
def test_what_is_no_budget_or_instance(model, arguments):
    with pytest.raises(UsageError, match=r"is not a budget|is not an instance"):
        model.pick(**arguments)
    assert issubclass(InstanceError, UsageError)


def test_nothing_held_out_to_choose_on():
    model = with_heldout([None] * 7)
    for budget in ({}, {"max_macs": "50%"}):
        with pytest.raises(NotFoundError, match="net: there is no held-out accuracy to choose by; name an instance"):
            model.pick(**budget)
    assert model.pick(instance="full").macs == 2_400_001
    with pytest.raises(BudgetError, match="the cheapest"):
        model.pick(max_macs=1)


def test_a_heldout_accuracy_of_nought_is_one():
    assert with_heldout([0.0] * 7).pick().instance == CHEAPEST


def test_latency_that_was_not_measured():
    model = opened()
    for size in (1, 4):
        with pytest.raises(UsageError, match=rf"a batch of {size} was not measured; call measure_latency\({size}\) first"):
            model(images(size), max_latency_ms=1e9)
    model.measure_latency(2, runs=1)
    with pytest.raises(UsageError, match=r"measure_latency\(3\)"):
        model.pick(max_latency_ms=1e9, batch_size=3)


def test_measured_latency_is_positive_and_lets_everything_in():
    model = opened()
    measured = model.measure_latency(2, runs=2)
    assert list(measured) == list(INSTANCES)
    assert all(0 < milliseconds < float("inf") for milliseconds in measured.values())
    assert model.pick(max_latency_ms=max(measured.values()), batch_size=2).instance == Instance.parse("layer3.0@0.5")
    assert model(images(2), max_latency_ms=float("inf")).shape == (2, 7)


def test_a_median_counts_without_the_first_run(clocked):
    model, set_times = clocked
    set_times({instance: [1000, 5, 1, 2] for instance in INSTANCES})
    assert model.measure_latency(1, runs=3) == pytest.approx(dict.fromkeys(INSTANCES, 2))


@pytest.mark.parametrize("seed", range(20))
def test_picks_keep_to_what_was_measured(clocked, seed):
    model, set_times = clocked
    draw = random.Random(seed)
    times = {instance: draw.uniform(1, 10) for instance in INSTANCES}
    set_times(times)
    measured = model.measure_latency(1, runs=1)
    assert measured == pytest.approx(times)
    for limit in (*measured.values(), *(draw.uniform(1, 11) for _ in range(5))):
        macs = draw.choice([None, 900_000, 2_000_000])
        within = [o for o in model.instances if measured[o.instance] <= limit and (macs is None or o.macs <= macs)]
        if within:
            assert model.pick(max_latency_ms=limit, max_macs=macs) == brute_force(within, float("inf"))
        else:
            with pytest.raises(BudgetError):
                model.pick(max_latency_ms=limit, max_macs=macs)


def test_the_next_larger_batch_that_was_measured_counts(clocked):
    model, set_times = clocked
    for size, shift in ((8, 80), (2, 20), (4, 40)):
        set_times({instance: shift + place for place, instance in enumerate(INSTANCES)})
        model.measure_latency(size, runs=1)
    for size, shift in ((1, 20), (2, 20), (3, 40), (4, 40), (5, 80), (8, 80)):
        first = (CHEAPEST, shift + 0.5)
        for instance, limit in (first, (Instance.parse("layer1.0@0.5"), shift + 3.5)):
            assert model.pick(max_latency_ms=limit, batch_size=size).instance == instance
            assert torch.equal(model(images(size), max_latency_ms=limit), model(images(size), instance=instance))
        with pytest.raises(BudgetError):
            model(images(size), max_latency_ms=shift - 0.5)
    with pytest.raises(UsageError, match="a batch of 9 was not measured"):
        model(images(9), max_latency_ms=1000)
    assert model(images(0), max_latency_ms=20.5).shape == (0, 7)


def test_a_latency_that_nothing_meets_names_the_quickest(clocked):
    model, set_times = clocked
    set_times(dict.fromkeys(INSTANCES, 9.0) | {FULL: 4.0})
    model.measure_latency(1, runs=1)
    with pytest.raises(
        BudgetError, match=r"within 2\.5 ms; the cheapest, stem@0\.5, takes 600,000 MACs, the quickest, full, 4 ms$"
    ):
        model.pick(max_latency_ms=2.5)
    with pytest.raises(BudgetError, match=r"^no instance is within 700,000 MACs and 5 ms;"):
        model.pick(max_latency_ms=5, max_macs=700_000)


def test_measuring_again_replaces_what_was_known(clocked):
    model, set_times = clocked
    set_times(dict.fromkeys(INSTANCES, 9.0))
    model.measure_latency(1, runs=1)
    set_times(dict.fromkeys(INSTANCES, 1.0))
    model.measure_latency(1, runs=1)
    assert model.pick(max_latency_ms=2)


def test_eight_threads_do_not_disturb_each_other():
    x_NCHW = images(3)
    limits = [macs for macs, _, _ in INSTANCES.values()]
    wanted = {limit: expected(x_NCHW, picking_alone(limit)) for limit in limits}
    for seed in range(5):
        model = opened()  # nothing is cached yet

        def several(worker, model=model, seed=seed):
            draw = random.Random(100 * seed + worker)
            asked = [draw.choice(limits) for _ in range(12)]
            return [(limit, model(x_NCHW, max_macs=limit)) for limit in asked]

        with ThreadPoolExecutor(8) as threads:
            for limit, logits in (answer for answers in threads.map(several, range(8)) for answer in answers):
                torch.testing.assert_close(logits, wanted[limit], rtol=1e-4, atol=1e-4)
                assert torch.equal(logits, model(x_NCHW, max_macs=limit))


# Cascades


def by_members(x_NCHW, text, members=None):
    """Return the answers of a cascade from its members, each run alone: log-probabilities, and which member answers."""
    averaged, parts = text.startswith("mean/"), text.removeprefix("mean/").split("/")
    probabilities, thresholds = [], []
    for part in parts:
        name, _, threshold = part.partition(":")
        instance, _, temperature = name.partition("~")
        logits = (members or expected)(x_NCHW, Instance.parse(instance)).double().numpy() / float(temperature or 1)
        raised = np.exp(logits - logits.max(1, keepdims=True))
        probabilities.append(raised / raised.sum(1, keepdims=True))
        thresholds.append(float(threshold or 0))
    answers, left = [], []
    for n in range(len(x_NCHW)):
        for number, threshold in enumerate(thresholds):
            seen = [p[n] for p in probabilities[: number + 1]]
            answer = sum(seen) / len(seen) if averaged else seen[-1]
            assert abs(answer.max() - threshold) > 1e-6, "another rounding would decide differently"
            if answer.max() >= threshold:
                break
        answers.append(np.log(answer))
        left.append(number)
    return torch.tensor(np.array(answers), dtype=torch.float32), torch.tensor(left)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("text", TEXTS)
def test_a_cascade_answers_as_its_members_do_alone(channels, text):
    model, x_NCHW = opened(channels), images(64, channels, seed=3)
    answers, left = by_members(x_NCHW, text)
    assert len(set(left.tolist())) == len(Cascade.parse(text).members), "no image leaves at one of the members"
    for given_as in (text, Cascade.parse(text)):
        found, found_left = model.run_cascade(x_NCHW, given_as)
        torch.testing.assert_close(found, answers, rtol=1e-4, atol=1e-4)
        assert (found.dtype, found_left.dtype) == (torch.float32, torch.int64)
        assert torch.equal(found_left, left)
        assert torch.equal(model(x_NCHW, cascade=given_as), found)


def test_a_cascade_that_is_not_listed_may_be_named():
    model, x_NCHW = opened(), images(16)
    text = "mean/stem@0.75:0.5/layer3.0@0.5:0.6/full~2.0"
    torch.testing.assert_close(model(x_NCHW, cascade=text), by_members(x_NCHW, text)[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(NotFoundError, match=r"net has no results for the cascade mean/.*; it has results for stem@0\.5:0\.7/"):
        model.pick(cascade=text)
    with pytest.raises(NotFoundError, match=r"net has no instance stem@0\.4; it has stem@0\.5, "):
        model(x_NCHW, cascade="stem@0.4:0.9/full")
    for wrong in ("full", "full/full", "stem@0.5:2/full"):
        with pytest.raises(InstanceError):
            model(x_NCHW, cascade=wrong)


def test_a_budget_of_a_cascade_is_the_mean_on_held_out_images(model):
    costs = [option.heldout_macs for option in model.cascades]
    assert costs == [600_000 + 340_000, 600_000 + 550_000 + 180_000, 900_000 + 450_000 + 230_000 + 90_000]
    assert [str(option.cascade) for option in model.cascades] == list(TEXTS)
    for limit, wanted in ((costs[0], 0), (costs[1] - 1, 0), (costs[1], 1), (costs[2], 1), ("39.2%", 0), ("100%", 1), (None, 1)):
        assert str(model.pick(cascade=True, max_macs=limit).cascade) == TEXTS[wanted]
        x_NCHW = images(5)
        assert torch.equal(model(x_NCHW, cascade=True, max_macs=limit), model(x_NCHW, cascade=TEXTS[wanted]))
    for text in TEXTS:
        assert model.pick(cascade=text).cascade == model.pick(cascade=Cascade.parse(text)).cascade == Cascade.parse(text)


def test_a_budget_that_no_cascade_meets_names_the_cheapest(model):
    said = re.escape(f"no cascade is within 939,999 MACs on average; the cheapest, {TEXTS[0]}, takes 940,000 MACs on average")
    for ask in (lambda: model.pick(cascade=True, max_macs=939_999), lambda: model(images(1), cascade=True, max_macs=939_999)):
        with pytest.raises(BudgetError, match=f"^{said}$"):
            ask()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"cascade": True, "instance": "full"}, "an instance and a cascade exclude each other"),
        ({"cascade": TEXTS[0], "instance": "full"}, "an instance and a cascade exclude each other"),
        ({"cascade": True, "max_latency_ms": 5}, "the latency of a cascade depends on the images; choose"),
        ({"cascade": TEXTS[0], "max_macs": "50%"}, "a named cascade and a budget exclude each other"),
        ({"cascade": True, "max_macs": "much"}, "'much' is not a budget"),
    ],
)
def test_what_does_not_go_with_a_cascade(model, arguments, said):
    for ask in (lambda: model.pick(**arguments), lambda: model(images(1), **arguments)):
        with pytest.raises(UsageError, match=said):
            ask()


def test_without_cascades_a_line_says_how_to_make_them():
    model = opened(cascades=())
    said = r"^net has no cascade to choose; `sdpctl search net --cascade --max-macs 50%` makes some, and then `sdpctl export"
    for ask in (lambda: model.pick(cascade=True), lambda: model.pick(cascade=TEXTS[0]), lambda: model(images(1), cascade=True)):
        with pytest.raises(NotFoundError, match=said):
            ask()
    assert model(images(2), cascade=TEXTS[0]).shape == (2, 7)


def test_a_cascade_of_no_images_or_one_or_of_another_layout(model):
    assert model(images(0), cascade=True).shape == (0, 7)
    x_NCHW = images(9)
    whole, left = model.run_cascade(x_NCHW, TEXTS[1])
    for n in range(9):
        one, one_left = model.run_cascade(x_NCHW[n : n + 1], TEXTS[1])
        torch.testing.assert_close(one, whole[n : n + 1], rtol=1e-4, atol=1e-5)
        assert torch.equal(one_left, left[n : n + 1])
    before = x_NCHW.clone()
    torch.testing.assert_close(model(x_NCHW.double(), cascade=TEXTS[1]), whole)
    assert torch.equal(x_NCHW, before)
    with pytest.raises(UsageError, match="takes normalised images"):
        model.run_cascade(torch.zeros(1, 3, SIZE, SIZE), TEXTS[1])


def test_a_cascade_in_bfloat16_is_near():
    model = Runtime(bundle(), device="cpu", precision="bf16")
    x_NCHW = images(16)
    never = "stem@0.5~1.5:1/layer2.1@0.5:1/full~0.7"  # no confidence is 1
    wanted = torch.log_softmax(expected(x_NCHW, FULL) / 0.7, 1)
    got = model(x_NCHW, cascade=never)
    assert got.dtype == torch.float32
    assert 1e-4 < (got - wanted).norm() < 0.1 * wanted.norm()


THREADS, CALLS = 8, 2000


def test_calls_of_eight_threads_with_cascades_and_budgets_are_each_the_members_alone():
    """Each call has its own images, and its own budget, instance, cascade that is listed, or cascade that is not."""
    pool = images(64, seed=11)
    alone_at = {instance: expected(pool, instance) for instance in INSTANCES}
    unlisted = "layer1.0@0.5+layer2.0@0.75:0.5/stem@0.75:0.45/layer3.0@0.5"
    answers = {text: by_members(pool, text)[0] for text in (*TEXTS, unlisted)}
    asked = [{"max_macs": macs} for macs, _, _ in INSTANCES.values()]
    wanted = [alone_at[picking_alone(macs)] for macs, _, _ in INSTANCES.values()]
    for option in bundle().description.cascades:
        asked.append({"cascade": True, "max_macs": option.heldout_macs})
    wanted += [answers[TEXTS[0]], answers[TEXTS[1]], answers[TEXTS[1]]]
    asked += [{"cascade": text} for text in answers]
    wanted += answers.values()
    assert min((a - b).abs().max() for i, a in enumerate(answers.values()) for b in [*answers.values()][:i]) > 0.01
    model = opened()

    def several(worker):
        draw = random.Random(worker)
        most = 0.0
        for _ in range(CALLS // THREADS):
            rows, number = draw.sample(range(64), draw.randint(1, 5)), draw.randrange(len(asked))
            got = model(pool[rows], **asked[number])
            most = max(most, float((got - wanted[number][rows]).abs().max()))
        return most

    with ThreadPoolExecutor(THREADS) as threads:
        assert max(threads.map(several, range(THREADS))) < 1e-4


def picking_alone(limit):
    return brute_force(bundle().description.options, limit).instance


def held():
    """Return how many bytes the tensors on the CPU hold; those of another type, as of a tracer, hold none."""
    gc.collect()
    plain = [found for found in gc.get_objects() if type(found) in (torch.Tensor, nn.Parameter)]
    storages = [found.untyped_storage() for found in plain if found.device.type == "cpu" and found.layout == torch.strided]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_weights_are_there_once_whatever_runs():
    model = opened()
    places = {name: tensor.data_ptr() for name, tensor in model.network.state_dict().items()}
    before = held()
    for _ in range(2):
        for instance in INSTANCES:
            model(images(1), instance=instance)
    grown = held() - before
    assert {name: tensor.data_ptr() for name, tensor in model.network.state_dict().items()} == places
    assert grown == 0


def test_the_bundle_is_left_as_it_was():
    source = bundle()
    tensors = [*source.weights.values(), *source.statistics.mean.values(), *source.statistics.var.values()]
    before = [tensor.clone() for tensor in tensors]
    model = opened()
    model(images(2), instance=CHEAPEST)
    model.network.fc.weight.data.zero_()
    model.network.conv1.weight.data.zero_()
    assert all(torch.equal(tensor, was) for tensor, was in zip(tensors, before, strict=True))


def test_statistics_that_lack_an_instance_are_refused_at_once():
    source = bundle()
    statistics = calibrate(trained(1), [FULL], calibration(1))
    with pytest.raises(NotFoundError, match="no BatchNorm statistics of"):
        Runtime(dataclasses.replace(source, statistics=statistics), device="cpu")


def test_a_device_that_is_not_there():
    with pytest.raises(ResourceError, match="device 'cuda:99' cannot be used here"):
        Runtime(bundle(), device="cuda:99")


def test_bfloat16_is_near():
    model = Runtime(bundle(), device="cpu", precision="bf16")
    x_NCHW = images(16)
    for instance in INSTANCES:
        wanted, got = expected(x_NCHW, instance), model(x_NCHW, instance=instance)
        assert got.dtype == torch.float32
        assert 1e-4 < (got - wanted).norm() < 0.1 * wanted.norm()


def test_no_random_number_is_drawn():
    random.seed(1)
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    model = opened()
    model(images(2), max_macs="50%")
    model.measure_latency(1, runs=1)
    model.preprocess(Image.new("RGB", (20, 14)))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]


@pytest.mark.parametrize(
    "x_NCHW",
    [
        torch.zeros(2, 1, SIZE, SIZE, dtype=torch.uint8),
        torch.zeros(2, 1, SIZE, SIZE, dtype=torch.int64),
        torch.zeros(1, SIZE, SIZE),
        torch.zeros(2, 3, SIZE, SIZE),
        torch.zeros(2, SIZE, SIZE, 1),
        torch.zeros(2, 1, SIZE, SIZE + 1),
        torch.zeros(2, 1, SIZE + 1, SIZE),
        torch.zeros(1, 2, 1, SIZE, SIZE),
        torch.zeros(SIZE),
        torch.zeros(()),
    ],
    ids=lambda x_NCHW: f"{x_NCHW.dtype} {tuple(x_NCHW.shape)}",
)
def test_images_of_another_type_or_shape(model, x_NCHW):
    with pytest.raises(
        UsageError, match=r"takes normalised images of shape \(N, 1, 10, 10\); `preprocess` turns an image into one"
    ):
        model(x_NCHW, instance="full")


def noise(*shape, dtype=np.uint8):
    return np.random.default_rng(len(shape)).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def by_torchvision(image, channels):
    """Return what a test image becomes: one of mode RGB or L, by transforms made anew."""
    takes = bundle(channels).description.input
    steps = [v2.Resize(SIZE + 3, antialias=True), v2.CenterCrop(SIZE), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose([*steps, v2.Normalize(takes.mean, takes.std)])(image.convert("RGB" if channels == 3 else "L"))[None]


def palette():
    image = Image.fromarray(noise(17, 23, 3)).quantize(32)
    image.info["transparency"] = bytes(range(32))
    return image


COLOUR, GREY = noise(17, 23, 3), noise(23, 17)
PICTURES = {
    "colour": (Image.fromarray(COLOUR), None),
    "grey": (Image.fromarray(GREY), None),
    "with an alpha channel": (Image.fromarray(np.dstack([COLOUR, noise(17, 23)])), Image.fromarray(COLOUR)),
    "grey with an alpha channel": (Image.fromarray(np.dstack([GREY, GREY.copy()[::-1]]), "LA"), Image.fromarray(GREY)),
    "black and white": (Image.fromarray(GREY).convert("1"), None),
    "a palette": (Image.fromarray(COLOUR).quantize(32), None),
    "a palette with transparency": (palette(), None),
    "sixteen bit": (
        Image.fromarray(noise(20, 15, dtype=np.uint16)),
        Image.fromarray((noise(20, 15, dtype=np.uint16) // 256).astype(np.uint8)),
    ),
}


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_or_its_file_becomes_what_torchvision_makes_of_it(channels, kind, tmp_path):
    image, plain = PICTURES[kind]
    if plain is None:
        plain = image.convert("RGBA") if kind == "a palette with transparency" else image
    wanted = by_torchvision(plain, channels)
    model = opened(channels)
    image.save(tmp_path / "image.png")
    before = image.tobytes()
    for given_as in (image, tmp_path / "image.png", str(tmp_path / "image.png")):
        found = model.preprocess(given_as)
        assert (found.shape, found.dtype, found.device.type) == ((1, channels, SIZE, SIZE), torch.float32, "cpu")
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert image.tobytes() == before
    assert model(model.preprocess(image), max_macs="50%").shape == (1, 7)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("pixels", "image"),
    [
        (GREY, GREY),
        (GREY[..., None], GREY),
        (COLOUR, COLOUR),
        (COLOUR[:, ::-1], COLOUR[:, ::-1].copy()),
        (np.dstack([COLOUR, noise(17, 23)]), COLOUR),
        (torch.from_numpy(GREY), GREY),
        (torch.from_numpy(GREY)[None], GREY),
        (torch.from_numpy(COLOUR).movedim(-1, 0), COLOUR),
        (torch.from_numpy(COLOUR).movedim(-1, 0).contiguous(), COLOUR),
        (torch.from_numpy(np.dstack([COLOUR, noise(17, 23)])).movedim(-1, 0), COLOUR),
        (noise(1, 40, 3), noise(1, 40, 3)),
        (torch.from_numpy(noise(3, 3, 4)), noise(3, 3, 4).transpose(1, 2, 0).copy()),
    ],
)
def test_pixels_become_what_torchvision_makes_of_them(channels, pixels, image):
    wanted = by_torchvision(Image.fromarray(np.ascontiguousarray(image)), channels)
    torch.testing.assert_close(opened(channels).preprocess(pixels), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "pixels",
    [
        noise(9, 9, 2),
        noise(9, 9, 5),
        noise(9),
        noise(1, 9, 9, 3),
        noise(9, 9, 3) / 255,
        noise(9, 9, 3).astype(np.int64),
        noise(9, 9, dtype=np.uint16),
        torch.from_numpy(noise(9, 9, 3)),
        torch.from_numpy(noise(1, 3, 9, 9)),
        torch.rand(3, 9, 9),
        torch.zeros((), dtype=torch.uint8),
        noise(0, 9, 3),
        noise(9, 0),
    ],
    ids=lambda pixels: f"{type(pixels).__name__} {pixels.dtype} {tuple(pixels.shape)}",
)
def test_pixels_that_are_no_image(model, pixels):
    with pytest.raises(DataError, match=re.escape(f"pixels of shape {tuple(pixels.shape)} and dtype ") + ".* are not an image"):
        model.preprocess(pixels)


def test_a_photograph_that_was_stored_turned(tmp_path):
    """A file and a PIL image of it are seen as the upright photograph is."""
    model = opened(3)
    upright = Image.fromarray(noise(14, 20, 3))
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned a quarter counter-clockwise
    upright.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "phone.png", exif=exif)
    wanted = model.preprocess(upright)
    assert torch.equal(model.preprocess(tmp_path / "phone.png"), wanted)
    with Image.open(tmp_path / "phone.png") as image:
        assert torch.equal(model.preprocess(image), wanted)


def test_an_image_that_nothing_can_be_made_of(model):
    for image in (Image.new("L", (0, 9)), Image.new("L", (1, 1001)), np.zeros((2, 2002), np.uint8)):
        with pytest.raises(DataError, match=r"^it has [\d,]+ x [\d,]+ pixels"):
            model.preprocess(image)


def test_a_file_that_is_no_image(model, tmp_path):
    (tmp_path / "text.png").write_text("a text")
    Image.fromarray(COLOUR).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:500])
    for name in ("text.png", "half.png", "missing.png", "."):
        with pytest.raises(DataError, match=rf"^{re.escape(str(tmp_path / name))}: this image cannot be decoded \(.+\)"):
            model.preprocess(tmp_path / name)
