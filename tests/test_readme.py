"""What the README shows is true."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from sdpctl import FULL, Instance, create_model
from sdpctl.cli.options import DEFAULT_STORE
from sdpctl.engine.calibrate import calibrate
from sdpctl.engine.tensors import tensors_to_bytes
from sdpctl.export.bundle import to_files
from sdpctl.export.description import Description, Input, Option
from sdpctl.models.settings import ModelSettings
from sdpctl.pipeline.context import grid
from sdpctl.recipe.load import load_recipe, parse_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_the_recipe_that_is_explained_holds():
    (text,) = blocks("yaml")
    recipe = parse_recipe(text, "README.md")
    named = set(re.findall(r"(\w+):", re.sub(r"#.*", "", text)))
    for section in (recipe.model, recipe.data, recipe.train, recipe.calibrate, recipe.evaluate, recipe.sdpoint):
        for name, info in type(section).model_fields.items():
            known = {"momentum", "weight_decay", "milestones", "gamma", "channels_last", "p", "fingerprint", "batches", "init"}
            known |= {"keep", "widths", "masks", "partial"}
            assert (info.alias or name) in named | known


def test_the_python_example_runs(capsys):
    code, _ = blocks("python")
    shown = {}
    for line in code.splitlines():
        expression, _, comment = line.partition("#")
        if comment and "..." not in comment:
            shown[expression.strip()] = comment.strip()
    namespace: dict[str, object] = {}
    exec(code, namespace)
    assert namespace["logits"].shape == (2, 10)
    assert namespace["model"].points[:2] == ("maxpool", "layer1.0")
    for expression, comment in shown.items():
        assert comment.startswith(repr(eval(expression, namespace)))


def test_the_runtime_example_runs(tmp_path, monkeypatch):
    instances = [Instance.parse("stem@0.5"), FULL]
    model = create_model("resnet20", num_classes=10, in_channels=1)
    statistics = calibrate(model, instances, [(torch.rand(8, 1, 8, 8), torch.zeros(8))])
    figures = {"params": 1, "relative": 1.0, "top1": 90.0, "top5": None, "loss": 0.1, "heldout_top1": 90.0}
    description = Description(
        name="digits",
        network=ModelSettings(arch="resnet20", num_classes=10, in_channels=1, stem="small"),
        input=Input(size=8, resize=8, mean=(0.3,), std=(0.4,)),
        classes=tuple("0123456789"),
        options=tuple(Option(instance=instance, macs=macs, **figures) for macs, instance in enumerate(instances, 1)),
        full_macs=2,
        checkpoint="",
        statistics="",
        test_images=1,
        heldout_images=1,
    )
    (tmp_path / "digits.bundle").mkdir()
    for name, content in to_files(description, tensors_to_bytes(model.state_dict()), statistics, "").items():
        (tmp_path / "digits.bundle" / name).write_bytes(content)
    Image.new("L", (20, 30), 128).save(tmp_path / "3.png")
    monkeypatch.chdir(tmp_path)
    _, code = blocks("python")
    namespace: dict[str, object] = {}
    exec(code.replace("max_latency_ms=5", "max_latency_ms=5000"), namespace)  # not what a clock says is tested
    assert namespace["logits"].shape == (1, 10)


def test_the_table_is_that_of_the_digits_recipe():
    table = blocks("text")[0].splitlines()
    recipe = load_recipe(ROOT / "recipes" / "digits.yaml")
    assert {line.split()[0] for line in table[2:-1]} == {str(instance) for instance in grid(recipe)}


@pytest.mark.parametrize("line", sorted(set(re.findall(r"^\$ (sdpctl [^\n]+)$", README, flags=re.MULTILINE))))
def test_every_command_that_is_shown_has_these_options(line, sdpctl, tmp_path):
    words = line.split()[1:]
    command = words[:2] if words[0] in ("store", "recipe") else words[:1]
    help_text = sdpctl(*command, "--help", env={"COLUMNS": "200"}).stdout
    for option in (word for word in words if word.startswith("--")):
        assert option in help_text


def test_the_default_store_is_named():
    assert f"default `{DEFAULT_STORE}`" in README
