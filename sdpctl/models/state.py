"""States: the values that the segments of a chain pass on to each other.

A state is any pytree of tensors (`torch.utils._pytree`): one map, or several in a tuple, a dict or a type that registers itself
as a node. The first dimension of every tensor counts the images. Data that is not a tensor is the static part of the registered
type; it is compared with `==`. If one map has to represent the whole state, the first map is used.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_structure, tree_unflatten

State = Any
"""A pytree of tensors."""


class Shape(NamedTuple):
    """The shape of one image's state, hashable.

    Args:
        maps: the size of each tensor without the images: (C, H, W) of a map.
        spec: the structure of the pytree, including its static data.
    """

    maps: tuple[tuple[int, ...], ...]
    spec: TreeSpec

    @property
    def elements(self) -> int:
        """The number of elements of one image's state."""
        return sum(math.prod(size) for size in self.maps)


def map_shape(size: Sequence[int]) -> Shape:
    """Return the shape of a state that is one tensor, given its size without the images."""
    return Shape((tuple(size),), tree_structure(None))  # None is a leaf


def state_shape(state: State) -> Shape:
    """Return the shape of one image's state."""
    leaves, spec = tree_flatten(state)
    return Shape(tuple([tuple(leaf.shape[1:]) for leaf in leaves]), spec)


def blank(shape: Shape, *, images: int = 1, dtype: torch.dtype | None = None) -> State:
    """Return a state of some images on the meta device, given the shape of one image's state."""
    return tree_unflatten([torch.empty((images, *size), dtype=dtype, device="meta") for size in shape.maps], shape.spec)


def join(states: Sequence[State]) -> State:
    """Concatenate states of one shape along the images."""
    if len(states) == 1:
        return states[0]
    _, spec = tree_flatten(states[0])
    return tree_unflatten([torch.cat(leaves) for leaves in zip(*map(tree_leaves, states), strict=True)], spec)


def split(state: State, branches: int) -> list[State]:
    """Split a state into equal parts along the images; the inverse of `join`."""
    leaves, spec = tree_flatten(state)
    return [tree_unflatten(part, spec) for part in zip(*(leaf.chunk(branches) for leaf in leaves), strict=True)]


def copied(state: State) -> State:
    """Return a copy that shares no memory with the state."""
    return tree_map(torch.clone, state)


def tensors(state: State) -> list[Tensor]:
    """Return the tensors of a state."""
    return tree_leaves(state)


def numel(state: State) -> int:
    """Return the number of elements of a state."""
    return sum(tensor.numel() for tensor in tensors(state))
