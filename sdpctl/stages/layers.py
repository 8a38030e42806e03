"""Write and read the layers of artifacts: weights, statistics and tables. The bytes of a layer depend only on its content.

Importing this needs no torch.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from sdpctl.errors import IntegrityError
from sdpctl.fields import Check
from sdpctl.instance import Instance
from sdpctl.kinds import AGENT_DOCUMENT, IMPORTED, KINDS, MODEL, NODES, POLICY, STATISTICS, TRIALS
from sdpctl.models import create_model, empty_model
from sdpctl.models.settings import ModelSettings
from sdpctl.randomness import derive
from sdpctl.recipe.schema import Recipe
from sdpctl.stages.documents import check_origin
from sdpctl.store import Artifact, Store
from sdpctl.store.layout import canonical
from sdpctl.table import load
from sdpctl.untrusted import DOCUMENT_BYTES, load_json

if TYPE_CHECKING:
    from sdpctl.engine.calibrate import Statistics
    from sdpctl.export.bundle import Read
    from sdpctl.models.chain import Chain
    from sdpctl.search.kept import Agent


def lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    """Return records as JSON lines."""
    return b"".join(canonical(record) + b"\n" for record in records)


def read_records(store: Store, artifact: Artifact, title: str) -> list[dict[str, Any]]:
    """Read a layer of JSON lines.

    Raises:
        IntegrityError: if the layer is damaged, or a line is not an object.
    """
    content = store.read(artifact, title)
    try:
        records = [load_json(line) for line in content.splitlines()]
        if not all(isinstance(record, dict) for record in records):
            raise TypeError("a line is not an object")
    except (ValueError, TypeError) as error:
        raise IntegrityError(f"{artifact.digest}: {title} cannot be understood ({error}); make it again") from error
    return records


def read_checked_records(store: Store, artifact: Artifact, title: str, check: Check) -> list[dict[str, Any]]:
    """Read a layer of JSON lines that a page will show.

    Args:
        store: the store.
        artifact: the artifact.
        title: title of the layer.
        check: check of a record.

    Raises:
        IntegrityError: if the layer is damaged, or a record is not valid; the message names the line and the key.
    """
    records = read_records(store, artifact, title)
    for number, record in enumerate(records, 1):
        try:
            check(record, "")
        except ValueError as error:
            place = f"{artifact.digest}: {title}:{number}"
            raise IntegrityError(f"{place} cannot be understood ({error}); make it again") from error
    return records


def initial_model(recipe: Recipe) -> "Chain":
    """Build a recipe's network on the current default device, with initial weights drawn from the recipe's seed."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(recipe.seed, "weights"))
        return create_model(recipe.model.arch, **recipe.model.arguments)


def renew_head(model: "Chain", seed: int) -> None:
    """Draw the new classifier of a network with pretrained weights from a recipe's seed.

    Args:
        model: a network on the CPU.
        seed: seed of the recipe.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "head"))
        model.renew_head()


def read_model(store: Store, checkpoint: Artifact, section: ModelSettings) -> "Chain":
    """Build a network with a checkpoint's weights, on the CPU.

    Raises:
        IntegrityError: if the weights do not fit the network.
    """
    from sdpctl.engine.tensors import bytes_to_tensors, most_bytes

    model = empty_model(section)
    wanted = model.state_dict()
    content = reader(store, checkpoint)(MODEL, most_bytes(wanted))
    called = f"{checkpoint.digest}: {MODEL} does not fit {section.arch}"
    model.load_state_dict(bytes_to_tensors(content, called, wanted), assign=True)
    return model


def statistics_layers(statistics: "Statistics") -> dict[str, bytes]:
    """Return the layers of BatchNorm statistics: the tensors by tree node, and the list of nodes."""
    from sdpctl.engine.tensors import statistics_to_bytes

    tensors, described = statistics_to_bytes(statistics)
    return {STATISTICS: tensors, NODES: canonical(described)}


def read_statistics(store: Store, artifact: Artifact, model: "Chain") -> "Statistics":
    """Read the statistics of a network's instances.

    Raises:
        IntegrityError: if the statistics do not fit the network.
    """
    from sdpctl.engine.tensors import most_bytes, statistics_from_bytes, wanted_statistics

    nodes = read_document(store, artifact)
    wanted = wanted_statistics(nodes, model, f"{artifact.digest}: {NODES}")
    content = reader(store, artifact)(STATISTICS, most_bytes(wanted))
    return statistics_from_bytes(content, nodes, wanted, f"{artifact.digest}: {STATISTICS}")


def read_agent(store: Store, artifact: Artifact, *, known: bool) -> "Agent":
    """Read a trained agent.

    Args:
        store: the store.
        artifact: the agent's artifact.
        known: read the rewards of the networks that were scored while it learned, too.

    Raises:
        IntegrityError: if the policy does not fit its description.
        UsageError: if the agent was trained on other observations.
    """
    from sdpctl.engine.tensors import bytes_to_tensors, most_bytes
    from sdpctl.search.kept import Agent, check_entries
    from sdpctl.search.policy import Policy, Shaped

    document = read_document(store, artifact)
    described = document["policy"]
    check_entries(described["entries"], f"the agent {artifact.tag or artifact.short}")
    parts = {key: described[key] for key in ("actions", "activation", "temperature")}
    shaped = Shaped(hidden=tuple(described["hidden"]), **parts)
    wanted = shaped.blank()
    content = reader(store, artifact)(POLICY, most_bytes(wanted))
    weights = bytes_to_tensors(content, f"{artifact.digest}: {POLICY} does not fit {AGENT_DOCUMENT}", wanted)
    rewards = {}
    for row in read_records(store, artifact, TRIALS) if known else ():
        rewards[Instance.parse(row["instance"])] = row["reward"]
    return Agent(Policy(shaped, weights), tuple(document["ratios"]), rewards)


def reader(store: Store, artifact: Artifact) -> "Read":
    """Return a function that reads a layer by title, up to a number of bytes.

    The function raises an `IntegrityError` if the layer is larger, missing or damaged.
    """

    def read(title: str, limit: int) -> bytes:
        layers = artifact.layers
        if title not in layers:
            raise IntegrityError(f"{artifact.digest}: this {artifact.kind} has no layer {title}; make it again")
        if layers[title].size > limit:
            raise IntegrityError(f"{artifact.digest}: {title} has {layers[title].size:,} bytes; at most {limit:,} are allowed")
        return store.read(artifact, title)

    return read


def read_document(store: Store, artifact: Artifact) -> dict[str, Any]:
    """Return an artifact's JSON layer: its table, its tree nodes, or the description of an export.

    Raises:
        IntegrityError: if this kind of artifact has no such layer, or the layer is not valid; the message names the key.
    """
    kind = KINDS.get(artifact.kind)
    if kind is None or kind.document is None or kind.check is None:
        known = ", ".join(kind.name for kind in KINDS.values() if kind.document)
        raise IntegrityError(f"{artifact.digest}: this is of kind {artifact.kind}, not one of {known}; make it again")
    return _read_json(store, artifact, kind.document, load(kind.check))


def calibrated_instances(store: Store, statistics: Artifact) -> list[Instance]:
    """Return the instances that stored statistics cover."""
    return [Instance.parse(text) for text in read_document(store, statistics)["instances"]]


def read_origin(store: Store, checkpoint: Artifact) -> dict[str, Any]:
    """Return the recorded source of a checkpoint's imported weights.

    Raises:
        IntegrityError: if the layer is missing or not valid; the message names the key.
    """
    return _read_json(store, checkpoint, IMPORTED, check_origin)


def _read_json(store: Store, artifact: Artifact, title: str, check: Check) -> dict[str, Any]:
    try:
        document: dict[str, Any] = load_json(reader(store, artifact)(title, DOCUMENT_BYTES))
        check(document, "")
    except ValueError as error:
        raise IntegrityError(f"{artifact.digest}: {title} cannot be understood ({error}); make it again") from error
    return document
