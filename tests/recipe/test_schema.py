"""Sections are defined once, beside their owners; a recipe takes them as they are, and names from the tables as these stand."""

import hashlib
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from sdpctl.data.catalog import DATASETS
from sdpctl.data.settings import DataSettings
from sdpctl.engine.settings import (
    CalibrateSettings,
    CheckpointSettings,
    EvaluateSettings,
    ProfileSettings,
    TrainSettings,
    ValidateSettings,
    WalkSettings,
)
from sdpctl.errors import RecipeError
from sdpctl.export.catalog import FORMATS
from sdpctl.export.settings import ExportSettings
from sdpctl.models.registry import ARCHITECTURES
from sdpctl.models.settings import ModelSettings
from sdpctl.recipe.load import dump_yaml, load_recipe, parse_recipe
from sdpctl.recipe.schema import Recipe, json_schema
from sdpctl.report.settings import ReportSettings
from sdpctl.sdpoint import SdpointSettings
from sdpctl.search.catalog import REWARDS, STRATEGIES
from sdpctl.search.settings import CascadeSettings, SearchSettings

FOLDER = Path(__file__).parents[2] / "recipes"
HEAD = "name: a\nmodel: {arch: resnet20}\ndata: {dataset: cifar10}\n"

IDENTITIES = {
    "cifar10-fronts": "a357891e197753c02fd6fedae8ae1f256ce53a8a3e8ee4e094f3351f837963d8",
    "cifar10-resnet18": "21199e63dd2f9d0740cd173bc60b64e277e17b6faa05e1b793ea4e3fe24c07f3",
    "cifar10-resnet20-search": "060b7cd5e720d246e95f78db13952eea2afbad2de9e763557b1a7516bcf808f1",
    "cifar10-resnet20": "43fae48303b61229c8d7f7848c295469bd4fe7ed8c60833cb6962f7c96e85ede",
    "cifar100-resnext50": "3a3cc496df341c423566a0462f4b837c87cb5b33b13242db390697b8c847d93a",
    "clothing-resnet18": "54cab24a19d0135cf4b6f86b8ee2c559adea5d5d1dc82b1ff4d92677c097a233",
    "digits": "253a68af7856fcb2e1eb2d735cc44f3b97bc1a2057fb824844415bea26674c31",
    "fashion-mnist": "defc0b86ff20ef8e169aeb842d2562f97d7e3fec983af334b70e38289583e1ad",
    "finetune-timm": "6ccded952ffe5db69067f248801ed2a20e4950beb4ef2092c0130b195593161a",
    "imagenet-preresnet101": "db1b18199052d9cefd4a17236bb03592cb794eec13be239a7b5b7ea3d1a6db99",
    "imagenet-resnet50": "7d962b6a60c8176d2fadd498ff20b28b47a47be66b686dc0a496cf4a74aa08c3",
    "imagenet-resnext101": "a516aa10e7ee8605a400bd5e921757238456210eec802a875bd02bb105c668ab",
    "smoke": "be01e2bf7865d977ac5e0347f42866aceef6edeffa6317a28fe832ff94e8b433",
    "tiny-imagenet-resnext50": "33c2f16f94c8fd627e858e4bc10c29d8421c012d67e0773fe96945466d034049",
    "twopipe-cifar100": "9cb2a59f3d3cbe5e1c1b7f8aaddb663cd2a973a14672166c34d1ebdb713c2205",
    "twopipe-digits": "c06c34e26859029bd7d51535e22b1ae905102a38d5a39de5e651a7ec32703c76",
    "twopipe-mnist": "f923ba209339917b60adc69a751832c840373b296d0b19214a3003d0655cdcdc",
}
"""SHA-256 of the recipe layer of artifacts, by recipe: the keys of every artifact in users' stores depend on these bytes."""

SECTIONS = {
    "model": ("{arch: resnet18, stem: small}", ModelSettings(arch="resnet18", stem="small", num_classes=10)),
    "data": ("{dataset: cifar10, holdout: 15%}", DataSettings(dataset="cifar10", holdout=0.15)),
    "sdpoint": ("{ratios: [0.25], points: all}", SdpointSettings(ratios=(0.25,))),
    "train": (
        "{lr: 1, validate: {every: 2}, checkpoint: {minutes: 3}}",
        TrainSettings(lr=1.0, validate=ValidateSettings(every=2), checkpoint=CheckpointSettings(minutes=3.0)),
    ),
    "calibrate": ("{estimator: ema}", CalibrateSettings(estimator="ema")),
    "evaluate": ("{batches: 3}", EvaluateSettings(batches=3)),
    "profile": ("{ratios: [0.25, 0.5]}", ProfileSettings(ratios=(0.25, 0.5))),
    "search": (
        "{max_macs: none, reward: amc, ratios: [1, 0.5]}",
        SearchSettings(max_macs=None, reward="amc", ratios=(1.0, 0.5)),
    ),
    "cascade": (
        "{max_macs: 1.2G, members: 2, averaged: false, instances: [stem@0.5]}",
        CascadeSettings(max_macs="1.2G", members=2, averaged=False, instances=("stem@0.5",)),
    ),
    "export": ("{format: bundle, instances: pareto}", ExportSettings(format="bundle", instances=("pareto",))),
    "report": ("{format: svg}", ReportSettings(format="svg")),
}


def parse(text, *overrides):
    return parse_recipe(text, "r.yaml", overrides)


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.yaml")), ids=lambda path: path.stem)
def test_identities_of_the_shipped_recipes_are_frozen(path):
    layer = dump_yaml(load_recipe(path, ["data.decoder=pil"]).identity()).encode()
    assert hashlib.sha256(layer).hexdigest() == IDENTITIES[path.stem]


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_decoder_is_recorded_where_images_are_decoded_and_by_earlier_versions_it_was_pil(path):
    identity, earlier = load_recipe(path).identity(), load_recipe(path, ["data.decoder=pil"]).identity()
    decoded = identity["data"]["dataset"] in ("imagefolder", "tiny-imagenet")
    assert identity == earlier | {"data": earlier["data"] | ({"decoder": "torchvision"} if decoded else {})}


def test_every_section_is_known_here():
    sections = {name for name, info in Recipe.model_fields.items() if name not in ("name", "seed", "device", "memory")}
    assert sections == set(SECTIONS)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_recipe_holds_the_settings_of_the_owner(name):
    text, settings = SECTIONS[name]
    kept = "".join(f"{line}\n" for line in HEAD.splitlines() if not line.startswith(name))
    found = getattr(parse(f"{kept}{name}: {text}\n"), name)
    assert found == settings
    assert type(found) is type(settings)
    assert is_dataclass(found)
    with pytest.raises(FrozenInstanceError):
        setattr(found, fields(found)[0].name, None)


@pytest.mark.parametrize("settings", [settings for _, settings in SECTIONS.values()], ids=SECTIONS)
def test_a_type_adapter_validates_a_section_alone(settings):
    adapter = TypeAdapter(type(settings))
    plain = adapter.dump_python(settings)
    assert adapter.validate_python(plain) == settings
    with pytest.raises(ValidationError, match="Unexpected keyword argument"):
        adapter.validate_python(plain | {"zzz": 1})


def test_values_have_exactly_the_declared_type():
    with pytest.raises(ValidationError, match="valid integer"):
        TypeAdapter(TrainSettings).validate_python({"epochs": "3"})
    with pytest.raises(ValidationError, match="finite number"):
        TypeAdapter(TrainSettings).validate_python({"lr": float("inf")})


def test_every_key_is_described():
    schema = json_schema()
    for about in (schema, *schema["$defs"].values()):
        assert about["description"]
        assert "Args:" not in about["description"]
        assert about["additionalProperties"] is False
        for key, value in about["properties"].items():
            assert value.get("description"), key


def test_defaults_in_the_schema_are_written_as_in_a_recipe():
    properties = json_schema()["properties"]
    assert properties["sdpoint"]["default"] == {
        "ratios": [0.5, 0.75],
        "points": "all",
        "draw": "single",
        "drawn": None,
        "weights": None,
        "p": 0.5,
        "budgets": None,
        "instances": None,
    }
    assert properties["train"]["default"]["validate"] == {"every": 1, "instances": ["full"], "batches": 8}


TABLES = {
    "architecture": (ARCHITECTURES, "resnet20", "model.arch", ("ModelSettings", "arch")),
    "data set": (DATASETS, "digits", "data.dataset", ("DataSettings", "dataset")),
    "strategy": (STRATEGIES, "greedy", "search.strategy", ("SearchSettings", "strategy")),
    "strategy of several": (STRATEGIES, "greedy", "search.compare", ("SearchSettings", "compare")),
    "reward": (REWARDS, "amc", "search.reward", ("SearchSettings", "reward")),
    "format": (FORMATS, "onnx", "export.format", ("ExportSettings", "format")),
}


@pytest.mark.parametrize(("table", "like", "key", "place"), TABLES.values(), ids=TABLES)
def test_an_entry_that_is_added_to_a_table_is_accepted_at_once(table, like, key, place):
    def listed():
        about = json_schema()["$defs"][place[0]]["properties"][place[1]]
        about = about.get("items", about)
        return about.get("anyOf", [about])[0]["enum"]

    before = list(table)
    assert listed() == before
    with pytest.raises(RecipeError) as caught:
        parse(HEAD, f"{key}=toy")
    assert table.unknown("toy") in caught.value.problems[0]
    table.add(replace(table[like], name="toy"))
    try:
        assert listed() == [*before, "toy"]
        section, name = key.split(".")
        assert getattr(getattr(parse(HEAD, f"{key}=toy"), section), name) in ("toy", ("toy",))
    finally:
        table.remove("toy")
    assert listed() == before


def test_settings_of_a_walk_are_made_in_one_place():
    recipe = parse(
        HEAD,
        "memory=1MiB",
        "train.precision=bf16",
        "calibrate={keep: full, estimator: ema}",
    )
    memory = 2**20
    assert recipe.calibration == WalkSettings(memory=memory, estimator="ema", keep_full=True)
    assert recipe.evaluation == WalkSettings(memory=memory)
    assert recipe.validation == WalkSettings(memory=memory, precision="bf16")
    assert recipe.scoring == WalkSettings(memory=memory, precision="bf16", keep_full=True)
    assert recipe.changed(search=SearchSettings()).scoring.precision == "bf16"
    assert recipe.changed(search=SearchSettings(precision="fp32")).scoring.precision == "fp32"
    assert parse(HEAD, "calibrate.precision=bf16").calibration == WalkSettings(precision="bf16")
    assert parse(HEAD, "evaluate.precision=bf16").evaluation == WalkSettings(precision="bf16")


def test_a_changed_recipe():
    recipe = parse(HEAD, "data.workers=1")
    changed = recipe.changed(seed=7, data={"fingerprint": "abc"}, export=ExportSettings(), search=None)
    assert changed.data == replace(recipe.data, fingerprint="abc")
    assert (changed.seed, changed.export, changed.search) == (7, ExportSettings(), None)
    assert recipe.data.fingerprint is None
    with pytest.raises(TypeError, match="unexpected keyword argument 'fingerprnt'"):
        recipe.changed(data={"fingerprnt": "abc"})


def test_recipes_need_no_torch():
    script = "import sys, sdpctl.recipe.load\nassert 'torch' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
