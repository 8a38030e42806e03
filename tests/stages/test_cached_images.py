"""Decoders and caches of images in a whole run: which artifacts they make, and files that the store leaves alone."""

import os
import signal

import pytest
from stage_calls import calibrate, run, train

from sdpctl.data import cache
from sdpctl.data.pixels import Middle
from sdpctl.errors import RunInterruptedError
from sdpctl.stages.context import Context
from sdpctl.stages.network import open_network, recipe_layer


@pytest.fixture
def photographs(tiny, image_folder):
    """Return the tiny recipe on an image folder, with changes."""
    root = image_folder()

    def recipe(*changes):
        keys = ("data.dataset=imagefolder", f"data.root={root}", "model.num_classes=2", "model.in_channels=3")
        return tiny(*keys, "data.batch_size=4", "data.holdout=0.2", "train.validate.batches=1", *changes)

    return recipe


@pytest.mark.parametrize("augment", ["crop", "resized-crop"])
def test_artifacts_do_not_depend_on_where_images_are_kept(augment, photographs, tmp_path, listener):
    digests = {}
    for kept_in in ("none", "ram", "disk"):
        context = Context(path=tmp_path / kept_in, report=listener)
        artifacts = run(photographs(f"data.augment={augment}", "data.presize=true", f"data.cache={kept_in}"), context)
        digests[kept_in] = {name: artifact.digest for name, artifact in artifacts.items()}
        assert open_network("tiny", context).recipe.data.cache == kept_in  # it is remembered with the data
    assert digests["none"] == digests["ram"] == digests["disk"]
    kept = sorted((tmp_path / "disk" / "cache").glob("*.images"))
    assert len(kept) == 2
    store = Context(path=tmp_path / "disk", report=listener).store
    store.gc(untagged=True, grace=0)
    assert list(store.verify()) == []
    assert sorted((tmp_path / "disk" / "cache").glob("*.images")) == kept
    assert not (tmp_path / "none" / "cache").exists()
    assert not (tmp_path / "ram" / "cache").exists()


def test_a_checkpoint_of_an_earlier_version_is_used_with_pil(photographs, context):
    """The recipe that pil stores is the one that earlier versions stored: it has no decoder."""
    recipe = photographs("data.augment=resized-crop", "data.decoder=pil", "data.presize=false")
    artifact = train(recipe, context)
    stored = context.store.read(artifact, "recipe.yaml")
    assert not any(key in stored for key in (b"decoder", b"presize", b"cache"))
    network = open_network("tiny", context)
    assert network.recipe.data.decoder == "pil"
    assert recipe_layer(network.resolved) == stored
    cached = open_network("tiny", context, ["data.cache=ram"])  # the crops of the calibration are still those of the files
    assert recipe_layer(cached.resolved) == stored
    assert calibrate(cached, context).digest == calibrate(network, context).digest
    assert open_network("tiny", context, ["data.decoder=torchvision"]).recipe.data.decoder == "torchvision"


def test_a_training_is_not_continued_with_a_different_decoder(photographs, context):
    """The user is told which key differs, and can set it."""
    train(photographs("data.decoder=pil", "name=tiny", "train.epochs=1"), context)
    first = context.store.resolve("tiny")
    again = train(photographs("train.epochs=1"), context)
    assert again.digest != first.digest
    assert train(photographs("data.decoder=pil", "train.epochs=1"), context).digest == first.digest


def test_a_signal_while_images_are_resized_saves_the_training(photographs, tmp_path, listener, monkeypatch):
    """The signal is heeded after the first batch of resized images, and no part of the cache is left."""
    recipe = photographs("data.cache=disk", "data.holdout=0.1")
    whole = train(recipe, Context(path=tmp_path / "whole", report=listener))
    context = Context(path=tmp_path / "stopped", report=listener)
    with monkeypatch.context() as patched:
        patched.setattr(cache, "_AT_A_TIME", 4)
        resize, sent = Middle.of, []

        def signalled(*arguments, **named):
            if not sent:
                sent.append(os.kill(os.getpid(), signal.SIGTERM))  # a second one would end this process
            return resize(*arguments, **named)

        patched.setattr(Middle, "of", signalled)
        with pytest.raises(RunInterruptedError) as caught:
            train(recipe, context)
    assert caught.value.exit_code == 143
    assert "is saved; `run` or `train --resume` continues from it" in str(caught.value)
    assert [path.suffix for path in (context.path / "cache").iterdir()] == [".lock"]
    assert train(recipe, context, resume=True).digest == whole.digest
