"""The card: plain Markdown whose figures are those of the description and whose code does what it says."""

import dataclasses
import io
import json
import re
import sys
from itertools import product

import pytest
import torch
from cascade_options import cascade_option
from markdown_it import MarkdownIt

from sdpctl.engine.calibrate import calibrate
from sdpctl.engine.tensors import tensors_to_bytes
from sdpctl.export.card import card, code
from sdpctl.export.catalog import FORMATS
from sdpctl.export.description import Description, Input, Option
from sdpctl.export.format import Source, format_of
from sdpctl.instance import FULL, Instance
from sdpctl.models import create_model
from sdpctl.models.settings import ModelSettings
from sdpctl.untrusted import printable

FORMS = tuple(FORMATS)
RECIPE = "name: net\ntrain: {epochs: 40, lr: 0.1}\n"
STEM = Instance.parse("stem@0.5")
OPTIONS = (
    Option(instance=STEM, macs=636_954, params=269_434, relative=0.2531, top1=94.43, top5=99.72, loss=0.17, heldout_top1=92.31),
    Option(instance=FULL, macs=2_516_619, params=269_434, relative=1.0, top1=99.16, top5=100.0, loss=0.02, heldout_top1=97.90),
)


CASCADE = cascade_option(
    "mean/stem@0.5~1.3:0.9/full", (636_954, 2_400_000), 2_516_619, left=(75.5, 24.5), heldout_left=(80.0, 20.0), top1=98.75
)


def describe(channels=1, raw=False, options=OPTIONS, heldout=143, cascades=()):
    return Description(
        name="digits",
        network=ModelSettings(arch="resnet20", num_classes=3, in_channels=channels, stem="small"),
        input=Input(size=8, resize=9, mean=(0.1307, 0.25, 0.5)[:channels], std=(0.3081, 0.2, 0.4)[:channels], raw=raw),
        classes=("null", "eins", "zwei"),
        options=options,
        full_macs=2_516_619,
        checkpoint="sha256:" + "1" * 64,
        statistics="sha256:" + "2" * 64,
        test_images=1_359,
        heldout_images=heldout,
        cascades=cascades,
    )


def written(form, **options):
    description = describe(**{"cascades": (CASCADE,) if form == "onnx-cascade" else ()} | options)
    if form not in ("bundle", "onnx-cascade", "onnx-folder"):
        description = dataclasses.replace(description, options=description.options[:1])
    return card(description, form, RECIPE, "It was trained by the recipe below.")


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def table(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize(("form", "channels", "raw"), list(product(FORMS, (1, 3), (False, True))))
def test_a_card_is_plain_markdown(form, channels, raw):
    text = written(form, channels=channels, raw=raw)
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert text.startswith("# digits\n")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "`" not in re.sub(r"`[^`\n]+`", "", prose)
    assert not re.search(r"[<>{}]|&\w+;", prose)
    assert text.count("```") == 2 * (len(blocks(text, "python")) + len(blocks(text, "yaml"))) == 4
    assert [line for line in text.splitlines() if line != line.rstrip()] == []
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert titles == ["Input", "What it costs and how well it does", "Data and training", "How to load it"]


@pytest.mark.parametrize("form", FORMS)
def test_every_instance_has_its_figures(form):
    text = written(form)
    rows = [
        ["`stem@0.5`", "636,954", "25.3 %", "94.43", "99.72", "92.31"],
        ["`full`", "2,516,619", "100.0 %", "99.16", "100.00", "97.90"],
    ]
    head = ["instance", "MACs", "of `full`", "top-1", "top-5", "held-out top-1"]
    line = ["---", *["---:"] * 5]
    whats = dict.fromkeys(("bundle", "onnx-folder"), "with 2 of its instances")
    whats["onnx-cascade"] = "as a cascade of 2 of its instances"
    shown = rows if form in whats else rows[:1]
    assert table(text)[: 2 + len(shown)] == [head, line, *shown]
    assert len(table(text)) == 2 + len(shown) + (3 if form == "onnx-cascade" else 0)
    assert whats.get(form, "at the instance `stem@0.5`") in text
    assert "269,434 parameters" in text
    assert "1,359 test images, held-out top-1 of 143 images" in text


@pytest.mark.parametrize("form", ["bundle", "onnx-cascade"])
def test_cascades_have_a_table(form):
    text = written(form, cascades=(CASCADE,))
    assert table(text)[4:] == [
        ["cascade", "mean MACs", "of `full`", "worst", "answered by each", "top-1", "held-out mean MACs", "held-out top-1"],
        ["---", *["---:"] * 7],
        [
            "`mean/stem@0.5~1.3:0.9/full`",
            f"{636_954 + 0.245 * 2_400_000:,.0f}",
            "48.7 %",
            "3,036,954",
            "75.5 %, 24.5 %",
            "98.75",
            f"{636_954 + 480_000:,}",
            "51.00",
        ],
    ]
    assert ('`model(x, max_macs="50%", cascade=True)` runs' in text) == (form == "bundle")
    assert "cascade" not in written("bundle").lower()


def test_a_cascade_answers_with_probabilities():
    text = written("onnx-cascade")
    assert "Output: probabilities of 3 classes" in text
    assert "no probability was off by more than 0.0001.\n" in text
    assert "Output: logits of 3 classes" in written("onnx")
    assert "no logit was off by more than 0.0001 of the largest, or of 1.\n" in written("onnx")


def test_figures_that_are_not_known_have_no_column():
    few = tuple(dataclasses.replace(option, top5=None, heldout_top1=None) for option in OPTIONS)
    text = written("bundle", options=few, heldout=0)
    assert table(text)[0] == ["instance", "MACs", "of `full`", "top-1"]
    assert table(text)[2:] == [["`stem@0.5`", "636,954", "25.3 %", "94.43"], ["`full`", "2,516,619", "100.0 %", "99.16"]]
    assert "held-out" not in text
    assert "None" not in text


@pytest.mark.parametrize("form", ["onnx", "torch-export", "onnx-cascade"])
@pytest.mark.parametrize(
    ("channels", "raw", "layout", "colour"),
    [
        (1, False, "float32, normalised, (N, 1, 8, 8)", "grey, channels first"),
        (3, False, "float32, normalised, (N, 3, 8, 8)", "RGB, channels first"),
        (1, True, "uint8, 0 to 255, (N, 1, 8, 8)", "grey, channels first"),
        (3, True, "uint8, 0 to 255, (N, 3, 8, 8)", "RGB, channels first"),
    ],
)
def test_the_input_is_said(form, channels, raw, layout, colour):
    text = written(form, channels=channels, raw=raw)
    assert f"`images`: {layout}; N is free" in text
    assert f"# {layout}\n" in blocks(text, "python")[0]
    assert f"- {colour}\n" in text
    assert "- scale the shorter side to 9 px, take the central 8 x 8 px\n" in text
    mean, std = ("0.1307", "0.3081") if channels == 1 else ("0.1307, 0.25, 0.5", "0.3081, 0.2, 0.4")
    steps = f"divide by 255, subtract the mean ({mean}), divide by the standard deviation ({std})\n"
    assert (f"- nothing else: the network itself will {steps}" if raw else f"- {steps}") in text


def test_classes_origin_and_recipe_are_said():
    text = card(describe(), "bundle", RECIPE, "Its weights were imported from weights.pth.")
    assert "logits of 3 classes, in this order:\n`null`, `eins`, `zwei`." in text
    assert "Its weights were imported from weights.pth.\n" in text
    assert blocks(text, "yaml") == [RECIPE]
    assert f"- weights: `sha256:{'1' * 64}`\n- statistics: `sha256:{'2' * 64}`\n" in text


@pytest.mark.parametrize(("form", "raw"), list(product(FORMS, (False, True))))
def test_the_code_compiles(form, raw):
    (code,) = blocks(written(form, raw=raw), "python")
    compile(code, "card", "exec")


@pytest.mark.parametrize("form", FORMS)
def test_the_code_runs_as_it_stands(form, tmp_path, monkeypatch):
    torch.manual_seed(1)
    model = create_model("resnet20", num_classes=3, in_channels=1).eval()
    statistics = calibrate(model, [STEM, FULL], [(torch.randn(4, 1, 8, 8), None)])
    description = describe(options=OPTIONS[:1])
    if form in ("bundle", "onnx-cascade", "onnx-folder"):
        description = describe(cascades=(CASCADE,) if form == "onnx-cascade" else ())
    source = Source(
        model=model,
        statistics=statistics,
        description=description,
        weights=lambda: tensors_to_bytes(model.state_dict()),
        card="card",
    )
    files = format_of(form).write(source)
    (code,) = blocks(written(form), "python")
    monkeypatch.chdir(tmp_path)
    if form == "bundle":
        (tmp_path / "BUNDLE").mkdir()
        for name, content in files.items():
            (tmp_path / "BUNDLE" / name).write_bytes(content)
        (tmp_path / "photo.jpg").write_bytes(picture())
        count = 1
    elif form in ("onnx-cascade", "onnx-folder"):
        (tmp_path / "photo.jpg").write_bytes(picture())
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        monkeypatch.syspath_prepend(tmp_path)
        count = 5 if form == "onnx-cascade" else 1
    else:
        (tmp_path / f"FILE.{FORMATS[form].suffix}").write_bytes(files[FORMATS[form].files[0]])
        count = 5
    images = torch.randn(count, 1, 8, 8)
    names = {"images": images.numpy() if form == "onnx" else images}
    if form == "onnx-cascade":
        names["images"] = images.numpy()
        exec(code, names)
        assert (names["probabilities"].shape, names["left"].shape) == ((count, 3), (count,))
        assert sys.modules.pop("run").__file__ == str(tmp_path / "run.py")
        return
    exec(code, names)
    assert tuple(names["logits"].shape) == (count, 3)
    if form == "onnx-folder":
        assert names["chosen"]["instance"] == str(STEM)
        assert sys.modules.pop("run").__file__ == str(tmp_path / "run.py")
        return
    if form == "onnx":
        classes = names["session"].get_modelmeta().custom_metadata_map["classes"]
        assert json.loads(classes) == ["null", "eins", "zwei"]
    elif form == "torch-export":
        assert json.loads(names["extra"]["export.json"])["classes"] == ["null", "eins", "zwei"]
    else:
        assert names["model"].pick(max_macs="50%").instance == STEM


def picture():
    from PIL import Image

    content = io.BytesIO()
    Image.new("RGB", (20, 30), "red").save(content, "JPEG")
    return content.getvalue()


HOSTILE = [
    "a`b",
    "``",
    "`</code><script>alert(1)</script>",
    "<script>alert(1)</script>",
    "line\nbreak",
    "| cell | cell |",
    "```\n# A heading",
    "````",
    "\x1b[2J",
    "\u202e",
    " ",
    "",
    "[a](javascript:x)",
    "a\\",
    "\\`",
]


def tokens(text):
    found = []
    for token in MarkdownIt("commonmark", {"html": True}).enable("table").parse(text):
        found += [token, *(token.children or ())]
    return found


@pytest.mark.parametrize("form", FORMS)
def test_foreign_text_stays_in_its_span_or_block(form):
    plain = tokens(written(form))
    description = dataclasses.replace(describe(), classes=tuple(HOSTILE), checkpoint=HOSTILE[2], statistics=HOSTILE[6])
    if form == "onnx-cascade":
        description = dataclasses.replace(description, cascades=(CASCADE,))
    elif form not in ("bundle", "onnx-folder"):
        description = dataclasses.replace(description, options=description.options[:1])
    recipe = "name: net\nnote: |\n  ```\n  # A heading\n  <script>\n  ````\n"
    text = card(description, form, recipe, f"Its weights were imported from {code(HOSTILE[2])}.")
    found = tokens(text)
    assert not {token.type for token in found} - {token.type for token in plain}
    for kind in ("heading_open", "tr_open", "td_open", "fence", "paragraph_open"):
        assert sum(token.type == kind for token in found) == sum(token.type == kind for token in plain)
    assert next(token.content for token in found if token.type == "fence" and token.info == "yaml") == recipe
    spans = [token.content for token in found if token.type == "code_inline"]
    for name in HOSTILE:
        assert (printable(name) or "(empty)") in spans
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_a_cell_cannot_end_its_row():
    instance = Instance((("a|b`", 0.5),))
    text = card(describe(options=(dataclasses.replace(OPTIONS[0], instance=instance),)), "bundle", RECIPE, "It was trained.")
    assert [token.type for token in tokens(text)].count("td_open") == 6
    assert "a|b`@0.5" in [token.content for token in tokens(text) if token.type == "code_inline"]
