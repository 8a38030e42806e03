"""The chain: what every network is.

A chain is a stem, blocks and a head, each a segment. A segment maps a state by its body and, where it is a point, then
shrinks the state by the ratio handed in. Nothing is hidden: no flag on a module, no global, no cached size.

Names of tensors: N images, C channels, H and W height and width, K classes.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdpctl.instance import FULL, Instance

Part = slice | Tensor
"""Some of a batch norm's channels: a range, or their indices."""

WHOLE = slice(None)


class Norm(Protocol):
    """How a batch norm is applied."""

    def __call__(self, bn: nn.BatchNorm2d, x_NCHW: Tensor, part: Part = WHOLE, /, *, own: bool = False) -> Tensor:
        """Normalise a map whose channels are those of `part`; one that is the caller's `own` may be overwritten."""


def batch_norm(bn: nn.BatchNorm2d, x_NCHW: Tensor, part: Part = WHOLE, *, own: bool = False) -> Tensor:  # noqa: ARG001
    """Normalise as the module itself does: the default `norm` of a chain. Its gradient needs the map, which stays."""
    if isinstance(part, slice) and part == WHOLE:
        normalised: Tensor = bn(x_NCHW)
        return normalised
    assert bn.running_mean is not None
    assert bn.running_var is not None
    assert bn.momentum is not None  # the cumulative average counts batches, of which a part knows nothing
    mean, var = bn.running_mean[part], bn.running_var[part]
    out = F.batch_norm(x_NCHW, mean, var, bn.weight[part], bn.bias[part], bn.training, bn.momentum, bn.eps)
    if bn.training and isinstance(part, Tensor):  # of which `mean` and `var` are copies
        bn.running_mean[part], bn.running_var[part] = mean, var
    return out


class Pipes(NamedTuple):
    """The state of a network in two pipes.

    Args:
        full: (N, a, H, W).
        half: (N, A - a, ceil(H / 2), ceil(W / 2)); None where all channels are full.
        outputs: how many channels of the next convolution are full.
        orders: for each convolution but the last its output channels' indices, first those at full resolution; None where the
            first channels are.
    """

    full: Tensor
    half: Tensor | None
    outputs: int
    orders: tuple[Tensor, ...] | None = None


State = Tensor | Pipes
"""What one segment hands to the next."""

Shape = tuple[int, ...]


def shape_of(state: State) -> Shape:
    """Return the shape of one image's state: (C, H, W), or of two pipes (a, H, W, A - a, outputs)."""
    if isinstance(state, Tensor):
        return tuple(state.shape[1:])
    return (*state.full.shape[1:], 0 if state.half is None else state.half.shape[1], state.outputs)


def blank(shape: Shape, *, images: int = 1, dtype: torch.dtype | None = None) -> State:
    """Return the state of an image, given its shape, or of several: on the meta device."""
    if len(shape) != 5:
        return torch.empty((images, *shape), dtype=dtype, device="meta")
    channels, height, width, half, outputs = shape
    full = torch.empty((images, channels, height, width), dtype=dtype, device="meta")
    small = full.new_empty((images, half, (height + 1) // 2, (width + 1) // 2)) if half else None
    return Pipes(full, small, outputs)


def join(states: Sequence[State]) -> State:
    """Return states of one shape as one batch."""
    if len(states) == 1:
        return states[0]
    maps = [state for state in states if isinstance(state, Tensor)]
    if maps:
        return torch.cat(maps)
    pipes = [state for state in states if isinstance(state, Pipes)]
    halves = [state.half for state in pipes if state.half is not None]
    return Pipes(torch.cat([state.full for state in pipes]), torch.cat(halves) if halves else None, pipes[0].outputs)


def split(state: State, branches: int) -> Sequence[State]:
    """Return the parts of a batch that was joined."""
    if isinstance(state, Tensor):
        return state.chunk(branches)
    halves = [None] * branches if state.half is None else state.half.chunk(branches)
    return [Pipes(full, half, state.outputs) for full, half in zip(state.full.chunk(branches), halves, strict=True)]


def copied(state: State) -> State:
    """Return a copy in memory of its own."""
    if isinstance(state, Tensor):
        return state.clone()
    return state._replace(full=state.full.clone(), half=None if state.half is None else state.half.clone())


def tensors(state: State) -> tuple[Tensor, ...]:
    """Return the maps of a state."""
    if isinstance(state, Tensor):
        return (state,)
    return (state.full,) if state.half is None else (state.full, state.half)


def numel(state: State) -> int:
    """Return the number of elements of a state."""
    return sum(tensor.numel() for tensor in tensors(state))


def shrunk(size: int, ratio: float) -> int:
    """Return the size kept of one side: rounded half to even, never below 1 (as the public code rounds)."""
    return max(1, round(size * ratio))


def average_shrink(x_NCHW: Tensor, ratio: float) -> Tensor:
    """Shrink height and width, each by itself, by adaptive average pooling; a size that stays needs no pooling."""
    height, width = int(x_NCHW.shape[2]), int(x_NCHW.shape[3])
    size = shrunk(height, ratio), shrunk(width, ratio)
    return x_NCHW if size == (height, width) else F.adaptive_avg_pool2d(x_NCHW, size)


@dataclass(frozen=True)
class Segment:
    """One link of a chain.

    Args:
        name: `stem`, the name of a block's module, or `head`.
        modules: names of the chain's modules that are this segment's own.
        body: maps (state, norm) to a state; it does not depend on the segment's ratio, and leaves the state that comes in.
        point: the point's name, or None where the map cannot shrink.
        shrink: maps (state, ratio) to the state handed on, at ratio 1 too; None where there is no point. It may overwrite
            the body's result where no pixel is pooled.
    """

    name: str
    modules: tuple[str, ...]
    body: Callable[[Any, Norm], State]
    point: str | None = None
    shrink: Callable[[Any, float], State] | None = None


class Chain(nn.Module, ABC):
    """A network as a chain of segments."""

    @abstractmethod
    def segments(self) -> tuple[Segment, ...]:
        """Return the segments, first to last."""

    @property
    def grid_points(self) -> tuple[str, ...]:
        """What the grid of instances is made over: every point, or `all` where they go together."""
        return self.points

    @property
    def points(self) -> tuple[str, ...]:
        """The points' names, in network order."""
        return tuple(segment.point for segment in self.segments() if segment.point is not None)

    def norms(self, segment: Segment) -> dict[str, nn.BatchNorm2d]:
        """Return the batch norms of a segment by their full names."""
        return {
            f"{owner}.{name}" if name else owner: module
            for owner in segment.modules
            for name, module in self.get_submodule(owner).named_modules()
            if isinstance(module, nn.BatchNorm2d)
        }

    def on_meta(self) -> Self:
        """Return a copy whose tensors have shapes alone."""
        parameters = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in self.parameters()}
        return copy.deepcopy(self, {**parameters, **{id(b): b.to("meta") for b in self.buffers()}})

    def forward(self, x_NCHW: Tensor, instance: Instance | str = FULL, norm: Norm = batch_norm) -> Tensor:
        """Run one instance.

        Args:
            x_NCHW: normalised images.
            instance: an instance or its text.
            norm: how each batch norm is applied.

        Returns:
            Logits, (N, K).

        Raises:
            InstanceError: where the instance names a point the network lacks.
        """
        instance = Instance.of(instance).check(self.points)
        return self.fold(x_NCHW, instance, norm)

    def fold(self, state: State, instance: Instance, norm: Norm) -> Tensor:
        """Take a state through every segment; the instance was checked."""
        for segment in self.segments():
            state = segment.body(state, norm)
            if segment.shrink is not None and segment.point is not None:
                state = segment.shrink(state, instance.ratio(segment.point))
        assert isinstance(state, Tensor)
        return state
