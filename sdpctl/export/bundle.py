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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from sdpctl.engine.calibrate import Statistics
from sdpctl.engine.tensors import bytes_to_tensors, statistics_from_bytes, statistics_to_bytes
from sdpctl.engine.tree import Tree
from sdpctl.errors import DataError, IntegrityError
from sdpctl.export.description import BUNDLE, Description
from sdpctl.models.chain import Chain

WEIGHTS = "model.safetensors"
STATISTICS = "statistics.safetensors"
CARD = "card.md"
SUMS = "SHA256SUMS"
FOLDER = (BUNDLE, CARD, STATISTICS, WEIGHTS, SUMS)


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


def from_files(files: Mapping[str, bytes], called: str) -> Bundle:
    """Read a bundle from the content of its files.

    Args:
        files: by name.
        called: what to name in an error.

    Raises:
        IntegrityError: where a file is missing or its content is not what its hash says.
    """
    for name in FOLDER:
        if name not in files:
            raise IntegrityError(f"{called}: this bundle lacks {name}; copy or export it again")
    if (sums := _sums(files)) != files[SUMS]:
        damaged = [line.split()[-1] for line in sums.decode().splitlines() if line.encode() not in files[SUMS]]
        raise IntegrityError(
            f"{called}: the content of {', '.join(damaged) or SUMS} is not what {SUMS} says; copy or export it again"
        )
    try:
        document = json.loads(files[BUNDLE])
        nodes = document.pop("statistics_nodes")
        statistics = statistics_from_bytes(files[STATISTICS], nodes)
        return Bundle(Description.parse(document), bytes_to_tensors(files[WEIGHTS]), statistics)
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise IntegrityError(f"{called}: {BUNDLE} cannot be understood ({error}); is it of a newer sdpctl?") from error


def is_bundle(path: Path) -> bool:
    """Say whether a path is meant as a bundle: a folder that has one's description."""
    return (path / BUNDLE).is_file() or (path / SUMS).is_file()


def read_bundle(path: Path) -> Bundle:
    """Read a bundle and check every file.

    Raises:
        DataError: where a file cannot be read.
        IntegrityError: where a file is missing or damaged.
    """
    try:
        files = {name: (path / name).read_bytes() for name in FOLDER}
    except FileNotFoundError as error:
        raise IntegrityError(f"{path}: this bundle lacks {Path(error.filename).name}; copy or export it again") from error
    except OSError as error:
        raise DataError(f"{error.filename}: this file cannot be read ({error.strerror}); mend its rights") from error
    return from_files(files, str(path))
