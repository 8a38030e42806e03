"""The section `export` of a recipe. Needs no torch."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, WithJsonSchema

from sdpctl.errors import shown
from sdpctl.export.catalog import FORMATS
from sdpctl.section import MaxMacs, NameIn, Section, each_once

SEVERAL = ("all", "pareto")
"""Words for a list of a bundle's instances: every calibrated instance, and the best of them."""


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
    """An optional stage: one instance, or many in a bundle, for use elsewhere.

    Args:
        format: what is written.
        instance: the instance; `full` by default.
        max_macs: instead: the most accurate instance within this budget, on held-out images.
        from_search: instead: the best instance of the recipe's search; in a bundle its Pareto front too.
        instances: of a bundle: all that are calibrated, pareto, or a list.
        raw_input: the network takes uint8 pixels and normalises them itself.
    """

    format: Annotated[str, NameIn(FORMATS)] = "onnx"
    instance: str | None = None
    max_macs: MaxMacs = None
    from_search: bool = False
    instances: Several = ("all",)
    raw_input: bool = False
