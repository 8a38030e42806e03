import pytest
import torch
import torch.nn.functional as F
import torchvision
from networks import randomise_norms

from sdpctl import Instance, create_model, list_models
from sdpctl.errors import InstanceError, UsageError
from sdpctl.models.chain import batch_norm, shrunk
from sdpctl.models.convolution import Conv2d
from sdpctl.models.registry import architecture

TORCHVISION = {"resnet18": "resnet18", "resnet34": "resnet34", "resnet50": "resnet50", "resnext50": "resnext50_32x4d"}


@pytest.mark.parametrize("arch", TORCHVISION)
def test_torchvisions_weights_load_and_give_its_logits(arch, double):
    torch.manual_seed(0)
    theirs = randomise_norms(getattr(torchvision.models, TORCHVISION[arch])(num_classes=7).eval())
    ours = create_model(arch, num_classes=7).eval()
    ours.load_state_dict(theirs.state_dict())
    x_NCHW = torch.randn(2, 3, 70, 90)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x_NCHW), theirs(x_NCHW), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("arch", "theirs"),
    [("resnet101", "resnet101"), ("resnet152", "resnet152")],
)
def test_the_deep_ones_have_torchvisions_parameters(arch, theirs):
    with torch.device("meta"):
        ours, known = create_model(arch), getattr(torchvision.models, theirs)()
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in known.state_dict().items()}


@pytest.mark.parametrize(
    ("arch", "params"),
    [
        ("resnet8", 75_290),
        ("resnet14", 172_506),
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("resnet44", 658_586),
        ("resnet56", 853_018),
        ("resnet110", 1_727_962),
    ],
)
def test_cifar_resnets_have_the_published_size(arch, params):
    """He et al. 2016, table 6: 0.27, 0.46, 0.66, 0.85 and 1.7 million; exactly: convolutions, norms and head."""
    n = (int(arch.removeprefix("resnet")) - 2) // 6
    convs = 3 * 16 * 9 + 2 * n * 16 * 16 * 9 + 9 * (16 * 32 + (2 * n - 1) * 32 * 32) + 9 * (32 * 64 + (2 * n - 1) * 64 * 64)
    norms = 2 * (16 + 2 * n * (16 + 32 + 64))
    assert convs + norms + 650 == params
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model(arch, num_classes=10).parameters()) == params


class Narrow(torchvision.models.ResNet):
    """torchvision's ResNet with three quarters of its channels."""

    def __setattr__(self, name, value):
        super().__setattr__(name, 48 if (name, value) == ("inplanes", 64) else value)

    def _make_layer(self, block, planes, *arguments, **options):
        return super()._make_layer(block, planes * 3 // 4, *arguments, **options)


@pytest.mark.parametrize(
    ("arch", "block", "options"),
    [
        ("resnet18", torchvision.models.resnet.BasicBlock, {"layers": [2, 2, 2, 2]}),
        ("resnext50", torchvision.models.resnet.Bottleneck, {"layers": [3, 4, 6, 3], "groups": 32, "width_per_group": 4}),
    ],
)
def test_a_narrower_network_is_torchvisions_with_fewer_channels(arch, block, options, double):
    torch.manual_seed(0)
    theirs = Narrow(block, **options)
    theirs.fc = torch.nn.Linear(384 * block.expansion, 7)
    theirs = randomise_norms(theirs.eval())
    ours = create_model(arch, num_classes=7, width=0.75).eval()
    ours.load_state_dict(theirs.state_dict())
    x_NCHW = torch.randn(2, 3, 70, 66)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x_NCHW), theirs(x_NCHW), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("width", "channels"), [(0.59, (9, 19, 38)), (0.01, (1, 1, 1)), (2, (32, 64, 128))])
@pytest.mark.parametrize("arch", ["resnet20", "resnet14"])
def test_a_width_is_a_factor_on_the_channels_of_every_stage(arch, width, channels):
    with torch.device("meta"):
        model = create_model(arch, width=width)
    assert tuple(model.get_parameter(f"layer{i}.0.conv2.weight").shape[0] for i in (1, 2, 3)) == channels
    assert model(torch.empty(2, 3, 32, 32, device="meta"), "layer1.0@0.5").shape == (2, 1000)


def test_preresnet_has_the_public_codes_names():
    block = ["bn1", "conv1", "bn2", "conv2"]
    expected = {"conv1", "bn1", "bn2", "fc"}
    expected |= {f"layer{i}.{j}.{part}" for i in range(1, 5) for j in range(2) for part in block}
    expected |= {f"layer{i}.0.downsample.{part}" for i in range(2, 5) for part in (0, 1)}
    with torch.device("meta"):
        names = {name.rpartition(".")[0] for name in create_model("preresnet18").state_dict()}
    assert names == expected


@pytest.mark.parametrize("arch", [name for name in list_models() if name != "twopipe"])
@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_every_network_runs_with_both_stems_any_channels_and_classes(arch, stem):
    with torch.device("meta"):
        model = create_model(arch, num_classes=6, in_channels=2, stem=stem)
        side = 8 * architecture(arch).reduction(stem)
        for point in ("full", f"{model.points[0]}@0.5", f"{model.points[-1]}@0.75"):
            assert model(torch.empty(1, 2, side, side + 3), point).shape == (1, 6)
    assert model.points == architecture(arch).points(stem)
    assert model.points[0] == {"imagenet": "maxpool", "small": "stem"}[stem]


@pytest.mark.parametrize(
    ("size", "ratio", "kept"),
    [(14, 0.75, 10), (7, 0.5, 4), (10, 0.75, 8), (6, 0.75, 4), (2, 0.75, 2), (1, 0.5, 1), (1, 0.1, 1), (56, 0.75, 42)],
)
def test_sizes_are_rounded_half_to_even_and_never_below_1(size, ratio, kept):
    assert shrunk(size, ratio) == kept


@pytest.mark.parametrize("arch", ["resnet18", "preresnet18", "resnet20"])
def test_every_point_shrinks_height_and_width_by_themselves(arch):
    with torch.device("meta"):
        model = create_model(arch, num_classes=2, stem="small")
        x_NCHW = torch.empty(1, 3, 20, 14)
        for segment in model.segments()[:-1]:
            x_NCHW = segment.body(x_NCHW, batch_norm)
            height, width = x_NCHW.shape[2:]
            small = segment.shrink(x_NCHW, 0.75)
            assert small.shape[2:] == (max(1, round(height * 0.75)), max(1, round(width * 0.75)))
            x_NCHW = segment.shrink(x_NCHW, 1.0)


def test_the_small_stem_averages(double):
    model = create_model("resnet20", num_classes=2).eval()
    x_NCHW = torch.randn(1, 3, 8, 8)
    stem = model.segments()[0]
    features = stem.body(x_NCHW, batch_norm)
    pairs = features.reshape(1, 16, 4, 2, 4, 2).mean((3, 5))
    torch.testing.assert_close(stem.shrink(features, 0.5), pairs, rtol=1e-12, atol=1e-12)


def test_parameter_free_shortcuts_take_every_second_pixel_and_add_zero_channels(double):
    model = create_model("resnet20", num_classes=2).eval()
    block = model.get_submodule("layer2.0")
    torch.nn.init.zeros_(block.get_submodule("bn2").weight)
    x_NCHW = torch.randn(1, 16, 7, 7)
    out = block.body(x_NCHW, batch_norm)
    torch.testing.assert_close(out[:, :16], x_NCHW[:, :, ::2, ::2])
    assert not out[:, 16:].any()


def test_a_model_keeps_no_state_between_sizes():
    torch.manual_seed(0)
    model = create_model("resnet18", num_classes=2).eval()
    small, large = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        before = model(small, "maxpool@0.5")
        model(large, "maxpool@0.5")
        assert torch.equal(model(small, "maxpool@0.5"), before)


def test_instances_may_be_given_as_text():
    torch.manual_seed(0)
    model = create_model("resnet20", num_classes=2).eval()
    x_NCHW = torch.randn(1, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(model(x_NCHW, "layer2.1@0.5"), model(x_NCHW, Instance.parse("layer2.1@0.5")))
        with pytest.raises(InstanceError, match="no point 'maxpool'"):
            model(x_NCHW, "maxpool@0.5")


def test_an_unknown_architecture():
    with pytest.raises(UsageError, match="did you mean 'resnet50'"):
        create_model("resnet500")


SIZES = [(height, width) for height in (1, 2, 3, 4, 7) for width in (1, 2, 3, 5, 8)]


@pytest.mark.parametrize(("kernel", "stride", "groups"), [(1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 2, 1), (3, 2, 4), (7, 2, 1)])
def test_a_convolution_gives_torchs_output_and_gradients_at_every_size(kernel, stride, groups, double):
    torch.manual_seed(0)
    ours = Conv2d(4, 8, kernel, stride, kernel // 2, groups=groups, bias=False)
    theirs = torch.nn.Conv2d(4, 8, kernel, stride, kernel // 2, groups=groups, bias=False)
    theirs.load_state_dict(ours.state_dict())
    for size in SIZES:
        x_NCHW = torch.randn(2, 4, *size)
        outs = [layer(x_NCHW) for layer in (ours, theirs)]
        torch.testing.assert_close(outs[0], outs[1], rtol=1e-12, atol=1e-14)
        gradients = [
            torch.autograd.grad(out.sin().sum(), layer.weight)[0] for out, layer in zip(outs, (ours, theirs), strict=True)
        ]
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("size", [(1, 1), (5, 1), (1, 5), (2, 1), (5, 4)])
def test_the_gradient_of_a_small_map_is_written_as_a_whole_in_bfloat16(size):
    """oneDNN leaves part of it as it found the memory, where a side is one pixel and the stride two; torch 2.15 has this."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).bfloat16().contiguous(memory_format=torch.channels_last)

    layer = Conv2d(16, 32, 3, 2, 1, bias=False).to(torch.bfloat16).to(memory_format=torch.channels_last)
    layer.weight.data = normal(32, 16, 3, 3)
    x_NCHW, upstream_NCHW = normal(64, 16, *size), normal(64, 32, *((side + 1) // 2 for side in size))
    exact = torch.nn.grad.conv2d_weight(x_NCHW.double(), layer.weight.shape, upstream_NCHW.double(), stride=2, padding=1)
    for _ in range(50):
        spoilt = [torch.full((count,), torch.nan, dtype=torch.bfloat16) for count in (4608, 9216, 8192, 65536)]
        spoilt.append(torch.full((4608,), torch.nan))
        del spoilt  # what is freed here is given out again below
        layer.weight.grad = None
        layer(x_NCHW).backward(upstream_NCHW)
        torch.testing.assert_close(layer.weight.grad.double(), exact, rtol=2**-7, atol=2**-7 * exact.abs().max().item())


@pytest.mark.parametrize(
    ("size", "ratio", "kept"),
    [((8, 8), 1.0, (4, 4)), ((8, 8), 0.9, (4, 4)), ((7, 9), 1.0, (4, 5)), ((7, 9), 0.9, (4, 4)), ((2, 1), 0.5, (1, 1))],
)
def test_the_stem_pools_as_the_full_network_wherever_the_size_stays(size, ratio, kept):
    torch.manual_seed(0)
    stem = create_model("resnet18", num_classes=2).segments()[0]
    features = torch.randn(2, 64, *size)
    pooled = stem.shrink(features, ratio)
    assert pooled.shape[2:] == kept
    plain = F.max_pool2d(features, kernel_size=3, stride=2, padding=1)
    if plain.shape[2:] == kept:
        assert torch.equal(pooled, plain)
    else:
        assert torch.equal(pooled, F.adaptive_max_pool2d(features, kept))


def test_the_centred_shortcut_adds_half_of_the_zero_channels_before_the_others(double):
    block = create_model("resnet20", num_classes=2, shortcut="padding-centred").eval().get_submodule("layer3.0")
    torch.nn.init.zeros_(block.get_submodule("bn2").weight)
    x_NCHW = torch.randn(1, 32, 7, 5)
    out = block.body(x_NCHW, batch_norm)
    torch.testing.assert_close(out[:, 16:48], x_NCHW[:, :, ::2, ::2])
    assert not out[:, :16].any()
    assert not out[:, 48:].any()


class TheirBlock(torch.nn.Module):
    """A basic block as the most used public CIFAR networks define it (akamaster/pytorch_resnet_cifar10)."""

    def __init__(self, in_planes, planes, stride, option):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(planes)
        self.conv2 = torch.nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(planes)
        self.planes, self.changes = planes, stride != 1 or in_planes != planes
        self.shortcut = torch.nn.Sequential()
        if self.changes and option == "B":
            self.shortcut = torch.nn.Sequential(
                torch.nn.Conv2d(in_planes, planes, 1, stride, bias=False), torch.nn.BatchNorm2d(planes)
            )
        self.pads = self.changes and option == "A"

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        beside = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.planes // 4, self.planes // 4)) if self.pads else self.shortcut(x)
        return F.relu(out + beside)


class TheirResNet(torch.nn.Module):
    def __init__(self, blocks, option):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(16)
        stages = []
        for in_planes, planes, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
            layers = [TheirBlock(in_planes, planes, stride, option)]
            layers += [TheirBlock(planes, planes, 1, option) for _ in range(blocks - 1)]
            stages.append(torch.nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = torch.nn.Linear(64, 10)

    def forward(self, x):
        out = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(F.avg_pool2d(out, out.shape[3]).flatten(1))


@pytest.mark.parametrize(("option", "shortcut"), [("A", "padding-centred"), ("B", "projection")])
@pytest.mark.parametrize(("arch", "blocks"), [("resnet20", 3), ("resnet32", 5)])
def test_public_cifar_networks_give_the_same_logits(option, shortcut, arch, blocks):
    torch.manual_seed(0)
    theirs = randomise_norms(TheirResNet(blocks, option).eval())
    ours = create_model(arch, num_classes=10, shortcut=shortcut).eval()
    renamed = {n.replace("linear.", "fc.").replace("shortcut.", "downsample."): t for n, t in theirs.state_dict().items()}
    ours.load_state_dict(renamed)
    x_NCHW = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        wanted = theirs(x_NCHW)
        scale = wanted.abs().max().item()
        torch.testing.assert_close(ours(x_NCHW), wanted, rtol=0, atol=1e-6 * scale)
        if option == "A":
            usual = create_model(arch, num_classes=10).eval()
            usual.load_state_dict(renamed)
            assert (usual(x_NCHW) - wanted).abs().max() > 0.1 * scale


@pytest.mark.parametrize(("arch", "own"), [("resnet20", "padding"), ("resnet18", "projection"), ("resnext50", "projection")])
@pytest.mark.parametrize("shortcut", ["padding", "padding-centred", "projection"])
def test_every_resnet_may_have_every_shortcut(arch, own, shortcut):
    with torch.device("meta"):
        model = create_model(arch, num_classes=3, stem="small", shortcut=shortcut)
        names = {name for name in model.state_dict() if ".downsample." in name}
        assert bool(names) == (shortcut == "projection")
        assert model(torch.empty(1, 3, 16, 24), f"{model.points[1]}@0.5").shape == (1, 3)
        usual = create_model(arch, num_classes=3, stem="small")
    assert (usual.state_dict().keys() == model.state_dict().keys()) == (bool(names) == (own == "projection"))


@pytest.mark.parametrize(
    ("arch", "shortcut", "says"),
    [
        ("preresnet18", "projection", "preresnet18 has no shortcut 'projection'; leave this out"),
        ("twopipe", "padding", "twopipe has no shortcut 'padding'; leave this out"),
        ("resnet20", "centred", "resnet20 has no shortcut 'centred'; choose padding, padding-centred, projection"),
    ],
)
def test_a_shortcut_that_a_network_cannot_have(arch, shortcut, says):
    with pytest.raises(UsageError) as caught:
        create_model(arch, shortcut=shortcut)
    assert str(caught.value) == says
