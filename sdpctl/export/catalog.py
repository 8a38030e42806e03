"""The formats of an export as plain data. Needs no torch."""

from dataclasses import dataclass
from typing import Literal

from sdpctl.table import Table

CARD = "card.md"
"""The model card, which every export has."""

Precision = Literal["fp32", "fp16", "int8"]
"""Precision of an exported network's weights and activations."""

CheckedIn = Literal["openvino"]
"""A runtime that can run the files as an additional check."""

RUNTIME_NAMES = {"openvino": "OpenVINO"}
"""The runtimes of additional checks, as messages and cards name them."""

OPSETS = range(18, 26)
"""The versions of the ONNX operators that the exporter writes: it does not convert to older ones, nor to newer ones."""


@dataclass(frozen=True, kw_only=True)
class FormatInfo:
    """The facts about a format that are known without its code.

    Args:
        name: name of the format in recipes.
        summary: a few words for `--help`.
        suffix: suffix of the file or folder on disk, without the dot.
        files: names of its files, without the card. A format with one file is written as that file, with the card beside it. A
            format with several is written as a folder, which is recognised by the first of them.
        graphs: name of the file of each graph, with `{}` for its number, if the number of files depends on what is exported;
            otherwise None. A format with such files that does not hold `several` instances holds one cascade.
        code: `module:class` of its implementation, a `sdpctl.export.format.Format`.
        several: whether it holds several instances and chooses among them when it runs.
        raw_input: whether it can take uint8 pixels.
        latency: whether the latency of one image can be measured on this machine.
        precisions: precisions in which it can be written.
        opset: whether it consists of ONNX graphs, whose version of the operators can be chosen.
        checks: runtimes that can run its files, besides the one that always does.
    """

    name: str
    summary: str
    suffix: str
    files: tuple[str, ...]
    graphs: str | None = None
    code: str
    several: bool = False
    raw_input: bool = True
    latency: bool = True
    precisions: tuple[Precision, ...] = ("fp32",)
    opset: bool = False
    checks: tuple[CheckedIn, ...] = ()

    @property
    def member(self) -> str | None:
        """The file by which its folder is recognised; None if it is a single file on disk."""
        return self.files[0] if len(self.files) > 1 else None

    @property
    def holds_cascade(self) -> bool:
        """Whether its exports hold one cascade, and nothing else."""
        return self.graphs is not None and not self.several

    @property
    def takes_cascades(self) -> bool:
        """Whether its exports hold chosen cascades."""
        return self.several or self.graphs is not None

    def names(self, graphs: int) -> tuple[str, ...]:
        """Return the names of the files of an export, without the card, given the number of its graphs."""
        return (*self.files, *(() if self.graphs is None else (self.graphs.format(number) for number in range(graphs))))


FORMATS = Table(
    "format",
    [
        FormatInfo(
            name="onnx",
            summary="one instance",
            suffix="onnx",
            files=("model.onnx",),
            code="sdpctl.export.onnx:OnnxFormat",
            precisions=("fp32", "fp16", "int8"),
            opset=True,
            checks=("openvino",),
        ),
        FormatInfo(
            name="torch-export",
            summary="one instance as a .pt2 file",
            suffix="pt2",
            files=("model.pt2",),
            code="sdpctl.export.torch_export:TorchExportFormat",
        ),
        FormatInfo(
            name="bundle",
            summary="a folder of many instances",
            suffix="bundle",
            files=("bundle.json", "statistics.safetensors", "model.safetensors", "SHA256SUMS"),
            code="sdpctl.export.bundle:BundleFormat",
            several=True,
            raw_input=False,
            latency=False,
        ),
        FormatInfo(
            name="onnx-cascade",
            summary="a folder of a cascade's members and a program that runs them",
            suffix="onnx-cascade",
            files=("policy.json", "run.py", "SHA256SUMS"),
            graphs="member{}.onnx",
            code="sdpctl.export.onnx_cascade:OnnxCascadeFormat",
            latency=False,
            opset=True,
        ),
        FormatInfo(
            name="onnx-folder",
            summary="a folder of many instances and a program that runs them by onnxruntime",
            suffix="onnx-folder",
            files=("instances.json", "run.py", "weights.bin", "SHA256SUMS"),
            graphs="graph{}.onnx",
            code="sdpctl.export.onnx_folder:OnnxFolderFormat",
            several=True,
            latency=False,
            opset=True,
        ),
    ],
)
