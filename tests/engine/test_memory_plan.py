"""The plan by itself: against a walk on paper that counts what is allocated and freed, and against closed forms."""

import itertools
import random
from typing import NamedTuple

import pytest

from sdpctl.engine import memory_plan
from sdpctl.engine.footprint import Footprint
from sdpctl.engine.memory_plan import MemoryPlan, Room, batches, images_in_part, peak_in_turn
from sdpctl.instance import FULL, Instance
from sdpctl.models.state import Shape, map_shape

POINTS = ("a", "b", "c")
IMAGE = map_shape((64,))


class Steps:
    """Footprints of a chain that exists only on paper: a state has so many elements, and a ratio keeps its share of them.

    Args:
        bodies: for each segment the elements of its result for each element of its input, and what is allocated beside it.
    """

    def __init__(self, *bodies):
        self.bodies = bodies

    def body(self, level, shape):
        factor, beside = self.bodies[level]
        out = int(shape.elements * factor)
        return Footprint(out + int(shape.elements * beside), map_shape((out,)))

    def shrink(self, level, ratio, shape):
        kept = max(1, round(shape.elements * ratio))
        return Footprint(0 if ratio == 1 else kept, map_shape((kept,)))  # at ratio 1 in place


class Branches(NamedTuple):
    nodes: tuple[Instance, ...]
    shape: Shape
    elements: int


def levels_of(instances, points=POINTS):
    """Return the prefix tree: a segment for each point, and a head."""
    levels = []
    for number in range(len(points) + 1):
        level = {}
        for instance in instances:
            ratio = instance.ratio(points[number]) if number < len(points) else 1.0
            level.setdefault(instance.among(points[:number]), {})[ratio] = instance.among(points[: number + 1])
        levels.append(level)
    return levels


class Walk:
    """Walks a tree on paper as the plan says, and counts the elements that are allocated."""

    def __init__(self, plan, room):
        self.plan, self.room = plan, room
        self.now = self.peak = 0
        self.finished, self.joined = [], 0
        self.allocate(IMAGE.elements * room.images)
        self.walk()

    def allocate(self, elements):
        self.now += elements
        self.peak = max(self.peak, self.now)

    def during(self, elements):
        self.allocate(elements)
        self.now -= elements

    def take_apart(self, group):
        self.during(group.elements)  # every branch is copied before the group is freed
        one = group.elements // len(group.nodes)
        return [Branches((node,), group.shape, one) for node in group.nodes]

    def walk(self):
        stack = [(0, [Branches((Instance(),), IMAGE, IMAGE.elements * self.room.images)])]
        while stack:
            level, groups = stack.pop()
            if level == len(self.plan.levels):
                self.now -= sum(group.elements for group in groups)
                self.finished += [node for group in groups for node in group.nodes]
                continue
            waiting = sum(group.elements for _, others in stack for group in others)
            later = self.plan.hold_back(level, groups, waiting, self.room, self.take_apart)
            assert groups
            if later:
                stack.append((level, later))
            passed = [group for batch in batches(groups, self.room.joined) for group in self.passed(level, batch)]
            stack.append((level + 1, sorted(passed, key=lambda g: (g.elements // len(g.nodes), g.shape.maps), reverse=True)))

    def passed(self, level, batch):
        came = sum(group.elements for group in batch)
        if len(batch) > 1:
            self.joined = max(self.joined, came)
            self.during(came)
        nodes = [node for group in batch for node in group.nodes]
        images = self.room.images
        body = self.plan.steps.body(level, batch[0].shape)
        out = body.shape.elements * images * len(nodes)
        self.during(body.held * images * len(nodes))
        self.now += out - came
        made, overwritten = [], False
        children = [self.plan.levels[level][node] for node in nodes]
        for ratio in sorted({ratio for ratios in children for ratio in ratios}):
            shrunk = self.plan.steps.shrink(level, ratio, body.shape)
            one = shrunk.shape.elements * images
            taken = [ratios[ratio] for ratios in children if ratio in ratios]
            if len(taken) == len(nodes):
                overwritten = shrunk.held == 0
                self.allocate(0 if overwritten else one * len(nodes))
                made.append(Branches(tuple(taken), shrunk.shape, one * len(nodes)))
            else:
                for node in taken:
                    self.allocate(one)
                    made.append(Branches((node,), shrunk.shape, one))
        self.now -= 0 if overwritten else out
        return made


def drawn(seed):
    draw = random.Random(seed)
    ratios = (1.0, 0.75, 0.5)
    instances = {
        Instance(tuple((point, ratio) for point in POINTS if (ratio := draw.choice(ratios)) < 1))
        for _ in range(draw.randint(1, 12))
    }
    steps = Steps(*((draw.choice((0.5, 1, 2)), draw.choice((0, 0.5, 3))) for _ in range(len(POINTS) + 1)))
    return sorted(instances, key=str), MemoryPlan(levels_of(sorted(instances, key=str)), steps, IMAGE)


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("factor", [1, 1.1, 1.5, 3, 100])
def test_a_walk_on_paper_allocates_no_more_than_its_memory(seed, factor, monkeypatch):
    monkeypatch.setattr(memory_plan, "JOINED_BYTES", 4 * 3 * 100)
    instances, plan = drawn(seed)
    images, itemsize = 3, 4
    memory = int(plan.needs(images) * itemsize * factor)
    room = plan.room(images, itemsize, memory=memory, alone=0)
    walk = Walk(plan, room)
    assert walk.peak * itemsize <= memory
    assert walk.now == 0
    assert sorted(walk.finished, key=str) == sorted(instances, key=str)
    assert walk.joined <= room.joined <= 300


@pytest.mark.parametrize("seed", range(60))
def test_the_least_is_what_one_branch_at_a_time_allocates(seed):
    """The room allows nothing, so that every branch that can wait waits."""
    _, plan = drawn(seed)
    walk = Walk(plan, Room(3, 0, 0))
    assert walk.peak == plan.needs(3)


def test_groups_pass_together_where_they_fit_and_the_larger_ones_wait_where_they_do_not():
    instances = [FULL, *(Instance.parse(f"{point}@0.5") for point in POINTS)]
    plan = MemoryPlan(levels_of(instances), Steps((1, 1), (1, 1), (2, 0), (1, 0)), IMAGE)
    groups = [Branches((FULL,), map_shape((64,)), 64), Branches((Instance.parse("a@0.5"),), map_shape((32,)), 32)]
    peak = plan.peak(1, groups, 0, Room(1, 0, 0))
    for limit, held_back in ((peak, 0), (peak - 1, 1)):
        passing = list(groups)
        assert plan.hold_back(1, passing, 0, Room(1, limit, 0), list) == groups[:held_back]
        assert passing == groups[held_back:]


def test_what_waits_elsewhere_counts():
    plan = MemoryPlan(levels_of([FULL, Instance.parse("a@0.5")]), Steps((1, 1), (1, 1), (1, 1), (1, 1)), IMAGE)
    groups = [Branches((FULL,), map_shape((64,)), 64), Branches((Instance.parse("a@0.5"),), map_shape((32,)), 32)]
    peak = plan.peak(1, groups, 0, Room(1, 0, 0))
    for waiting, held_back in ((0, 0), (1, 1)):
        assert len(plan.hold_back(1, list(groups), waiting, Room(1, peak, 0), list)) == held_back


def test_a_group_that_does_not_fit_is_taken_apart():
    instances = [Instance.parse(text) for text in ("full", "a@0.5", "b@0.5", "a@0.5+b@0.5")]
    plan = MemoryPlan(levels_of(instances), Steps((1, 0), (1, 0), (1, 3), (1, 0)), IMAGE)
    nodes = (FULL, Instance.parse("a@0.5"))
    group = Branches(nodes, map_shape((64,)), 128)
    parts = [Branches((node,), group.shape, 64) for node in nodes]
    groups, taken = [group], []
    later = plan.hold_back(1, groups, 0, Room(1, 0, 0), lambda whole: taken.append(whole) or parts)
    assert (later, groups, taken) == (parts[:1], parts[1:], [group])


def test_one_instance_needs_the_largest_of_its_steps():
    """Each body holds its input, its result and what is beside it; nothing is held between the steps but the state."""
    instance = Instance.parse("a@0.5+c@0.25")
    plan = MemoryPlan(levels_of([instance]), Steps((2, 1), (1, 3), (4, 0), (0.5, 5)), IMAGE)
    first = 64 + 128 + 64, 128 + 64  # body, then the shrink to 64
    second = 64 + 64 + 3 * 64, 64  # in place
    third = 64 + 256, 256 + 64
    head = 64 + 32 + 5 * 64, 32
    assert plan.needs(1) == max(*first, *second, *third, *head) == 416
    assert plan.needs(7) == 7 * 416


@pytest.mark.parametrize("seed", range(30))
def test_the_smallest_first_is_the_best_order_where_needs_grow_with_the_size(seed):
    draw = random.Random(seed)
    factor = draw.uniform(1, 3)
    branches = [(size, int(size * factor)) for size in (draw.randint(1, 50) for _ in range(draw.randint(1, 5)))]

    def peak(order):
        waiting = [size for size, _ in order]
        return max([sum(waiting), *(sum(waiting[i + 1 :]) + needed for i, (_, needed) in enumerate(order))])

    assert peak_in_turn(branches) == min(map(peak, itertools.permutations(branches)))


def test_no_branch_needs_nothing():
    assert peak_in_turn([]) == 0


def test_batches_are_neighbours_of_one_shape_from_the_end():
    one, two = map_shape((1,)), map_shape((2,))
    groups = [
        Branches((FULL,) * count, shape, count * shape.elements) for count, shape in ((1, two), (2, one), (1, one), (1, one))
    ]
    whole = list(groups)
    assert [len(batch) for batch in batches(whole, 4)] == [3, 1]
    assert whole == []
    assert list(batches(list(groups), 3)) == [[groups[3], groups[2]], [groups[1]], [groups[0]]]
    assert [len(batch) for batch in batches(list(groups), 0)] == [1, 1, 1, 1]


def test_the_room_of_a_limited_walk_leaves_memory_for_a_copy(monkeypatch):
    monkeypatch.setattr(memory_plan, "JOINED_BYTES", 400)
    plan = MemoryPlan(levels_of([FULL]), Steps((1, 0), (1, 0), (1, 0), (1, 0)), IMAGE)
    needs = 4 * plan.needs(3)
    assert needs == 4 * 3 * 128
    assert plan.room(3, 4, memory=needs, alone=0) == (3, needs // 4, 0)
    assert plan.room(3, 4, memory=needs + 80, alone=0) == (3, needs // 4, 20)
    assert plan.room(3, 4, memory=needs + 4000, alone=0) == (3, needs // 4 + 900, 100)


def test_the_room_without_a_limit_is_a_multiple_of_what_full_needs(monkeypatch):
    monkeypatch.setattr(memory_plan, "JOINED_BYTES", 400)
    plan = MemoryPlan(levels_of([FULL]), Steps((1, 0), (1, 0), (1, 0), (1, 0)), IMAGE)
    assert plan.room(3, 4, memory=None, alone=1000) == (3, 2200, 100)
    assert plan.room(3, 4, memory=None, alone=400) == (3, 880, 50)  # an eighth of it is joined
    assert plan.room(3, 4, memory=None, alone=10) == (3, plan.needs(3), 1)
    monkeypatch.setattr(memory_plan, "JOINED_CACHES", 2)
    assert plan.room(3, 4, memory=None, alone=1000, cache=40) == (3, 2220, 20)  # of a GPU: beside what `full` may need
    assert plan.room(3, 4, memory=4 * plan.needs(3) + 4000, alone=0, cache=40) == (3, plan.needs(3) + 980, 20)


@pytest.mark.parametrize(
    ("needs", "memory", "images"), [(10, 100, 10), (10, 99, 9), (10, 5, 1), (2**20, None, 2**10), (2**20, 2**40, 2**10)]
)
def test_images_in_a_part(needs, memory, images):
    assert images_in_part(needs, memory) == images
