"""Weights from other tools: read from a file without running code in it, and compared with a network before they are used."""

import argparse
import io
import os
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file
from torch import Tensor

from sdpctl.errors import DataError, UsageError
from sdpctl.models.chain import Chain
from sdpctl.untrusted import open_regular, printable

Weights = dict[str, Tensor]

NESTED = ("state_dict", "model", "model_state_dict", "net", "network")
"""Keys under which training scripts store the weights, the most usual first."""

WRAPPERS = 3
"""Maximum number of nested mappings around a state dict."""

LINES = 10
"""Maximum number of tensors that a message names one by one."""

COUNTER = "num_batches_tracked"
"""The last part of the names of the batch norms' counters; old checkpoints lack them."""

_COMPILED = "_orig_mod."
"""What `torch.compile` adds to the name of each compiled module."""

_EMA = re.compile(r"(^|[._])ema([._]|$)", re.IGNORECASE)


def read_file(path: Path) -> Any:
    """Read a file that `torch.save` wrote, or a safetensors file. A pickle is read with `weights_only`, so its code is not run.

    Raises:
        DataError: if the file cannot be read, is not a regular file, or holds more than plain tensors.
    """
    called = printable(str(path))
    try:
        with open_regular(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about the pickle's protocol, which the user cannot change
            if path.suffix.lower() == ".safetensors":
                return load_file(path)
            _check_archive(file)
            with torch.serialization.safe_globals([argparse.Namespace]):  # training scripts store their options beside weights
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it contains {found[1]}" if found else "torch.save did not write it"
        raise DataError(
            f"{called}: this file is not plain tensors and was not run ({reason}); write only the state dict, with "
            "torch.save(model.state_dict(), FILE), or as safetensors"
        ) from error
    except Exception as error:
        text = printable(" ".join(str(error).split()))
        reason = (isinstance(error, OSError) and error.strerror) or (text if " " in text else type(error).__name__)
        raise DataError(
            f"{called}: no weights can be read from this file ({reason}); name a different file, or fetch it again"
        ) from error


def _check_archive(file: BinaryIO) -> None:
    """Refuse an archive whose members are larger than the archive: torch.save does not compress."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            declared = sum(member.file_size for member in archive.infolist())
        if declared > (size := os.fstat(file.fileno()).st_size):
            raise OSError(0, f"its members hold {declared:,} bytes, the file {size:,}: torch.save writes no such archive")
    file.seek(io.SEEK_SET)


@dataclass(frozen=True)
class Found:
    """The weights of a network within a file.

    Args:
        weights: the tensors by the network's names, with the dtype and memory that they have in the file.
        remarks: one clause for each choice and each renaming.
        head: whether the file has a classifier.
    """

    weights: Weights
    remarks: tuple[str, ...]
    head: bool


@dataclass(frozen=True)
class _Candidate:
    """A place in a file that may hold the weights.

    Args:
        path: the keys that lead to the state dict.
        state: the state dict.
        prefix: prefix of the network's names in the state dict.
        known: number of the network's names in the state dict.
    """

    path: tuple[str, ...]
    state: Weights
    prefix: str
    known: int

    @property
    def ema(self) -> bool:
        """Whether the path or the prefix names an exponential moving average."""
        return any(_EMA.search(part) for part in (*self.path, self.prefix))

    @property
    def rank(self) -> int:
        """The position of the candidate's first key among the usual keys."""
        usual = ("", *NESTED)
        first = self.path[0] if self.path else ""
        return usual.index(first) if first in usual else len(usual)

    def __str__(self) -> str:
        return "`" + shown(".".join((*self.path, self.prefix)).strip(".")) + "`"


def find_weights(loaded: object, network: Chain, called: str, *, ema: bool = False) -> Found:
    """Find the weights of a network in the content of a file, under any nesting and any prefix.

    A classifier with a different name is used as the network's classifier if it is the only linear layer.

    Args:
        loaded: the result of `read_file`.
        network: a network on any device; only its names and the input features of its classifier are used.
        called: name of the file in messages.
        ema: use the exponential moving average of the weights.

    Raises:
        DataError: if there is no state dict, or its tensors are declared larger than the file is.
        UsageError: if the names are not the network's, several places fit equally well, or there is no moving average.
    """
    names = {name for name in network.state_dict() if not name.endswith(COUNTER)}
    places = list(_state_dicts(loaded))
    if not places:
        raise DataError(
            f"{called}: this file has no state dict (tensors by name), neither at its top nor under a key {', '.join(NESTED)}"
        )
    aliases = network.name_aliases
    states = [(path, _uncompiled(state, called)) for path, state in places]
    candidates = [candidate for path, state in states for candidate in _candidates(path, state, names, aliases)]
    most = max((candidate.known for candidate in candidates), default=0)
    needed = sum(not any(part in name for part in network.optional_names) for name in names)
    if 2 * most < needed:
        raise UsageError(_strange(max((state for _, state in places), key=len), most, needed, called))
    candidates = [candidate for candidate in candidates if 2 * candidate.known >= most]
    averages = [candidate for candidate in candidates if candidate.ema]
    plain = [candidate for candidate in candidates if not candidate.ema]
    if ema and not averages:
        raise UsageError(f"--ema: {called} has no moving average of the weights; leave --ema out")
    best = sorted(averages if ema else plain or averages, key=lambda candidate: (-candidate.known, candidate.rank))
    if len(best) > 1 and (best[0].known, best[0].rank) == (best[1].known, best[1].rank):
        raise UsageError(
            f"{called}: {best[0]} and {best[1]} could both be meant; write the state dict that you mean to a separate file"
        )
    taken = best[0]
    remarks = []
    if taken.path:
        remarks.append(f"the weights are those of `{shown('.'.join(taken.path))}`")
    if taken.ema:
        remarks.append("they are an exponential moving average")
    if not taken.ema and averages:
        remarks.append(f"{averages[0]}, an exponential moving average, is left out; --ema takes it")
    others = tuple(candidate.prefix for candidate in candidates if candidate.path == taken.path and candidate is not taken)
    return _renamed(taken, others, network, remarks, called)


def _state_dicts(loaded: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Weights]]:
    """Yield every mapping from names to plain tensors, with the keys that lead to it."""
    if not isinstance(loaded, Mapping) or not loaded:
        return
    if all(_is_plain(*entry) for entry in loaded.items()):
        yield path, dict(loaded)
    elif len(path) < WRAPPERS:
        for name, value in loaded.items():
            if isinstance(name, str):
                yield from _state_dicts(value, (*path, name))


def _is_plain(name: object, value: object) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def _uncompiled(state: Weights, called: str) -> Weights:
    """Remove the prefix of torch.compile from names.

    Raises:
        DataError: if two names are the same without it.
    """
    cleaned = {name.replace(_COMPILED, ""): tensor for name, tensor in state.items()}
    if len(cleaned) < len(state):
        seen = Counter(name.replace(_COMPILED, "") for name in state)
        raise DataError(
            f"{called}: without the prefix `{_COMPILED}`, two tensors are called {shown(seen.most_common(1)[0][0])}"
        )
    return cleaned


def _candidates(
    path: tuple[str, ...], state: Weights, names: AbstractSet[str], aliases: Sequence[tuple[str, str]]
) -> Iterator[_Candidate]:
    """Yield a candidate for each prefix that precedes one of the network's names."""
    depth = max(name.count(".") for name in names) + 1
    known: Counter[str] = Counter()
    for theirs in state:
        name = theirs
        for old, new in aliases:
            name = name.replace(old, new)
        parts = name.rsplit(".", depth)
        for start in range(len(parts)):
            tail = ".".join(parts[start:])
            if tail in names:
                known[name.removesuffix(tail)] += 1
    yield from (_Candidate(path, state, prefix, count) for prefix, count in known.items())


def _strange(state: Weights, known: int, needed: int, called: str) -> str:
    """Return the message for names that are not those of the network."""
    first = next(iter(state))
    prefix = first.partition(".")[0] + "."
    shared = all(name.startswith(prefix) for name in state)
    which = f"they all begin with `{shown(prefix)}`" if shared else f"the first is `{shown(first)}`"
    return (
        f"{called}: this network needs {needed} tensors, but only {known} of their names are among the {len(state):,} in the "
        f"file ({which}); is --arch right?"
    )


def _renamed(taken: _Candidate, others: Sequence[str], network: Chain, remarks: list[str], called: str) -> Found:
    """Return the weights of a candidate under the network's names."""
    prefix, wanted, head = taken.prefix, network.state_dict(), network.head_names
    weights = {name.removeprefix(prefix): tensor for name, tensor in taken.state.items() if name.startswith(prefix)}
    beside = {name: tensor for name, tensor in taken.state.items() if not name.startswith(prefix)}
    if prefix:
        remarks.append(f"the prefix `{shown(prefix)}` is removed from the names")
    for theirs, ours in network.name_aliases:
        new_names = {name: name.replace(theirs, ours) for name in weights}
        short = f"`{theirs.strip('.')}`", f"`{ours.strip('.')}`"
        if any(old != new and new in weights for old, new in new_names.items()):
            raise DataError(f"{called}: it names both a {short[0]} and a {short[1]} of the same block; is --arch right?")
        if new_names.keys() != set(new_names.values()):
            weights = {new_names[name]: tensor for name, tensor in weights.items()}
            remarks.append(f"each {short[0]} counts as {short[1]}")
    if head[0] not in weights:
        own = {name: (weights, name) for name in weights if name not in wanted}
        foreign = {name: (beside, name) for name in beside if not any(other and name.startswith(other) for other in others)}
        parts = [name.rpartition(".")[2] for name in head if name.startswith(f"{network.classifier_name}.")]
        kernel = wanted[head[0]].shape[1:]
        linear = [place for place in (*own.values(), *foreign.values()) if place[0][place[1]].dim() == 1 + len(kernel)]
        if len(linear) == 1 and (layer := _classifier(*linear[0], kernel, parts)) is not None:
            for part in parts:
                weights[f"{network.classifier_name}.{part}"] = linear[0][0].pop(f"{layer}.{part}")
            remarks.append(f"the classifier `{shown(layer)}` counts as `{network.classifier_name}`")
    if beside:
        count = f"{len(beside):,} other tensor{' is' if len(beside) == 1 else 's are'}"
        remarks.append(f"{count} left out, for example `{shown(next(iter(beside)))}`")
    for name in head:
        if name in weights and not _is_whole(weights[name]):
            raise DataError(
                f"{called}: {name} is declared as {tuple(weights[name].shape)}, more than the file holds; save a copy of this "
                "tensor, made with Tensor.contiguous()"
            )
    kinds = {str(tensor.dtype).removeprefix("torch.") for name, tensor in weights.items() if _is_float(name, tensor)}
    if other := sorted(kinds - {"float32"}):
        remarks.append(f"{' and '.join(other)} is converted to float32")
    return Found(weights, tuple(remarks), head[0] in weights)


def _classifier(weights: Weights, name: str, kernel: torch.Size, parts: Sequence[str]) -> str | None:
    """Return the name of the layer that a weight belongs to; None if it cannot be the classifier.

    Args:
        weights: tensors by name.
        name: name of the weight.
        kernel: the shape of the classifier's weight without the classes.
        parts: the parameters of the classifier: `weight`, and mostly `bias`.
    """
    layer, _, part = name.rpartition(".")
    weight, bias = weights[name], weights.get(f"{layer}.bias")
    fits = part == "weight" and weight.shape[1:] == kernel
    same_parts = (bias is not None and bias.shape == weight.shape[:1]) if "bias" in parts else bias is None
    return layer if fits and same_parts else None


def _is_float(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not name.endswith(COUNTER)


def _is_whole(tensor: Tensor) -> bool:
    """Return whether each element has its own memory, so that a copy of the tensor is not larger than the tensor."""
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def shown(name: str) -> str:
    """Return a name that is safe to print, shortened to about 80 characters."""
    text = printable(name)
    return text if len(text) <= 80 else f"{text[:60]}..."


def misfits(weights: Weights, model: Chain) -> list[str]:
    """Return a line for every tensor that is missing, unexpected, non-finite, or has the wrong shape or kind of dtype.

    Counters of batches may be missing, since old checkpoints lack them, and so may tensors that no segment uses. Floats of any
    precision fit, and counters of any dtype. A tensor is copied only after its shape was checked.
    """
    wanted = model.state_dict()
    optional = model.unused_names
    missing = [name for name in wanted if name not in weights and name not in optional and not name.endswith(COUNTER)]
    lines = [f"{name} {tuple(wanted[name].shape)} is missing" for name in missing]
    lines += [f"{shown(name)} {tuple(tensor.shape)} is not expected" for name, tensor in weights.items() if name not in wanted]
    for name, tensor in wanted.items():
        if name not in weights:
            continue
        found, counter = weights[name], name.endswith(COUNTER)
        if found.shape != tensor.shape and not (counter and found.numel() == 1):
            lines.append(f"{name} is {tuple(found.shape)}, not {tuple(tensor.shape)}")
        elif found.is_complex() or (found.is_floating_point() != tensor.is_floating_point() and not counter):
            lines.append(f"{name} is {found.dtype}, not {tensor.dtype}")
        elif not (found.double() if counter else found.to(tensor.dtype)).isfinite().all():
            lines.append(f"{name} holds values that are not finite")
    return lines


def few(lines: Sequence[str]) -> list[str]:
    """Return the first `LINES` lines, and a line with the number of the remaining ones."""
    return [*lines] if len(lines) <= LINES + 1 else [*lines[:LINES], f"... and {len(lines) - LINES} more"]


def fitted(weights: Weights, model: Chain) -> Weights:
    """Return copies of the weights with the model's dtypes and shapes; `misfits` must have accepted the weights."""
    wanted = model.state_dict()
    return {
        name: tensor.detach().to(wanted[name].dtype, copy=True).reshape(wanted[name].shape) for name, tensor in weights.items()
    }


def fill(model: Chain, weights: Weights) -> bool:
    """Load weights; if their number of classes differs from the network's, the network keeps its own classifier.

    Returns:
        Whether the classifier was loaded too.

    Raises:
        DataError: if tensors do not fit, with a line for each of the first; the network is not changed then.
    """
    state, first = model.state_dict(), f"{model.classifier_name}.weight"
    head: tuple[str, ...] = ()
    if first in weights and first in state and weights[first].shape[:1] != state[first].shape[:1]:
        head = tuple(name for name in model.head_names if name in weights)
    taken = weights | {name: state[name] for name in head}
    if lines := misfits(taken, model):
        raise DataError(*few(lines))
    model.load_state_dict(state | fitted(taken, model))
    return not head
