"""Tables on narrow terminals: folded or with columns left out, and every number and instance whole."""

import csv
import json
import re
from dataclasses import replace
from operator import itemgetter

import pytest
from rich.cells import cell_len

from sdpctl.cli import tables
from sdpctl.cli.layout import Layout, folded
from sdpctl.cli.row_table import Column, RowTable
from sdpctl.cli.rows import (
    ArchitectureRow,
    ArtifactRow,
    ClassRow,
    CostRow,
    LayerRow,
    LineageRow,
    PointRow,
    ProfileRow,
    RecipeRow,
    ScoreRow,
    SegmentRow,
)
from sdpctl.models.registry import ARCHITECTURES
from sdpctl.plan import Step

LONG = "layer1.2@0.75+layer2.0@0.75+layer2.3@0.5+layer3.17@0.75+layer3.35@0.5"
NAMES = ["full", "stem@0.5", "layer3.17@0.75", LONG]


def scores(name, k):
    return {
        "instance": name,
        "macs": 4_089_184_256 - 7_654_321 * k,
        "params": 25_557_032 - k,
        "relative": 1 - 0.0271 * k,
        "top1": 44.26 + k,
        "top5": 71.87 + k,
        "loss": 2.4567 + k,
        "heldout_top1": 43.21 + k,
    }


ROWS = [scores(name, k) for k, name in enumerate(NAMES)]
FOUND = [row | {"heldout": {"images": 3256, "top1": row["top1"]}, "test": {"top1": row["top5"]}} for row in ROWS]
SEARCH = {
    "budget": {"macs": 2_044_592_128},
    "evaluations": 100,
    "space": {"networks": 3**17},
    "runs": [
        row | {"run": run, "seed": k, "evaluations": 100}
        for k, (run, row) in enumerate(zip(("single-point", "surrogate", "nsga2"), FOUND[1:], strict=True))
    ],
    "full": FOUND[0],
    "best": FOUND[3],
    "pareto": FOUND,
}
SEGMENTS = [
    {
        "name": f"layer4.{k}",
        "in": [1024, 114, 114, 512, 57],
        "out": [2048, 57, 57, 1024, 29],
        "macs": 10**9 + k,
        "params": 14_964_736,
    }
    for k in range(3)
]
PREDICTED = {
    "instance": LONG,
    "macs": 2_044_592_128,
    "relative": 0.5,
    "milliseconds": 12.345,
    "images": [
        {
            "file": f"/home/somebody/photographs/2024-07 Italy and the islands/IMG_2024071{k}_153012_with_a_long_name.jpeg",
            "top": [
                {"class": "Hosen für Männer, lang und dunkel", "probability": 0.4426},
                {"class": "犬" * 30, "probability": 0.1},
            ],
        }
        for k in range(2)
    ],
}
SCORES = [ScoreRow.read(row) for row in ROWS]
CLASSES = ["T-Shirt", "Hosen für Männer, lang und dunkel", "犬" * 30, "nothing"]


def evaluation(instances):
    """Return the table of an evaluation of four classes; the last has no image."""
    return {
        "classes": CLASSES,
        "class_images": [12_345, 50, 1, 0],
        "rows": [scores(name, k) | {"by_class": [98.75 - k, 100 - 2.0 * k, 100, None]} for k, name in enumerate(instances)],
    }


def class_table(instances):
    results = evaluation(instances)
    return tables.class_table(ClassRow.read_all(results), [ScoreRow.read(row) for row in results["rows"]])


MANY = ["full", *(f"layer{k}.{k}@0.75" for k in range(1, 30))]
COSTS = [CostRow.read(row) for row in ROWS]
DIGEST = "sha256:" + "0123456789abcdef" * 4
CREATED = "2026-11-27T11:44:23+00:00"
ARTIFACT = ArtifactRow(
    tag="resnet50.export.bundle.0123456789ab", digest=DIGEST, kind="export", subject=None, bytes=102_400_000, created=CREATED
)
LAYER = LayerRow(title="model.safetensors", digest=DIGEST, bytes=102_400_000, media_type="application/vnd.safetensors")
LINK = LineageRow(digest=DIGEST, tag="resnet50", kind="checkpoint")
LOST = LineageRow(digest=DIGEST, tag=None, kind=None)
ARCHITECTURE = ArchitectureRow(
    arch="preresnet200", family="preresnet", block="bottleneck", stem="imagenet", points=("maxpool", "layer1.0", "layer4.2")
)
NETWORK = ArchitectureRow.of(ARCHITECTURES["timm/vit_base_patch16_rope_reg1_gap_256"])
POINTS = {
    "arch": "torchvision/regnet_x_8gf",
    "image_size": 224,
    "macs": 8_000_000_000,
    "rows": [{"point": "trunk_output.block3.block3-12", "map": [720, 14, 14], "macs": 7_016_662_016, "relative": 0.8776}],
}
RECIPE = RecipeRow(
    recipe="recipes/imagenet/resnet50.yaml", name="resnet50", arch="resnet50", dataset="imagefolder", image_size=224, epochs=90
)
STEPS = [
    Step("resnet50", "checkpoint", DIGEST),
    Step("resnet50.bn", "bn-statistics", None, "calibrate 35 instances on at most 8,192 images", "resnet50 is made first"),
    Step(
        ARTIFACT.tag,
        "export",
        None,
        f"export {LONG} as bundle, checked on at most 32 images",
        f"the store has nothing of {DIGEST}",
    ),
]
TABLES = {
    "eval": lambda: [tables.score_table("resnet50.eval: 50,000 test images", SCORES, 50_000)],
    "classes": lambda: [class_table(names) for names in (NAMES[:3], NAMES[:1], MANY)],
    "profile": lambda: [tables.cost_table("resnet50: one image of 224 px, 1000 classes", COSTS)],
    "segments": lambda: [tables.segment_table(ProfileRow.read(ROWS[3] | {"segments": SEGMENTS}), "twopipe")],
    "search": lambda: [tables.winner_table("resnet50.search", SEARCH), tables.pareto_table(SEARCH)],
    "export": lambda: [tables.export_table("resnet50.export.bundle.0123456789ab", {"options": ROWS, "heldout_images": 3256})],
    "predict": lambda: [tables.prediction_table("resnet50", PREDICTED)],
    "store": lambda: [tables.artifact_table([ARTIFACT])],
    "artifact": lambda: [tables.layer_table(["resnet50: checkpoint", DIGEST], [LAYER]), tables.lineage_table([LINK, LOST])],
    "models": lambda: [tables.architecture_table([ARCHITECTURE]), tables.network_table([NETWORK])],
    "points": lambda: [tables.point_table(POINTS, [PointRow.read(row) for row in POINTS["rows"]])],
    "recipes": lambda: [tables.recipe_table([RECIPE])],
    "plan": lambda: [tables.plan_table("run", STEPS)],
}  # fmt: skip


def drawn(table, width):
    return [line.plain for line in Layout(table).lines(width)]


def texts(table):
    """Return the text of each cell, row by row."""
    return [[column.text(row) for column in table.columns] for row in table.rows]


def column(heading, *arguments, **options):
    return Column(heading, str, *arguments, **options)


def text_table(columns, *rows, title=(), caption=()):
    """Return a table whose rows are tuples of text, one for each column."""
    columns = [replace(column, text=itemgetter(i)) for i, column in enumerate(columns)]
    return RowTable(columns, rows, title, caption)


def headings(table, lines):
    """Return the headings of a table that was drawn."""
    head = next(line for line in lines if line.startswith(table.columns[0].heading))
    return {column.heading for column in table.columns if column.heading in re.split("  +", head) or not column.heading}


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("name", TABLES)
def test_every_number_and_instance_is_whole(name, width):
    for table in TABLES[name]():
        lines = drawn(table, width)
        text = "\n".join(lines)
        assert max(map(cell_len, lines)) <= width
        assert "…" not in text
        shown = headings(table, lines)
        left_out = {column.heading for column in table.columns} - shown
        assert all(column.drop for column in table.columns if column.heading in left_out)
        caption = " ".join(text.split())
        assert all(heading in caption for heading in left_out)
        assert (f"left out at {width} columns: " in caption) == bool(left_out)
        for cells in texts(table):
            for column, cell in zip(table.columns, cells, strict=True):
                if column.heading in left_out:
                    continue
                if not column.folds:
                    assert cell in text, (column, cell)
                elif column.heading == "instance":
                    assert all(piece in text for piece in re.findall(r"[^+]+\+?", cell)), cell


@pytest.mark.parametrize("name", TABLES)
def test_off_a_terminal_each_row_is_one_line_with_all_columns(name):
    for table in TABLES[name]():
        lines = drawn(table, None)
        assert len(lines) == 1 + len(table.title) + len(table.rows) + len(table.caption)
        for cells, line in zip(texts(table), lines[1 + len(table.title) :], strict=False):
            assert all(cell in line for cell in cells)


def test_the_least_important_columns_go_first_and_folding_is_last():
    row = (LONG, "1.23 M", "50.0 %", "44.26")
    columns = [column("instance", folds="+"), column("MACs", "right", drop=1), column("relative", "right", drop=2)]
    table = text_table([*columns, column("top-1 %", "right")], row, title=["title"])
    assert drawn(table, 60)[1].split() == ["instance", "MACs", "relative", "top-1", "%"]
    assert drawn(table, 50)[1].split() == ["instance", "MACs", "top-1", "%"]
    assert drawn(table, 40)[1].split() == ["instance", "top-1", "%"]
    assert drawn(table, 26)[1:] == [
        "instance           top-1 %",
        "layer1.2@0.75+       44.26",
        "layer2.0@0.75+",
        "layer2.3@0.5+",
        "layer3.17@0.75+",
        "layer3.35@0.5",
        "left out at 26 columns:",
        "MACs, relative; --json or",
        "a wider terminal shows",
        "them",
    ]


def test_where_nothing_more_can_be_left_out_nothing_is_cut():
    table = text_table([column("instance", folds="+"), column("top-1 %", "right")], (LONG, "44.26"))
    text = "\n".join(drawn(table, 10))
    assert "layer3.17@0.75+" in text
    assert "44.26" in text


@pytest.mark.parametrize(
    ("text", "width", "at", "lines"),
    [
        ("a@0.5+b@0.5+c@0.5", 12, "+", ["a@0.5+b@0.5+", "c@0.5"]),
        ("a@0.5+b@0.5", 11, "+", ["a@0.5+b@0.5"]),
        ("photographs/2024/x.jpg", 13, "/", ["photographs/", "2024/x.jpg"]),
        ("two words", 5, " ", ["two", "words"]),
        ("abcdefghij", 4, " ", ["abcd", "efgh", "ij"]),
        ("犬犬犬", 4, " ", ["犬犬", "犬"]),
        ("", 4, " ", [""]),
        ("a b", 9, "", ["a b"]),
    ],
)
def test_text_is_folded_after_its_stops(text, width, at, lines):
    assert folded(text, width, at) == lines


@pytest.mark.parametrize("width", [None, 80, 20])
def test_foreign_text_cannot_move_the_cursor_or_split_a_row(width):
    foreign = "a\x1b[2Jb\nc\r\u202ed"
    columns = [column("tag", folds="."), column("kind")]
    table = text_table(columns, (foreign, foreign), title=[foreign], caption=[foreign])
    lines = drawn(table, width)
    assert all(line.isprintable() for line in lines)
    assert r"\x1b[2Jb\nc\r\u202ed" in "".join(lines)
    assert len(drawn(table, None)) == 4


@pytest.mark.parametrize("name", TABLES)
def test_json_and_csv_have_the_fields_of_the_rows_in_their_order(name):
    for table in TABLES[name]():
        records = json.loads(json.dumps(table.records()))
        assert len(records) == len(table.rows)
        for record, row in zip(records, table.rows, strict=True):
            assert list(record) == [field.removesuffix("_") for field in type(row).__dataclass_fields__]
        header, *lines = csv.reader(table.csv().decode().splitlines())
        assert header == [word for key, value in records[0].items() for word in (value if isinstance(value, dict) else [key])]
        assert len(lines) == len(records)


def test_of_few_instances_each_has_a_column_and_the_weakest_classes_come_first():
    title, head, *lines, caption = drawn(class_table(NAMES[:3]), None)
    assert title == "top-1 % by class"
    assert head.split() == ["class", "images", "layer3.17@0.75", "stem@0.5", "full"]
    assert [line.split()[-4:] for line in lines[:3]] == [
        ["12,345", "96.75", "97.75", "98.75"],
        ["50", "96.00", "98.00", "100.00"],
        ["1", "100.00", "100.00", "100.00"],
    ]
    assert lines[3].split() == ["nothing", "0"]
    assert caption == "the classes on which full is least accurate come first"


def test_full_leads_where_an_instance_costs_as_much():
    results = evaluation(NAMES[:3])
    rows = [ScoreRow.read(row | {"macs": 9}) for row in results["rows"]]
    table = tables.class_table(ClassRow.read_all(results), rows)
    assert [column.heading for column in table.columns][-1] == "full"


def test_an_instance_with_several_points_folds_above_its_column():
    assert [line.rstrip() for line in drawn(class_table(NAMES), 80)[1:4]] == [
        "class                                       layer1.2@0.75+layer2.0@0.75+    full",
        "                                            layer2.3@0.5+layer3.17@0.75+",
        "                                                           layer3.35@0.5",
    ]


def test_of_many_instances_the_lowest_and_the_highest_are_shown():
    """Of several instances with this accuracy, the cheapest is named."""
    head, *lines = drawn(class_table(MANY), None)[1:-1]
    assert re.split("  +", head) == ["class", "images", "full", "lowest %", "lowest by", "highest %", "highest by"]
    assert [line.split()[-6:] for line in lines[:3]] == [
        ["12,345", "98.75", "69.75", "layer29.29@0.75", "97.75", "layer1.1@0.75"],
        ["50", "100.00", "42.00", "layer29.29@0.75", "98.00", "layer1.1@0.75"],
        ["1", "100.00", "100.00", "layer29.29@0.75", "100.00", "layer29.29@0.75"],
    ]
    assert lines[3].split() == ["nothing", "0"]


def test_classes_have_a_field_for_each_instance_in_csv():
    table = class_table(["full", "stem@0.5"])
    assert table.records()[0] == {"class": "T-Shirt", "images": 12_345, "top1": {"full": 98.75, "stem@0.5": 97.75}}
    assert table.csv().decode().splitlines() == [
        "class,images,full,stem@0.5",
        "T-Shirt,12345,98.75,97.75",
        '"Hosen für Männer, lang und dunkel",50,100.0,98.0',
        f"{CLASSES[2]},1,100,100",
        "nothing,0,,",
    ]


def test_a_row_is_what_the_document_says():
    assert ScoreRow.read(ROWS[3] | {"foreign": 1}).record() == {key: ROWS[3][key] for key in ScoreRow.__dataclass_fields__}
    profile = ProfileRow.read(ROWS[3] | {"segments": SEGMENTS})
    assert profile.segments[0] == SegmentRow(in_=SEGMENTS[0]["in"], **{k: v for k, v in SEGMENTS[0].items() if k != "in"})
    assert profile.record()["segments"] == SEGMENTS
    front = tables.pareto_table(SEARCH).records()
    assert front[0]["heldout_top1"] == FOUND[0]["heldout"]["top1"]
    assert front[0]["test_top1"] == FOUND[0]["test"]["top1"]
