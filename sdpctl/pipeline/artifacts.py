"""What is in an artifact's layers: weights, statistics, tables, as bytes and back. Bytes depend on content alone.

Importing this needs no torch.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from sdpctl import fields
from sdpctl.errors import IntegrityError
from sdpctl.export.description import check_export
from sdpctl.instance import MOST_INSTANCES, check_nodes, instance_text
from sdpctl.models import create_model, empty_model
from sdpctl.models.settings import ModelSettings
from sdpctl.randomness import derive
from sdpctl.recipe.schema import Recipe
from sdpctl.store import Artifact, Store
from sdpctl.store.layout import canonical
from sdpctl.untrusted import DOCUMENT_BYTES, load_json

if TYPE_CHECKING:
    from sdpctl.engine.calibrate import Statistics
    from sdpctl.export.bundle import Read
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
IMPORTED = "import.json"
LEFT_OUT = "left-out.json"

_COST = {
    "instance": instance_text,
    "macs": fields.whole(1),
    "params": fields.whole(1),
    "relative": fields.number(0, 1e6),
}
_SHAPE = fields.listed(fields.whole(0), 1, 100)
_SEGMENT = fields.section(
    {"name": fields.text(), "in": _SHAPE, "out": _SHAPE, "macs": fields.whole(0), "params": fields.whole(0)}, closed=False
)
_SCORE = {"top1": fields.number(0, 100), "loss": fields.number(0, 1e30)}
_TOP5 = {"top5": fields.number(0, 100)}
_HELDOUT = fields.section({"images": fields.whole(1), **_SCORE}, closed=False)
_TESTED = fields.section({"images": fields.whole(1), **_SCORE}, _TOP5, closed=False)
_FOUND = {key: check for key, check in _COST.items() if key != "params"} | {"heldout": _HELDOUT}
_RUN = {"run": fields.text(), "seed": fields.whole(0), "evaluations": fields.whole(0)}
_FINDING = fields.section(_FOUND, {"test": _TESTED}, closed=False)


def _rows(check: fields.Check) -> fields.Check:
    return fields.listed(check, 1, MOST_INSTANCES)


_DOCUMENTS: Mapping[str, tuple[str, fields.Check]] = {
    "evaluation": (
        RESULTS,
        fields.section(
            {"images": fields.whole(1), "rows": _rows(fields.section(_COST | _SCORE, _TOP5, closed=False))},
            {"classes": fields.listed(fields.text(), 1, 2**24)},
            closed=False,
        ),
    ),
    "profile": (
        COSTS,
        fields.section(
            {"rows": _rows(fields.section(_COST, {"segments": fields.listed(_SEGMENT, 1, 10_000)}, closed=False))},
            closed=False,
        ),
    ),
    "bn-statistics": (NODES, check_nodes),
    "search": (
        RESULT,
        fields.section(
            {
                "best": _FINDING,
                "full": fields.section(_FOUND | {"test": _TESTED}, closed=False),
                "pareto": _rows(_FINDING),
                "runs": fields.listed(fields.section(_FOUND | _RUN | {"test": _TESTED}, closed=False), 1, 10_000),
                "budget": fields.section({}, {"macs": fields.whole(1)}, closed=False),
                "space": fields.section({"networks": fields.whole(1, 10**1000)}, closed=False),
                "evaluations": fields.whole(1),
            },
            closed=False,
        ),
    ),
    "export": (EXPORT, check_export),
}
"""The layer that is not tensors, by kind, and what it must hold; keys that nothing reads are not looked at."""

_IMPORTED = fields.section({"from": fields.text()}, {"sha256": fields.text()}, closed=False)


def lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    """Write records as JSON lines."""
    return b"".join(canonical(record) + b"\n" for record in records)


def read_records(store: Store, artifact: Artifact, title: str) -> list[dict[str, Any]]:
    """Read a layer of JSON lines.

    Raises:
        IntegrityError: where the layer is damaged, or a line is not an object.
    """
    content = store.read(artifact, title)
    try:
        records = [load_json(line) for line in content.splitlines()]
        if not all(isinstance(record, dict) for record in records):
            raise TypeError("a line is not an object")
    except (ValueError, TypeError) as error:
        raise IntegrityError(f"{artifact.digest}: {title} cannot be understood ({error}); make it again") from error
    return records


def initial_model(recipe: Recipe) -> "Chain":
    """Build a recipe's network with the initial weights that its seed draws, on the current default device."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(recipe.seed, "weights"))
        return create_model(recipe.model.arch, **recipe.model.arguments)


def read_model(store: Store, checkpoint: Artifact, section: ModelSettings) -> "Chain":
    """Build a network with a checkpoint's weights, on the CPU.

    Raises:
        IntegrityError: where the weights do not fit the network.
    """
    from sdpctl.engine.tensors import bytes_to_tensors, most_bytes

    model = empty_model(section)
    wanted = model.state_dict()
    content = reader(store, checkpoint)(MODEL, most_bytes(wanted))
    called = f"{checkpoint.digest}: {MODEL} does not fit {section.arch}"
    model.load_state_dict(bytes_to_tensors(content, called, wanted), assign=True)
    return model


def statistics_layers(statistics: "Statistics") -> dict[str, bytes]:
    """Write statistics by tree node, and what they are."""
    from sdpctl.engine.tensors import statistics_to_bytes

    tensors, described = statistics_to_bytes(statistics)
    return {STATISTICS: tensors, NODES: canonical(described)}


def read_statistics(store: Store, artifact: Artifact, model: "Chain") -> "Statistics":
    """Read the statistics of a network's instances.

    Raises:
        IntegrityError: where they do not fit the network.
    """
    from sdpctl.engine.tensors import most_bytes, statistics_from_bytes, wanted_statistics

    nodes = read_document(store, artifact)
    wanted = wanted_statistics(nodes, model, f"{artifact.digest}: {NODES}")
    content = reader(store, artifact)(STATISTICS, most_bytes(wanted))
    return statistics_from_bytes(content, nodes, wanted, f"{artifact.digest}: {STATISTICS}")


def reader(store: Store, artifact: Artifact) -> "Read":
    """Return what reads layers of an artifact by title, up to a number of bytes.

    Raises:
        IntegrityError: where a layer is larger, missing or damaged.
    """

    def read(title: str, limit: int) -> bytes:
        layers = artifact.layers
        if title not in layers:
            raise IntegrityError(f"{artifact.digest}: this {artifact.kind} lacks its layer {title}; make it again")
        if layers[title].size > limit:
            raise IntegrityError(f"{artifact.digest}: {title} has {layers[title].size:,} bytes, at most {limit:,} belong there")
        return store.read(artifact, title)

    return read


def read_document(store: Store, artifact: Artifact) -> dict[str, Any]:
    """Return what an artifact holds beside tensors: the table, the nodes, what was exported.

    Raises:
        IntegrityError: where the artifact is of a kind without such a document, or naming the key that does not hold what it
            should.
    """
    if artifact.kind not in _DOCUMENTS:
        kinds = ", ".join(_DOCUMENTS)
        raise IntegrityError(f"{artifact.digest}: this is of kind {artifact.kind}, not one of {kinds}; make it again")
    title, check = _DOCUMENTS[artifact.kind]
    return _read_json(store, artifact, title, check)


def read_origin(store: Store, checkpoint: Artifact) -> dict[str, Any]:
    """Return where imported weights came from.

    Raises:
        IntegrityError: naming the key that does not hold what it should.
    """
    return _read_json(store, checkpoint, IMPORTED, _IMPORTED)


def _read_json(store: Store, artifact: Artifact, title: str, check: fields.Check) -> dict[str, Any]:
    try:
        document: dict[str, Any] = load_json(reader(store, artifact)(title, DOCUMENT_BYTES))
        check(document, "")
    except ValueError as error:
        raise IntegrityError(f"{artifact.digest}: {title} cannot be understood ({error}); make it again") from error
    return document
