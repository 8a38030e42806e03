"""The format onnx: one instance as an ONNX model, run by onnxruntime."""

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sdpctl.errors import SdpctlError
from sdpctl.export.catalog import CARD
from sdpctl.export.description import Description
from sdpctl.export.format import CHUNK, Format, Images, Logits, Source
from sdpctl.export.network import INPUT, OUTPUT, OneInstance, example, metadata, one_instance, trace

if TYPE_CHECKING:
    from onnx_ir import Model
    from onnxruntime import InferenceSession
    from torch.export import ExportedProgram

FILE = "model.onnx"

_LOADING = """\
```python
import onnxruntime

session = onnxruntime.InferenceSession("FILE.onnx")
(logits,) = session.run(None, {{"images": images}})  # {images}
session.get_modelmeta().custom_metadata_map["classes"]  # JSON, as the rest of the description
```
"""


class OnnxFormat(Format):
    """One instance as an ONNX model."""

    def write(self, source: Source) -> dict[str, bytes]:
        """Return the model and the card."""
        return {FILE: to_onnx(one_instance(source), source.description), CARD: source.card.encode()}

    def run(self, files: Mapping[str, bytes], images: Images) -> Logits:
        """Run the model in onnxruntime, in this process."""
        try:
            session = onnx_session(files[FILE])
            chunks = (images[start : start + CHUNK] for start in range(0, len(images), CHUNK))
            return np.concatenate([session.run(None, {INPUT: chunk})[0] for chunk in chunks])[None]
        except Exception as error:
            raise SdpctlError(f"onnxruntime does not run the export ({' '.join(str(error).split())}); report this") from error

    def one_call(self, files: Mapping[str, bytes], image: Images) -> Callable[[], object]:
        """Load the model in onnxruntime, and return a call that runs one image."""
        return partial(onnx_session(files[FILE]).run, None, {INPUT: image})

    def loading(self, images: str) -> str:
        """Return how to run the model in onnxruntime."""
        return _LOADING.format(images=images)


def to_onnx(network: OneInstance, description: Description) -> bytes:
    """Write a network as ONNX: input `images`, output `logits`, a dynamic batch size, the metadata as properties."""
    properties = {
        key: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for key, value in metadata(description).items()
    }
    return program_to_onnx(trace(network, (example(description),)), [INPUT], [OUTPUT], properties)


def program_to_onnx(
    program: "ExportedProgram",
    inputs: Sequence[str],
    outputs: Sequence[str],
    properties: Mapping[str, str],
    *,
    folded: bool = True,
) -> bytes:
    """Write a traced network as ONNX, with a dynamic batch size.

    Args:
        program: the traced network.
        inputs: names of its inputs.
        outputs: names of its outputs.
        properties: metadata of the model.
        folded: fold a batch norm into the convolution before it; otherwise the convolution keeps its weights, and onnxruntime
            folds when it opens the model.
    """
    from onnx_ir import SymbolicDim
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from torch.onnx import export

    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):  # from calls inside torch and the exporter
            warnings.simplefilter("ignore", category)
        program = program.run_decompositions({torch.ops.aten.adaptive_max_pool2d.default: static_max_pool})
        written = export(program, input_names=inputs, output_names=outputs, dynamo=True, verbose=False, optimize=folded)
        assert written is not None
        if not folded:
            _simplify(written.model)
    model = ClearMetadataAndDocStringPass()(written.model).model  # the metadata of nodes names source files
    shape = model.graph.inputs[0].shape
    assert shape is not None
    batch = shape[0]  # torch's name for it
    for value in (*model.graph.inputs, *model.graph.outputs, *(out for node in model.graph for out in node.outputs)):
        if value.shape and value.shape[0] == batch:
            value.shape[0] = SymbolicDim("batch")
    model.metadata_props.update(properties)
    content: bytes = written.model_proto.SerializeToString(deterministic=True)
    return content


def _simplify(model: "Model") -> None:
    """Compute what is constant, and remove what is unused, as the exporter does; but rewrite no operator."""
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants

    fold_constants(model)
    for simplify in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.CommonSubexpressionEliminationPass(),
    ):
        simplify(model)


def static_max_pool(x_NCHW: Tensor, size: list[int]) -> tuple[Tensor, Tensor]:
    """Compute `adaptive_max_pool2d` for fixed sizes by gathering and comparing, since ONNX has no such operator.

    Output i of n covers the inputs from floor(i * in / n) to ceil((i + 1) * in / n), as in torch.

    Returns:
        The maxima; and zeros in the place of their indices, which are never used.
    """
    for dim, out in zip((2, 3), size, strict=True):
        length = int(x_NCHW.shape[dim])
        place = torch.arange(out, device=x_NCHW.device)
        first, last = place * length // out, ((place + 1) * length - 1) // out
        widest = max(((i + 1) * length - 1) // out - i * length // out for i in range(out)) + 1
        maxima = x_NCHW.index_select(dim, first)
        for step in range(1, widest):
            maxima = torch.maximum(maxima, x_NCHW.index_select(dim, torch.minimum(first + step, last)))
        x_NCHW = maxima
    return x_NCHW, torch.zeros_like(x_NCHW, dtype=torch.int64)


def onnx_session(model: bytes | str, threads: int = 0) -> "InferenceSession":
    """Open a model in onnxruntime, on the CPU.

    Args:
        model: the content of the model, or its path.
        threads: number of threads; by default onnxruntime's choice.
    """
    # Without this variable the import of onnxruntime leaves a file in TMPDIR and reports its use.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
