"""Cascades against their members run alone on all images, and against what ptflops counts while they run."""

import copy
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import MappingProxyType

import pytest
import torch
from library_networks import fill, library_network
from networks import randomise_norms
from ptflops import get_model_complexity_info
from torch import nn

from sdpctl.cascade import Cascade
from sdpctl.engine.calibrate import CalibratedNorms, calibrate
from sdpctl.engine.cascade import ROUNDING, CascadeRun, added_macs, answers, settled
from sdpctl.engine.cost import Costs
from sdpctl.errors import InstanceError
from sdpctl.instance import ALL, FULL, Instance
from sdpctl.models import create_model

EXACT = {"rtol": 1e-10, "atol": 1e-10}
IMAGES = 17
SIZE = 16
ARCHES = ("resnet20", "preresnet18", "twopipe", "timm/resnet10t")
SMALLER = {"preresnet18": {"width": 0.25}, "twopipe": {"widths": (16, 24, 32, 32, 48)}}


def network(arch):
    """Build a network whose answers on random images differ in confidence."""
    torch.manual_seed(1)
    if arch.startswith("timm/"):
        model = create_model(arch, num_classes=7).eval()
        model.load_state_dict(fill(library_network(arch, 7), torch.randn(16, 3, SIZE, SIZE)).state_dict())
        return model
    return randomise_norms(create_model(arch, num_classes=7, **SMALLER.get(arch, {}))).eval()


def draw_members(model, draw):
    """Draw two to four different networks; half of the members copy the beginning of an earlier one."""
    if model.together:
        ratios = draw.sample((1.0, 0.75, 0.5, 0.25), draw.randint(2, 4))
        return tuple(Instance(((ALL, ratio),)) for ratio in ratios)
    members, count = [], draw.randint(2, 4)
    while len(members) < count:
        choices = {point: draw.choice((1.0, 1.0, 0.5, 0.75)) for point in model.points}
        if members and draw.random() < 0.7:
            earlier = draw.choice(members)
            choices |= {point: earlier.ratio(point) for point in model.points[: draw.randrange(len(model.points))]}
        member = Instance(tuple(choices.items()))
        if member not in members:
            members.append(member)
    return tuple(members)


def confidences_alone(model, norms, cascade, x_NCHW):
    """Return log-probabilities of each member's answer on all images, (M, N, K), by plain forward passes and formulas."""
    found = []
    for member, temperature in zip(cascade.members, cascade.temperatures, strict=True):
        alone = copy.deepcopy(model)
        passed = []
        for segment in alone.segments():
            for name, bn in alone.norms(segment).items():
                mean, var = norms.statistics.at(member.among(passed), name)
                bn.running_mean.copy_(mean)
                bn.running_var.copy_(var)
            passed += [segment.point] if segment.point else []
        found.append((alone(x_NCHW, member) / temperature).exp())
        found[-1] /= found[-1].sum(1, keepdim=True)
    if cascade.averaged:
        found = [sum(found[: number + 1]) / (number + 1) for number in range(len(found))]
    return torch.stack(found).log()


def thresholds_between(model, norms, cascade, x_NCHW, draw):
    """Return the cascade with thresholds between the confidences of the images that reach each member, so that some leave."""
    log_p_MNK = confidences_alone(model, norms, cascade, x_NCHW)
    remaining, thresholds = torch.arange(len(x_NCHW)), []
    for log_p_NK in log_p_MNK[:-1]:
        confidences = log_p_NK.amax(1).exp()[remaining].sort().values.tolist()
        cut = draw.randint(1, len(confidences) - 1)
        thresholds.append((confidences[cut - 1] + confidences[cut]) / 2)
        remaining = remaining[log_p_NK.amax(1).exp()[remaining] < thresholds[-1]]
        if len(remaining) < 2:
            thresholds += [0.9] * (len(cascade.members) - 1 - len(thresholds))
            break
    return replace(cascade, thresholds=tuple(thresholds))


def expected(cascade, log_p_MNK):
    """Decide image by image."""
    chosen, left = [], []
    for n in range(log_p_MNK.shape[1]):
        for m in range(len(cascade.members)):
            if m == len(cascade.thresholds) or log_p_MNK[m, n].max().exp() >= cascade.thresholds[m]:
                chosen.append(log_p_MNK[m, n])
                left.append(m)
                break
    return torch.stack(chosen), torch.tensor(left)


def drawn(model, members, draw, *, averaged):
    temperatures = tuple(draw.choice((1.0, 0.7, 1.9)) for _ in members)
    return Cascade(members, (0.5,) * (len(members) - 1), temperatures, averaged)


def norms_of(model, members):
    torch.manual_seed(2)
    batches = [(torch.randn(8, 3, SIZE, SIZE), torch.zeros(8)) for _ in range(2)]
    return CalibratedNorms(model, calibrate(model, members, batches))


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("arch", ARCHES)
def test_answers_equal_those_of_the_members_alone(arch, averaged, double):
    model, draw = network(arch), random.Random(arch)
    torch.manual_seed(3)
    x_NCHW = torch.randn(IMAGES, 3, SIZE, SIZE)
    seen = set()
    for _ in range(5):
        cascade = drawn(model, draw_members(model, draw), draw, averaged=averaged)
        norms = norms_of(model, cascade.members)
        with torch.inference_mode():
            cascade = thresholds_between(model, norms, cascade, x_NCHW, draw)
            log_p_NK, left_N = expected(cascade, confidences_alone(model, norms, cascade, x_NCHW))
            run = CascadeRun(model, cascade, norms)
            found_NK, found_N = run(x_NCHW)
            alone = [run(x_NCHW[n : n + 1]) for n in (0, 7)]  # batches of one
        assert found_N.tolist() == left_N.tolist()
        assert found_N.dtype == torch.int64
        torch.testing.assert_close(found_NK, log_p_NK, **EXACT)
        assert [left_1.item() for _, left_1 in alone] == left_N[[0, 7]].tolist()
        torch.testing.assert_close(torch.cat([one_1K for one_1K, _ in alone]), log_p_NK[[0, 7]], **EXACT)
        seen |= set(left_N.tolist())
    assert seen >= {0, 1, 2}


@pytest.mark.parametrize("averaged", [False, True])
def test_the_same_decision_from_logits(averaged, double):
    draw = random.Random(4)
    for _ in range(20):
        count = draw.randint(2, 5)
        members = tuple(Instance((("stem", 0.1 + 0.1 * number),)) for number in range(count))
        thresholds = tuple(draw.uniform(0.3, 0.8) for _ in members[1:])
        cascade = Cascade(members, thresholds, tuple(draw.uniform(0.5, 2) for _ in members), averaged)
        logits_MNK = 2 * torch.randn(count, 40, 5)
        p_MNK = torch.stack([torch.softmax(one / t, 1) for one, t in zip(logits_MNK, cascade.temperatures, strict=True)])
        if averaged:
            p_MNK = p_MNK.cumsum(0) / torch.arange(1, count + 1)[:, None, None]
        log_p_NK, left_N = expected(cascade, p_MNK.log())
        found_NK, found_N = answers(cascade, logits_MNK)
        assert found_N.tolist() == left_N.tolist()
        torch.testing.assert_close(found_NK, log_p_NK, **EXACT)


@torch.inference_mode()
def test_fp32_gives_fp32_and_the_same_decisions_as_the_logits():
    model, draw = network("resnet20"), random.Random(5)
    x_NCHW = torch.randn(IMAGES, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    model.channels_last()
    members = (Instance.parse("layer1.1@0.5"), Instance.parse("layer2.0@0.5"), FULL)
    norms = norms_of(model, members)
    cascade = thresholds_between(model, norms, drawn(model, members, draw, averaged=True), x_NCHW, draw)
    found_NK, found_N = CascadeRun(model, cascade, norms)(x_NCHW)
    alone = [Cascade((m, other), (1e-9,), (1.0, 1.0)) for m, other in zip(members, members[1:] + members[:1], strict=True)]
    logits = [CascadeRun(model, one, norms)(x_NCHW)[0] for one in alone]  # log-probabilities of the first member
    known_NK, known_N = answers(cascade, logits)
    assert found_N.tolist() == known_N.tolist()
    assert found_NK.dtype == known_NK.dtype == torch.float32
    torch.testing.assert_close(found_NK, known_NK, rtol=1e-4, atol=1e-5)


class Recorded:
    """The norms of a cascade; counts how many images pass each convolution's result to a norm, by name."""

    heads = MappingProxyType({})

    def __init__(self, norms):
        self.norms, self.images = norms, {}

    def __call__(self, nodes):
        inner = self.norms(nodes)

        def norm(bn, x_NCHW, *args, **options):
            name = self.norms.names[bn]
            self.images[name] = self.images.get(name, 0) + len(x_NCHW)
            return inner(bn, x_NCHW, *args, **options)

        return norm


class Passed(nn.Module):
    """A cascade as a module that ptflops runs."""

    def __init__(self, run):
        super().__init__()
        self.run = run

    @torch.no_grad()
    def forward(self, x_NCHW):
        return self.run(x_NCHW)[0]


@pytest.mark.parametrize(
    ("arch", "texts"),
    [
        ("resnet20", ("stem@0.5", "layer2.0@0.5", "layer3.1@0.5", "full")),
        ("resnet20", ("layer2.1@0.5+layer3.0@0.5", "stem@0.5", "layer2.1@0.5", "full")),
        ("preresnet18", ("layer3.0@0.5", "layer2.0@0.5", "full")),
        ("twopipe", ("all@0.25", "all@0.5", "full")),
        ("timm/resnet10t", ("layer2.0@0.5", "layer3.0@0.5", "full")),
    ],
)
@pytest.mark.parametrize("averaged", [False, True])
def test_what_runs_is_what_is_counted(arch, texts, averaged):
    """ptflops counts the MACs of a call: for each member its added MACs, times the images that reach it."""
    model, draw = network(arch), random.Random(6)
    members = tuple(map(Instance.parse, texts))
    norms = norms_of(model, members)
    x_NCHW = torch.randn(IMAGES, 3, SIZE, SIZE)
    with torch.no_grad():
        cascade = thresholds_between(model, norms, drawn(model, members, draw, averaged=averaged), x_NCHW, draw)
        _, left_N = CascadeRun(model, cascade, norms)(x_NCHW)
    reached = [int((left_N >= number).sum()) for number in range(len(members))]
    assert len(set(reached)) > 2
    counted, _ = get_model_complexity_info(
        Passed(CascadeRun(model, cascade, norms)),
        (1,),
        as_strings=False,
        print_per_layer_stat=False,
        backend="aten",
        input_constructor=lambda _: {"x_NCHW": x_NCHW},
    )
    added = added_macs(cascade, Costs(model, (3, SIZE, SIZE)))
    assert counted == sum(macs * images for macs, images in zip(added, reached, strict=True))
    alone = Costs(model, (3, SIZE, SIZE))
    assert added[0] == alone.of(members[0]).macs
    if not model.together:  # two instances of `twopipe` differ from the first convolution on
        assert all(macs < alone.of(member).macs for macs, member in list(zip(added, members, strict=True))[2:])


@torch.inference_mode()
def test_each_segment_runs_on_the_images_that_need_it():
    model, draw = network("resnet20"), random.Random(7)
    members = tuple(map(Instance.parse, ("layer2.0@0.5", "layer3.0@0.5", "full")))
    norms = norms_of(model, members)
    x_NCHW = torch.randn(IMAGES, 3, SIZE, SIZE)
    cascade = thresholds_between(model, norms, drawn(model, members, draw, averaged=False), x_NCHW, draw)
    recorded = Recorded(norms)
    _, left_N = CascadeRun(model, cascade, recorded)(x_NCHW)
    first, second, third = (int((left_N >= number).sum()) for number in range(3))
    assert first > second > third > 0
    for name, images in recorded.images.items():
        block = name.removesuffix(".bn1").removesuffix(".bn2")
        passed_once = block in ("bn1", "layer1.0", "layer1.1", "layer1.2", "layer2.0")
        shared = block in ("layer2.1", "layer2.2", "layer3.0")
        assert images == (first if passed_once else first + second if shared else first + second + third), name


@torch.inference_mode()
def test_members_that_see_no_image_do_not_run():
    model = network("resnet20")
    members = (Instance.parse("layer2.0@0.5"), FULL)
    statistics = calibrate(model, members[:1], [(torch.randn(8, 3, SIZE, SIZE), torch.zeros(8))])
    run = CascadeRun(model, Cascade(members, (1e-9,), (1.0, 1.0)), CalibratedNorms(model, statistics))
    log_p_NK, left_N = run(torch.randn(5, 3, SIZE, SIZE))  # `full` has no statistics, so it would fail
    assert left_N.tolist() == [0] * 5
    assert log_p_NK.exp().sum(1).tolist() == pytest.approx([1] * 5)


@torch.inference_mode()
def test_all_images_reach_the_last_member():
    model = network("resnet20")
    members = (Instance.parse("layer2.0@0.5"), FULL)
    norms = norms_of(model, members)
    x_NCHW = torch.randn(5, 3, SIZE, SIZE)
    log_p_NK, left_N = CascadeRun(model, Cascade(members, (1.0,), (1.0, 1.0)), norms)(x_NCHW)
    assert left_N.tolist() == [1] * 5
    known_NK, _ = CascadeRun(model, Cascade((FULL, members[0]), (1e-9,), (1.0, 1.0)), norms)(x_NCHW)
    torch.testing.assert_close(log_p_NK, known_NK)


@torch.inference_mode()
def test_an_empty_batch():
    model = network("resnet20")
    members = (Instance.parse("layer2.0@0.5"), FULL)
    log_p_NK, left_N = CascadeRun(model, Cascade(members, (0.5,), (1.0, 1.0)), norms_of(model, members))(
        torch.randn(0, 3, SIZE, SIZE)
    )
    assert log_p_NK.shape == (0, 7)
    assert left_N.shape == (0,)


def test_eight_threads_share_a_cascade():
    model, draw = network("resnet20"), random.Random(8)
    members = tuple(map(Instance.parse, ("layer1.1@0.5", "layer2.0@0.5", "layer3.0@0.5", "full")))
    norms = norms_of(model, members)
    with torch.inference_mode():
        pool_NCHW = torch.randn(64, 3, SIZE, SIZE)
        cascade = thresholds_between(model, norms, drawn(model, members, draw, averaged=True), pool_NCHW, draw)
        run = CascadeRun(model, cascade, norms)
        known_NK, known_N = expected(cascade, confidences_alone(model, norms, cascade, pool_NCHW))

    @torch.inference_mode()
    def call(seed):
        rows = torch.randperm(64, generator=torch.Generator().manual_seed(seed))[: 1 + seed % 17]
        found_NK, found_N = run(pool_NCHW[rows])
        return found_N.tolist() == known_N[rows].tolist() and torch.allclose(found_NK, known_NK[rows], atol=1e-4)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(call, range(200)))
    assert set(known_N.tolist()) >= {0, 1, 2}


def test_a_point_that_the_network_lacks():
    model = network("resnet20")
    cascade = Cascade.parse("maxpool@0.5:0.9/full")
    norms = norms_of(model, [FULL])
    with pytest.raises(InstanceError, match="no point 'maxpool'"):
        CascadeRun(model, cascade, norms)
    with pytest.raises(InstanceError, match="no point 'maxpool'"):
        added_macs(cascade, Costs(model, (3, SIZE, SIZE)))


@pytest.mark.parametrize("threshold", [0.6, 0.9, 0.99995, 1 - 1e-9])
def test_an_image_is_settled_if_its_log_odds_are_not_those_of_a_threshold(threshold):
    """With two classes the log-odds of the first are the difference of the logits."""
    odds_N = torch.linspace(0, 25, 100_001, dtype=torch.float64)
    logits_NK = torch.stack([odds_N, torch.zeros_like(odds_N)], dim=1)
    cascade = replace(Cascade.parse("stem@0.5:0.9/full"), thresholds=(threshold,))
    limit = torch.logit(torch.tensor(threshold, dtype=torch.float64))
    near_N = (odds_N - limit).abs() < ROUNDING
    assert 7 <= near_N.sum() <= 9  # of images at distances of ROUNDING / 4
    assert torch.equal(settled(cascade, [logits_NK, logits_NK]), ~near_N)


def test_images_that_no_member_is_certain_of_are_settled_at_a_threshold_of_one():
    logits_NK = torch.tensor([[30.0, 0.0], [9.0, 0.0], [100.0, 0.0]], dtype=torch.float64)
    assert settled(Cascade.parse("stem@0.5:1/full"), [logits_NK, logits_NK]).tolist() == [True, True, True]
