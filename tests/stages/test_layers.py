import pytest
import torch
from stage_calls import train

from sdpctl.engine.tensors import tensors_to_bytes
from sdpctl.errors import IntegrityError
from sdpctl.kinds import HISTORY, MODEL, RECIPE, TRAINING_STATE
from sdpctl.stages.layers import lines, read_document, read_records
from sdpctl.stages.train import train_key
from sdpctl.store import Store


def test_lines_are_read_as_they_were_written(tmp_path):
    store, records = Store.create(tmp_path / "store"), [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "name": "größer"}]
    artifact = store.commit("checkpoint", {HISTORY: lines(records)})
    assert read_records(store, artifact, HISTORY) == records


@pytest.mark.parametrize(
    "content", [b"1\n", b"[]\n", b'{"a": 1}\nnull\n', b'{"a": NaN}\n', b"\xff\n", b"[" * 9999, b"1" * 5000]
)
def test_lines_of_another_shape_are_damage(tmp_path, content):
    store = Store.create(tmp_path / "store")
    artifact = store.commit("checkpoint", {HISTORY: content})
    with pytest.raises(IntegrityError, match=rf"{artifact.digest}: history\.jsonl cannot be understood") as caught:
        read_records(store, artifact, HISTORY)
    assert len(str(caught.value).splitlines()) == 1


def test_an_artifact_of_a_kind_without_a_document_is_named(tmp_path):
    store = Store.create(tmp_path / "store")
    artifact = store.commit("checkpoint", {"results.json": b"{}"})
    with pytest.raises(
        IntegrityError, match=rf"{artifact.digest}: this is of kind checkpoint, not one of bn-statistics, evaluation, "
    ):
        read_document(store, artifact)


@pytest.mark.parametrize(
    ("state", "epochs"),
    [
        ({"step": -1, "sums": [0.0, 0.0, 0.0]}, 0),
        ({"step": 10**6, "sums": [0.0, 0.0, 0.0]}, 1),
        ({"step": 3, "sums": [0.0, 0.0, 0.0]}, 1),
        ({"step": [1, 2], "sums": [0.0, 0.0, 0.0]}, 0),
        ({"step": 3, "sums": [0.0, 0.0]}, 0),
        ({"step": 3}, 0),
    ],
    ids=str,
)
def test_a_saved_training_that_does_not_fit_is_not_resumed(tiny, trained, context, state, epochs):
    recipe, source = tiny(), Store(trained)
    done = source.resolve("tiny")
    layers = {
        MODEL: source.read(done, MODEL),
        HISTORY: lines([{"epoch": number + 1} for number in range(epochs)]),
        RECIPE: source.read(done, RECIPE),
        TRAINING_STATE: tensors_to_bytes({name: torch.tensor(value) for name, value in state.items()}),
    }
    store = Store.create(context.path)
    key = train_key(context.workspace.resolve(recipe), finished=False)
    store.commit("checkpoint", layers, key=key, tag="tiny.partial")
    with pytest.raises(IntegrityError, match=r"training-state\.safetensors does not fit this recipe"):
        train(recipe, context, resume=True)
