import pytest
import torch
from ptflops import get_model_complexity_info
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sdpctl.engine.calibrate import calibrate
from sdpctl.engine.cost import count_macs, profile
from sdpctl.errors import InstanceError, ModelError, SdpctlError
from sdpctl.instance import FULL, Instance
from sdpctl.models import create_model
from sdpctl.models.state import map_shape
from sdpctl.sdpoint import sdpoint_instances


def on_meta(arch, **options):
    with torch.device("meta"):
        return create_model(arch, **options)


class Alone(nn.Module):
    """One instance as a module of its own."""

    def __init__(self, model, instance):
        super().__init__()
        self.model, self.instance = model, instance

    def forward(self, x_NCHW):
        return self.model(x_NCHW, self.instance)


@pytest.mark.parametrize(("arch", "size"), [("resnet20", 32), ("preresnet18", 80), ("resnext50", 64)])
def test_costs_are_those_of_ptflops_on_each_instance_alone(arch, size):
    model = on_meta(arch, num_classes=7)
    several = Instance.parse("layer1.0@0.75+layer2.1@0.5+layer3.0@0.9")
    for instance, cost in profile(model, [*sdpoint_instances(model), several], (3, size, size)).items():
        macs, params = get_model_complexity_info(
            Alone(model, instance),
            (3, size, size),
            as_strings=False,
            print_per_layer_stat=False,
            backend="aten",
            input_constructor=lambda shape: torch.empty((1, *shape), device="meta"),
        )
        assert (cost.macs, cost.params) == (macs, params)


@pytest.mark.parametrize("instance", ["full", "maxpool@0.75", "layer2.0@0.5+layer3.1@0.75"])
def test_macs_are_half_of_torchs_own_flops_but_for_the_bias(instance):
    model = on_meta("resnet18", num_classes=7).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 100, 60, device="meta"), instance)
    cost = profile(model, [Instance.parse(instance)], (3, 100, 60))[Instance.parse(instance)]
    assert cost.macs == counter.get_total_flops() // 2 + 7


@pytest.mark.parametrize(
    ("arch", "gmacs", "cheapest"), [("resnet50", 4.089, 0.285), ("preresnet101", 7.801, 0.268), ("resnext101", 7.970, 0.268)]
)
def test_known_costs_at_224_px(arch, gmacs, cheapest):
    """Figures of the public code's networks, conv + linear MACs."""
    model = on_meta(arch)
    costs = profile(model, sdpoint_instances(model), (3, 224, 224))
    assert round(costs[FULL].macs / 1e9, 3) == gmacs
    assert round(min(cost.macs for cost in costs.values()) / costs[FULL].macs, 3) == cheapest
    assert len({cost.macs for cost in costs.values()}) == len(costs) - 2  # the last point saves nothing


def test_segments_add_up_and_follow_each_other():
    model = on_meta("resnet50")
    cost = profile(model, [Instance.parse("layer2.3@0.5")], (3, 224, 224))[Instance.parse("layer2.3@0.5")]
    assert cost.macs == sum(segment.macs for segment in cost.segments)
    assert cost.params == sum(segment.params for segment in cost.segments) == 25_557_032
    assert [segment.in_shape for segment in cost.segments[1:]] == [segment.out_shape for segment in cost.segments[:-1]]
    shapes = {segment.name: segment.out_shape for segment in cost.segments}
    assert shapes["layer2.2"] == (512, 28, 28)
    assert shapes["layer2.3"] == (512, 14, 14)
    assert shapes["head"] == (1000,)


def test_the_model_is_left_as_it_was():
    model = create_model("resnet20", num_classes=3)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    profile(model, [FULL], (3, 32, 32))
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_what_ptflops_cannot_count_is_an_error():
    with pytest.raises(SdpctlError, match="could not count"):
        count_macs(nn.Linear(3, 3, device="meta"), map_shape((4,)))


def test_an_instance_of_another_network():
    with pytest.raises(InstanceError, match="no point 'stem'"):
        profile(on_meta("resnet18"), [Instance.parse("stem@0.5")], (3, 64, 64))


def test_nothing_is_lost_in_inference_mode():
    model = create_model("resnet20", num_classes=10)
    with torch.inference_mode():
        inside = profile(model, [FULL], (3, 32, 32))
    assert inside == profile(model, [FULL], (3, 32, 32))
    assert inside[FULL].macs > 0


@pytest.mark.parametrize("measure", [lambda model: profile(model, [FULL], (3, 8, 8)), lambda model: walk(model, 8)])
def test_a_map_that_a_segment_cannot_take_is_one_line(measure, monkeypatch):
    model = create_model("resnet20", num_classes=3)
    block = model.get_submodule("layer2.0")
    monkeypatch.setattr(type(block), "body", strict(type(block).body))
    with pytest.raises(ModelError) as caught:
        measure(model)
    says = "layer1.0 cannot take a map of 16x8x8 (maps of 8 px are refused); use larger images, larger ratios or fewer points"
    assert str(caught.value) == says


def walk(model, size):
    instances = [FULL, Instance.parse("stem@0.5")]
    calibrate(model, instances, [(torch.randn(2, 3, size, size), torch.zeros(2, dtype=torch.long))])


def strict(body):
    """A body that cannot take maps of 8 px."""

    def refusing(self, x_NCHW, norm):
        if x_NCHW.shape[2] == 8:
            raise RuntimeError("maps of 8 px\nare refused")
        return body(self, x_NCHW, norm)

    return refusing
