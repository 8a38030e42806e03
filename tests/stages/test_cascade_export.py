"""Cascades in exports: which one is exported, what a bundle takes along, and that the figures are those of what runs."""

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from stage_calls import calibrate, document, evaluate, export, planned, run, train

import sdpctl
from sdpctl.cascade import Cascade
from sdpctl.errors import BudgetError, IntegrityError, NotFoundError, RecipeError, UsageError
from sdpctl.export.catalog import CARD
from sdpctl.export.onnx_cascade import OnnxCascadeFormat
from sdpctl.kinds import EXPORTED
from sdpctl.loading import open_bundle
from sdpctl.plan import Plan
from sdpctl.stages.cascade import ChooseCascade
from sdpctl.stages.context import Context
from sdpctl.stages.export import Export, export_files
from sdpctl.stages.network import open_network
from sdpctl.stages.opening import open_data
from sdpctl.stages.stage import key_of

CASCADE = "export.format=onnx-cascade"
RAW = "export={format: onnx-cascade, raw_input: true}"


def made(context, *overrides, ref="tiny", **options):
    return export(open_network(ref, context, overrides), context, **options)


def choose(context, *overrides):
    return Plan(context).run(ChooseCascade(open_network("tiny", context, overrides)))


@pytest.fixture(scope="module")
def prepared(evaluated, make_once, make_listener):
    """The tiny network with a choice of cascades, scored on the held-out images too."""

    def prepare(path):
        shutil.copytree(evaluated, path, dirs_exist_ok=True)
        context = Context(path=path, report=make_listener())
        evaluate(open_network("tiny.bn", context), context, split="holdout")
        choose(context, "cascade={max_macs: 80%}")

    return make_once("tiny-chosen", prepare)


@pytest.fixture(scope="module")
def exported(prepared, make_once, make_listener):
    """The export of the best cascade, which takes pixels, and what was said."""

    def export_best(path):
        shutil.copytree(prepared, path, dirs_exist_ok=True)
        context = Context(path=path, report=make_listener())
        made(context, RAW)
        (path / "notes.json").write_text(json.dumps(context.report.notes))

    path = make_once("tiny-cascade-exported", export_best)
    context = Context(path=path, report=make_listener())
    (tag,) = (artifact.tag for artifact in context.store.artifacts() if artifact.kind == "export")
    return context, context.store.resolve(tag), json.loads((path / "notes.json").read_text())


@pytest.fixture
def context(prepared, tmp_path, listener):
    shutil.copytree(prepared, tmp_path / "store")
    return Context(path=tmp_path / "store", report=listener)


@pytest.fixture
def hollow(monkeypatch, believed):
    """Write the cascade's text in place of graphs: what is chosen is tested, not what is written."""

    def write(_, source):
        (option,) = source.description.cascades
        graphs = {f"member{number}.onnx": b"" for number in range(len(option.member_macs))}
        files = {"policy.json": str(option.cascade).encode(), "run.py": b"", "SHA256SUMS": b"", CARD: source.card.encode()}
        return files | graphs

    monkeypatch.setattr(OnnxCascadeFormat, "write", write)


def rows_of(context):
    """Return the best row of the choice, and all rows of cascades."""
    chosen = document(context.store.resolve("tiny.cascade"), context)
    rows = {row["cascade"]: row for row in [chosen["best"], *chosen["front"]] if "cascade" in row}
    return chosen["best"], list(rows.values())


def tag_of(text):
    """Return the tag of an export of what a text says."""
    return f"tiny.export.onnx-cascade.{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def test_the_best_cascade_is_exported_and_does_what_the_choice_reports(exported, tmp_path):
    context, artifact, notes = exported
    best, _ = rows_of(context)
    cascade, said = Cascade.parse(best["cascade"]), document(artifact, context)
    assert (artifact.kind, artifact.subject.digest) == ("export", context.store.resolve("tiny.bn").digest)
    assert artifact.tag == tag_of(f"{best['cascade']} raw")
    assert said["cascades"] == [best]
    assert {option["instance"] for option in said["options"]} == set(map(str, cascade.members))
    found = re.match(rf"{artifact.tag}: run outside on (\d+) real images, the probabilities differ by at most ", notes[-1])
    assert 250 <= int(found[1]) <= 256  # the others are too near to a threshold
    files = export_files(artifact, context)
    assert set(files) == {
        "policy.json",
        "run.py",
        "SHA256SUMS",
        "card.md",
        *(f"member{i}.onnx" for i in range(len(cascade.members))),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    test = list(open_data(open_network("tiny", context).recipe, torch.device("cpu"), context).test(64))
    takes = json.loads(files["policy.json"])["input"]
    assert takes["raw"] is True
    pixels = 255 * (torch.cat([x_NCHW for x_NCHW, _ in test]) * takes["std"][0] + takes["mean"][0])
    assert (pixels - pixels.round()).abs().max() < 1e-3
    np.save(tmp_path / "images.npy", pixels.round().to(torch.uint8).numpy())
    program = "import numpy, run; p, left = run.classify(numpy.load('images.npy')); numpy.savez('a.npz', p=p, left=left)"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=120)
    answers, labels = np.load(tmp_path / "a.npz"), np.concatenate([labels_N.numpy() for _, labels_N in test])
    images = len(labels)
    assert 100 * (answers["p"].argmax(1) == labels).mean() == pytest.approx(best["top1"], abs=100 / images + 1e-9)
    assert -np.log(answers["p"][range(images), labels]).mean() == pytest.approx(best["loss"], abs=0.05)
    shares = 100 * np.bincount(answers["left"], minlength=len(cascade.members)) / images
    assert shares == pytest.approx(best["left"], abs=100 / images + 1e-9)
    spent = np.cumsum(best["member_macs"])[answers["left"]].mean()
    assert spent == pytest.approx(best["macs"], abs=best["worst_macs"] / images)


def test_a_budget_takes_the_most_accurate_cascade_of_the_front(context, hollow):
    _, rows = rows_of(context)
    for limit in sorted({row["heldout_macs"] for row in rows}):
        within = [row for row in rows if row["heldout_macs"] <= limit]
        best = max(within, key=lambda row: (row["heldout_top1"], -row["heldout_macs"]))
        artifact = made(context, f"export={{format: onnx-cascade, max_macs: {limit}}}")
        assert document(artifact, context)["cascades"] == [best]
        assert context.store.read(artifact, "policy.json").decode() == best["cascade"]
    least = min(rows, key=lambda row: row["heldout_macs"])
    with pytest.raises(BudgetError, match=f"the cheapest, .*, takes {least['heldout_macs']:,} MACs on average") as refused:
        made(context, f"export={{format: onnx-cascade, max_macs: {least['heldout_macs'] - 1}}}")
    assert least["cascade"] in str(refused.value)
    assert refused.value.exit_code == 8


def test_a_second_time_the_store_answers(context, hollow, monkeypatch):
    artifact = made(context, CASCADE)
    assert artifact.tag == tag_of(rows_of(context)[0]["cascade"])
    monkeypatch.setattr(OnnxCascadeFormat, "write", None)
    assert made(context, CASCADE).digest == artifact.digest
    again = made(dataclasses.replace(context, dry_run=True), CASCADE)
    assert again.digest == artifact.digest
    by_name = made(context, CASCADE, ref="tiny.cascade", cascade="tiny.cascade")
    assert by_name.digest == artifact.digest


def test_a_program_that_answers_otherwise_is_not_kept(exported, context, monkeypatch):
    files = export_files(exported[1], exported[0])
    policy = json.loads(files["policy.json"])
    policy["members"][0]["temperature"] *= 1.01
    changed = files | {"policy.json": json.dumps(policy).encode()}
    monkeypatch.setattr(OnnxCascadeFormat, "write", lambda *_: changed)
    before = {artifact.digest for artifact in context.store.artifacts()}
    with pytest.raises(IntegrityError, match=r"run outside, its probabilities differ by up to .* nothing was written"):
        made(context, RAW)
    assert {artifact.digest for artifact in context.store.artifacts()} == before


# What there is to export


def test_without_a_choice_a_line_says_how_to_make_one(evaluated, tmp_path, listener):
    shutil.copytree(evaluated, tmp_path / "store")
    context = Context(path=tmp_path / "store", report=listener)
    with pytest.raises(
        NotFoundError, match=r"^there is no artifact tiny\.cascade; `sdpctl search tiny --cascade --max-macs 50%` "
    ):
        made(context, CASCADE)
    with pytest.raises(NotFoundError, match=r"^tiny\.bn is of kind bn-statistics, not a choice of cascades; `sdpctl search"):
        made(context, CASCADE, cascade="tiny.bn")


def test_a_choice_of_an_older_checkpoint_is_not_exported(tiny, context):
    train(tiny("train.epochs=1", "train.validate.every=0"), context)
    with pytest.raises(
        NotFoundError, match=r"^tiny\.cascade belongs to a different checkpoint than that of tiny; `sdpctl search"
    ):
        made(context, CASCADE)


@pytest.mark.parametrize("override", ["evaluate.batches=1", "calibrate.batches=2", "data.image_size=10"])
def test_settings_that_would_change_the_choice_are_refused(context, override):
    with pytest.raises(
        UsageError, match=r"^tiny\.cascade was chosen with different settings of data, calibrate or evaluate; give the same"
    ):
        made(context, CASCADE, override)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("{format: onnx-cascade, instance: full}", "instance"),
        ("{format: onnx-cascade, from_search: true}", "from_search"),
        ("{format: onnx-cascade, instances: [full, stem@0.5]}", "instances"),
    ],
)
def test_a_recipe_that_names_an_instance(tiny, section, key):
    with pytest.raises(RecipeError, match=rf"export\.{key}: the format onnx-cascade holds a cascade; remove this key"):
        tiny("search={max_macs: 50%}", f"export={section}")


def test_a_search_or_a_latency_does_not_choose_a_cascade(context):
    with pytest.raises(
        UsageError, match=r"^--from-search: the format onnx-cascade holds a cascade, which `sdpctl search --cascade`"
    ):
        made(context, CASCADE, search="tiny.search")
    with pytest.raises(UsageError, match="the latency of the format onnx-cascade is not measured"):
        made(context, CASCADE, max_latency_ms=5)


def test_a_recipe_chooses_and_exports(tiny, tmp_path, listener, hollow):
    context = Context(path=tmp_path / "store", report=listener)
    recipe = tiny("train.epochs=1", "train.validate.every=0", "cascade={max_macs: 90%}", CASCADE)
    steps = {step.kind: step for step in planned(recipe, dataclasses.replace(context, dry_run=True))}
    assert steps["export"].task == "export the cascade of tiny.cascade as onnx-cascade, checked on at most 256 images"
    found = run(recipe, context)
    best = document(found["cascade"], context)["best"]
    assert document(found["export"], context)["cascades"] == [best]
    bundle = run(tiny("train.epochs=1", "train.validate.every=0", "cascade={max_macs: 90%}", "export.format=bundle"), context)
    assert best in document(bundle["export"], context)["cascades"]


def test_run_refuses_to_export_a_cascade_that_the_recipe_does_not_choose(tiny, tmp_path, listener):
    context = Context(path=tmp_path / "store", report=listener)
    with pytest.raises(RecipeError, match=r"^export\.format: onnx-cascade exports a chosen cascade, .* add a section cascade$"):
        run(tiny(CASCADE), context)
    assert not list(context.store.artifacts())


# Bundles and the runtime


def test_a_bundle_takes_all_cascades_along(context):
    _, rows = rows_of(context)
    artifact = made(context, "export.format=bundle")
    said = document(artifact, context)
    assert said["cascades"] == sorted(rows, key=lambda row: row["heldout_macs"])
    assert json.loads(context.store.read(artifact, "bundle.json"))["cascades"] == said["cascades"]
    assert all(f"| `{row['cascade']}` |" in context.store.read(artifact, CARD).decode() for row in rows)
    x_NCHW = torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    limit = rows[0]["heldout_macs"]
    models = [sdpctl.load(ref, store=context.path, device="cpu") for ref in (artifact.tag, "tiny", "tiny.bn", "tiny.cascade")]
    for model in models:
        assert [option.document() for option in model.cascades] == [CascadeRow(row) for row in said["cascades"]]
        assert torch.equal(model(x_NCHW, cascade=True, max_macs=limit), models[0](x_NCHW, cascade=True, max_macs=limit))


def CascadeRow(row):  # noqa: N802
    """Return a row as `CascadeOption.document` writes it: lists are tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}


def test_without_cascades_an_export_keeps_its_key_and_its_bytes(evaluated, context, tmp_path, listener, believed):
    shutil.copytree(evaluated, tmp_path / "before")
    before = Context(path=tmp_path / "before", report=listener)
    for section, texts in (("{format: bundle, instances: [full]}", ["full"]), ("{instance: full}", ["full"])):
        network = open_network("tiny", context, [f"export={section}"])
        form = {"format": network.recipe.export.format, "instances": texts, "raw_input": False}
        parts = network.resolved.parts("seed", "data", "evaluate")
        statistics = context.store.resolve("tiny.bn").digest
        key = key_of(EXPORTED, statistics=statistics, name="tiny", recipe=parts, export=form)
        artifact = made(context, f"export={section}")
        assert artifact.key == key
        assert artifact.digest == made(before, f"export={section}").digest
        assert "cascades" not in document(artifact, context)


def test_cascades_whose_members_are_not_there_are_left_out(context, believed):
    _, rows = rows_of(context)
    few = made(context, "export={format: bundle, instances: [full, layer2.0@0.5]}")
    kept = [row for row in rows if set(map(str, Cascade.parse(row["cascade"]).members)) <= {"full", "layer2.0@0.5"}]
    assert len(kept) < len(rows)
    assert document(few, context).get("cascades", []) == sorted(kept, key=lambda row: row["heldout_macs"])
    said = f"tiny.cascade: {len(rows) - len(kept)} of {len(rows)} cascades are left out, since the instances lack some of their"
    assert any(note.startswith(said) for note in context.report.notes)


def test_cascades_of_other_statistics_or_scores_are_left_out(context, believed):
    scored = made(context, "export.format=bundle", "evaluate.batches=1")
    assert "cascades" not in document(scored, context)
    assert any("tiny.cascade was scored with different settings of data or evaluate" in note for note in context.report.notes)
    calibrate(open_network("tiny", context, ["calibrate.batches=2"]), context)
    other = made(context, "export.format=bundle", ref="tiny.bn")
    assert "cascades" not in document(other, context)
    assert any("tiny.cascade belongs to different BatchNorm statistics than tiny" in note for note in context.report.notes)
    assert sdpctl.load("tiny.cascade", store=context.path, device="cpu").cascades
    assert not sdpctl.load("tiny", store=context.path, device="cpu").cascades
    assert open_bundle("tiny", context, cascade=True).description.cascades  # by the statistics of the choice
    assert not open_bundle("tiny.bn", context, cascade=True).description.cascades
    assert not open_bundle("tiny.cascade", context, cascade=False).description.cascades


def test_a_dry_run_plans_the_export(context):
    best = max(rows_of(context)[1], key=lambda row: (row["heldout_top1"], -row["heldout_macs"]))
    plan = Plan(dataclasses.replace(context, dry_run=True))
    assert plan.run(Export(open_network("tiny", context, ["export={format: onnx-cascade, max_macs: 99%}"]))) is None
    assert plan.steps[-1].task == (
        f"export the most accurate cascade of tiny.cascade within 99% ({best['cascade']}) as onnx-cascade, "
        "checked on at most 256 images"
    )
