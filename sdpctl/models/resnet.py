"""ResNet and ResNeXt (He et al. 2016; Xie et al. 2017), with parameters named as torchvision names them.

A block's point acts on the sum of its branches, before the block's last ReLU (Kuen et al. 2018, section 3.1).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sdpctl.models.chain import Chain, Norm, Segment, average_shrink, shrunk
from sdpctl.models.convolution import Conv2d
from sdpctl.models.registry import ResidualArchitecture, Shortcut, Stem


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Return a convolution without bias whose padding keeps the size at stride 1."""
    return Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)


def initialise(chain: Chain) -> None:
    """Draw the weights of the convolutions as in He et al. 2015 (fan out); batch norms start as the identity."""
    for module in chain.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:  # shapes alone draw nothing
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def block_convs(arch: ResidualArchitecture, in_channels: int, width: int, stride: int) -> list[nn.Conv2d]:
    """Return the convolutions on a block's residual branch, in order."""
    if arch.block == "basic":
        return [conv(in_channels, width, 3, stride), conv(width, width, 3)]
    inner = max(1, width * arch.base_width // 64) * arch.groups
    return [conv(in_channels, inner, 1), conv(inner, inner, 3, stride, arch.groups), conv(inner, width * 4, 1)]


def padded_shortcut(x_NCHW: Tensor, stride: int, out_channels: int, *, centred: bool = False) -> Tensor:
    """Take every `stride`-th pixel and add zero channels (option A of He et al. 2016, section 3.3).

    Args:
        x_NCHW: the block's input.
        stride: distance of the pixels that are kept.
        out_channels: channels of the result.
        centred: add half of the zero channels before the others, as many public CIFAR networks do; otherwise all after them.
    """
    added = out_channels - x_NCHW.shape[1]
    before = added // 2 if centred else 0
    return F.pad(x_NCHW[:, :, ::stride, ::stride], (0, 0, 0, 0, before, added - before))


class Block(nn.Module):
    """A residual block of any family: `conv1`, `bn1`, ... and, where the shape changes, a shortcut.

    Args:
        arch: architecture of the network.
        in_channels: channels of the input.
        width: the stage's channels before the expansion.
        stride: stride of the convolution that shrinks the map.
        shortcut: kind of the shortcut if the shape changes.
    """

    convs: list[str]

    def __init__(self, arch: ResidualArchitecture, in_channels: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        convs = block_convs(arch, in_channels, width, stride)
        self.depth = len(convs)
        self.stride = stride
        self.out_channels = convs[-1].out_channels
        for i, layer in enumerate(convs, 1):
            self.add_module(f"conv{i}", layer)
            self.add_module(f"bn{i}", nn.BatchNorm2d(self.normalised_channels(layer)))
        self.downsample: nn.Sequential | None = None
        self.padded = self.centred = False
        if stride != 1 or in_channels != self.out_channels:
            self.padded = shortcut != "projection"
            self.centred = shortcut == "padding-centred"
            if not self.padded:
                projection = conv(in_channels, self.out_channels, 1, stride)
                self.downsample = nn.Sequential(projection, nn.BatchNorm2d(self.out_channels))

    @staticmethod
    def normalised_channels(layer: nn.Conv2d) -> int:
        """Return the number of channels of a convolution's batch norm, which follows the convolution."""
        return layer.out_channels

    def bn(self, number: int) -> nn.BatchNorm2d:
        """Return a batch norm by its number, counted from 1."""
        bn = self.get_submodule(f"bn{number}")
        assert isinstance(bn, nn.BatchNorm2d)
        return bn

    def shortcut(self, x_NCHW: Tensor, norm: Norm) -> Tensor:
        """Return the shortcut, which is added to the residual branch."""
        if self.padded:
            return padded_shortcut(x_NCHW, self.stride, self.out_channels, centred=self.centred)
        if self.downsample is None:
            return x_NCHW
        layer, bn = self.downsample
        assert isinstance(bn, nn.BatchNorm2d)
        return norm(bn, layer(x_NCHW), own=True)

    def body(self, x_NCHW: Tensor, norm: Norm) -> Tensor:
        """Return the sum of shortcut and residual branch."""
        out = x_NCHW
        for i in range(1, self.depth):
            out = norm(self.bn(i), self.get_submodule(f"conv{i}")(out), own=True, relu=True)
        out = self.get_submodule(f"conv{self.depth}")(out)
        return norm(self.bn(self.depth), out, own=True, plus=self.shortcut(x_NCHW, norm))

    def shrink(self, x_NCHW: Tensor, ratio: float) -> Tensor:
        """Shrink the sum, then apply the block's last ReLU."""
        return F.relu(average_shrink(x_NCHW, ratio), inplace=True)


class ResNet(Chain):
    """ResNet or ResNeXt.

    Args:
        arch: the architecture.
        num_classes: number of classes, K.
        in_channels: channels of an image.
        stem: `imagenet` or `small`; the architecture's own by default.
        width: factor on the channels of every stage.
        shortcut: kind of the shortcuts where the shape changes; the architecture's own by default.
    """

    block: type[Block] = Block
    name_aliases = ((".shortcut.", ".downsample."),)
    optional_names = (".downsample.",)

    def __init__(
        self,
        arch: ResidualArchitecture,
        *,
        num_classes: int,
        in_channels: int,
        stem: Stem | None = None,
        width: float = 1.0,
        shortcut: Shortcut | None = None,
    ) -> None:
        super().__init__()
        self.stem = stem or arch.stem
        self.shortcut = shortcut or arch.shortcut
        widths = [max(1, round(channels * width)) for channels in arch.widths]
        channels = widths[0]
        kernel, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        self.conv1 = conv(in_channels, channels, kernel, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.stages = len(arch.depths)
        for i, (depth, own) in enumerate(zip(arch.depths, widths, strict=True), 1):
            stage = nn.Sequential()
            for j in range(depth):
                block = self.block(arch, channels, own, 2 if i > 1 and j == 0 else 1, self.shortcut)
                stage.append(block)
                channels = block.out_channels
            self.add_module(f"layer{i}", stage)
        self.add_head(channels, num_classes)
        initialise(self)

    def add_head(self, channels: int, num_classes: int) -> None:
        """Add the modules of the head."""
        self.fc = nn.Linear(channels, num_classes)

    head_modules: tuple[str, ...] = ("fc",)

    def options_in(self, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the arguments of `create_model` that can be inferred from weights, including the stem and the shortcut."""
        options = super().options_in(weights)
        if "in_channels" in options:
            options["stem"] = "imagenet" if weights["conv1.weight"].shape[-1] == 7 else "small"
        if self.shortcut == "padding" and any(".downsample." in name for name in weights):
            options["shortcut"] = "projection"
        return options

    def blocks(self) -> Iterator[tuple[str, Block]]:
        """Yield the blocks with their names, in order."""
        for i in range(1, self.stages + 1):
            for j, block in enumerate(self.get_submodule(f"layer{i}").children()):
                assert isinstance(block, Block)
                yield f"layer{i}.{j}", block

    def segments(self) -> tuple[Segment, ...]:
        """Return stem, blocks and head."""
        point = "maxpool" if self.stem == "imagenet" else "stem"
        return (
            Segment("stem", ("conv1", "bn1"), self.stem_body, point, self.stem_shrink, pools=self.stem == "imagenet"),
            *(Segment(name, (name,), block.body, name, block.shrink) for name, block in self.blocks()),
            Segment("head", self.head_modules, self.head),
        )

    def stem_body(self, x_NCHW: Tensor, norm: Norm) -> Tensor:
        """Return the first feature map, before any pooling."""
        return norm(self.bn1, self.conv1(x_NCHW), own=True, relu=True)

    def stem_shrink(self, x_NCHW: Tensor, ratio: float) -> Tensor:
        """Max-pool to the full network's size, adaptively to a smaller size; the small stem has no max-pool and averages."""
        if self.stem == "small":
            return average_shrink(x_NCHW, ratio)
        height, width = ((int(size) + 1) // 2 for size in x_NCHW.shape[2:])
        size = shrunk(height, ratio), shrunk(width, ratio)
        if size == (height, width):
            return F.max_pool2d(x_NCHW, kernel_size=3, stride=2, padding=1)
        return F.adaptive_max_pool2d(x_NCHW, size)

    def head(self, x_NCHW: Tensor, norm: Norm) -> Tensor:  # noqa: ARG002  a segment's body takes a norm
        """Return logits, (N, K)."""
        logits_NK: Tensor = self.fc(x_NCHW.mean((2, 3)))
        return logits_NK
