"""A format that is added from outside with one registration, as a user meets it."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command import called, document

from sdpctl import create_model
from sdpctl.cli.export import complete_formats
from sdpctl.errors import RecipeError
from sdpctl.export.catalog import CARD, FORMATS, FormatInfo
from sdpctl.export.format import Format
from sdpctl.export.network import metadata, one_instance
from sdpctl.export.outside import ANSWER, run_program
from sdpctl.recipe.load import parse_recipe
from sdpctl.store import Store

SMOKE = Path(__file__).parent.parent.parent / "recipes" / "smoke.yaml"

PROGRAM = f"""{ANSWER}
import json, sdpctl, torch
said, arrays = json.load(open("network.json")), numpy.load("weights.npz")
model = sdpctl.create_model(said["network"].pop("arch"), **said["network"]).eval()
model.load_state_dict({{name: torch.from_numpy(arrays[name]) for name in arrays}})
with torch.inference_mode():
    answer(model(torch.from_numpy(numpy.load("images.npy")), said["instance"]))
"""


class NpzFormat(Format):
    """One instance as arrays of numpy."""

    def write(self, source):
        content = io.BytesIO()
        np.savez(content, **{name: tensor.numpy() for name, tensor in one_instance(source).network.state_dict().items()})
        said = json.dumps(metadata(source.description)).encode()
        return {"network.json": said, "weights.npz": content.getvalue(), CARD: source.card.encode()}

    def run(self, files, images):
        return run_program(PROGRAM, files, images)[None]

    def one_call(self, files, image):
        said, arrays = json.loads(files["network.json"]), np.load(io.BytesIO(files["weights.npz"]))
        model = create_model(said["network"].pop("arch"), **said["network"]).eval()
        model.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays})
        return lambda: model(torch.from_numpy(image), said["instance"])

    def loading(self, images):
        return f"Give {images} to the arrays in `weights.npz`."


NPZ = FormatInfo(
    name="npz",
    summary="arrays of numpy",
    suffix="arrays",
    files=("network.json", "weights.npz"),
    code=f"{__name__}:NpzFormat",
    raw_input=False,
)


@pytest.fixture(autouse=True)
def added():
    FORMATS.add(NPZ)
    yield
    FORMATS.remove("npz")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a store that holds the smoke network, untrained."""
    folder = tmp_path_factory.mktemp("added")
    done = called(folder, "train", SMOKE, "--set", "export=null", "--set", "train.epochs=0", "-q")
    assert done.returncode == 0, done.stderr
    return folder


def test_it_is_written_run_compared_kept_and_written_again(folder, tmp_path):
    dry = document(folder, "export", "smoke", "--format", "npz", "--dry-run")
    assert list(dry) == ["schema", "dry_run", "plan"]
    assert dry["plan"][-1]["task"] == "export full as npz, checked on at most 256 images"
    done = called(folder, "export", "smoke", "--format", "npz", "--instance", "stem@0.5", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["format"], said["file"], said["options"][0]["instance"]) == ("npz", "smoke.arrays", "stem@0.5")
    assert said["tag"].startswith("smoke.export.npz.")
    assert f"{said['tag']}: run outside on 256 real images, the logits differ by at most " in done.stderr
    written = {path.name: path.read_bytes() for path in (folder / "smoke.arrays").iterdir()}
    assert set(written) == {"network.json", "weights.npz", "card.md"}
    assert "Give float32, normalised, (N, 1, 8, 8) to the arrays in `weights.npz`." in written["card.md"].decode()
    assert "at the instance `stem@0.5`" in written["card.md"].decode()
    store = Store(folder / ".sdpctl")
    artifact = store.resolve(said["tag"])
    assert {name: store.read(artifact, name) for name in written} == written
    again = document(folder, "export", said["tag"], "-o", tmp_path / "again")
    assert again == said | {"file": str(tmp_path / "again")}
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == written
    refused = called(folder, "export", said["tag"], "-o", tmp_path / "again")
    assert (refused.returncode, "this folder exists; --force replaces it" in refused.stderr) == (2, True)
    assert called(folder, "export", said["tag"], "-o", tmp_path / "again", "--force").returncode == 0


def test_files_that_do_something_else_are_not_kept(folder, tmp_path, monkeypatch):
    run = NpzFormat.run
    monkeypatch.setattr(NpzFormat, "run", lambda *given: 1.01 * run(*given))
    before = {artifact.digest for artifact in Store(folder / ".sdpctl").artifacts() if artifact.kind == "export"}
    done = called(folder, "export", "smoke", "--format", "npz", "--instance", "layer2.0@0.5", "-o", tmp_path / "out")
    assert (done.returncode, "run outside, its logits differ by up to" in done.stderr) == (5, True)
    assert {a.digest for a in Store(folder / ".sdpctl").artifacts() if a.kind == "export"} == before
    assert list(tmp_path.iterdir()) == []


def test_its_latency_is_measured(folder, tmp_path):
    done = called(folder, "export", "smoke", "--format", "npz", "--max-latency-ms", "1e9", "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["format"] == "npz"
    assert " ms per image in npz; the limit is 1e+09 ms" in done.stderr


def test_completion_and_the_check_of_a_recipe_know_it(folder, tmp_path):
    assert list(complete_formats("n")) == [("npz", "arrays of numpy")]
    assert {name for name, _ in complete_formats("")} == set(FORMATS)
    text = "name: x\nmodel: {arch: resnet20, in_channels: 1}\ndata: {dataset: digits}\n"
    assert parse_recipe(text, "x.yaml", ["export.format=npz"]).export.format == "npz"
    for section, said in (
        ("{format: npzz}", r"export\.format: there is no format 'npzz' \(did you mean 'npz'\?\); choose one of onnx, .*, npz"),
        ("{format: npz, raw_input: true}", r"export\.raw_input: the format npz does not take raw pixels"),
        ("{format: npz, instances: pareto}", r"export\.instances: the format npz holds one instance; .* set format: bundle"),
    ):
        with pytest.raises(RecipeError, match=said):
            parse_recipe(text, "x.yaml", [f"export={section}"])
    done = called(folder, "export", "smoke", "--format", "nzp", "-o", tmp_path / "out")
    assert (done.returncode, "there is no format 'nzp' (did you mean 'npz'?)" in done.stderr) == (2, True)
