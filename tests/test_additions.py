"""One entry from outside on each axis, as a user meets it: schema, completion, run, search, export, plan of a dry run."""

import json
from dataclasses import dataclass
from typing import Annotated

import pytest
import torch
import torch.nn.functional as F
from command import called, document
from pydantic import Field
from torch import nn

from sdpctl import fields
from sdpctl.data.catalog import DATASETS, DatasetInfo
from sdpctl.data.reader import Located, Reader
from sdpctl.data.sources import Source
from sdpctl.export.catalog import CARD, FORMATS, FormatInfo
from sdpctl.export.format import Format
from sdpctl.export.network import one_instance
from sdpctl.kinds import KINDS, Kind, without_suffix
from sdpctl.models.chain import Chain, Segment, average_shrink, shrunk
from sdpctl.models.registry import ARCHITECTURES, FAMILIES, Architecture, Family
from sdpctl.search.catalog import REWARDS, STRATEGIES, RewardInfo, StrategyInfo
from sdpctl.section import Section
from sdpctl.stages.evaluate import Evaluate
from sdpctl.stages.layers import read_document
from sdpctl.stages.optional import OptionalStage
from sdpctl.stages.stage import Job, Made, key_of
from sdpctl.store import Store
from sdpctl.store.layout import canonical


class ToyNetwork(Chain):
    """Two convolutions, between which the map may shrink, and a classifier."""

    classifier_name = "linear"
    input_conv_name = "conv"

    def __init__(self, _, *, num_classes, in_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.linear = nn.Linear(8, num_classes)

    def segments(self):
        return (
            Segment(
                "conv", ("conv", "bn"), lambda x, norm: norm(self.bn, self.conv(x), own=True).relu(), "mid", average_shrink
            ),
            Segment("head", ("last", "linear"), lambda x, _: self.linear(self.last(x).relu().mean((2, 3)))),
        )


class ToyData(Reader):
    """Stripes of 8x8 pixels: across, along, or none. Needs no files."""

    def locate(self, root, *, partial):
        return Located((), {}, fingerprint="ab" * 32)

    def open(self, root, located):
        labels = torch.arange(90) % 3
        images = torch.randint(0, 60, (90, 1, 8, 8), generator=torch.Generator().manual_seed(0))
        images[labels == 0, :, ::2] += 150
        images[labels == 1, :, :, ::2] += 150
        images = images.to(torch.uint8)
        return tuple(Source(images[part], labels[part], ("across", "along", "none")) for part in (slice(60), slice(60, 90)))


def cheapest(problem, score):
    """Ask for the networks within the budget, the smallest ratios first."""
    for network in list(problem.space.networks(problem.limit))[::-1]:
        score([network])


def top1_for_cost(facts, weight):
    """Return top-1 less `weight` for the whole of `full`."""
    return facts.top1 - weight * facts.relative


class ToyFormat(Format):
    """The weights as text."""

    def write(self, source):
        (option,) = source.description.options
        model = one_instance(source).network
        weights = {name: value for name, value in model.state_dict().items() if not name.startswith("bn.")}
        scale = model.bn.weight / torch.sqrt(model.bn.running_var + model.bn.eps)
        weights["conv.weight"] = model.conv.weight * scale[:, None, None, None]
        weights["conv.bias"] = model.bn.bias - model.bn.running_mean * scale
        weights["side"] = torch.tensor(shrunk(source.description.input.size, option.instance.ratio("mid")))
        text = json.dumps({name: value.tolist() for name, value in weights.items()})
        return {"weights.json": text.encode(), CARD: source.card.encode()}

    def run(self, files, images):
        said = {name: torch.tensor(value) for name, value in json.loads(files["weights.json"]).items()}
        x_NCHW = F.conv2d(torch.from_numpy(images), said["conv.weight"], said["conv.bias"], padding=1).relu()
        x_NCHW = F.adaptive_avg_pool2d(x_NCHW, said["side"].item())
        x_NCHW = F.conv2d(x_NCHW, said["last.weight"], said["last.bias"], padding=1).relu()
        return F.linear(x_NCHW.mean((2, 3)), said["linear.weight"], said["linear.bias"]).numpy()[None]

    def loading(self, images):
        return f"Give {images} to the weights in `weights.json`."


@dataclass(frozen=True, kw_only=True)
class SpreadSettings(Section):
    """An optional stage: how far the instances are apart.

    Args:
        decimals: digits after the point.
    """

    decimals: Annotated[int, Field(ge=0, le=9)] = 2


class Spread(OptionalStage):
    """Write down the difference between the best and the worst top-1."""

    def __init__(self, network):
        self.network = network
        self.decimals = network.recipe.optional("spread").decimals

    @property
    def kind(self):
        return KINDS["spread"]

    @classmethod
    def of(cls, network):
        return cls(network)

    @property
    def tag(self):
        return f"{self.network.name}.spread"

    def steps(self, context):
        table = yield Evaluate(self.network)
        key = key_of(self.kind, table=table.digest, decimals=self.decimals)
        return Job(key=key, make=lambda: self.made(read_document(context.store, table)["rows"]), subject=table)

    def task(self, context):
        return f"compare instances to {self.decimals} decimals"

    def made(self, rows):
        top1 = [row["top1"] for row in rows]
        spread = round(max(top1) - min(top1), self.decimals)
        return Made({"spread.json": canonical({"spread": spread})}, f"{spread} points of top-1")


check_spread = fields.section({"spread": fields.number(0, 100)})

ENTRIES = {
    "family": (FAMILIES, Family(name="toy-family", network=f"{__name__}:ToyNetwork")),
    "architecture": (ARCHITECTURES, Architecture(name="toy-net", family="toy-family", fixed_points=("mid",))),
    "data set": (DATASETS, DatasetInfo(name="toy-data", num_classes=3, mean=(0.3,), std=(0.3,), code=f"{__name__}:ToyData")),
    "strategy": (STRATEGIES, StrategyInfo(name="toy-cheapest", summary="the cheapest", code=f"{__name__}:cheapest")),
    "reward": (
        REWARDS,
        RewardInfo(
            name="toy-reward", summary="less cost", code=f"{__name__}:top1_for_cost", uses=frozenset({"top1", "relative"})
        ),
    ),
    "format": (
        FORMATS,
        FormatInfo(
            name="toy-v2",
            summary="weights as text",
            suffix="toy",
            files=("weights.json",),
            code=f"{__name__}:ToyFormat",
            raw_input=False,
            latency=False,
        ),
    ),
    "stage": (
        KINDS,
        Kind(
            name="spread",
            command="spread",
            suffixes=("spread",),
            document="spread.json",
            check=f"{__name__}:check_spread",
            section="spread",
            settings=f"{__name__}:SpreadSettings",
            stage=f"{__name__}:Spread",
        ),
    ),
}
"""What is added: for each axis one entry of its table."""

RECIPE = """
name: toy
model: {arch: toy-net, in_channels: 1}
data: {dataset: toy-data, image_size: 8, batch_size: 20, workers: 0, augment: none, holdout: 20%}
sdpoint: {ratios: [0.5]}
train: {epochs: 20, lr: 0.1}
search: {strategy: toy-cheapest, max_macs: none, reward: toy-reward, weight: 10, evaluations: 2}
export: {format: toy-v2}
spread: {decimals: 1}
"""


@pytest.fixture(scope="module", autouse=True)
def added():
    """Add every entry; the tables are as before afterwards."""
    before = [list(table) for table, _ in ENTRIES.values()]
    for table, entry in ENTRIES.values():
        table.add(entry)
    yield
    for table, entry in ENTRIES.values():
        table.remove(entry.name)
    assert [list(table) for table, _ in ENTRIES.values()] == before


@pytest.fixture(scope="module")
def folder(tmp_path_factory, added):
    """A folder with the recipe and a store in which it was run, and what the run printed."""
    folder = tmp_path_factory.mktemp("additions")
    (folder / "toy.yaml").write_text(RECIPE)
    (folder / "run.json").write_text(json.dumps(document(folder, "run", "toy.yaml")))
    return folder


@pytest.fixture(scope="module")
def ran(folder):
    """What the run printed."""
    return json.loads((folder / "run.json").read_text())


def completed(folder, line):
    """Complete a command line as bash asks for it, in this process, which knows the entries."""
    words = {"_SDPCTL_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    return called(folder, **words).stdout.split()


def test_the_schema_shows_each(tmp_path):
    schema = json.loads(called(tmp_path, "recipe", "schema").stdout)
    known = schema["$defs"]
    assert "toy-net" in known["ModelSettings"]["properties"]["arch"]["anyOf"][0]["enum"]
    assert "toy-data" in known["DataSettings"]["properties"]["dataset"]["enum"]
    assert "toy-cheapest" in known["SearchSettings"]["properties"]["strategy"]["enum"]
    assert "toy-cheapest" in known["SearchSettings"]["properties"]["compare"]["items"]["enum"]
    assert "toy-reward" in known["SearchSettings"]["properties"]["reward"]["anyOf"][0]["enum"]
    assert "toy-v2" in known["ExportSettings"]["properties"]["format"]["enum"]
    assert {"$ref": "#/$defs/SpreadSettings"} in schema["properties"]["spread"]["anyOf"]
    assert known["SpreadSettings"]["properties"]["decimals"] == {
        "type": "integer",
        "minimum": 0,
        "maximum": 9,
        "default": 2,
        "title": "Decimals",
        "description": "digits after the point.",
    }


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("sdpctl profile-flops toy-n", ["toy-net"]),
        ("sdpctl import --arch toy-n", ["toy-net"]),
        ("sdpctl eval toy --instances mi", ["mid"]),
        ("sdpctl search toy --strategy toy", ["toy-cheapest"]),
        ("sdpctl export toy --format toy", ["toy-v2"]),
        ("sdpctl store show toy.s", ["toy.search", "toy.search.any", "toy.spread"]),
    ],
)
def test_completion_offers_each(folder, line, offered):
    assert sorted(completed(folder, line)) == offered


def test_a_run_trains_it_and_makes_the_table_and_every_result(folder, ran):
    made = ["train", "calibrate-bn", "eval-instances", "search", "export", "spread"]
    assert list(ran) == ["schema", *made]
    assert [row["instance"] for row in ran["eval-instances"]["rows"]] == ["mid@0.5", "full"]
    assert ran["eval-instances"]["rows"][1]["top1"] > 90
    assert [run["run"] for run in ran["search"]["runs"]] == ["single-point", "toy-cheapest", "random"]
    assert ran["export"]["tag"].startswith("toy.export.toy-v2.")
    table = called(folder, "run", "toy.yaml")
    assert table.returncode == 0, table.stderr
    assert table.stdout.splitlines()[0] == "toy.eval: 30 test images"
    assert [line.split()[0] for line in table.stdout.splitlines()[2:4]] == ["mid@0.5", "full"]
    assert f"toy.spread: in the store already, {ran['spread']['digest'][7:19]}" in table.stderr


def test_the_result_of_the_stage_is_an_artifact_like_any_other(folder, ran):
    assert ran["spread"]["tag"] == "toy.spread"
    store = Store(folder / ".sdpctl")
    top1 = [row["top1"] for row in ran["eval-instances"]["rows"]]
    assert read_document(store, store.resolve("toy.spread")) == {"spread": round(max(top1) - min(top1), 1)}
    shown = document(folder, "store", "show", "toy.spread")
    assert (shown["kind"], [link["tag"] for link in shown["lineage"]]) == ("spread", ["toy.eval", "toy.bn", "toy"])
    assert document(folder, "eval", "toy.spread")["digest"] == ran["eval-instances"]["digest"]


def test_the_strategy_searches_and_its_name_is_suggested(folder):
    found = document(folder, "search", "toy", "--strategy", "toy-cheapest", "--seeds", "2")
    assert [(run["run"], run["seed"]) for run in found["runs"][1:3]] == [("toy-cheapest", 0), ("toy-cheapest", 1)]
    wrong = called(folder, "search", "toy", "--strategy", "toy-cheap")
    assert (wrong.returncode, "there is no strategy 'toy-cheap' (did you mean 'toy-cheapest'?)" in wrong.stderr) == (3, True)


def test_the_reward_compares_the_networks(folder):
    found = document(folder, "search", "toy")
    assert found["reward"] == "toy-reward"
    rows = {row["instance"]: row["heldout"]["top1"] - 10 * row["relative"] for row in (*found["runs"], found["full"])}
    assert max(rows, key=rows.get) == found["best"]["instance"]


def test_the_format_is_written_and_written_again(folder, tmp_path):
    said = document(folder, "export", "toy", "--format", "toy-v2", "--instance", "mid@0.5", "-o", tmp_path / "a.toy")
    assert (said["format"], said["options"][0]["instance"]) == ("toy-v2", "mid@0.5")
    again = document(folder, "export", said["tag"], "-o", tmp_path / "b.toy")
    assert again["digest"] == said["digest"]
    assert (tmp_path / "a.toy").read_bytes() == (tmp_path / "b.toy").read_bytes()
    assert "to the weights in `weights.json`." in (tmp_path / "a.toy.md").read_text()
    assert without_suffix(said["tag"], "export") == "toy"


def test_a_dry_run_lists_what_would_be_made_of_it(folder):
    plan = document(folder, "run", "toy.yaml", "--dry-run", "--set", "seed=1", "--set", "spread.decimals=3")["plan"]
    assert [(step["kind"], step["digest"]) for step in plan] == [
        (kind, None) for kind in ("checkpoint", "bn-statistics", "evaluation", "search", "export", "spread")
    ]
    assert plan[-1] | {"reason": None} == {
        "tag": "toy.spread",
        "kind": "spread",
        "digest": None,
        "task": "compare instances to 3 decimals",
        "reason": None,
    }
    lines = called(folder, "run", "toy.yaml", "--dry-run", "--set", "spread.decimals=3").stdout.splitlines()
    (line,) = (line for line in lines if line.startswith("toy "))
    assert "keep the same weights with this recipe" in line  # the checkpoint records the whole recipe
    lines = called(folder, "run", "toy.yaml", "--dry-run").stdout.splitlines()
    assert sum(" in the store: " in line for line in lines) == 6
