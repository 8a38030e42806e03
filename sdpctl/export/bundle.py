"""A bundle: a folder with the weights once, the statistics of many instances, and what each costs and scores.

| file | holds |
|---|---|
| model.safetensors | the weights, the very bytes of the checkpoint |
| statistics.safetensors | means and variances by tree node |
| bundle.json | the description: network, input, classes, instances, nodes |
| card.md | the same for people |
| SHA256SUMS | the hash of each, as `sha256sum --check` reads it |
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sdpctl import fields
from sdpctl.engine.calibrate import Statistics
from sdpctl.engine.tensors import (
    bytes_to_tensors,
    most_bytes,
    statistics_from_bytes,
    statistics_to_bytes,
    wanted_statistics,
)
from sdpctl.engine.tree import Tree
from sdpctl.errors import DataError, IntegrityError
from sdpctl.export.description import BUNDLE, CARD, FOLDER, STATISTICS, SUMS, WEIGHTS, Description
from sdpctl.instance import check_nodes
from sdpctl.models import empty_model
from sdpctl.models.chain import Chain
from sdpctl.untrusted import DOCUMENT_BYTES, load_json, read_regular


@dataclass(frozen=True)
class Bundle:
    """What a runtime needs.

    Args:
        description: network, input, classes, instances.
        weights: by name.
        statistics: of the instances.
    """

    description: Description
    weights: Mapping[str, Tensor]
    statistics: Statistics


def only_needed(statistics: Statistics, model: Chain, description: Description) -> Statistics:
    """Return the statistics of the nodes that the instances of a description pass, and no others.

    Raises:
        NotFoundError: where an instance has no statistics.
    """
    tree = Tree(model, [option.instance for option in description.options])
    keys = [(node, name) for segment, node in tree.nodes() for name in model.norms(segment)]
    mean, var = ({key: statistics.at(*key)[side] for key in keys} for side in (0, 1))
    return Statistics(tree.instances, statistics.batches, statistics.images, mean, var)


def to_files(description: Description, weights: bytes, statistics: Statistics, card: str) -> dict[str, bytes]:
    """Return the content of a bundle's files by name.

    Args:
        description: of the bundle.
        weights: safetensors.
        statistics: of the instances, and no others.
        card: for people.
    """
    tensors, nodes = statistics_to_bytes(statistics)
    document = json.dumps(description.document() | {"statistics_nodes": nodes}, sort_keys=True, indent=1)
    files = {BUNDLE: f"{document}\n".encode(), CARD: card.encode(), STATISTICS: tensors, WEIGHTS: weights}
    return files | {SUMS: _sums(files)}


def _sums(files: Mapping[str, bytes]) -> bytes:
    return "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in FOLDER if name != SUMS).encode()


_check_nodes = fields.section({"statistics_nodes": check_nodes}, closed=False)

Read = Callable[[str, int], bytes]
"""Returns the content of a file by name; the second argument is the number of bytes that it may have."""


def from_files(files: Mapping[str, bytes], called: str) -> Bundle:
    """Read a bundle from the content of its files; see `open_bundle`."""

    def read(name: str, limit: int) -> bytes:
        if name not in files:
            raise IntegrityError(f"{called}: this bundle lacks {name}; copy or export it again")
        if len(files[name]) > limit:
            raise IntegrityError(
                f"{called}: {name} has {len(files[name]):,} bytes, at most {limit:,} belong there; copy or export it again"
            )
        return files[name]

    return open_bundle(read, called)


def open_bundle(read: Read, called: str) -> Bundle:
    """Read a bundle. Nothing in it is believed: each file is read up to the size that the files before it allow.

    Args:
        read: returns the content of a file.
        called: what to name in an error.

    Raises:
        IntegrityError: where a file is missing, its content is not what its hash says, or is not what belongs there.
    """
    sums, lines = read(SUMS, 2**16), []

    def checked(name: str, limit: int) -> bytes:
        content = read(name, limit)
        lines.append(f"{hashlib.sha256(content).hexdigest()}  {name}\n".encode())
        if lines[-1] not in sums:
            raise IntegrityError(f"{called}: the content of {name} is not what {SUMS} says; copy or export it again")
        return content

    try:
        document = load_json(checked(BUNDLE, DOCUMENT_BYTES))
        _check_nodes(document, "")
        nodes = document.pop("statistics_nodes")
        description = Description.parse(document)
    except ValueError as error:
        raise IntegrityError(f"{called}: {BUNDLE} cannot be understood ({error}); is it of a newer sdpctl?") from error
    checked(CARD, DOCUMENT_BYTES)
    bundle = assemble(description, nodes, checked, called, f"{BUNDLE}: statistics_nodes")
    if b"".join(lines) != sums:
        raise IntegrityError(f"{called}: the content of {SUMS} is not what it should be; copy or export it again")
    return bundle


def assemble(description: Description, nodes: Mapping[str, Any], read: Read, called: str, origin: str) -> Bundle:
    """Read weights and statistics, once they are known to be those of the network that is described.

    Args:
        description: checked, as `nodes` is.
        nodes: which instances and nodes the statistics are of.
        read: returns the content of `WEIGHTS` and of `STATISTICS`.
        called: what to name in an error.
        origin: where `nodes` stands, likewise.

    Raises:
        IntegrityError: where they are of a different network, or lack an instance.
    """
    model = empty_model(description.network)
    shapes = model.state_dict()
    wanted = wanted_statistics(nodes, model, f"{called}: {origin}")
    for number, option in enumerate(description.options):
        if str(option.instance) not in nodes["instances"]:
            raise IntegrityError(f"{called}: options[{number}]: there are no statistics of {option.instance}")
    statistics = read(STATISTICS, most_bytes(wanted))
    weights = read(WEIGHTS, most_bytes(shapes))
    return Bundle(
        description,
        bytes_to_tensors(weights, f"{called}: {WEIGHTS}", shapes),
        statistics_from_bytes(statistics, nodes, wanted, f"{called}: {STATISTICS}"),
    )


def is_bundle(path: Path) -> bool:
    """Say whether a path is meant as a bundle: a folder that has one's description."""
    try:
        return (path / BUNDLE).is_file() or (path / SUMS).is_file()
    except OSError:  # it may be a tag that is too long for a file's name, or lie in a folder of others
        return False


def read_bundle(path: Path) -> Bundle:
    """Read a bundle and check every file.

    Raises:
        DataError: where a file cannot be read.
        IntegrityError: where a file is missing, damaged, or is not what belongs there.
    """

    def read(name: str, limit: int) -> bytes:
        try:
            return read_regular(path / name, limit=limit)
        except FileNotFoundError as error:
            raise IntegrityError(f"{path}: this bundle lacks {name}; copy or export it again") from error
        except OSError as error:
            if error.errno == 0:  # our own refusal of what the operating system would read
                raise IntegrityError(f"{path / name}: {error.strerror}; copy or export this bundle again") from error
            raise DataError(f"{path / name}: this file cannot be read ({error.strerror}); fix its permissions") from error

    return open_bundle(read, str(path))
