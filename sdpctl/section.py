"""The base class of all recipe sections, and the types of keys that several sections use.

A section is a stdlib dataclass beside its owner, `@dataclass(frozen=True, kw_only=True) class TrainSettings(Section)`. Its
`Args:` are the only description of its keys: the JSON schema of recipes reads them.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainSerializer,
    WithJsonSchema,
)
from pydantic_core import CoreSchema

from sdpctl.budget import Budget, BudgetRange
from sdpctl.errors import UsageError, shortened, shown
from sdpctl.table import Table


class Section:
    """The base of every section: values have exactly the declared type, and unknown keys are refused."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid", "strict": True, "allow_inf_nan": False}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Let a mapping stand for the section: `strict` alone would accept only instances of the dataclass."""
        schema = handler(source)
        of_dataclass: Any = handler.resolve_ref_schema(schema)
        of_dataclass["strict"] = False
        return schema


class NameIn:
    """Marks a text as the name of an entry of a table; the table is looked up when a recipe is read.

    Args:
        table: the table; the JSON schema lists its names.
    """

    def __init__(self, table: Table[Any]) -> None:
        self.table = table

    def _check(self, name: str) -> str:
        if name not in self.table:
            raise ValueError(self.table.unknown(name))
        return name

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return AfterValidator(self._check).__get_pydantic_core_schema__(source, handler)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        names = {"enum": list(self.table)}
        return handler(schema) | ({"anyOf": [names, {"pattern": self.table.pattern}]} if self.table.pattern else names)


def each_once(values: tuple[object, ...] | None) -> tuple[object, ...] | None:
    """Check that a list has no duplicates, and return it.

    Raises:
        ValueError: if a value occurs twice.
    """
    if values is not None and len(set(values)) < len(values):
        raise ValueError(f"each value may occur only once, got {shortened(', '.join(map(str, values)), 200)}")
    return values


def one_is_none(value: object) -> object:
    """Return None for 1, which is what the key means by default, so that both spellings of a recipe have one identity."""
    return None if value == 1 and not isinstance(value, bool) else value


def without_truth(value: object) -> object:
    """Refuse true and false, which a literal number would accept as 1 and 0; return any other value.

    Raises:
        ValueError: if the value is true or false.
    """
    if isinstance(value, bool):
        raise ValueError(f"this should be a number, got {str(value).lower()}")
    return value


def _ratio(value: object) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool) and not 0 < value < 1:
        raise ValueError(f"a ratio is the size kept, above 0 and below 1, for example 0.5; got {value:g}")
    return value


def _all_is_none(value: object) -> object:
    return None if value == "all" else value


def _budget(value: object) -> object:
    if value == "none":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("write a share of `full` as 50%, MACs as 1.2G, 350M or a number, or none")
    try:
        return Budget.parse(value).text
    except UsageError as error:
        raise ValueError(str(error)) from None


def _range(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError(f"write two budgets with two dots between them, as 30%..90% or 50M..1.2G; got {shown(value)}")
    try:
        return str(BudgetRange.parse(value))
    except UsageError as error:
        raise ValueError(str(error)) from None


Ratios = Annotated[
    tuple[Annotated[float, BeforeValidator(_ratio)], ...],
    Field(min_length=1, max_length=100, json_schema_extra={"uniqueItems": True}),
    AfterValidator(each_once),
]
"""Different ratios below 1."""

Points = Annotated[
    Annotated[tuple[str, ...], Field(min_length=1)] | None,
    AfterValidator(each_once),
    BeforeValidator(_all_is_none),
    PlainSerializer(lambda points: "all" if points is None else points),
    WithJsonSchema({"anyOf": [{"const": "all"}, {"type": "array", "items": {"type": "string"}}]}),
]
"""Different points; None, written `all`, for every point."""

MaxMacs = Annotated[
    str | None,
    BeforeValidator(_budget),
    PlainSerializer(lambda budget: "none" if budget is None else budget),
    WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string"}]}),
]
"""The text of a budget; None, written `none`, for no limit."""

MacsRange = Annotated[str, BeforeValidator(_range)]
"""The text of a range of budgets, such as `30%..90%`."""
