"""How much memory each step of a segment needs and the shape of its result: measured on the meta device."""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdpctl.models.chain import WHOLE, Chain, Part
from sdpctl.models.state import Shape, State, blank, state_shape, tensors

MANY = 2**20
"""Number of images to measure with: large enough that temporaries the size of the weights are negligible."""


class Footprint(NamedTuple):
    """The memory of one step on one image, and the shape of its output.

    Args:
        held: peak number of elements allocated, including the output, excluding the input.
        shape: shape of the output.
    """

    held: int
    shape: Shape


class Footprints:
    """The footprints of a chain's steps, each measured once for each input shape.

    Args:
        model: the chain.
        dtype: dtype of the maps.
    """

    def __init__(self, model: Chain, dtype: torch.dtype) -> None:
        self.model = meta = model.on_meta().to(dtype)
        self.dtype, self.segments, self.weights = dtype, meta.segments(), tuple(meta.parameters())
        self.known: dict[tuple[int, float | None, Shape], Footprint] = {}

    def body(self, level: int, shape: Shape) -> Footprint:
        """Return the footprint of a segment's body, given the shape of its input."""
        return self._measured(level, None, shape, lambda state: self.segments[level].body(state, _leave))

    def shrink(self, level: int, ratio: float, shape: Shape) -> Footprint:
        """Return the footprint of a segment's shrink, given the shape of the body's result."""
        shrink = self.segments[level].shrink
        return self._measured(level, ratio, shape, lambda state: state if shrink is None else shrink(state, ratio))

    def _measured(self, level: int, ratio: float | None, shape: Shape, step: Callable[[State], State]) -> Footprint:
        if (level, ratio, shape) not in self.known:
            state = blank(shape, images=MANY, dtype=self.dtype)
            passing = self.model.passing(self.segments[level], shape)
            with passing, torch.inference_mode(), _Made((*self.weights, *tensors(state))) as made:
                out = step(state)
            held = made.most // (MANY * self.dtype.itemsize)
            self.known[level, ratio, shape] = Footprint(held, state_shape(out))
        return self.known[level, ratio, shape]


def _leave(
    _: nn.BatchNorm2d,
    x_NCHW: Tensor,
    part: Part = WHOLE,  # noqa: ARG001
    *,
    own: bool = False,
    plus: Tensor | None = None,  # noqa: ARG001
    relu: bool = False,  # noqa: ARG001
) -> Tensor:
    return x_NCHW if own else torch.empty_like(x_NCHW)


class _Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that were allocated and not yet freed.

    Args:
        given: tensors that exist already; neither they nor views of them count.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self.known = {tensor.untyped_storage()._cdata: 0 for tensor in given}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise torch imports its compiler here, which takes half a second and 100 MiB

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage._cdata)
        return out

    def _freed(self, key: int) -> None:
        self.now -= self.known.pop(key)


_OF_MODELS: WeakKeyDictionary[Chain, dict[torch.dtype, Footprints]] = WeakKeyDictionary()


def footprints(model: Chain, dtype: torch.dtype) -> Footprints:
    """Return the footprints of a chain, which are kept as long as the chain exists."""
    of_model = _OF_MODELS.setdefault(model, {})
    if dtype not in of_model:
        of_model[dtype] = Footprints(model, dtype)
    return of_model[dtype]
