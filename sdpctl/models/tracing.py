"""Trace a network that a library defines, and cut its graph into the segments of a chain.

The graph of the network (`graph.py`) is cut at the ends of the network's blocks, which are found in the tree of its modules.
Each piece of the graph becomes a function of a state, in which every batch norm goes through the chain's `norm`.

The graph depends on neither the weights nor the number of classes, so a network is traced once, on the meta device.

Names of tensors: N images, C channels, H and W height and width.
"""

import operator
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from sdpctl.errors import ModelError
from sdpctl.models.chain import average_shrink, batch_norm
from sdpctl.models.graph import ACTIVATIONS, IMAGES, Body, Call, Graph

FEWEST = 3
"""Minimum number of points of a network; a network with fewer is refused."""

SHRINKS = (0.5, 0.75)
"""Ratios by which each point is tried when a network is traced."""

_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Containers without code of their own."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A segment of a traced network.

    Args:
        name: name of the segment: `stem`, the name of a block's module, or `head`.
        point: the point at its end; None if the map there cannot shrink.
        least: least height and width of the map at the point that the rest of the network can take, in pixels.
        evaluation: its function if the network evaluates.
        training: its function if the network trains.
        layers: names of the modules that it calls.
        weights: names of the parameters and buffers that it reads besides those of the modules.
    """

    name: str
    point: str | None
    least: int
    evaluation: Body
    training: Body
    layers: tuple[str, ...]
    weights: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A network as pieces of its graph.

    Args:
        pieces: the segments, first to last.
        classifier: name of the layer whose rows are the classes.
        input_conv: name of the convolution that takes the images.
        overwriting: names of the activations that may overwrite their input.
    """

    pieces: tuple[Piece, ...]
    classifier: str
    input_conv: str
    overwriting: tuple[str, ...]


@dataclass(frozen=True)
class _End:
    """The end of a segment.

    Args:
        name: name of the module that ends there.
        node: the last operation.
        first: number of operations that were recorded before the module was called.
    """

    name: str
    node: fx.Node
    first: int


def _blocks(graph: Graph) -> list[_End]:
    """Return the ends of the blocks of a network, in order.

    Blocks are the smallest classes of modules, containers aside, of which every instance ends at a cut and some instance
    branches inside; members of lists are preferred. The modules with a convolution beside them, in the same lists or in lists
    whose names differ by numbers alone, are blocks too; the modules inside these are not. If no class branches, the blocks are
    the smallest classes of at least `FEWEST` instances with a convolution, or the activations.
    """
    network, cuts = graph.network, set(graph.cuts)
    called = [call for call in graph.calls if call.path]
    times = Counter(call.path for call in called)
    modules = {call: network.get_submodule(call.path) for call in called}
    by_class: dict[type, list[Call]] = {}
    for call, module in modules.items():
        by_class.setdefault(type(module), []).append(call)

    def is_list(path: str) -> bool:
        module = network.get_submodule(path)
        return type(module) in _LISTS or type(module).forward is nn.Sequential.forward

    def ends(call: Call) -> bool:
        return call.node in cuts and graph.is_map(call.node) and times[call.path] == 1

    def branches(call: Call) -> bool:
        inside = [n for n in graph.nodes if call.first <= graph.order[n] < graph.order[call.node] and n not in graph.constants]
        opaque = isinstance(modules[call], graph.leaves) and any(True for _ in modules[call].parameters()) and not inside
        return opaque or any(node not in cuts for node in inside)

    def is_gate(call: Call) -> bool:
        """Return whether a module weighs its own input, as squeeze-and-excitation does."""
        product = call.node.op == "call_function" and call.node.target in (operator.mul, operator.imul, torch.mul)
        return product and any(graph.order[source] < call.first for source in call.node.all_input_nodes)

    def convolves(call: Call) -> bool:
        return any(isinstance(module, nn.Conv2d) for module in modules[call].modules())

    def smallest(classes: Iterable[list[Call]]) -> list[Call]:
        classes = list(classes)
        paths = [call.path for calls in classes for call in calls]
        chosen = [calls for calls in classes if not any(path.startswith(f"{c.path}.") for c in calls for path in paths)]
        return [call for calls in chosen for call in calls]

    whole = [
        calls
        for kind, calls in by_class.items()
        if kind not in _LISTS and not kind.__module__.startswith("torch.nn") and all(map(ends, calls))
    ]
    branching = [calls for calls in whole if any(map(branches, calls)) and not any(map(is_gate, calls))]
    members = [calls for calls in branching if all(is_list(call.path.rpartition(".")[0]) for call in calls)]
    blocks = smallest(members) if sum(map(len, members)) >= FEWEST else smallest(branching)
    if blocks:
        lists = {path for call in blocks if is_list(path := call.path.rpartition(".")[0])}
        alike = {re.sub(r"\d+", "0", path) for path in lists}
        for call in called:
            parent = call.path.rpartition(".")[0]
            beside = is_list(parent) and re.sub(r"\d+", "0", parent) in alike
            kind = type(modules[call])
            if beside and ends(call) and convolves(call) and kind not in _LISTS and not kind.__module__.startswith("torch.nn"):
                blocks.append(call)
        blocks = [call for call in blocks if not any(call.path.startswith(f"{other.path}.") for other in blocks)]
    else:
        blocks = smallest(calls for calls in whole if len(calls) >= FEWEST and all(map(convolves, calls)))
        blocks = blocks or [call for call in called if isinstance(modules[call], ACTIVATIONS) and ends(call)]
    of_node = {call.node: call for call in sorted(blocks, key=lambda call: -call.path.count("."))}
    return sorted((_End(c.path, c.node, c.first) for c in of_node.values()), key=lambda end: graph.order[end.node])


def _stem(graph: Graph, blocks: Sequence[_End]) -> list[_End]:
    """Return the end of the stem, which is everything before the first block, in a list; an empty list if it is not a map."""
    before = [node for node in graph.cuts if graph.order[node] < blocks[0].first and graph.is_map(node)]
    for node in reversed(before):
        if paths := [call.path for call in graph.calls if call.node is node and call.path]:
            return [_End(min(paths, key=lambda path: path.count(".")), node, 0)]
    return []


def _same_ends(graph: Graph, ends: Iterable[_End]) -> list[_End]:
    """Return ends in the graph of the other mode.

    Raises:
        ModelError: if one of them is not a cut there.
    """
    nodes = {call.path: call.node for call in graph.calls}
    cuts = set(graph.cuts)
    for end in ends:
        if nodes.get(end.name) not in cuts:
            raise ModelError(f"in training, the map after {end.name} is not the whole state")
    return [_End(end.name, nodes[end.name], end.first) for end in ends]


def _overwrites_input(body: Body, network: nn.Module, shape: Sequence[int]) -> bool:
    state = torch.empty(tuple(shape), device="meta")
    with torch.no_grad():
        body(network, state, batch_norm)
    return state._version > 0


def _bodies(graph: Graph, ends: Sequence[_End]) -> list[Body]:
    """Return the function of each segment."""
    bodies, start = [], graph.image
    for node in [*(end.node for end in ends), graph.nodes[-1]]:
        body = graph.emit(start, node, keep_input=False)
        if _overwrites_input(body, graph.network, start.meta["shape"]):
            body = graph.emit(start, node, keep_input=True)
        bodies.append(body)
        start = node
    return bodies


class Rest:
    """Passes shapes through the segments of a network, and remembers the results.

    Args:
        bodies: the function of each segment, in evaluation.
        network: the network, on the meta device.
    """

    def __init__(self, bodies: Sequence[Body], network: nn.Module) -> None:
        self.bodies, self.network = bodies, network
        self._known: dict[tuple[int, tuple[int, ...]], tuple[int, ...] | ModelError] = {}

    def passed(self, number: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a segment's result, given the shape of its input.

        Raises:
            ModelError: if the segment cannot take the input.
        """
        key = number, shape
        if key not in self._known:
            try:
                with torch.no_grad():
                    out = self.bodies[number](self.network, torch.empty(shape, device="meta"), batch_norm)
                self._known[key] = tuple(out.shape)
            except Exception as error:  # an operation may raise anything for a size that the library does not expect
                self._known[key] = failure = ModelError(" ".join(str(error).split()) or type(error).__name__)
                raise failure from error
        found = self._known[key]
        if isinstance(found, ModelError):
            raise found
        return found

    def result(self, first: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the network's result, given the shape of the input of one of its segments.

        Raises:
            ModelError: if a segment cannot take its input.
        """
        for number in range(first, len(self.bodies)):
            shape = self.passed(number, shape)
        return shape

    def maps(self, in_size: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the shape of each segment's result, given the size of an image, (C, H, W).

        Raises:
            ModelError: if the network cannot take images of this size.
        """
        shapes: list[tuple[int, ...]] = [(IMAGES, *in_size)]
        for number in range(len(self.bodies)):
            shapes.append(self.passed(number, shapes[-1]))
        return shapes[1:]

    def unable(self, in_size: Sequence[int]) -> dict[int, str]:
        """Return the segments after which a smaller map cannot pass the rest of the network, each with the reason.

        Raises:
            ModelError: if the network cannot take images of this size.
        """
        *maps, result = self.maps(in_size)
        reasons: dict[int, str] = {}
        for end, whole in enumerate(maps):
            try:
                for ratio in SHRINKS:
                    out = self.result(end + 1, tuple(average_shrink(torch.empty(whole, device="meta"), ratio).shape))
                    if out != result:
                        raise ModelError(f"the result has the shape {out}, not {result}")
            except ModelError as error:
                reasons[end] = str(error)
        return reasons

    def least(self, end: int, shape: tuple[int, ...], result: tuple[int, ...]) -> int:
        """Return the least height and width of a map with which the rest of the network gives its result.

        Args:
            end: the segment that returns the map.
            shape: shape of the map with which the rest certainly works.
            result: shape of the result.
        """
        images, channels, *sides = shape
        for side in range(1, min(sides)):
            with suppress(ModelError):
                if self.result(end + 1, (images, channels, side, side)) == result:
                    return side
        return min(sides)


def _first_sentence(text: str) -> str:
    return re.split(r"[.!;:] ", text)[0].rstrip(".")


def trace(
    network: nn.Module,
    leaves: Collection[type[nn.Module]],
    functions: Collection[Callable[..., Any]],
    in_size: Sequence[int],
) -> Traced:
    """Cut a network into segments, and try each point on shapes.

    Args:
        network: the network, on the meta device.
        leaves: types of modules that are recorded as one operation, besides torch's own.
        functions: functions that are recorded as one operation.
        in_size: size of an image, (C, H, W).

    Raises:
        ModelError: if the network cannot be traced, or has fewer than `FEWEST` points; the message says what was found.
    """
    graph = Graph(network.eval(), leaves, functions, in_size)
    blocks = _blocks(graph)
    activations = bool(blocks) and all(isinstance(network.get_submodule(end.name), ACTIVATIONS) for end in blocks)
    ends = [*([] if activations or not blocks else _stem(graph, blocks)), *blocks]
    if len(ends) < FEWEST:
        found = f"only {len(ends)} of its blocks end" if ends else "none of its blocks ends"
        raise ModelError(f"{found} with one map (C x H x W) that is the whole state; at least {FEWEST} must")
    overwriting = graph.overwriting_activations()
    for name in overwriting:
        network.get_submodule(name).inplace = True  # type: ignore[assignment]
    evaluation = _bodies(graph, ends)
    rest = Rest(evaluation, network)
    misfits = rest.unable(in_size)
    if len(ends) - len(misfits) < FEWEST:
        end, reason = next(iter(misfits.items()))
        raise ModelError(
            f"the sizes of its maps are built in: after {ends[end].name} and {len(misfits) - 1} of {len(ends) - 1} other "
            f"blocks, the rest cannot take a smaller map ({_first_sentence(reason)})"
        )
    learning = Graph(network.train(), leaves, functions, in_size)
    training = _bodies(learning, _same_ends(learning, ends))
    network.eval()
    names = ["stem" if end.first == 0 else end.name for end in ends] + ["head"]
    starts = [graph.image, *(end.node for end in ends)]
    stops = [*(end.node for end in ends), graph.nodes[-1]]
    *maps, result = rest.maps(in_size)
    pieces = []
    for number, name in enumerate(names):
        layers, weights = graph.uses(starts[number], stops[number])
        is_point = number < len(ends) and number not in misfits
        pieces.append(
            Piece(
                name=name,
                point=ends[number].name if is_point else None,
                least=rest.least(number, maps[number], result) if is_point else 1,
                evaluation=evaluation[number],
                training=training[number],
                layers=layers,
                weights=weights,
            )
        )
    return Traced(
        pieces=tuple(pieces),
        classifier=graph.classifier(),
        input_conv=graph.input_conv(),
        overwriting=overwriting,
    )
