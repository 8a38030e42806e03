import json
import re
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from command import called, document, one_line

from sdpctl.engine.tensors import bytes_to_tensors, tensors_to_bytes
from sdpctl.errors import IntegrityError
from sdpctl.kinds import PREDICTIONS
from sdpctl.plan import Plan
from sdpctl.report import page as pages
from sdpctl.report.page import embedded
from sdpctl.stages.context import Context
from sdpctl.stages.layers import read_document
from sdpctl.stages.predictions import hardest, read_predictions
from sdpctl.stages.run import stages_of


def shown_in(content):
    """Return the document that a page holds."""
    return json.loads(re.search(r'<script type="application/json" id="document">(.*?)</script>', content, re.DOTALL)[1])


@pytest.fixture(scope="module")
def kept(evaluated, make_listener, tmp_path_factory):
    """A store with the tiny network, and an evaluation that keeps predictions."""
    path = tmp_path_factory.mktemp("kept") / "store"
    shutil.copytree(evaluated, path)
    document(path.parent, "eval", "tiny", "--store", path, "--set", "evaluate.predictions=true")
    return Context(path=path, report=make_listener())


def test_predictions_fit_the_table(kept, evaluated, make_listener):
    artifact = kept.store.resolve("tiny.eval")
    before = Context(path=evaluated, report=make_listener())
    results = read_document(kept.store, artifact)
    assert results == read_document(before.store, before.store.resolve("tiny.eval"))
    rows, images, classes = results["rows"], results["images"], len(results["classes"])
    found = read_predictions(kept.store, artifact, len(rows), images, classes)
    labels, predicted = found.labels.numpy(), found.predicted.numpy()
    assert np.bincount(labels, minlength=classes).tolist() == results["class_images"]
    for row, own in zip(rows, predicted, strict=True):
        assert row["top1"] == pytest.approx(100 * np.mean(own == labels))
        for label, accuracy in enumerate(row["by_class"]):
            assert accuracy == pytest.approx(100 * np.mean(own[labels == label] == label))
        matrix = np.zeros((classes, classes), int)
        np.add.at(matrix, (labels, own), 1)
        np.fill_diagonal(matrix, 0)
        listed = found.confusions(rows.index(row), 10)
        assert [count for *_, count in listed] == sorted(matrix[matrix > 0], reverse=True)[:10]
        assert all(matrix[label, taken] == count for label, taken, count in listed)
    macs = [row["macs"] for row in rows]
    assert 0 < len(found.pictured) <= 24
    assert found.pictures.shape[1:] == (1, 8, 8)
    assert found.pictures.float().flatten(1).std(1).min() > 0
    for image in found.pictured.tolist():
        needed = found.cheapest_right(image, macs)
        wrong = [own[image] != labels[image] for own, cost in zip(predicted, macs, strict=True) if cost < macs[needed]]
        assert wrong
        assert all(wrong)


def test_hard_images_are_those_whose_cheapest_right_instance_costs_most():
    labels = torch.tensor([0, 1, 2, 0, 1], dtype=torch.int32)
    predicted = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 0], [0, 0, 2, 1, 1]], dtype=torch.int32)
    assert hardest(labels, predicted, [10, 20, 30]) == [2, 1]  # image 3 is never right, and 0 and 4 at once
    assert hardest(labels, predicted, [10, 30, 20]) == [1, 2]


@pytest.mark.parametrize("wrong", ["labels", "predicted", "pictured"])
def test_predictions_that_do_not_fit_are_refused(kept, tmp_path, make_listener, wrong):
    shutil.copytree(kept.path, tmp_path / "store")
    store = Context(path=tmp_path / "store", report=make_listener()).store
    artifact = store.resolve("tiny.eval")
    tensors = bytes_to_tensors(store.read(artifact, PREDICTIONS), "predictions")
    tensors[wrong] = tensors[wrong] - 100_000
    layers = {title: store.read(artifact, title) for title in artifact.layers} | {PREDICTIONS: tensors_to_bytes(tensors)}
    changed = store.commit(
        "evaluation", layers, subject=artifact.subject and store.at(artifact.subject), key="k", tag="tiny.eval"
    )
    results = read_document(store, changed)
    with pytest.raises(IntegrityError, match="does not fit the table"):
        read_predictions(store, changed, len(results["rows"]), results["images"], len(results["classes"]))


def test_a_page_has_the_rows_of_the_tables(kept, tmp_path):
    shutil.copytree(kept.path, tmp_path / "store")
    done = document(tmp_path, "report", "tiny", "--store", "store")
    assert (done["file"], done["tag"], done["format"]) == ("tiny.report.html", "tiny.report", "html")
    content = (tmp_path / "tiny.report.html").read_text()
    assert len(content.encode()) == done["bytes"] < pages.MOST_BYTES
    shown = shown_in(content)
    results = read_document(kept.store, kept.store.resolve("tiny.eval"))
    for key in ("instance", "macs", "params", "relative", "top1", "loss"):
        assert [row[key] for row in shown["rows"]] == [row[key] for row in results["rows"]]
    profile = document(tmp_path, "profile-flops", "tiny", "--store", "store", "--per-segment")
    profiled = {row["instance"]: sum(row["macs"]) for row in shown["networks"][0]["profile"]}
    assert profiled == {row["instance"]: row["macs"] for row in profile["rows"]}
    assert [epoch["epoch"] for epoch in shown["networks"][0]["epochs"]] == [1, 2]
    assert [link["kind"] for link in shown["networks"][0]["lineage"]] == ["checkpoint", "bn-statistics", "evaluation"]
    assert len(shown["predictions"][0]["images"]) > 0
    again = document(tmp_path, "report", "tiny", "--store", "store", "--output", "b.html")
    assert again["digest"] == done["digest"]
    assert (tmp_path / "b.html").read_text() == content
    one_line(called(tmp_path, "report", "tiny", "--store", "store"), 2, "tiny.report.html", "--force")
    table = document(tmp_path, "report", "tiny.eval", "--store", "store", "-o", "c.html")
    assert table["digest"] == done["digest"]


def test_latencies_are_in_the_written_page_alone(kept, tmp_path):
    shutil.copytree(kept.path, tmp_path / "store")
    rows = [{"instance": "full", "batch": batch, "median_ms": 12.0} for batch in (8, 4)]
    (tmp_path / "latency.json").write_text(json.dumps({"rows": rows}))
    done = document(tmp_path, "report", "tiny", "--store", "store", "--latency", "latency.json")
    shown = shown_in((tmp_path / "tiny.report.html").read_text())
    assert {row["instance"]: row["latency"] for row in shown["rows"] if "latency" in row} == {"full": 3.0}
    store = Context(path=tmp_path / "store", report=kept.report).store
    stored = shown_in(store.read(store.resolve(done["tag"]), "report.html").decode())
    assert not any("latency" in row for row in stored["rows"])
    for content, word in (("[]", "an object"), ('{"rows": []}', "rows"), (json.dumps({"rows": rows}), "no instance")):
        (tmp_path / "other.json").write_text(content.replace("full", "stem@0.1"))
        failed = called(tmp_path, "report", "tiny", "--store", "store", "--latency", "other.json", "-o", "x.html")
        one_line(failed, 2, "--latency", word)
    assert not (tmp_path / "x.html").exists()


def test_pictures_are_drawn(kept, tmp_path):
    for form in ("svg", "png"):
        shutil.copytree(kept.path, tmp_path / "store", dirs_exist_ok=True)
        done = document(tmp_path, "report", "tiny", "--store", "store", "--format", form)
        assert done["tag"] == f"tiny.report.{form}"
    drawing = ElementTree.fromstring((tmp_path / "tiny.report.svg").read_text())
    marks = [group for group in drawing.iter() if "instances_marks" in group.get("class", "")]
    results = read_document(kept.store, kept.store.resolve("tiny.eval"))
    assert [len(group) for group in marks] == [len(results["rows"])]
    assert (tmp_path / "tiny.report.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes_have_one_line(kept, tmp_path, monkeypatch):
    shutil.copytree(kept.path, tmp_path / "store")
    one_line(called(tmp_path, "report", "tiny.bn", "--store", "store"), 2, "tiny.bn is of kind bn-statistics")
    one_line(called(tmp_path, "report", "nothing", "--store", "store"), 4, "nothing")
    monkeypatch.setattr(pages, "version", lambda name: (_ for _ in ()).throw(pages.PackageNotFoundError(name)))
    one_line(called(tmp_path, "report", "tiny", "--store", "store"), 7, "pip install 'sdpctl[report]'")
    assert not list(tmp_path.glob("*.html"))


def test_a_dry_run_writes_nothing(kept, tmp_path):
    shutil.copytree(kept.path, tmp_path / "store")
    done = document(tmp_path, "report", "tiny", "--store", "store", "--dry-run")
    assert done["plan"][-1]["task"] == "draw report.html of 1 network"
    assert not list(tmp_path.glob("*.html"))


def test_run_makes_a_page_where_the_recipe_names_it(tiny, context, done):
    stages = stages_of(tiny("report.format=svg"), context)
    assert list(stages) == ["train", "calibrate-bn", "eval-instances", "report"]
    plan = Plan(context)
    made = {name: plan.run(stage) for name, stage in stages.items()}
    assert made["report"].tag == "tiny.report.svg"
    assert made["report"].subject.digest == made["eval-instances"].digest


def test_what_stands_in_a_page_cannot_end_its_script():
    hostile = "</script><!--\u2028\u2029&lt;"
    text = embedded({"name": hostile})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {"name": hostile}
