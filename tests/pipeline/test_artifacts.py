import pytest

from sdpctl.errors import IntegrityError
from sdpctl.pipeline.artifacts import HISTORY, lines, read_records
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
