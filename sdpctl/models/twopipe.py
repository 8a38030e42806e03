"""A network in two pipes: each channel lives at full or at half resolution.

Each convolution but the last is a point, and the point's ratio is the share of its output channels that stay at full
resolution. With x_l and x_s the full and the half map, and W_ll (from full to full channels), W_ls (full to half), W_sl and
W_ss the parts of one 3x3 kernel, a convolution is

    out_l = W_ll * x_l + up(W_sl * x_s)        out_s = avg(W_ls * x_l) + W_ss * x_s

where `up` repeats pixels and `avg` is the mean of 2x2; each pipe computes its own channels alone. `avg(W_ls * x_l)` is computed
as one 4x4 convolution of stride 2, whose kernel is W_ls spread by the mean: 16 multiplications a quarter as often instead of 9.
With a of A input channels full, k of K output channels full, and h x w the half map, the MACs of an image are

    h w (36 k a + 9 k (A - a) + 16 (K - k) a + 9 (K - k) (A - a))

Which channels stay is `nested`, the first ones, or `random`, drawn for each training step; evaluation is always nested.
Octave convolution (Chen et al., ICCV 2019) is the related published method.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdpctl.instance import Instance
from sdpctl.models.chain import Chain, Norm, Pipes, Segment, State, shrunk
from sdpctl.models.registry import Masks
from sdpctl.models.resnet import conv, initialise

POOLED = (2, 4)
"""The convolutions that a max-pool of 2x2 follows."""


def spread(weight_KC33: Tensor) -> Tensor:
    """Return the 4x4 kernel whose convolution of stride 2 is the 2x2 average of a 3x3 kernel's."""
    corners = ((0, 1), (1, 0))
    return sum((F.pad(weight_KC33, (*x, *y)) for x in corners for y in corners), torch.zeros(())) / 4


def even(x_NCHW: Tensor) -> Tensor:
    """Add a row and a column of zeros, at the bottom and at the right, where a size is odd."""
    height, width = int(x_NCHW.shape[2]), int(x_NCHW.shape[3])
    return F.pad(x_NCHW, (0, width % 2, 0, height % 2)) if height % 2 or width % 2 else x_NCHW


class TwoPipe(Chain):
    """Five 3x3 convolutions in two pipes, a max-pool after the second and the fourth, a linear head.

    Args:
        num_classes: K of the head.
        in_channels: channels of an image; they are all full.
        widths: output channels of the convolutions; those of the last are all full.
        masks: which channels stay full in training.
    """

    def __init__(self, *, num_classes: int, in_channels: int, widths: tuple[int, ...], masks: Masks = "nested") -> None:
        super().__init__()
        self.widths, self.masks = widths, masks
        for i, (before, after) in enumerate(zip((in_channels, *widths), widths, strict=False), 1):
            self.add_module(f"conv{i}", conv(before, after, 3))
            self.add_module(f"bn{i}", nn.BatchNorm2d(after))
        self.fc = nn.Linear(widths[-1], num_classes)
        initialise(self)

    @property
    def grid_points(self) -> tuple[str, ...]:
        """The convolutions go together."""
        return ("all",)

    def segments(self) -> tuple[Segment, ...]:
        """Return the beginning, the convolutions and the head.

        A point decides on the channels of the convolution after it, so that no body depends on its own ratio.
        """
        last = len(self.widths)
        links = [Segment("input", (), self.begin, "conv1", partial(self.decide, 1))]
        for i in range(1, last + 1):
            point, decide = (f"conv{i + 1}", partial(self.decide, i + 1)) if i < last - 1 else (None, None)
            links.append(Segment(f"conv{i}", (f"conv{i}", f"bn{i}"), partial(self.body, i), point, decide))
        return (*links, Segment("head", ("fc",), self.head))

    def fold(self, state: State, instance: Instance, norm: Norm) -> Tensor:
        """Take images through every segment; a training with random masks draws them here, from torch's generator."""
        if self.training and self.masks == "random" and isinstance(state, Tensor):
            orders = (torch.randperm(width).to(state.device) for width in self.widths[:-1])
            state = Pipes(state, None, self.widths[0], tuple(orders))
        return super().fold(state, instance, norm)

    def begin(self, state: State, norm: Norm) -> Pipes:  # noqa: ARG002  a segment's body takes a norm
        """Return an image as the full pipe, the half one empty."""
        return Pipes(state, None, self.widths[0]) if isinstance(state, Tensor) else state

    def decide(self, number: int, state: State, ratio: float) -> Pipes:
        """Return the state with how many outputs of a convolution stay full."""
        assert isinstance(state, Pipes)
        return state._replace(outputs=shrunk(self.widths[number - 1], ratio))

    def body(self, number: int, state: State, norm: Norm) -> Pipes:
        """Return what a convolution makes of both pipes, normalised, rectified, and after the second and fourth pooled."""
        assert isinstance(state, Pipes)
        bn = self.get_submodule(f"bn{number}")
        assert isinstance(bn, nn.BatchNorm2d)
        weight: Tensor = self.get_parameter(f"conv{number}.weight")
        kept, order = state.outputs, None
        if state.orders is not None:
            weight = weight[:, state.orders[number - 2]] if number > 1 else weight
            order = state.orders[number - 1] if number < len(self.widths) else None
            weight = weight if order is None else weight[order]
        x_l, x_s, inputs = even(state.full), state.half, state.full.shape[1]
        parts = (slice(0, kept), slice(kept, None)) if order is None else (order[:kept], order[kept:])
        full, half = F.conv2d(x_l, weight[:kept, :inputs], padding=1), None
        if x_s is not None:
            full += F.interpolate(F.conv2d(x_s, weight[:kept, inputs:], padding=1), scale_factor=2, mode="nearest")
        full = F.relu(norm(bn, full, parts[0], own=True), inplace=True)
        if kept < len(weight):
            half = F.conv2d(x_l, spread(weight[kept:, :inputs]), stride=2, padding=1)
            if x_s is not None:
                half += F.conv2d(x_s, weight[kept:, inputs:], padding=1)
            half = F.relu(norm(bn, half, parts[1], own=True), inplace=True)
        if number in POOLED:
            full = F.max_pool2d(full, 2)
            half = None if half is None else F.max_pool2d(half, 2, ceil_mode=True)
        return Pipes(full, half, self.widths[min(number, len(self.widths) - 1)], state.orders)

    def head(self, state: State, norm: Norm) -> Tensor:  # noqa: ARG002  a segment's body takes a norm
        """Return logits, (N, K), of the last convolution's channels, which are all full."""
        assert isinstance(state, Pipes)
        logits_NK: Tensor = self.fc(state.full.mean((2, 3)))
        return logits_NK
