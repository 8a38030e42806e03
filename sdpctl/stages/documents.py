"""Checks of the JSON layers of artifacts; keys that no code reads are not checked. Needs no torch."""

from typing import Any

from sdpctl import fields
from sdpctl.export.description import chosen_cascade, evaluated_cascade
from sdpctl.instance import MOST_INSTANCES, instance_text

_COST = {
    "instance": instance_text,
    "macs": fields.whole(1),
    "params": fields.whole(1),
    "relative": fields.number(0, 1e6),
}
_SHAPE = fields.listed(fields.whole(0), 1, 100)
_SEGMENT = fields.section(
    {"name": fields.text(), "in": _SHAPE, "out": _SHAPE, "macs": fields.whole(0), "params": fields.whole(0)}, closed=False
)
_SCORE = {"top1": fields.number(0, 100), "loss": fields.number(0, 1e30)}
_TOP5 = {"top5": fields.number(0, 100)}
_HELDOUT = fields.section({"images": fields.whole(1), **_SCORE}, closed=False)
_TESTED = fields.section({"images": fields.whole(1), **_SCORE}, _TOP5, closed=False)
_CHOICE = {key: check for key, check in _COST.items() if key != "params"}
_FOUND = _CHOICE | {"heldout": _HELDOUT}
_RUN = {"run": fields.text(), "seed": fields.whole(0), "evaluations": fields.whole(0)}
_FINDING = fields.section(_FOUND, {"test": _TESTED}, closed=False)


def _rows(check: fields.Check) -> fields.Check:
    return fields.listed(check, 1, MOST_INSTANCES)


_BY_CLASS = {"by_class": fields.listed(fields.optional(fields.number(0, 100)), 1, 2**24)}
_evaluation: fields.Check = fields.section(
    {"images": fields.whole(1), "rows": _rows(fields.section(_COST | _SCORE, _TOP5 | _BY_CLASS, closed=False))},
    {
        "classes": fields.listed(fields.text(), 1, 2**24),
        "class_images": fields.listed(fields.whole(0), 1, 2**24),
        "cascades": fields.listed(evaluated_cascade, 1, 1000),
    },
    closed=False,
)


def check_evaluation(value: Any, place: str) -> None:
    """Check the table of an evaluation. Those of early versions have no classes, or no accuracies by class.

    Raises:
        ValueError: if a key is missing or not valid; the message names it.
    """
    _evaluation(value, place)
    classes, images = len(value.get("classes") or ()), value.get("class_images")
    by_class = {f"rows[{i}].by_class": row.get("by_class") for i, row in enumerate(value["rows"])}
    for key, values in ({"class_images": images} | by_class).items():
        if values is not None and len(values) != classes:
            raise ValueError(f"{key}: expected a value for each of {classes:,} classes, found {len(values):,}")
    empty = None if images is None else [count == 0 for count in images]
    for key, values in by_class.items():
        if values is not None and empty != [accuracy is None for accuracy in values]:
            raise ValueError(f"{key}: expected null for each class without images, and for these only")


check_profile: fields.Check = fields.section(
    {"rows": _rows(fields.section(_COST, {"segments": fields.listed(_SEGMENT, 1, 10_000)}, closed=False))}, closed=False
)
"""Check the table of a profile."""

check_search: fields.Check = fields.section(
    {
        "best": _FINDING,
        "full": fields.section(_FOUND | {"test": _TESTED}, closed=False),
        "pareto": _rows(_FINDING),
        "runs": fields.listed(fields.section(_FOUND | _RUN | {"test": _TESTED}, closed=False), 1, 10_000),
        "budget": fields.section({}, {"macs": fields.whole(1)}, closed=False),
        "space": fields.section({"networks": fields.whole(1, 10**1000)}, closed=False),
        "evaluations": fields.whole(1),
    },
    closed=False,
)
"""Check the result of a search."""

_SINGLE = fields.section(_CHOICE | _SCORE | {"heldout_top1": fields.number(0, 100)})


def _either(value: Any, place: str) -> None:
    """Accept the row of a cascade or of an instance."""
    (chosen_cascade if isinstance(value, dict) and "cascade" in value else _SINGLE)(value, place)


check_cascade: fields.Check = fields.section(
    {
        "best": chosen_cascade,
        "full": _SINGLE,
        "front": fields.listed(_either, 1, 1000),
        "budget": fields.section({}, {"text": fields.text(), "macs": fields.whole(1)}),
        "images": fields.whole(1),
        "heldout_images": fields.whole(1),
        "candidates": fields.listed(instance_text, 1, MOST_INSTANCES),
    },
    {"single": _SINGLE},
    closed=False,
)
"""Check the document of a chosen cascade."""


check_agent: fields.Check = fields.section(
    {
        "policy": fields.section(
            {
                "entries": fields.listed(fields.text(), 1, 1000),
                "actions": fields.whole(1, 1000),
                "hidden": fields.listed(fields.whole(1, 4096), 1, 8),
                "activation": fields.one_of(("tanh", "relu")),
                "temperature": fields.number(1e-6, 1e6),
            }
        ),
        "ratios": fields.listed(fields.number(1e-9, 1), 1, 1000),
        "proposals": _rows(fields.section(_FOUND | {"budget": fields.whole(1), "test": _TESTED}, closed=False)),
        "evaluations": fields.whole(1),
        "reward": fields.text(),
        "space": fields.section(
            {
                "networks": fields.whole(1, 10**1000),
                "points": fields.listed(fields.text(), 1, 10_000),
                "full": fields.whole(1),
            },
            closed=False,
        ),
    },
    closed=False,
)
"""Check the document of a trained agent."""

_FINITE = fields.number(-1e30, 1e30)

check_trial: fields.Check = fields.section(
    {
        "instance": instance_text,
        "macs": fields.whole(1),
        "runs": fields.listed(fields.text(), 1, 10_000),
        "reward": _FINITE,
        "top1": fields.number(0, 100),
    },
    closed=False,
)
"""Check a network that a search scored."""

check_epoch: fields.Check = fields.section(
    {"epoch": fields.whole(1)},
    {
        "loss": _FINITE,
        "accuracy": fields.number(0, 100),
        "lr": _FINITE,
        "validation": fields.mapped(fields.text(), fields.section({"top1": fields.number(0, 100)}, closed=False)),
    },
    closed=False,
)
"""Check an epoch of a training."""

check_origin: fields.Check = fields.section(
    {"from": fields.text()},
    {"sha256": fields.text(), "weights": fields.text(), "classes": fields.listed(fields.text(), 1, 2**24)},
    closed=False,
)
"""Check a checkpoint's record of the source of its imported weights."""
