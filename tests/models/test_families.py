"""A family from outside, whose state is a dict or a tuple of two maps: one registration for it, one for an architecture."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

from sdpctl.cli import app
from sdpctl.engine.calibrate import CalibratedNorms, calibrate
from sdpctl.engine.cost import Costs, profile
from sdpctl.engine.evaluate import evaluate
from sdpctl.engine.footprint import footprints
from sdpctl.engine.settings import WalkSettings
from sdpctl.engine.tree import Tree
from sdpctl.engine.weights import fill, find_weights
from sdpctl.errors import UsageError
from sdpctl.export.description import Description, Input, Option
from sdpctl.export.format import Source, format_of
from sdpctl.export.network import one_instance
from sdpctl.instance import FULL, Instance
from sdpctl.models import ARCHITECTURES, FAMILIES, Architecture, Family, create_model
from sdpctl.models.chain import Chain, Segment, average_shrink
from sdpctl.models.registry import shape_text
from sdpctl.models.settings import ModelSettings
from sdpctl.models.state import map_shape
from sdpctl.sdpoint import sdpoint_instances

CHANNELS = 6


class Toy(Chain):
    """Two convolutions; between them the state is a fine and a coarse map, in a dict or a tuple."""

    classifier_name = "linear"
    input_conv_name = "one"
    kind: type = dict

    def __init__(self, _, *, num_classes, in_channels):
        super().__init__()
        self.one = nn.Conv2d(in_channels, CHANNELS, 3, padding=1, bias=False)
        self.two = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.bn_one, self.bn_fine, self.bn_coarse = (nn.BatchNorm2d(CHANNELS) for _ in range(3))
        self.linear = nn.Linear(2 * CHANNELS, num_classes)

    def state(self, fine, coarse):
        return {"fine": fine, "coarse": coarse} if self.kind is dict else (fine, coarse)

    def maps(self, state):
        return (state["fine"], state["coarse"]) if self.kind is dict else state

    def segments(self):
        return (
            Segment("first", ("one", "bn_one"), self.first, "first", self.shrink),
            Segment("second", ("two", "bn_fine", "bn_coarse"), self.second, "second", self.shrink),
            Segment("head", ("linear",), self.head),
        )

    def first(self, x_NCHW, norm):
        fine = F.relu(norm(self.bn_one, self.one(x_NCHW), own=True))
        return self.state(fine, F.avg_pool2d(fine, 2))

    def second(self, state, norm):
        fine, coarse = (self.two(x_NCHW) for x_NCHW in self.maps(state))
        return self.state(F.relu(norm(self.bn_fine, fine, own=True)), F.relu(norm(self.bn_coarse, coarse, own=True)))

    def shrink(self, state, ratio):
        return self.state(*(average_shrink(x_NCHW, ratio) for x_NCHW in self.maps(state)))

    def head(self, state, norm):
        return self.linear(torch.cat([x_NCHW.mean((2, 3)) for x_NCHW in self.maps(state)], dim=1))


class ToyOfTuples(Toy):
    kind = tuple


@pytest.fixture(autouse=True)
def toys():
    entries = []
    for name, network in (("toy", Toy), ("toy-tuple", ToyOfTuples)):
        entries.append((FAMILIES, FAMILIES.add(Family(name=name, network=f"{__name__}:{network.__name__}"))))
        toy = Architecture(name=name, family=name, fixed_points=("first", "second"), divides_by=2)
        entries.append((ARCHITECTURES, ARCHITECTURES.add(toy)))
    yield
    for table, entry in entries:
        table.remove(entry.name)


BOTH = pytest.mark.parametrize("arch", ["toy", "toy-tuple"])
SEVERAL = Instance.parse("first@0.75+second@0.5")


def network(arch, **options):
    torch.manual_seed(0)
    return create_model(arch, **{"num_classes": 7} | options)


def batches(count=2):
    torch.manual_seed(1)
    return [(torch.randn(5, 3, 12, 10), torch.randint(7, (5,))) for _ in range(count)]


def alone(model, instance, given):
    """Gather the statistics of one instance by running it alone in training mode, as torch's own batch norms do."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for x_NCHW, _ in given:
            model(x_NCHW, instance)
    return model.eval()


@BOTH
@pytest.mark.parametrize("memory", ["unlimited", "least"])
def test_the_tree_gives_what_each_instance_gives_alone(arch, memory, double):
    model, given = network(arch), batches()
    instances = [*sdpoint_instances(model), SEVERAL]
    assert len(instances) == 6
    limit = None if memory == "unlimited" else Tree(model, instances).needs(given[0][0])
    statistics = calibrate(model, instances, given, WalkSettings(memory=limit))
    scores = evaluate(model, instances, given, statistics, WalkSettings(memory=limit))
    tree = Tree(model, instances, memory=limit)
    with torch.inference_mode():
        logits = tree.walk(given[0][0], CalibratedNorms(model, statistics))
        for instance in instances:
            single = alone(network(arch), instance, given)
            torch.testing.assert_close(logits[instance], single(given[0][0], instance))
            loss = sum(F.cross_entropy(single(x, instance), labels, reduction="sum").item() for x, labels in given) / 10
            assert scores[instance].loss == pytest.approx(loss, rel=1e-9)


@BOTH
def test_costs_are_those_on_paper(arch):
    model = network(arch)
    costs = profile(model, [FULL, SEVERAL], (3, 16, 12))
    weights, square = 27 * CHANNELS, 9 * CHANNELS * CHANNELS
    head = 2 * CHANNELS * 7 + 7
    assert costs[FULL].macs == weights * 192 + square * (192 + 48) + head
    assert costs[SEVERAL].macs == weights * 192 + square * (12 * 9 + 6 * 4) + head
    assert costs[FULL].params == sum(p.numel() for p in model.parameters())
    second = costs[SEVERAL].segments[1]
    assert second.in_shape == (CHANNELS, 12, 9, CHANNELS, 6, 4)
    assert second.out_shape == (CHANNELS, 6, 4, CHANNELS, 3, 2)
    assert shape_text(arch, second.in_shape) == "6x12x9+6x6x4"


@BOTH
def test_footprints_are_those_on_paper(arch):
    known, shape = (
        footprints(network(arch), torch.float32),
        Costs(network(arch), (3, 16, 12)).body(0, map_shape((3, 16, 12)))[1],
    )
    assert shape.maps == ((CHANNELS, 16, 12), (CHANNELS, 8, 6))
    assert shape.elements == CHANNELS * 240
    half = known.shrink(0, 0.5, shape)
    assert half.shape.maps == ((CHANNELS, 8, 6), (CHANNELS, 4, 3))
    assert half.held == CHANNELS * 60


@pytest.mark.parametrize(("arch", "form"), [("toy", "onnx"), ("toy-tuple", "torch-export")])
def test_a_file_gives_what_the_network_gives(arch, form):
    model, given = network(arch), batches()
    statistics = calibrate(model, [SEVERAL], given)
    option = Option(instance=SEVERAL, macs=1, params=1, relative=1.0, top1=50.0, top5=50.0, loss=1.0)
    description = Description(
        name="toy",
        network=ModelSettings(arch=arch, num_classes=7, in_channels=3, stem="small"),
        input=Input(size=12, resize=12, mean=(0.5,) * 3, std=(0.5,) * 3),
        classes=tuple("abcdefg"),
        options=(option,),
        full_macs=1,
        checkpoint="",
        statistics="",
        test_images=1,
        heldout_images=0,
    )
    x_NCHW = torch.randn(3, 3, 12, 12)
    source = Source(model=model, statistics=statistics, description=description, weights=lambda: b"", card="card")
    implementation = format_of(form)
    with torch.inference_mode():
        wanted = one_instance(source)(x_NCHW).numpy()
    np.testing.assert_allclose(implementation.run(implementation.write(source), x_NCHW.numpy())[0], wanted, atol=1e-5)


def test_its_classifier_is_found_in_weights_and_stays_new_where_the_classes_differ():
    theirs = network("toy", in_channels=1).state_dict()
    model = network("toy", in_channels=1)
    foreign = {f"module.{name.replace('linear.', 'head.')}": tensor for name, tensor in theirs.items()}
    found = find_weights(foreign, model, "a file")
    assert "the classifier `head` counts as `linear`" in found.remarks
    assert model.options_in(found.weights) == {"num_classes": 7, "in_channels": 1}
    assert fill(model, found.weights)
    other = network("toy", num_classes=3, in_channels=1)
    before = other.linear.weight.clone()
    assert not fill(other, found.weights)
    assert torch.equal(other.linear.weight, before)
    assert torch.equal(other.two.weight, theirs["two.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "imagenet"}, "toy has no stem 'imagenet'; leave this out"),
        ({"widths": (1, 2)}, "toy has no widths (1, 2); leave this out"),
        ({"masks": "nested"}, "toy has no masks 'nested'; leave this out"),
    ],
)
def test_an_option_that_it_does_not_take(options, message):
    with pytest.raises(UsageError) as caught:
        create_model("toy", **options)
    assert str(caught.value) == message


def test_what_the_table_says_of_a_family_holds_for_its_networks():
    for name, arch in ARCHITECTURES.items():
        with torch.device("meta"):
            model = create_model(name)
        assert model.together == FAMILIES[arch.family].together
        assert model.points == arch.points()
        state = model.state_dict()
        assert state[model.head_names[0]].shape[0] == len(state[model.head_names[1]]) == 1000
        assert state[f"{model.input_conv_name}.weight"].shape[1] == 3


def test_it_goes_through_the_commands(tmp_path):
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(
        "name: toy\nmodel: {arch: toy, in_channels: 1}\n"
        "data: {dataset: digits, image_size: 8, workers: 0, holdout: 10%}\n"
        "train: {epochs: 1, validate: {every: 0}}\ncalibrate: {batches: 2}\n"
    )

    def command(*arguments):
        result = CliRunner().invoke(app, [*arguments, "--store", str(tmp_path / "store"), "--json"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    command("run", str(recipe))
    rows = command("eval-instances", "toy")["rows"]
    assert {row["instance"] for row in rows} == {str(i) for i in sdpoint_instances(create_model("toy"))}
    plan = command("train", str(recipe), "--set", "seed=1", "--dry-run")
    assert "digest" not in plan
    profiled = command("profile-flops", str(recipe), "--per-segment")["rows"]
    assert {row["instance"]: row["macs"] for row in profiled} == {row["instance"]: row["macs"] for row in rows}
    found = command("search", "toy", "--max-macs", "60%", "--evaluations", "4", "--ratios", "1,0.5")
    assert found["best"]["relative"] <= 0.6
    exported = command("export", "toy", "--instance", "second@0.5", "--format", "onnx", "--output", str(tmp_path / "toy.onnx"))
    assert (tmp_path / "toy.onnx").is_file()
    assert exported["digest"].startswith("sha256:")
