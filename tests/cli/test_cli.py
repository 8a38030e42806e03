"""The command line as a user meets it: documents, exit codes, one line for each mistake."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from command import called, completed, document, light, one_line
from PIL import Image

from sdpctl.errors import RunInterruptedError, SdpctlError
from sdpctl.signals import STOPPING
from sdpctl.store import Store

RECIPES = Path(__file__).parent.parent.parent / "recipes"
SMOKE = RECIPES / "smoke.yaml"


def run_smoke(folder):
    command = [sys.executable, "-m", "sdpctl", "run", SMOKE, "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (folder / "run.json").write_text(done.stdout)


@pytest.fixture(scope="module")
def smoke(make_once, tmp_path_factory):
    """A store in which a process has run the smoke recipe, and what it printed."""
    folder = tmp_path_factory.mktemp("smoke")
    shutil.copytree(make_once("cli-smoke", run_smoke), folder, dirs_exist_ok=True)
    return folder, json.loads((folder / "run.json").read_text())


def test_gc_knows_the_study_of_a_finished_search(smoke, tmp_path, monkeypatch):
    shutil.copytree(smoke[0] / ".sdpctl", tmp_path / ".sdpctl")
    assert document(tmp_path, "store", "gc", "--dry-run")["studies"] == [], "a process on a different machine may work on it"
    monkeypatch.setattr("sdpctl.search.study.LEASE", 0)
    study, *_ = document(tmp_path, "store", "gc", "--grace", "0")["studies"]
    assert study.startswith("smoke-")
    assert document(tmp_path, "store", "gc", "--grace", "0")["studies"] == []
    assert document(tmp_path, "search", "smoke")["digest"] == smoke[1]["search"]["digest"]
    logs = document(tmp_path, "store", "gc", "--dry-run", "--grace", "0")["logs"]
    assert logs == [], "every log of a run has its tag"


def test_every_command_works_on_the_smoke_recipe(smoke):
    folder, run = smoke
    assert run["schema"] == "sdpctl.run/1"
    assert list(run)[1:] == ["train", "calibrate-bn", "eval-instances", "profile-flops", "search", "export"]
    shown = partial(document, folder)
    trained = shown("train", SMOKE)
    assert trained == {"schema": "sdpctl.train/1"} | run["train"] | {"metrics": trained["metrics"]}
    assert trained["metrics"]["epoch"] == 2
    calibrated = shown("calibrate-bn", "smoke")
    assert calibrated["digest"] == run["calibrate-bn"]["digest"]
    assert (calibrated["batches"], calibrated["images"], len(calibrated["instances"])) == (4, 512, 5)
    evaluated = shown("eval-instances", "smoke")
    assert evaluated == {"schema": "sdpctl.eval-instances/1"} | run["eval-instances"]
    assert shown("eval", "smoke") == evaluated
    macs = [row["macs"] for row in evaluated["rows"]]
    assert macs == sorted(macs)
    assert set(evaluated["rows"][0]) == {"instance", "macs", "params", "relative", "top1", "top5", "loss"}
    profiled = shown("profile-flops", "smoke", "--instances", "full,stem@0.5")
    assert [row["macs"] for row in profiled["rows"]] == [macs[0], macs[-1]]
    assert shown("search", "smoke") == {"schema": "sdpctl.search/1"} | run["search"]
    tags = {row["tag"] for row in shown("store", "ls")["rows"]}
    assert run["export"]["tag"] in tags
    made = {f"smoke.{end}" for end in ("bn", "eval", "profile", "search", "search.50pct")}
    assert tags - {run["export"]["tag"]} == {"smoke", *made, None}
    lineage = shown("store", "show", "smoke.eval")["lineage"]
    assert [link["kind"] for link in lineage] == ["bn-statistics", "checkpoint"]
    assert shown("store", "tag", "smoke", "kept")["digest"] == trained["digest"]
    assert shown("store", "verify")["problems"] == []
    assert shown("store", "gc", "--dry-run")["blobs"] == []
    assert {row["arch"] for row in shown("models")["rows"]} >= {"resnet18", "preresnet200", "resnext152", "resnet110"}
    assert "smoke" in {row["name"] for row in shown("recipe", "ls", RECIPES)["rows"]}
    assert shown("recipe", "show", SMOKE)["recipe"]["train"]["momentum"] == 0.9
    assert json.loads(called(folder, "recipe", "schema").stdout)["title"] == "Recipe"


def test_off_a_terminal_tables_are_whole_and_plain(smoke):
    done = called(smoke[0], "eval", "smoke", COLUMNS="20")
    lines = done.stdout.splitlines()
    assert lines[0] == "smoke.eval: 359 test images"
    assert lines[1].split() == ["instance", "MACs", "relative", "top-1", "%", "top-5", "%", "loss"]
    assert [line.split()[0] for line in lines[2:7]] == ["stem@0.5", "layer1.2@0.5", "layer2.2@0.5", "layer3.0@0.5", "full"]
    assert "\x1b" not in done.stdout + done.stderr
    assert "…" not in done.stdout


def test_pareto_rows_are_marked(smoke):
    rows = smoke[1]["eval-instances"]["rows"]
    lines = called(smoke[0], "eval", "smoke").stdout.splitlines()[2:7]
    for row, line in zip(rows, lines, strict=True):
        beaten = any(o["macs"] <= row["macs"] and o["top1"] >= row["top1"] and o != row for o in rows)
        assert line.rstrip().endswith("*") != beaten


def test_quiet_prints_digests_only(smoke):
    done = called(smoke[0], "run", SMOKE, "-q")
    assert done.stdout.splitlines() == [smoke[1][stage]["digest"] for stage in list(smoke[1])[1:]]
    assert done.stderr == ""


def test_csv_and_sorting(smoke, tmp_path):
    path = tmp_path / "table.csv"
    assert called(smoke[0], "eval", "smoke", "--csv", path, "--sort", "top1").returncode == 0
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["instance", "macs", "params", "relative", "top1", "top5", "loss"]
    best = [float(row["top1"]) for row in rows]
    assert best == sorted(best)
    assert len(rows) == 5
    one_line(called(smoke[0], "eval", "smoke", "--csv", path), 2, "table.csv: this file exists; --force replaces it")


def test_accuracy_by_class(smoke, tmp_path):
    path, plain = tmp_path / "classes.csv", document(smoke[0], "eval", "smoke")
    shown = document(smoke[0], "eval", "smoke", "--by-class", "--csv", path)
    classes = shown.pop("by_class")
    assert shown == plain
    assert sorted(row["class"] for row in classes) == list("0123456789")
    assert sum(row["images"] for row in classes) == shown["images"] == 359
    for row in shown["rows"]:
        hits = sum(each["images"] * each["top1"][row["instance"]] / 100 for each in classes)
        assert hits == pytest.approx(359 * row["top1"] / 100)
    full = [row["top1"]["full"] for row in classes]
    assert full == sorted(full)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["class"], float(row["full"])) for row in rows] == [(row["class"], row["top1"]["full"]) for row in classes]
    shutil.copytree(smoke[0], tmp_path, dirs_exist_ok=True)  # the tag moves
    done = called(tmp_path, "eval", "smoke", "--by-class", "--instances", "full,stem@0.5")
    assert "top-1 % by class" in done.stdout
    assert re.search("class +images +stem@0.5 +full\n", done.stdout)


def test_a_stored_table_without_accuracies_by_class_is_refused(smoke, tmp_path):
    shutil.copytree(smoke[0], tmp_path, dirs_exist_ok=True)
    store = Store(tmp_path / ".sdpctl")
    found = store.resolve("smoke.eval")
    layers = {title: store.read(found, title) for title in found.layers}
    table = json.loads(layers["results.json"])
    for row in table["rows"]:
        del row["by_class"]
    layers["results.json"] = json.dumps(table).encode()
    changed = store.commit(found.kind, layers, subject=store.resolve("smoke.bn"), key=found.key, tag="smoke.eval")
    assert len(document(tmp_path, "eval", "smoke")["rows"]) == 5
    message = f"{changed.digest}: results.json has no accuracies by class; evaluate again with --force"
    one_line(called(tmp_path, "eval", "smoke", "--by-class", "-q"), 5, message)


def test_the_number_of_classes_is_that_of_the_folders(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\nmodel: {arch: resnet20}\ndata: {dataset: imagefolder, root: photos}\n")
    one_line(called(tmp_path, "profile-flops", recipe), 7, "photos: there is no such folder", "or set model.num_classes=NUMBER")
    shown = called(tmp_path, "recipe", "show", recipe)
    assert shown.returncode == 0
    assert "num_classes" not in shown.stdout
    assert shown.stderr.startswith("the number of classes is not known: photos: there is no such folder; ")
    for part in ("train", "val"):
        for name in ("a", "b", "c", ".d"):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
    assert "num_classes: 3," in called(tmp_path, "recipe", "show", recipe).stdout
    assert document(tmp_path, "profile-flops", recipe)["model"]["num_classes"] == 3
    known = called(tmp_path, "recipe", "show", recipe, "--set", "data.dataset=cifar100")
    assert "num_classes: 100," in known.stdout


def test_segments_of_a_profile(tmp_path):
    arguments = ("resnet18", "--per-segment", "--instances", "full,layer1.0@0.5", "--num-classes", 10)
    rows = document(tmp_path, "profile-flops", *arguments)["rows"]
    assert [len(row["segments"]) for row in rows] == [10, 10]
    assert all(sum(segment["macs"] for segment in row["segments"]) == row["macs"] for row in rows)
    assert rows[0]["instance"] == "layer1.0@0.5"
    assert rows[1]["segments"][0] == {
        "name": "stem",
        "in": [3, 224, 224],
        "out": [64, 56, 56],
        "macs": 118_013_952,
        "params": 9536,
    }


def test_torch_is_not_imported_for_help(tmp_path):
    """The modules a process has loaded, not its clock."""
    light(
        tmp_path,
        ["--help"],
        ["run", "--help"],
        ["eval", "--help"],
        ["store", "ls", "--help"],
        ["models"],
        ["models", "timm"],
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("sdpctl eval smo", "smoke"),
        ("sdpctl calibrate-bn smoke.", "smoke.eval"),
        ("sdpctl profile-flops preresnet2", "preresnet200"),
        ("sdpctl profile-flops timm/resnet5", "timm/resnet50"),
        ("sdpctl profile-flops t", "timm/"),
        ("sdpctl models torchv", "torchvision/resnet50"),
        ("sdpctl profile-flops timm/resnet50 --instances full,layer4.", "full,layer4.0"),
        ("sdpctl eval smoke --instances full,layer2.", "full,layer2.3"),
        ("sdpctl calib", "calibrate-bn"),
    ],
)
def test_completion_knows_tags_architectures_and_points(smoke, line, expected):
    assert expected in completed(smoke[0], line)


MISTAKES = {
    "a recipe that is not there": (["run", "nowhere.yaml"], 2, ["nowhere.yaml: this recipe cannot be read"]),
    "an option that does not exist": (["run", SMOKE, "--json", "-q"], 2, ["exclude each other"]),
    "a network that does not exist": (
        ["profile-flops", "resnet51"],
        5,
        ["resnet51 is neither an architecture (did you mean 'resnet"],
    ),
    "a network that a library does not have": (
        ["profile-flops", "timm/resnt50"],
        2,
        ["has no network 'resnt50' (did you mean 'resnet50'?); `sdpctl models timm` lists them"],
    ),
    "a network without its library": (
        ["run", SMOKE, "--set", "model.arch=mobilenet_v3_large"],
        3,
        ["model.arch: there is no architecture 'mobilenet_v3_large' (did you mean 'torchvision/mobilenet_v3_large'?)"],
    ),
    "a network whose state is no map": (
        ["profile-flops", "timm/test_vit"],
        2,
        ["timm/test_vit cannot be run at several costs: none of its blocks ends with one map (C x H x W)"],
    ),
    "such a network in a recipe": (
        ["run", SMOKE, "--set", "model.arch=timm/test_vit"],
        3,
        ["--set model.arch=timm/test_vit: model.arch: timm/test_vit cannot be run at several costs: none of its blocks"],
    ),
    "a network with sizes built in": (
        ["profile-flops", "torchvision/swin_t"],
        2,
        ["the sizes of its maps are built in: after features.0 and 12 of 12 other blocks, the rest cannot", "normalized_shape"],
    ),
    "a point that a network of a library lacks": (
        ["profile-flops", "timm/test_resnet", "--instances", "layer9@0.5"],
        2,
        ["layer9@0.5: the network has no point 'layer9'", "it has maxpool, layer1.0"],
    ),
    "weights in place of a network": (
        ["models", "timm/resnet50.a1_in1k", "--points"],
        2,
        ["'timm/resnet50.a1_in1k' names weights; the architecture is timm/resnet50"],
    ),
    "a pattern that nothing matches": (
        ["models", "timm/*resnett50*"],
        2,
        ["no architecture matches 'timm/*resnett50*'; the nearest names are timm/resnet50"],
    ),
    "points of several networks": (["models", "timm/*", "--points"], 2, ["--points shows one architecture"]),
    "a size without points": (["models", "timm", "--image-size", "64"], 2, ["--image-size: only the costs of --points"]),
    "a size that a network of a library cannot take": (
        ["models", "timm/test_convnext", "--points", "--image-size", "3"],
        2,
        ["--image-size 3: timm/test_convnext cannot take images of 3 px", "it is meant for 160 px"],
    ),
    "a column a profile lacks": (["profile-flops", "resnet18", "--sort", "top1"], 2, ["--sort top1: a profile has no scores"]),
    "an empty list": (["profile-flops", "resnet18", "--instances", ""], 2, ["an empty list ('') on the command line"]),
    "ratios beside instances": (
        ["profile-flops", "resnet18", "--ratios", "0.5", "--instances", "full"],
        2,
        ["exclude each other"],
    ),
    "a table in no folder": (["run", SMOKE, "--csv", "nowhere/x.csv"], 2, ["nowhere/x.csv: there is no folder nowhere"]),
    "a holdout of nobody": (
        ["run", SMOKE, "--set", "data.holdout=0.01%"],
        7,
        ["data.holdout=0.01% of each class leaves no image to validate on"],
    ),
    "ratios that are none": (["profile-flops", "resnet18", "--ratios", "1.5"], 2, ["--ratios 1.5: give different numbers"]),
    "a point the network lacks": (["profile-flops", "resnet18", "--instances", "stem@0.5"], 2, ["no point 'stem'"]),
    "an image that is too small": (["profile-flops", "resnet18", "--image-size", "16"], 2, ["divides the size by 32"]),
    "an unknown key": (
        ["run", SMOKE, "--set", "train.lrr=1"],
        3,
        ["--set train.lrr=1: train.lrr: unknown key (did you mean 'lr'?)"],
    ),
    "no store": (["eval", "smoke", "--store", "nothing"], 5, ["nothing: there is no store"]),
    "a folder without data": (
        ["run", SMOKE, "--set", "data.dataset=mnist", "--set", "data.root=nothing"],
        7,
        ["nothing: there is no such data folder; set data.root="],
    ),
    "a device that is not there": (["run", SMOKE, "--set", "device=cuda:77"], 7, ["device 'cuda:77' cannot be used here"]),
    "a loss that explodes": (["run", SMOKE, "--set", "train.lr=1e30"], 9, ["smoke: ", "lower train.lr"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_its_exit_code(name, tmp_path):
    arguments, code, words = MISTAKES[name]
    one_line(called(tmp_path, *arguments), code, *words)
    if (tmp_path / ".sdpctl").exists():
        assert list(Store(tmp_path / ".sdpctl").verify()) == []
        assert Store(tmp_path / ".sdpctl").artifacts() == []


def truncate(root):
    path = root / "train" / "c1" / "2.jpg"
    path.write_bytes(path.read_bytes()[:400])


DAMAGES = {
    "a truncated image": (truncate, ["train/c1/2.jpg: this image cannot be decoded", "data.skip_unreadable=true"]),
    "an empty class folder": (
        lambda root: [p.unlink() for p in (root / "val" / "c0").iterdir()],
        ["val/c0: no image in this folder"],
    ),
    "a missing class": (lambda root: shutil.rmtree(root / "val" / "c1"), ["must have the same class folders", "'c1'"]),
    "one class where two were promised": (
        lambda root: [shutil.rmtree(root / split / "c1") for split in ("train", "val")],
        ["has 1 classes in this folder, but model.num_classes is 2"],
    ),
    "no validation split": (
        lambda root: shutil.rmtree(root / "val"),
        ["val: this folder of imagefolder is missing; set data.root="],
    ),
    "too few images": (lambda root: None, ["do not fill one batch: lower data.batch_size=128"]),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_data_is_one_line_that_names_it(tmp_path, name, workers):
    root = tmp_path / "photographs"
    for split in ("train", "val"):
        for kind in ("c0", "c1"):
            (root / split / kind).mkdir(parents=True)
            for i in range(6):
                Image.effect_noise((40, 40), 80).convert("RGB").save(root / split / kind / f"{i}.jpg")
    damage, words = DAMAGES[name]
    damage(root)
    sets = [
        "data.dataset=imagefolder",
        f"data.root={root}",
        "model.num_classes=2",
        f"data.workers={workers}",
        "data.holdout=20%",
    ]
    sets += [] if name == "too few images" else ["data.batch_size=4"]
    arguments = [part for assignment in sets for part in ("--set", assignment)]
    one_line(called(tmp_path, "run", SMOKE, *arguments), 7, *words)
    assert Store(tmp_path / ".sdpctl").artifacts() == []


def test_an_unknown_tag_and_an_unknown_point(smoke):
    one_line(called(smoke[0], "eval", "smok"), 4, "no artifact 'smok' (did you mean 'smoke'?)")
    unknown = called(smoke[0], "eval", "smoke", "--instances", "maxpool@0.5")
    one_line(unknown, 2, "no point 'maxpool'; it has stem, layer1.0")


def test_usage_errors_of_the_parser_end_with_2(tmp_path):
    done = called(tmp_path, "run")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_bug_is_one_line_unless_debugging(tmp_path, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("sdpctl.recipe.load.load_recipe", broken)
    one_line(called(tmp_path, "run", SMOKE), 1, "this is a bug: ZeroDivisionError: oh; SDPCTL_DEBUG=1 shows where")
    with pytest.raises(ZeroDivisionError):
        called(tmp_path, "run", SMOKE, SDPCTL_DEBUG="1")


def failures(kind=SdpctlError):
    """Yield every class of expected failures."""
    for each in kind.__subclasses__():
        if each.__module__.startswith("sdpctl."):
            yield each
            yield from failures(each)


def test_exit_codes_are_documented(tmp_path):
    text = " ".join(called(tmp_path, "--help").stdout.split())
    (listed,) = re.findall(r"Exit codes: (.*?)\.(?: |$)", text)
    codes = {int(code) for code in re.findall(r"(?:^|, )(\d+) \w", re.sub(r"\(.*?\)", "", listed))}
    raised = {kind.exit_code for kind in failures() if kind is not RunInterruptedError}
    assert codes == {0, SdpctlError.exit_code} | raised | {RunInterruptedError(signum, "").exit_code for signum in STOPPING}
    assert all(f"{128 + signum} {signal.Signals(signum).name}" in listed for signum in STOPPING)


def test_python_m_sdpctl_and_the_installed_command_are_the_same(sdpctl, tmp_path):
    installed = Path(sys.executable).with_name("sdpctl")
    done = subprocess.run([installed, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == sdpctl("--help").stdout
