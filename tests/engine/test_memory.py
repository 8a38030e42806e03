"""What a walk holds: the bytes of its maps, counted as they are made and freed, never exceed the memory it was given."""

import functools
import random
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sdpctl.engine.calibrate import CalibratedNorms, calibrate
from sdpctl.engine.device import autocast
from sdpctl.engine.evaluate import evaluate
from sdpctl.engine.footprint import footprints
from sdpctl.engine.settings import WalkSettings
from sdpctl.engine.tree import Tree
from sdpctl.errors import ResourceError
from sdpctl.instance import FULL, Instance
from sdpctl.models import create_model
from sdpctl.models.state import map_shape
from sdpctl.sdpoint import sdpoint_instances

IMAGES = 7
"""No network here has channels that 7 divides, so that a tensor of 4 dimensions whose first one it divides is a map."""

NETWORKS = {
    "resnet18": ("resnet18", 64, {"stem": "imagenet"}),
    "resnet18-small": ("resnet18", 32, {"stem": "small"}),
    "resnet50": ("resnet50", 32, {"stem": "imagenet"}),
    "preresnet50": ("preresnet50", 32, {"stem": "imagenet"}),
    "resnet20": ("resnet20", 32, {}),
    "twopipe": ("twopipe", 32, {}),
}


class Held(TorchDispatchMode):
    """Counts the bytes of the maps that are alive, by their storages; those that came in do not count."""

    def __init__(self, *given):
        super().__init__()
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata: 0 for tensor in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 4 and tensor.device.type == "cpu":
                self.see(tensor)
        return out

    def see(self, tensor):
        storage = tensor.untyped_storage()
        if len(tensor) % IMAGES == 0 and storage._cdata not in self.known:
            self.known[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, storage._cdata)

    def drop(self, key):
        self.now -= self.known.pop(key)


@functools.cache
def network(name):
    torch.manual_seed(0)
    arch, size, options = NETWORKS[name]
    return create_model(arch, num_classes=7, **options).to(memory_format=torch.channels_last), size


def images(size, count=IMAGES):
    torch.manual_seed(1)
    return torch.randn(count, 3, size, size).to(memory_format=torch.channels_last)


def several_points(model, count=30):
    draw = random.Random(3)
    return [
        Instance(tuple((point, draw.choice((0.5, 0.75))) for point in model.points if draw.random() < 0.4))
        for _ in range(count)
    ]


def held(tree, x_NCHW, norms):
    with torch.inference_mode(), Held(x_NCHW) as seen:
        logits = tree.walk(x_NCHW, norms)
    assert seen.now == 0
    assert len(logits) == len(tree.instances)
    return seen.peak


@functools.cache
def calibrated(name, instances):
    model, size = network(name)
    wanted = [FULL] if instances == "full" else sdpoint_instances(model) if instances == "grid" else several_points(model)
    return wanted, CalibratedNorms(model, calibrate(model, wanted, [(images(size), None)]))


def test_no_weight_is_counted_as_a_map():
    assert not any(len(p) % IMAGES == 0 for name in NETWORKS for p in network(name)[0].parameters() if p.dim() == 4)


@pytest.fixture(params=[(name, instances) for name in NETWORKS for instances in ("grid", "several")], ids="-".join)
def walked(request):
    """A network, instances of it, their norms, images, and the least memory for all of them."""
    (model, size), (wanted, norms) = network(request.param[0]), calibrated(*request.param)
    x_NCHW = images(size)
    return model, wanted, norms, x_NCHW, Tree(model, wanted, memory=0).needs(x_NCHW)


def test_a_walk_holds_no_more_than_its_memory(walked):
    model, wanted, norms, x_NCHW, needs = walked
    seen = []
    for factor in (1, 1.3):
        memory = int(factor * needs)
        seen.append(held(Tree(model, wanted, memory=memory), x_NCHW, norms))
        assert seen[-1] <= memory
    assert min(seen) > needs // 2


def test_many_small_maps_hold_no_more_than_the_memory_either():
    model = create_model("preresnet18", num_classes=7, stem="imagenet")
    draw, x_NCHW = random.Random(0), images(16)
    drawn = [Instance(tuple((p, draw.choice((0.5, 0.75))) for p in model.points if draw.random() < 0.9)) for _ in range(60)]
    norms = CalibratedNorms(model, calibrate(model, drawn, [(x_NCHW, None)]))
    needs = Tree(model, drawn, memory=0).needs(x_NCHW)
    assert held(Tree(model, drawn, memory=needs), x_NCHW, norms) <= needs


def test_calibration_and_bfloat16_hold_no_more_than_the_least(walked):
    model, wanted, norms, x_NCHW, needs = walked
    with Held(x_NCHW) as seen:
        calibrate(model, wanted, [(x_NCHW, None)], WalkSettings(memory=needs))
    assert needs // 2 < seen.peak <= needs
    with autocast(x_NCHW.device, "bf16"):
        half = Tree(model, wanted, memory=0).needs(x_NCHW)
        assert needs // 2 <= half < 0.7 * needs  # the indices of a max-pool are as large in either
        assert half // 2 < held(Tree(model, wanted, memory=half), x_NCHW, norms) <= half


@pytest.mark.parametrize("name", NETWORKS)
def test_by_default_a_grid_holds_at_most_three_times_what_full_holds(name):
    model, size = network(name)
    alone, grid = (
        held(Tree(model, wanted), images(size), norms) for wanted, norms in (calibrated(name, "full"), calibrated(name, "grid"))
    )
    assert grid <= 3 * alone


@pytest.mark.parametrize("missing", [1, 2**10])
def test_less_than_needed_is_refused_by_name(missing):
    (model, size), (wanted, norms) = network("resnet20"), calibrated("resnet20", "grid")
    x_NCHW = images(size)
    tree = Tree(model, wanted, memory=Tree(model, wanted, memory=0).needs(x_NCHW) - missing)
    with (
        torch.inference_mode(),
        pytest.raises(ResourceError, match=r"memory=\S+ does not hold .* a batch of 7 images") as caught,
    ):
        tree.walk(x_NCHW, norms)
    assert "\n" not in str(caught.value)
    with pytest.raises(ResourceError, match="memory="):
        calibrate(model, wanted, [(x_NCHW, None)], WalkSettings(memory=tree.memory))
    with pytest.raises(ResourceError, match="memory="):
        evaluate(model, wanted, [(x_NCHW, None)], norms.statistics, WalkSettings(memory=tree.needs(x_NCHW[:1]) - missing))


@pytest.mark.parametrize("wanted", ["full", "grid"])
def test_what_a_batch_needs_is_what_its_images_need_whether_limited_or_not(wanted):
    (model, size), (wanted, _) = network("resnet20"), calibrated("resnet20", wanted)
    x_NCHW = images(size)
    needs = Tree(model, wanted, memory=0).needs(x_NCHW)
    assert needs == IMAGES * Tree(model, wanted, memory=0).needs(x_NCHW[:1])
    assert Tree(model, wanted).needs(x_NCHW) == needs


@pytest.mark.parametrize(("fit", "lengths"), [(13, [13]), (12, [7, 6]), (4, [4, 4, 4, 1]), (1.9, [1] * 13), (0.5, [1] * 13)])
def test_parts_are_every_image_once_in_order_and_fit(fit, lengths):
    model, size = network("resnet20")
    x_NCHW = images(size, 13)
    tree = Tree(model, [FULL], memory=int(fit * Tree(model, [FULL], memory=0).needs(x_NCHW[:1])))
    parts = tree.parts(x_NCHW)
    assert [len(part) for part in parts] == lengths
    assert torch.equal(torch.cat(list(parts)), x_NCHW)
    assert fit < 1 or all(tree.needs(part) <= tree.memory for part in parts)


@pytest.mark.parametrize("wanted", ["full", "grid"])
@pytest.mark.parametrize("memory", [None, 2**40])
def test_no_part_needs_more_than_is_of_use(wanted, memory, monkeypatch):
    (model, size), (wanted, _) = network("resnet20"), calibrated("resnet20", wanted)
    x_NCHW = images(size, 13)
    monkeypatch.setattr("sdpctl.engine.memory_plan.PART_BYTES", 5 * Tree(model, wanted, memory=0).needs(x_NCHW[:1]))
    assert [len(part) for part in Tree(model, wanted, memory=memory).parts(x_NCHW)] == [5, 5, 3]


@pytest.mark.parametrize("fit", [1, 3.5, 5])
def test_scores_do_not_depend_on_the_memory(fit, double):
    torch.manual_seed(2)
    model = create_model("resnet20", num_classes=7)
    wanted = [*sdpoint_instances(model)[::3], *several_points(model, 4)]
    batches = [(images(16, count), torch.randint(7, (count,))) for count in (7, 5)]
    statistics = calibrate(model, wanted, batches)
    whole = evaluate(model, wanted, batches, statistics)
    memory = int(fit * Tree(model, wanted, memory=0).needs(batches[0][0][:1]))
    lengths, walk = [], Tree.walk
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tree, "walk", lambda tree, x_NCHW, norm: lengths.append(len(x_NCHW)) or walk(tree, x_NCHW, norm))
        parts = evaluate(model, wanted, batches, statistics, WalkSettings(memory=memory))
    assert lengths == {1: [1] * 12, 3.5: [3, 3, 1, 3, 2], 5: [4, 3, 5]}[fit]
    for instance, score in whole.items():
        assert (parts[instance].images, parts[instance].top1, parts[instance].top5) == (12, score.top1, score.top5)
        assert parts[instance].loss == pytest.approx(score.loss, rel=1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_one_instance_holds_what_it_is_said_to_need(name):
    (model, size), (wanted, norms) = network(name), calibrated(name, "full")
    x_NCHW = images(size)
    needs = Tree(model, wanted, memory=0).needs(x_NCHW)
    assert needs - x_NCHW.nbytes <= held(Tree(model, wanted), x_NCHW, norms) <= needs


def test_footprints_are_those_of_the_maps_on_paper():
    known = footprints(create_model("resnet50", num_classes=10), torch.float32)
    before, wide, half = map_shape((64, 16, 16)), map_shape((256, 16, 16)), map_shape((256, 8, 8))
    assert known.body(0, map_shape((3, 64, 64))) == (64 * 32 * 32, map_shape((64, 32, 32)))  # normalised and rectified in place
    assert known.body(1, before) == (2 * 256 * 16 * 16, wide)  # the sum's two sides, both from a convolution
    assert known.body(2, wide) == (320 * 16 * 16, wide)  # 256 from 64 channels
    assert known.shrink(1, 0.5, wide) == (256 * 8 * 8, half)
    assert known.shrink(1, 1.0, wide) == (0, wide)  # in place
