"""Exports in lower precisions, with a chosen opset, and checked in a second runtime."""

import json
import re
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from command import called, one_line
from command import document as printed
from stage_calls import document, export

from sdpctl.errors import BudgetError, IntegrityError, RecipeError, ResourceError
from sdpctl.export.onnx import OnnxFormat
from sdpctl.export.outside import ANSWER, run_program
from sdpctl.plan import Plan
from sdpctl.stages.context import Context
from sdpctl.stages.export import Export, export_files
from sdpctl.stages.network import open_network
from sdpctl.stages.opening import open_data

INT8 = "export={precision: int8, calibration_images: 64, max_drop: 5}"


def made(context, *overrides):
    return export(open_network("tiny", context, overrides), context)


@pytest.fixture(scope="module")
def lowered(evaluated, make_once, make_listener):
    """A store with exports of the tiny network in int8, in fp16 and, of raw pixels, in int8; and the artifacts."""
    sections = {"int8": INT8, "fp16": "export.precision=fp16", "raw": f"{INT8[:-1]}, raw_input: true}}"}

    def fill(folder):
        shutil.copytree(evaluated, folder / "store")
        context = Context(path=folder / "store", report=make_listener())
        digests = {name: made(context, section).digest for name, section in sections.items()}
        (folder / "heard.json").write_text(json.dumps({"digests": digests, "notes": context.report.notes}))

    folder = make_once("lowered", fill)
    heard, context = json.loads((folder / "heard.json").read_text()), Context(path=folder / "store", report=make_listener())
    context.report.notes += heard["notes"]
    return context, {name: context.store.resolve(digest) for name, digest in heard["digests"].items()}


@pytest.fixture
def fresh(evaluated, tmp_path, listener):
    shutil.copytree(evaluated, tmp_path / "store")
    return Context(path=tmp_path / "store", report=listener)


def test_the_accuracies_are_those_of_the_files_on_all_test_images(lowered):
    context, artifacts = lowered
    data = open_data(open_network("tiny", context).recipe, torch.device("cpu"), context)
    (row,) = (r for r in document(context.store.resolve("tiny.eval"), context)["rows"] if r["instance"] == "full")
    batches = [(pixels.numpy().copy(), labels.numpy().copy()) for pixels, labels in data.test_pixels(100)]
    for name, artifact in artifacts.items():
        said = document(artifact, context)["precision"]
        content = export_files(artifact, context)["model.onnx"]
        session = onnxruntime.InferenceSession(content)
        hits = 0
        for pixels, labels in batches:
            given = pixels if name == "raw" else ((pixels / 255 - 0.3053) / 0.3760).astype(np.float32)
            hits += (session.run(None, {"images": given})[0].argmax(1) == labels).sum()
        assert said["images"] == data.test_size == 359
        assert said["top1"] == {"onnxruntime": pytest.approx(100 * hits / 359, abs=100 / 359 + 1e-9)}
        assert said["float32_top1"] == pytest.approx(row["top1"], abs=100 / 359 + 1e-9)
        properties = {each.key: each.value for each in onnx.load_from_string(content).metadata_props}
        assert json.loads(properties["precision"]) == said
        card = export_files(artifact, context)["card.md"].decode()
        assert f"| float32 | onnxruntime | {said['float32_top1']:.2f} |" in card
        assert f"| {said['name']} | onnxruntime | {said['top1']['onnxruntime']:.2f} |" in card
        assert any(f"{said['name']} in onnxruntime {said['top1']['onnxruntime']:.2f} %" in n for n in context.report.notes)
    assert list(context.store.verify()) == []


def test_weights_are_what_the_precision_says(lowered):
    context, artifacts = lowered
    for name, kind in (("int8", "int8"), ("fp16", "float16")):
        model = onnx.load_from_string(export_files(artifacts[name], context)["model.onnx"])
        kernels = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer if len(t.dims) == 4]
        assert len(kernels) == 19
        assert {str(kernel.dtype) for kernel in kernels} == {kind}


def test_a_precision_has_a_tag_and_a_key_of_its_own(lowered, fresh, believed):
    _, artifacts = lowered
    assert re.fullmatch(r"tiny\.export\.onnx-int8\.[0-9a-f]{12}", artifacts["int8"].tag)
    assert re.fullmatch(r"tiny\.export\.onnx-fp16\.[0-9a-f]{12}", artifacts["fp16"].tag)
    plain = made(fresh)
    tags = [artifact.tag for artifact in (plain, *artifacts.values())]
    assert len(set(tags)) == len({artifact.key for artifact in (plain, *artifacts.values())}) == 4
    assert set(document(plain, fresh)) & {"precision", "opset", "check"} == set()


def test_calibration_sees_training_images_drawn_from_the_seed(fresh, monkeypatch):
    seen = []

    def lower(form, files, precision, images):
        seen.append(images())
        return dict(files)

    monkeypatch.setattr(OnnxFormat, "lowered", lower)
    made(fresh, INT8)
    data = open_data(open_network("tiny", fresh).recipe, torch.device("cpu"), fresh)
    source, part = data._training.source, set(data.train_indices)
    pool = {tuple(np.round(image.flatten() * 0.3760 * 255 + 0.3053 * 255).astype(int)) for image in seen[0]}
    trained = {tuple(image.flatten().tolist()) for i, image in enumerate(source.images) if i in part}
    assert len(seen[0]) == 64
    assert pool <= trained
    torch.testing.assert_close(data.training_examples(64), data.training_examples(64), rtol=0, atol=0)


def test_a_loss_beyond_the_limit_is_refused_and_nothing_is_kept(fresh, monkeypatch):
    def blinded(form, files, precision, images):
        model = onnx.load_from_string(files["model.onnx"])
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT:
                tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros(tensor.dims, np.float32), tensor.name))
        return {**files, "model.onnx": model.SerializeToString()}

    monkeypatch.setattr(OnnxFormat, "lowered", blinded)
    before = {artifact.digest for artifact in fresh.store.artifacts()}
    with pytest.raises(BudgetError, match=r"^tiny\.export\.onnx-fp16\.\w+: on 359 test images top-1 .* --max-drop 1; nothing"):
        made(fresh, "export.precision=fp16")
    assert {artifact.digest for artifact in fresh.store.artifacts()} == before


def test_the_operators_are_those_of_the_opset(fresh):
    artifact = made(fresh, "export.opset=18")
    model = onnx.load_from_string(export_files(artifact, fresh)["model.onnx"])
    assert {each.domain: each.version for each in model.opset_import} == {"": 18}
    assert document(artifact, fresh)["opset"] == 18
    assert artifact.tag != Plan(fresh).run(Export(open_network("tiny", fresh))).tag


def test_openvino_agrees_and_nothing_is_sent(fresh, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    artifact = made(fresh, "export.check=openvino")
    assert document(artifact, fresh)["check"] == "openvino"
    assert "real images in onnxruntime and in OpenVINO: no logit was off by more than 0.0001" in (
        export_files(artifact, fresh)["card.md"].decode()
    )
    (note,) = (note for note in fresh.report.notes if "run in OpenVINO" in note)
    assert note.count("256 real images") == 2
    assert not (home / "intel").exists()  # openvino_telemetry keeps the identity of a user there


def test_openvino_that_differs_is_an_error(fresh, monkeypatch):
    monkeypatch.setattr(OnnxFormat, "run_in", lambda form, runtime, files, images: form.run(files, images) + 0.1)
    with pytest.raises(IntegrityError, match=r"its logits differ by up to 0\.1"):
        made(fresh, "export.check=openvino")


def test_openvino_that_is_missing_says_how_to_install_it(fresh, monkeypatch):
    monkeypatch.setattr("sdpctl.export.onnx.find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"OpenVINO is not installed; run `pip install 'sdpctl\[openvino\]'`") as caught:
        made(fresh, "export.check=openvino")
    assert caught.value.exit_code == 7


def test_a_program_answers_with_an_array_and_needs_no_torch():
    program = f"{ANSWER}\nanswer(numpy.full((1, 2), 'torch' in sys.modules, numpy.float32))"
    assert run_program(program, {}, np.zeros((1, 1, 2, 2), np.float32)).tolist() == [[0, 0]]


MISTAKES = {
    "{format: bundle, precision: int8}": r"export\.precision: the format bundle is not written in int8; .* set format: onnx",
    "{max_drop: 2}": r"export\.max_drop: this key belongs to the precision fp16 or int8; set export\.precision",
    "{precision: fp16, calibration_images: 8}": r"export\.calibration_images: this key belongs to the precision int8",
    "{format: torch-export, opset: 18}": r"export\.opset: the format torch-export has no ONNX operators",
    "{format: bundle, check: openvino}": r"export\.check: the format bundle cannot be run in openvino",
    "{opset: 17}": r"export\.opset: .*18",
    "{opset: 26}": r"export\.opset: .*25",
    "{precision: int4}": r"export\.precision: ",
    "{precision: int8, max_drop: -1}": r"export\.max_drop: ",
    "{precision: int8, calibration_images: 0}": r"export\.calibration_images: ",
}


@pytest.mark.parametrize("section", MISTAKES)
def test_a_mistake_names_its_key(tiny, section):
    with pytest.raises(RecipeError, match=MISTAKES[section]):
        tiny(f"export={section}")


def test_recipes_without_the_keys_keep_their_identity(tiny):
    plain = tiny("export={}").identity()["export"]
    assert set(plain) & {"precision", "max_drop", "calibration_images", "opset", "check"} == set()
    assert tiny("export={precision: fp32, max_drop: 1.0}").identity()["export"] == plain
    lower = tiny("export={precision: int8, opset: 19}").identity()["export"]
    assert lower == plain | {"precision": "int8", "opset": 19}
    assert tiny("export={}").complete()["export"]["precision"] == "fp32"


def test_the_command_names_file_precision_and_accuracies(lowered, tmp_path):
    context, artifacts = lowered
    shutil.copytree(context.path, tmp_path / ".sdpctl")
    options = ("export", "tiny", "--precision", "int8", "--max-drop", "5", "--set", "export.calibration_images=64")
    said = printed(tmp_path, *options)
    assert (said["digest"], said["file"]) == (artifacts["int8"].digest, "tiny.int8.onnx")
    assert said["precision"] == document(artifacts["int8"], context)["precision"]
    assert {path.name for path in tmp_path.iterdir()} == {".sdpctl", "tiny.int8.onnx", "tiny.int8.onnx.md"}
    done = called(tmp_path, "export", said["tag"], "--force")
    assert (
        f"top-1 of 359 test images: int8 in onnxruntime {said['precision']['top1']['onnxruntime']:.2f} %, float32"
        in done.stdout
    )
    again = called(tmp_path, "export", said["tag"], "--precision", "fp16")
    one_line(again, 2, "is an export already")
    dry = printed(tmp_path, "export", "tiny", "--precision", "int8", "--check", "openvino", "--dry-run", "-o", "other.onnx")
    assert dry["plan"][-1]["task"] == (
        "export full as onnx, checked on at most 256 images, in OpenVINO too; in int8, which may lose 1 points on the test "
        "images"
    )
