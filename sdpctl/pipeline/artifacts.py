"""What is in an artifact's layers: weights, statistics, tables, as bytes and back. Bytes depend on content alone.

Importing this needs no torch.
"""

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from sdpctl.errors import IntegrityError
from sdpctl.models import create_model
from sdpctl.randomness import derive
from sdpctl.recipe.schema import ModelSection, Recipe
from sdpctl.store import Artifact, Store
from sdpctl.store.layout import canonical

if TYPE_CHECKING:
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
EXPORT = "export.json"
CARD = "card.md"
IMPORTED = "import.json"


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
        return create_model(section.arch, **section.arguments)


def initial_model(recipe: Recipe) -> "Chain":
    """Build a recipe's network with the initial weights that its seed draws, on the current default device."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(recipe.seed, "weights"))
        return create_model(recipe.model.arch, **recipe.model.arguments)


def read_model(store: Store, checkpoint: Artifact, section: ModelSection) -> "Chain":
    """Build a network with a checkpoint's weights, on the CPU.

    Raises:
        IntegrityError: where the weights do not fit the network.
    """
    from sdpctl.engine.tensors import bytes_to_tensors

    model = empty_model(section)
    try:
        model.load_state_dict(bytes_to_tensors(store.read(checkpoint, MODEL)), assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise IntegrityError(f"{checkpoint.digest}: these weights do not fit {section.arch} ({reason})") from error
    return model


def statistics_layers(statistics: "Statistics") -> dict[str, bytes]:
    """Write statistics by tree node, and what they are."""
    from sdpctl.engine.tensors import statistics_to_bytes

    tensors, described = statistics_to_bytes(statistics)
    return {STATISTICS: tensors, NODES: canonical(described)}


def read_statistics(store: Store, artifact: Artifact) -> "Statistics":
    """Read statistics."""
    from sdpctl.engine.tensors import statistics_from_bytes

    return statistics_from_bytes(store.read(artifact, STATISTICS), json.loads(store.read(artifact, NODES)))
