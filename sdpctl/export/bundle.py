"""The format bundle: a folder with the weights once, and the statistics, cost and accuracy of many instances.

| file | content |
|---|---|
| model.safetensors | the weights, byte for byte those of the checkpoint |
| statistics.safetensors | means and variances by tree node |
| bundle.json | the description: network, input, classes, instances, nodes |
| card.md | the model card |
| SHA256SUMS | the hash of each file, as `sha256sum --check` reads it |
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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
from sdpctl.export.catalog import CARD, FORMATS
from sdpctl.export.description import Description
from sdpctl.export.format import CHUNK, SUMS, Format, Images, Logits, Source, sha256sums
from sdpctl.export.latency import read_latencies
from sdpctl.export.outside import ANSWER, run_program
from sdpctl.instance import check_nodes
from sdpctl.models import empty_model
from sdpctl.models.chain import Chain
from sdpctl.untrusted import DOCUMENT_BYTES, load_json, read_regular

BUNDLE = "bundle.json"
STATISTICS = "statistics.safetensors"
WEIGHTS = "model.safetensors"

_PROGRAM = f"""{ANSWER}
import sdpctl, torch
model = sdpctl.load(".", device="cpu")
images = torch.from_numpy(numpy.load("images.npy"))
logits = [[model(chunk, instance=option.instance) for chunk in images.split({CHUNK})] for option in model.instances]
answer(torch.stack([torch.cat(chunks) for chunks in logits]))
"""

_LOADING = """\
```python
import sdpctl

model = sdpctl.load("BUNDLE")  # this folder
logits = model(model.preprocess("photo.jpg"), max_macs="50%")
```

`model.instances` lists the instances; `max_macs`, `max_latency_ms` (after `model.measure_latency()`) or `instance` chooses one,
call by call. `sha256sum --check SHA256SUMS` checks the files.
"""


class BundleFormat(Format):
    """A folder of many instances, among which a call chooses."""

    def write(self, source: Source) -> dict[str, bytes]:
        """Return the files of the bundle, the card among them."""
        return to_files(source.description, source.weights(), source.statistics, source.card)

    def run(self, files: Mapping[str, bytes], images: Images) -> Logits:
        """Run every instance with `sdpctl.load` in a separate process."""
        return run_program(_PROGRAM, files, images)

    def loading(self, images: str) -> str:  # noqa: ARG002  an image file is given to it
        """Return how to load the folder with this package."""
        return _LOADING


@dataclass(frozen=True)
class Bundle:
    """The content of a bundle: what a runtime needs.

    Args:
        description: network, input, classes, instances.
        weights: tensors by name.
        statistics: BatchNorm statistics of the instances.
        latencies: the table of latency.json, if the bundle is a folder that has one.
    """

    description: Description
    weights: Mapping[str, Tensor]
    statistics: Statistics
    latencies: Mapping[str, Any] | None = None


def only_needed(statistics: Statistics, model: Chain, description: Description) -> Statistics:
    """Return the statistics, and the fine-tuned parameters, of the tree nodes that the instances of a description pass.

    Raises:
        NotFoundError: if an instance has no statistics.
    """
    tree = Tree(model, [option.instance for option in description.options])
    keys = [(node, name) for segment, node in tree.nodes() for name in model.norms(segment)]
    mean, var = ({key: statistics.at(*key)[side] for key in keys} for side in (0, 1))
    complete = {instance.among(model.points) for instance in tree.instances}
    tuned = {key: values for key, values in statistics.tuned.items() if key[0] in complete}
    return Statistics(tree.instances, statistics.batches, statistics.images, mean, var, tuned)


def to_files(description: Description, weights: bytes, statistics: Statistics, card: str) -> dict[str, bytes]:
    """Return the content of a bundle's files by name.

    Args:
        description: the description of the bundle.
        weights: the weights as safetensors.
        statistics: statistics of the instances, and no others.
        card: the model card, Markdown.
    """
    tensors, nodes = statistics_to_bytes(statistics)
    document = json.dumps(description.document() | {"statistics_nodes": nodes}, sort_keys=True, indent=1)
    files = {BUNDLE: f"{document}\n".encode(), CARD: card.encode(), STATISTICS: tensors, WEIGHTS: weights}
    return files | {SUMS: sha256sums(files)}


_check_nodes = fields.section({"statistics_nodes": check_nodes}, closed=False)

Read = Callable[[str, int], bytes]
"""Returns the content of a file by name; the second argument is the largest number of bytes that it may have."""


def from_files(files: Mapping[str, bytes], called: str) -> Bundle:
    """Read a bundle from the content of its files; see `open_bundle`."""

    def read(name: str, limit: int) -> bytes:
        if name not in files:
            raise IntegrityError(f"{called}: this bundle lacks {name}; copy or export it again")
        if len(files[name]) > limit:
            raise IntegrityError(
                f"{called}: {name} has {len(files[name]):,} bytes, expected at most {limit:,}; copy or export it again"
            )
        return files[name]

    return open_bundle(read, called)


def open_bundle(read: Read, called: str) -> Bundle:
    """Read a bundle without trusting it: each file is read only up to the size that the files before it allow.

    Args:
        read: returns the content of a file.
        called: the name of the bundle in an error.

    Raises:
        IntegrityError: if a file is missing, does not match its hash, or has content that is not valid.
    """
    sums, lines = read(SUMS, 2**16), []

    def checked(name: str, limit: int) -> bytes:
        content = read(name, limit)
        lines.append(f"{hashlib.sha256(content).hexdigest()}  {name}\n".encode())
        if lines[-1] not in sums:
            raise IntegrityError(f"{called}: the content of {name} does not match {SUMS}; copy or export it again")
        return content

    try:
        document = load_json(checked(BUNDLE, DOCUMENT_BYTES))
        _check_nodes(document, "")
        nodes = document.pop("statistics_nodes")
        description = Description.parse(document)
    except ValueError as error:
        raise IntegrityError(f"{called}: {BUNDLE} cannot be understood ({error}); was it made by a newer sdpctl?") from error
    checked(CARD, DOCUMENT_BYTES)
    bundle = assemble(description, nodes, checked, called, f"{BUNDLE}: statistics_nodes")
    if b"".join(lines) != sums:
        raise IntegrityError(f"{called}: the lines of {SUMS} are not those of this bundle; copy or export it again")
    return bundle


def assemble(description: Description, nodes: Mapping[str, Any], read: Read, called: str, origin: str) -> Bundle:
    """Read weights and statistics, and check that they fit the network that is described.

    Args:
        description: a checked description.
        nodes: the checked document that lists instances and nodes of the statistics.
        read: returns the content of `WEIGHTS` and of `STATISTICS`.
        called: the name of the bundle in an error.
        origin: the place of `nodes` in an error.

    Raises:
        IntegrityError: if weights or statistics belong to a different network, or an instance has no statistics.
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
    """Return whether a path is a folder with the description of a bundle, or with hashes and no file of a different format."""
    others = [form.member for form in FORMATS.values() if form.member not in (None, BUNDLE)]
    try:
        if (path / BUNDLE).is_file():
            return True
        return (path / SUMS).is_file() and not any((path / str(member)).is_file() for member in others)
    except OSError:  # the text may be a tag that is too long for a file name, or the folder may belong to somebody else
        return False


def read_bundle(path: Path, *, latencies: bool = True) -> Bundle:
    """Read a bundle and check every file.

    Args:
        path: the folder.
        latencies: also read latency.json, if there is one.

    Raises:
        DataError: if a file cannot be read.
        IntegrityError: if a file is missing, damaged, or has content that is not valid; or if latency.json is not valid.
    """

    def read(name: str, limit: int) -> bytes:
        try:
            return read_regular(path / name, limit=limit)
        except FileNotFoundError as error:
            raise IntegrityError(f"{path}: this bundle lacks {name}; copy or export it again") from error
        except OSError as error:
            if error.errno == 0:  # `read_regular` refused it, not the operating system
                raise IntegrityError(f"{path / name}: {error.strerror}; copy or export this bundle again") from error
            raise DataError(f"{path / name}: this file cannot be read ({error.strerror}); fix its permissions") from error

    bundle = open_bundle(read, str(path))
    if not latencies:
        return bundle
    return replace(bundle, latencies=read_latencies(path, [str(option.instance) for option in bundle.description.options]))
