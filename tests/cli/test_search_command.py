"""`sdpctl search` as a user meets it, and `--from-search`."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from command import called, completed, document, light, one_line

from sdpctl.cli.options import complete_strategies
from sdpctl.search.catalog import STRATEGIES
from sdpctl.store import Store

pytestmark = pytest.mark.usefixtures("quick_sqlite")

SMOKE = Path(__file__).parent.parent.parent / "recipes" / "smoke.yaml"
QUICK = ("--strategy", "random", "--evaluations", 6, "--set", "search.images=40", "--set", "search.rescore=2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder whose store holds the smoke network."""
    folder = tmp_path_factory.mktemp("trained")
    assert called(folder, "train", SMOKE, "-q").returncode == 0
    return folder


@pytest.fixture(scope="module")
def searched(trained, tmp_path_factory):
    """The same with a search in it, and its document."""
    folder = tmp_path_factory.mktemp("searched")
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    return folder, document(folder, "search", "smoke", *QUICK)


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the folder with the trained network, to write to."""
    shutil.copytree(trained, tmp_path / "copied")
    return tmp_path / "copied"


# What is shown


def test_the_document(searched):
    folder, shown = searched
    keys = ["schema", "digest", "tag", "best", "budget", "evaluations", "full", "pareto", "reward", "runs", "space"]
    assert [*list(shown)[:3], *sorted(list(shown)[3:])] == keys
    assert (shown["schema"], shown["tag"]) == ("sdpctl.search/1", "smoke.search")
    assert shown["digest"] == Store(folder / ".sdpctl").resolve("smoke.search").digest
    assert shown["budget"] == {"text": "50%", "macs": shown["space"]["full"] // 2}
    assert [row["run"] for row in shown["runs"]] == ["single-point", "random"]
    row = {"instance", "macs", "params", "relative", "heldout", "test"}
    assert set(shown["best"]) == row | {"runs"}
    assert set(shown["full"]) == row
    assert all(set(run) == row | {"run", "seed", "evaluations"} for run in shown["runs"])
    assert all(row - {"test"} <= set(other) <= row for other in shown["pareto"])
    assert set(shown["full"]["test"]) == {"images", "top1", "top5", "loss"}
    assert set(shown["full"]["heldout"]) == {"images", "top1", "loss"}


def test_the_tables(searched):
    folder, shown = searched
    done = called(folder, "search", "smoke", *QUICK)
    assert done.returncode == 0, done.stderr
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    budget = shown["budget"]["macs"]
    assert lines[0].startswith("smoke.search: the best within ")
    assert float(lines[0].split()[-3]) == pytest.approx(budget / 1e6, abs=0.005)
    assert lines[1].split() == ["found", "by", "instance", "MACs", "relative", "scored", "held-out", "%", "test", "%"]
    assert [line.split()[0] for line in lines[2:5]] == ["single-point", "random", "full"]
    for line, row in zip(lines[2:5], [*shown["runs"], {"evaluations": None} | shown["full"]], strict=True):
        cells = line.split()
        assert cells[1] == row["instance"]
        assert float(cells[4]) == pytest.approx(100 * row["relative"], abs=0.05)
        numbers = [cell for cell in cells[6:] if cell != "*"]
        expected = [] if row["evaluations"] is None else [str(row["evaluations"])]
        assert numbers == [*expected, f"{row['heldout']['top1']:.2f}", f"{row['test']['top1']:.2f}"]
        assert (cells[-1] == "*") == (row["instance"] == shown["best"]["instance"])
    assert any(line.endswith("*") for line in lines[2:5])
    assert lines[5] == (
        f"* the best of all on held-out images; {shown['evaluations']} of {shown['space']['networks']} networks scored"
    )
    assert lines[6:8] == ["Pareto front of the networks scored", lines[7]]
    assert lines[7].split() == ["instance", "MACs", "relative", "images", "held-out", "%"]
    assert [line.split()[0] for line in lines[8:]] == [row["instance"] for row in shown["pareto"]]
    assert "\x1b" not in done.stdout + done.stderr


def test_seeds_have_a_column(copied):
    done = called(copied, "search", "smoke", *QUICK, "--seeds", 2)
    lines = done.stdout.splitlines()
    assert lines[1].split()[:3] == ["found", "by", "seed"]
    assert [line.split()[:2] for line in lines[2:5]] == [["single-point", "0"], ["random", "0"], ["random", "1"]]


def test_quiet_prints_the_digest_only(searched):
    done = called(searched[0], "search", "smoke", *QUICK, "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, searched[1]["digest"] + "\n", "")


def test_csv_holds_the_pareto_front(searched, tmp_path):
    path = tmp_path / "front.csv"
    assert called(searched[0], "search", "smoke", *QUICK, "--csv", path).returncode == 0
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["instance", "macs", "relative", "images", "heldout_top1", "test_top1"]
    front = searched[1]["pareto"]
    assert [(row["instance"], int(row["macs"])) for row in rows] == [(row["instance"], row["macs"]) for row in front]
    assert [float(row["heldout_top1"]) for row in rows] == [row["heldout"]["top1"] for row in front]
    assert [row["test_top1"] for row in rows] == [str(row["test"]["top1"]) if "test" in row else "" for row in front]
    one_line(called(searched[0], "search", "smoke", *QUICK, "--csv", path), 2, "front.csv: this file exists; --force replaces")


def test_a_dry_run_writes_nothing(copied, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    done = called(copied, "search", "smoke", *QUICK, "--dry-run", "--json", "--csv", tmp_path / "front.csv")
    shown = json.loads(done.stdout)
    (step,) = shown.pop("plan")
    assert shown == {"schema": "sdpctl.search/1", "dry_run": True}
    assert (step["tag"], step["kind"], step["digest"]) == ("smoke.search", "search", None)
    assert re.match(r"search \d+ networks of \d points, at most [\d,]+ MACs \(.*%\), by ", step["task"])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_dry_run_of_what_is_known_shows_it_and_writes_no_file(searched, tmp_path):
    shown = document(searched[0], "search", "smoke", *QUICK, "--dry-run", "--csv", tmp_path / "front.csv")
    digest = searched[1]["digest"]
    step = {"tag": "smoke.search", "kind": "search", "digest": digest, "task": None, "reason": None}
    assert shown == searched[1] | {"dry_run": True, "plan": [step]}
    assert list(tmp_path.iterdir()) == []


def test_verbose_says_how_far_it_is(copied):
    plain = called(copied, "search", "smoke", *QUICK)
    verbose = called(copied, "search", "smoke", *QUICK, "--force", "-v")
    assert "random: 6/6 evaluations, best " in verbose.stderr
    assert " s left" in verbose.stderr
    assert " s left" not in plain.stderr
    assert plain.stdout == verbose.stdout


def test_options_are_the_recipes_keys(copied):
    lists = ("--ratios", "1,0.5", "--points", "layer1.2,stem", "--compare", "uniform,greedy", "--evaluations", 2)
    shown = document(copied, "search", "smoke", *lists, "--max-macs", "2M", "--seeds", 1, "--set", "search.images=40")
    assert shown["space"]["points"] == ["stem", "layer1.2"]
    assert shown["budget"] == {"text": "2M", "macs": 2_000_000}
    assert [(row["run"], row["evaluations"] <= 2) for row in shown["runs"]] == [
        ("single-point", False),
        ("uniform", True),
        ("greedy", True),
        ("random", True),
    ]
    assert {part.partition("@")[2] for row in shown["pareto"] for part in row["instance"].split("+")} <= {"0.5", ""}


def test_the_store_lists_both_tags_of_a_search(searched):
    folder, shown = searched
    rows = {row["tag"]: row for row in document(folder, "store", "ls")["rows"]}
    assert rows["smoke.search"]["digest"] == rows["smoke.search.50pct"]["digest"] == shown["digest"]
    assert document(folder, "store", "show", "smoke.search.50pct")["lineage"][0]["tag"] == "smoke"
    again = document(folder, "search", "smoke.search.50pct", *QUICK)  # a search of the checkpoint smoke
    assert (again["digest"], again["tag"]) == (shown["digest"], "smoke.search")


# What was found, used


@pytest.mark.parametrize(("command", "ref"), [("eval", "smoke.search"), ("eval-instances", "smoke.search.50pct")])
def test_eval_from_search(searched, command, ref):
    folder, shown = searched
    found = {shown["best"]["instance"], *(row["instance"] for row in shown["pareto"]), "full"}
    evaluated = document(folder, command, "smoke", "--from-search", ref)
    assert evaluated["tag"] == "smoke.eval"
    rows = {row["instance"]: row for row in evaluated["rows"]}
    assert set(rows) == found
    assert rows["full"]["top1"] == pytest.approx(shown["full"]["test"]["top1"], abs=100 / 359 + 1e-9)


def test_calibrate_bn_from_search(searched):
    folder, shown = searched
    texts = list(dict.fromkeys([shown["best"]["instance"], *(row["instance"] for row in shown["pareto"]), "full"]))
    calibrated = document(folder, "calibrate-bn", "smoke", "--from-search", shown["digest"])
    assert calibrated["instances"] == texts
    by_budget = document(folder, "calibrate-bn", "smoke", "--from-search", "smoke.search.50pct")
    assert (by_budget["digest"], by_budget["tag"]) == (calibrated["digest"], "smoke.bn")
    assert document(folder, "eval", "smoke.bn")["rows"][-1]["instance"] == "full"


@pytest.mark.parametrize("command", ["eval", "calibrate-bn"])
def test_from_search_wants_a_search_and_nothing_beside_it(searched, command):
    folder = searched[0]
    both = called(folder, command, "smoke", "--from-search", "smoke.search", "--instances", "full")
    one_line(both, 2, "--instances and --from-search exclude each other")
    other = called(folder, command, "smoke", "--from-search", "smoke")
    one_line(other, 4, "smoke is of kind checkpoint, not a search; `sdpctl search` makes one")
    unknown = called(folder, command, "smoke", "--from-search", "smoke.serch")
    one_line(unknown, 4, "no artifact 'smoke.serch' (did you mean 'smoke.search'?)")


def test_a_search_leads_to_its_checkpoint(searched):
    folder, shown = searched
    lineage = document(folder, "store", "show", "smoke.search")["lineage"]
    assert [link["kind"] for link in lineage] == ["checkpoint"]
    assert called(folder, "search", "smoke.search", *QUICK, "-q").stdout == shown["digest"] + "\n"


# Mistakes

MISTAKES = {
    "a strategy that does not exist": (["--strategy", "surogate"], 3, ["search.strategy: ", "(did you mean 'surrogate'?)"]),
    "one of several that does not exist": (["--compare", "dqn,rnadom"], 3, ["search.compare.1: ", "(did you mean 'random'?)"]),
    "a strategy beside several": (
        ["--strategy", "dqn", "--compare", "dqn,ppo"],
        2,
        ["--strategy and --compare exclude each other"],
    ),
    "no strategies": (["--compare", ","], 2, ["an empty list (',')"]),
    "a point the network lacks": (
        ["--points", "stem,layer2.3"],
        3,
        ["search.points.1: resnet20 has no point 'layer2.3' (did you mean 'layer2.2'?)"],
    ),
    "ratios without 1": (
        ["--ratios", "0.75,0.5"],
        3,
        ["give 1 (no downsampling) and at least one smaller ratio", "[0.75, 0.5]"],
    ),
    "a ratio above 1": (["--ratios", "1,1.5"], 3, ["search.ratios.1: a ratio is the size kept", "1.5"]),
    "a ratio that is no number": (["--ratios", "1,half"], 3, ['search.ratios.1: this should be a valid number, got "half"']),
    "a budget that is none": (["--max-macs", "half"], 3, ["search.max_macs: 'half' is not a budget", "50%", "1.2G"]),
    "a budget of nothing": (["--max-macs", "0%"], 3, ["search.max_macs: '0%' is not a budget"]),
    "a budget that nothing meets": (["--max-macs", "1"], 8, ["no network of this space costs at most 1 MACs", "--max-macs"]),
    "no budget and no price": (
        ["--max-macs", "none"],
        3,
        ["search.max_macs: without a budget", "choose a different search.reward"],
    ),
    "a password": (
        ["--storage", "postgresql://user:geheim@host/studies"],
        3,
        ["search.storage: a password does not belong here", "SDPCTL_STORAGE"],
    ),
    "a password with a slash": (
        ["--storage", "postgresql://user:ge/heim@host/studies"],
        3,
        ["search.storage: a password does not belong here"],
    ),
    "a database that is not there": (
        ["--storage", "sqlite:////no/such/folder/studies.sqlite"],
        7,
        ["sqlite:////no/such/folder/studies.sqlite: cannot open this database"],
    ),
    "another holdout": (["--set", "data.holdout=20%"], 2, ["data.holdout=0.2", "leave this override out"]),
    "what is settled": (["--set", "train.lr=1"], 2, ["smoke is trained already", "search"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_its_exit_code(trained, name):
    arguments, code, words = MISTAKES[name]
    done = called(trained, "search", "smoke", *arguments)
    one_line(done, code, *words)
    assert "heim" not in done.stderr
    assert [artifact.kind for artifact in Store(trained / ".sdpctl").artifacts()] == ["checkpoint"]


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--evaluations", "-1"], ["--evaluations", "many"]])
def test_numbers_that_make_no_sense(trained, arguments):
    done = called(trained, "search", "smoke", *arguments)
    assert done.returncode == 2
    assert arguments[0] in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_not_there(trained, tmp_path):
    one_line(called(trained, "search", "smok"), 4, "no artifact 'smok' (did you mean 'smoke'?)")
    one_line(called(tmp_path, "search", "smoke"), 5, "there is no store")


# The storage


def test_the_environment_names_a_storage(copied, searched, tmp_path):
    path = tmp_path / "elsewhere.sqlite"
    shown = document(copied, "search", "smoke", *QUICK, SDPCTL_STORAGE=f"sqlite:///{path}")
    assert shown["digest"] == searched[1]["digest"]
    assert path.stat().st_size > 10_000
    assert not (copied / ".sdpctl" / "studies.sqlite").exists()


def test_the_environment_may_hold_a_password_that_is_never_shown(copied):
    address = "postgresql://user:geheim@127.0.0.1:1/studies"
    done = called(copied, "search", "smoke", *QUICK, "-v", SDPCTL_STORAGE=address)
    one_line(done, 7, "postgresql://user:***@127.0.0.1:1/studies: cannot open this database")
    assert "geheim" not in done.stderr
    for file in (copied / ".sdpctl").rglob("*"):
        assert file.is_dir() or b"geheim" not in file.read_bytes()


# Help and completion


def test_help_loads_nothing_heavy(tmp_path):
    (shown,) = light(tmp_path, ["search", "--help"])
    assert "--max-macs" in shown
    assert "--compare" in shown


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("sdpctl search smo", {"smoke", "smoke.search", "smoke.search.50pct"}),
        ("sdpctl search smoke --strategy su", {"surrogate"}),
        ("sdpctl eval smoke --from-search smoke.s", {"smoke.search", "smoke.search.50pct"}),
    ],
)
def test_completion_of_tags_and_strategies(searched, line, expected):
    assert expected <= set(completed(searched[0], line)) <= expected | {"smoke.bn", "smoke.eval"}


def test_strategies_are_completed_from_their_table():
    assert list(complete_strategies("")) == list(STRATEGIES)
    assert list(complete_strategies("n")) == ["nsga2"]
