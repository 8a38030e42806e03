"""The graph of a network that a library defines, and its parts as functions.

torch.fx records a forward pass as a graph of operations. A *cut* is an operation after which no earlier result is needed:
there, one tensor is the whole state.
"""

import copy
import inspect
import operator
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from sdpctl.errors import ModelError
from sdpctl.models.chain import Norm, batch_norm
from sdpctl.models.convolution import convolve

IMAGES = 2
"""Number of images by which shapes are found."""

Body = Callable[[nn.Module, Tensor, Norm], Tensor]
"""A part of a graph: maps (the library's network, state, norm) to a state."""

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.ELU, nn.Mish)
"""Activations that can overwrite their input."""

_LAYERS = (nn.BatchNorm2d, nn.Conv2d, nn.Linear)
"""Layers that are recorded as one operation, with their subclasses."""

_DROPS = ("DropPath", "Dropout", "Dropout2d", "StochasticDepth")
"""Modules that return their input if their rate is 0."""

_IN_PLACE = (operator.iadd, operator.imul, operator.isub, operator.itruediv)


@dataclass(frozen=True)
class Call:
    """One call of a module while the network was traced.

    Args:
        path: name of the module.
        first: number of operations that were recorded before the call.
        node: the operation whose result the module returned.
    """

    path: str
    first: int
    node: fx.Node


class _Tracer(fx.Tracer):
    """Records the operations of a network, and the module that returned each result.

    Args:
        leaves: types of modules that are recorded as one operation, besides torch's own.
        functions: functions that are recorded as one operation.
    """

    def __init__(self, leaves: Collection[type[nn.Module]], functions: Collection[Callable[..., Any]]) -> None:
        super().__init__(autowrap_functions=tuple(functions))
        self.leaves = tuple(leaves)
        self.calls: list[Call] = []
        self.order: dict[fx.Node, int] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module is recorded as one operation."""
        return isinstance(m, (*_LAYERS, *self.leaves)) or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Record an operation."""
        node = super().create_node(*args, **kwargs)
        self.order[node] = len(self.order)
        return node

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a module as one operation, or the operations of a larger module."""
        first = len(self.order)
        out = super().call_module(m, forward, args, kwargs)
        if isinstance(out, fx.Proxy):
            self.calls.append(Call(self.path_of_module(m), first, out.node))
        return out


class _Shapes(fx.Interpreter):
    """Runs a graph on the meta device, and records the shape of each result that is a tensor."""

    def run_node(self, n: fx.Node) -> Any:
        """Run one operation."""
        out = super().run_node(n)
        if isinstance(out, Tensor):
            n.meta["shape"] = tuple(out.shape)
        return out


class Graph:
    """The graph of a network in one mode.

    Args:
        network: the network, on the meta device, in training or in evaluation.
        leaves: types of modules that are recorded as one operation, besides torch's own.
        functions: functions that are recorded as one operation.
        in_size: size of an image, (C, H, W).

    Raises:
        ModelError: if the network cannot be recorded, or a batch norm runs several times: each time needs its own statistics.
    """

    def __init__(
        self,
        network: nn.Module,
        leaves: Collection[type[nn.Module]],
        functions: Collection[Callable[..., Any]],
        in_size: Sequence[int],
    ) -> None:
        self.network = network
        self.leaves = tuple(leaves)
        tracer = _Tracer(leaves, functions)
        graph = _recorded(tracer, network)
        self.image = next(node for node in graph.nodes if node.op == "placeholder")
        self.modules = {node: network.get_submodule(node.target) for node in graph.nodes if node.op == "call_module"}
        norms = Counter(str(node.target) for node, module in self.modules.items() if isinstance(module, nn.BatchNorm2d))
        for name, times in norms.items():
            if times > 1:
                raise ModelError(f"its batch norm {name} runs {times} times")
        same = self._without_identities(graph)
        self._in_sequence(graph)
        *_, output = graph.nodes
        assert output.op == "output"
        result = _first(output.args[0])
        output.args = (result,)
        needed = _ancestors(result)
        for node in reversed(graph.nodes):
            if node is not output and node is not self.image and node not in needed:
                graph.erase_node(node)
        self.order = tracer.order
        self.calls = [
            Call(call.path, call.first, node)
            for call in tracer.calls
            if (node := same.get(call.node, call.node)) in needed or node is self.image
        ]
        self.nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
        with torch.no_grad():
            _Shapes(network, graph=graph).run(torch.empty(IMAGES, *in_size, device="meta"))
        self.constants = self._find_constants()
        self.cuts = self._find_cuts()

    def _without_identities(self, graph: fx.Graph) -> dict[fx.Node, fx.Node]:
        """Erase modules that return their input; return the remaining operation for each erased one."""
        same: dict[fx.Node, fx.Node] = {}
        for node, module in self.modules.items():
            if _is_identity(module):
                source = node.args[0]
                assert isinstance(source, fx.Node)
                same[node] = same.get(source, source)
                node.replace_all_uses_with(same[node])
                graph.erase_node(node)
        return same

    def _in_sequence(self, graph: fx.Graph) -> None:
        """Let each use of a tensor that was overwritten follow the operation that overwrote it."""
        order = {node: i for i, node in enumerate(graph.nodes)}
        for node in graph.nodes:
            if self._overwrites(node) and isinstance(target := node.args[0], fx.Node):
                for user in list(target.users):
                    if order[user] > order[node]:
                        user.replace_input_with(target, node)

    def _overwrites(self, node: fx.Node) -> bool:
        """Return whether an operation overwrites its input."""
        if node.op == "call_module":
            return bool(getattr(self.modules[node], "inplace", False))
        if node.op == "call_method":
            return str(node.target).endswith("_") and not str(node.target).endswith("__")
        name = getattr(node.target, "__name__", "")
        return node.op == "call_function" and (
            node.target in _IN_PLACE or node.kwargs.get("inplace") is True or (name.endswith("_") and name[:1] != "_")
        )

    def _find_constants(self) -> set[fx.Node]:
        """Return the operations that depend on weights alone."""
        constants: set[fx.Node] = set()
        for node in self.nodes:
            sources = node.all_input_nodes
            if node.op == "get_attr" or (sources and all(source in constants for source in sources)):
                constants.add(node)
        return constants

    def _find_cuts(self) -> list[fx.Node]:
        """Return the operations after which no earlier result is needed, in order."""
        last_use = {node: i for i, node in enumerate(self.nodes)}
        last_use[self.image] = -1
        for i, node in enumerate(self.nodes):
            last_use.update(dict.fromkeys(node.all_input_nodes, i))
        last_use[self.nodes[-1]] = len(self.nodes)
        alive, cuts = [self.image], []
        for i, node in enumerate(self.nodes):
            if node not in self.constants:
                alive.append(node)
            alive = [other for other in alive if last_use[other] > i]
            if alive == [node]:
                cuts.append(node)
        return cuts

    def is_map(self, node: fx.Node) -> bool:
        """Return whether a result is a map of several pixels, (N, C, H, W)."""
        shape = node.meta.get("shape", ())
        return len(shape) == 4 and shape[0] == IMAGES and shape[2] * shape[3] > 1

    def emit(self, start: fx.Node, end: fx.Node, *, keep_input: bool) -> Body:
        """Return the part of the graph from one result to a later one as a function.

        Args:
            start: the result that is handed in: the image, or a cut.
            end: a later cut.
            keep_input: let the function work on a copy of its input, since it would overwrite the input.
        """
        nodes = self.part(start, end)
        graph = fx.Graph()
        state, norm = graph.placeholder("state"), graph.placeholder("norm")
        copied = {start: graph.call_method("clone", (state,)) if keep_input else state}
        rectified = {node: relu for node in nodes if node is not end and (relu := self._rectified(node)) is not None}
        included = {relu: node for node, relu in rectified.items()}
        for node in nodes:
            if node in included:
                copied[node] = copied[included[node]]
            else:
                copied[node] = self._emit_one(graph, node, copied, norm, start, relu=node in rectified)
        graph.output(copied[end])
        code = graph.python_code("self")
        namespace = dict(code.globals)
        exec(code.src, namespace)
        body: Body = namespace["forward"]
        return body

    def part(self, start: fx.Node, end: fx.Node) -> list[fx.Node]:
        """Return the operations after one result, up to a later one, with the constants that they need."""
        first = -1 if start is self.image else self.nodes.index(start)
        nodes = [node for node in self.nodes[first + 1 : self.nodes.index(end) + 1] if node not in self.constants]
        sources = {source for node in nodes for source in node.all_input_nodes}
        needed = set().union(*map(_ancestors, sources & self.constants))
        return sorted({*nodes, *needed}, key=self.order.__getitem__)

    def _rectified(self, node: fx.Node) -> fx.Node | None:
        """Return the rectifier that alone reads the result of a batch norm, and that `norm` can therefore include."""
        if not isinstance(bn := self.modules.get(node), nn.BatchNorm2d) or bn.running_mean is None or len(node.users) != 1:
            return None
        (user,) = node.users
        rectifies = isinstance(self.modules.get(user), nn.ReLU) or user.target in (F.relu, torch.relu)
        return user if rectifies and user.args[:1] == (node,) and not _following(bn) else None

    def _emit_one(
        self, graph: fx.Graph, node: fx.Node, copied: dict[fx.Node, fx.Node], norm: fx.Node, start: fx.Node, *, relu: bool
    ) -> fx.Node:
        module = self.modules.get(node)
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            target = str(node.target)
            source = node.args[0]
            assert isinstance(source, fx.Node)
            own = source is not start and self._is_own(source, node)
            following = _following(module)
            if [type(module.get_submodule(name)) for name in following] == [nn.ReLU]:
                following, relu = [], True
            out = graph.call_function(_normalised, (norm, graph.get_attr(target), copied[source], own, relu))
            for name in following:
                out = graph.call_module(f"{target}.{name}", (out,))
            return out
        if module is not None and any(isinstance(inside, nn.BatchNorm2d) for inside in module.modules()):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: copied[n])
            return graph.call_function(_through, (norm, graph.get_attr(str(node.target)), *args), kwargs)
        if type(module) is nn.Conv2d and module.padding_mode == "zeros":
            source = node.args[0]
            assert isinstance(source, fx.Node)
            return graph.call_function(convolve, (graph.get_attr(str(node.target)), copied[source]))
        if node.op == "call_function" and node.target in (operator.add, torch.add) and len(node.args) == 2 and not node.kwargs:
            for term, other in (node.args, node.args[::-1]):
                if not isinstance(term, fx.Node) or term is start or term.meta.get("shape") != node.meta.get("shape"):
                    continue
                if self._is_own(term, node):
                    return graph.call_method("add_", (copied[term], copied[other] if isinstance(other, fx.Node) else other))
        return graph.node_copy(node, lambda n: copied[n])

    def _is_own(self, node: Any, user: fx.Node) -> bool:
        """Return whether a result is new memory that only one operation reads, and that its own gradient does not need."""
        if not isinstance(node, fx.Node) or list(node.users) != [user]:
            return False
        module = self.modules.get(node)
        if isinstance(module, nn.BatchNorm2d):
            return _is_identity(getattr(module, "act", nn.Identity()))
        return isinstance(module, nn.Conv2d | nn.Linear)

    def overwriting_activations(self) -> tuple[str, ...]:
        """Return the names of torch's activations whose input is always new memory that nothing else reads."""
        calls: dict[str, list[fx.Node]] = {}
        for node in self.nodes:
            if isinstance(self.modules.get(node), ACTIVATIONS):
                calls.setdefault(str(node.target), []).append(node)
        return tuple(name for name, nodes in calls.items() if all(self._is_own(node.args[0], node) for node in nodes))

    def uses(self, start: fx.Node, end: fx.Node) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names of the modules that a part of the graph calls, and of the parameters that it reads itself."""
        nodes = self.part(start, end)
        layers = dict.fromkeys(str(node.target) for node in nodes if node.op == "call_module")
        return tuple(layers), tuple(dict.fromkeys(str(node.target) for node in nodes if node.op == "get_attr"))

    def classifier(self) -> str:
        """Return the name of the layer that makes the result: the last linear layer or convolution."""
        layers = [node for node in self.nodes if isinstance(self.modules.get(node), nn.Linear | nn.Conv2d)]
        return str(layers[-1].target)

    def input_conv(self) -> str:
        """Return the name of the first convolution."""
        return next(str(node.target) for node in self.nodes if isinstance(self.modules.get(node), nn.Conv2d))


def _normalised(norm: Norm, bn: nn.BatchNorm2d, x_NCHW: Tensor, own: bool, relu: bool) -> Tensor:
    return norm(bn, x_NCHW, own=own, relu=relu)


def _following(bn: nn.BatchNorm2d) -> list[str]:
    """Return the names of the modules that a subclass of batch norm calls afterwards: the dropout and activation of timm's."""
    return [name for name in ("drop", "act") if not _is_identity(getattr(bn, name, nn.Identity()))]


class _Normalised(nn.Module):
    """A batch norm that goes through a `norm`.

    Args:
        bn: the batch norm.
        norm: how it is applied.
    """

    def __init__(self, bn: nn.BatchNorm2d, norm: Norm) -> None:
        super().__init__()
        self.bn, self.norm = bn, norm

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return the normalised map, after what a subclass of batch norm does with it."""
        out = self.norm(self.bn, x_NCHW)
        for name in _following(self.bn):
            out = self.bn.get_submodule(name)(out)
        return out


def _through(norm: Norm, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module that is one operation and contains batch norms, which go through `norm`."""
    return (module if norm is batch_norm else _routed(module, norm))(*args, **kwargs)


def _routed(module: nn.Module, norm: Norm) -> nn.Module:
    """Return a module with the same weights whose batch norms go through `norm`; the module itself is not changed."""
    if isinstance(module, nn.BatchNorm2d):
        return module if module.running_mean is None else _Normalised(module, norm)
    if not any(isinstance(inner, nn.BatchNorm2d) for inner in module.modules()):
        return module
    routed = copy.copy(module)  # shares everything but the table of its children
    children = {name: None if child is None else _routed(child, norm) for name, child in module._modules.items()}
    routed.__dict__["_modules"] = children
    return routed


def _is_identity(module: nn.Module) -> bool:
    rate = getattr(module, "drop_prob", None) if type(module).__name__ == "DropPath" else getattr(module, "p", None)
    return isinstance(module, nn.Identity) or (type(module).__name__ in _DROPS and not rate)


def _first(result: Any) -> fx.Node:
    """Return the first tensor of a result: of a tuple with the results of auxiliary classifiers, the main one.

    Raises:
        ModelError: if there is no tensor.
    """
    leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, fx.Node)]
    if not leaves:
        raise ModelError("its result is not a tensor")
    target = leaves[0].target
    is_tuple = leaves[0].op == "call_function" and isinstance(target, type) and issubclass(target, tuple)
    return _first(leaves[0].args) if is_tuple else leaves[0]


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """Return an operation and all operations that its result depends on."""
    found, open_ = {node}, [node]
    while open_:
        for source in open_.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                open_.append(source)
    return found


@contextmanager
def _functions_with_gradients(tracer: _Tracer) -> Iterator[None]:
    """Let a tracer record a `torch.autograd.Function` as one operation.

    torch.fx would record what its `forward` does, and its own gradient would be lost.
    """
    apply = vars(torch.autograd.Function)["apply"]

    def recorded(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        def applied(*args: Any, **kwargs: Any) -> Any:
            return cls.apply(*args, **kwargs)

        if any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves((args, kwargs))):
            return tracer.create_proxy("call_function", applied, args, kwargs)
        return apply.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(recorded)
    try:
        yield
    finally:
        torch.autograd.Function.apply = apply


def _recorded(tracer: _Tracer, network: nn.Module) -> fx.Graph:
    """Return the graph of a network.

    Raises:
        ModelError: if torch.fx cannot record it; the message names the line of the library that is the reason.
    """
    _, *others = inspect.signature(network.forward).parameters.values()
    defaults = {p.name: p.default for p in others if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    if inspect.Parameter.empty in defaults.values():
        raise ModelError(f"it has {1 + len(defaults)} inputs ({', '.join(inspect.signature(network.forward).parameters)})")
    try:
        with _functions_with_gradients(tracer):
            return tracer.trace(network, concrete_args=defaults or None)
    except Exception as error:  # a library's code may raise anything when it is given a proxy
        frames = traceback.extract_tb(error.__traceback__)
        where = [frame for frame in frames if "/torch/" not in frame.filename and not frame.filename.startswith("<")][-1]
        file = "/".join(where.filename.split("/")[-3:])
        what = "control flow depends on a tensor" if isinstance(error, fx.proxy.TraceError) else " ".join(str(error).split())
        if "does not support item assignment" in what:
            what = "it writes into parts of a tensor"
        raise ModelError(f"it cannot be traced: {what} at line {where.lineno} of {file}") from error
