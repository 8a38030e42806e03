"""`sdpctl search --cascade` as a user meets it."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from command import called, completed, document, one_line

from sdpctl.cascade import Cascade

SMOKE = Path(__file__).parent.parent.parent / "recipes" / "smoke.yaml"


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """A folder whose store holds the smoke network and its cascade, and the document."""
    folder = tmp_path_factory.mktemp("chosen")
    assert called(folder, "train", SMOKE, "-q").returncode == 0
    return folder, document(folder, "search", "smoke", "--cascade", "--max-macs", "60%")


@pytest.fixture
def copied(chosen, tmp_path):
    """A copy of the folder, to write to."""
    shutil.copytree(chosen[0], tmp_path / "copied")
    return tmp_path / "copied"


def test_the_document(chosen):
    _, shown = chosen
    keys = {"schema", "digest", "tag", "best", "budget", "candidates", "front", "full", "heldout_images", "images", "single"}
    assert set(shown) == keys
    assert (shown["schema"], shown["tag"]) == ("sdpctl.cascade/1", "smoke.cascade")
    instance = {"instance", "macs", "relative", "top1", "loss", "heldout_top1"}
    assert set(shown["full"]) == set(shown["single"]) == instance
    cascade = {"cascade", "worst_macs", "member_macs", "left", "heldout_macs", "heldout_left"} | instance - {"instance"}
    assert set(shown["best"]) == cascade
    assert all(set(row) in (instance, cascade) for row in shown["front"])


def test_the_tables(chosen):
    folder, shown = chosen
    done = called(folder, "search", "smoke", "--cascade", "--max-macs", "60%")
    assert done.returncode == 0, done.stderr
    assert "in the store already" in done.stderr
    best, lines = shown["best"], [line.rstrip() for line in done.stdout.splitlines()]
    assert re.fullmatch(r"smoke\.cascade: the best cascade within 1\.51 M MACs on average", lines[0])
    assert [line.split()[0] for line in lines[2:5]] == [best["cascade"], shown["single"]["instance"], "full"]
    cells = lines[2].split()
    assert float(cells[3]) == pytest.approx(100 * best["relative"], abs=0.05)
    assert [float(cell) for cell in cells[-2:]] == pytest.approx([best["heldout_top1"], best["top1"]], abs=0.005)
    (told,) = (line for line in lines if line.startswith("mean MACs on test images: "))
    found = re.findall(r"([\d.]+) % (below|above) (those on held-out images|the budget)", told)
    assert [words[2] for words in found] == ["those on held-out images", "the budget"]
    for (share, side, _), other in zip(found, (best["heldout_macs"], shown["budget"]["macs"]), strict=True):
        off = 100 * (best["macs"] / other - 1)
        assert float(share) == pytest.approx(abs(off), abs=0.005)
        assert side == ("below" if off < 0 else "above")
    members = lines[lines.index("members of the cascade") + 2 :][: len(best["left"])]
    assert [line.split()[0] for line in members] == [str(member) for member in Cascade.parse(best["cascade"]).members]
    assert [float(line.split()[-1]) for line in members] == pytest.approx(best["left"], abs=0.005)
    reached = [float(line.split()[3]) for line in members]
    assert reached == pytest.approx([100 - sum(best["left"][:number]) for number in range(len(reached))], abs=0.005)
    at = lines.index("the most accurate cascades and instances, by held-out images") + 2
    assert [line.split()[0] for line in lines[at:]] == [row.get("cascade") or row["instance"] for row in shown["front"]]


def test_csv(chosen, tmp_path):
    folder, shown = chosen
    done = called(folder, "search", "smoke", "--cascade", "--max-macs", "60%", "--csv", tmp_path / "front.csv")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "front.csv").open() as file:
        rows = list(csv.DictReader(file))
    fields = ["choice", "macs", "relative", "worst_macs", "heldout_macs", "heldout_top1", "top1", "loss"]
    assert list(rows[0]) == fields
    assert [int(row["macs"]) for row in rows] == [row["macs"] for row in shown["front"]]
    assert rows[0]["choice"] == shown["front"][0]["instance"]
    assert rows[0]["worst_macs"] == rows[0]["heldout_macs"] == rows[0]["macs"]


def test_latency_is_told_and_logged_and_in_no_layer(copied):
    done = called(copied, "search", "smoke", "--cascade", "--max-macs", "60%", "--force")
    told = re.findall(r"smoke\.cascade: a batch of (\d+) takes ([\d.]+) ms on this machine, ([\d.]+) ms with full", done.stderr)
    assert [int(size) for size, _, _ in told] == [1, 32]
    logged = [json.loads(line) for line in (copied / ".sdpctl" / "logs" / "smoke.cascade.jsonl").read_text().splitlines()]
    logged = [line for line in logged if line["event"] == "latency"][-2:]
    assert [line["batch_size"] for line in logged] == [1, 32]
    for (_, mine, full), line in zip(told, logged, strict=True):
        assert float(mine) == pytest.approx(line["milliseconds"]["cascade"], rel=0.01)
        assert float(full) == pytest.approx(line["milliseconds"]["full"], rel=0.01)
    layer = called(copied, "store", "show", "smoke.cascade", "--layer", "cascade.json").stdout
    assert "millisec" not in layer


def test_a_dry_run_says_what_would_be_done(chosen):
    folder, _ = chosen
    plan = document(folder, "search", "smoke", "--cascade", "--max-macs", "70%", "--dry-run")["plan"]
    assert [(step["tag"], step["digest"] is None) for step in plan] == [("smoke.bn", False), ("smoke.cascade", True)]
    assert plan[1]["task"] == (
        "choose a cascade of 5 instances of at most 1,761,632 MACs on average, by the held-out images (data.holdout=10%)"
    )
    again = document(folder, "search", "smoke", "--cascade", "--max-macs", "60%", "--dry-run")["plan"]
    assert all(step["digest"] for step in again)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--strategy", "random"),
        ("--compare", "random,dqn"),
        ("--seeds", 2),
        ("--evaluations", 5),
        ("--ratios", "1,0.5"),
        ("--points", "stem"),
        ("--storage", "sqlite:///x"),
    ],
)
def test_options_of_the_other_search_are_refused(chosen, option, value):
    folder, _ = chosen
    one_line(called(folder, "search", "smoke", "--cascade", option, value), 2, f"{option} and --cascade exclude each other")


def test_a_budget_that_nothing_meets(chosen):
    folder, _ = chosen
    one_line(called(folder, "search", "smoke", "--cascade", "--max-macs", "20%"), 8, "stem@0.5", "636,554", "(25.3 %)")
    one_line(called(folder, "search", "smoke", "--cascade", "--max-macs", "636600"), 8, "the cheapest, ", "/", "takes 6")
    one_line(called(folder, "search", "smoke", "--cascade", "--max-macs", "often"), 3, "often")


def test_other_commands_know_the_artifact(chosen):
    folder, shown = chosen
    rows = {row["tag"]: row for row in document(folder, "store", "ls")["rows"]}
    assert rows["smoke.cascade"]["kind"] == "cascade"
    assert rows["smoke.cascade"]["subject"] == rows["smoke.bn"]["digest"]
    lineage = document(folder, "store", "show", "smoke.cascade")["lineage"]
    assert [row["kind"] for row in lineage] == ["bn-statistics", "checkpoint"]
    assert document(folder, "store", "verify")["problems"] == []
    assert document(folder, "search", "smoke.cascade.60pct", "--cascade", "--max-macs", "60%")["digest"] == shown["digest"]
    assert "--cascade" in completed(folder, "sdpctl search smoke --ca")


def test_quiet_prints_the_digest(chosen):
    folder, shown = chosen
    done = called(folder, "search", "smoke", "--cascade", "--max-macs", "60%", "-q")
    assert done.stdout == shown["digest"] + "\n"


def test_run_shows_the_cascade(copied):
    options = ("--set", "search=null", "--set", "export=null", "--set", "cascade.max_macs=60%")
    run = called(copied, "run", SMOKE, "--json", *options)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["cascade"]["best"]["cascade"]
    assert "members of the cascade" in called(copied, "run", SMOKE, *options).stdout


# Cascades in the table of `eval-instances`


def test_a_cascade_in_a_list_of_instances(copied):
    cascade = "mean/stem@0.5~1.2:0.6/layer3.0@0.5:0.5/full"
    shown = document(copied, "eval", "smoke", "--instances", f"layer1.2@0.5,{cascade}")
    rows = {row["instance"]: row for row in shown["rows"]}
    assert set(rows) == {"layer1.2@0.5", "stem@0.5", "layer3.0@0.5", "full", cascade}
    plain = set(rows["full"])
    assert set(rows[cascade]) == plain | {"worst_macs", "left"}
    assert all(set(row) == plain for text, row in rows.items() if text != cascade)
    assert sum(rows[cascade]["left"]) == pytest.approx(100)
    assert rows["stem@0.5"]["macs"] < rows[cascade]["macs"] < rows[cascade]["worst_macs"]
    assert [row["macs"] for row in shown["rows"]] == sorted(row["macs"] for row in shown["rows"])


def test_the_table_with_a_cascade(copied, tmp_path):
    words = ("eval", "smoke", "--instances", "stem@0.5:0.6/full", "--csv", tmp_path / "table.csv")
    lines = called(copied, *words).stdout.splitlines()
    assert lines[1].split()[:5] == ["instance", "MACs", "relative", "leave", "%"]
    (row,) = (line.split() for line in lines if line.startswith("stem@0.5:0.6/full"))
    assert int(row[5]) + int(row[7]) in (99, 100, 101)
    assert "the MACs of a cascade are the mean over these images" in lines
    with (tmp_path / "table.csv").open() as file:
        assert [row["instance"] for row in csv.DictReader(file)] == ["stem@0.5", "stem@0.5:0.6/full", "full"]
    by_class = called(copied, "eval", "smoke", "--instances", "stem@0.5:0.6/full", "--by-class")
    assert by_class.returncode == 0, by_class.stderr
    assert "leave" not in called(copied, "eval", "smoke", "--instances", "stem@0.5").stdout


def test_the_cascades_of_a_choice(chosen, copied):
    _, shown = chosen
    rows = {row["instance"]: row for row in document(copied, "eval", "smoke", "--from-search", "smoke.cascade")["rows"]}
    for row in (shown["best"], shown["single"], shown["full"], *shown["front"]):
        found = rows[row.get("cascade") or row["instance"]]
        assert {key: found[key] for key in ("macs", "relative", "top1", "loss")}.items() <= row.items()


def test_the_instances_of_a_choice_are_calibrated(chosen, copied):
    _, shown = chosen
    rows = [shown["best"], shown["single"], shown["full"], *shown["front"]]
    members = {str(member) for row in rows if "cascade" in row for member in Cascade.parse(row["cascade"]).members}
    found = document(copied, "calibrate-bn", "smoke", "--from-search", "smoke.cascade.60pct")["instances"]
    assert set(found) == members | {row["instance"] for row in rows if "instance" in row}


def test_a_choice_is_not_exported_as_one_instance(chosen):
    for form in ("onnx", "torch-export"):
        words = f"a choice of cascades, and the format {form} holds one instance; give one of the formats bundle, onnx-cascade"
        one_line(called(chosen[0], "export", "smoke.cascade", "--format", form, "--dry-run"), 2, words)


def test_a_mistake_in_a_cascade_is_one_line(chosen):
    folder, _ = chosen
    one_line(called(folder, "eval", "smoke", "--instances", "stem@0.5/full"), 2, "'stem@0.5/full' is not a cascade")
    one_line(called(folder, "eval", "smoke", "--instances", "stem@0.5:0.9/layer9@0.5"), 2, "no point 'layer9'")
    words = ("--from-search", "smoke.cascade", "--instances", "full")
    one_line(called(folder, "eval", "smoke", *words), 2, "exclude each other")
