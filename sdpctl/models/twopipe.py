"""A network in two pipes: each channel lives at full or at half resolution.

Each convolution but the last is a point, and the point's ratio is the share of its output channels that stay at full
resolution. With x_l and x_s the full and the half map, and W_ll (from full to full channels), W_ls (full to half), W_sl and
W_ss the parts of one 3x3 kernel, a convolution is

    out_l = W_ll * x_l + up(W_sl * x_s)        out_s = avg(W_ls * x_l) + W_ss * x_s

where `up` repeats pixels and `avg` is the mean of 2x2; each pipe computes its own channels alone. `avg(W_ls * x_l)` is computed
as one 4x4 convolution of stride 2, whose kernel is W_ls spread by the mean: 16 multiplications for each of a quarter of the
pixels, instead of 9 for each pixel.
With a of A input channels full, k of K output channels full, and h x w the half map, the MACs of an image are

    h w (36 k a + 9 k (A - a) + 16 (K - k) a + 9 (K - k) (A - a))

The channels that stay are the first ones (`nested`), or are drawn for each training step (`random`); evaluation is nested.
Octave convolution (Chen et al., ICCV 2019) is the related published method.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

from sdpctl.models.chain import Chain, Norm, Segment, shrunk
from sdpctl.models.registry import Architecture, Masks
from sdpctl.models.resnet import conv, initialise
from sdpctl.models.state import Shape, State

POOLED = (2, 4)
"""The numbers of the convolutions that are followed by a 2x2 max-pool."""


@dataclass(frozen=True, eq=False)
class Orders:
    """The drawn orders of channels in one forward pass; two draws are never equal.

    Args:
        of: for each convolution but the last the indices of its output channels, those at full resolution first.
    """

    of: tuple[Tensor, ...]


@dataclass(frozen=True)
class Pipes:
    """The state of a network in two pipes: a pytree of its maps, whose static part is `outputs` and `orders`.

    Args:
        full: map at full resolution, (N, a, H, W).
        half: map at half resolution, (N, A - a, ceil(H / 2), ceil(W / 2)); None if all channels are at full resolution.
        outputs: number of output channels of the next convolution at full resolution.
        orders: drawn orders of the channels; None if the first channels are at full resolution.
    """

    full: Tensor
    half: Tensor | None
    outputs: int
    orders: Orders | None = None


def _flatten(pipes: Pipes) -> tuple[list[Tensor], tuple[int, Orders | None]]:
    maps = [pipes.full] if pipes.half is None else [pipes.full, pipes.half]
    return maps, (pipes.outputs, pipes.orders)


def _unflatten(maps: Iterable[Any], static: tuple[int, Orders | None]) -> Pipes:
    full, *half = maps
    return Pipes(full, half[0] if half else None, *static)


register_pytree_node(Pipes, _flatten, _unflatten)


def shape_text(recorded: Sequence[int]) -> str:
    """Return the recorded shape of a state as text: both maps of two pipes, `96x32x32+56x16x16`."""
    if len(recorded) != 5:
        return "x".join(map(str, recorded))
    full, height, width, half, _ = recorded
    return f"{full}x{height}x{width}" + (f"+{half}x{(height + 1) // 2}x{(width + 1) // 2}" if half else "")


def spread(weight_KC33: Tensor) -> Tensor:
    """Return the 4x4 kernel whose convolution of stride 2 is the 2x2 average of a 3x3 kernel's."""
    corners = ((0, 1), (1, 0))
    return sum((F.pad(weight_KC33, (*x, *y)) for x in corners for y in corners), torch.zeros(())) / 4


def even(x_NCHW: Tensor) -> Tensor:
    """Add a row of zeros at the bottom if the height is odd, and a column at the right if the width is odd."""
    height, width = int(x_NCHW.shape[2]), int(x_NCHW.shape[3])
    return F.pad(x_NCHW, (0, width % 2, 0, height % 2)) if height % 2 or width % 2 else x_NCHW


class TwoPipe(Chain):
    """Five 3x3 convolutions in two pipes, a max-pool after the second and the fourth, a linear head.

    Args:
        num_classes: K.
        in_channels: channels of an image; all of them are at full resolution.
        widths: output channels of the convolutions; all those of the last are at full resolution.
        masks: which channels stay at full resolution in training: `nested`, the first ones, or `random`.
    """

    together = True

    def __init__(
        self,
        _: Architecture,
        *,
        num_classes: int,
        in_channels: int,
        widths: tuple[int, ...] = (96, 152, 256, 256, 512),
        masks: Masks = "nested",
    ) -> None:
        super().__init__()
        self.widths, self.draws_in_training = widths, masks == "random"
        self.repeats = not self.draws_in_training
        for i, (before, after) in enumerate(zip((in_channels, *widths), widths, strict=False), 1):
            self.add_module(f"conv{i}", conv(before, after, 3))
            self.add_module(f"bn{i}", nn.BatchNorm2d(after))
        self.fc = nn.Linear(widths[-1], num_classes)
        initialise(self)

    def recorded(self, shape: Shape) -> tuple[int, ...]:
        """Return (a, H, W, A - a, outputs) of two pipes, and the size of an image or of the logits."""
        if shape.spec.type is not Pipes:
            return super().recorded(shape)
        (outputs, _), (full, *half) = shape.spec.context, shape.maps
        return (*full, half[0][0] if half else 0, outputs)

    def segments(self) -> tuple[Segment, ...]:
        """Return the segments: the input, the convolutions and the head.

        A point decides how many outputs of the next convolution are full, so that no body depends on its own ratio.
        """
        last = len(self.widths)
        links = [Segment("input", (), self.begin, "conv1", partial(self.decide, 1))]
        for i in range(1, last + 1):
            point, decide = (f"conv{i + 1}", partial(self.decide, i + 1)) if i < last - 1 else (None, None)
            links.append(Segment(f"conv{i}", (f"conv{i}", f"bn{i}"), partial(self.body, i), point, decide))
        return (*links, Segment("head", ("fc",), self.head))

    def begun(self, x_NCHW: Tensor) -> State:
        """Return the images; training with random masks draws them here, from torch's generator."""
        if not self.training or not self.draws_in_training:
            return x_NCHW
        orders = tuple(torch.randperm(width).to(x_NCHW.device) for width in self.widths[:-1])
        return Pipes(x_NCHW, None, self.widths[0], Orders(orders))

    def begin(self, state: Tensor | Pipes, norm: Norm) -> Pipes:  # noqa: ARG002  a segment's body takes a norm
        """Return images as the full pipe; the half pipe is empty."""
        return Pipes(state, None, self.widths[0]) if isinstance(state, Tensor) else state

    def decide(self, number: int, state: Pipes, ratio: float) -> Pipes:
        """Return the state with the number of outputs of a convolution that stay at full resolution."""
        return replace(state, outputs=shrunk(self.widths[number - 1], ratio))

    def body(self, number: int, state: Pipes, norm: Norm) -> Pipes:
        """Convolve both pipes, normalise, rectify, and after the second and the fourth convolution pool."""
        bn = self.get_submodule(f"bn{number}")
        assert isinstance(bn, nn.BatchNorm2d)
        weight: Tensor = self.get_parameter(f"conv{number}.weight")
        kept, order = state.outputs, None
        if state.orders is not None:
            orders = state.orders.of
            weight = weight[:, orders[number - 2]] if number > 1 else weight
            order = orders[number - 1] if number < len(self.widths) else None
            weight = weight if order is None else weight[order]
        x_l, x_s, inputs = even(state.full), state.half, state.full.shape[1]
        parts = (slice(0, kept), slice(kept, None)) if order is None else (order[:kept], order[kept:])
        full, half = F.conv2d(x_l, weight[:kept, :inputs], padding=1), None
        if x_s is not None:
            full += F.interpolate(F.conv2d(x_s, weight[:kept, inputs:], padding=1), scale_factor=2, mode="nearest")
        full = norm(bn, full, parts[0], own=True, relu=True)
        if kept < len(weight):
            half = F.conv2d(x_l, spread(weight[kept:, :inputs]), stride=2, padding=1)
            if x_s is not None:
                half += F.conv2d(x_s, weight[kept:, inputs:], padding=1)
            half = norm(bn, half, parts[1], own=True, relu=True)
        if number in POOLED:
            full = F.max_pool2d(full, 2)
            half = None if half is None else F.max_pool2d(half, 2, ceil_mode=True)
        return Pipes(full, half, self.widths[min(number, len(self.widths) - 1)], state.orders)

    def head(self, state: Pipes, norm: Norm) -> Tensor:  # noqa: ARG002  a segment's body takes a norm
        """Return logits, (N, K), of the last convolution's channels, which are all at full resolution."""
        logits_NK: Tensor = self.fc(state.full.mean((2, 3)))
        return logits_NK
