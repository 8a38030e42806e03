"""Weights from elsewhere: what is read, what is refused without being run, what fits."""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from sdpctl.engine.weights import TORCHVISION, fill, misfits, read_weights, shape_of, torchvision_weights
from sdpctl.errors import DataError, UsageError
from sdpctl.models import create_model

SMALL = {"num_classes": 10, "in_channels": 1, "stem": "small"}


def weights(seed=3):
    torch.manual_seed(seed)
    return {"conv1.weight": torch.randn(4, 1, 3, 3), "bn1.num_batches_tracked": torch.tensor(7), "fc.bias": torch.randn(5)}


def saved(folder, content, name="w.pth", **options):
    torch.save(content, folder / name, **options)
    return folder / name


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


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


def test_a_prefix_that_only_some_have_is_part_of_their_names(tmp_path):
    some = weights() | {"module.fc.weight": torch.ones(5, 4)}
    assert_same(read_weights(saved(tmp_path, some)), some)


def test_only_one_prefix_is_taken_off(tmp_path):
    assert list(read_weights(saved(tmp_path, {"module.module.a": torch.ones(1)}))) == ["module.a"]
    assert list(read_weights(saved(tmp_path, {"module.a.module.b": torch.ones(1)}))) == ["a.module.b"]


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_every_float_becomes_float32_and_counters_stay(tmp_path, kind, name):
    given = {key: t.to(kind) if t.is_floating_point() else t for key, t in weights().items()}
    if name == "w.pth":
        saved(tmp_path, given)
    else:
        save_file(given, tmp_path / name)
    found = read_weights(tmp_path / name)
    assert_same(found, {key: t.float() if t.is_floating_point() else t for key, t in given.items()})
    assert found["bn1.num_batches_tracked"].dtype == torch.long


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
        read_weights(path)
    assert "this file is not plain tensors and was not run" in one_line(caught.value, path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(bomb))
    assert mark.exists()  # it would have


def test_what_a_pickle_wanted_is_named(tmp_path):
    path = saved(tmp_path, {"state_dict": weights(), "args": Touches(tmp_path / "mark")})
    with pytest.raises(DataError, match=r"was not run \(it holds [\w.]+\)") as caught:
        read_weights(path)
    assert "torch.save(model.state_dict(), FILE)" in str(caught.value)


def test_a_whole_module_is_refused(tmp_path):
    path = saved(tmp_path, nn.Linear(2, 2))
    with pytest.raises(DataError, match=r"not plain tensors and was not run \(it holds torch\.nn\.modules\.linear\.Linear\)"):
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
    with pytest.raises(DataError, match=r"holds no state dict, .* nor does a key state_dict, model, model_state_dict in it"):
        read_weights(path)


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
    classes, channels, stem = shape
    with torch.device("meta"):
        state = create_model(arch, num_classes=classes, in_channels=channels, stem=stem).state_dict()
    assert shape_of(state) == shape


def test_what_weights_do_not_tell():
    assert shape_of({}) == (None, None, None)
    assert shape_of({"fc.weight": torch.ones(3)}) == (None, None, None)
    assert shape_of({"fc.weight": torch.ones(3, 2), "conv1.weight": torch.ones(3)}) == (3, None, None)
    assert shape_of({"conv1.weight": torch.ones(4, 1, 7, 7)}) == (None, 1, "imagenet")
    assert shape_of({"conv1.weight": torch.ones(4, 3, 5, 5)}) == (None, 3, "small")


# Those of torchvision


def randomise(network):
    torch.manual_seed(2)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnext50"])
def test_the_logits_of_full_are_those_of_torchvisions_network(tmp_path, arch):
    theirs = randomise(torchvision.models.get_model(TORCHVISION[arch], weights=None))
    given = read_weights(saved(tmp_path, theirs.state_dict()))
    classes, channels, stem = shape_of(given)
    assert (classes, channels, stem) == (1000, 3, "imagenet")
    ours = create_model(arch, num_classes=classes, in_channels=channels, stem=stem).eval()
    assert misfits(given, ours) == []
    assert fill(ours, given)
    x_NCHW = torch.randn(2, 3, 96, 64)
    with torch.inference_mode():
        wanted = theirs(x_NCHW)
        torch.testing.assert_close(ours(x_NCHW), wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Torch's hub folder, empty, and no network."""

    def refuse(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    yield tmp_path / "hub" / "checkpoints"
    torch.hub.set_dir(before)


def test_what_the_hub_folder_has_is_not_fetched(hub):
    state = randomise(torchvision.models.resnet18(weights=None)).state_dict()
    hub.mkdir(parents=True)
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    torch.save(state, hub / url.rpartition("/")[2])
    found, source = torchvision_weights("resnet18", "IMAGENET1K_V1")
    assert source == url
    assert_same(found, state)


def test_the_name_says_which_weights(hub):
    hub.mkdir(parents=True)
    known = torchvision.models.ResNeXt50_32X4D_Weights
    for mark, entry in enumerate(known):
        torch.save({"mark": torch.tensor(float(mark))}, hub / entry.url.rpartition("/")[2])
    for mark, entry in enumerate(known):
        found, source = torchvision_weights("resnext50", entry.name)
        assert (found["mark"].item(), source) == (mark, entry.url)


def test_without_a_network_it_is_one_line_that_names_the_address(hub):
    with pytest.raises(
        DataError, match=r"could not be fetched .*Name or service not known.*; fetch the file and import that"
    ) as caught:
        torchvision_weights("resnet18", "IMAGENET1K_V1")
    one_line(caught.value, torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url)
    assert not list(hub.glob("*"))


def test_names_that_torchvision_does_not_know(hub):
    with pytest.raises(UsageError, match=r"--torchvision V9: torchvision has IMAGENET1K_V1, IMAGENET1K_V2 of resnet50; choose"):
        torchvision_weights("resnet50", "V9")
    for arch in ("resnet20", "preresnet18", "resnet51"):
        with pytest.raises(
            UsageError, match=rf"--torchvision: torchvision has no weights of {arch}; it has those of resnet18, "
        ):
            torchvision_weights(arch, "IMAGENET1K_V1")
    assert not hub.exists()


def test_every_architecture_that_is_said_to_have_weights_has_them():
    for theirs in TORCHVISION.values():
        assert "IMAGENET1K_V1" in {weights.name for weights in torchvision.models.get_model_weights(theirs)}


@pytest.mark.parametrize("content", [b"", b"an error page\n", b"PK\x03\x04"])
def test_a_damaged_copy_in_the_hub_folder_is_one_line(hub, content):
    hub.mkdir(parents=True)
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    (hub / url.rpartition("/")[2]).write_bytes(content)
    with pytest.raises(DataError) as caught:
        torchvision_weights("resnet18", "IMAGENET1K_V1")
    assert "\n" not in str(caught.value)


def test_a_copy_in_the_hub_folder_is_not_run_either(hub, tmp_path):
    hub.mkdir(parents=True)
    mark, url = tmp_path / "mark", torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    torch.save({"a": Touches(mark)}, hub / url.rpartition("/")[2])
    with pytest.raises(DataError):
        torchvision_weights("resnet18", "IMAGENET1K_V1")
    assert not mark.exists()
