"""The section `export` of a recipe. Needs no torch."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, WithJsonSchema

from sdpctl.bounds import MOST
from sdpctl.errors import shown
from sdpctl.export.catalog import FORMATS, OPSETS, CheckedIn, Precision
from sdpctl.section import MaxMacs, NameIn, Section, each_once

SEVERAL = ("all", "pareto")
"""Words that stand for a list of instances: every calibrated instance, or the Pareto-optimal ones."""


def _listed(value: object) -> object:
    if isinstance(value, str) and value not in SEVERAL:
        raise ValueError(f"write all, pareto, or a list of instances; got {shown(value)}")
    return (value,) if isinstance(value, str) else value


Several = Annotated[
    tuple[str, ...],
    Field(min_length=1),
    AfterValidator(each_once),
    BeforeValidator(_listed),
    PlainSerializer(lambda texts: texts[0] if texts[0] in SEVERAL else texts),
    WithJsonSchema({"anyOf": [{"enum": list(SEVERAL)}, {"type": "array", "items": {"type": "string"}}]}),
]


@dataclass(frozen=True, kw_only=True)
class ExportSettings(Section):
    """An optional stage: export one instance, or many in a folder, for other programs.

    Args:
        format: name of the format.
        instance: the instance to export; `full` by default.
        max_macs: export the most accurate instance within this budget instead, by accuracy on held-out images; the budget of a
            cascade is for its mean MACs on these images.
        from_search: export the best instance of the recipe's search instead; a format of several instances also gets its Pareto
            front.
        instances: of a bundle or an onnx-folder: `all` for every calibrated instance, `pareto`, or a list.
        raw_input: the exported network takes uint8 pixels and normalises them itself.
        precision: precision of weights and activations: `fp32`, `fp16`, or `int8`.
        max_drop: of fp16 and int8: maximum loss of top-1 accuracy against float32 on the test images, in percentage points.
        calibration_images: of int8: number of training images from which the ranges of the activations are taken.
        opset: version of the ONNX operators; by default the exporter's own.
        check: a second runtime in which the files are checked: `openvino`.
    """

    format: Annotated[str, NameIn(FORMATS)] = "onnx"
    instance: str | None = None
    max_macs: MaxMacs = None
    from_search: bool = False
    instances: Several = ("all",)
    raw_input: bool = False
    precision: Precision = "fp32"
    max_drop: Annotated[float, Field(ge=0, le=100)] = 1.0
    calibration_images: Annotated[int, Field(ge=1, le=MOST)] = 256
    opset: Annotated[int, Field(ge=OPSETS[0], le=OPSETS[-1])] | None = None
    check: CheckedIn | None = None
