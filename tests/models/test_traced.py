"""Networks of torchvision and timm: alone and in a tree, their numbers are those of the library's own modules."""

import copy

import pytest
import torch
from library_networks import (
    apart,
    compare_full,
    compare_instances,
    costs,
    draw_instances,
    hooked,
    library_network,
    main_output,
    pair,
)
from torch import nn

from sdpctl.engine.cost import Costs
from sdpctl.errors import ModelError
from sdpctl.instance import FULL, Instance
from sdpctl.models import ARCHITECTURES, create_model
from sdpctl.models.meta import OnMeta

NETWORKS = {
    "timm/resnet18": 64,
    "timm/efficientnet_lite0": 64,
    "timm/mobilenetv4_conv_small": 64,
    "timm/regnety_002": 64,
    "timm/ghostnet_100": 64,
    "timm/convnext_atto": 96,
    "torchvision/mobilenet_v3_small": 64,
    "torchvision/shufflenet_v2_x0_5": 64,
}

POINTS = {
    "timm/resnet18": ("maxpool", *(f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1))),
    "timm/regnety_002": ("stem", *(f"s{i}.b{j}" for i, depth in enumerate((1, 1, 4, 7), 1) for j in range(1, depth + 1))),
    "timm/convnext_atto": (
        "stem",
        *(f"stages.{i}.blocks.{j}" for i, depth in enumerate((2, 2, 6, 2)) for j in range(depth)),
    ),
    "timm/mobilenetv4_conv_small": (
        "bn1",
        *(f"blocks.{i}.{j}" for i, depth in enumerate((2, 2, 6, 6, 1)) for j in range(depth)),
    ),
    "torchvision/mobilenet_v3_small": tuple(f"features.{i}" for i in range(13)),
    "torchvision/regnet_y_400mf": (
        "stem",
        *(f"trunk_output.block{i}.block{i}-{j}" for i, depth in enumerate((1, 3, 6, 6), 1) for j in range(depth)),
    ),
    "torchvision/squeezenet1_1": tuple(f"features.{i}" for i in (2, 3, 4, 6, 7, 9, 10, 11, 12)),
    "timm/vgg11": tuple(f"features.{i}" for i in (1, 4, 7, 9, 12, 14, 17, 19)),
}


@pytest.mark.parametrize("arch", POINTS)
def test_the_points_are_the_blocks(arch):
    assert ARCHITECTURES[arch].points() == POINTS[arch]


@pytest.mark.parametrize("arch", NETWORKS)
def test_numbers_are_the_librarys(arch, double):
    ours, theirs, x_NCHW = pair(arch, NETWORKS[arch])
    found = compare_full(ours, theirs, x_NCHW)
    found |= compare_instances(ours, theirs, x_NCHW, draw_instances(ours.points, arch, 3))
    assert {name: value for name, value in found.items() if not value <= 1e-10} == {}
    cost = costs(ours, [FULL], x_NCHW.shape[1:])[FULL]
    assert cost.params == sum(p.numel() for p in theirs.parameters())


def test_auxiliary_classifiers_are_left_out(double):
    ours, theirs, x_NCHW = pair("torchvision/googlenet", 64, 3)
    found = compare_full(ours, theirs, x_NCHW)
    assert {name: value for name, value in found.items() if not value <= 1e-10} == {}
    used = {id(p) for segment in ours.segments() for p in ours.parameters_of(segment)}
    assert {name.split(".")[0] for name, p in ours.named_parameters() if id(p) not in used} == {"aux1", "aux2"}


def model(arch="timm/regnety_002", **options):
    torch.manual_seed(0)
    return create_model(arch, **({"num_classes": 10} | options)).eval()


X_NCHW = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

SHRUNK = Instance((("s3.b2", 0.5), ("s4.b1", 0.75)))


def test_weights_have_the_librarys_names_and_order():
    ours, theirs = model(), library_network("timm/regnety_002")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert [name for name, _ in ours.named_buffers()] == [name for name, _ in theirs.named_buffers()]


@pytest.mark.parametrize("assign", [False, True])
def test_weights_load_into_the_pieces(assign):
    ours, other = model(), model()
    state = {name: torch.rand_like(t) if t.is_floating_point() else t for name, t in other.state_dict().items()}
    other.load_state_dict(state)
    assert ours.load_state_dict(copy.deepcopy(state), assign=assign).missing_keys == []
    with torch.inference_mode():
        assert torch.equal(ours(X_NCHW, SHRUNK), other(X_NCHW, SHRUNK))


@pytest.mark.parametrize("arch", ["timm/convnext_atto", "torchvision/convnext_tiny"])
def test_parameters_outside_layers_are_replaced_too(arch):
    """Layer scales are read by the pieces themselves."""
    ours = model(arch)
    names = [name for name, _ in ours.named_parameters() if name.endswith(("gamma", "layer_scale"))]
    state = {name: torch.zeros_like(t) if name in names else t for name, t in ours.state_dict().items()}
    with torch.inference_mode():
        before = ours(X_NCHW)
        ours.load_state_dict(state, assign=True)
        after = ours(X_NCHW)
        theirs = library_network(arch).eval()
        theirs.load_state_dict(state)
        torch.testing.assert_close(after, theirs(X_NCHW), rtol=1e-4, atol=1e-6)
    assert names
    assert not torch.equal(before, after)


def test_a_copy_has_its_own_weights():
    ours = model()
    twin = copy.deepcopy(ours)
    with torch.inference_mode():
        before = ours(X_NCHW, SHRUNK)
        assert torch.equal(twin(X_NCHW, SHRUNK), before)
    for parameter in twin.parameters():
        parameter.data.zero_()
    with torch.inference_mode():
        assert torch.equal(ours(X_NCHW, SHRUNK), before)
        assert not twin(X_NCHW, SHRUNK).any()
    assert not {id(m) for m in ours.modules()} & {id(m) for m in twin.modules()}


def test_on_meta_is_a_copy_without_memory():
    ours = model()
    empty = ours.on_meta()
    assert {t.device.type for t in (*empty.parameters(), *empty.buffers())} == {"meta"}
    assert {t.device.type for t in (*ours.parameters(), *ours.buffers())} == {"cpu"}
    assert empty(X_NCHW.to("meta"), SHRUNK).shape == (2, 10)


def test_built_on_meta():
    with OnMeta():
        empty = create_model("timm/regnety_002", num_classes=10).to("meta")
    assert {name: t.shape for name, t in empty.state_dict().items()} == {n: t.shape for n, t in model().state_dict().items()}


def test_a_move_to_float64_reaches_the_pieces():
    ours = model().double()
    with torch.inference_mode():
        out = ours(X_NCHW.double(), SHRUNK)
    assert out.dtype == torch.float64
    assert apart(model()(X_NCHW, SHRUNK).detach(), out) < 1e-4


def test_modes_are_those_of_every_module():
    """Dropout and stochastic depth of torchvision's networks are on in training alone."""
    ours = model("torchvision/efficientnet_b0")
    with torch.no_grad():
        quiet = ours(X_NCHW)
        assert torch.equal(ours(X_NCHW), quiet)
        ours.train()
        assert all(module.training for module in ours.modules())
        assert not torch.equal(ours(X_NCHW), ours(X_NCHW))
        ours.eval()
        assert not any(module.training for module in ours.modules())
        once = ours(X_NCHW)
    assert torch.equal(ours(X_NCHW), once)


def test_a_training_step_draws_as_the_library_does():
    ours, theirs = model("torchvision/efficientnet_b0"), library_network("torchvision/efficientnet_b0")
    theirs.load_state_dict(ours.state_dict())
    outs = []
    for network in (ours, theirs):
        torch.manual_seed(5)
        with torch.no_grad():
            outs.append(main_output(network.train()(X_NCHW)))
    torch.testing.assert_close(*outs, rtol=1e-3, atol=1e-4)


def test_an_instance_is_exported_whole():
    ours = model()
    with torch.no_grad():
        program = torch.export.export(One(ours, SHRUNK), (X_NCHW,))
        torch.testing.assert_close(program.module()(X_NCHW), ours(X_NCHW, SHRUNK), rtol=1e-5, atol=1e-6)
        with hooked(library_network("timm/regnety_002").eval(), SHRUNK) as theirs:
            theirs.load_state_dict(ours.state_dict())
            torch.testing.assert_close(program.module()(X_NCHW), theirs(X_NCHW), rtol=1e-4, atol=1e-5)


class One(nn.Module):
    """One instance of a network."""

    def __init__(self, network, instance):
        super().__init__()
        self.network, self.instance = network, instance

    def forward(self, x_NCHW):
        return self.network(x_NCHW, self.instance)


@pytest.mark.parametrize("arch", ["timm/regnety_002", "timm/convnext_atto", "torchvision/mobilenet_v3_small", "timm/vgg11"])
def test_classes_and_channels(arch):
    ours = model(arch, num_classes=7, in_channels=2)
    assert ours(torch.randn(2, 2, 64, 64)).shape == (2, 7)
    assert ours.options_in(ours.state_dict()) == {"num_classes": 7, "in_channels": 2}
    weight, bias = ours.head_names
    assert (ours.get_parameter(weight).shape[0], ours.get_parameter(bias).shape) == (7, (7,))


@pytest.mark.parametrize("arch", ["timm/regnety_002", "torchvision/convnext_tiny", "torchvision/mobilenet_v3_small"])
def test_every_parameter_belongs_to_one_segment(arch):
    with OnMeta():
        ours = create_model(arch).to("meta")
    owned = [id(p) for segment in ours.segments() for p in ours.parameters_of(segment)]
    assert sorted(owned) == sorted(id(p) for p in ours.parameters())
    assert sum(Costs(ours, (3, 64, 64)).params) == sum(p.numel() for p in ours.parameters())


def test_an_image_size_that_a_network_cannot_take():
    arch = ARCHITECTURES["torchvision/inception_v3"]
    assert arch.refused_size(299) is None
    says = arch.refused_size(32)
    assert says is not None
    assert says.startswith("torchvision/inception_v3 cannot take images of 32 px (")
    assert says.endswith("); it is meant for 299 px")


@pytest.mark.parametrize(
    ("arch", "says"),
    [
        (
            "torchvision/vit_b_16",
            "torchvision/vit_b_16 cannot be run at several costs: none of its blocks ends with one map (C x H x W) that is the "
            "whole state; at least 3 must; choose a different network",
        ),
        (
            "torchvision/swin_t",
            "torchvision/swin_t cannot be run at several costs: the sizes of its maps are built in: after features.0 and ",
        ),
    ],
)
def test_networks_that_are_not_chains(arch, says):
    with pytest.raises(ModelError) as caught:
        ARCHITECTURES[arch].points()
    assert str(caught.value).startswith(says)


def test_weights_of_five_dimensions_stay_as_they_are_in_channels_last():
    model = create_model("timm/resnet18", num_classes=4)
    model.add_module("volume", nn.Conv3d(2, 2, 3))
    kept = model.volume.weight.clone()
    assert model.channels_last() is model
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.volume.weight, kept)
