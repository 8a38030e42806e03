"""Small networks of every kind that libraries define: their pieces by name, and the pieces' numbers against the network's."""

import copy
from functools import cache
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from library_networks import apart, compare_instances, draw_instances
from timm.layers import BatchNormAct2d
from torch import nn
from torchvision.ops import StochasticDepth

from sdpctl.errors import ModelError
from sdpctl.models import traced as traced_module
from sdpctl.models.chain import batch_norm
from sdpctl.models.registry import ARCHITECTURES
from sdpctl.models.traced import TracedNetwork
from sdpctl.models.tracing import trace

SIZE = (3, 16, 16)


class Opaque(nn.Module):
    """A module that torch.fx cannot record."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(x) + x if x.shape[2] > 0 else x


class OpaqueNormed(Opaque):
    """An opaque module with a batch norm inside."""

    def __init__(self, channels):
        super().__init__(channels)
        self.bn, self.act = nn.BatchNorm2d(channels), BatchNormAct2d(channels, act_layer=nn.SiLU)

    def forward(self, x):
        return self.act(self.bn(self.conv(x))) + x if x.shape[2] > 0 else x


@torch.fx.wrap
def gate(x):
    """A function that is recorded as one operation."""
    return x * torch.sigmoid(x) if x.shape[2] > 0 else x


class Residual(nn.Module):
    """Two convolutions with norms, an activation that is called twice, and a shortcut."""

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + x)


class Gated(Residual):
    """A residual block with squeeze-and-excitation."""

    def __init__(self, channels):
        super().__init__(channels)
        self.squeeze = Squeeze(channels)

    def forward(self, x):
        return x + self.squeeze(self.bn1(self.conv1(x)))


class Alone(Gated):
    """Squeeze-and-excitation without a shortcut around it, so that its result is the whole state."""

    def forward(self, x):
        return self.conv2(self.squeeze(self.bn1(self.conv1(x))))


class Squeeze(nn.Module):
    """Weighs the channels of a map by its mean."""

    def __init__(self, channels):
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))


class Context(Residual):
    """Adds a map of one pixel, which is new memory, to a larger map."""

    def forward(self, x):
        return self.conv1(x.mean((2, 3), keepdim=True)) + self.bn2(self.conv2(x))


class Overwriting(Residual):
    """An activation in place comes first, so that the shortcut carries its result."""

    def forward(self, x):
        out = self.bn1(self.conv1(self.relu(x)))
        return self.conv2(out) + x


class Shared(Residual):
    """One activation, not in place, for new memory and for the map that the shortcut also takes."""

    def __init__(self, channels):
        super().__init__(channels)
        self.relu = nn.ReLU()

    def forward(self, x):
        out = self.bn1(self.conv1(self.relu(x)))
        return self.relu(self.bn2(self.conv2(out))) - x


class Unread(Residual):
    """Overwrites a map by operations whose results are not read."""

    def forward(self, x):
        out = self.bn1(self.conv1(x))
        out.mul_(0.5)
        F.relu_(out)
        return out + x


class Dense(Residual):
    """Joins its input and a new map."""

    def __init__(self, channels):
        super().__init__(channels)
        self.join = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x):
        return self.join(torch.cat([x, F.relu(self.bn1(self.conv1(x)))], 1))


class Dropping(Residual):
    """Dropout as a function that knows the mode, and as a module that draws a row."""

    def __init__(self, channels):
        super().__init__(channels)
        self.path = StochasticDepth(0.5, "row")

    def forward(self, x):
        out = F.dropout(self.bn1(self.conv1(x)), 0.5, training=self.training)
        return x + self.path(out)


class Doubled(torch.autograd.Function):
    """The identity, with a gradient of its own."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class OwnGradient(Residual):
    """Calls a function that brings its own gradient."""

    def forward(self, x):
        return x + Doubled.apply(self.bn1(self.conv1(x)))


class Scaled(Residual):
    """Reads a parameter and a buffer itself."""

    def __init__(self, channels):
        super().__init__(channels)
        self.gamma = nn.Parameter(torch.empty(channels))
        self.register_buffer("shift", torch.full((1, channels, 1, 1), 0.25))

    def forward(self, x):
        return x + self.gamma.view(1, -1, 1, 1) * self.bn1(self.conv1(x)) + self.shift


class Activated(Residual):
    """timm's batch norm, with an activation."""

    def __init__(self, channels):
        super().__init__(channels)
        self.bn1 = BatchNormAct2d(channels, act_layer=nn.SiLU)
        self.bn2 = BatchNormAct2d(channels, apply_act=False)

    def forward(self, x):
        return x + self.bn2(self.conv2(self.bn1(self.conv1(x))))


class Stateless(Residual):
    """A norm without running statistics."""

    def __init__(self, channels):
        super().__init__(channels)
        self.bn1 = nn.BatchNorm2d(channels, track_running_stats=False)


class Unscaled(Residual):
    """A norm without weight and bias."""

    def __init__(self, channels):
        super().__init__(channels)
        self.bn1 = nn.BatchNorm2d(channels, affine=False)


class Wrapped(Residual):
    """A function that the library registers, and additions with a factor."""

    def forward(self, x):
        return torch.add(self.conv2(gate(self.bn1(self.conv1(x)))), x, alpha=0.5)


class Network(nn.Module):
    """A stem, three blocks in a list, and a head."""

    def __init__(self, block, **others):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish(inplace=True)
        self.blocks = nn.Sequential(*(block(8) for _ in range(3)))
        self.fc = nn.Linear(8, 5)
        for name, module in others.items():
            setattr(self, name, module)

    def features(self, x):
        return self.blocks(self.act(self.bn(self.conv(x))))

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


class Auxiliary(Network):
    """A second classifier in training."""

    def forward(self, x):
        x = self.blocks[0](self.act(self.bn(self.conv(x))))
        aux = self.aux(self.aux_bn(x).mean((2, 3))) if self.training else None
        x = self.fc(self.blocks[2](self.blocks[1](x)).mean((2, 3)))
        return (x, aux) if self.training else x


class Named(Network):
    """Blocks as attributes of their stages."""

    def forward(self, x):
        x = self.act(self.bn(self.conv(x)))
        return self.fc(self.s2.b1(self.s1.b2(self.s1.b1(x))).mean((2, 3)))


class Dictionary(Network):
    """A result in a dictionary."""

    def forward(self, x):
        return {"out": super().forward(x), "more": None}


class Options(Network):
    """Further arguments that have defaults."""

    def forward(self, x, features_only=False, mask=None):
        return self.features(x) if features_only else self.fc(self.features(x).mean((2, 3)))


class Shrunk(Network):
    """A third block whose map has one pixel; it is of a kind of its own, since blocks of a kind are points all or none."""

    def __init__(self, block):
        super().__init__(block)
        self.blocks, self.last = nn.Sequential(block(8), block(8), block(8)), Gated(8)

    def forward(self, x):
        x = self.blocks[1](self.blocks[0](self.act(self.bn(self.conv(x)))))
        return self.fc(self.last(x.mean((2, 3), keepdim=True)).flatten(1))


class Bare(nn.Module):
    """A residual block without a norm."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x)


class Repeated(Network):
    """A block that runs twice, which no name can tell apart."""

    def __init__(self):
        super().__init__(Residual)
        self.again = nn.ModuleList([Bare(8)])

    def features(self, x):
        return self.again[0](self.again[0](super().features(x)))


class Staged(Network):
    """Two stages, each with a list of blocks."""

    def __init__(self):
        super().__init__(Plain)
        self.s1 = Holder(blocks=nn.Sequential(Plain(8), Plain(8)))
        self.s2 = Holder(blocks=nn.Sequential(Residual(8), Plain(8), Residual(8)))
        self.blocks = None

    def features(self, x):
        return self.s2.blocks(self.s1.blocks(self.act(self.bn(self.conv(x)))))


class Plain(nn.Module):
    """A block without branches."""

    def __init__(self, channels):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.tanh(self.bn(self.conv(x)))


class Preactivated(Plain):
    """A block without branches whose norm comes first."""

    def forward(self, x):
        return self.conv(torch.tanh(self.bn(x)))


class Double(nn.Module):
    """A block of two blocks and a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.two = nn.Sequential(Residual(channels), Residual(channels))
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return self.conv(self.two(x))


class Nested(Network):
    """Blocks, one of which also occurs inside the others."""

    def __init__(self):
        super().__init__(Double)
        self.blocks[0] = Residual(8)


class Holder(nn.Module):
    """Blocks by name."""

    def __init__(self, **blocks):
        super().__init__()
        for name, block in blocks.items():
            setattr(self, name, block)


def plain(*channels):
    """Layers in a list, as in VGG."""
    layers = []
    for before, after in pairwise(channels):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 5))


THREE = ("act", "blocks.0", "blocks.1", "blocks.2")

NETWORKS = {
    "residual": (lambda: Network(Residual), THREE),
    "gated": (lambda: Network(Gated), THREE),
    "context": (lambda: Network(Context), THREE),
    "overwriting": (lambda: Network(Overwriting), THREE),
    "shared": (lambda: Network(Shared), THREE),
    "unread": (lambda: Network(Unread), THREE),
    "dense": (lambda: Network(Dense), THREE),
    "dropping": (lambda: Network(Dropping), THREE),
    "own gradient": (lambda: Network(OwnGradient), THREE),
    "scaled": (lambda: Network(Scaled), THREE),
    "activated": (lambda: Network(Activated), THREE),
    "stateless": (lambda: Network(Stateless), THREE),
    "unscaled": (lambda: Network(Unscaled), THREE),
    "wrapped": (lambda: Network(Wrapped), THREE),
    "opaque": (lambda: Network(Opaque), THREE),
    "opaque with a norm": (lambda: Network(OpaqueNormed), THREE),
    "dictionary": (lambda: Dictionary(Residual), THREE),
    "options": (lambda: Options(Residual), THREE),
    "auxiliary": (lambda: Auxiliary(Residual, aux=nn.Linear(8, 5), aux_bn=nn.BatchNorm2d(8)), THREE),
    "named": (
        lambda: Named(Residual, blocks=None, s1=Holder(b1=Gated(8), b2=Gated(8)), s2=Holder(b1=Gated(8))),
        ("act", "s1.b1", "s1.b2", "s2.b1"),
    ),
    "repeated": (Repeated, THREE),
    "staged": (Staged, ("act", "s1.blocks.0", "s1.blocks.1", "s2.blocks.0", "s2.blocks.1", "s2.blocks.2")),
    "nested": (Nested, THREE),
    "preactivated": (lambda: Network(Preactivated), THREE),
    "alone": (
        lambda: Named(Alone, blocks=None, s1=Holder(b1=Alone(8), b2=Alone(8)), s2=Holder(b1=Alone(8))),
        ("act", "s1.b1", "s1.b2", "s2.b1"),
    ),
    "plain": (lambda: plain(3, 8, 6, 5), ("2", "5", "8")),
}


def traced(network, size=SIZE):
    return trace(copy.deepcopy(network).to("meta"), (Opaque, OpaqueNormed, StochasticDepth), (gate,), size)


@cache
def pieces(name):
    return traced(NETWORKS[name][0]())


def ready(name):
    """Return a network with weights, the same network as its pieces expect it, the pieces, and images."""
    torch.manual_seed(0)
    network, found = NETWORKS[name][0](), pieces(name)
    x_NCHW = torch.randn(4, *SIZE)
    fill_tracked(network, x_NCHW)
    ours = copy.deepcopy(network)
    for path in found.overwriting:
        ours.get_submodule(path).inplace = True
    return network, ours, found, x_NCHW


def fill_tracked(network, x_NCHW):
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.3)
    with torch.no_grad():
        network.train()(x_NCHW)
    network.eval()


def passed(found, network, x_NCHW):
    for piece in found.pieces:
        x_NCHW = (piece.training if network.training else piece.evaluation)(network, x_NCHW, batch_norm)
    return x_NCHW


def main(out):
    return out["out"] if isinstance(out, dict) else out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("name", NETWORKS)
def test_the_pieces_are_the_blocks(name):
    _, points = NETWORKS[name]
    found = pieces(name)
    assert tuple(piece.point for piece in found.pieces) == (*points, None)
    first = "stem" if points[0] == "act" else points[0]
    assert tuple(piece.name for piece in found.pieces) == (first, *points[1:], "head")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_pieces_compute_what_the_network_does(name, training, double):
    network, ours, found, x_NCHW = ready(name)
    results = []
    for module, run in ((network, lambda m, x: main(m(x))), (ours, lambda m, x: passed(found, m, x))):
        images = x_NCHW.clone().requires_grad_()
        torch.manual_seed(3)
        logits_NK = run(module.train(training), images)
        module.zero_grad()
        (logits_NK * torch.arange(logits_NK.numel()).view_as(logits_NK)).sum().backward()
        gradients = {path: p.grad for path, p in module.named_parameters() if p.grad is not None}
        buffers = {path: b for path, b in module.named_buffers() if not path.startswith("aux")}
        results.append({"logits": logits_NK, "images": images.grad, **gradients, **buffers})
    known, mine = results
    assert mine.keys() == known.keys()
    for key, value in known.items():
        assert apart(mine[key], value, 1e-6) < 1e-11, key


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_piece_changes_its_input(name, training, double):
    _, ours, found, state = ready(name)
    for piece in found.pieces:
        before = state.clone()
        with torch.no_grad():
            after = (piece.training if training else piece.evaluation)(ours.train(training), state, batch_norm)
        assert torch.equal(state, before), piece.name
        state = after


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_batch_norm_goes_through_norm_with_what_follows_it(name, training, double):
    network, ours, found, x_NCHW = ready(name)
    ours.train(training)
    seen = []

    def norm(bn, x, *, own=False, relu=False):
        seen.append(bn)
        out = nn.BatchNorm2d.forward(bn, x)
        out = out.relu() if relu else out
        if own and not torch.is_grad_enabled():
            x.fill_(torch.nan)  # who says that a map may be overwritten does not read it again
        return out

    torch.manual_seed(3)
    out = x_NCHW
    with torch.no_grad():
        for piece in found.pieces:
            state, before = out, out.clone()
            out = (piece.training if training else piece.evaluation)(ours, state, norm)
            assert torch.equal(state, before), piece.name
    torch.manual_seed(3)
    expected = main(network.train(training)(x_NCHW))
    assert apart(out, expected) < 1e-11
    norms = [m for path, m in ours.named_modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]
    used = [bn for bn in norms if bn is not getattr(ours, "aux_bn", None)]
    called = [bn for bn in used if id(bn) in set(map(id, seen))]
    assert len(seen) == len({id(bn) for bn in seen}) == len(called)
    hooked = []
    for bn in norms:
        bn.register_forward_hook(lambda module, *_: hooked.append(module))
    ours(x_NCHW)
    assert {id(bn) for bn in hooked} - {id(getattr(ours, "aux_bn", None))} == {id(bn) for bn in seen}


@pytest.mark.parametrize("name", NETWORKS)
def test_instances_in_a_tree_are_each_instance_alone(name, double, monkeypatch):
    network, _, found, x_NCHW = ready(name)
    monkeypatch.setattr(traced_module, "traced", lambda *_: found)
    monkeypatch.setattr(traced_module, "networks", lambda _: Library(name))
    chain = TracedNetwork(ARCHITECTURES["timm/resnet18"], num_classes=5, in_channels=3).eval()
    chain.load_state_dict(network.state_dict())
    apart = compare_instances(chain, network, x_NCHW, draw_instances(chain.points, name))
    assert {key: value for key, value in apart.items() if not value < 1e-11} == {}


class Library:
    """A library of one network."""

    def __init__(self, name):
        self.name = name

    def build(self, name, **options):
        return NETWORKS[self.name][0]()

    def old_names(self, name):
        return ()


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_and_weights_of_the_pieces_are_those_that_are_used(name):
    network, _, found, x_NCHW = ready(name)
    main(network.train()(x_NCHW)).sum().backward()
    used = {id(p): path for path, p in network.named_parameters() if p.grad is not None}
    named = dict(network.named_parameters())
    owned = [p for piece in found.pieces for path in piece.layers for p in network.get_submodule(path).parameters()]
    read = [named[path] for piece in found.pieces for path in piece.weights if path in named]
    assert {id(p) for p in (*owned, *read)} == set(used)
    assert (found.classifier, found.input_conv) == (("11", "0") if name == "plain" else ("fc", "conv"))


def test_a_parameter_and_a_buffer_belong_to_the_block_that_reads_them():
    _, _, found, _ = ready("scaled")
    assert [piece.weights for piece in found.pieces] == [
        (),
        *((f"blocks.{i}.gamma", f"blocks.{i}.shift") for i in range(3)),
        (),
    ]


def test_a_map_of_one_pixel_is_not_a_point():
    assert [piece.point for piece in traced(Shrunk(Residual)).pieces] == ["act", "blocks.0", "blocks.1", None]


class SizeControlled(Network):
    def forward(self, x):
        if x.shape[2] > 8:
            x = x * 2
        return super().forward(x)


class TwoInputs(Network):
    def forward(self, x, y):
        return super().forward(x) + y


class Writing(Network):
    def forward(self, x):
        x = self.features(x)
        x[:, 0] = 0.0
        return self.fc(x.mean((2, 3)))


class BuiltIn(Network):
    def forward(self, x):
        x = self.features(x)
        return self.fc(x.flatten(2).view(-1, 8, 64).mean(2))


class NormedTwice(Network):
    def forward(self, x):
        return self.fc(self.blocks[0](self.features(x)).mean((2, 3)))


class NoTensor(Network):
    def forward(self, x):
        super().forward(x)


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (SizeControlled, r"it cannot be traced: control flow depends on a tensor at line \d+ of \S*models/test_tracing\.py$"),
        (TwoInputs, r"it has 2 inputs \(x, y\)$"),
        (Writing, r"it cannot be traced: it writes into parts of a tensor at line \d+ of \S*models/test_tracing\.py$"),
        (NormedTwice, r"its batch norm blocks\.0\.bn1 runs 2 times$"),
        (NoTensor, "its result is not a tensor$"),
        (BuiltIn, r"the sizes of its maps are built in: after act and 3 of 3 other blocks, the rest cannot take a smaller"),
    ],
)
def test_what_cannot_be_a_chain_is_refused_in_one_line(network, says):
    with pytest.raises(ModelError, match=says) as caught:
        traced(network(Residual))
    assert "\n" not in str(caught.value)


def test_a_network_of_few_blocks_is_refused():
    network = Network(Residual)
    network.blocks = nn.Sequential(Residual(8))
    with pytest.raises(ModelError, match=r"only 2 of its blocks end with one map .* that is the whole state; at least 3 must"):
        traced(network)
