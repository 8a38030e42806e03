"""Fine-tune the classifier and the batch norms of single instances, after FixRes (Touvron et al. 2019, section 4.1).

Only parameters of a single instance are trained: a copy of the classifier, and the weights and biases of the batch norms at
the tree nodes that no other instance passes. All other weights are frozen, so the results of the other instances do not change.
`full` shares every batch norm before the last point with an instance that shrinks there; if the last block can shrink, only the
classifier of `full` is trained.

Each batch is normalised by its own statistics, as in training. The loss is the cross-entropy, without label smoothing and
mixing; the network is otherwise as in evaluation, so that nothing is dropped.

Suffixes of tensor names: N images, C channels, H height, W width, K classes.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdpctl.engine.device import Batches, autocast
from sdpctl.engine.distributed import ALONE, Ranks
from sdpctl.engine.settings import FinetuneSettings, Precision
from sdpctl.engine.tree import Tree
from sdpctl.errors import DivergedError, ModelError
from sdpctl.instance import Instance
from sdpctl.models.chain import WHOLE, Chain, Part, affine, finished

MOMENTUM = 0.9

Tuned = dict[tuple[Instance, str], Tensor]
"""Parameters by tree node and name."""


def own_level(tree: Tree, instance: Instance) -> int:
    """Return the number of the first segment whose node belongs to one instance alone, as do the nodes of all later segments.

    The node of a segment belongs to an instance if the instance does not shrink any more, and no other instance of the tree
    passes the node.
    """
    points = tree.model.points
    complete, passed = instance.among(points), list[str]()
    for level, segment in enumerate(tree.segments):
        passing = {other.among(points) for other in tree.instances if other.among(passed) == instance.among(passed)}
        if passing == {complete} and instance.among(passed) == complete:
            return level
        passed += [] if segment.point is None else [segment.point]
    raise AssertionError("two instances differ at a point before the last segment")


def own_names(tree: Tree, instance: Instance) -> list[str]:
    """Return the names of the parameters that belong to one instance alone, those of the batch norms first.

    Raises:
        ModelError: if the network's last segment has no classifier.
    """
    model, segments = tree.model, tree.segments[own_level(tree, instance) :]
    norms = [(name, bn) for segment in segments for name, bn in model.norms(segment).items() if bn.affine]
    if not (head := model.classifier_names):
        raise ModelError("this network has no classifier after its last point to fine-tune; remove calibrate.finetune")
    return [*(f"{name}.{side}" for name, _ in norms for side in ("weight", "bias")), *head]


def learning_rate(settings: FinetuneSettings, step: int) -> float:
    """Return the learning rate of a step, counted from 0: it falls as a cosine (Loshchilov & Hutter 2017)."""
    return settings.lr * (1 + math.cos(math.pi * step / settings.steps)) / 2


def finetune(
    tree: Tree,
    batches_of: Callable[[Instance], Batches],
    settings: FinetuneSettings,
    instances: Sequence[Instance],
    *,
    precision: Precision = "fp32",
    class_weights_K: Tensor | None = None,
    ranks: Ranks = ALONE,
) -> Tuned:
    """Fine-tune instances, one after another. The model is not changed.

    Args:
        tree: the tree of all instances that may share nodes; its chain is in evaluation mode.
        batches_of: returns the batches of an instance, one for each step: (x_NCHW, labels_N) on the model's device, prepared as
            those of the calibration.
        settings: number of steps and learning rate.
        instances: the instances to fine-tune.
        precision: `fp32`, or `bf16` under autocast.
        class_weights_K: weight of each class in the loss; equal weights by default.
        ranks: the processes that share the instances; each instance is fine-tuned by one of them, with the same numbers as by
            a single process, and all have the results afterwards.

    Raises:
        DivergedError: if a parameter is not finite afterwards.
        ModelError: if the network has no classifier after its last point.
    """
    tuned: Tuned = {}
    for number, instance in enumerate(instances):
        names, owner = own_names(tree, instance), number % ranks.size
        own = {name: tree.model.get_parameter(name).detach().clone() for name in names}
        if owner == ranks.rank:
            level = own_level(tree, instance)
            _train(tree.model, instance, level, own, batches_of(instance), settings, precision, class_weights_K)
        tuned |= {(instance.among(tree.model.points), name): values for name, values in own.items()}
    if ranks.several:
        for number, instance in enumerate(instances):
            node = instance.among(tree.model.points)
            for name in own_names(tree, instance):
                tuned[node, name] = ranks.gathered(tuned[node, name])[number % ranks.size]
    for (node, name), values in tuned.items():
        if not values.isfinite().all():
            raise DivergedError(f"{node}: {name} is not finite after {settings.steps} steps; lower calibrate.finetune.lr")
    return tuned


def _train(
    model: Chain,
    instance: Instance,
    level: int,
    own: Mapping[str, Tensor],
    batches: Batches,
    settings: FinetuneSettings,
    precision: Precision,
    class_weights_K: Tensor | None,
) -> None:
    """Train parameters of an instance in place.

    Args:
        model: the chain.
        instance: the instance.
        level: number of the first segment with parameters that are trained.
        own: the parameters, by name.
        batches: a batch for each step.
        settings: number of steps and learning rate.
        precision: `fp32`, or `bf16` under autocast.
        class_weights_K: weight of each class in the loss.
    """
    parameters = {name: nn.Parameter(values) for name, values in own.items()}
    norms = {
        bn: (parameters[f"{name}.weight"], parameters[f"{name}.bias"])
        for name, bn in model.batch_norms.items()
        if f"{name}.weight" in parameters
    }

    def norm(
        bn: nn.BatchNorm2d,
        x_NCHW: Tensor,
        part: Part = WHOLE,
        *,
        own: bool = False,  # noqa: ARG001  the gradient needs the map
        plus: Tensor | None = None,
        relu: bool = False,
    ) -> Tensor:
        weight, bias = (side[part] for side in norms[bn]) if bn in norms else affine(bn, part)
        return finished(F.batch_norm(x_NCHW, None, None, weight, bias, True, 0.0, bn.eps), plus, relu)

    head = {name: parameters[name] for name in model.classifier_names}
    segments = model.with_parameters(head).segments()
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(parameters.values(), lr=settings.lr, momentum=MOMENTUM)
    for step, (x_NCHW, labels_N) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        with autocast(device, precision):
            state = model.begun(x_NCHW)
            for number, segment in enumerate(segments):
                with torch.set_grad_enabled(number >= level):
                    state = segment.body(state, norm)
                    if segment.shrink is not None and segment.point is not None:
                        state = segment.shrink(state, instance.ratio(segment.point))
        assert isinstance(state, Tensor)
        logits_NK = state.to(torch.promote_types(state.dtype, torch.float32))
        weight_K = None if class_weights_K is None else class_weights_K.to(logits_NK.dtype)
        loss = F.cross_entropy(logits_NK, labels_N, weight=weight_K)
        gradients = torch.autograd.grad(loss, list(parameters.values()))  # no other gradient is computed
        for parameter, gradient in zip(parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
