"""The charts of a report as Vega-Lite specifications.

They name their data sets; the page, or `with_data`, adds the rows. The page also sets the height of a chart that has a line for
each instance or class.

Colours and fonts are those of light paper. The style sheet of the page replaces the colours of axes and text, so that one
drawing serves light and dark screens and paper.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Spec = dict[str, Any]

FONT = "Inter, 'Segoe UI', 'Helvetica Neue', Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
INK, SOFT, LINE = "#1b2430", "#5a6675", "#d9dfe7"
COLOURS = ("#2f6fdb", "#d9622b", "#17947b", "#9a55c7", "#b98509", "#d04680", "#4f7d2a", "#6b7a90")
SHAPES = ("circle", "diamond", "square", "triangle-up", "cross", "triangle-down", "triangle-right", "triangle-left")

AXES: Mapping[str, str] = {
    "macs": "MACs per image",
    "params": "parameters",
    "latency": "latency per image, ms",
}
"""Title of each axis of cost by the field of a row."""

TEXT: Spec = {"tooltip": {"field": "text", "type": "nominal"}, "description": {"field": "text", "type": "nominal"}}
"""What a mark says: its field `text` is its tooltip, and its label for a screen reader."""

SHADE: Spec = {
    "field": "shade",
    "type": "quantitative",
    "scale": {"type": "sqrt", "domain": [0, 1], "range": ["#dfe9fa", "#2257b0"]},
    "legend": None,
}
"""The colour of a segment: darker where its map is larger."""

CONFIG: Spec = {
    "font": FONT,
    "background": "transparent",
    "view": {"stroke": None},
    "axis": {
        "labelColor": SOFT,
        "labelFontSize": 12,
        "titleColor": INK,
        "titleFontSize": 12,
        "titleFontWeight": 500,
        "titlePadding": 10,
        "gridColor": LINE,
        "domainColor": LINE,
        "tickColor": LINE,
        "labelPadding": 6,
    },
    "axisX": {"grid": False, "tickCount": 8},
    "axisY": {"domain": False, "ticks": False},
    "legend": {
        "labelColor": INK,
        "labelFontSize": 12,
        "title": None,
        "orient": "top",
        "symbolSize": 90,
        "symbolOpacity": 1,
        "labelLimit": 360,
    },
    "title": {"color": INK, "fontSize": 13, "fontWeight": 600, "anchor": "start", "offset": 12},
}


def _colour(names: Sequence[str], field: str = "series") -> Spec:
    """Return the colours of a nominal field; a legend is shown if there are several values."""
    values = [COLOURS[number % len(COLOURS)] for number in range(len(names))]
    legend: Spec | None = {} if len(names) > 1 else None
    return {"field": field, "type": "nominal", "scale": {"domain": list(names), "range": values}, "legend": legend}


def _number(field: str, title: str, *, form: str = "", **axis: Any) -> Spec:
    shown = axis | ({"format": form} if form else {})
    return {"field": field, "type": "quantitative", "title": title, "scale": {"zero": False, "nice": True}, "axis": shown}


def front(series: Sequence[str], cost: str = "macs", accuracy: str = "top-1 accuracy, %") -> Spec:
    """Return the chart of cost against accuracy; a line joins the Pareto-optimal rows of each series.

    Args:
        series: names of the series, in the order of the legend.
        cost: field of the horizontal axis, a key of `AXES`.
        accuracy: title of the vertical axis.
    """
    x = _number(cost, AXES[cost], form="~s" if cost != "latency" else "~r")
    y = _number("top1", accuracy, form="~r")
    shapes = [SHAPES[number % len(SHAPES)] for number in range(len(series))]
    shape = {"field": "series", "type": "nominal", "scale": {"domain": list(series), "range": shapes}}
    marked = {"x": x, "y": y, "color": _colour(series), "shape": shape | {"legend": _colour(series)["legend"]}}
    return {
        "data": {"name": "rows"},
        "height": 360,
        "params": [{"name": "picked", "value": -1}],
        "transform": [{"filter": f"isValid(datum.{cost})"}],
        "layer": [
            {
                "transform": [{"filter": "datum.front"}],
                "mark": {"type": "line", "interpolate": "step-after", "strokeWidth": 1.8, "opacity": 0.45, "aria": False},
                "encoding": {"x": x, "y": y, "color": _colour(series)},
                "name": "pareto",
            },
            {
                "mark": {"type": "point", "filled": True, "cursor": "pointer", "strokeOpacity": 1},
                "encoding": marked
                | {
                    "opacity": {"condition": {"test": "datum.front", "value": 1}, "value": 0.45},
                    "size": {"condition": {"test": "datum.row === picked", "value": 280}, "value": 80},
                    "stroke": {"condition": {"test": "datum.row === picked", "value": INK}, "value": "transparent"},
                    "strokeWidth": {"value": 2.5},
                }
                | TEXT,
                "name": "instances",
            },
        ],
        "config": CONFIG,
    }


def strip() -> Spec:
    """Return the strip of segments: a cell for each segment of each instance, darker where the map is larger.

    The fields of `cells` are `segment` and its `position`, `instance` and its `order`, `side` (height of the map), `shade` (its
    share of the largest height), and `changes`: whether the map is smaller than that of the segment before.
    """
    x = {
        "field": "segment",
        "type": "nominal",
        "sort": {"field": "position", "op": "min"},
        "title": None,
        "axis": {"orient": "top", "labelAngle": -45, "domain": False, "ticks": False, "labelLimit": 120},
    }
    y = {
        "field": "instance",
        "type": "nominal",
        "sort": {"field": "order", "op": "min"},
        "title": None,
        "axis": {"labelLimit": 230, "labelFontSize": 11},
        "scale": {"paddingInner": 0.12},
    }
    return {
        "data": {"name": "cells"},
        "layer": [
            {
                "mark": {"type": "rect", "cornerRadius": 2, "cursor": "pointer"},
                "encoding": {"x": x, "y": y, "color": SHADE} | TEXT,
                "name": "segments",
            },
            {
                "transform": [{"filter": "datum.changes"}],
                "mark": {"type": "text", "fontSize": 10, "fontWeight": 600, "aria": False},
                "encoding": {
                    "x": x,
                    "y": y,
                    "text": {"field": "side"},
                    "color": {"condition": {"test": "datum.shade > 0.25", "value": "#ffffff"}, "value": "#16345f"},
                },
                "name": "sizes",
            },
        ],
        "config": CONFIG,
    }


def spent() -> Spec:
    """Return bars of MACs, stacked by segment: where two instances spend them.

    The fields of `cells` are those of `strip`, and `macs`.
    """
    return {
        "data": {"name": "cells"},
        "mark": {"type": "bar", "stroke": "#ffffff", "strokeWidth": 1},
        "name": "spent",
        "encoding": {
            "x": {
                "field": "macs",
                "type": "quantitative",
                "title": "MACs per image, by segment",
                "axis": {"format": "~s"},
                "stack": "zero",
            },
            "y": {
                "field": "instance",
                "type": "nominal",
                "sort": {"field": "order", "op": "min"},
                "title": None,
                "axis": {"labelLimit": 230},
            },
            "color": SHADE,
            "detail": {"field": "position", "type": "ordinal"},
            "order": {"field": "position", "type": "quantitative"},
            **TEXT,
        },
        "config": CONFIG,
    }


def curve(title: str, series: Sequence[str], *, x: tuple[str, str], kind: str = "linear") -> Spec:
    """Return lines over epochs or evaluations; the fields of `points` are `series`, `value` and the horizontal one.

    Args:
        title: title of the vertical axis.
        series: names of the lines.
        x: field and title of the horizontal axis.
        kind: how points are joined: `linear` or `step-after`.
    """
    return {
        "data": {"name": "points"},
        "height": 220,
        "mark": {"type": "line", "interpolate": kind, "strokeWidth": 2, "point": {"size": 18, "filled": True}},
        "encoding": {
            "x": _number(*x, tickMinStep=1),
            "y": _number("value", title, form="~r"),
            "color": _colour(series),
            "detail": {"field": "series", "type": "nominal"},
            **TEXT,
        },
        "config": CONFIG,
    }


def trials(runs: Sequence[str], budget: int | None) -> Spec:
    """Return the chart of the networks that a search scored; a dashed line marks the budget.

    Args:
        runs: names of the runs.
        budget: MACs of the budget; None if there is none.
    """
    x, y = _number("macs", AXES["macs"], form="~s"), _number("top1", "top-1 on held-out images, %", form="~r")
    layers: list[Spec] = [
        {
            "mark": {"type": "point", "filled": True, "size": 34, "opacity": 0.6},
            "encoding": {"x": x, "y": y, "color": _colour(runs), **TEXT},
            "name": "trials",
        }
    ]
    if budget is not None:
        mark = {"type": "rule", "strokeDash": [5, 4], "strokeWidth": 1.4, "aria": False, "color": SOFT}
        layers.append({"data": {"values": [{"macs": budget}]}, "mark": mark, "encoding": {"x": x}, "name": "budget"})
    return {"data": {"name": "points"}, "height": 260, "layer": layers, "config": CONFIG}


def classes() -> Spec:
    """Return a dot for the accuracy of each class by each of two instances, and a line between the dots of a class.

    The page sets the parameter `labels`, the names of the classes; the fields of `points` are `place` (from 0), `instance`,
    `which` (0 or 1), and `top1`.
    """
    x = _number("top1", "top-1 accuracy of the class, %", form="~r", grid=True)
    y = {
        "field": "place",
        "type": "ordinal",
        "title": None,
        "axis": {"labelLimit": 180, "labelExpr": "labels[datum.value]", "grid": True},
    }
    colour = {"field": "instance", "type": "nominal", "sort": {"field": "which", "op": "min"}}
    return {
        "data": {"name": "points"},
        "params": [{"name": "labels", "value": []}],
        "layer": [
            {
                "mark": {"type": "line", "strokeWidth": 2, "opacity": 0.35, "aria": False, "color": SOFT},
                "encoding": {"x": x, "y": y, "detail": {"field": "place", "type": "ordinal"}},
                "name": "spans",
            },
            {
                "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1},
                "encoding": {
                    "x": x,
                    "y": y,
                    "color": colour | {"scale": {"range": list(COLOURS)}},
                    **TEXT,
                },
                "name": "accuracies",
            },
        ],
        "config": CONFIG,
    }


def runs(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the runs that scored networks, in the order in which they began."""
    return list(dict.fromkeys(run for trial in trials for run in trial["runs"]))


def accuracy_lines(networks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the lines of accuracy over epochs: that of the training batches, and that of each validation."""
    lines = []
    for network in networks:
        validated = dict.fromkeys(name for epoch in network["epochs"] for name in epoch.get("validation") or ())
        trained = ["training"] if any("accuracy" in epoch for epoch in network["epochs"]) else []
        lines += [f"{network['name']}, {name}" for name in [*trained, *(f"validation of {name}" for name in validated)]]
    return lines


def with_data(spec: Spec, **rows: Sequence[Mapping[str, Any]]) -> Spec:
    """Return a chart with the rows of its data sets."""
    return spec | {"datasets": {name: list(values) for name, values in rows.items()}}
