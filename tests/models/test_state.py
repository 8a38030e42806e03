"""States of any kind: joined, split, copied and described, with the static data that their type has."""

import pytest
import torch
from torch.utils._pytree import tree_map

from sdpctl.models.state import blank, copied, join, map_shape, numel, split, state_shape, tensors
from sdpctl.models.twopipe import Orders, Pipes

ORDERS = Orders((torch.tensor([1, 0]),))


def maps(images):
    return torch.randn(images, 2, 4, 6), torch.randn(images, 3, 2, 3)


KINDS = {
    "map": lambda images: maps(images)[0],
    "tuple": maps,
    "dict": lambda images: dict(zip(("fine", "coarse"), maps(images), strict=True)),
    "nested": lambda images: [maps(images)[0], {"more": maps(images)}],
    "pipes": lambda images: Pipes(*maps(images), 5),
    "full pipe": lambda images: Pipes(maps(images)[0], None, 5),
    "drawn pipes": lambda images: Pipes(*maps(images), 5, ORDERS),
}

EVERY = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def assert_equal(one, two):
    assert state_shape(one) == state_shape(two)
    assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(two), strict=True))


@EVERY
def test_split_is_the_inverse_of_join(kind):
    states = [kind(3) for _ in range(4)]
    joined = join(states)
    assert type(joined) is type(states[0])
    assert {len(tensor) for tensor in tensors(joined)} == {12}
    for one, two in zip(split(joined, 4), states, strict=True):
        assert_equal(one, two)
    assert join(states[:1]) is states[0]


@EVERY
def test_a_copy_shares_no_memory(kind):
    state = kind(2)
    copy = copied(state)
    assert_equal(copy, state)
    assert not {t.data_ptr() for t in tensors(copy)} & {t.data_ptr() for t in tensors(state)}


@EVERY
def test_a_blank_state_has_the_shape_it_was_made_from(kind):
    state = kind(2)
    shape = state_shape(state)
    empty = blank(shape, images=7, dtype=torch.bfloat16)
    assert state_shape(empty) == shape
    assert {(len(t), t.dtype, t.device.type) for t in tensors(empty)} == {(7, torch.bfloat16, "meta")}
    assert numel(state) == 2 * shape.elements
    assert numel(empty) == 7 * shape.elements


@EVERY
def test_a_shape_does_not_depend_on_the_number_of_images(kind):
    assert {state_shape(kind(1)): "known"}[state_shape(kind(5))] == "known"


def test_shapes_of_different_states_differ():
    shapes = [state_shape(kind(2)) for kind in KINDS.values()]
    assert len(set(shapes)) == len(shapes)


def test_the_shape_of_an_image():
    assert map_shape([3, 8, 6]) == state_shape(torch.empty(2, 3, 8, 6))
    assert map_shape((3, 8, 6)).maps == ((3, 8, 6),)
    assert map_shape((3, 8, 6)).elements == 144


def test_static_data_belongs_to_the_shape():
    full, half = maps(2)
    known = state_shape(Pipes(full, half, 5, ORDERS))
    assert known == state_shape(Pipes(half.new_empty(1, 2, 4, 6), half, 5, ORDERS))
    for other in (Pipes(full, half, 6, ORDERS), Pipes(full, half, 5), Pipes(full, half, 5, Orders(ORDERS.of))):
        assert state_shape(other) != known


def test_a_tree_map_keeps_static_data():
    doubled = tree_map(lambda tensor: 2 * tensor, KINDS["drawn pipes"](2))
    assert (doubled.outputs, doubled.orders) == (5, ORDERS)
