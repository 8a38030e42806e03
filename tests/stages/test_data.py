"""Data as it is: images that cannot be decoded, folders that changed, classes that are lacking, data that is gone."""

import dataclasses
import json
import os
import shutil

import pytest
import torch
import yaml
from PIL import Image
from stage_calls import calibrate, document, evaluate, export, run, search, train

from sdpctl.errors import DataError, NotFoundError, RecipeError
from sdpctl.loading import load
from sdpctl.prediction import predict
from sdpctl.recipe.load import parse_recipe
from sdpctl.stages.context import Context
from sdpctl.stages.network import open_network
from sdpctl.stages.opening import open_data
from sdpctl.stages.train import train_key
from sdpctl.stages.workspace import with_classes

pytestmark = pytest.mark.usefixtures("quick_sqlite")

TEXT = """
name: tiny
model: {arch: resnet20, in_channels: 1}
data: {dataset: imagefolder, image_size: 8, workers: 0}
sdpoint: {ratios: [0.5], points: [stem, layer2.0]}
train: {validate: {batches: 2}}
"""

FOLDER = ("data.dataset=imagefolder", "data.batch_size=4", "train.epochs=1", "calibrate.batches=1", "data.holdout=25%")


@pytest.fixture
def photos(image_folder):
    return image_folder()


@pytest.fixture
def recipe(tiny, photos):
    """Read the tiny recipe for a folder of photographs, with overrides."""
    return lambda *overrides: tiny(*FOLDER, f"data.root={photos}", *overrides)


class TestBadImages:
    @pytest.fixture
    def damaged(self, photos):
        """Add three files that are not images."""
        bad = [photos / name for name in ("train/cat/zero.jpg", "train/dog/text.png", "val/dog/fifo.gif")]
        bad[0].touch()
        bad[1].write_text("not an image")
        os.mkfifo(bad[2])
        return bad

    def test_all_are_named_before_the_first_step(self, recipe, context, damaged, listener):
        with pytest.raises(DataError) as caught:
            train(recipe(), context)
        lines = str(caught.value).splitlines()
        assert [line.partition(": ")[0] for line in lines[:-1]] == list(map(str, damaged))
        assert lines[-1] == (
            "3 of 51 images cannot be decoded; remove them, or leave them out with --set data.skip_unreadable=true"
        )
        assert context.store.artifacts() == []
        assert not any("epoch" in note for note in listener.notes)

    def test_leaving_them_out_is_removing_them(self, recipe, context, damaged, listener, tmp_path):
        skipped = train(recipe("data.skip_unreadable=true"), context)
        (note,) = (note for note in listener.notes if "left out" in note)
        assert "3 of 51 images are left out (data.skip_unreadable): train/cat/zero.jpg (the file is empty), train/dog" in note
        reasons = json.loads(context.store.read(skipped, "left-out.json"))
        assert reasons["val/dog/fifo.gif"] == "not a regular file but a FIFO"
        assert len(reasons) == 3
        logged = [json.loads(line) for line in (context.path / "logs" / "tiny.jsonl").read_text().splitlines()]
        assert [line["images"] for line in logged if line["event"] == "left out"] == [reasons]
        for path in damaged:
            path.unlink()
        other = Context(path=tmp_path / "other", report=listener)
        removed = train(recipe(), other)
        assert removed.key == skipped.key
        assert "left-out.json" not in removed.layers
        for layer in ("model.safetensors", "recipe.yaml", "history.jsonl"):
            assert other.store.read(removed, layer) == context.store.read(skipped, layer)

    def test_later_commands_remember_it(self, recipe, context, damaged):
        train(recipe("data.skip_unreadable=true"), context)
        later = dataclasses.replace(context)
        assert document(evaluate(open_network("tiny", later), later), later)["images"] == 24

    def test_one_that_comes_later_is_left_out_by_one_key(self, recipe, context, photos):
        train(recipe(), context)
        (photos / "train" / "cat" / "late.jpg").touch()
        later = dataclasses.replace(context)
        with pytest.raises(DataError, match=r"late\.jpg: .*; remove it, or leave it out with --set data\.skip_unreadable=true"):
            evaluate(open_network("tiny", later), later)
        told = open_network("tiny", later, ["data.skip_unreadable=true"])
        assert evaluate(told, later).kind == "evaluation"

    def test_one_that_ends_early_after_the_first_look(self, recipe, context, photos):
        """Nothing looks at it again before it is needed."""
        context.require_writable()
        resolved = context.workspace.resolve(recipe())
        for path in (photos / "train").rglob("*.jpg"):
            path.write_bytes(path.read_bytes()[:400])
        data = open_data(resolved.recipe, torch.device("cpu"), context)
        with pytest.raises(DataError, match=r"\.jpg: this image cannot be decoded \(.*\); replace or remove it"):
            list(data.training(0))


class TestChangedData:
    @pytest.fixture
    def changed(self, recipe, context, photos):
        """Train, then remove an image; return the context of a later process."""
        run(recipe(), context)
        (photos / "train" / "cat" / "3.jpg").unlink()
        return dataclasses.replace(context)

    @pytest.mark.parametrize("command", [calibrate, evaluate, search, export])
    def test_one_key_uses_it_all_the_same(self, command, changed, listener):
        few = [
            "search.evaluations=2",
            "search.points=[stem]",
            "search.calibration_batches=1",
            "export={format: bundle, instances: [full]}",
        ]
        with pytest.raises(DataError) as caught:
            command(open_network("tiny", changed, few), dataclasses.replace(changed), force=True)
        assert str(caught.value).endswith(
            "images or classes were added, removed or changed; restore it, name its folder with --set data.root=FOLDER, or use "
            "this data with --set data.fingerprint=null"
        )
        listener.notes.clear()
        told = open_network("tiny", changed, [*few, "data.fingerprint=null"])
        assert command(told, changed, force=True) is not None
        said = [note for note in listener.notes if "not the training data" in note]
        assert len(said) == 1
        assert said[0].endswith("; the training may have used held-out and test images")

    def test_predict_too(self, changed, photos, listener):
        context = dataclasses.replace(changed)
        image = photos / "val" / "cat" / "0.jpg"
        found = predict("tiny", [image], context, ["data.fingerprint=null"], instance="full")
        assert found["images"][0]["file"] == str(image)
        assert any("not the training data" in note for note in listener.notes)

    def test_the_same_data_elsewhere_is_not_other_data(self, recipe, context, photos, listener):
        train(recipe(), context)
        evaluate(open_network("tiny", context, ["data.fingerprint=null"]), context)
        assert not any("not the training data" in note for note in listener.notes)


class TestIdentify:
    """`data.identify=stat`: a fingerprint of names and sizes."""

    def test_a_later_command_finds_the_data_and_the_result(self, recipe, context, listener):
        checkpoint = train(recipe("data.identify=stat"), context)
        data = yaml.safe_load(context.store.read(checkpoint, "recipe.yaml"))["data"]
        assert data["identify"] == "stat"
        assert data["fingerprint"].startswith("stat-")
        assert not (context.path / "files.sqlite").exists()
        later = dataclasses.replace(context)
        assert document(evaluate(open_network("tiny", later), later), later)["images"] == 24
        listener.notes.clear()
        again = dataclasses.replace(context)
        evaluate(open_network("tiny", again), again)
        assert any("in the store already" in note for note in listener.notes)

    def test_the_recipe_of_content_says_nothing(self, recipe, context):
        checkpoint = train(recipe("data.identify=content"), context)
        assert "identify" not in yaml.safe_load(context.store.read(checkpoint, "recipe.yaml"))["data"]
        assert train(recipe(), context) == checkpoint

    def test_each_has_its_own_key(self, recipe, context):
        keys = {train_key(context.workspace.resolve(recipe(f"data.identify={kind}"))) for kind in ("content", "stat")}
        assert len(keys) == 2

    def test_changed_data_is_refused(self, recipe, context, photos):
        train(recipe("data.identify=stat"), context)
        (photos / "train" / "cat" / "3.jpg").unlink()
        later = dataclasses.replace(context)
        with pytest.raises(DataError, match=r"this is not the data that was used before \(fingerprint stat-.*, not stat-"):
            evaluate(open_network("tiny", later), later)

    @pytest.mark.parametrize(("before", "now"), [("content", "stat"), ("stat", "content")])
    def test_a_fingerprint_of_the_other_kind(self, recipe, context, listener, before, now, monkeypatch):
        train(recipe(f"data.identify={before}"), context)
        later, other = dataclasses.replace(context), f"data.identify={now}"
        with monkeypatch.context() as patch:
            patch.setattr("sdpctl.stages.workspace.look_at", None)  # nothing is looked at, which could take hours
            with pytest.raises(DataError) as caught:
                evaluate(open_network("tiny", later, [other]), later)
        assert f"this data is identified by {now} (data.identify), but the fingerprint" in str(caught.value)
        assert str(caught.value).endswith(
            f"was made by {before}: the two cannot be compared; use data.identify={before}, or use this data with "
            "--set data.fingerprint=null"
        )
        told = open_network("tiny", later, [other, "data.fingerprint=null"])
        assert evaluate(told, later).kind == "evaluation"
        (said,) = (note for note in listener.notes if "training data" in note)
        assert "this may or may not be the training data (its fingerprint is" in said
        assert f"made by data.identify={before}, which cannot be compared with {now})" in said

    def test_a_remembered_key_that_does_not_fit(self, recipe, context):
        train(recipe("data.skip_unreadable=true"), context)
        other = ["data.identify=stat", "data.fingerprint=null"]
        with pytest.raises(RecipeError, match=r"use data\.skip_unreadable=false or data\.identify=content"):
            open_network("tiny", context, other)
        later = dataclasses.replace(context)
        assert evaluate(open_network("tiny", later, [*other, "data.skip_unreadable=false"]), later).kind == "evaluation"

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("fault", ["vanished", "cut", "loop"])
    def test_an_image_that_cannot_be_loaded(self, recipe, context, photos, workers, fault):
        context.require_writable()
        resolved = context.workspace.resolve(recipe("data.identify=stat", f"data.workers={workers}"))
        for path in (photos / "train").rglob("*.jpg"):
            content = path.read_bytes()
            path.unlink()
            if fault == "cut":
                path.write_bytes(content[:400])
            elif fault == "loop":
                path.symlink_to(path.name)
        data = open_data(resolved.recipe, torch.device("cpu"), context)
        with pytest.raises(DataError, match=r"\.jpg: this image cannot be decoded \(.*\); replace or remove it") as caught:
            list(data.training(0))
        assert len(caught.value.lines) == 1

    def test_images_that_are_no_images_end_a_training(self, recipe, context, photos):
        (photos / "train" / "cat" / "text.jpg").write_text("not an image")
        with pytest.raises(
            DataError, match=r"text\.jpg: this image cannot be decoded \(it is not an image\); replace or remove it"
        ):
            train(recipe("data.identify=stat", "train.epochs=3"), context)
        assert [artifact.tag for artifact in context.store.artifacts() if artifact.tag == "tiny"] == []


class TestClasses:
    def test_their_number_is_found(self, recipe, context, image_folder):
        context.require_writable()
        written = context.workspace.resolve(recipe("model.num_classes=2"))
        found = context.workspace.resolve(recipe())
        assert found == written
        assert train_key(found) == train_key(written)
        assert found.identity()["model"]["num_classes"] == 2

    def test_without_a_look_at_the_images(self, recipe, photos):
        for path in photos.rglob("*.jpg"):
            path.write_bytes(b"")
        assert with_classes(recipe()).model.num_classes == 2
        assert with_classes(recipe("model.num_classes=7")).model.num_classes == 7

    def test_without_the_folder(self, recipe):
        with pytest.raises(DataError, match=r"nowhere: there is no such folder; .*, or set model\.num_classes=NUMBER"):
            with_classes(recipe("data.root=nowhere"))

    def test_one_is_too_few(self, recipe, photos, context):
        for part in ("train", "val"):
            shutil.rmtree(photos / part / "dog")
        for look in (with_classes, context.workspace.resolve):
            with pytest.raises(DataError, match="there is only one class, 'cat'; add a second one"):
                look(recipe())

    def test_another_number_than_the_network_has(self, recipe, context, photos):
        with pytest.raises(DataError) as caught:
            train(recipe("model.num_classes=5"), context)
        assert str(caught.value) == (
            f"{photos}: imagefolder has 2 classes in this folder, but model.num_classes is 5; "
            "set model.num_classes=2, or set data.root to a different folder"
        )

    def test_a_subset_is_evaluated_with_all_classes(self, recipe, context, photos):
        """Labels are those of all classes: a network that always says the last class is right about its images alone."""
        for part, lacking in (("train", "ant"), ("val", "dog")):
            shutil.copytree(photos / "train" / "cat", photos / part / "wasp")
            (photos / part / "ant").mkdir()
            shutil.rmtree(photos / part / lacking)
        shutil.copytree(photos / "train" / "wasp", photos / "val" / "wasp", dirs_exist_ok=True)
        partial = recipe("data.partial=true")
        done = run(partial, context)
        results = document(done["eval-instances"], context)
        assert results["classes"] == ["ant", "cat", "dog", "wasp"]
        assert results["images"] == 24
        assert search(open_network("tiny", context, ["search.evaluations=2", "search.points=[stem]"]), context).kind == "search"

    def test_too_few_folders_for_imported_weights(self, recipe, context):
        with pytest.raises(DataError, match="numbered by the sorted names of the folders in train and val together"):
            train(recipe("data.partial=true", "model.num_classes=1000"), context)


@pytest.fixture(scope="module")
def done(tmp_path_factory, make_listener):
    """A store and its data: trained and evaluated, nothing chosen yet."""
    root = tmp_path_factory.mktemp("predict")
    for part in ("train", "val"):
        for label, kind in enumerate(("cat", "dog")):
            (root / "photos" / part / kind).mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (20, 16), (90 * label, 10 * i, 90)).save(root / "photos" / part / kind / f"{i}.png")
    recipe = parse_recipe(TEXT, "tiny.yaml", [*FOLDER, f"data.root={root / 'photos'}"])
    run(recipe, Context(path=root / "store", report=make_listener()))
    return root


class TestPredict:
    @pytest.fixture
    def moved(self, done, tmp_path):
        """The store on a machine that has no data but two images."""
        shutil.copytree(done / "store", tmp_path / "store")
        local = tmp_path / "store" / "local.json"
        local.write_text(local.read_text().replace(str(done / "photos"), str(tmp_path / "gone")))
        for kind in ("cat", "dog"):
            shutil.copytree(done / "photos" / "val" / kind, tmp_path / "images" / kind)
        return tmp_path / "images"

    def test_full_runs_where_nothing_says_which_is_best(self, moved, context, listener):
        found = predict("tiny", [moved / "dog" / "1.png"], context)
        assert found["instance"] == "full"
        *_, first, second = listener.notes
        assert first.startswith("tiny: the accuracy on held-out images cannot be measured (")
        assert "there is no such data folder" in first
        assert second == "tiny: running `full`, since no accuracy on held-out images is known to choose an instance by"

    def test_a_budget_says_what_is_lacking(self, moved, context):
        with pytest.raises(NotFoundError, match=r"no held-out accuracy .*run `sdpctl eval-instances tiny --split holdout`"):
            predict("tiny", [moved / "dog" / "1.png"], context, max_macs="60%")

    def test_an_instance_by_name(self, moved, context, listener):
        assert predict("tiny", [moved / "dog" / "1.png"], context, instance="stem@0.5")["instance"] == "stem@0.5"
        assert listener.notes == []

    def test_what_was_chosen_on_before(self, done, moved, context, make_listener):
        there = Context(path=context.path, report=make_listener())
        evaluate(open_network("tiny", there, [f"data.root={done / 'photos'}"]), there, split="holdout")
        local = context.path / "local.json"
        local.write_text(local.read_text().replace(str(done / "photos"), str(moved / "gone")))
        found = predict("tiny", [moved / "dog" / "1.png"], context, max_macs="100%")
        assert found["instance"] == str(load("tiny", store=context.path).pick().instance)

    def test_the_images_of_a_folder(self, moved, context):
        (moved / ".hidden").mkdir()
        shutil.copy(moved / "dog" / "1.png", moved / ".hidden")
        for name in ("._1.png", ".DS_Store", "notes.txt"):
            (moved / "cat" / name).write_bytes(b"\0\5\x16\7")
        found = predict("tiny", [moved, moved / "cat" / "5.png"], context, instance="full")
        files = [str(moved / kind / f"{i}.png") for kind in ("cat", "dog") for i in range(8)]
        assert [image["file"] for image in found["images"]] == [*files, str(moved / "cat" / "5.png")]
        assert found["images"][5]["top"] == found["images"][-1]["top"]

    def test_a_folder_without_images(self, moved, context):
        (moved / "empty").mkdir()
        with pytest.raises(DataError, match=r"empty: no image in this folder \(\.jpg, "):
            predict("tiny", [moved / "empty"], context)

    def test_all_bad_ones_are_named_before_anything_is_computed(self, moved, context, monkeypatch):
        monkeypatch.setattr("sdpctl.prediction.open_bundle", None)
        (moved / "zero.jpg").touch()
        os.mkfifo(moved / "fifo")
        (moved / "endless.png").symlink_to("/dev/zero")
        files = [moved / name for name in ("zero.jpg", "dog/1.png", "fifo", "endless.png", "nowhere.png")]
        with pytest.raises(DataError) as caught:
            predict("tiny", files, context)
        assert str(caught.value).splitlines() == [
            f"{moved / 'zero.jpg'}: this image cannot be decoded (the file is empty)",
            f"{moved / 'fifo'}: this image cannot be decoded (not a regular file but a FIFO)",
            f"{moved / 'endless.png'}: this image cannot be decoded (not a regular file but a device)",
            f"{moved / 'nowhere.png'}: this image cannot be decoded (No such file or directory)",
            "4 of 5 images cannot be decoded; leave them out",
        ]
