"""An ONNX model in a lower precision: float16, or int8 by onnxruntime's static quantisation.

In both, input and output keep their types. Int8 is written as pairs of QuantizeLinear and DequantizeLinear (QDQ) around the
operators. Weights are int8 with a scale for each output channel. Activations are uint8 with one scale, from the least to the
greatest value that they take on calibration images.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from sdpctl import fields
from sdpctl.errors import BudgetError, ResourceError
from sdpctl.export.catalog import RUNTIME_NAMES, Precision

if TYPE_CHECKING:
    from sdpctl.export.format import Images

LOWER: tuple[Precision, ...] = ("fp16", "int8")
"""The precisions that are checked by their accuracy."""

OWN = "onnxruntime"
"""The runtime in which the accuracies of both precisions are always measured."""


@dataclass(frozen=True, kw_only=True)
class Accuracies:
    """Top-1 accuracies of a network in a lower precision and in float32, on the same test images, in per cent.

    Args:
        name: the lower precision.
        images: number of test images.
        float32_top1: accuracy of the float32 file in onnxruntime.
        top1: accuracy in the lower precision, by runtime; onnxruntime is the first.
        max_drop: the largest loss that was allowed, in percentage points.
        calibration_images: number of training images that gave the ranges of int8; None for fp16.
    """

    name: Precision
    images: int
    float32_top1: float
    top1: dict[str, float]
    max_drop: float
    calibration_images: int | None = None

    def document(self) -> dict[str, Any]:
        """Return the accuracies as plain data."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def require(self, what: str) -> "Accuracies":
        """Check that no runtime loses more accuracy than allowed, and return the accuracies themselves.

        Args:
            what: name of the export in an error.

        Raises:
            BudgetError: if a runtime loses more.
        """
        for runtime, top1 in self.top1.items():
            if (drop := self.float32_top1 - top1) > self.max_drop + 1e-9:  # percentages are rounded
                calibrated = " or export.calibration_images" if self.name == "int8" else ""
                raise BudgetError(
                    f"{what}: on {self.images:,} test images top-1 is {self.float32_top1:.2f} % in float32 and {top1:.2f} % in "
                    f"{self.name} in {runtime_name(runtime)}; a loss of {drop:.2f} points is more than --max-drop "
                    f"{self.max_drop:g}; nothing was written, raise --max-drop{calibrated}, or export float32"
                )
        return self

    def __str__(self) -> str:
        """Return the accuracies as a sentence."""
        parts = (f"{self.name} in {runtime_name(runtime)} {top1:.2f} %" for runtime, top1 in self.top1.items())
        return f"top-1 of {self.images:,} test images: {', '.join(parts)}, float32 {self.float32_top1:.2f} %"


check_accuracies = fields.section(
    {
        "name": fields.one_of(LOWER),
        "images": fields.whole(1),
        "float32_top1": fields.number(0, 100),
        "top1": fields.section({OWN: fields.number(0, 100)}, {name: fields.number(0, 100) for name in RUNTIME_NAMES}),
        "max_drop": fields.number(0, 100),
    },
    {"calibration_images": fields.whole(1)},
)
"""Check the document of accuracies."""


def runtime_name(runtime: str) -> str:
    """Return the name of a runtime as a reader knows it."""
    return RUNTIME_NAMES.get(runtime, runtime)


def to_fp16(content: bytes) -> bytes:
    """Convert a float32 ONNX model to float16, weights and activations.

    Args:
        content: the model.
    """
    _quiet()
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    converted = convert_float_to_float16(onnx.load_from_string(content), keep_io_types=True)
    written: bytes = converted.SerializeToString(deterministic=True)
    return written


def to_int8(content: bytes, images: "Images", *, batch: int, name: str) -> bytes:
    """Quantise a float32 ONNX model to int8.

    Args:
        content: the model.
        images: calibration images as the model takes them, (N, C, H, W).
        batch: number of images per call.
        name: name of the model's input.

    Raises:
        ResourceError: if a temporary folder cannot be written.
    """
    _quiet()
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[Images] = (images[start : start + batch] for start in range(0, len(images), batch))

        def get_next(self) -> dict[str, Any] | None:
            part = next(self.batches, None)
            return None if part is None else {name: part}

    try:
        with TemporaryDirectory(prefix="sdpctl-") as folder:
            source, prepared, written = (Path(folder) / f"{step}.onnx" for step in ("source", "prepared", "written"))
            source.write_bytes(content)
            quant_pre_process(source, prepared, skip_symbolic_shape=True)  # the exporter wrote the shapes
            quantize_static(
                prepared,
                written,
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
            model = onnx.load(written)
    except OSError as error:
        raise ResourceError(
            f"the export cannot be quantised in a temporary folder ({error.strerror or error}); nothing was written; free some "
            "disk space, or set TMPDIR to a folder with enough space"
        ) from error
    used = {node.domain for node in model.graph.node}
    kept = [opset for opset in model.opset_import if opset.domain in used]  # onnxruntime imports all that it knows
    del model.opset_import[:]
    model.opset_import.extend(kept)
    # What onnxruntime notes for its own next step is not part of the description.
    properties = [each for each in model.metadata_props if not each.key.startswith("onnx.")]
    del model.metadata_props[:]
    model.metadata_props.extend(sorted(properties, key=lambda each: each.key))
    result: bytes = model.SerializeToString(deterministic=True)
    return result


def with_properties(content: bytes, properties: dict[str, str]) -> bytes:
    """Return an ONNX model with additional metadata."""
    import onnx

    model = onnx.load_from_string(content)
    for key, value in properties.items():
        model.metadata_props.add(key=key, value=value)
    result: bytes = model.SerializeToString(deterministic=True)
    return result


def _quiet() -> None:
    # Without this variable the import of onnxruntime leaves a file in TMPDIR and reports its use.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
