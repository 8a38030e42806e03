"""The tables of instances."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from sdpctl.cli.options import Sort
from sdpctl.cli.output import Column, make_table, scaled
from sdpctl.instance import Instance, pareto_optimal
from sdpctl.untrusted import printable

Row = dict[str, Any]

COLUMNS = ("instance", "macs", "params", "relative", "top1", "top5", "loss", "segments")
"""The order of a row's fields wherever it is printed; layers hold canonical JSON, which sorts them."""


def sorted_rows(rows: Sequence[Row], by: Sort) -> list[Row]:
    """Sort rows by a column, the least first; where it is equal, or by instance, in the order they came."""
    rows = [{name: row[name] for name in COLUMNS if name in row} for row in rows]
    if by is Sort.instance:
        return rows
    return sorted(rows, key=lambda row: row[by] if row[by] is not None else 0)


def score_table(title: str, rows: Sequence[Row]) -> Table:
    """Return the table of an evaluation; a `*` marks the Pareto-optimal rows."""
    top5 = any(row["top5"] is not None for row in rows)
    best = pareto_optimal({Instance.parse(row["instance"]): (row["macs"], row["top1"]) for row in rows})
    columns = ["MACs", "relative", "top-1 %", *(["top-5 %"] if top5 else []), "loss"]
    caption = "* Pareto-optimal in MACs and top-1"
    table = make_table(title, [("instance", "left"), *((name, "right") for name in columns), ("", "left")], caption)
    for row in rows:
        optimal = Instance.parse(row["instance"]) in best
        cells = [row["instance"], scaled(row["macs"]), f"{100 * row['relative']:.1f} %", f"{row['top1']:.2f}"]
        cells += [f"{row['top5']:.2f}"] if top5 else []
        table.add_row(*cells, f"{row['loss']:.4f}", "*" if optimal else "", style="bold" if optimal else None)
    return table


def cost_table(title: str, rows: Sequence[Row]) -> Table:
    """Return the table of a profile."""
    columns: list[Column] = [("instance", "left"), ("MACs", "right"), ("relative", "right"), ("params", "right")]
    table = make_table(title, columns)
    for row in rows:
        table.add_row(row["instance"], f"{row['macs']:,}", f"{100 * row['relative']:.1f} %", f"{row['params']:,}")
    return table


def segment_table(row: Row) -> Table:
    """Return the costs of one instance, segment by segment."""
    columns: list[Column] = [
        ("segment", "left"),
        ("in", "right"),
        ("out", "right"),
        ("MACs", "right"),
        ("share", "right"),
        ("params", "right"),
    ]
    table = make_table(f"{row['instance']}: {row['macs']:,} MACs", columns)
    for segment in row["segments"]:
        shapes = (_state(segment[side]) for side in ("in", "out"))
        share = f"{100 * segment['macs'] / row['macs']:.1f} %"
        table.add_row(segment["name"], *shapes, f"{segment['macs']:,}", share, f"{segment['params']:,}")
    return table


def _state(shape: Sequence[int]) -> str:
    """Write the shape of a state; of two pipes, both maps."""
    if len(shape) != 5:
        return "x".join(map(str, shape))
    full, height, width, half, _ = shape
    return f"{full}x{height}x{width}" + (f"+{half}x{(height + 1) // 2}x{(width + 1) // 2}" if half else "")


def search_rows(rows: Sequence[Row]) -> list[Row]:
    """Return rows of a search flat, as a table shows them; only winners have been on the test split."""
    return [
        {name: row[name] for name in ("instance", "macs", "relative")}
        | {
            "images": row["heldout"]["images"],
            "heldout_top1": row["heldout"]["top1"],
            "test_top1": row.get("test", {}).get("top1"),
        }
        for row in rows
    ]


def search_tables(tag: str, result: Row) -> list[Table]:
    """Return the winners of a search beside each other, and the Pareto front; a `*` marks the best on held-out images."""
    seeds = any(run["seed"] for run in result["runs"])
    columns: list[Column] = [("found by", "left"), ("seed", "right"), ("instance", "left")]
    columns = [column for column in columns if seeds or column[0] != "seed"]
    columns += [(name, "right") for name in ("MACs", "relative", "scored", "held-out %", "test %")]
    budget = "at any cost" if result["budget"]["macs"] is None else f"within {scaled(result['budget']['macs'])} MACs"
    caption = (
        f"* the best of all on held-out images; {result['evaluations']} of {result['space']['networks']:,} networks scored"
    )
    winners = make_table(f"{tag}: the best {budget}", [*columns, ("", "left")], caption)
    for run in [*result["runs"], {"run": "full", "seed": "", "evaluations": ""} | result["full"]]:
        (row,) = search_rows([run])
        best = run["instance"] == result["best"]["instance"] and run["run"] != "full"
        cells = [run["run"], *([str(run["seed"])] if seeds else []), row["instance"], scaled(row["macs"])]
        cells += [f"{100 * row['relative']:.1f} %", str(run["evaluations"])]
        cells += [f"{row['heldout_top1']:.2f}", f"{row['test_top1']:.2f}", "*" if best else ""]
        winners.add_row(*cells, style="bold" if best else None)
    columns = [("instance", "left"), *((name, "right") for name in ("MACs", "relative", "images", "held-out %"))]
    front = make_table("Pareto front of the networks scored", columns)
    for row in search_rows(result["pareto"]):
        cells = [row["instance"], scaled(row["macs"]), f"{100 * row['relative']:.1f} %", f"{row['images']:,}"]
        front.add_row(*cells, f"{row['heldout_top1']:.2f}")
    return [winners, front]


def export_table(tag: str, exported: Row) -> Table:
    """Return the instances of an export."""
    options = exported["options"]
    heldout = bool(exported["heldout_images"])
    columns: list[Column] = [("instance", "left"), ("MACs", "right"), ("relative", "right"), ("test %", "right")]
    columns += [("held-out %", "right")] if heldout else []
    table = make_table(tag, columns)
    for row in options:
        cells = [row["instance"], scaled(row["macs"]), f"{100 * row['relative']:.1f} %", f"{row['top1']:.2f}"]
        table.add_row(*cells, *([f"{row['heldout_top1']:.2f}"] if heldout else []))
    return table


def prediction_table(ref: str, result: Row) -> Table:
    """Return the likeliest classes of each image."""
    cost = f"{scaled(result['macs'])} MACs ({100 * result['relative']:.1f} %), {result['milliseconds']:.3g} ms an image"
    table = make_table(f"{ref}: {result['instance']}, {cost}", [("image", "left"), ("class", "left"), ("probability", "right")])
    for image in result["images"]:
        for place, likely in enumerate(image["top"]):
            style = None if place else "bold"
            table.add_row(
                "" if place else printable(image["file"]), likely["class"], f"{100 * likely['probability']:.2f} %", style=style
            )
    return table
