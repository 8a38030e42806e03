"""What the README files show is true."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
import yaml
from PIL import Image
from typer.testing import CliRunner

from sdpctl import FULL, Instance, create_model, sdpoint_instances
from sdpctl.cli import app
from sdpctl.cli.options import DEFAULT_STORE
from sdpctl.engine.calibrate import calibrate
from sdpctl.engine.tensors import tensors_to_bytes
from sdpctl.errors import SdpctlError
from sdpctl.export.bundle import to_files
from sdpctl.export.catalog import FORMATS
from sdpctl.export.description import Description, Input, Option
from sdpctl.models.settings import ModelSettings
from sdpctl.recipe.load import load_recipe, parse_recipe
from sdpctl.search.catalog import STRATEGIES

ROOT = Path(__file__).parent.parent
FILES = (
    "README.md",
    *(f"{folder}/README.md" for folder in ("recipes", "sdpctl", "sdpctl/cli", "sdpctl/store", "tests/benchmarks")),
)
TEXTS = {name: (ROOT / name).read_text() for name in FILES}


def blocks(name, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXTS[name], flags=re.MULTILINE | re.DOTALL)


def consoles(name):
    """Return the commands of a file's console blocks, each with the lines that it prints."""
    shown = "".join(f"{block}\n" for block in blocks(name, "console"))
    parts = re.split(r"^\$ (.*)\n", shown, flags=re.MULTILINE)[1:]
    return [(command, output.rstrip().splitlines()) for command, output in zip(parts[::2], parts[1::2], strict=True)]


def commands():
    """Return the words of every sdpctl command line that a file shows."""
    lines = [command for name in FILES for command, _ in consoles(name)]
    lines += [line for name in FILES for block in blocks(name, "sh") for line in block.replace("\\\n", " ").splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return sorted({tuple(shlex.split(part, comments=True)[1:]) for part in parts if part.startswith("sdpctl ")})


def assert_shows(pattern, printed):
    """Check that lines are those printed, where `...` stands for any lines, or for the end of a line."""
    parts = [r"(?:.*\n)*?" if line == "..." else re.escape(line).replace(re.escape("..."), ".*") + r"\n" for line in pattern]
    assert re.fullmatch("".join(parts), "".join(f"{line.rstrip()}\n" for line in printed)), "\n".join(printed)


def masked(lines):
    """Return lines without what differs between machines: digests, dates, sizes and the width of columns."""
    text = "\n".join(lines)
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:+]+", "DATE", text)
    text = re.sub(r"(sha256:[0-9a-f]{64}|\b[0-9a-f]{12}\b)", "DIGEST", text)
    text = re.sub(r"\b[\d,.]*\d( [kMG]\b)?", "NUMBER", text)
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 220


def test_every_link_leads_somewhere():
    anchors = {
        name: {
            re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        }
        for name, text in TEXTS.items()
    }
    links = [(name, link) for name, text in TEXTS.items() for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert len(links) > 10
    for name, link in links:
        path, _, anchor = link.partition("#")
        target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert target.exists(), f"{name}: {link}"
        assert not anchor or anchor in anchors[str(target.relative_to(ROOT))], f"{name}: {link}"


def test_no_console_block_shows_a_digest_that_no_run_checks():
    for name in set(FILES) - {"sdpctl/store/README.md"}:
        for block in blocks(name, "console"):
            assert not re.search(r"\b(?=\w*\d)(?=\w*[a-f])[0-9a-f]{12,}\b", block), f"{name}: {block}"


@pytest.mark.parametrize("number", range(2))
def test_the_recipes_that_are_shown_hold(number):
    parse_recipe(blocks("recipes/README.md", "yaml")[number], "README.md")


def every_key(schema, section, before=""):
    """Yield every key of a section of the recipe schema, with its default; one that is required has none."""
    for name, entry in section["properties"].items():
        choices = [entry, *entry.get("anyOf", ()), *entry.get("allOf", ()), *entry.get("oneOf", ())]
        references = [choice["$ref"].rsplit("/", 1)[1] for choice in choices if "$ref" in choice]
        below = [schema["$defs"][reference] for reference in references if "properties" in schema["$defs"][reference]]
        for part in below:
            yield from every_key(schema, part, f"{before}{name}.")
        if not below:
            yield f"{before}{name}", entry.get("default", "required")


def test_every_key_of_a_recipe_is_explained_with_its_default():
    schema = json.loads((ROOT / "recipes" / "schema.json").read_text())
    explained = {}
    section = ""
    for line in TEXTS["recipes/README.md"].split("## Every key\n")[1].split("\n## ")[0].splitlines():
        if line.startswith("### "):
            title = line.removeprefix("### ")
            section = f"{title}." if re.fullmatch(r"[a-z]+", title) else ""
        if line.startswith("| `"):
            keys, defaults, meaning = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:4])
            assert meaning
            keys, quoted = re.findall("`([^`]+)`", keys), re.findall("`([^`]+)`", defaults)
            values = [yaml.safe_load(text) for text in quoted] or [None if defaults == "null" else defaults]
            for key, value in zip(keys, values * len(keys) if len(values) == 1 else values, strict=True):
                explained[f"{section}{key}"] = value
    expected = dict(every_key(schema, schema))
    for key, default in expected.items():
        default = "all" if default == ["all"] or key.endswith(".points") else default
        assert explained[key] == default, key
    sections = {key.split(".")[0] for key in expected}
    assert set(explained) - set(expected) <= sections


def test_every_strategy_and_format_is_explained():
    for name in (*STRATEGIES, *FORMATS):
        assert f"`{name}`" in TEXTS["sdpctl/cli/README.md"]


def test_every_command_is_in_the_table():
    table = TEXTS["README.md"].split("## Commands\n")[1].split("\n## ")[0]
    program = typer.main.get_command(app)
    for name, command in program.commands.items():
        assert re.search(rf"`{name}[ `]", table) or command.hidden
        for verb in getattr(command, "commands", ()):
            assert re.search(rf"`{name} .*`{verb}`|`{name} {verb}`", table), f"{name} {verb}"


def test_every_exit_code_is_explained():
    table = TEXTS["sdpctl/cli/README.md"].split("## Exit codes\n")[1].split("\n## ")[0]
    explained = {int(code) for codes in re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE) for code in codes.split(",")}
    classes = [SdpctlError]
    for known in classes:
        classes += known.__subclasses__()
    assert explained == {0, 129, 130, 143} | {error.exit_code for error in classes}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_that_is_shown_is_understood(words):
    command, rest = typer.main.get_command(app), list(words)
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    context = command.make_context(words[0], rest)
    recipe = Path(context.params.get("recipe") or ".")
    if words[0] in ("run", "train") and (ROOT / recipe).is_file():
        load_recipe(ROOT / recipe, context.params["set_"] or ())


@pytest.mark.parametrize(
    ("name", "command", "output"),
    [
        (name, *shown)
        for name in FILES
        for shown in consoles(name)
        if shown[0].startswith(("sdpctl profile-flops", "sdpctl models"))
    ],
)
def test_what_needs_no_training_is_printed_as_shown(name, command, output):
    done = CliRunner().invoke(app, shlex.split(command)[1:])
    assert done.exit_code == 0, done.output
    assert_shows(output, done.stdout.splitlines())


def test_the_mistakes_are_reported_as_shown(tmp_path, sdpctl):
    lines = ("name: mine", "model: {arch: resnet21}", "data: {dataset: digits}")
    lines += ("sdpoint: {ratios: [0.5, 2]}", "train: {epochs: 5, lrr: 0.1}")
    (tmp_path / "mine.yaml").write_text("\n".join(lines))
    ((command, output),) = ((c, o) for c, o in consoles("recipes/README.md") if c == "sdpctl run mine.yaml")
    without_columns = [re.sub(r":(\d+):\d+:", r":\1:", line) for line in output]
    done = sdpctl(*command.split()[1:])
    assert done.returncode == 3
    assert [re.sub(r":(\d+):\d+:", r":\1:", line) for line in done.stderr.splitlines()] == without_columns


def test_a_store_looks_as_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = consoles("sdpctl/store/README.md")
    assert [command.split()[2] for command, _ in shown] == ["ls", "show", "verify"]
    quick = ("train.epochs=1", "train.validate.every=0", "calibrate.batches=1")
    run = ["run", str(ROOT / "recipes" / "digits.yaml"), *(word for key in quick for word in ("--set", key))]
    assert CliRunner().invoke(app, run).exit_code == 0
    for command, output in shown:
        done = CliRunner().invoke(app, command.split()[1:])
        assert done.exit_code == 0, done.output
        assert masked(done.output.splitlines()) == masked(output)


@pytest.mark.parametrize("name", ["README.md", "sdpctl/README.md"])
def test_the_python_examples_run(name, tmp_path, monkeypatch):
    codes = blocks(name, "python")
    assert len(codes) == 2
    monkeypatch.chdir(tmp_path)
    make_bundle(tmp_path / "digits.bundle")
    Image.new("L", (20, 30), 128).save(tmp_path / "3.png")
    for code in codes:
        namespace: dict[str, object] = {}
        exec(code.replace("max_latency_ms=5)", "max_latency_ms=5000)"), namespace)  # not what a clock says is tested
        for line in code.splitlines():
            expression, _, comment = line.partition("#")
            if re.match(r" [\d'\"]", comment):
                assert comment.strip().startswith(repr(eval(expression, namespace)))
        if "logits" in namespace:
            assert namespace["logits"].shape in ((2, 10), (1, 10))


def test_the_points_are_as_shown():
    shown = re.search(r"model\.points  # \((.*)\)", TEXTS["README.md"])[1].split(", ")
    points = [repr(point) for point in create_model("resnet50", num_classes=10).points]
    assert shown == [*points[:2], "...", points[-1]]


def make_bundle(folder):
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
    folder.mkdir()
    for name, content in to_files(description, tensors_to_bytes(model.state_dict()), statistics, "").items():
        (folder / name).write_bytes(content)


def test_the_table_is_that_of_the_digits_recipe():
    table = blocks("README.md", "text")[0].splitlines()
    recipe = load_recipe(ROOT / "recipes" / "digits.yaml")
    rows = {line.split()[0] for line in table[1:-1]}
    grid = sdpoint_instances(recipe, recipe.ratios)
    assert len(rows) == 6
    assert rows <= {str(instance) for instance in grid}
    assert f"Six of the {len(grid)} rows" in TEXTS["README.md"].replace("\n", " ")


def test_the_default_store_is_named():
    assert f"default `{DEFAULT_STORE}`" in TEXTS["README.md"].replace("\n", " ")
