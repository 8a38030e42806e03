"""What is in an artifact's layers: weights, statistics, tables, as bytes and back. Bytes depend on content alone.

Importing this needs no torch.
"""

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from sdpctl.errors import IntegrityError
from sdpctl.instance import Instance
from sdpctl.models import create_model
from sdpctl.recipe.schema import ModelSection
from sdpctl.store import Artifact, Store
from sdpctl.store.layout import canonical

if TYPE_CHECKING:
    from torch import Tensor

    from sdpctl.engine.calibrate import Statistics
    from sdpctl.models.chain import Chain

MODEL = "model.safetensors"
HISTORY = "history.jsonl"
RECIPE = "recipe.yaml"
TRAINING_STATE = "training-state.safetensors"
STATISTICS = "statistics.safetensors"
NODES = "nodes.json"
RESULTS = "results.json"
COSTS = "costs.json"
TRIALS = "trials.jsonl"
RESULT = "result.json"


def tensors_to_bytes(tensors: "Mapping[str, Tensor]") -> bytes:
    """Write tensors as safetensors, each contiguous in its logical order."""
    from safetensors.torch import save

    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def bytes_to_tensors(content: bytes) -> "dict[str, Tensor]":
    """Read tensors."""
    from safetensors.torch import load

    return load(content)


def lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    """Write records as JSON lines."""
    return b"".join(canonical(record) + b"\n" for record in records)


def read_lines(content: bytes) -> list[dict[str, Any]]:
    """Read JSON lines."""
    return [json.loads(line) for line in content.splitlines()]


def empty_model(section: ModelSection) -> "Chain":
    """Build a recipe's network on the meta device: shapes without memory."""
    import torch

    with torch.device("meta"):
        return create_model(section.arch, num_classes=section.num_classes, in_channels=section.in_channels, stem=section.stem)


def read_model(store: Store, checkpoint: Artifact, section: ModelSection) -> "Chain":
    """Build a network with a checkpoint's weights, on the CPU.

    Raises:
        IntegrityError: where the weights do not fit the network.
    """
    model = empty_model(section)
    try:
        model.load_state_dict(bytes_to_tensors(store.read(checkpoint, MODEL)), assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise IntegrityError(f"{checkpoint.digest}: these weights do not fit {section.arch} ({reason})") from error
    return model


def statistics_layers(statistics: "Statistics") -> dict[str, bytes]:
    """Write statistics by tree node: tensors `<node>/<batch norm>.running_mean` and `.running_var`, and what they are."""
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
    return {STATISTICS: tensors_to_bytes(tensors), NODES: canonical(described)}


def read_statistics(store: Store, artifact: Artifact) -> "Statistics":
    """Read statistics."""
    from sdpctl.engine.calibrate import Statistics

    described = json.loads(store.read(artifact, NODES))
    tensors = bytes_to_tensors(store.read(artifact, STATISTICS))
    keys = [(Instance.parse(node), name) for node, names in described["nodes"].items() for name in names]
    return Statistics(
        tuple(map(Instance.parse, described["instances"])),
        described["batches"],
        described["images"],
        {(node, name): tensors[f"{node}/{name}.running_mean"] for node, name in keys},
        {(node, name): tensors[f"{node}/{name}.running_var"] for node, name in keys},
    )
