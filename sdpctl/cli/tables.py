"""The tables of instances."""

from collections.abc import Sequence
from typing import Any

from sdpctl.cli.layout import Column, Table
from sdpctl.cli.options import Sort
from sdpctl.cli.output import scaled
from sdpctl.instance import Instance, pareto_optimal
from sdpctl.models.registry import shape_text
from sdpctl.uncertainty import count_tied, few_images_note

Row = dict[str, Any]

INSTANCE = Column("instance", folds="+")

COLUMNS = ("instance", "macs", "params", "relative", "top1", "top5", "loss", "segments")
"""The order of a row's fields wherever it is printed; layers hold canonical JSON, which sorts them."""


def sorted_rows(rows: Sequence[Row], by: Sort) -> list[Row]:
    """Sort rows by a column, the least first; where it is equal, or by instance, in the order they came."""
    rows = [{name: row[name] for name in COLUMNS if name in row} for row in rows]
    if by is Sort.instance:
        return rows
    return sorted(rows, key=lambda row: row[by] if row[by] is not None else 0)


def score_table(title: str, rows: Sequence[Row], images: int) -> Table:
    """Return the table of an evaluation on some images; a `*` marks the Pareto-optimal rows."""
    top5 = any(row["top5"] is not None for row in rows)
    best = pareto_optimal({Instance.parse(row["instance"]): (row["macs"], row["top1"]) for row in rows})
    columns = [INSTANCE, Column("MACs", "right"), Column("relative", "right", drop=3), Column("top-1 %", "right")]
    columns += [Column("top-5 %", "right", drop=2)] if top5 else []
    columns += [Column("loss", "right", drop=1), Column("")]
    table = Table(title, columns, ["* Pareto-optimal in MACs and top-1", *_doubts([row["top1"] for row in rows], images)])
    for row in rows:
        optimal = Instance.parse(row["instance"]) in best
        cells = [row["instance"], scaled(row["macs"]), f"{100 * row['relative']:.1f} %", f"{row['top1']:.2f}"]
        cells += [f"{row['top5']:.2f}"] if top5 else []
        table.add_row(*cells, f"{row['loss']:.4f}", "*" if optimal else "", style="bold" if optimal else None)
    return table


def _doubts(scores: Sequence[float], images: int) -> list[str]:
    """Return what is to be said of accuracies on few images, the ties at the top among it."""
    if (said := few_images_note(images)) is None:
        return []
    best = max(scores, default=0)
    equal = count_tied(scores, best)
    return [said, *([f"{equal} instances tie at {best:.2f} %"] if equal > 1 else [])]


def cost_table(title: str, rows: Sequence[Row]) -> Table:
    """Return the table of a profile."""
    columns = [Column("MACs", "right"), Column("relative", "right", drop=2), Column("params", "right", drop=1)]
    table = Table(title, [INSTANCE, *columns])
    for row in rows:
        table.add_row(row["instance"], f"{row['macs']:,}", f"{100 * row['relative']:.1f} %", f"{row['params']:,}")
    return table


def segment_table(row: Row, arch: str) -> Table:
    """Return the costs of one instance of an architecture, segment by segment."""
    columns = [
        Column("segment"),
        Column("in", "right", drop=4),
        Column("out", "right", drop=1),
        Column("MACs", "right"),
        Column("share", "right", drop=2),
        Column("params", "right", drop=3),
    ]
    table = Table(f"{row['instance']}: {row['macs']:,} MACs", columns)
    for segment in row["segments"]:
        shapes = (shape_text(arch, segment[side]) for side in ("in", "out"))
        share = f"{100 * segment['macs'] / row['macs']:.1f} %"
        table.add_row(segment["name"], *shapes, f"{segment['macs']:,}", share, f"{segment['params']:,}")
    return table


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
    columns = [
        Column("found by"),
        *([Column("seed", "right")] if seeds else []),
        INSTANCE,
        Column("MACs", "right", drop=1),
        Column("relative", "right", drop=2),
        Column("scored", "right", drop=3),
        Column("held-out %", "right"),
        Column("test %", "right"),
        Column(""),
    ]
    budget = "at any cost" if result["budget"]["macs"] is None else f"within {scaled(result['budget']['macs'])} MACs"
    caption = (
        f"* the best of all on held-out images; {result['evaluations']} of {result['space']['networks']:,} networks scored"
    )
    best = result["best"]["heldout"]
    found = {run["instance"]: run["heldout"]["top1"] for run in result["runs"]}
    winners = Table(f"{tag}: the best {budget}", columns, [caption, *_doubts([*found.values()], best["images"])])
    for run in [*result["runs"], {"run": "full", "seed": "", "evaluations": ""} | result["full"]]:
        (row,) = search_rows([run])
        first = run["instance"] == result["best"]["instance"] and run["run"] != "full"
        cells = [run["run"], *([str(run["seed"])] if seeds else []), row["instance"], scaled(row["macs"])]
        cells += [f"{100 * row['relative']:.1f} %", str(run["evaluations"])]
        cells += [f"{row['heldout_top1']:.2f}", f"{row['test_top1']:.2f}", "*" if first else ""]
        winners.add_row(*cells, style="bold" if first else None)
    columns = [INSTANCE, Column("MACs", "right"), Column("relative", "right", drop=2), Column("images", "right", drop=1)]
    front = Table("Pareto front of the networks scored", [*columns, Column("held-out %", "right")])
    for row in search_rows(result["pareto"]):
        cells = [row["instance"], scaled(row["macs"]), f"{100 * row['relative']:.1f} %", f"{row['images']:,}"]
        front.add_row(*cells, f"{row['heldout_top1']:.2f}")
    return [winners, front]


def export_table(tag: str, exported: Row) -> Table:
    """Return the instances of an export."""
    options = exported["options"]
    heldout = bool(exported["heldout_images"])
    columns = [INSTANCE, Column("MACs", "right"), Column("relative", "right", drop=1), Column("test %", "right")]
    columns += [Column("held-out %", "right")] if heldout else []
    scores = [row["heldout_top1"] for row in options if heldout]
    table = Table(tag, columns, _doubts(scores, exported["heldout_images"]))
    for row in options:
        cells = [row["instance"], scaled(row["macs"]), f"{100 * row['relative']:.1f} %", f"{row['top1']:.2f}"]
        table.add_row(*cells, *([f"{row['heldout_top1']:.2f}"] if heldout else []))
    return table


def prediction_table(ref: str, result: Row) -> Table:
    """Return the likeliest classes of each image."""
    cost = f"{scaled(result['macs'])} MACs ({100 * result['relative']:.1f} %), {result['milliseconds']:.3g} ms an image"
    columns = [Column("image", folds="/"), Column("class", folds=" "), Column("probability", "right")]
    table = Table(f"{ref}: {result['instance']}, {cost}", columns)
    for image in result["images"]:
        for place, likely in enumerate(image["top"]):
            style = None if place else "bold"
            table.add_row("" if place else image["file"], likely["class"], f"{100 * likely['probability']:.2f} %", style=style)
    return table
