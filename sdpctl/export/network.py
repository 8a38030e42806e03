"""One instance as a network of its own, traced by torch.export, written as ONNX or as a .pt2 file.

The files hold weights, graph and metadata, and no trace of where they were made: torch keeps the source line of every node,
which is taken out. Height and width are fixed, the batch is not.
"""

import copy
import io
import json
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from sdpctl.data.loader import Normalise
from sdpctl.engine.calibrate import Statistics
from sdpctl.engine.tree import Tree
from sdpctl.export.description import Description
from sdpctl.instance import Instance
from sdpctl.models.chain import Chain

INPUT, OUTPUT = "images", "logits"

_TRACES = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")
"""What torch.export notes of a node's origin."""


class OneInstance(nn.Module):
    """A chain at one instance, each batch norm with the statistics of that instance.

    Args:
        model: the chain, on the CPU; it is left as it was.
        instance: which.
        statistics: of this instance at least.
        normalise: applied to the uint8 pixels that come in; None where normalised images do.

    Raises:
        NotFoundError: where the instance has no statistics.
    """

    def __init__(self, model: Chain, instance: Instance, statistics: Statistics, normalise: Normalise | None = None) -> None:
        super().__init__()
        self.network = copy.deepcopy(model).to(memory_format=torch.contiguous_format).eval()
        self.instance = instance
        for segment, node in Tree(self.network, [instance]).nodes():
            for name, bn in self.network.norms(segment).items():
                bn.running_mean, bn.running_var = (tensor.clone() for tensor in statistics.at(node, name))
        self.normalise = normalise

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (N, K), of normalised images or of uint8 pixels, (N, C, H, W)."""
        x_NCHW = images if self.normalise is None else images.float() * self.normalise.scale + self.normalise.shift
        logits_NK: Tensor = self.network(x_NCHW, self.instance)
        return logits_NK


def trace(network: OneInstance, in_channels: int, size: int) -> ExportedProgram:
    """Trace a network for images of one size and any number of them."""
    example = torch.zeros(2, in_channels, size, size, dtype=torch.uint8 if network.normalise else torch.float32)
    with torch.no_grad():
        return torch.export.export(network, (example,), dynamic_shapes=({0: Dim("batch", min=1)},), strict=False)


def metadata(description: Description) -> dict[str, Any]:
    """Return what the file of one instance says of itself, as plain data."""
    document = description.document()
    (option,) = document.pop("options")
    return {**document, **option}


def to_program(network: OneInstance, description: Description) -> bytes:
    """Write a network as a .pt2 file, which `torch.export.load` reads; `export.json` in it holds the metadata."""
    program = trace(network, description.network.in_channels, description.input.size)
    for node in program.graph.nodes:
        for key in _TRACES:
            node.meta.pop(key, None)
    content = io.BytesIO()  # a file's name would be in it
    torch.export.save(program, content, extra_files={"export.json": _json(metadata(description))})
    return content.getvalue()


def to_onnx(network: OneInstance, description: Description) -> bytes:
    """Write a network as ONNX: input `images`, output `logits`, the batch dynamic, the metadata as properties of the model.

    The exporter folds a batch norm into the convolution before it.
    """
    from onnx_ir import SymbolicDim
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from torch.onnx import export

    program = trace(network, description.network.in_channels, description.input.size)
    program = program.run_decompositions({torch.ops.aten.adaptive_max_pool2d.default: static_max_pool})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the exporter's own calls
        written = export(program, input_names=[INPUT], output_names=[OUTPUT], dynamo=True, verbose=False)
    assert written is not None
    model = ClearMetadataAndDocStringPass()(written.model).model
    for value in (*model.graph.inputs, *model.graph.outputs, *(out for node in model.graph for out in node.outputs)):
        if value.shape is not None and not isinstance(value.shape[0], int):
            value.shape[0] = SymbolicDim("batch")
    model.metadata_props.update(
        {key: value if isinstance(value, str) else _json(value) for key, value in metadata(description).items()}
    )
    content: bytes = written.model_proto.SerializeToString(deterministic=True)
    return content


WRITERS = {"onnx": to_onnx, "torch-export": to_program}
"""What writes one instance, by format."""


def static_max_pool(x_NCHW: Tensor, size: list[int]) -> tuple[Tensor, Tensor]:
    """Do what `adaptive_max_pool2d` does, for fixed sizes, by gathering and comparing: ONNX has no such operator.

    Output i of n looks at the inputs from floor(i * in / n) to ceil((i + 1) * in / n), as torch's does.

    Returns:
        The maxima, and in the place of their indices zeros, which nothing reads.
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


def _json(value: Mapping[str, Any] | list[Any] | float) -> str:
    return json.dumps(value, sort_keys=True)
