"""A bundle: what it holds, and that no damage to any file goes unnoticed."""

import hashlib
import json
import os
import shutil
import subprocess
from functools import cache

import pytest
import torch
from safetensors.torch import load
from torch import nn

from sdpctl.engine.calibrate import calibrate
from sdpctl.engine.tensors import tensors_to_bytes
from sdpctl.errors import DataError, IntegrityError, NotFoundError
from sdpctl.export.bundle import from_files, is_bundle, only_needed, read_bundle, to_files
from sdpctl.export.description import Description, Input, Option
from sdpctl.instance import FULL, Instance
from sdpctl.models import create_model, empty_model
from sdpctl.models.settings import ModelSettings
from sdpctl.sdpoint import sdpoint_instances

NAMES = ("SHA256SUMS", "bundle.json", "card.md", "model.safetensors", "statistics.safetensors")
CHOSEN = [Instance.parse(text) for text in ("stem@0.5", "layer2.0@0.5+layer3.1@0.75", "layer2.0@0.5", "full")]


def describe(instances):
    figures = {"params": 269_434, "relative": 1 / 3, "top1": 97.5, "top5": None, "loss": 0.1}
    return Description(
        name="net",
        network=ModelSettings(arch="resnet20", num_classes=4, in_channels=1, stem="small"),
        input=Input(size=8, resize=9, mean=(0.1307,), std=(0.3081,)),
        classes=("null", "zwei", "три", "四"),
        options=tuple(
            Option(instance=instance, macs=1000 + macs, heldout_top1=90 + macs / 3, **figures)
            for macs, instance in enumerate(instances)
        ),
        full_macs=2000,
        checkpoint="sha256:" + "1" * 64,
        statistics="sha256:" + "2" * 64,
        test_images=359,
        heldout_images=143,
    )


@cache
def source():
    """Return a network and the statistics of more instances than a bundle of it has."""
    torch.manual_seed(1)
    model = create_model("resnet20", num_classes=4, in_channels=1)
    everything = [*sdpoint_instances(model), *CHOSEN]
    return model, calibrate(model, everything, [(torch.randn(4, 1, 8, 8), None) for _ in range(2)])


@cache
def bundled():
    """Return the files of a bundle."""
    model, statistics = source()
    description = describe(CHOSEN)
    return to_files(
        description, tensors_to_bytes(model.state_dict()), only_needed(statistics, model, description), "# A card\n"
    )


def keys_of(model, instances):
    """Return the batch norms of each instance with what it does before them, found by the batch norms' names alone."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            block = ".".join(name.split(".")[:2])
            before = model.points[: model.points.index(block)] if block in model.points else ()
            found |= {(tuple(choice for choice in instance.choices if choice[0] in before), name) for instance in instances}
    return found


def written(folder, files):
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def summed(files):
    """Return files with the hashes that belong to them."""
    others = {name: content for name, content in files.items() if name != "SHA256SUMS"}
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in others.items()]
    return others | {"SHA256SUMS": "".join(lines).encode()}


def test_what_was_written_is_read_again(tmp_path):
    model, statistics = source()
    for bundle in (from_files(bundled(), "b"), read_bundle(written(tmp_path, bundled()))):
        assert bundle.description == describe(CHOSEN)
        assert bundle.weights.keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(bundle.weights[name], tensor)
        assert bundle.statistics.instances == tuple(CHOSEN)
        assert (bundle.statistics.batches, bundle.statistics.images) == (2, 8)
        assert bundle.statistics.mean.keys() == bundle.statistics.var.keys()
        for key, mean in bundle.statistics.mean.items():
            assert torch.equal(mean, statistics.mean[key])
            assert torch.equal(bundle.statistics.var[key], statistics.var[key])


def test_the_weights_are_the_very_bytes_of_the_checkpoint_and_there_once():
    model, _ = source()
    assert sorted(bundled()) == sorted(NAMES)
    assert bundled()["model.safetensors"] == tensors_to_bytes(model.state_dict())
    assert bundled()["card.md"] == b"# A card\n"


@pytest.mark.parametrize("chosen", [CHOSEN, CHOSEN[:1], CHOSEN[1:3], CHOSEN[::-1], [FULL]])
def test_the_statistics_are_those_of_the_nodes_passed_and_no_others(chosen):
    model, statistics = source()
    needed = only_needed(statistics, model, describe(chosen))
    assert needed.instances == tuple(chosen)
    expected = keys_of(model, chosen)
    assert {(node.choices, name) for node, name in needed.mean} == expected
    content = to_files(describe(chosen), b"weights", needed, "card")["statistics.safetensors"]
    tensors = load(content)
    assert len(tensors) == 2 * len(expected)
    plain = sum(tensor.nbytes for tensor in tensors.values())
    assert plain == sum(8 * model.get_submodule(name).num_features for _, name in expected)
    assert len(content) < plain + 200 * len(tensors)


def test_an_instance_without_statistics():
    model, statistics = source()
    with pytest.raises(NotFoundError, match=r"no BatchNorm statistics of layer1\.1\.bn1 after layer1\.0@0\.25; calibrate"):
        only_needed(statistics, model, describe([FULL, Instance.parse("layer1.0@0.25")]))


def test_bytes_depend_on_content_alone():
    model, statistics = source()
    description = describe(CHOSEN)
    again = to_files(
        description, tensors_to_bytes(model.state_dict()), only_needed(statistics, model, description), "# A card\n"
    )
    assert again == bundled()


def test_sha256sum_agrees(tmp_path):
    if shutil.which("sha256sum") is None:
        pytest.skip("there is no sha256sum here")
    written(tmp_path, bundled())
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == sorted(f"{name}: OK" for name in NAMES if name != "SHA256SUMS")
    (tmp_path / "card.md").write_text("another")
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", [0, 0.1, 0.37, 0.5, 0.83, 1])
@pytest.mark.parametrize("bit", [0, 5, 7])
def test_one_flipped_bit_is_noticed(name, where, bit, tmp_path):
    content = bytearray(bundled()[name])
    content[int(where * (len(content) - 1))] ^= 1 << bit
    written(tmp_path, bundled() | {name: bytes(content)})
    with pytest.raises(IntegrityError, match="copy or export it again"):
        read_bundle(tmp_path)


def test_any_flipped_bit_of_the_hashes_is_noticed(monkeypatch):
    monkeypatch.setattr(
        "sdpctl.export.bundle.empty_model", cache(empty_model)
    )  # it takes most of the time, and is the same each time
    description = describe([FULL])
    weights = tensors_to_bytes({"fc.bias": torch.zeros(4)})
    files = to_files(description, weights, only_needed(*source()[::-1], description), "card")
    unnoticed = []
    for place in range(len(files["SHA256SUMS"])):
        for bit in range(8):
            content = bytearray(files["SHA256SUMS"])
            content[place] ^= 1 << bit
            try:
                from_files(files | {"SHA256SUMS": bytes(content)}, "b")
                unnoticed.append((place, chr(files["SHA256SUMS"][place]), chr(content[place])))
            except IntegrityError:
                pass
    assert unnoticed == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("left", [0, 1, 0.5, -1])
def test_a_truncated_file_is_noticed(name, left, tmp_path):
    content = bundled()[name]
    written(tmp_path, bundled() | {name: content[: int(left * len(content)) if left == 0.5 else left]})
    with pytest.raises(IntegrityError, match="copy or export it again"):
        read_bundle(tmp_path)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "SHA256SUMS"])
def test_a_longer_file_is_noticed(name):
    with pytest.raises(IntegrityError, match="copy or export it again"):
        from_files(bundled() | {name: bundled()[name] + b"\n"}, "b")


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(name, tmp_path):
    written(tmp_path, bundled())
    (tmp_path / name).unlink()
    assert is_bundle(tmp_path)
    with pytest.raises(IntegrityError, match=rf"^{tmp_path}: this bundle lacks {name}; copy or export it again$"):
        read_bundle(tmp_path)
    with pytest.raises(IntegrityError, match=f"b: this bundle lacks {name}"):
        from_files({other: content for other, content in bundled().items() if other != name}, "b")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "SHA256SUMS"])
def test_a_hash_that_is_missing_is_noticed(name):
    lines = [line for line in bundled()["SHA256SUMS"].decode().splitlines(keepends=True) if name not in line]
    with pytest.raises(IntegrityError, match=name):
        from_files(bundled() | {"SHA256SUMS": "".join(lines).encode()}, "b")


@pytest.mark.parametrize("name", ["model.safetensors", "statistics.safetensors"])
def test_two_files_that_changed_places_are_noticed(name):
    with pytest.raises(IntegrityError, match=f"the content of {name} does not match SHA256SUMS"):
        from_files(bundled() | {name: bundled()["card.md"]}, "b")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_cannot_be_read(name, tmp_path):
    written(tmp_path, bundled())
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(name)
    with pytest.raises(DataError, match=rf"{name}: this file cannot be read \(.+\); fix its permissions"):
        read_bundle(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "sdpctl.export/2"},
        {"schema": None},
        {"licence": "new"},
        {"options": [{"instance": "full", "macs": 1}]},
        {"options": [{"instance": "layer@@2"}]},
        {"options": None},
        {"input": {"size": 8}},
        {"input": None},
        {"network": {"arch": "resnet20", "width": 2}},
        {"classes": None},
        {"statistics_nodes": None},
    ],
)
def test_a_description_of_a_newer_version_is_refused(change):
    document = json.dumps(json.loads(bundled()["bundle.json"]) | change).encode()
    with pytest.raises(IntegrityError, match=r"b: bundle\.json cannot be understood \(.+\); was it made by a newer sdpctl"):
        from_files(summed(bundled() | {"bundle.json": document}), "b")


@pytest.mark.parametrize("gone", ["schema", "options", "classes", "statistics_nodes", "full_macs"])
def test_a_description_that_lacks_something_is_refused(gone):
    document = json.loads(bundled()["bundle.json"])
    del document[gone]
    with pytest.raises(IntegrityError, match=r"bundle\.json cannot be understood"):
        from_files(summed(bundled() | {"bundle.json": json.dumps(document).encode()}), "b")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b'"text"', b"null", b"\xff\xfe"])
def test_a_description_that_is_none_is_refused(content):
    with pytest.raises(IntegrityError, match=r"bundle\.json cannot be understood"):
        from_files(summed(bundled() | {"bundle.json": content}), "b")


def test_the_description_is_read_as_it_was_written():
    description = describe(CHOSEN)
    assert Description.parse(json.loads(json.dumps(description.document()))) == description
    document = description.document()
    before = json.dumps(document)
    Description.parse(document)
    assert json.loads(json.dumps(document)).keys() == json.loads(before).keys()


def test_another_folder_is_no_bundle(tmp_path):
    assert not is_bundle(tmp_path)
    (tmp_path / "card.md").write_text("card")
    assert not is_bundle(tmp_path)
    assert not is_bundle(tmp_path / "nowhere")
    with pytest.raises(IntegrityError, match="this bundle lacks"):
        read_bundle(tmp_path)


# What is not believed


def changed(path, value):
    """Return a bundle whose description has one value changed."""
    document = json.loads(bundled()["bundle.json"])
    part = document
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return summed(bundled() | {"bundle.json": json.dumps(document).encode()})


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (
            ("network", "num_classes"),
            10**8,
            "network.num_classes: expected a whole number from 1 to 16,777,216, found 1000",
        ),
        (("network", "num_classes"), -1, "network.num_classes: expected"),
        (("network", "num_classes"), "x", "network.num_classes: expected"),
        (("network", "num_classes"), 5, "classes: 4 names, but network.num_classes is 5"),
        (("network", "arch"), 7, "network.arch: expected the name of an architecture, found 7"),
        (("network", "in_channels"), 3, "input.mean: 1 numbers, but network.in_channels is 3"),
        (
            ("network", "stem"),
            "imagenet",
            "input.size: 8 px is too small for resnet20 with the imagenet stem",
        ),
        (("network", "widths"), [10**9] * 5, "network.widths[0]: expected a whole number"),
        (("input", "size"), 0, "input.size: expected a whole number from 1 to 8,192, found 0"),
        (
            ("input", "size"),
            2,
            "input.size: 2 px is too small for resnet20 with the small stem",
        ),
        (("input", "resize"), 7, "input.resize: 7 is smaller than input.size, 8"),
        (("input", "std"), ["a"], "input.std[0]: expected a number"),
        (("input", "std"), [0], "input.std[0]: expected a number"),
        (("input", "std"), [0.1, 0.1], "input.std: 2 numbers, but network.in_channels is 1"),
        (("input", "mean"), [float("nan")], "NaN is not a finite number"),
        (("name",), "../x", "name: expected a name"),
        (("classes",), "abcd", "classes: expected a list"),
        (("classes",), [1, 2, 3, 4], "classes[0]: expected text"),
        (("options",), [], "options: expected a list of 1 to 65,536 items"),
        (("options", 1, "instance"), "stem@0.5", "options[1].instance: stem@0.5 occurs twice"),
        (("options", 0, "instance"), "stem@0.50", "options[0].instance: this instance is written stem@0.5"),
        (("options", 0, "instance"), "layer9.9@0.5", "options[0].instance: layer9.9@0.5: the network has no point"),
        (("options", 0, "macs"), -5, "options[0].macs: expected a whole number"),
        (("options", 1, "macs"), 1, "options[1].macs: the cheapest instance comes first"),
        (("options", 2, "top1"), 101, "options[2].top1: expected a number from 0 to 100"),
        (("options", 2, "heldout_top1"), None, "options[2].heldout_top1: expected if and only if heldout_images is above 0"),
        (("options", 2, "top5"), 99.0, "options[2].top5: either all instances have a top5 or none"),
        (("full_macs",), 0, "full_macs: expected a whole number"),
        (("statistics_nodes", "batches"), -1, "statistics_nodes.batches: expected a whole number"),
        (("statistics_nodes", "nodes"), {"full": ["bn1", 7]}, "statistics_nodes.nodes.full[1]: expected text"),
        (("statistics_nodes", "nodes"), {"stem": ["bn1"]}, "a key of statistics_nodes.nodes: 'stem' is not an instance"),
    ],
)
def test_a_value_that_cannot_be_is_named(path, value, said, monkeypatch):
    monkeypatch.setattr("sdpctl.export.bundle.empty_model", None)  # the network is not built
    with pytest.raises(IntegrityError) as refused:
        from_files(changed(path, value), "b")
    assert str(refused.value).startswith(f"b: bundle.json cannot be understood ({said}")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("instances",), ["full"], "options[0]: there are no statistics of stem@0.5"),
        (("nodes", "full"), ["bn9"], "bundle.json: statistics_nodes: nodes.full: the network has no batch norm 'bn9'"),
        (("nodes", "full"), ["bn1"], "bundle.json: statistics_nodes: nodes.full: the statistics of layer1.0.bn1 are missing"),
        (
            ("nodes", "layer9.9@0.5"),
            ["bn1"],
            "bundle.json: statistics_nodes: layer9.9@0.5: the network has no point 'layer9.9'",
        ),
    ],
)
def test_statistics_that_are_not_the_networks_are_named(path, value, said):
    with pytest.raises(IntegrityError) as refused:
        from_files(changed(("statistics_nodes", *path), value), "b")
    assert str(refused.value).startswith(f"b: {said}")


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"schema": ' + b"[" * 70 + b"]" * 70 + b"}", b"9" * 5000, b"{}"])
def test_a_document_that_is_deep_or_has_endless_digits_is_refused(content):
    with pytest.raises(IntegrityError, match=r"^b: bundle\.json cannot be understood \("):
        from_files(summed(bundled() | {"bundle.json": content}), "b")


def with_header(name, change, data=None):
    """Return a bundle with a changed safetensors header."""
    content = bundled()[name]
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    written = json.dumps(header).encode()
    return summed(bundled() | {name: len(written).to_bytes(8, "little") + written + (data or content[8 + length :])})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shape": [10**9, 64]}, r"fc\.weight is F32 \[1000000000, 64\], expected F32 \[4, 64\]"),
        ({"shape": [64, 4]}, r"fc\.weight is F32 \[64, 4\], expected F32 \[4, 64\]"),
        ({"dtype": "F64"}, r"fc\.weight is F64"),
        ({"dtype": "F8_E8M0"}, r"fc\.weight is F8_E8M0"),
        ({"shape": "x"}, r"fc\.weight is F32 'x'"),
        ({"data_offsets": [0, 1024]}, "invalid offset"),
        ({"data_offsets": [0, 2**62]}, "invalid|offset"),
    ],
)
def test_a_header_that_does_not_fit_the_network_is_refused(change, said):
    with pytest.raises(IntegrityError, match=rf"^b: model\.safetensors: .*({said})"):
        from_files(with_header("model.safetensors", lambda header: header["fc.weight"].update(change)), "b")


def test_tensors_that_are_missing_or_do_not_belong_are_named():
    for change, said in (
        (lambda header: header.pop("fc.bias"), r"the tensor fc\.bias is missing"),
        (lambda header: header.update({"more": header["fc.bias"]}), "the tensor 'more' does not belong here"),
        (lambda header: header.update({"fc.bias": None}), r"fc\.bias is None None, expected F32 \[4\]"),
    ):
        with pytest.raises(IntegrityError, match=rf"^b: model\.safetensors: {said}"):
            from_files(with_header("model.safetensors", change), "b")


@pytest.mark.parametrize("name", ["model.safetensors", "statistics.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\xff" * 100, (9).to_bytes(8, "little") + b"[" * 9, (2**63).to_bytes(8, "little")])
def test_what_is_not_safetensors_is_refused(name, content):
    with pytest.raises(IntegrityError, match=rf"^b: {name}: "):
        from_files(summed(bundled() | {name: content}), "b")


@pytest.mark.parametrize(
    ("name", "side", "value", "said"),
    [
        ("model.safetensors", "fc.bias", float("nan"), r"fc\.bias holds values that are not finite"),
        ("statistics.safetensors", "full/bn1.running_mean", float("inf"), "holds values that are not finite"),
        ("statistics.safetensors", "full/bn1.running_var", -1.0, r"full/bn1\.running_var holds a negative variance"),
    ],
)
def test_values_that_cannot_be_are_named(name, side, value, said):
    tensors = load(bundled()[name])
    tensors[side][0] = value
    with pytest.raises(IntegrityError, match=rf"^b: {name}: .*{said}$"):
        from_files(summed(bundled() | {name: tensors_to_bytes(tensors)}), "b")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["a FIFO", "a device", "a folder", "40 GiB"])
def test_only_regular_files_of_a_fitting_size_are_read(name, kind, tmp_path):
    written(tmp_path, bundled())
    (tmp_path / name).unlink()
    if kind == "a FIFO":
        os.mkfifo(tmp_path / name)
    elif kind == "a device":
        (tmp_path / name).symlink_to("/dev/zero")
    elif kind == "a folder":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 40 * 2**30)
    said = "and at most" if kind == "40 GiB" else f"not a regular file but {kind}"
    with pytest.raises(IntegrityError, match=rf"^{tmp_path / name}: .*{said}"):
        read_bundle(tmp_path)
