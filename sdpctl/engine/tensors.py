"""Tensors and statistics as safetensors bytes, and back. Bytes depend on content alone."""

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
"""The most that a safetensors header says of one tensor, and of the file itself."""

_DTYPES = {torch.float32: "F32", torch.int64: "I64"}
"""What safetensors calls the dtypes of a network's tensors."""

_SIDES = ("running_mean", "running_var")


def tensors_to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Write tensors as safetensors, each contiguous in its logical order."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def bytes_to_tensors(content: bytes, called: str, wanted: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Read tensors; those that are not wanted are refused by the header, before they take memory.

    Args:
        content: safetensors.
        called: names the content in an error.
        wanted: exactly the tensors that must be there, of these dtypes and shapes; their values do not count. Any by default.

    Raises:
        IntegrityError: where the content is not safetensors, or the tensors are not those wanted, or not finite.
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
    """Return the size that a safetensors file of these tensors has at most."""
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
    """Write statistics by tree node: tensors `<node>/<batch norm>.running_mean` and `.running_var`.

    Returns:
        The tensors, and plain data that says which instances and nodes they are of.
    """
    tensors: dict[str, Tensor] = {}
    nodes: dict[str, list[str]] = {}
    for (node, name), mean in statistics.mean.items():
        tensors[f"{node}/{name}.running_mean"] = mean
        tensors[f"{node}/{name}.running_var"] = statistics.var[node, name]
        nodes.setdefault(str(node), []).append(name)
    described = {
        "batches": statistics.batches,
        "images": statistics.images,
        "instances": [str(instance) for instance in statistics.instances],
        "nodes": nodes,
    }
    return tensors_to_bytes(tensors), described


def wanted_statistics(described: Mapping[str, Any], model: Chain, called: str) -> dict[str, Tensor]:
    """Return the tensors that the statistics of a network's instances must be: of these dtypes and shapes.

    Args:
        described: checked plain data that says which instances and nodes they are of.
        model: the network, on any device.
        called: names the plain data in an error.

    Raises:
        IntegrityError: where a node or a batch norm is not the network's, or an instance lacks its statistics.
    """
    norms = {name: bn for segment in model.segments() for name, bn in model.norms(segment).items()}
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
    return wanted


def statistics_from_bytes(
    content: bytes, described: Mapping[str, Any], wanted: Mapping[str, Tensor], called: str
) -> Statistics:
    """Read statistics.

    Args:
        content: safetensors.
        described: checked plain data that says which instances and nodes they are of.
        wanted: what `wanted_statistics` says of it.
        called: names the content in an error.

    Raises:
        IntegrityError: where the tensors are not those wanted, not finite, or a variance is negative.
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
    return Statistics(instances, described["batches"], described["images"], mean, var)
