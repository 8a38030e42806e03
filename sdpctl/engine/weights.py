"""Weights from elsewhere: read from a file without running any of it, and compared with a network before they are used."""

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from safetensors.torch import load_file
from torch import Tensor

from sdpctl.errors import DataError, UsageError
from sdpctl.models.chain import Chain
from sdpctl.models.registry import Stem

Weights = dict[str, Tensor]

NESTED = ("state_dict", "model", "model_state_dict")
"""Where training scripts put the weights: the public SDPoint code and most others, torchvision's, the rest."""

TORCHVISION = {name: name for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")} | {
    "resnext50": "resnext50_32x4d"
}
"""Architectures that torchvision has weights of, and its names for them."""

HEAD = ("fc.weight", "fc.bias")
"""What belongs to the classes, and is new where they are others."""


def read_weights(path: Path) -> Weights:
    """Read a state dict: safetensors, or what `torch.save` wrote, by itself or within a training checkpoint.

    A prefix `module.`, which DataParallel leaves, is taken off. A pickle is read with `weights_only`: nothing in it is run.

    Raises:
        DataError: where the file cannot be read, holds more than plain tensors, or no state dict.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle's protocols, which say nothing to a user
            if path.suffix.lower() == ".safetensors":
                loaded: Any = load_file(path)
            else:
                loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it holds {found[1]}" if found else "it is nothing that torch.save wrote"
        raise DataError(
            f"{path}: this file is not plain tensors and was not run ({reason}); write the state dict alone, with "
            "torch.save(model.state_dict(), FILE), or as safetensors"
        ) from error
    except Exception as error:
        text = " ".join(str(error).split())
        reason = (isinstance(error, OSError) and error.strerror) or (text if " " in text else type(error).__name__)
        raise DataError(f"{path}: no weights can be read from this file ({reason}); name another, or fetch it again") from error
    if isinstance(loaded, Mapping):
        loaded = next((loaded[name] for name in NESTED if isinstance(loaded.get(name), Mapping)), loaded)
    if not isinstance(loaded, Mapping) or not loaded or not all(_is_plain(*entry) for entry in loaded.items()):
        raise DataError(f"{path}: this file holds no state dict, tensors by name; nor does a key {', '.join(NESTED)} in it")
    prefix = "module." if all(name.startswith("module.") for name in loaded) else ""
    return {name.removeprefix(prefix): _copied(tensor) for name, tensor in loaded.items()}


def torchvision_weights(arch: str, name: str) -> tuple[Weights, str]:
    """Fetch torchvision's weights of an architecture, and say from where; what torch's hub folder has is not fetched again.

    Args:
        arch: an architecture.
        name: as torchvision names them, for example IMAGENET1K_V2.

    Raises:
        DataError: where they cannot be fetched.
        UsageError: where torchvision has none of that name.
    """
    from torchvision.models import get_model_weights

    if arch not in TORCHVISION:
        raise UsageError(f"--torchvision: torchvision has no weights of {arch}; it has those of {', '.join(TORCHVISION)}")
    known = {weights.name: weights for weights in get_model_weights(TORCHVISION[arch])}
    if name not in known:
        raise UsageError(f"--torchvision {name}: torchvision has {', '.join(known)} of {arch}; choose one")
    url = known[name].url
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            digits = path.stem.rpartition("-")[2]  # of the file's SHA-256, which is checked
            torch.hub.download_url_to_file(url, str(path), digits, progress=False)
        except (URLError, OSError, RuntimeError) as error:
            raise DataError(f"{url}: these weights could not be fetched ({error}); fetch the file and import that") from error
    return read_weights(path), url


def _is_plain(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _copied(tensor: Tensor) -> Tensor:
    """Return a tensor of its own, in single precision: some share their memory."""
    return (tensor.float() if tensor.is_floating_point() else tensor).clone()


def shape_of(weights: Weights) -> tuple[int | None, int | None, Stem | None]:
    """Return the classes, the channels of an image and the stem that weights were made for; None where they do not tell."""
    head, stem = weights.get("fc.weight"), weights.get("conv1.weight")
    classes = head.shape[0] if head is not None and head.dim() == 2 else None
    if stem is None or stem.dim() != 4:
        return classes, None, None
    return classes, stem.shape[1], "imagenet" if stem.shape[-1] == 7 else "small"


def misfits(weights: Weights, model: Chain) -> list[str]:
    """Return a line for every tensor that is missing, not expected, of another shape or type, or not finite.

    Counters of batches, which old checkpoints lack, are not missed.
    """
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in weights and not name.endswith("num_batches_tracked")]
    lines = [f"{name} {tuple(wanted[name].shape)} is missing" for name in missing]
    lines += [f"{name} {tuple(tensor.shape)} is not expected" for name, tensor in weights.items() if name not in wanted]
    for name, tensor in wanted.items():
        if name in weights and weights[name].shape != tensor.shape:
            lines.append(f"{name} is {tuple(weights[name].shape)}, not {tuple(tensor.shape)}")
        elif name in weights and weights[name].dtype != tensor.dtype:
            lines.append(f"{name} is {weights[name].dtype}, not {tensor.dtype}")
        elif name in weights and not weights[name].isfinite().all():
            lines.append(f"{name} holds values that are not finite")
    return lines


def fill(model: Chain, weights: Weights) -> bool:
    """Load weights; where they are of another number of classes, the head stays as it is.

    Returns:
        Whether the head was loaded too.

    Raises:
        DataError: with a line for every tensor that does not fit; nothing is loaded then.
    """
    state = model.state_dict()
    others = all(name in weights and name in state for name in HEAD) and weights[HEAD[0]].shape[0] != state[HEAD[0]].shape[0]
    taken = weights | {name: state[name] for name in HEAD} if others else weights
    if lines := misfits(taken, model):
        raise DataError(*lines)
    model.load_state_dict(state | taken)
    return not others
