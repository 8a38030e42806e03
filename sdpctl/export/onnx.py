"""The format onnx: one instance as an ONNX model, run by onnxruntime."""

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sdpctl.errors import ResourceError, SdpctlError
from sdpctl.export.catalog import CARD, CheckedIn, Precision
from sdpctl.export.description import Description
from sdpctl.export.format import CHUNK, Format, Images, Logits, Source
from sdpctl.export.network import INPUT, OUTPUT, OneInstance, example, metadata, one_instance, trace
from sdpctl.export.outside import ANSWER, run_program
from sdpctl.export.precision import Accuracies, to_fp16, to_int8, with_properties

if TYPE_CHECKING:
    from onnx_ir import Model
    from onnxruntime import InferenceSession
    from torch.export import ExportedProgram

FILE = "model.onnx"

_IN_OPENVINO = f"""{ANSWER}
sys.modules["openvino_telemetry"] = None  # otherwise the import of openvino sends a message over the network
import openvino
settings = {{"INFERENCE_PRECISION_HINT": "f32"}}  # by default it computes in bfloat16 where the CPU can
model = openvino.Core().compile_model("{FILE}", "CPU", settings)
images = numpy.load("images.npy")
answer(numpy.concatenate([model([images[i : i + {CHUNK}]])[0] for i in range(0, len(images), {CHUNK})])[None])
"""

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
        return {FILE: to_onnx(one_instance(source), source.description, source.opset), CARD: source.card.encode()}

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

    def lowered(self, files: Mapping[str, bytes], precision: Precision, images: Callable[[], Images]) -> dict[str, bytes]:
        """Return the files with the model in float16 or int8."""
        model = to_fp16(files[FILE]) if precision == "fp16" else to_int8(files[FILE], images(), batch=CHUNK, name=INPUT)
        return {**files, FILE: model}

    def labelled(self, files: Mapping[str, bytes], accuracies: Accuracies) -> dict[str, bytes]:
        """Return the files with the accuracies as a property `precision` of the model."""
        properties = {"precision": json.dumps(accuracies.document(), sort_keys=True)}
        return {**files, FILE: with_properties(files[FILE], properties)}

    def run_in(self, runtime: CheckedIn, files: Mapping[str, bytes], images: Images) -> Logits:  # noqa: ARG002  there is one
        """Run the model in OpenVINO, in a separate process, in float32 where the model leaves the choice."""
        if find_spec("openvino") is None:
            raise ResourceError("--check openvino: OpenVINO is not installed; run `pip install 'sdpctl[openvino]'`")
        return run_program(_IN_OPENVINO, {FILE: files[FILE]}, images)

    def loading(self, images: str) -> str:
        """Return how to run the model in onnxruntime."""
        return _LOADING.format(images=images)


def to_onnx(network: OneInstance, description: Description, opset: int | None = None) -> bytes:
    """Write a network as ONNX: input `images`, output `logits`, a dynamic batch size, the metadata as properties.

    Args:
        network: the network.
        description: its description.
        opset: version of the ONNX operators; None for the exporter's own.
    """
    properties = {
        key: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for key, value in metadata(description).items()
    }
    return program_to_onnx(trace(network, (example(description),)), [INPUT], [OUTPUT], properties, opset)


def program_to_onnx(
    program: "ExportedProgram",
    inputs: Sequence[str],
    outputs: Sequence[str],
    properties: Mapping[str, str],
    opset: int | None = None,
    *,
    folded: bool = True,
) -> bytes:
    """Write a traced network as ONNX, with a dynamic batch size.

    Args:
        program: the traced network.
        inputs: names of its inputs.
        outputs: names of its outputs.
        properties: metadata of the model.
        opset: version of the ONNX operators; None for the exporter's own.
        folded: fold a batch norm into the convolution before it; otherwise the convolution keeps its weights, and onnxruntime
            folds when it opens the model.

    Raises:
        SdpctlError: if the exporter does not write this version.
    """
    from onnx_ir import SymbolicDim
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from torch.onnx import export

    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):  # from calls inside torch and the exporter
            warnings.simplefilter("ignore", category)
        program = program.run_decompositions({torch.ops.aten.adaptive_max_pool2d.default: static_max_pool})
        written = export(
            program,
            input_names=inputs,
            output_names=outputs,
            opset_version=opset,
            dynamo=True,
            verbose=False,
            optimize=folded,
        )
        assert written is not None
        if not folded:
            _simplify(written.model)
    if opset is not None and (found := written.model.opset_imports[""]) != opset:
        raise SdpctlError(f"the exporter wrote opset {found} instead of {opset}; choose a different opset, or leave it out")
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
    # Otherwise the threads of a session wait in a loop after a call, and take the cores from the next session.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
