"""Measure the latency of exported files, and keep the table of a folder in its latency.json.

A bundle and an onnx-folder have many instances; an .onnx file and a .pt2 file have one. `run.py` of an onnx-folder measures in
the same way, since both use `run_folder.measured`.
"""

import hashlib
import json
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdpctl import fields
from sdpctl.errors import DataError, IntegrityError, NotFoundError, UsageError
from sdpctl.export.format import SUMS
from sdpctl.export.onnx import onnx_session
from sdpctl.export.run_folder import LATENCY, LATENCY_SCHEMA, Network, latency_row, machine, measured
from sdpctl.instance import MOST_INSTANCES, instance_text
from sdpctl.untrusted import DOCUMENT_BYTES, load_json, printable_path, read_regular

_TABLE = fields.section(
    {
        "schema": fields.one_of((LATENCY_SCHEMA,)),
        "machine": fields.section(
            {
                "device": fields.text(200),
                "cores": fields.whole(1, 2**20),
                "threads": fields.whole(1, 2**20),
                "library": fields.text(200),
                "precision": fields.text(20),
            }
        ),
        "rows": fields.listed(
            fields.section(
                {
                    "instance": instance_text,
                    "batch": fields.whole(1, 2**20),
                    "median_ms": fields.number(0, 1e12),
                    "p95_ms": fields.number(0, 1e12),
                    "images_per_second": fields.number(0, 1e18),
                }
            ),
            1,
            64 * MOST_INSTANCES,
        ),
    }
)


@dataclass(frozen=True)
class Latencies:
    """The latencies of one export on one machine.

    Args:
        machine: what they depend on, from `run_folder.machine`.
        rows: a row for each instance and batch size, from `run_folder.latency_row`.
        macs: MACs of each instance by its text; empty for a file without a description.
        full_macs: MACs of `full`, or None.
    """

    machine: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    macs: Mapping[str, int]
    full_macs: int | None

    def document(self) -> bytes:
        """Return the content of latency.json."""
        table = {"schema": LATENCY_SCHEMA, "machine": dict(self.machine), "rows": [dict(row) for row in self.rows]}
        return f"{json.dumps(table, indent=1)}\n".encode()


def read_latencies(folder: Path, instances: Collection[str]) -> dict[str, Any] | None:
    """Read the latency.json of a folder without trusting it; None if there is none.

    Args:
        folder: a bundle or an onnx-folder.
        instances: the texts of its instances.

    Raises:
        DataError: if the file cannot be read.
        IntegrityError: if it is not a table of latencies, or not of these instances.
    """
    path = folder / LATENCY
    again = f"remove it, or run `sdpctl latency {printable_path(folder)}` to measure again"
    try:
        document = load_json(read_regular(path, limit=DOCUMENT_BYTES))
        _TABLE(document, "")
        pairs = [(row["instance"], row["batch"]) for row in document["rows"]]
        wanted = {(instance, batch) for instance in instances for batch in {batch for _, batch in pairs}}
        if len(pairs) != len(set(pairs)):
            raise ValueError("rows: an instance and a batch occur twice")
        for instance, batch in sorted(wanted ^ set(pairs)):
            raise ValueError(f"rows: expected exactly the instances of this folder; {instance}, batch {batch}, differs")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise IntegrityError(f"{printable_path(path)}: this table cannot be used ({error}); {again}") from error
    except OSError as error:
        raise DataError(f"{printable_path(path)}: this file cannot be read ({error.strerror}); {again}") from error
    table: dict[str, Any] = document
    return table


def measure_onnx_folder(
    folder: Path, batches: Sequence[int], repeats: int, threads: int | None, instances: Sequence[str] | None
) -> Latencies:
    """Measure instances of an onnx-folder in onnxruntime, by the folder's own table.

    Raises:
        IntegrityError: if a file does not match its hash.
        NotFoundError: if the folder has no such instance.
    """
    try:
        for line in read_regular(folder / SUMS, limit=2**20).decode().splitlines():
            digest, _, name = line.partition("  ")
            if not fields.is_name(name):
                raise IntegrityError(f"{printable_path(folder)}: {SUMS} names a file outside this folder; export it again")
            if hashlib.sha256(read_regular(folder / name)).hexdigest() != digest:
                raise IntegrityError(f"{printable_path(folder)}: the content of {name} does not match {SUMS}; export it again")
        network = Network(folder, threads)
        macs = {row["instance"]: int(row["macs"]) for row in network.instances}
        files, full = [row["file"] for row in network.instances], int(network.table["full_macs"])
        if not all(map(fields.is_name, files)):
            raise ValueError("the name of a graph leads out of the folder")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise IntegrityError(
            f"{printable_path(folder)}: this onnx-folder cannot be read ({reason}); export it again"
        ) from error
    names = named_among(instances, list(macs), folder)
    document = network.measure(batches, repeats, names)
    return Latencies(document["machine"], document["rows"], macs, full)


def named_among(instances: Sequence[str] | None, known: Sequence[str], path: Path) -> list[str]:
    """Return the instances to measure, all by default.

    Raises:
        NotFoundError: if an instance is not known.
    """
    for name in instances or ():
        if name not in known:
            raise NotFoundError(f"{printable_path(path)} has no instance {name}; it has {', '.join(known)}")
    return list(instances or known)


def measure_onnx(path: Path, batches: Sequence[int], repeats: int, threads: int) -> Latencies:
    """Measure an .onnx file in onnxruntime on the CPU.

    Raises:
        DataError: if the file cannot be read.
        UsageError: if it does not take one batch of images of a known size.
    """
    try:
        session = onnx_session(str(path), threads)
    except Exception as error:
        raise DataError(
            f"{printable_path(path)}: onnxruntime cannot open this file ({' '.join(str(error).split())}); export it again"
        ) from error
    import onnxruntime

    taken = session.get_inputs()
    dtype = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8, "tensor(float16)": np.float16}.get(taken[0].type)
    size = taken[0].shape[1:]
    if len(taken) != 1 or dtype is None or not size or not all(isinstance(length, int) for length in size):
        raise UsageError(f"{printable_path(path)}: this graph does not take one batch of images of a fixed size")
    rows = []
    instance, macs, full = _described(session.get_modelmeta().custom_metadata_map)
    for batch in batches:
        if isinstance(taken[0].shape[0], int) and taken[0].shape[0] != batch:
            raise UsageError(
                f"{printable_path(path)}: this graph takes batches of {taken[0].shape[0]}; give --batch {taken[0].shape[0]}"
            )
        call = partial(session.run, None, {taken[0].name: np.zeros((batch, *size), dtype)})
        rows += [latency_row(name, batch, times) for name, times in measured({instance: call}, repeats).items()]
    return Latencies(machine(f"onnxruntime {onnxruntime.__version__}", threads), rows, macs, full)


@contextmanager
def torch_threads(threads: int | None) -> Iterator[int]:
    """Let torch use a number of threads, by default as many as before, and yield the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_log(name: str) -> Iterator[None]:
    """Silence a logger: torch writes the traceback of an error there, which is also raised."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def measure_pt2(path: Path, batches: Sequence[int], repeats: int, threads: int | None) -> Latencies:
    """Measure a .pt2 file in torch on the CPU.

    Raises:
        DataError: if the file cannot be read, or does not say what it takes.
    """
    extra = {"export.json": ""}
    try:
        with warnings.catch_warnings(), _no_log("torch.export"):
            warnings.filterwarnings("ignore", "The given buffer is not writable")  # torch says this of its own buffer
            model = torch.export.load(path, extra_files=extra).module()
        said = json.loads(extra["export.json"])
        takes, channels = said["input"], said["network"]["in_channels"]
        shape, dtype = (channels, takes["size"], takes["size"]), torch.uint8 if takes["raw"] else torch.float32
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{printable_path(path)}: this is not a .pt2 file of `sdpctl export` ({reason}); export it again"
        ) from error
    rows = []
    instance, macs, full = _described({key: str(said[key]) for key in ("instance", "macs", "full_macs") if key in said})
    for batch in batches:
        call = partial(model, torch.zeros(batch, *shape, dtype=dtype))
        with torch.inference_mode(), torch_threads(threads) as used:
            rows += [latency_row(name, batch, times) for name, times in measured({instance: call}, repeats).items()]
    return Latencies(machine(f"torch {torch.__version__}", used), rows, macs, full)


def _described(said: Mapping[str, str]) -> tuple[str, dict[str, int], int | None]:
    """Return the text of the instance, its MACs, and those of `full`, as far as the metadata of a file says them."""
    instance = said.get("instance", "")
    whole = {key: int(said[key]) for key in ("macs", "full_macs") if said.get(key, "").isdecimal()}
    return instance, {instance: whole["macs"]} if "macs" in whole else {}, whole.get("full_macs")
