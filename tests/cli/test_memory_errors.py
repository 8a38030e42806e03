"""What is advised where memory does not suffice."""

import pytest
from command import called, one_line
from test_cli import SMOKE

STEPS = {
    "sdpctl.engine.train.F.cross_entropy": "lower data.batch_size or data.image_size",
    "sdpctl.engine.calibrate._names": "lower data.batch_size, or set memory",
    "sdpctl.engine.evaluate.Score": "lower evaluate.batch_size, or set memory",
    "sdpctl.data.loader.ImageData.training": "close other programs, or use a machine with more memory",
    "sdpctl.store.Store.commit": "close other programs, or use a machine with more memory",
}


@pytest.mark.parametrize("step", STEPS)
def test_a_smaller_batch_is_advised_only_for_batches(tmp_path, monkeypatch, step):
    def fails(*_, **__):
        raise RuntimeError("can't allocate memory: no room")

    monkeypatch.setattr(step, fails)
    done = called(tmp_path, "run", SMOKE, "-q", "--set", "train.epochs=1", "--set", "train.validate.every=0")
    one_line(done, 7, "out of memory (can't allocate memory: no room); " + STEPS[step])
