"""The tables that commands show."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from sdpctl.cli.options import Sort
from sdpctl.cli.row_table import Column, RowTable, scaled
from sdpctl.cli.rows import (
    ArchitectureRow,
    ArtifactRow,
    CascadeScoreRow,
    CheckRow,
    ChoiceRow,
    ClassRow,
    CostRow,
    ExportRow,
    FindingRow,
    LatencyRow,
    LayerRow,
    LineageRow,
    MemberRow,
    PointRow,
    PredictionRow,
    ProfileRow,
    ProposalRow,
    RecipeRow,
    ScoreRow,
    SearchRow,
    SegmentRow,
    SharedRow,
    SplitRow,
    StepRow,
    WinnerRow,
)
from sdpctl.export.precision import Accuracies
from sdpctl.instance import pareto_optimal
from sdpctl.models.registry import shape_text
from sdpctl.uncertainty import count_tied, few_images_note
from sdpctl.untrusted import printable_path

if TYPE_CHECKING:
    from sdpctl.data.survey import Survey
    from sdpctl.plan import Step

MOST_CLASSES = 20
"""Maximum number of classes that the table of a folder shows."""

MOST_COLUMNS = 4
"""Maximum number of instances that have a column each in the table of classes."""

AnyCostRow = TypeVar("AnyCostRow", bound=CostRow)


class OfInstance(Protocol):
    """A row of an instance."""

    @property
    def instance(self) -> str:
        """Its text."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image."""

    @property
    def relative(self) -> float:
        """MACs as a share of those of `full`."""


INSTANCE: Column[OfInstance] = Column("instance", lambda row: row.instance, folds="+")
MACS: Column[OfInstance] = Column("MACs", lambda row: scaled(row.macs), "right")
RELATIVE: Column[OfInstance] = Column("relative", lambda row: _share(row.relative), "right")


def sorted_rows(rows: Sequence[AnyCostRow], by: Sort) -> list[AnyCostRow]:
    """Sort rows by a column in ascending order; rows with equal values, and all rows with `instance`, keep their order."""
    return list(rows) if by is Sort.instance else sorted(rows, key=lambda row: getattr(row, by) or 0)


def score_table(title: str, rows: Sequence[ScoreRow], images: int, notes: Sequence[str] = ()) -> RowTable[ScoreRow]:
    """Return the table of an evaluation; a `*` marks the Pareto-optimal rows.

    Args:
        title: above the table.
        rows: the instances.
        images: number of images that the instances were scored on.
        notes: more lines below the table.
    """
    best = pareto_optimal({row.instance: (row.macs, row.top1) for row in rows})
    cascades = any(isinstance(row, CascadeScoreRow) for row in rows)

    def optimal(row: ScoreRow) -> bool:
        return row.instance in best

    columns: list[Column[ScoreRow]] = [replace(INSTANCE, folds="/+") if cascades else INSTANCE, MACS, replace(RELATIVE, drop=3)]
    if cascades:
        columns.append(Column("leave %", _left, "right", drop=4))
    columns.append(Column("top-1 %", lambda row: _percent(row.top1), "right"))
    if any(row.top5 is not None for row in rows):
        columns.append(Column("top-5 %", lambda row: _percent(row.top5), "right", drop=2))
    columns.append(Column("loss", lambda row: f"{row.loss:.4f}", "right", drop=1))
    columns.append(Column("", lambda row: "*" if optimal(row) else ""))
    caption = ["* Pareto-optimal in MACs and top-1", *_doubts([row.top1 for row in rows], images), *notes]
    caption += ["the MACs of a cascade are the mean over these images"] if cascades else []
    return RowTable(columns, rows, [title], caption, bold=optimal)


def _left(row: ScoreRow) -> str:
    """Return the share of images that leave at each member of a cascade; empty for an instance."""
    return " / ".join(f"{share:.0f}" for share in row.left) if isinstance(row, CascadeScoreRow) else ""


def class_table(rows: Sequence[ClassRow], instances: Sequence[OfInstance]) -> RowTable[ClassRow]:
    """Return the accuracies by class of an evaluation, those with the lowest accuracy of the largest instance first.

    A few instances have a column each. Of many, the table shows the largest, and the lowest and highest accuracy of the others.

    Args:
        rows: the classes.
        instances: the instances.
    """
    by_cost = sorted(instances, key=lambda row: (row.macs, row.instance == "full"))
    *others, largest = [row.instance for row in by_cost]
    columns: list[Column[ClassRow]] = [
        Column("class", lambda row: row.class_, folds=" "),
        Column("images", lambda row: f"{row.images:,}", "right", drop=4),
    ]
    if len(by_cost) <= MOST_COLUMNS:
        columns += [_class_column(text, drop) for drop, text in zip((1, 2, 3), others, strict=False)]
    columns.append(_class_column(largest))
    if len(by_cost) > MOST_COLUMNS:
        lowest, highest = (_extreme(others, choose) for choose in (min, max))
        columns.append(Column("lowest %", lambda row: _percent(lowest(row)[0]), "right"))
        columns.append(Column("lowest by", lambda row: lowest(row)[1], drop=2))
        columns.append(Column("highest %", lambda row: _percent(highest(row)[0]), "right", drop=1))
        columns.append(Column("highest by", lambda row: highest(row)[1], drop=3))
    ordered = sorted(rows, key=lambda row: (row.images == 0, row.top1[largest]))
    return RowTable(columns, ordered, ["top-1 % by class"], [f"the classes on which {largest} is least accurate come first"])


def _class_column(text: str, drop: int = 0) -> Column[ClassRow]:
    return Column(text, lambda row: _percent(row.top1[text]), "right", drop, folds="+")


def _extreme(texts: Sequence[str], choose: Callable[..., str]) -> Callable[[ClassRow], tuple[float | None, str]]:
    """Return a function from a class to the lowest or highest accuracy and its instance, the cheapest of several."""

    def extreme(row: ClassRow) -> tuple[float | None, str]:
        if not row.images:
            return None, ""
        text = choose(texts, key=lambda text: row.top1[text])
        return row.top1[text], text

    return extreme


def cost_table(title: str, rows: Sequence[CostRow]) -> RowTable[CostRow]:
    """Return the table of a profile."""
    columns: list[Column[CostRow]] = [
        INSTANCE,
        Column("MACs", lambda row: f"{row.macs:,}", "right"),
        replace(RELATIVE, drop=2),
        Column("params", lambda row: f"{row.params:,}", "right", drop=1),
    ]
    return RowTable(columns, rows, [title])


def segment_table(profile: ProfileRow, arch: str) -> RowTable[SegmentRow]:
    """Return the costs of the segments of one instance of an architecture."""
    columns: list[Column[SegmentRow]] = [
        Column("segment", lambda row: row.name),
        Column("in", lambda row: shape_text(arch, row.in_), "right", drop=4),
        Column("out", lambda row: shape_text(arch, row.out), "right", drop=1),
        Column("MACs", lambda row: f"{row.macs:,}", "right"),
        Column("share", lambda row: _share(row.macs / profile.macs), "right", drop=2),
        Column("params", lambda row: f"{row.params:,}", "right", drop=3),
    ]
    return RowTable(columns, profile.segments, [f"{profile.instance}: {profile.macs:,} MACs"])


def winner_table(tag: str, result: Mapping[str, Any]) -> RowTable[WinnerRow]:
    """Return the winners of a search and `full`; a `*` marks the most accurate winner on held-out images.

    Args:
        tag: tag of the search.
        result: result of the search.
    """
    best = SearchRow.read(result["best"])
    runs = [WinnerRow.read(run) for run in result["runs"]]
    full = WinnerRow.read({"run": "full"} | result["full"])

    def first(row: WinnerRow) -> bool:
        return row.instance == best.instance and row.run != "full"

    columns: list[Column[WinnerRow]] = [Column("found by", lambda row: row.run)]
    if any(row.seed for row in runs):
        columns.append(Column("seed", lambda row: "" if row.seed is None else str(row.seed), "right"))
    columns += [INSTANCE, replace(MACS, drop=1), replace(RELATIVE, drop=2)]
    columns.append(Column("scored", lambda row: "" if row.evaluations is None else str(row.evaluations), "right", drop=3))
    columns.append(Column("held-out %", lambda row: _percent(row.heldout_top1), "right"))
    columns.append(Column("test %", lambda row: _percent(row.test_top1), "right"))
    columns.append(Column("", lambda row: "*" if first(row) else ""))
    limit = result["budget"]["macs"]
    budget = "at any cost" if limit is None else f"within {scaled(limit)} MACs"
    scored = f"{result['evaluations']} of {result['space']['networks']:,} networks scored"
    accuracies = {row.instance: row.heldout_top1 for row in runs}
    caption = [f"* the best of all on held-out images; {scored}", *_doubts([*accuracies.values()], best.images)]
    return RowTable(columns, [*runs, full], [f"{tag}: the best {budget}"], caption, bold=first)


def pareto_table(result: Mapping[str, Any]) -> RowTable[SearchRow]:
    """Return the Pareto front of the networks that a search scored.

    Args:
        result: result of the search.
    """
    columns: list[Column[SearchRow]] = [INSTANCE, MACS, replace(RELATIVE, drop=2)]
    columns.append(Column("images", lambda row: f"{row.images:,}", "right", drop=1))
    columns.append(Column("held-out %", lambda row: _percent(row.heldout_top1), "right"))
    rows = [SearchRow.read(network) for network in result["pareto"]]
    return RowTable(columns, rows, ["Pareto front of the networks scored"])


def proposal_table(tag: str, document: Mapping[str, Any]) -> RowTable[ProposalRow]:
    """Return the networks that an agent proposes for budgets of its range, and `full`.

    Args:
        tag: tag of the agent.
        document: document of the agent.
    """
    rows = [ProposalRow.read(row) for row in [*document["proposals"], document["full"]]]
    columns: list[Column[ProposalRow]] = [
        Column("budget", lambda row: "" if row.budget is None else scaled(row.budget), "right"),
        INSTANCE,
        replace(MACS, drop=1),
        replace(RELATIVE, drop=2),
        Column("held-out %", lambda row: _percent(row.heldout_top1), "right"),
        Column("test %", lambda row: _percent(row.test_top1), "right"),
    ]
    scored = f"learned from {document['evaluations']} of {document['space']['networks']:,} networks"
    return RowTable(columns, rows, [f"{tag}: what the agent proposes"], [scored])


def _choice_columns() -> list[Column[ChoiceRow]]:
    return [
        Column("cascade or instance", lambda row: row.choice, folds="/+"),
        Column("mean MACs", lambda row: scaled(row.macs), "right", drop=1),
        Column("relative", lambda row: _share(row.relative), "right"),
        Column("worst", lambda row: scaled(row.worst_macs), "right", drop=3),
        Column("held-out %", lambda row: _percent(row.heldout_top1), "right", drop=2),
        Column("test %", lambda row: _percent(row.top1), "right"),
    ]


def _compared(macs: int, other: int, name: str) -> str:
    """Return how far a number of MACs is below or above another one."""
    off = 100 * (macs / other - 1)
    return f"{abs(off):.2f} % {'below' if off < 0 else 'above'} {name}"


def cascade_table(tag: str, document: Mapping[str, Any]) -> RowTable[ChoiceRow]:
    """Return a chosen cascade beside the best single instance within the budget, and `full`.

    Args:
        tag: tag of the choice.
        document: its document.
    """
    best, limit = ChoiceRow.read(document["best"]), document["budget"]["macs"]
    rows = [best, *(ChoiceRow.read(row) for row in (document["single"], document["full"]) if row is not None)]
    budget = "at any cost" if limit is None else f"within {scaled(limit)} MACs on average"
    held, tested = document["heldout_images"], document["images"]
    caption = [f"chosen on {held:,} held-out images; mean MACs are those of {tested:,} test images"]
    compared = [_compared(best.macs, best.heldout_macs, "those on held-out images")]
    compared += [] if limit is None else [_compared(best.macs, limit, "the budget")]
    caption.append(f"mean MACs on test images: {', '.join(compared)}")
    caption += _doubts([row.heldout_top1 for row in rows], held)
    return RowTable(_choice_columns(), rows, [f"{tag}: the best cascade {budget}"], caption, bold=lambda row: row is best)


def member_table(document: Mapping[str, Any]) -> RowTable[MemberRow]:
    """Return the members of a chosen cascade.

    Args:
        document: its document.
    """
    columns: list[Column[MemberRow]] = [
        Column("member", lambda row: row.member, folds="+"),
        Column("adds MACs", lambda row: scaled(row.macs), "right"),
        Column("reached by %", lambda row: _percent(row.reached), "right", drop=1),
        Column("from confidence", lambda row: "" if row.threshold is None else f"{row.threshold:g}", "right", drop=2),
        Column("leave %", lambda row: _percent(row.left), "right"),
    ]
    caption = ["a shared prefix is counted once; shares are those of the test images"]
    return RowTable(columns, MemberRow.read_all(document["best"]), ["members of the cascade"], caption)


def front_table(document: Mapping[str, Any]) -> RowTable[ChoiceRow]:
    """Return the best cascade or instance for each of a list of budgets.

    Args:
        document: the document of a chosen cascade.
    """
    rows = [ChoiceRow.read(row) for row in document["front"]]
    return RowTable(_choice_columns(), rows, ["the most accurate cascades and instances, by held-out images"])


def export_table(tag: str, exported: Mapping[str, Any]) -> RowTable[ExportRow]:
    """Return the instances of an export.

    Args:
        tag: tag of the export.
        exported: description of the export.
    """
    rows = [ExportRow.read(option) for option in exported["options"]]
    images = exported["heldout_images"]
    columns: list[Column[ExportRow]] = [INSTANCE, MACS, replace(RELATIVE, drop=1)]
    columns.append(Column("test %", lambda row: _percent(row.top1), "right"))
    if images:
        columns.append(Column("held-out %", lambda row: _percent(row.heldout_top1), "right"))
    accuracies = [row.heldout_top1 for row in rows if images and row.heldout_top1 is not None]
    cascades = [
        f"cascade {cascade['cascade']}: {scaled(cascade['macs'])} MACs on average ({_share(cascade['relative'])}), test "
        f"{_percent(cascade['top1'])} %"
        for cascade in exported.get("cascades") or ()
    ]
    lower = [str(Accuracies(**exported["precision"]))] if exported.get("precision") else []
    return RowTable(columns, rows, [tag], [*lower, *cascades, *_doubts(accuracies, images)])


def latency_table(rows: Sequence[LatencyRow], repeats: int) -> RowTable[LatencyRow]:
    """Return the latencies of exports.

    Args:
        rows: a row for each export, instance and batch size.
        repeats: number of calls that were measured.
    """
    columns: list[Column[LatencyRow]] = [
        Column("instance", lambda row: row.instance or "?", folds="+"),
        Column("MACs", lambda row: "?" if row.macs is None else scaled(row.macs), "right", drop=1),
        Column("relative", lambda row: "?" if row.relative is None else _share(row.relative), "right", drop=3),
        Column("batch", lambda row: f"{row.batch}", "right"),
        Column("median ms", lambda row: f"{row.median_ms:.3f}", "right"),
        Column("p95 ms", lambda row: f"{row.p95_ms:.3f}", "right"),
        Column("images/s", lambda row: f"{row.images_per_second:,.0f}", "right", drop=2),
    ]
    if len({row.file for row in rows}) > 1:
        columns.insert(0, Column("file", lambda row: row.file, folds="/"))
    measured_on = dict.fromkeys((row.file, row.measured_on) for row in rows)
    title = [f"{file} on {machine}" for file, machine in measured_on]
    return RowTable(columns, rows, title, [f"milliseconds per call, of {repeats} calls"])


def prediction_table(ref: str, result: Mapping[str, Any]) -> RowTable[PredictionRow]:
    """Return the likeliest classes of each image.

    Args:
        ref: reference of the network.
        result: result of the prediction.
    """
    rows = [
        PredictionRow.read({"instance": result.get("instance")} | image | {"place": place} | likely)
        for image in result["images"]
        for place, likely in enumerate(image["top"])
    ]
    columns: list[Column[PredictionRow]] = [
        Column("image", lambda row: "" if row.place else row.file, folds="/"),
        Column("class", lambda row: row.class_, folds=" "),
        Column("probability", lambda row: f"{100 * row.probability:.2f} %", "right"),
    ]
    if "cascade" in result:
        columns.append(Column("answered by", lambda row: "" if row.place else row.instance, folds="+"))
    mean = " on average" if "cascade" in result else ""
    cost = f"{scaled(result['macs'])} MACs ({_share(result['relative'])}){mean}, {result['milliseconds']:.3g} ms an image"
    title = f"{ref}: {result.get('cascade') or result['instance']}, {cost}"
    return RowTable(columns, rows, [title], bold=lambda row: row.place == 0)


def artifact_table(rows: Sequence[ArtifactRow]) -> RowTable[ArtifactRow]:
    """Return the artifacts of a store."""
    columns: list[Column[ArtifactRow]] = [
        Column("tag", lambda row: row.tag or "", folds="."),
        Column("digest", lambda row: _short(row.digest)),
        Column("kind", lambda row: row.kind, drop=1),
        Column("subject", lambda row: _short(row.subject or ""), drop=4),
        Column("bytes", lambda row: scaled(row.bytes), "right", drop=2),
        Column("created", lambda row: row.created, drop=3),
    ]
    return RowTable(columns, rows)


def shared_table(rows: Sequence[SharedRow]) -> RowTable[SharedRow]:
    """Return the artifacts that are pushed or pulled."""
    columns: list[Column[SharedRow]] = [
        Column("tag", lambda row: row.tag or "", folds="."),
        Column("digest", lambda row: _short(row.digest)),
        Column("kind", lambda row: row.kind, drop=1),
        Column("bytes", lambda row: scaled(row.bytes), "right", drop=2),
        Column("was there", lambda row: "yes" if row.there else "no", drop=3),
    ]
    return RowTable(columns, rows)


def layer_table(title: Sequence[str], rows: Sequence[LayerRow]) -> RowTable[LayerRow]:
    """Return the layers of an artifact."""
    columns: list[Column[LayerRow]] = [
        Column("layer", lambda row: row.title, folds="."),
        Column("digest", lambda row: _short(row.digest), drop=1),
        Column("bytes", lambda row: f"{row.bytes:,}", "right"),
        Column("media type", lambda row: row.media_type, folds="/"),
    ]
    return RowTable(columns, rows, title)


def lineage_table(rows: Sequence[LineageRow]) -> RowTable[LineageRow]:
    """Return the artifacts that an artifact was made from."""
    columns: list[Column[LineageRow]] = [
        Column("kind", lambda row: row.kind or "(not here)"),
        Column("digest", lambda row: _short(row.digest)),
        Column("tag", lambda row: row.tag or "", folds="."),
    ]
    return RowTable(columns, rows, ["", "made from"])


def architecture_table(rows: Sequence[ArchitectureRow], caption: Sequence[str] = ()) -> RowTable[ArchitectureRow]:
    """Return the architectures of this package."""

    def points(row: ArchitectureRow) -> Sequence[str]:
        return row.points or ()

    columns: list[Column[ArchitectureRow]] = [
        Column("arch", lambda row: row.arch),
        Column("family", lambda row: row.family, drop=5),
        Column("block", lambda row: row.block or "", drop=1),
        Column("stem", lambda row: row.stem or "", drop=2),
        Column("points", lambda row: str(len(points(row))), "right"),
        Column("first", lambda row: points(row)[0], drop=4),
        Column("last", lambda row: points(row)[-1], drop=3),
    ]
    return RowTable(columns, rows, (), caption)


def network_table(rows: Sequence[ArchitectureRow]) -> RowTable[ArchitectureRow]:
    """Return the names of networks of libraries."""
    caption = f"{len(rows):,} networks; `sdpctl models ARCH --points` shows the points of one"
    if len(rows) == 1:
        caption = f"`sdpctl models {rows[0].arch} --points` shows its points"
    return RowTable([Column("arch", lambda row: row.arch, folds="_")], rows, (), [caption])


def point_table(costs: Mapping[str, Any], rows: Sequence[PointRow]) -> RowTable[PointRow]:
    """Return the points of an architecture.

    Args:
        costs: the document of `point_costs`.
        rows: the points, in network order.
    """
    arch, side = costs["arch"], costs["image_size"]
    columns: list[Column[PointRow]] = [
        Column("point", lambda row: row.point, folds="."),
        Column("map", lambda row: shape_text(arch, row.map), "right"),
        Column("MACs up to there", lambda row: f"{row.macs:,}", "right", drop=1),
        Column("share", lambda row: _share(row.relative), "right"),
    ]
    return RowTable(columns, rows, [f"{arch}: {len(rows)} points, {scaled(costs['macs'])} MACs for an image of {side} px"])


def recipe_table(rows: Sequence[RecipeRow]) -> RowTable[RecipeRow]:
    """Return the recipes of a folder."""
    columns: list[Column[RecipeRow]] = [
        Column("recipe", lambda row: row.recipe, folds="/"),
        Column("arch", lambda row: row.arch),
        Column("data", lambda row: row.dataset),
        Column("px", lambda row: str(row.image_size), "right", drop=1),
        Column("epochs", lambda row: str(row.epochs), "right", drop=2),
    ]
    return RowTable(columns, rows)


def split_table(seen: "Survey") -> RowTable[SplitRow]:
    """Return the table of the classes that a look at a folder found, those with the fewest training images first."""
    train, test = seen.counts
    rows = [SplitRow(class_=name, train=train[i], test=test[i]) for i, name in enumerate(seen.classes)]
    rows.sort(key=lambda row: row.train)
    shown = rows if len(rows) <= MOST_CLASSES else [*rows[: MOST_CLASSES // 2], *rows[-MOST_CLASSES // 2 :]]
    columns: list[Column[SplitRow]] = [
        Column("class", lambda row: row.class_, folds=" "),
        Column(seen.parts[0], lambda row: f"{row.train:,}", "right"),
        Column(seen.parts[1], lambda row: f"{row.test:,}", "right"),
    ]
    (width, height, least), (wide, high, most) = seen.sizes[0], seen.sizes[-1]
    middle = seen.sizes[len(seen.sizes) // 2]
    colours = ", ".join(f"{count:,} {colour}" for colour, count in seen.modes.most_common())
    title = [
        f"{printable_path(seen.root)}: {len(rows):,} classes, {sum(train):,} training and {sum(test):,} test images",
        f"width x height: median {middle[0]} x {middle[1]}, smallest {width} x {height} ({least}), "
        f"largest {wide} x {high} ({most})",
        f"colour: {colours}",
    ]
    caption = [f"{len(rows) - len(shown):,} classes between these are left out; --json shows them"] if shown != rows else []
    return RowTable(columns, shown, title, caption)


def finding_table(findings: Sequence[FindingRow]) -> RowTable[FindingRow]:
    """Return the table of what a look at a folder found."""
    columns: list[Column[FindingRow]] = [
        Column("", lambda row: row.kind),
        Column("what was found", lambda row: row.found, folds=" "),
        Column("what it means, or what to do", lambda row: row.advice, folds=" "),
    ]
    return RowTable(columns, findings, [""], bold=lambda row: row.kind != "note")


def check_table(rows: Sequence[CheckRow]) -> RowTable[CheckRow]:
    """Return the table of what a machine has."""
    columns: list[Column[CheckRow]] = [
        Column("", lambda row: row.state),
        Column("", lambda row: row.name),
        Column("what was found", lambda row: row.found, folds=" "),
        Column("what to do, or what it is for", lambda row: row.advice, folds=" "),
    ]
    return RowTable(columns, rows, bold=lambda row: row.state in ("warning", "broken"))


def plan_table(command: str, steps: "Sequence[Step]") -> RowTable[StepRow]:
    """Return the plan of a dry run: for each stage its stored artifact, or what the stage would do."""
    rows = [
        StepRow(tag=step.tag, kind=step.kind, digest=step.digest, task=step.task or None, reason=step.reason or None)
        for step in steps
    ]
    columns: list[Column[StepRow]] = [
        Column("stage", lambda row: row.tag, folds="."),
        Column("kind", lambda row: row.kind, drop=1),
        Column("plan", lambda row: row.task or f"in the store: {_short(row.digest or '')}", folds=" "),
        Column("why", lambda row: row.reason or "", folds=" "),
    ]
    return RowTable(columns, rows, [f"{command}: a dry run; nothing is written"], bold=lambda row: row.digest is None)


def _share(share: float) -> str:
    return f"{100 * share:.1f} %"


def _percent(percent: float | None) -> str:
    return "" if percent is None else f"{percent:.2f}"


def _short(digest: str) -> str:
    return digest[7:19]


def _doubts(accuracies: Sequence[float], images: int) -> list[str]:
    """Return notes for a table of accuracies that were measured on few images, including the number of ties at the top."""
    if (said := few_images_note(images)) is None:
        return []
    best = max(accuracies, default=0)
    equal = count_tied(accuracies, best)
    return [said, *([f"{equal} instances tie at {best:.2f} %"] if equal > 1 else [])]
