"""Dry runs: each command prints its plan, as a table and as JSON, and writes nothing."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import typer.main
from command import called, document
from rich.cells import cell_len

from sdpctl import create_model
from sdpctl.cli import app
from sdpctl.cli.layout import Layout
from sdpctl.cli.tables import plan_table
from sdpctl.plan import Step

SMOKE = Path(__file__).parent.parent.parent / "recipes" / "smoke.yaml"

NEW = "the store has no artifact of its key KEY"
TRAINING = "train resnet20 (269,434 params) on 1,295 images of digits, 2 epochs of 10 steps, 1.32e+10 MACs, on cpu"
PLANS = {
    "run": (
        ["run", SMOKE, "--set", "seed=1"],
        {
            "smoke": ("checkpoint", TRAINING, NEW),
            "smoke.bn": ("bn-statistics", "calibrate 5 instances on at most 512 images", "smoke is made first"),
            "smoke.eval": ("evaluation", "evaluate 5 instances on 359 images", "smoke is made first"),
            "smoke.profile": ("profile", "count the cost of 9 instances", NEW),
            "smoke.search": (
                "search",
                "search 22 networks of 4 points, at most 1,258,309 MACs (50.0 %), by exhaustive",
                "smoke is made first",
            ),
            "smoke.export.onnx": (
                "export",
                "export what smoke.search found as onnx, checked on at most 256 images",
                "smoke is made first",
            ),
        },
    ),
    "train": (
        ["train", SMOKE, "--set", "seed=1"],
        {"smoke": ("checkpoint", TRAINING, NEW)},
    ),
    "calibrate-bn": (
        ["calibrate-bn", "smoke", "--batches", "2"],
        {"smoke.bn": ("bn-statistics", "calibrate 5 instances on at most 256 images", NEW)},
    ),
    "eval-instances": (
        ["eval-instances", "smoke", "--force"],
        {
            "smoke.bn": ("bn-statistics", None, None),
            "smoke.eval": ("evaluation", "evaluate 5 instances on 359 images", "--force"),
        },
    ),
    "eval": (
        ["eval", "smoke", "--split", "holdout"],
        {
            "smoke.bn": ("bn-statistics", None, None),
            "smoke.holdout": ("evaluation", "evaluate 5 instances on 143 images", NEW),
        },
    ),
    "search": (
        ["search", "smoke", "--strategy", "random", "--max-macs", "70%"],
        {
            "smoke.search": (
                "search",
                "search 22 networks of 4 points, at most 1,761,632 MACs (70.0 %), by random, 10 evaluations each",
                NEW,
            )
        },
    ),
    "profile-flops": (
        ["profile-flops", SMOKE],
        {"smoke.profile": ("profile", "count the cost of 9 instances", NEW)},
    ),
    "export": (
        ["export", "smoke", "--format", "bundle", "--instances", "full,stem@0.5+layer1.2@0.5"],
        {
            "smoke.bn": (
                "bn-statistics",
                "calibrate 2 instances on at most 512 images",
                NEW,
            ),
            "smoke.export.bundle.HEX": (
                "export",
                "export full, stem@0.5+layer1.2@0.5 as bundle, checked on at most 32 images",
                "smoke.bn is made first",
            ),
        },
    ),
    "report": (
        ["report", "smoke"],
        {"smoke.report": ("report", "draw report.html of 1 network", NEW)},
    ),
    "import": (
        ["import", "--arch", "resnet20", "weights.pth", "--set", "data.dataset=digits", "--set", "data.image_size=8"],
        {"weights": ("checkpoint", "import 116 tensors of weights.pth", NEW)},
    ),
}
"""Arguments of each command, and its plan: kind, task and reason by tag; a stage without a task is in the store."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with a store that holds the smoke network, untrained, and its statistics; and with weights to import."""
    folder = tmp_path_factory.mktemp("dry")
    for words in (["train", SMOKE, "--set", "train.epochs=0"], ["calibrate-bn", "smoke"]):
        done = called(folder, *words, "-q")
        assert done.returncode == 0, done.stderr
    torch.save(create_model("resnet20", num_classes=10, in_channels=1).state_dict(), folder / "weights.pth")
    return folder


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def masked(text):
    text = re.sub(r"(?<=of its key )[0-9a-f]{12}\b", "KEY", text)
    return re.sub(r"(?<=\.bundle\.)[0-9a-f]{12}\b", "HEX", text)


def test_every_command_that_makes_artifacts_has_a_plan_here():
    commands = typer.main.get_command(app).commands
    dry = {name for name, command in commands.items() if any("--dry-run" in p.opts for p in command.params)}
    assert set(PLANS) == dry - {"init"}  # which has no stages


@pytest.mark.parametrize("name", PLANS)
def test_the_plan_of_a_command(prepared, name):
    words, expected = PLANS[name]
    before = contents(prepared)
    shown = document(prepared, *words, "--dry-run")
    table = called(prepared, *words, "--dry-run")
    quiet = called(prepared, *words, "--dry-run", "-q")
    assert contents(prepared) == before
    assert (quiet.returncode, quiet.stdout) == (0, "")
    command = "eval-instances" if name == "eval" else name
    assert {key: shown[key] for key in shown if key != "plan"} == {"schema": f"sdpctl.{command}/1", "dry_run": True}
    assert all(list(step) == ["tag", "kind", "digest", "task", "reason"] for step in shown["plan"])
    plan = {masked(step["tag"]): (step["kind"], step["task"], step["reason"]) for step in shown["plan"]}
    assert {tag: (kind, task, reason and masked(reason)) for tag, (kind, task, reason) in plan.items()} == expected
    assert list(plan) == list(expected)
    assert all((step["digest"] is None) == (step["task"] is not None) for step in shown["plan"])
    title, heading, *lines = table.stdout.splitlines()
    assert title == f"{command}: a dry run; nothing is written"
    assert heading.split() == ["stage", "kind", "plan", "why"]
    cells = [[cell for cell in re.split(r"  +", line) if cell] for line in lines]
    assert cells == [
        [step["tag"], step["kind"], step["task"] or f"in the store: {step['digest'][7:19]}", *filter(None, [step["reason"]])]
        for step in shown["plan"]
    ]
    steps = [Step(**{key: value or "" for key, value in step.items()} | {"digest": step["digest"]}) for step in shown["plan"]]
    for width in (80, 120):
        drawn = [line.plain for line in Layout(plan_table(command, steps)).lines(width)]
        assert max(map(cell_len, drawn)) <= width
        words_drawn = " ".join(drawn).split()
        for step in steps:
            assert set(f"{step.task} {step.reason}".split()) <= set(words_drawn)


def test_without_a_store_none_is_made(tmp_path):
    shown = document(tmp_path, "run", SMOKE, "--dry-run")
    assert [step["digest"] for step in shown["plan"]] == [None] * 6
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_store_is_shown_after_the_plan(prepared, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(prepared, folder)
    made = document(folder, "profile-flops", SMOKE)
    before = contents(folder)
    shown = document(folder, "profile-flops", SMOKE, "--dry-run", "--csv", "costs.csv")
    step = {"tag": "smoke.profile", "kind": "profile", "digest": made["digest"], "task": None, "reason": None}
    assert shown == made | {"dry_run": True, "plan": [step]}
    lines = called(folder, "profile-flops", SMOKE, "--dry-run").stdout.splitlines()
    assert lines[2].split() == ["smoke.profile", "profile", "in", "the", "store:", made["digest"][7:19]]
    assert lines[3] == "smoke.profile: one image of 8 px, 10 classes"
    assert contents(folder) == before
