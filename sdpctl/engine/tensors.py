"""Convert tensors and statistics to safetensors bytes and back; equal content gives equal bytes."""

import reprlib
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sdpctl.engine.calibrate import Statistics
from sdpctl.engine.tree import Tree
from sdpctl.errors import InstanceError, IntegrityError
from sdpctl.instance import Instance
from sdpctl.models.chain import Chain
from sdpctl.untrusted import load_json

ENTRY_BYTES = 4096
"""Maximum size of the part of a safetensors header that describes one tensor or the file itself, in bytes."""

_DTYPES = {torch.float32: "F32", torch.int64: "I64"}
"""The names that safetensors gives to the dtypes of a network's tensors."""

_SIDES = ("running_mean", "running_var")


def tensors_to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Serialise tensors as safetensors; each tensor is first made contiguous."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def bytes_to_tensors(content: bytes, called: str, wanted: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Read tensors; if the header lists different tensors than `wanted`, refuse before memory is allocated for them.

    Args:
        content: bytes of a safetensors file.
        called: name of the content, for error messages.
        wanted: tensors with exactly the names, dtypes and shapes that `content` must have; their values are ignored. By default
            any tensors are accepted.

    Raises:
        IntegrityError: if the content is not safetensors, or its tensors differ from `wanted` or are not finite.
    """
    try:
        if wanted is not None:
            _compare(_header(content), wanted)
        tensors = load(content)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise IntegrityError(f"{called}: {' '.join(str(error).split())}") from error
    for name, tensor in tensors.items() if wanted is not None else ():
        if not tensor.isfinite().all():
            raise IntegrityError(f"{called}: {name} holds values that are not finite")
    return tensors


def most_bytes(wanted: Mapping[str, Tensor]) -> int:
    """Return the maximum size of a safetensors file of these tensors, in bytes."""
    return ENTRY_BYTES + sum(ENTRY_BYTES + tensor.nbytes for tensor in wanted.values())


def _header(content: bytes) -> dict[str, Any]:
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise ValueError("it is cut off, or is not safetensors")
    header = load_json(content[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def _compare(header: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> None:
    for name, entry in header.items():
        if name not in wanted:
            raise ValueError(f"the tensor {reprlib.repr(name)} does not belong here")
        dtype, shape = _DTYPES[wanted[name].dtype], list(wanted[name].shape)
        found = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
        if found != (dtype, shape):
            raise ValueError(f"{name} is {found[0]} {reprlib.repr(found[1])}, expected {dtype} {shape}")
    if missing := [name for name in wanted if name not in header]:
        raise ValueError(f"the tensor {missing[0]} is missing")


def statistics_to_bytes(statistics: Statistics) -> tuple[bytes, dict[str, Any]]:
    """Serialise statistics by tree node: tensors `<node>/<batch norm>.running_mean` and `.running_var`.

    Parameters that were fine-tuned are `<node>/<parameter>`.

    Returns:
        The tensors as safetensors, and a document that lists their instances and tree nodes.
    """
    tensors: dict[str, Tensor] = {}
    nodes: dict[str, list[str]] = {}
    for (node, name), mean in statistics.mean.items():
        tensors[f"{node}/{name}.running_mean"] = mean
        tensors[f"{node}/{name}.running_var"] = statistics.var[node, name]
        nodes.setdefault(str(node), []).append(name)
    tuned: dict[str, list[str]] = {}
    for (node, name), values in statistics.tuned.items():
        tensors[f"{node}/{name}"] = values
        tuned.setdefault(str(node), []).append(name)
    described = {
        "batches": statistics.batches,
        "images": statistics.images,
        "instances": [str(instance) for instance in statistics.instances],
        "nodes": nodes,
    }
    if tuned:  # otherwise absent, so that artifacts without fine-tuning keep their digests
        described["tuned"] = tuned
    return tensors_to_bytes(tensors), described


def wanted_statistics(described: Mapping[str, Any], model: Chain, called: str) -> dict[str, Tensor]:
    """Return tensors with the names, dtypes and shapes that the statistics of a network's instances must have.

    Args:
        described: document that lists the instances and tree nodes, already checked.
        model: the network, on any device.
        called: name of the document, for error messages.

    Raises:
        IntegrityError: if the network lacks a point of a node or a batch norm, an instance lacks statistics, or a parameter
            that was fine-tuned does not belong to a node.
    """
    norms = model.batch_norms
    wanted: dict[str, Tensor] = {}
    try:
        for node, names in described["nodes"].items():
            Instance.parse(node).check(model.points)
            for name in names:
                if name not in norms:
                    raise IntegrityError(f"{called}: nodes.{node}: the network has no batch norm {reprlib.repr(name)}")
                for side in _SIDES:
                    wanted[f"{node}/{name}.{side}"] = norms[name].get_buffer(side)
        tree = Tree(model, map(Instance.parse, described["instances"]))
    except InstanceError as error:
        raise IntegrityError(f"{called}: {error}") from error
    for segment, passed in tree.nodes():
        for name in model.norms(segment):
            if f"{passed}/{name}.{_SIDES[0]}" not in wanted:
                raise IntegrityError(f"{called}: nodes.{passed}: the statistics of {name} are missing")
    return wanted | _wanted_tuned(described, model, tree, called)


def _wanted_tuned(described: Mapping[str, Any], model: Chain, tree: Tree, called: str) -> dict[str, Tensor]:
    """Return the tensors of the parameters that were fine-tuned.

    Raises:
        IntegrityError: if a node is not the last one of an instance, or does not have a parameter.
    """
    wanted: dict[str, Tensor] = {}
    complete = {str(instance.among(model.points)) for instance in tree.instances}
    for node, names in (described.get("tuned") or {}).items():
        if node not in complete:
            raise IntegrityError(f"{called}: tuned.{node}: these statistics have no such instance")
        affine = {f"{name}.{side}" for name in described["nodes"].get(node, ()) for side in ("weight", "bias")}
        known = affine.union(model.classifier_names).intersection(name for name, _ in model.named_parameters())
        for name in names:
            if name not in known:
                text = f"{reprlib.repr(name)} is neither of a batch norm of this node nor of the classifier"
                raise IntegrityError(f"{called}: tuned.{node}: {text}")
            wanted[f"{node}/{name}"] = model.get_parameter(name)
    return wanted


def statistics_from_bytes(
    content: bytes, described: Mapping[str, Any], wanted: Mapping[str, Tensor], called: str
) -> Statistics:
    """Read statistics.

    Args:
        content: safetensors.
        described: document that lists the instances and tree nodes, already checked.
        wanted: the result of `wanted_statistics` for this document.
        called: name of the content, for error messages.

    Raises:
        IntegrityError: if the tensors differ from `wanted` or are not finite, or a variance is negative.
    """
    tensors = bytes_to_tensors(content, called, wanted)
    mean, var = (
        {
            (Instance.parse(node), name): tensors[f"{node}/{name}.{side}"]
            for node, names in described["nodes"].items()
            for name in names
        }
        for side in _SIDES
    )
    for (node, name), values in var.items():
        if (values < 0).any():
            raise IntegrityError(f"{called}: {node}/{name}.{_SIDES[1]} holds a negative variance")
    instances = tuple(map(Instance.parse, described["instances"]))
    tuned = {
        (Instance.parse(node), name): tensors[f"{node}/{name}"]
        for node, names in (described.get("tuned") or {}).items()
        for name in names
    }
    return Statistics(instances, described["batches"], described["images"], mean, var, tuned)
