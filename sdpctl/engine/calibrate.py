"""Gather and use the BatchNorm statistics of instances, by tree node.

Each instance needs its own statistics. The statistics of a batch norm depend only on the ratios of the points before it, so
they are stored per tree node and shared by all instances that pass this node. The estimate is PyTorch's: each batch is
normalised by its own mean and (biased) variance while the running mean and the running *unbiased* variance are averaged.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from types import MappingProxyType

import torch
from torch import Tensor, nn

from sdpctl.engine.device import Batches, autocast
from sdpctl.engine.distributed import ALONE, Ranks
from sdpctl.engine.replay import Replay
from sdpctl.engine.settings import WalkSettings
from sdpctl.engine.tree import Heads, NormsAndHeads, Tree
from sdpctl.errors import DataError, NotFoundError
from sdpctl.instance import FULL, Instance
from sdpctl.models.chain import WHOLE, Chain, Norm, Part, finished

EMA_MOMENTUM = 0.1
"""Weight of a new batch in the estimator `ema`, as in the public code."""


@dataclass
class Statistics:
    """Means and variances by tree node.

    Args:
        instances: the instances that the statistics cover.
        batches: number of batches in the averages.
        images: number of images in the averages.
        mean: means (C,), by node and name of the batch norm.
        var: unbiased variances (C,), by node and name of the batch norm.
        tuned: parameters that were fine-tuned, by node and name: weights and biases of batch norms, and of the classifier at
            the last node of an instance. A node that is not here has the network's own.
    """

    instances: tuple[Instance, ...]
    batches: int
    images: int
    mean: dict[tuple[Instance, str], Tensor] = field(repr=False)
    var: dict[tuple[Instance, str], Tensor] = field(repr=False)
    tuned: dict[tuple[Instance, str], Tensor] = field(default_factory=dict, repr=False)

    def at(self, node: Instance, name: str) -> tuple[Tensor, Tensor]:
        """Return mean and variance of a batch norm at a node.

        Raises:
            NotFoundError: if the node was not calibrated.
        """
        if (node, name) not in self.mean:
            raise NotFoundError(f"no BatchNorm statistics of {name} after {node}; calibrate that instance first")
        return self.mean[node, name], self.var[node, name]

    def to(self, device: torch.device) -> "Statistics":
        """Return the statistics on a different device."""
        mean, var, tuned = ({key: t.to(device) for key, t in side.items()} for side in (self.mean, self.var, self.tuned))
        return Statistics(self.instances, self.batches, self.images, mean, var, tuned)


def _names(model: Chain) -> dict[nn.BatchNorm2d, str]:
    return {bn: name for name, bn in model.batch_norms.items()}


class _Affine:
    """The weights and biases of batch norms by tree node.

    Args:
        model: the chain; its own weights and biases are used at every node that `tuned` does not name.
        tuned: fine-tuned parameters by node and name, on the model's device.
    """

    def __init__(self, model: Chain, tuned: Mapping[tuple[Instance, str], Tensor]) -> None:
        self.names, self.tuned = _names(model), tuned
        self._stacked: dict[tuple[nn.BatchNorm2d, tuple[Instance, ...]], tuple[Tensor | None, Tensor | None]] = {}

    def at(self, node: Instance, bn: nn.BatchNorm2d) -> tuple[Tensor | None, Tensor | None]:
        """Return weight and bias of a batch norm at a node; None for a batch norm without them."""
        name = self.names[bn]
        return self.tuned.get((node, f"{name}.weight"), bn.weight), self.tuned.get((node, f"{name}.bias"), bn.bias)

    def of(self, nodes: tuple[Instance, ...], bn: nn.BatchNorm2d) -> tuple[Tensor | None, Tensor | None]:
        """Return weight and bias for the kernels: (C,) if the nodes have the network's own, otherwise (B, C)."""
        name = self.names[bn]
        if not any((node, f"{name}.{side}") in self.tuned for node in nodes for side in ("weight", "bias")):
            return bn.weight, bn.bias
        if (bn, nodes) not in self._stacked:
            weights, biases = zip(*(self.at(node, bn) for node in nodes), strict=True)
            self._stacked[bn, nodes] = torch.stack(weights).detach(), torch.stack(biases).detach()
        return self._stacked[bn, nodes]


def _of_part(values: Tensor | None, part: Part) -> Tensor | None:
    """Return the values of some channels, (C,) or (B, C), in rows without gaps."""
    return None if values is None else values[..., part].contiguous()


def _normalise(
    bn: nn.BatchNorm2d,
    x_NCHW: Tensor,
    out_NCHW: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gather: bool,
    momentum: float,
) -> None:
    """Write a batch-normalised map into a given output, which may be the input; `F.batch_norm` has no output argument."""
    unread = mean.new_empty(0), mean.new_empty(0)
    torch.native_batch_norm(x_NCHW, weight, bias, mean, var, gather, momentum, bn.eps, out=(out_NCHW, *unread))


@cache
def _has_kernels() -> bool:
    return find_spec("triton") is not None


def fuses(x_NCHW: Tensor) -> bool:
    """Return whether a map is normalised by the kernels of `kernels.py`: on a GPU, if torch comes with Triton."""
    return x_NCHW.device.type == "cuda" and x_NCHW.dtype in (torch.float32, torch.bfloat16) and _has_kernels()


def _fused(
    x_NCHW: Tensor, mean_BC: Tensor, scale_BC: Tensor, bias: Tensor | None, *, own: bool, plus: Tensor | None, relu: bool
) -> Tensor:
    """Normalise all branches of a joined map in one launch; add and rectify if asked for. The bias is (C,) or (B, C)."""
    from sdpctl.engine.kernels import in_rows, transform

    rows_NCHW = in_rows(x_NCHW)
    out_NCHW = rows_NCHW if own or rows_NCHW is not x_NCHW else torch.empty_like(rows_NCHW)
    plus = None if plus is None else in_rows(plus)
    return transform(rows_NCHW, mean_BC, scale_BC, bias, out_NCHW=out_NCHW, plus_NCHW=plus, relu=relu)


class CalibratedNorms(NormsAndHeads):
    """Norms in evaluation: each branch is normalised by the statistics of its node. Nodes may have classifiers of their own.

    Args:
        model: the chain.
        statistics: statistics of the nodes that will be visited, on the model's device.
    """

    def __init__(self, model: Chain, statistics: Statistics) -> None:
        self.names = _names(model)
        self.statistics = statistics
        self._affine = _Affine(model, statistics.tuned)
        self._known: dict[tuple[str, tuple[Instance, ...]], tuple[Tensor, Tensor]] = {}
        self.heads = _heads(model, statistics)

    def __call__(self, nodes: Sequence[Instance]) -> Norm:
        """Return the norm of a concatenated batch of these nodes."""

        def norm(
            bn: nn.BatchNorm2d,
            x_NCHW: Tensor,
            part: Part = WHOLE,
            *,
            own: bool = False,
            plus: Tensor | None = None,
            relu: bool = False,
        ) -> Tensor:
            if fuses(x_NCHW):
                mean_BC, scale_BC = (side[:, part].contiguous() for side in self._scales(bn, tuple(nodes)))
                bias = _of_part(self._affine.of(tuple(nodes), bn)[1], part)
                return _fused(x_NCHW, mean_BC, scale_BC, bias, own=own, plus=plus, relu=relu)
            out_NCHW = x_NCHW if own else torch.empty_like(x_NCHW)
            for node, x, out in zip(nodes, x_NCHW.chunk(len(nodes)), out_NCHW.chunk(len(nodes)), strict=True):
                mean, var = self.statistics.at(node, self.names[bn])
                weight, bias = (_of_part(side, part) for side in self._affine.at(node, bn))
                _normalise(bn, x, out, mean[part], var[part], weight, bias, False, 0.0)
            return finished(out_NCHW, plus, relu)

        return norm

    def _scales(self, bn: nn.BatchNorm2d, nodes: tuple[Instance, ...]) -> tuple[Tensor, Tensor]:
        """Return mean and scale of each branch, (B, C)."""
        key = self.names[bn], nodes
        if key not in self._known:
            mean, var = (torch.stack(side) for side in zip(*(self.statistics.at(node, key[0]) for node in nodes), strict=True))
            scale, (weight, _) = torch.rsqrt(var + bn.eps), self._affine.of(nodes, bn)
            self._known[key] = mean, scale if weight is None else scale * weight
        return self._known[key]


def _heads(model: Chain, statistics: Statistics) -> Heads:
    """Return the last segment's body with a node's own classifier, for each node that has one."""
    heads: dict[Instance, dict[str, nn.Parameter]] = {}
    classifier = model.classifier_names if statistics.tuned else ()
    for (node, name), values in statistics.tuned.items():
        if name in classifier:
            heads.setdefault(node, {})[name] = nn.Parameter(values, requires_grad=False)
    return {node: model.with_parameters(own).segments()[-1].body for node, own in heads.items()}


class _Gathering:
    """Norms in calibration: each branch is normalised by its own batch and updates its node's running statistics.

    Of several ranks, each sees every n-th batch, and keeps the weighted mean of its own batches. A batch has weight 1 with the
    estimator `cumulative`. With `ema`, batch i of n has the weight 0.1 * 0.9^(n-1-i), and the network's own running statistics
    have the rest, 0.9^n.
    """

    def __init__(
        self,
        model: Chain,
        tree: Tree,
        settings: WalkSettings,
        ranks: Ranks,
        tuned: Mapping[tuple[Instance, str], Tensor] = MappingProxyType({}),
    ) -> None:
        self.names, self.bns = _names(model), model.batch_norms
        self._affine = _Affine(model, tuned)
        self.estimator = settings.estimator
        self.kept = {FULL} if settings.keep_full else set()
        self.ranks = ranks
        self.batches = 0
        self.momentum = 1.0
        self._momentum = torch.ones((), device=next(model.parameters()).device)
        self._weight = 0.0  # of this rank's batches together, where its last batch has 0.1; of `ema`, among several ranks
        self.mean: dict[tuple[Instance, str], Tensor] = {}
        self.var: dict[tuple[Instance, str], Tensor] = {}
        self._tables: dict[str, tuple[Tensor, Tensor]] = {}
        """Running means and variances of all nodes, (nodes, C), by batch norm; `mean` and `var` are their rows."""
        self._rows: dict[str, dict[Instance, int]] = {}
        self._indices: dict[tuple[str, tuple[Instance, ...]], tuple[Tensor, Tensor]] = {}
        for segment, level in zip(tree.segments, tree.children, strict=True):
            for name, bn in model.norms(segment).items():
                assert bn.running_mean is not None
                assert bn.running_var is not None
                self._rows[name] = {node: row for row, node in enumerate(level)}
                means, variances = (side.repeat(len(level), 1) for side in (bn.running_mean, bn.running_var))
                self._tables[name] = means, variances
                self.mean |= {(node, name): mean for node, mean in zip(level, means, strict=True)}
                self.var |= {(node, name): var for node, var in zip(level, variances, strict=True)}

    def __call__(self, nodes: Sequence[Instance]) -> Norm:
        def norm(
            bn: nn.BatchNorm2d,
            x_NCHW: Tensor,
            part: Part = WHOLE,
            *,
            own: bool = False,
            plus: Tensor | None = None,
            relu: bool = False,
        ) -> Tensor:
            assert isinstance(part, slice)  # otherwise indexing would copy, and the update would be lost
            name = self.names[bn]
            if fuses(x_NCHW):
                from sdpctl.engine.kernels import gather, in_rows

                rows_NCHW = in_rows(x_NCHW)
                own = own or rows_NCHW is not x_NCHW
                means, variances = (table[:, part] for table in self._tables[name])
                weight, bias = (_of_part(side, part) for side in self._affine.of(tuple(nodes), bn))
                batch = gather(rows_NCHW, means, variances, *self._at(name, tuple(nodes)), self._momentum, weight, bn.eps)
                return _fused(rows_NCHW, *batch, bias, own=own, plus=plus, relu=relu)
            out_NCHW = x_NCHW if own else torch.empty_like(x_NCHW)
            for node, x, out in zip(nodes, x_NCHW.chunk(len(nodes)), out_NCHW.chunk(len(nodes)), strict=True):
                mean, var = self.mean[node, name][part], self.var[node, name][part]
                weight, bias = (_of_part(side, part) for side in self._affine.at(node, bn))
                _normalise(bn, x, out, mean, var, weight, bias, node not in self.kept, self.momentum)
            return finished(out_NCHW, plus, relu)

        return norm

    def _at(self, name: str, nodes: tuple[Instance, ...]) -> tuple[Tensor, Tensor]:
        """Return the row of each branch's node, and whether the node keeps its statistics, both int64 (B,)."""
        if (name, nodes) not in self._indices:
            rows, kept = [self._rows[name][node] for node in nodes], [int(node in self.kept) for node in nodes]
            device = self._momentum.device
            self._indices[name, nodes] = torch.tensor(rows, device=device), torch.tensor(kept, device=device)
        return self._indices[name, nodes]

    def count(self) -> None:
        """Begin the next batch."""
        self.batches += 1
        if self.estimator == "cumulative":
            self.momentum = 1 / self.batches
        elif not self.ranks.several:
            self.momentum = EMA_MOMENTUM
        else:
            self._weight = self._weight * (1 - EMA_MOMENTUM) ** self.ranks.size + EMA_MOMENTUM
            self.momentum = EMA_MOMENTUM / self._weight
        self._momentum.fill_(self.momentum)

    def merge(self, images: int) -> int:
        """Merge the statistics of all ranks, in float64; return the number of images of all ranks."""
        if not self.ranks.several:
            return images
        counted = [each.tolist() for each in self.ranks.gathered(torch.tensor([self.batches, images]))]
        own, self.batches = self.batches, sum(batches for batches, _ in counted)
        total = max(self.batches, 1)
        if self.estimator == "cumulative":
            share, rest = own / total, 0.0
        else:
            last = self.ranks.rank + (own - 1) * self.ranks.size  # number of this rank's last batch
            share = self._weight * (1 - EMA_MOMENTUM) ** (total - 1 - last) if own else 0.0
            rest = (1 - EMA_MOMENTUM) ** total if self.ranks.rank == 0 else 0.0
        keys = [key for key in self.mean if key[0] not in self.kept]
        for side, own_buffer in ((self.mean, "running_mean"), (self.var, "running_var")):
            first = [self.bns[name].get_buffer(own_buffer) for _, name in keys]
            weighted = [share * side[key].double() + rest * t.double() for key, t in zip(keys, first, strict=True)]
            merged = torch.cat([torch.empty(0, dtype=torch.float64), *(t.cpu() for t in weighted)])
            self.ranks.add_up(merged)
            for key, values in zip(keys, torch.split(merged, [len(t) for t in weighted]), strict=True):
                side[key].copy_(values)
        return sum(images for _, images in counted)


def running_statistics(model: Chain) -> Statistics:
    """Return a network's own running statistics as the statistics of `full`."""
    own = _Gathering(model, Tree(model, [FULL]), WalkSettings(keep_full=True), ALONE)
    return Statistics((FULL,), 0, 0, own.mean, own.var)


def uncalibrated(instances: Iterable[Instance]) -> Statistics:
    """Return the statistics of a network without batch norms, which are empty."""
    return Statistics(tuple(dict.fromkeys(instances)), 0, 0, {}, {})


@torch.inference_mode()
def calibrate(
    model: Chain,
    instances: Iterable[Instance],
    batches: Batches,
    settings: WalkSettings = WalkSettings(),
    ranks: Ranks = ALONE,
    tuned: Mapping[tuple[Instance, str], Tensor] = MappingProxyType({}),
) -> Statistics:
    """Gather the BatchNorm statistics of many instances in one pass over the batches.

    The numbers equal those of running each instance alone in training mode. The model is not changed. For a network without
    batch norms no batch is read, and the statistics are empty.

    Args:
        model: the chain; `ema` starts from its own running statistics.
        instances: the instances that will be evaluated.
        batches: (x_NCHW, labels_N) on the model's device, training augmentation; of several ranks, rank r has the batches r,
            r + n and so on, perhaps none.
        settings: how the instances are run; statistics are kept in the model's own dtype.
        ranks: the processes that share the batches; all have the same statistics afterwards.
        tuned: parameters that were fine-tuned, by node and name; see `Statistics`.

    Raises:
        DataError: if there is no batch, or a batch has a single image.
        ResourceError: if a batch does not fit the memory.
    """
    tree = Tree(model, instances, memory=settings.memory)
    gathering = _Gathering(model, tree, settings, ranks, tuned)
    images = 0
    if not gathering.mean:
        return Statistics(tree.instances, 0, 0, {}, {}, dict(tuned))

    def passed(x_NCHW: Tensor) -> Tensor:
        with autocast(x_NCHW.device, settings.precision):
            tree.walk(x_NCHW, gathering)
        return x_NCHW

    passing = Replay(passed)
    for x_NCHW, _ in batches:
        if len(x_NCHW) < 2:
            raise DataError("a calibration batch of one image has no variance to estimate: set data.batch_size=2 or more")
        gathering.count()
        images += len(x_NCHW)
        (passing if fuses(x_NCHW) else passed)(x_NCHW)  # a graph would keep the momentum, which only the kernels read anew
    images = gathering.merge(images)
    if not gathering.batches:
        raise DataError("there is no full batch to calibrate with: lower data.batch_size")
    return Statistics(tree.instances, gathering.batches, images, gathering.mean, gathering.var, dict(tuned))
