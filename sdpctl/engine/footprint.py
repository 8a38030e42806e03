"""What a segment's steps hold in memory, and what they hand on: measured on the meta device."""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdpctl.models.chain import WHOLE, Chain, Part, Shape, State, blank, numel, shape_of, tensors

MANY = 2**20
"""Images to measure with: what a step makes of its weights is nothing beside their maps."""


class Footprint(NamedTuple):
    """What a step makes of one image's state, in elements.

    Args:
        held: of all that is made, the most that is there at once: what is handed on is, what came in is not.
        size: of what is handed on.
        shape: of what is handed on.
    """

    held: int
    size: int
    shape: Shape


class Footprints:
    """The footprints of a chain's steps, each measured once for a shape that comes in.

    Args:
        model: the chain.
        dtype: of its maps.
    """

    def __init__(self, model: Chain, dtype: torch.dtype) -> None:
        meta = model.on_meta().to(dtype)
        self.dtype, self.segments, self.weights = dtype, meta.segments(), tuple(meta.parameters())
        self.known: dict[tuple[int, float | None, Shape], Footprint] = {}

    def body(self, level: int, shape: Shape) -> Footprint:
        """Return that of a segment's body, given the shape of the state that comes in."""
        return self._measured(level, None, shape, lambda state: self.segments[level].body(state, _leave))

    def shrink(self, level: int, ratio: float, shape: Shape) -> Footprint:
        """Return that of a segment's shrink, of which the shape is the one that its body hands on."""
        shrink = self.segments[level].shrink
        return self._measured(level, ratio, shape, lambda state: state if shrink is None else shrink(state, ratio))

    def _measured(self, level: int, ratio: float | None, shape: Shape, step: Callable[[State], State]) -> Footprint:
        if (level, ratio, shape) not in self.known:
            state = blank(shape, images=MANY, dtype=self.dtype)
            with torch.inference_mode(), _Made((*self.weights, *tensors(state))) as made:
                out = step(state)
            held = made.most // (MANY * self.dtype.itemsize)
            self.known[level, ratio, shape] = Footprint(held, numel(out) // MANY, shape_of(out))
        return self.known[level, ratio, shape]


def _leave(_: nn.BatchNorm2d, x_NCHW: Tensor, part: Part = WHOLE, *, own: bool = False) -> Tensor:  # noqa: ARG001
    return x_NCHW if own else torch.empty_like(x_NCHW)


class _Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that are made and not yet freed.

    Args:
        given: tensors that were there before, of which views do not count.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self.known = {tensor.untyped_storage()._cdata: 0 for tensor in given}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler here, for half a second and 100 MiB, to keep it off this class

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
    """Return the footprints of a chain, which are kept as long as it is there."""
    of_model = _OF_MODELS.setdefault(model, {})
    if dtype not in of_model:
        of_model[dtype] = Footprints(model, dtype)
    return of_model[dtype]
