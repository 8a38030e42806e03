"""The chain: the base class of all networks.

A chain consists of a stem, blocks and a head; each of these is a segment. The body of a segment maps a state (a pytree of
tensors, see `state.py`) to a state. A segment that is a point then shrinks the state by the given ratio. Modules keep no hidden
state: there are no flags, globals or cached sizes. Code that only one family needs is in the module of this family.

Names of tensors: N images, C channels, H and W height and width, K classes.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdpctl.errors import ModelError
from sdpctl.instance import ALL, FULL, Instance
from sdpctl.models.state import Shape, State

Part = slice | Tensor
"""A subset of the channels of a batch norm: a range, or a tensor of indices."""

WHOLE = slice(None)


class Norm(Protocol):
    """How a batch norm is applied."""

    def __call__(
        self,
        bn: nn.BatchNorm2d,
        x_NCHW: Tensor,
        part: Part = WHOLE,
        /,
        *,
        own: bool = False,
        plus: Tensor | None = None,
        relu: bool = False,
    ) -> Tensor:
        """Normalise a map; a GPU then adds and rectifies in the same pass over the memory.

        Args:
            bn: the batch norm.
            x_NCHW: the map.
            part: the batch norm's channels that the map has.
            own: whether the map may be modified in place.
            plus: a map to be added to the normalised one.
            relu: whether the result is rectified.
        """


def finished(out_NCHW: Tensor, plus: Tensor | None, relu: bool) -> Tensor:
    """Add a map to a normalised map and rectify the sum, both in place and only if asked for."""
    if plus is not None:
        out_NCHW = out_NCHW.add_(plus)
    return F.relu(out_NCHW, inplace=True) if relu else out_NCHW


def batch_norm(
    bn: nn.BatchNorm2d,
    x_NCHW: Tensor,
    part: Part = WHOLE,
    *,
    own: bool = False,  # noqa: ARG001
    plus: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Normalise as the module itself does: the default `norm` of a chain. The gradient needs the map, so it is not modified."""
    if isinstance(part, slice) and part == WHOLE:
        # without what a subclass adds, such as an activation
        return finished(nn.BatchNorm2d.forward(bn, x_NCHW), plus, relu)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    assert bn.momentum is not None  # a cumulative average (None) needs a count of batches for each channel
    mean, var = bn.running_mean[part], bn.running_var[part]
    out = F.batch_norm(x_NCHW, mean, var, *affine(bn, part), bn.training, bn.momentum, bn.eps)
    if bn.training and isinstance(part, Tensor):  # indexing made copies
        bn.running_mean[part], bn.running_var[part] = mean, var
    return finished(out, plus, relu)


def affine(bn: nn.BatchNorm2d, part: Part) -> tuple[Tensor | None, Tensor | None]:
    """Return weight and bias of some channels of a batch norm; None for a batch norm without them."""
    return None if bn.weight is None else bn.weight[part], None if bn.bias is None else bn.bias[part]


def shrunk(size: int, ratio: float) -> int:
    """Return how many pixels (or channels) a ratio keeps: rounded half to even as in the public code, at least 1."""
    return max(1, round(size * ratio))


def average_shrink(x_NCHW: Tensor, ratio: float, least: int = 1) -> Tensor:
    """Shrink height and width independently by adaptive average pooling; return the map itself if no size changes.

    Args:
        x_NCHW: the map.
        ratio: share of each side that is kept.
        least: minimum of each side, in pixels; a side that is smaller already stays as it is.
    """
    height, width = int(x_NCHW.shape[2]), int(x_NCHW.shape[3])
    size = min(height, max(least, shrunk(height, ratio))), min(width, max(least, shrunk(width, ratio)))
    return x_NCHW if size == (height, width) else F.adaptive_avg_pool2d(x_NCHW, size)


@dataclass(frozen=True)
class Segment:
    """One link of a chain.

    Args:
        name: `stem`, the name of a block's module, or `head`.
        modules: names of the chain's modules that belong to this segment.
        body: maps (state, norm) to a state; does not depend on the segment's ratio and does not modify its input.
        point: the point's name; None if the map cannot shrink.
        shrink: maps (body's result, ratio) to the segment's output, also at ratio 1; None without a point. It may modify the
            body's result in place if no pixel is pooled.
        weights: names of the parameters and buffers that belong to this segment besides those of the modules.
        pools: whether the shrink pools at ratio 1 too.
    """

    name: str
    modules: tuple[str, ...]
    body: Callable[[State, Norm], State]
    point: str | None = None
    shrink: Callable[[State, float], State] | None = None
    weights: tuple[str, ...] = ()
    pools: bool = False


class Chain(nn.Module, ABC):
    """A network as a chain of segments.

    A family may set the class attributes, and override `recorded` and `options_in`.
    """

    together: bool = False
    """Whether all points shrink together in the grid of instances; the same as in the family's entry in `FAMILIES`."""

    draws_in_training: bool = False
    """Whether a forward pass in training draws from torch's generator."""

    repeats: bool = True
    """Whether the steps of an instance repeat the same operations; only then can they be compiled, or recorded on a GPU."""

    draws_for_each_image: bool = False
    """Whether a forward pass in training draws for each image of its own, as dropout does, and not for the batch."""

    classifier_name: str = "fc"
    """Name of the layer whose rows are the classes: a linear layer, or a convolution."""

    input_conv_name: str = "conv1"
    """Name of the convolution that takes the images."""

    name_aliases: tuple[tuple[str, str], ...] = ()
    """Parts of parameter names in other programs' checkpoints, each with the corresponding part of the name here."""

    optional_names: tuple[str, ...] = ()
    """Parts of the names of parameters that other programs' checkpoints may lack."""

    @abstractmethod
    def segments(self) -> tuple[Segment, ...]:
        """Return the segments, first to last."""

    @property
    def head_names(self) -> tuple[str, ...]:
        """The names of the parameters whose shape depends on the number of classes, the classifier's weight first."""
        return f"{self.classifier_name}.weight", f"{self.classifier_name}.bias"

    @property
    def classifier_names(self) -> tuple[str, ...]:
        """The names of the parameters among `head_names` that the last segment uses."""
        used = set(self.parameters_of(self.segments()[-1]))
        return tuple(name for name in self.head_names if self.get_parameter(name) in used)

    @property
    def unused_names(self) -> frozenset[str]:
        """The names of the parameters and buffers that no segment uses; other programs' checkpoints may lack them."""
        return frozenset()

    def renew_head(self) -> None:
        """Draw a new classifier from torch's global generator, to be trained on top of pretrained weights.

        The networks of this package keep the classifier that they were built with.
        """

    def recorded(self, shape: Shape) -> tuple[int, ...]:
        """Return the shape of a state as a profile records it: the sizes of its maps, one after another."""
        return tuple(side for size in shape.maps for side in size)

    def options_in(self, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the arguments of `create_model` that can be inferred from weights: here `num_classes` and `in_channels`."""
        head, first = weights.get(self.head_names[0]), weights.get(f"{self.input_conv_name}.weight")
        classes = {"num_classes": head.shape[0]} if head is not None and head.dim() in (2, 4) else {}
        return classes | ({"in_channels": first.shape[1]} if first is not None and first.dim() == 4 else {})

    @contextmanager
    def passing(self, segment: Segment, shape: Shape) -> Iterator[None]:
        """Turn torch's error for a state that a segment cannot take into an error for the user.

        Raises:
            ModelError: if torch raises a `RuntimeError` within the block.
        """
        try:
            yield
        except RuntimeError as error:
            size, reason = "x".join(map(str, self.recorded(shape))), " ".join(str(error).split())
            raise ModelError(
                f"{segment.name} cannot take a map of {size} ({reason}); use larger images, larger ratios or fewer points"
            ) from error

    @property
    def grid_points(self) -> tuple[str, ...]:
        """The points of the grid of instances: every point, or `all` if all points shrink together."""
        return (ALL,) if self.together else self.points

    @property
    def points(self) -> tuple[str, ...]:
        """The points' names, in network order."""
        return tuple(segment.point for segment in self.segments() if segment.point is not None)

    def norms(self, segment: Segment) -> dict[str, nn.BatchNorm2d]:
        """Return the batch norms of a segment that have running statistics, by their full names."""
        return {
            f"{owner}.{name}" if name else owner: module
            for owner in segment.modules
            for name, module in self.get_submodule(owner).named_modules()
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None
        }

    @property
    def batch_norms(self) -> dict[str, nn.BatchNorm2d]:
        """The batch norms that have running statistics, by their full names; a network without any needs no calibration."""
        return {name: bn for segment in self.segments() for name, bn in self.norms(segment).items()}

    def parameters_of(self, segment: Segment) -> list[nn.Parameter]:
        """Return the parameters of a segment."""
        own = [p for owner in segment.modules for p in self.get_submodule(owner).parameters()]
        named = dict(self.named_parameters())
        return list(dict.fromkeys([*own, *(named[name] for name in segment.weights if name in named)]))

    def channels_last(self) -> Self:
        """Keep the weights of convolutions as NHWC in memory; `Module.to` fails if there are weights of five dimensions."""
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.dim() == 4:
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        return self

    def on_meta(self) -> Self:
        """Return a copy whose tensors are on the meta device: they have a shape and no memory."""
        parameters = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in self.parameters()}
        return copy.deepcopy(self, {**parameters, **{id(b): b.to("meta") for b in self.buffers()}})

    def with_parameters(self, own: Mapping[str, nn.Parameter]) -> Self:
        """Return a chain that shares every module and tensor with this one, except for some parameters of its own.

        Args:
            own: the parameters by name.
        """
        owners = {name.rpartition(".")[0] for name in own}
        above = {"", *owners, *(owner[:i] for owner in owners for i, letter in enumerate(owner) if letter == ".")}
        shared = (module for name, module in self.named_modules() if name not in above)
        made = copy.deepcopy(self, {id(each): each for each in (*shared, *self.parameters(), *self.buffers())})
        for name, parameter in own.items():
            owner, _, last = name.rpartition(".")
            setattr(made.get_submodule(owner), last, parameter)
        return made

    def begun(self, x_NCHW: Tensor) -> State:
        """Return the state with which a forward pass begins: the images, and what a family draws for a step of training."""
        return x_NCHW

    def forward(self, x_NCHW: Tensor, instance: Instance | str = FULL, norm: Norm = batch_norm) -> Tensor:
        """Run one instance.

        Args:
            x_NCHW: normalised images.
            instance: an instance or its text.
            norm: how each batch norm is applied.

        Returns:
            Logits, (N, K).

        Raises:
            InstanceError: if the instance names a point that the network does not have.
        """
        instance = Instance.of(instance).check(self.points)
        state = self.begun(x_NCHW)
        for segment in self.segments():
            state = segment.body(state, norm)
            if segment.shrink is not None and segment.point is not None:
                state = segment.shrink(state, instance.ratio(segment.point))
        assert isinstance(state, Tensor)
        return state
