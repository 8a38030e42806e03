"""The export as a stage: what is chosen and committed, what is left alone, when it refuses; and opening what was made."""

import dataclasses
import io
import json
import shutil
import sys
import zipfile
from collections import Counter

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load as load_tensors
from stage_calls import calibrate, document, evaluate, export, run, search, train

import sdpctl
from sdpctl.engine.tree import Tree
from sdpctl.errors import (
    BudgetError,
    DataError,
    InstanceError,
    IntegrityError,
    NotFoundError,
    RecipeError,
    SdpctlError,
    UsageError,
)
from sdpctl.export import check
from sdpctl.export.bundle import BundleFormat
from sdpctl.export.catalog import CARD
from sdpctl.export.onnx import OnnxFormat
from sdpctl.export.torch_export import TorchExportFormat
from sdpctl.instance import FULL, Instance
from sdpctl.models import create_model
from sdpctl.plan import Plan
from sdpctl.runtime import Runtime
from sdpctl.stages import choosing
from sdpctl.stages.context import Context
from sdpctl.stages.export import Export, export_files
from sdpctl.stages.network import open_network
from sdpctl.stages.opening import open_data
from sdpctl.stages.search import found_instances

pytestmark = pytest.mark.usefixtures("quick_sqlite")

MANY = ["full", "stem@0.5", "layer1.0@0.5", "layer1.1@0.5", "layer2.0@0.5", "layer2.2@0.5", "layer3.2@0.75", "layer1.2@0.5"]
"""Instances of many costs; layer3.2@0.75 is the same network as full."""

FORMATS = {"onnx": OnnxFormat, "torch-export": TorchExportFormat, "bundle": BundleFormat}


def made(context, *overrides, **options):
    return export(open_network("tiny", context, overrides), context, **options)


def planned(context, *overrides, **options):
    """Return the step that a dry run ends with, which makes no export."""
    plan = Plan(dataclasses.replace(context, dry_run=True))
    assert plan.run(Export(open_network("tiny", context, overrides), **options)) is None
    return plan.steps[-1]


def copied(store, folder, report):
    shutil.copytree(store, folder / "store")
    return Context(path=folder / "store", report=report)


def layers(artifact, context):
    return {title: context.store.read(artifact, title) for title in artifact.layers}


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def digests(context):
    return {artifact.tag: artifact.digest for artifact in context.store.artifacts() if artifact.tag}


@pytest.fixture(scope="module")
def prepared(trained, make_once, make_listener):
    """The same store with many instances calibrated, and evaluated on both splits."""

    def prepare(folder):
        context = copied(trained, folder, make_listener())
        calibrate(open_network("tiny", context), context, MANY)
        evaluate(open_network("tiny.bn", context), context)
        evaluate(open_network("tiny.bn", context), context, split="holdout")

    return make_once("prepared", prepare) / "store"


@pytest.fixture(scope="module")
def exported(prepared, make_once, make_listener):
    """A store with an export of every format, run outside, and the artifacts; the listener heard all of it."""

    def export_all(folder):
        context = copied(prepared, folder, make_listener())
        digests = {form: made(context, f"export.format={form}").digest for form in FORMATS}
        (folder / "heard.json").write_text(json.dumps({"digests": digests, "notes": context.report.notes}))

    folder = make_once("exported", export_all)
    heard, context = json.loads((folder / "heard.json").read_text()), Context(path=folder / "store", report=make_listener())
    context.report.notes += heard["notes"]
    return context, {form: context.store.resolve(digest) for form, digest in heard["digests"].items()}


@pytest.fixture
def context(prepared, tmp_path, listener):
    return copied(prepared, tmp_path, listener)


@pytest.fixture
def hollow(monkeypatch, believed):
    """Write nothing but the instance's name either: what is chosen is tested, not what is written."""
    for form, name in ((OnnxFormat, "model.onnx"), (TorchExportFormat, "model.pt2")):
        monkeypatch.setattr(form, "write", lambda _, source, name=name: hollow_files(name, source))


def hollow_files(name, source):
    return {name: str(source.description.options[0].instance).encode(), CARD: source.card.encode()}


@pytest.fixture(scope="module")
def scores(prepared, make_listener):
    """MACs and held-out accuracy of each instance, run alone with PyTorch's own batch norms."""
    context = Context(path=prepared, report=make_listener())
    opened = open_network("tiny", context)
    weights = load_tensors(context.store.read(opened.checkpoint.artifact, "model.safetensors"))
    statistics = load_tensors(context.store.read(context.store.resolve("tiny.bn"), "statistics.safetensors"))
    data, found = open_data(opened.recipe, torch.device("cpu"), context), {}
    macs = {row["instance"]: row["macs"] for row in document(context.store.resolve("tiny.eval"), context)["rows"]}
    for text in MANY:
        model = create_model("resnet20", num_classes=10, in_channels=1).eval()
        model.load_state_dict(weights)
        for i, segment in enumerate(model.segments()):
            node = Instance.parse(text).among(s.point for s in model.segments()[:i] if s.point)
            for name, bn in model.norms(segment).items():
                bn.running_mean.copy_(statistics[f"{node}/{name}.running_mean"])
                bn.running_var.copy_(statistics[f"{node}/{name}.running_var"])
        with torch.inference_mode():
            hits = [(model(x, text).argmax(1) == y) for x, y in data.holdout(64)]
        found[text] = macs[text], torch.cat(hits).sum().item()
    return found


def front_of(scores):
    """Return the instances that none beats, the first of equals, the cheapest first."""
    best = {}
    for text, (macs, hits) in scores.items():
        beaten = any(m <= macs and h >= hits and (m, h) != (macs, hits) for m, h in scores.values())
        if not beaten:
            best.setdefault((macs, hits), text)
    return [best[key] for key in sorted(best)]


# What is made


@pytest.mark.parametrize("form", FORMATS)
def test_the_artifact_names_what_it_is_made_of(exported, form):
    context, artifacts = exported
    artifact, texts = artifacts[form], (MANY if form == "bundle" else ["full"])
    assert artifact.kind == "export"
    assert artifact.subject.digest == context.store.resolve("tiny.bn").digest
    assert artifact.tag.startswith(f"tiny.export.{form}.")
    assert len(artifact.tag.rpartition(".")[2]) == 12
    assert context.store.resolve(artifact.tag).digest == artifact.digest
    said = document(artifact, context)
    assert (said["format"], said["name"], said["checkpoint"]) == (form, "tiny", context.store.resolve("tiny").digest)
    assert {option["instance"] for option in said["options"]} == set(texts)
    assert [option["macs"] for option in said["options"]] == sorted(option["macs"] for option in said["options"])
    rows = {row["instance"]: row for row in document(context.store.resolve("tiny.eval"), context)["rows"]}
    for option in said["options"]:
        assert option["top1"] == rows[option["instance"]]["top1"]
    assert list(context.store.verify()) == []
    assert any(note.startswith(f"{artifact.tag}: run outside on ") for note in context.report.notes)


def test_only_a_bundle_knows_held_out_accuracies(exported):
    context, artifacts = exported
    rows = {row["instance"]: row["top1"] for row in document(context.store.resolve("tiny.holdout"), context)["rows"]}
    options = document(artifacts["bundle"], context)["options"]
    assert {option["instance"]: option["heldout_top1"] for option in options} == rows
    for form in ("onnx", "torch-export"):
        said = document(artifacts[form], context)
        assert (said["heldout_images"], said["options"][0]["heldout_top1"]) == (0, None)


def test_the_files_are_those_of_the_format(exported):
    context, artifacts = exported
    names = {form: set(export_files(artifact, context)) for form, artifact in artifacts.items()}
    assert names == {
        "onnx": {"model.onnx", "card.md"},
        "torch-export": {"model.pt2", "card.md"},
        "bundle": {"bundle.json", "card.md", "model.safetensors", "statistics.safetensors", "SHA256SUMS"},
    }
    assert export_files(artifacts["bundle"], context)["model.safetensors"] == context.store.read(
        context.store.resolve("tiny"), "model.safetensors"
    )


def test_the_files_do_what_evaluation_saw(exported):
    context, artifacts = exported
    session = onnxruntime.InferenceSession(export_files(artifacts["onnx"], context)["model.onnx"])
    program = torch.export.load(io.BytesIO(export_files(artifacts["torch-export"], context)["model.pt2"])).module()
    test = list(open_data(open_network("tiny", context).recipe, torch.device("cpu"), context).test(64))
    onnx = [session.run(None, {"images": x.contiguous().numpy()})[0].argmax(1) for x, _ in test]
    with torch.inference_mode():
        pt2 = [program(x).argmax(1).numpy() for x, _ in test]
    labels = np.concatenate([y.numpy() for _, y in test])
    rows = {row["instance"]: row for row in document(context.store.resolve("tiny.eval"), context)["rows"]}
    for found in (onnx, pt2):
        share = 100 * (np.concatenate(found) == labels).mean()
        assert share == pytest.approx(rows["full"]["top1"], abs=100 / 359 + 1e-9)


def test_no_layer_says_where_anything_lies(exported, repository):
    context, artifacts = exported
    places = [str(context.path.parent), str(repository), sys.prefix, "site-packages"]
    for artifact in artifacts.values():
        contents = layers(artifact, context)
        with zipfile.ZipFile(io.BytesIO(contents.get("model.pt2", b"PK\x05\x06" + bytes(18)))) as archive:
            contents |= {name: archive.read(name) for name in archive.namelist()}
        for title, content in contents.items():
            assert not [place for place in places if place.encode() in content], title


def test_one_digest_wherever_data_and_store_are(tiny, image_folder, tmp_path, listener, believed):
    found = []
    for place in ("here", "there"):
        folder = tmp_path / place
        folder.mkdir()
        root = image_folder(f"{place}/pictures")
        data = ["data.dataset=imagefolder", "data.batch_size=4", f"data.root={root}", "data.holdout=25%", "train.epochs=0"]
        context = Context(path=folder / "store", report=listener)
        train(tiny(*data, "model.num_classes=2"), context)
        few = {form: made(context, f"export={{format: {form}}}") for form in ("bundle", "onnx")}
        found.append({form: (a.digest, a.tag) for form, a in few.items()})
        for artifact in few.values():
            assert not [title for title, content in layers(artifact, context).items() if str(tmp_path).encode() in content]
    assert found[0] == found[1]


def test_raw_pixels_may_come_in(exported, tmp_path, listener):
    context = copied(exported[0].path, tmp_path, listener)
    artifact = made(context, "export={raw_input: true}")
    assert document(artifact, context)["input"]["raw"] is True
    session = onnxruntime.InferenceSession(context.store.read(artifact, "model.onnx"))
    assert session.get_inputs()[0].type == "tensor(uint8)"
    pixels = open_data(open_network("tiny", context).recipe, torch.device("cpu"), context).examples(40)
    plain = onnxruntime.InferenceSession(context.store.read(exported[1]["onnx"], "model.onnx"))
    wanted = plain.run(None, {"images": ((pixels / 255 - 0.3053) / 0.3760).numpy()})[0]
    np.testing.assert_allclose(session.run(None, {"images": pixels.numpy()})[0], wanted, atol=1e-4 * np.abs(wanted).max())


# Which instances


@pytest.mark.parametrize("form", ["onnx", "torch-export"])
def test_the_instance_that_is_named_or_full(context, hollow, form):
    texts = [option["instance"] for option in document(made(context, f"export.format={form}"), context)["options"]]
    assert texts == ["full"]
    named = made(context, f"export={{format: {form}, instance: layer2.0@0.5+stem@0.5}}")
    assert [option["instance"] for option in document(named, context)["options"]] == ["stem@0.5+layer2.0@0.5"]
    with pytest.raises(RecipeError, match=r"export\.instance: .*no point 'layer4\.0'"):
        made(context, "export.instance=layer4.0@0.5")


def test_a_bundle_of_all_that_are_calibrated_of_the_best_and_of_a_list(context, hollow, scores):
    def texts(what):
        options = document(made(context, f"export={{format: bundle, instances: {what}}}"), context)["options"]
        return [option["instance"] for option in options]

    assert sorted(texts("all")) == sorted(MANY)
    assert texts("pareto") == front_of(scores)
    assert 1 < len(front_of(scores)) < len(MANY)
    assert texts("[full, layer3.0@0.5, stem@0.5]") == ["stem@0.5", "layer3.0@0.5", "full"]
    with pytest.raises(RecipeError, match=r"export\.instances\.1: .*no point 'layer3\.7'"):
        made(context, "export={format: bundle, instances: [full, layer3.7@0.5]}")


@pytest.mark.parametrize("texts", [["full", "layer3.2@0.75"], ["layer3.2@0.75", "full"]])
def test_of_equals_the_first_is_taken(trained, tmp_path, listener, hollow, texts):
    context = copied(trained, tmp_path, listener)
    calibrate(open_network("tiny", context), context, texts)
    for section in ("{format: bundle, instances: pareto}", "{max_macs: 100%}"):
        options = document(made(context, f"export={section}"), context)["options"]
        assert [option["instance"] for option in options] == texts[:1]


def test_a_bundle_of_what_was_never_calibrated_holds_the_grid(trained, tmp_path, listener, hollow):
    context = copied(trained, tmp_path, listener)
    options = document(made(context, "export.format=bundle"), context)["options"]
    assert [option["instance"] for option in options] == ["stem@0.5", "layer2.0@0.5", "full"]
    assert set(digests(context)) >= {"tiny.bn", "tiny.eval", "tiny.holdout"}


def test_a_budget_takes_the_most_accurate_within_it_on_held_out_images(context, scores):
    for limit in sorted({macs for macs, _ in scores.values()}):
        for budget in (limit, limit + 1):
            within = {text: pair for text, pair in scores.items() if pair[0] <= budget}
            best = max(within, key=lambda text: (within[text][1], -within[text][0]))
            assert f" ({best}) as onnx, " in planned(context, f"export.max_macs={budget}").task
    shares = {text: macs / scores["full"][0] for text, (macs, _) in scores.items()}
    half = {text: scores[text] for text, share in shares.items() if share <= 0.5}
    best = max(half, key=lambda text: (half[text][1], -half[text][0]))
    assert planned(context, "export.max_macs=50%").task == (
        f"export the most accurate instance on held-out images within 50% ({best}) as onnx, checked on at most 256 images"
    )


def test_a_budget_is_met_among_those_it_names(context, hollow, scores):
    limit = scores["layer1.1@0.5"][0]
    artifact = made(context, f"export.max_macs={limit}")
    (option,) = document(artifact, context)["options"]
    assert option["instance"] == front_of({t: s for t, s in scores.items() if s[0] <= limit})[-1]


def test_what_chooses_never_looks_at_the_test_images(context, hollow, monkeypatch):
    asked = []

    class Watched(choosing.Scores):
        def __init__(self, network, instances, split, **options):
            asked.append(split)
            super().__init__(network, instances, split, **options)

    monkeypatch.setattr(choosing, "Scores", Watched)
    made(context, "export.max_macs=60%")
    assert asked == ["holdout"]


def test_a_budget_that_nothing_meets_names_the_cheapest(context, scores, tmp_path):
    least = min(macs for macs, _ in scores.values())
    before = files(tmp_path)
    with pytest.raises(
        BudgetError, match=rf"within {least - 1:,} MACs; the cheapest, stem@0\.5, takes {least:,} \(\d+\.\d %\)"
    ):
        made(context, f"export.max_macs={least - 1}")
    assert files(tmp_path) == before


def test_without_held_out_images_nothing_can_be_chosen(tiny, tmp_path, listener, hollow):
    context = Context(path=tmp_path / "store", report=listener)
    train(tiny("data.holdout=0", "train.validate.every=0", "train.epochs=0"), context)
    for section in ("{max_macs: 50%}", "{format: bundle, instances: pareto}"):
        with pytest.raises(RecipeError, match=r"data\.holdout: a budget is met by choosing on the holdout"):
            made(context, f"export={section}")
    with pytest.raises(DataError, match=r"data\.holdout=0% of each class leaves no image to choose an instance by"):
        made(context, max_latency_ms=5)
    assert [option["instance"] for option in document(made(context), context)["options"]] == ["full"]
    bundle = document(made(context, "export={format: bundle, instances: [full, stem@0.5]}"), context)
    assert [option["heldout_top1"] for option in bundle["options"]] == [None, None]
    assert not any(tag.startswith("tiny.holdout") for tag in digests(context))


# By latency


@pytest.fixture
def times(monkeypatch, scores, hollow):
    """Let an instance take as many milliseconds as it has thousands of MACs, and remember which were run."""
    tried = []

    def one_call(form, files, image):
        (content,) = (content for name, content in files.items() if name != CARD)
        tried.append(content.decode())
        assert image.shape == (1, 1, 8, 8)
        return lambda: content.decode()

    for form in (OnnxFormat, TorchExportFormat):
        monkeypatch.setattr(form, "one_call", one_call)
    monkeypatch.setattr(check, "latency", lambda call: scores[call()][0] / 1000)
    return tried


@pytest.mark.parametrize("form", ["onnx", "torch-export"])
def test_a_latency_takes_the_most_accurate_that_is_quick_enough(context, times, scores, form):
    pareto_front = front_of(scores)
    for text in pareto_front:
        times.clear()
        artifact = made(context, f"export.format={form}", max_latency_ms=scores[text][0] / 1000)
        assert [option["instance"] for option in document(artifact, context)["options"]] == [text]
        assert context.store.read(artifact, {"onnx": "model.onnx"}.get(form, "model.pt2")) == text.encode()
        assert set(times) <= set(pareto_front)
        assert len(times) == len(set(times))
    slow = made(context, f"export.format={form}", max_latency_ms=1e9)
    assert document(slow, context)["options"][0]["instance"] == pareto_front[-1]


def test_what_was_tried_and_not_taken_is_not_kept(context, times, scores):
    pareto_front, before = front_of(scores), len(context.store.artifacts())
    made(context, max_latency_ms=scores[pareto_front[0]][0] / 1000)
    assert len(times) > 1
    assert len(context.store.artifacts()) == before + 1


def test_a_latency_that_nothing_meets_names_the_cheapest(context, times, scores):
    least, before = scores["stem@0.5"][0] / 1000, digests(context)
    with pytest.raises(BudgetError, match=rf"no instance is that fast on this machine; stem@0\.5 takes {least:.3g} ms"):
        made(context, max_latency_ms=least * 0.99)
    assert digests(context) == before


def test_the_export_by_latency_is_the_one_by_name(context, times, scores):
    pareto_front = front_of(scores)
    by_name = made(context, f"export.instance={pareto_front[0]}")
    assert made(context, max_latency_ms=scores[pareto_front[0]][0] / 1000).digest == by_name.digest


def test_a_latency_is_measured_in_what_was_written(trained, tmp_path, listener):
    context = copied(trained, tmp_path, listener)
    calibrate(open_network("tiny", context), context, ["full", "stem@0.5"])
    artifact = made(context, max_latency_ms=1e9)
    assert context.store.resolve(artifact.tag).digest == artifact.digest
    assert onnxruntime.InferenceSession(context.store.read(artifact, "model.onnx"))
    measured = [note for note in listener.notes if " ms per image in onnx; the limit is 1e+09 ms" in note]
    assert 1 <= len(measured) <= 2
    assert all(0.001 < float(note.split()[1]) < 1000 for note in measured)


def test_a_dry_run_by_latency_runs_nothing(context, times, tmp_path):
    before = files(tmp_path)
    step = planned(context, max_latency_ms=5)
    assert step.task.startswith("export the most accurate instance on held-out images that takes at most 5 ms as onnx")
    assert times == []
    assert files(tmp_path) == before


# What a search found


@pytest.fixture(scope="module")
def searched(prepared, tmp_path_factory, make_listener):
    """A store in which a search ran; its best is not calibrated."""
    context = copied(prepared, tmp_path_factory.mktemp("searched"), make_listener())
    section = "search={images: 60, calibration_batches: 1, rescore: 3, strategy: exhaustive, max_macs: 40%}"
    return context.path, search(open_network("tiny", context, [section]), context)


def test_the_best_of_a_search(searched, tmp_path, listener, hollow):
    context = copied(searched[0], tmp_path, listener)
    points = open_network("tiny", context).recipe.model.points
    best, *others = map(str, found_instances(context.store.resolve("tiny.search"), context, points))
    artifact = made(context, search="tiny.search")
    assert [option["instance"] for option in document(artifact, context)["options"]] == [best]
    assert made(context, "search={}", "export={from_search: true}").digest == artifact.digest
    bundle = made(context, "export.format=bundle", search=searched[1].digest)
    assert {option["instance"] for option in document(bundle, context)["options"]} == {best, *others}
    assert "full" in others


def test_from_search_wants_one(context):
    with pytest.raises(NotFoundError, match=r"no artifact 'tiny\.search'"):
        made(context, "search={}", "export={from_search: true}")
    with pytest.raises(NotFoundError, match=r"tiny\.bn is of kind bn-statistics, not a search"):
        made(context, search="tiny.bn")
    with pytest.raises(RecipeError, match=r"export\.from_search: the recipe has no search"):
        made(context, "export={from_search: true}")


# What is done, and what is not done again


@pytest.fixture
def counted(monkeypatch):
    """Count the passes over images."""
    passes = Counter()
    walk = Tree.walk

    def watched(self, x_NCHW, norms):
        passes[type(norms).__name__] += 1
        return walk(self, x_NCHW, norms)

    monkeypatch.setattr(Tree, "walk", watched)
    return passes


def test_a_second_time_the_store_answers(exported, tmp_path, make_listener, counted, monkeypatch):
    first = exported[0]
    context = copied(first.path, tmp_path, make_listener())

    def never(*_):
        raise AssertionError("nothing is to be run")

    for form in FORMATS.values():
        monkeypatch.setattr(form, "run", never)
    for form, artifact in exported[1].items():
        assert made(context, f"export.format={form}").digest == artifact.digest
        assert context.report.notes[-1].startswith(f"{artifact.tag}: in the store already, ")
    assert not counted
    dry = made(dataclasses.replace(context, dry_run=True), "export.format=bundle")
    assert dry.digest == exported[1]["bundle"].digest
    assert digests(context) == digests(first)


def test_force_does_the_export_again_and_nothing_else(exported, tmp_path, make_listener, monkeypatch):
    context = copied(exported[0].path, tmp_path, make_listener())
    ran, run_outside = [], OnnxFormat.run
    monkeypatch.setattr(OnnxFormat, "run", lambda *given: ran.append("onnx") or run_outside(*given))
    again = made(context, force=True)
    assert again.digest == exported[1]["onnx"].digest
    assert ran == ["onnx"]
    assert not [note for note in context.report.notes if "calibrating" in note or "evaluating" in note]
    assert digests(context) == digests(exported[0])


def test_tags_of_the_same_checkpoint_stay_where_they_are(context, hollow, listener):
    before = digests(context)
    artifact = made(context, "export.instance=layer1.0@0.5+layer3.0@0.5")
    made(context, "export={format: bundle, instances: [layer1.0@0.5+layer3.0@0.75, full]}")
    assert {tag: digest for tag, digest in digests(context).items() if ".export." not in tag} == before
    assert artifact.subject.digest != before["tiny.bn"]
    assert context.store.at(artifact.subject).kind == "bn-statistics"
    assert evaluate(open_network("tiny.bn", context), context).digest == before["tiny.eval"]


def test_what_is_made_on_the_way_takes_a_tag_only_where_it_is_all_there_is(trained, tmp_path, listener, hollow):
    context = copied(trained, tmp_path, listener)
    made(context, "export.instance=stem@0.5")
    assert {tag for tag in digests(context) if ".export." not in tag} == {"tiny"}
    made(context, "export.format=bundle")
    assert {tag for tag in digests(context) if ".export." not in tag} == {"tiny", "tiny.bn", "tiny.eval", "tiny.holdout"}


def test_what_one_export_needed_is_not_all_that_the_next_may_choose_from(trained, tmp_path, listener, hollow):
    context = copied(trained, tmp_path, listener)
    made(context, "export.instance=full")
    (option,) = document(made(context, "export.max_macs=60%"), context)["options"]
    assert option["relative"] <= 0.6
    options = document(made(context, "export.format=bundle"), context)["options"]
    assert [option["instance"] for option in options] == ["stem@0.5", "layer2.0@0.5", "full"]


def test_tags_of_an_older_checkpoint_move(tiny, context, hollow):
    before = digests(context)
    checkpoint = train(tiny("train.epochs=0"), context)
    bundle = made(context, "export.format=bundle")
    assert context.lineage(bundle)[-1].digest == checkpoint.digest
    after = digests(context)
    assert all(before[tag] != after[tag] for tag in ("tiny", "tiny.bn", "tiny.eval", "tiny.holdout"))
    assert bundle.subject.digest == after["tiny.bn"]
    assert made(context, "export.format=bundle").digest == bundle.digest


def test_other_instances_and_forms_are_exports_of_their_own(context, hollow):
    sections = (
        "{}",
        "{raw_input: true}",
        "{instance: stem@0.5}",
        "{format: torch-export}",
        "{format: bundle}",
        "{format: bundle, instances: [full, stem@0.5]}",
        "{format: bundle, instances: [stem@0.5, full]}",
    )
    found = [made(context, f"export={section}") for section in sections]
    assert len({artifact.key for artifact in found}) == len(sections)
    assert len({artifact.tag for artifact in found}) == len(sections)


def test_an_export_may_be_made_of_statistics_or_of_an_evaluation(context, hollow):
    for ref in ("tiny.bn", "tiny.eval", "tiny.holdout"):
        assert export(open_network(ref, context), context).digest == made(context).digest


def test_a_dry_run_writes_nothing(trained, prepared, tmp_path, listener):
    fresh = copied(trained, tmp_path, listener)
    known = Context(path=tmp_path / "known", report=listener)
    shutil.copytree(prepared, known.path)
    before = files(tmp_path)
    for context in (fresh, known):
        for section in ("{}", "{format: bundle}", "{format: bundle, instances: pareto}", "{max_macs: 60%}"):
            step = planned(context, f"export={section}")
            assert (step.kind, step.digest, step.task.split()[0]) == ("export", None, "export")
            assert step.reason
    assert files(tmp_path) == before


# When it refuses


def test_an_export_that_is_off_is_not_kept(context, monkeypatch):
    monkeypatch.setattr(OnnxFormat, "write", lambda *_: {"model.onnx": b"nothing", CARD: b"card"})
    compare = check.compare
    monkeypatch.setattr(check, "compare", lambda wanted, off: compare(wanted, wanted + off))
    monkeypatch.setattr(OnnxFormat, "run", lambda *_: np.float32(0))
    made(context, "export.instance=stem@0.5")
    before, artifacts = digests(context), len(context.store.artifacts())
    for off in (0.01, float("nan"), float("inf")):
        monkeypatch.setattr(OnnxFormat, "run", lambda *_, off=off: np.float32(off))
        with pytest.raises(IntegrityError, match=r"^tiny\.export\.onnx\.\w{12}: run outside, its logits differ by up to "):
            made(context)
    with pytest.raises(IntegrityError):
        made(context, "export.instance=stem@0.5", force=True)
    assert digests(context) == before
    assert len(context.store.artifacts()) == artifacts


def test_the_check_sees_what_really_runs_outside(context, monkeypatch):
    before, write = digests(context), OnnxFormat.write

    def scaled(form, source):
        source.model.fc.weight.data *= 1.001
        written = write(form, source)
        source.model.fc.weight.data /= 1.001
        return written

    monkeypatch.setattr(OnnxFormat, "write", scaled)
    with pytest.raises(IntegrityError, match="run outside, its logits differ by up to "):
        made(context)
    assert digests(context) == before


def test_an_export_by_latency_is_looked_at_too(context, times, monkeypatch):
    monkeypatch.setattr(check, "compare", lambda *_: check.Agreement(1, 1.0, 1.0, 100.0))
    before = digests(context)
    with pytest.raises(IntegrityError):
        made(context, max_latency_ms=1e9)
    assert digests(context) == before


def test_an_export_that_does_not_run_is_one_line(context, monkeypatch):
    monkeypatch.setattr(TorchExportFormat, "write", lambda *_: {"model.pt2": b"no program", CARD: b"card"})
    before = digests(context)
    with pytest.raises(SdpctlError, match="the export does not run in a separate process") as caught:
        made(context, "export.format=torch-export")
    assert "\n" not in str(caught.value)
    assert digests(context) == before


def test_what_may_not_calibrate_does_not(context, trained, tmp_path, hollow):
    assert made(context, "export.instance=stem@0.5", calibrates=False).kind == "export"
    before = files(tmp_path)
    with pytest.raises(
        NotFoundError, match=r"tiny: no BatchNorm statistics of layer3\.0@0\.5; leave --no-calibrate out, or run"
    ):
        made(context, "export.instance=layer3.0@0.5", calibrates=False)
    assert files(tmp_path) == before
    fresh = dataclasses.replace(context, path=tmp_path / "fresh")
    shutil.copytree(trained, fresh.path)
    for section in ("{}", "{format: bundle}", "{max_macs: 60%}"):
        with pytest.raises(NotFoundError, match="no BatchNorm statistics of "):
            made(fresh, f"export={section}", calibrates=False)


# As a stage of a recipe


def test_run_exports_what_the_recipe_says(tiny, trained, tmp_path, listener, hollow):
    context = copied(trained, tmp_path, listener)
    recipe = tiny("export={format: bundle, instances: pareto}")
    done = run(recipe, context)
    assert list(done) == ["train", "calibrate-bn", "eval-instances", "export"]
    assert done["export"].kind == "export"
    assert done["export"].subject.digest == done["calibrate-bn"].digest
    listener.notes.clear()
    again = run(recipe, context)
    assert {stage: a.digest for stage, a in again.items()} == {stage: a.digest for stage, a in done.items()}
    assert all("in the store already" in note for note in listener.notes)
    opened = open_network("tiny", context)
    assert opened.recipe.export.instances == ("pareto",)
    assert export(opened, context).digest == done["export"].digest


def test_run_exports_what_the_search_found(tiny, trained, tmp_path, listener, hollow):
    context = copied(trained, tmp_path, listener)
    section = "search={images: 60, calibration_batches: 1, rescore: 3, strategy: exhaustive, max_macs: 40%}"
    done = run(tiny(section, "export={from_search: true}"), context)
    assert list(done)[-2:] == ["search", "export"]
    (option,) = document(done["export"], context)["options"]
    assert option["instance"] == document(done["search"], context)["best"]["instance"]


def test_what_is_exported_does_not_change_what_it_is_made_of(tiny, trained, tmp_path, listener, hollow):
    plain, other = copied(trained, tmp_path / "a", listener), copied(trained, tmp_path / "b", listener)
    made(plain, "export={format: bundle, instances: [full, stem@0.5]}")
    made(other, "export={format: onnx, raw_input: true}")
    made(other, "export={format: bundle, instances: [full, stem@0.5]}")
    bundles = [{tag: digest for tag, digest in digests(c).items() if "bundle" in tag} for c in (plain, other)]
    assert bundles[0] == bundles[1]
    assert len(bundles[0]) == 1
    step_by_step = copied(trained, tmp_path / "c", listener)
    calibrate(open_network("tiny", step_by_step), step_by_step, ["full", "stem@0.5"])
    evaluate(open_network("tiny.bn", step_by_step), step_by_step)
    found = {artifact.digest for artifact in step_by_step.store.artifacts()}
    assert found <= {artifact.digest for artifact in plain.store.artifacts()}


# Opening what was made


def test_a_checkpoint_a_bundle_and_its_folder_are_one_network(exported, tmp_path):
    context, artifacts = exported
    folder = tmp_path / "bundle"
    folder.mkdir()
    for name, content in export_files(artifacts["bundle"], context).items():
        (folder / name).write_bytes(content)
    x_NCHW, labels_N = next(open_data(open_network("tiny", context).recipe, torch.device("cpu"), context).test(359))
    rows = {row["instance"]: row for row in document(context.store.resolve("tiny.eval"), context)["rows"]}
    tag = artifacts["bundle"].tag
    models = [sdpctl.load(ref, store=context.path) for ref in ("tiny", "tiny.bn", "tiny.eval", tag, artifacts["bundle"].digest)]
    models += [sdpctl.load(folder, store=tmp_path / "no store"), sdpctl.load(str(folder))]
    for model in models:
        assert isinstance(model, Runtime)
        assert [str(option.instance) for option in model.instances] == [str(option.instance) for option in models[0].instances]
        for text in ("full", "layer1.0@0.5"):
            logits = model(x_NCHW, instance=text)
            hits = 100 * (logits.cpu().argmax(1) == labels_N).double().mean().item()
            assert hits == pytest.approx(rows[text]["top1"], abs=100 / 359 + 1e-9)
            torch.testing.assert_close(logits, models[0](x_NCHW, instance=text))
        assert model.pick(max_macs="60%") == models[0].pick(max_macs="60%")


def test_the_environment_names_the_store(exported, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(IntegrityError, match=r"^\.sdpctl: there is no store"):
        sdpctl.load("tiny")
    monkeypatch.setenv("SDPCTL_STORE", str(exported[0].path))
    assert sdpctl.load("tiny").description.name == "tiny"
    with pytest.raises(IntegrityError, match="there is no store"):
        sdpctl.load("tiny", store=tmp_path / "nothing")


def test_what_is_not_evaluated_is_not_opened_and_nothing_is_computed(trained, tmp_path, listener, counted):
    context = copied(trained, tmp_path, listener)
    for stage in (None, lambda: calibrate(open_network("tiny", context), context)):
        if stage is not None:
            stage()
        before = files(tmp_path)
        counted.clear()
        with pytest.raises(NotFoundError, match=r"^tiny is not evaluated yet; run `sdpctl eval-instances tiny` first$"):
            sdpctl.load("tiny", store=context.path)
        assert files(tmp_path) == before
        assert not counted


def test_opening_computes_nothing_and_writes_nothing(prepared, tmp_path, listener, counted):
    context = copied(prepared, tmp_path, listener)
    before = files(tmp_path)
    assert len(sdpctl.load("tiny", store=context.path).instances) == len(MANY)
    assert files(tmp_path) == before
    assert not counted


def test_without_held_out_accuracies_an_instance_has_to_be_named(trained, tmp_path, listener):
    context = copied(trained, tmp_path, listener)
    evaluate(open_network("tiny", context), context)
    model = sdpctl.load("tiny", store=context.path)
    assert str(model.pick(instance="stem@0.5").instance) == "stem@0.5"
    with pytest.raises(NotFoundError, match=r"held out, run `sdpctl eval-instances tiny --split holdout` first"):
        model.pick(max_macs="60%")
    evaluate(open_network("tiny", context), context, split="holdout")
    assert sdpctl.load("tiny", store=context.path).pick(max_macs="60%").relative <= 0.6


def test_what_is_no_network_of_many(exported):
    context, artifacts = exported
    with pytest.raises(
        UsageError, match=r"is not a bundle but a different export; `sdpctl export --format bundle` makes a bundle"
    ):
        sdpctl.load(artifacts["onnx"].tag, store=context.path)
    with pytest.raises(NotFoundError, match=r"no artifact 'tinny' \(did you mean 'tiny'\?\)"):
        sdpctl.load("tinny", store=context.path)
    with pytest.raises(NotFoundError, match=r"tiny has no instance layer3\.0@0\.5"):
        sdpctl.load("tiny", store=context.path).pick(instance="layer3.0@0.5")
    assert sdpctl.load("tiny", store=context.path).pick(instance=FULL).relative == 1
    with pytest.raises(InstanceError):
        sdpctl.load("tiny", store=context.path).pick(instance="half")


def test_no_such_device(exported):
    with pytest.raises(SdpctlError, match="device 'cuda:77' cannot be used here") as caught:
        sdpctl.load("tiny", store=exported[0].path, device="cuda:77")
    assert caught.value.exit_code == 7


def test_the_document_is_plain(exported):
    context, artifacts = exported
    for artifact in artifacts.values():
        assert json.loads(json.dumps(document(artifact, context))) == document(artifact, context)
