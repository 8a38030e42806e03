"""Weights from elsewhere: what is read, what is refused without being run, what fits."""

import argparse
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from functools import cache
from pathlib import Path

import pytest
import torch
import torchvision
from networks import randomise_norms
from safetensors.torch import save_file
from torch import nn

from sdpctl.engine.weights import (
    few,
    fill,
    find_weights,
    fitted,
    misfits,
    read_file,
)
from sdpctl.errors import DataError, UsageError
from sdpctl.models import architecture, create_model

SMALL = {"num_classes": 10, "in_channels": 1, "stem": "small"}


@cache
def network():
    with torch.device("meta"):
        return create_model("resnet20", **SMALL)


def weights(seed=3):
    torch.manual_seed(seed)
    return {
        name: torch.rand(t.shape) if t.is_floating_point() else torch.tensor(7) for name, t in network().state_dict().items()
    }


def found(path, **options):
    return find_weights(read_file(path), network(), path.name, **options)


def read_weights(path, **options):
    """Return what is found in a file, in a network's own types."""
    return fitted(found(path, **options).weights, network())


def saved(folder, content, name="w.pth", **options):
    torch.save(content, folder / name, **options)
    return folder / name


def assert_same(given, wanted):
    assert given.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert given[name].dtype == tensor.dtype
        assert torch.equal(given[name], tensor)


def one_line(error, path):
    assert type(error) is DataError
    text = str(error)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text


# What is read


@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_by_itself(tmp_path, zipped):
    path = saved(tmp_path, weights(), _use_new_zipfile_serialization=zipped)
    assert zipfile.is_zipfile(path) == zipped
    assert_same(read_weights(path), weights())


@pytest.mark.parametrize("name", ["state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_in_a_checkpoint_and_nothing_beside_it(tmp_path, name, zipped):
    layer = nn.Linear(2, 2)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    beside = {"epoch": 90, "arch": "resnet18", "best_acc1": 69.7, "optimizer": optimiser.state_dict(), "args": None}
    path = saved(tmp_path, beside | {name: OrderedDict(weights())}, "w.pth.tar", _use_new_zipfile_serialization=zipped)
    assert_same(read_weights(path), weights())


def test_the_first_place_that_holds_weights_counts(tmp_path):
    path = saved(tmp_path, {"state_dict": None, "model": weights(1), "model_state_dict": weights(2)})
    assert_same(read_weights(path), weights(1))


def test_the_prefix_of_data_parallel_is_taken_off(tmp_path):
    prefixed = {f"module.{name}": tensor for name, tensor in weights().items()}
    assert_same(read_weights(saved(tmp_path, {"state_dict": prefixed})), weights())
    save_file(prefixed, tmp_path / "w.safetensors")
    assert_same(read_weights(tmp_path / "w.safetensors"), weights())


@pytest.mark.parametrize(
    "prefix",
    [
        *("_orig_mod.", "module.", "model.", "encoder.", "backbone.", "net."),
        *("module._orig_mod.", "_orig_mod.module.", "module.module.", "model.backbone.", "module.model.encoder._orig_mod."),
        "student.3.trunk.",
    ],
)
@pytest.mark.parametrize(
    "nested", [(), ("state_dict",), ("model",), ("net",), ("network",), ("last", "checkpoint", "model_state_dict")]
)
def test_every_prefix_is_taken_off_wherever_the_weights_are_nested(tmp_path, prefix, nested):
    content = {f"{prefix}{name}": tensor for name, tensor in weights().items()}
    for name in reversed(nested):
        content = {"epoch": 3, name: content}
    path = saved(tmp_path, content)
    assert_same(read_weights(path), weights())
    left, remarks = prefix.replace("_orig_mod.", ""), found(path).remarks
    assert remarks == (
        *([f"the weights are those of `{'.'.join(nested)}`"] if nested else []),
        *([f"the prefix `{left}` is removed from the names"] if left else []),
    )


def test_compiled_modules_within_a_network(tmp_path):
    inner = {name.replace("layer2.", "layer2._orig_mod."): tensor for name, tensor in weights().items()}
    assert_same(read_weights(saved(tmp_path, inner)), weights())


def test_names_that_are_the_same_without_the_mark_of_a_compiled_module(tmp_path):
    path = saved(tmp_path, weights() | {"_orig_mod.fc.bias": torch.ones(10)})
    with pytest.raises(DataError, match=r"^w\.pth: without the prefix `_orig_mod\.`, two tensors are called fc\.bias$"):
        found(path)


def test_what_stands_beside_the_prefix_is_left_out_and_said(tmp_path):
    mixed = {f"encoder.{name}": tensor for name, tensor in weights().items()}
    mixed |= {"decoder.0.weight": torch.ones(4, 64, 3, 3), "n_averaged": torch.tensor(3)}
    path = saved(tmp_path, mixed)
    assert_same(read_weights(path), weights())
    assert found(path).remarks[-1] == "2 other tensors are left out, for example `decoder.0.weight`"


def test_a_tensor_beside_the_networks_own_is_not_left_out(tmp_path):
    """It may belong to a layer that the network here lacks."""
    path = saved(tmp_path, weights() | {"layer1.0.se.fc1.weight": torch.ones(4, 16, 1, 1)})
    assert misfits(found(path).weights, network()) == ["layer1.0.se.fc1.weight (4, 16, 1, 1) is not expected"]


@pytest.mark.parametrize("layer", ["linear", "classifier", "head", "last_linear", "output", "fc.1"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_classifier_of_another_name_is_the_head(tmp_path, layer, prefix):
    given = {prefix + name.replace("fc.", f"{layer}."): tensor for name, tensor in weights().items()}
    path = saved(tmp_path, given)
    assert_same(read_weights(path), weights())
    assert found(path).remarks[-1] == f"the classifier `{layer}` counts as `fc`"


def test_a_classifier_may_stand_beside_the_backbone(tmp_path):
    given = {name if name.startswith("fc.") else f"backbone.{name}": tensor for name, tensor in weights().items()}
    path = saved(tmp_path, given)
    assert_same(read_weights(path), weights())
    assert found(path).remarks == ("the prefix `backbone.` is removed from the names", "the classifier `fc` counts as `fc`")


@pytest.mark.parametrize(
    "beside",
    [
        {},
        {"head.0.weight": torch.ones(64, 64), "head.0.bias": torch.ones(64), "head.2.weight": torch.ones(5, 64)},
        {"head.weight": torch.ones(5, 64)},
        {"head.weight": torch.ones(5, 32), "head.bias": torch.ones(5)},
        {"head.weight": torch.ones(5, 64), "head.bias": torch.ones(4)},
    ],
)
def test_what_cannot_be_the_classifier_is_none(tmp_path, beside):
    given = {f"encoder.{name}": tensor for name, tensor in weights().items() if not name.startswith("fc.")}
    assert found(saved(tmp_path, given | beside)).head is False
    assert found(saved(tmp_path, weights())).head is True


def test_public_names_of_a_shortcut(tmp_path):
    with torch.device("meta"):
        theirs = create_model("resnet20", **SMALL, shortcut="projection")
    state = {
        name: torch.rand(t.shape) if t.is_floating_point() else t.new_zeros((), device="cpu")
        for name, t in theirs.state_dict().items()
    }
    path = saved(tmp_path, {name.replace("downsample.", "shortcut."): t for name, t in state.items()})
    assert_same(found(path).weights, state)
    assert found(path).remarks == ("each `shortcut` counts as `downsample`",)


# Moving averages


@pytest.mark.parametrize("name", ["state_dict_ema", "model_ema", "ema", "ema_state_dict"])
def test_a_moving_average_is_taken_where_it_is_asked_for(tmp_path, name):
    prefixed = {f"module.{key}": tensor for key, tensor in weights(2).items()} | {"n_averaged": torch.tensor(1)}
    path = saved(tmp_path, {name: prefixed, "state_dict": weights(1)})
    assert_same(read_weights(path), weights(1))
    assert found(path).remarks == (
        "the weights are those of `state_dict`",
        f"`{name}.module`, an exponential moving average, is left out; --ema takes it",
    )
    assert_same(read_weights(path, ema=True), weights(2))
    assert found(path, ema=True).remarks[:2] == (
        f"the weights are those of `{name}`",
        "they are an exponential moving average",
    )


def test_a_moving_average_under_a_prefix(tmp_path):
    both = {f"model.{key}": t for key, t in weights(1).items()} | {f"model_ema.{key}": t for key, t in weights(2).items()}
    path = saved(tmp_path, {"state_dict": both})
    assert_same(read_weights(path), weights(1))
    assert_same(read_weights(path, ema=True), weights(2))


def test_a_moving_average_alone_is_taken_and_said(tmp_path):
    path = saved(tmp_path, {"model_ema": weights(2)})
    assert_same(read_weights(path), weights(2))
    assert "they are an exponential moving average" in found(path).remarks


def test_no_moving_average(tmp_path):
    with pytest.raises(UsageError, match=r"^--ema: w\.pth has no moving average of the weights; leave --ema out$"):
        found(saved(tmp_path, {"state_dict": weights(), "thematic": {"conv1.weight": torch.ones(1)}}), ema=True)


def test_two_networks_in_a_file(tmp_path):
    path = saved(tmp_path, {"student": weights(1), "teacher": weights(2)})
    with pytest.raises(
        UsageError, match=r"^w\.pth: `student` and `teacher` could both be meant; write the state dict that you"
    ):
        found(path)


# Names that are not the network's


def test_names_of_a_different_network_are_one_line(tmp_path):
    path = saved(tmp_path, {f"features.{i}.weight": torch.ones(2) for i in range(300)})
    with pytest.raises(UsageError) as caught:
        found(path)
    assert str(caught.value) == (
        "w.pth: this network needs 97 tensors, but only 0 of their names are among the 300 in the file (they all begin with "
        "`features.`); is --arch right?"
    )


def test_many_lines_are_cut():
    assert few([str(i) for i in range(11)]) == [str(i) for i in range(11)]
    assert few([str(i) for i in range(225)]) == [*map(str, range(10)), "... and 215 more"]


def test_hostile_names_are_shown_harmlessly(tmp_path):
    path = saved(tmp_path, weights() | {"\x1b[31mred\n" + "x" * 5000: torch.ones(1)})
    (line,) = misfits(found(path).weights, network())
    assert line == "\\x1b[31mred\\n" + "x" * 47 + "... (1,) is not expected"
    path = saved(tmp_path, {"." * 100_000: torch.ones(1), "\x1b." * 1000: torch.ones(1)})
    with pytest.raises(UsageError) as caught:
        found(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_every_float_becomes_float32(tmp_path, kind, name):
    given = {key: t.to(kind) if t.is_floating_point() else t for key, t in weights().items()}
    if name == "w.pth":
        saved(tmp_path, given)
    else:
        save_file(given, tmp_path / name)
    assert misfits(found(tmp_path / name).weights, network()) == []
    assert_same(read_weights(tmp_path / name), {key: t.float() if t.is_floating_point() else t for key, t in given.items()})


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_counters_of_every_type_become_integers(tmp_path, kind, shape):
    given = {key: t.to(kind).reshape(shape) if key.endswith("tracked") else t for key, t in weights().items()}
    path = saved(tmp_path, given)
    assert misfits(found(path).weights, network()) == []
    assert_same(read_weights(path), weights())


def test_safetensors(tmp_path):
    save_file(weights(), tmp_path / "w.safetensors")
    assert_same(read_weights(tmp_path / "w.safetensors"), weights())


# What is refused


class Touches:
    """What leaves a mark when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def as_torch(content, path):
    torch.save(content, path)


def as_legacy_torch(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


def as_pickle_of_old(content, path):
    path.write_bytes(pickle.dumps(content, protocol=0))


@pytest.mark.parametrize("write", [as_torch, as_legacy_torch, as_pickle, as_pickle_of_old])
@pytest.mark.parametrize("place", ["alone", "among the tensors", "beside the state dict"])
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(tmp_path, write, place):
    mark, path = tmp_path / "mark", tmp_path / "w.pth.tar"
    bomb = Touches(mark)
    state = {"a": torch.ones(2)} if write in (as_torch, as_legacy_torch) else {}
    content = {
        "alone": bomb,
        "among the tensors": state | {"b": bomb},
        "beside the state dict": {"state_dict": state, "args": bomb},
    }[place]
    write(content, path)
    with pytest.raises(DataError) as caught:
        read_file(path)
    assert "this file is not plain tensors and was not run" in one_line(caught.value, path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(bomb))
    assert mark.exists()  # it would have


def test_options_of_a_training_script_beside_the_weights_are_read_as_data(tmp_path):
    path = saved(tmp_path, {"state_dict": weights(), "args": argparse.Namespace(lr=0.1, model="resnet20")})
    assert read_weights(path).keys() == weights().keys()
    path = saved(tmp_path, {"state_dict": weights(), "args": argparse.Namespace(hook=Touches(tmp_path / "mark"))})
    with pytest.raises(DataError, match="not plain tensors and was not run"):
        read_weights(path)
    assert not (tmp_path / "mark").exists()


def test_what_a_pickle_wanted_is_named(tmp_path):
    path = saved(tmp_path, {"state_dict": weights(), "args": Touches(tmp_path / "mark")})
    with pytest.raises(DataError, match=r"was not run \(it contains [\w.]+\)") as caught:
        read_weights(path)
    assert "torch.save(model.state_dict(), FILE)" in str(caught.value)


def test_a_whole_module_is_refused(tmp_path):
    path = saved(tmp_path, nn.Linear(2, 2))
    with pytest.raises(
        DataError, match=r"not plain tensors and was not run \(it contains torch\.nn\.modules\.linear\.Linear\)"
    ):
        read_weights(path)
    path = saved(tmp_path, {"model": nn.Linear(2, 2)})
    with pytest.raises(DataError, match="not plain tensors and was not run"):
        read_weights(path)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"weights\nof a network\n", b"\x80\x02}q\x00.", bytes(range(256)) * 8])
def test_a_file_of_something_else(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_weights(path)
    one_line(caught.value, path)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_file_that_is_not_there_and_a_folder(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(DataError, match="no weights can be read from this file") as caught:
        read_weights(path)
    one_line(caught.value, path)
    path.mkdir()
    with pytest.raises(DataError, match="no weights can be read from this file") as caught:
        read_weights(path)
    one_line(caught.value, path)


@pytest.mark.parametrize("kept", [4, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["w.pth", "legacy.pth", "w.safetensors"])
def test_a_truncated_file(tmp_path, name, kept):
    path = tmp_path / name
    if name == "w.safetensors":
        save_file(weights(), path)
    else:
        saved(tmp_path, weights(), name, _use_new_zipfile_serialization=name == "w.pth")
    content = path.read_bytes()
    path.write_bytes(content[: kept if kept > 1 else int(kept * len(content))])
    with pytest.raises(DataError) as caught:
        read_weights(path)
    one_line(caught.value, path)


@pytest.mark.parametrize(
    "content", [torch.ones(3), [torch.ones(3)], {}, {"state_dict": {}}, {"epoch": 3}, 5, {"a": [1]}, {0: torch.ones(1)}]
)
def test_what_holds_no_tensors_by_name(tmp_path, content):
    path = saved(tmp_path, content)
    with pytest.raises(DataError, match=r"has no state dict .* nor under a key state_dict, model, .*, network$"):
        read_weights(path)


# Files that ask for more than they hold


@pytest.mark.parametrize("name", ["conv1.weight", "layer2.0.bn1.weight", "fc.bias", "bn1.num_batches_tracked"])
def test_a_tensor_that_is_declared_huge_is_compared_before_it_is_copied(tmp_path, name):
    path = saved(tmp_path, weights() | {name: torch.zeros(1).expand(1 << 37)})
    assert path.stat().st_size < 2e6
    if name == "fc.bias":
        with pytest.raises(DataError, match=r"^w\.pth: fc\.bias is declared as \(137438953472,\), more than the file holds"):
            found(path)
    else:
        assert misfits(found(path).weights, network()) == [
            f"{name} is ({1 << 37},), not {tuple(network().state_dict()[name].shape)}"
        ]


def test_a_classifier_is_not_believed_to_have_more_classes_than_the_file_holds(tmp_path):
    huge = {"fc.weight": torch.zeros(1).expand(1_000_000_000, 64), "fc.bias": torch.zeros(1).expand(1_000_000_000)}
    with pytest.raises(DataError, match=r"^w\.pth: fc\.weight is declared as \(1000000000, 64\), more than the file holds; "):
        found(saved(tmp_path, weights() | huge))


def test_views_of_the_same_memory_become_tensors_of_their_own(tmp_path):
    given = weights()
    given["layer1.0.bn1.weight"] = given["layer1.0.bn1.bias"] = given["bn1.bias"]
    given["conv1.weight"] = torch.rand(16, 1, 1, 1).expand(-1, -1, 3, 3)
    read = read_weights(saved(tmp_path, given))
    assert_same(read, given)
    assert len({tensor.untyped_storage().data_ptr() for tensor in read.values()}) == len(read)


def test_an_empty_tensor(tmp_path):
    path = saved(tmp_path, weights() | {"conv1.weight": torch.ones(16, 0, 3, 3)})
    assert misfits(found(path).weights, network()) == ["conv1.weight is (16, 0, 3, 3), not (16, 1, 3, 3)"]


def test_an_archive_that_unpacks_to_more_than_itself(tmp_path):
    path = saved(tmp_path, {"a": torch.zeros(5_000_000)})
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as small:
        for member in plain.infolist():
            small.writestr(member.filename, plain.read(member))
    with pytest.raises(DataError, match=r"members hold 20,\d{3},\d{3} bytes, the file \d\d,\d{3}: torch\.save writes no such"):
        read_file(tmp_path / "small.pth")


@pytest.mark.parametrize("header", [b"\xff" * 8, (1 << 40).to_bytes(8, "little"), (100).to_bytes(8, "little") + b"{" * 100])
def test_a_safetensors_header_that_lies(tmp_path, header):
    path = tmp_path / "w.safetensors"
    path.write_bytes(header + b"{}")
    with pytest.raises(DataError) as caught:
        read_file(path)
    one_line(caught.value, path)


@pytest.mark.parametrize("end", [8, 4, 1 << 50])
def test_a_safetensors_tensor_larger_than_its_file(tmp_path, end):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, end]}}).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(DataError) as caught:
        read_file(path)
    one_line(caught.value, path)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_only_regular_files_are_read(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="not a regular file but a FIFO") as caught:
        read_file(tmp_path / name)
    one_line(caught.value, tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(DataError, match="not a regular file but a device"):
        read_file(tmp_path / name)
    target = saved(tmp_path, weights(), "target.pth") if name == "w.pth" else tmp_path / "target.safetensors"
    if name != "w.pth":
        save_file(weights(), target)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(target)
    assert_same(read_weights(tmp_path / name), weights())


# What fits


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model("resnet20", **SMALL)


def own(model, seed=5):
    """Return weights that fit, none of them those of the model."""
    torch.manual_seed(seed)
    return {name: torch.rand(t.shape) if t.is_floating_point() else t + 9 for name, t in model.state_dict().items()}


def test_what_fits_has_no_misfits(model):
    assert misfits(own(model), model) == []


def test_every_misfit_is_listed(model):
    given = own(model)
    del given["conv1.weight"], given["layer3.2.bn2.running_var"]
    given |= {"fc.weight": torch.ones(10, 32), "bn1.bias": torch.ones(8), "extra.weight": torch.ones(2, 1), "x": torch.ones(())}
    assert set(misfits(given, model)) == {
        "conv1.weight (16, 1, 3, 3) is missing",
        "layer3.2.bn2.running_var (64,) is missing",
        "extra.weight (2, 1) is not expected",
        "x () is not expected",
        "fc.weight is (10, 32), not (10, 64)",
        "bn1.bias is (8,), not (16,)",
    }
    assert len(misfits(given, model)) == 6


def test_counters_of_batches_are_not_missed_but_looked_at_where_they_are(model):
    given = {name: t for name, t in own(model).items() if not name.endswith("num_batches_tracked")}
    assert misfits(given, model) == []
    assert misfits(given | {"bn1.num_batches_tracked": torch.ones(3)}, model) == ["bn1.num_batches_tracked is (3,), not ()"]


def test_all_is_loaded_where_the_classes_are_the_same(model):
    given = own(model)
    assert fill(model, given) is True
    assert_same(model.state_dict(), given)


def test_a_network_keeps_the_counters_that_weights_lack(model):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    given = {name: t for name, t in own(model).items() if not name.endswith("num_batches_tracked")}
    assert fill(model, given) is True
    assert_same(model.state_dict(), before | given)


def test_other_classes_leave_the_head_as_it_is_and_load_the_rest(model):
    head = {name: t.clone() for name, t in model.state_dict().items() if name.startswith("fc.")}
    given = own(model) | {"fc.weight": torch.zeros(3, 64), "fc.bias": torch.zeros(3)}
    untouched = dict(given)
    assert fill(model, given) is False
    assert_same(model.state_dict(), given | head)
    assert_same(given, untouched)


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({"layer1.0.bn1.bias": torch.ones(2)}, ["layer1.0.bn1.bias is (2,), not (16,)"]),
        ({"fc.bias": torch.ones(3)}, ["fc.bias is (3,), not (10,)"]),
        ({"fc.weight": torch.ones(10, 8)}, ["fc.weight is (10, 8), not (10, 64)"]),
        ({"fc.weight": torch.ones(3, 64), "fc.bias": torch.ones(3), "y": torch.ones(1)}, ["y (1,) is not expected"]),
        ({"a": torch.ones(1), "b": torch.ones(2)}, ["a (1,) is not expected", "b (2,) is not expected"]),
    ],
)
def test_nothing_is_loaded_where_something_does_not_fit(model, change, lines):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(DataError) as caught:
        fill(model, own(model) | change)
    assert str(caught.value).splitlines() == lines
    assert_same(model.state_dict(), before)


def test_a_head_that_is_missing_is_missing(model):
    given = {name: t for name, t in own(model).items() if not name.startswith("fc.")}
    with pytest.raises(DataError, match=r"^fc\.weight \(10, 64\) is missing\nfc\.bias \(10,\) is missing$"):
        fill(model, given)


# What weights tell of the network


@pytest.mark.parametrize("arch", ["resnet18", "resnet20", "resnext50"])
@pytest.mark.parametrize("shape", [(10, 1, "small"), (7, 3, "imagenet")])
def test_classes_channels_and_stem_are_read_off(arch, shape):
    options = dict(zip(("num_classes", "in_channels", "stem"), shape, strict=True))
    with torch.device("meta"):
        state = create_model(arch, **options).state_dict()
        assert create_model(arch).options_in(state) == options


@pytest.mark.parametrize(
    ("arch", "weights", "told"),
    [
        ("resnet20", {}, {}),
        ("resnet20", {"fc.weight": torch.ones(3)}, {}),
        ("resnet20", {"fc.weight": torch.ones(3, 2), "conv1.weight": torch.ones(3)}, {"num_classes": 3}),
        ("resnet20", {"conv1.weight": torch.ones(4, 1, 7, 7)}, {"in_channels": 1, "stem": "imagenet"}),
        ("preresnet18", {"conv1.weight": torch.ones(4, 3, 5, 5)}, {"in_channels": 3, "stem": "small"}),
        ("resnet20", {"layer2.0.downsample.0.weight": torch.ones(1)}, {"shortcut": "projection"}),
        ("resnet18", {"layer2.0.downsample.0.weight": torch.ones(1)}, {}),
        (
            "twopipe",
            {"conv1.weight": torch.ones(4, 1, 3, 3), "fc.weight": torch.ones(5, 4)},
            {"in_channels": 1, "num_classes": 5},
        ),
        ("twopipe", {"conv1.weight": torch.ones(3)}, {}),
    ],
)
def test_options_that_weights_tell(arch, weights, told):
    with torch.device("meta"):
        assert create_model(arch).options_in(weights) == told


# Those of torchvision


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnext50"])
def test_the_logits_of_full_are_those_of_torchvisions_network(tmp_path, arch):
    torch.manual_seed(2)
    theirs = randomise_norms(torchvision.models.get_model(architecture(arch).torchvision, weights=None)).eval()
    given = read_file(saved(tmp_path, theirs.state_dict()))
    told = create_model(arch).options_in(given)
    assert told == {"num_classes": 1000, "in_channels": 3, "stem": "imagenet"}
    ours = create_model(arch, **told).eval()
    assert misfits(given, ours) == []
    assert fill(ours, given)
    x_NCHW = torch.randn(2, 3, 96, 64)
    with torch.inference_mode():
        wanted = theirs(x_NCHW)
        torch.testing.assert_close(ours(x_NCHW), wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
