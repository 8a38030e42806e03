"""Tensors and statistics as safetensors bytes, and back. Bytes depend on content alone."""

from collections.abc import Mapping
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from sdpctl.engine.calibrate import Statistics
from sdpctl.instance import Instance


def tensors_to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Write tensors as safetensors, each contiguous in its logical order."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def bytes_to_tensors(content: bytes) -> dict[str, Tensor]:
    """Read tensors."""
    return load(content)


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


def statistics_from_bytes(content: bytes, described: Mapping[str, Any]) -> Statistics:
    """Read statistics."""
    tensors = bytes_to_tensors(content)
    keys = [(Instance.parse(node), name) for node, names in described["nodes"].items() for name in names]
    return Statistics(
        tuple(map(Instance.parse, described["instances"])),
        described["batches"],
        described["images"],
        {(node, name): tensors[f"{node}/{name}.running_mean"] for node, name in keys},
        {(node, name): tensors[f"{node}/{name}.running_var"] for node, name in keys},
    )
