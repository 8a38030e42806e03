"""The cost of an instance: MACs per image, and parameters.

MACs are those of convolutions and matrix products, including the bias additions of linear layers, as ptflops' `aten` backend
counts them. Batch norm, activations, pooling and the additions of shortcuts are not counted. "FLOPs" in other tools are about
twice this number. Segments are counted on the meta device, once per input shape, so that nothing is computed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from ptflops import get_model_complexity_info
from torch import nn

from sdpctl.errors import SdpctlError
from sdpctl.instance import Instance
from sdpctl.models.chain import Chain, Segment, batch_norm
from sdpctl.models.state import Shape, State, blank, map_shape, state_shape


@dataclass(frozen=True)
class SegmentCost:
    """The cost of one segment of one instance.

    Args:
        name: name of the segment.
        in_shape: shape of the segment's input, as `Chain.recorded` writes the shape of a state: (C, H, W) of one map.
        out_shape: shape of the segment's output in the same form; (K,) of the head.
        macs: MACs per image.
        params: number of parameters of the segment.
    """

    name: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    macs: int
    params: int


@dataclass(frozen=True)
class Cost:
    """The cost of one instance.

    Args:
        macs: MACs per image.
        params: number of parameters of the network; it is the same for every instance.
        segments: the cost of each segment.
    """

    macs: int
    params: int
    segments: tuple[SegmentCost, ...] = field(repr=False)


class _Body(nn.Module):
    """A segment's body as a module, which is what ptflops counts."""

    def __init__(self, segment: Segment) -> None:
        super().__init__()
        self.segment = (segment,)  # in a tuple: ptflops switches registered modules to eval mode and forgets to switch back

    def forward(self, state: State) -> State:
        return self.segment[0].body(state, batch_norm)


def count_macs(module: nn.Module, in_shape: Shape) -> int:
    """Count the MACs of one image by ptflops.

    Args:
        module: a module on the meta device.
        in_shape: shape of one image's state.

    Raises:
        SdpctlError: if ptflops could not count; ptflops does not give a reason.
    """
    with torch.inference_mode(False), torch.no_grad():  # in inference mode ptflops counts nothing
        macs, _ = get_model_complexity_info(
            module,
            (1,),  # one image; the input itself is made by `input_constructor`
            as_strings=False,
            print_per_layer_stat=False,
            backend="aten",
            input_constructor=lambda _: {"state": blank(in_shape)},
        )
    if macs is None:
        raise SdpctlError(f"ptflops could not count the MACs of {type(module).__name__} for an input of {in_shape.maps}")
    return int(macs)


class Costs:
    """The MACs and state shapes of a chain's segments, each counted once for each input shape.

    Args:
        model: a chain on any device; its weights are not used.
        image_size: shape of one image, (C, H, W).
    """

    def __init__(self, model: Chain, image_size: Sequence[int]) -> None:
        self.image_shape = map_shape(image_size)
        self.model = model.on_meta().float().eval()
        self.segments = self.model.segments()
        self.params = [sum(p.numel() for p in self.model.parameters_of(segment)) for segment in self.segments]
        self._bodies: dict[tuple[int, Shape], tuple[int, State, Shape]] = {}
        self._shrunk: dict[tuple[int, Shape, float], Shape] = {}

    def body(self, index: int, in_shape: Shape) -> tuple[int, Shape]:
        """Return the MACs of a segment's body and the shape of its result, before any shrinking.

        Raises:
            ModelError: if the segment cannot take a state of this shape.
        """
        macs, _, out_shape = self._body(index, in_shape)
        return macs, out_shape

    def shrunk(self, index: int, in_shape: Shape, ratio: float) -> Shape:
        """Return the shape of a segment's output, given the shape of its input."""
        key = (index, in_shape, ratio)
        if key not in self._shrunk:
            state, shrink = self._body(index, in_shape)[1], self.segments[index].shrink
            with torch.inference_mode():
                self._shrunk[key] = state_shape(state if shrink is None else shrink(state, ratio))
        return self._shrunk[key]

    def _body(self, index: int, in_shape: Shape) -> tuple[int, State, Shape]:
        if (index, in_shape) not in self._bodies:
            body = _Body(self.segments[index])
            with self.model.passing(self.segments[index], in_shape), torch.inference_mode():
                out = body(blank(in_shape))
            self._bodies[index, in_shape] = count_macs(body, in_shape), out, state_shape(out)
        return self._bodies[index, in_shape]

    def of(self, instance: Instance) -> Cost:
        """Return the cost of an instance.

        Raises:
            InstanceError: if the instance names a point that the network lacks.
        """
        instance.check(self.model.points)
        shape, costs = self.image_shape, []
        for index, (segment, params) in enumerate(zip(self.segments, self.params, strict=True)):
            macs, _ = self.body(index, shape)
            ratio = 1.0 if segment.point is None else instance.ratio(segment.point)
            out_shape = self.shrunk(index, shape, ratio)
            recorded = (self.model.recorded(shape), self.model.recorded(out_shape))
            costs.append(SegmentCost(segment.name, *recorded, macs, params))
            shape = out_shape
        return Cost(sum(cost.macs for cost in costs), sum(self.params), tuple(costs))

    def together(self, instances: Iterable[Instance]) -> int:
        """Return the MACs of running several instances on one image, with each shared prefix counted once.

        Raises:
            InstanceError: if an instance names a point that the network lacks.
        """
        bodies: dict[tuple[int, tuple[float, ...]], int] = {}
        for instance in instances:
            ratios: tuple[float, ...] = ()
            for index, (segment, cost) in enumerate(zip(self.segments, self.of(instance).segments, strict=True)):
                bodies[index, ratios] = cost.macs
                if segment.point is not None:
                    ratios += (instance.ratio(segment.point),)
        return sum(bodies.values())


def profile(model: Chain, instances: Iterable[Instance], image_size: Sequence[int]) -> dict[Instance, Cost]:
    """Count the cost of every instance.

    Args:
        model: a chain on any device; its weights are not used.
        instances: the instances to count.
        image_size: shape of one image, (C, H, W).

    Raises:
        InstanceError: if an instance names a point that the network lacks.
    """
    costs = Costs(model, image_size)
    return {instance: costs.of(instance) for instance in instances}
