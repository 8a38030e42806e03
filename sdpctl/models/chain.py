"""The chain: what every network is.

A chain is a stem, blocks and a head, each a segment. A segment maps a state by its body and, where it is a point, then
shrinks the state by the ratio handed in. Nothing is hidden: no flag on a module, no global, no cached size.

Names of tensors: N images, C channels, H and W height and width, K classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from sdpctl.instance import FULL, Instance

Norm = Callable[[nn.BatchNorm2d, Tensor], Tensor]


def batch_norm(bn: nn.BatchNorm2d, x_NCHW: Tensor) -> Tensor:
    """Normalise as the module itself does: the default `norm` of a chain."""
    normalised: Tensor = bn(x_NCHW)
    return normalised


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
        body: maps (state, norm) to a state; it does not depend on the segment's ratio.
        point: the point's name, or None where the map cannot shrink.
        shrink: maps (state, ratio) to the state handed on, at ratio 1 too; None where there is no point.
    """

    name: str
    modules: tuple[str, ...]
    body: Callable[[Tensor, Norm], Tensor]
    point: str | None = None
    shrink: Callable[[Tensor, float], Tensor] | None = None


class Chain(nn.Module, ABC):
    """A network as a chain of segments."""

    @abstractmethod
    def segments(self) -> tuple[Segment, ...]:
        """Return the segments, first to last."""

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
        state = x_NCHW
        for segment in self.segments():
            state = segment.body(state, norm)
            if segment.shrink is not None and segment.point is not None:
                state = segment.shrink(state, instance.ratio(segment.point))
        return state
