"""Written networks, run by onnxruntime and by torch, against the chain with statistics that PyTorch itself gathered."""

import copy
import getpass
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import randomise_norms
from torch import nn

from sdpctl.data.loader import Normalise
from sdpctl.engine.calibrate import calibrate
from sdpctl.errors import InstanceError, NotFoundError
from sdpctl.export.description import Description, Input, Option
from sdpctl.export.network import OneInstance, metadata
from sdpctl.export.onnx import static_max_pool, to_onnx
from sdpctl.export.torch_export import to_program
from sdpctl.instance import FULL, Instance
from sdpctl.models import create_model
from sdpctl.models.settings import ModelSettings

CASES = {
    "resnet20": ({"in_channels": 1, "stem": "small"}, 9, "full"),
    "resnet20 raw": ({"in_channels": 3, "stem": "small"}, 13, "stem@0.75+layer2.0@0.5+layer3.1@0.4"),
    "resnet18": ({"in_channels": 3, "stem": "imagenet"}, 64, "maxpool@0.75+layer2.0@0.75"),
    "preresnet18": ({"in_channels": 3, "stem": "small"}, 12, "layer1.1@0.75"),
    "resnext50": ({"in_channels": 3, "stem": "imagenet"}, 64, "maxpool@0.5"),
}
WRITERS = {"onnx": to_onnx, "torch-export": to_program}
FORMS = tuple(WRITERS)


def network(arch, **options):
    torch.manual_seed(1)
    model = randomise_norms(create_model(arch, num_classes=7, **options), bias=0.3, mean=1, var=(0.2, 3))
    model.fc.weight.data.normal_(0, 0.2)
    return model


def images(count, channels, size, seed=0):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed)) + 0.2


def calibration(channels, size):
    return [(images(6, channels, size, seed), None) for seed in (5, 6)]


def alone(model, instance, data):
    """Let PyTorch gather one instance's statistics."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        for x_NCHW, _ in data:
            model(x_NCHW, instance)
    return model.eval()


def describe(arch, instance, channels, stem, size, raw=False):
    option = Option(
        instance=instance, macs=123_456, params=4_567, relative=0.5, top1=91.25, top5=99.5, loss=0.25, heldout_top1=90.5
    )
    return Description(
        name="net",
        network=ModelSettings(arch=arch, num_classes=7, in_channels=channels, stem=stem),
        input=Input(size=size, resize=size + 1, mean=(0.4, 0.5, 0.6)[:channels], std=(0.2, 0.3, 0.25)[:channels], raw=raw),
        classes=("a", "b", "c", "ä", "日本", "f", "g"),
        options=(option,),
        full_macs=246_912,
        checkpoint="sha256:" + "1" * 64,
        statistics="sha256:" + "2" * 64,
        test_images=80,
        heldout_images=40,
    )


@cache
def made(case):
    """Return the chain calibrated by PyTorch, its instance, the description and both files."""
    options, size, text = CASES[case]
    arch, channels = case.split()[0], options["in_channels"]
    model, instance = network(arch, **options), Instance.parse(text)
    data = calibration(channels, size)
    description = describe(arch, instance, channels, options["stem"], size, raw=case.endswith("raw"))
    takes = description.input
    normalise = Normalise(takes.mean, takes.std, torch.device("cpu")) if takes.raw else None
    one = OneInstance(model, instance, calibrate(model, [FULL, instance], data), normalise)
    return alone(model, instance, data), instance, description, {form: WRITERS[form](one, description) for form in FORMS}


def run(form, content, x_NCHW):
    if form == "onnx":
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(["logits"], {"images": x_NCHW.numpy()})[0])
    with torch.no_grad():
        return torch.export.load(io.BytesIO(content)).module()(x_NCHW)


def properties(form, content):
    """Return the metadata of a file."""
    if form == "onnx":
        texts = {entry.key: entry.value for entry in onnx.load_from_string(content).metadata_props}
        plain = {"schema", "name", "checkpoint", "statistics", "instance"}
        return {key: text if key in plain else json.loads(text) for key, text in texts.items()}
    extra = {"export.json": ""}
    torch.export.load(io.BytesIO(content), extra_files=extra)
    return json.loads(extra["export.json"])


def equal(got, wanted, tolerance):
    assert got.shape == wanted.shape
    assert got.dtype == torch.float32
    assert (got - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_instance_calibrated_alone_at_any_batch_size(case, form):
    chain, instance, description, files = made(case)
    takes, channels = description.input, description.network.in_channels
    for count in (1, 3, 7):
        pixels = torch.randint(256, (count, channels, takes.size, takes.size), dtype=torch.uint8)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (takes.mean, takes.std))
        normalised = (pixels / 255 - mean) / std
        with torch.no_grad():
            wanted = chain(normalised, instance)
        assert count == 1 or wanted.std(0).max() > 0.05
        equal(run(form, files[form], pixels if takes.raw else normalised), wanted, 1e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_onnx_graph_is_sound_and_has_no_batch_norm_behind_a_convolution(case):
    chain, _, _, files = made(case)
    model = onnx.load_from_string(files["onnx"])
    onnx.checker.check_model(model, full_check=True)
    makers = {out: node.op_type for node in model.graph.node for out in node.output}
    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    assert all(makers[node.input[0]] != "Conv" for node in norms)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["Conv"] == sum(isinstance(module, nn.Conv2d) for module in chain.modules())
    # Of a preresnet's norms only the first of a block, and that of the head, follow a sum.
    left = 8 + 1 if case == "preresnet18" else 0
    assert len(norms) == left


@pytest.mark.parametrize(
    ("case", "dtype", "shape"),
    [("resnet20", onnx.TensorProto.FLOAT, [1, 9, 9]), ("resnet20 raw", onnx.TensorProto.UINT8, [3, 13, 13])],
)
def test_names_types_and_shapes_of_the_onnx_file(case, dtype, shape):
    graph = onnx.load_from_string(made(case)[3]["onnx"]).graph
    (given,), (taken,) = graph.input, graph.output
    assert (given.name, taken.name) == ("images", "logits")
    assert (given.type.tensor_type.elem_type, taken.type.tensor_type.elem_type) == (dtype, onnx.TensorProto.FLOAT)
    sizes = [[dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in (given, taken)]
    assert sizes == [["batch", *shape], ["batch", 7]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["resnet20", "resnet20 raw"])
def test_the_metadata_is_complete(case, form):
    _, _, description, files = made(case)
    raw = case == "resnet20 raw"
    assert properties(form, files[form]) == {
        "schema": "sdpctl.export/1",
        "name": "net",
        "network": {"arch": "resnet20", "num_classes": 7, "in_channels": 3 if raw else 1, "stem": "small"},
        "input": {
            "size": 13 if raw else 9,
            "resize": 14 if raw else 10,
            "mean": [0.4, 0.5, 0.6] if raw else [0.4],
            "std": [0.2, 0.3, 0.25] if raw else [0.2],
            "raw": raw,
        },
        "classes": ["a", "b", "c", "ä", "日本", "f", "g"],
        "full_macs": 246_912,
        "checkpoint": "sha256:" + "1" * 64,
        "statistics": "sha256:" + "2" * 64,
        "test_images": 80,
        "heldout_images": 40,
        "instance": "stem@0.75+layer2.0@0.5+layer3.1@0.4" if raw else "full",
        "macs": 123_456,
        "params": 4_567,
        "relative": 0.5,
        "top1": 91.25,
        "top5": 99.5,
        "loss": 0.25,
        "heldout_top1": 90.5,
    }
    assert properties(form, files[form]) == json.loads(json.dumps(metadata(description)))


def test_figures_that_are_not_known_are_null():
    description = describe("resnet20", FULL, 1, "small", 8)
    option = Option(instance=FULL, macs=1, params=2, relative=1.0, top1=3.0, top5=None, loss=4.0)
    said = metadata(Description(**{**vars(description), "options": (option,)}))
    assert said["top5"] is None
    assert said["heldout_top1"] is None
    assert "options" not in said


@pytest.mark.parametrize("form", FORMS)
def test_nothing_tells_where_a_file_was_made(form, repository):
    """All weights are equal, so that no text comes about by chance."""
    model = create_model("resnet20", num_classes=7, in_channels=1)
    for tensor in model.state_dict().values():
        tensor.fill_(1)
    statistics = calibrate(model, [FULL], calibration(1, 8))
    statistics.mean, statistics.var = ({key: torch.ones_like(t) for key, t in statistics.mean.items()} for _ in range(2))
    content = WRITERS[form](OneInstance(model, FULL, statistics), describe("resnet20", FULL, 1, "small", 8))
    texts = [content]
    if form == "torch-export":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            texts += [name.encode() for name in archive.namelist()] + [archive.read(name) for name in archive.namelist()]
    places = {str(repository), str(Path.home()), str(Path.cwd()), sys.prefix, str(Path(torch.__file__).parent), "site-packages"}
    words = {".py", "/tmp", "/home", "/usr", "File ", *(place for place in places if place != "/")}
    words |= {os.uname().nodename} | ({getpass.getuser()} - {"root", "user", "data"})  # words that networks have too
    assert [word for word, text in product(sorted(words), texts) if word.encode() in text] == []


def digests():
    """Return the hashes of the files of one network."""
    return {form: hashlib.sha256(content).hexdigest() for form, content in made("resnet20")[3].items()}


def test_bytes_are_the_same_in_another_process_wherever_the_package_lies(tmp_path, repository):
    away = tmp_path / "elsewhere" / "deep"
    shutil.copytree(repository / "sdpctl", away / "sdpctl", ignore=shutil.ignore_patterns("__pycache__"))
    places = [str(away), *map(str, Path(__file__).parents[:2])]
    code = f"import torch; torch.set_num_threads(1); import sys; sys.path[:0] = {places}; import json, test_network, sdpctl; "
    code += f"assert sdpctl.__file__.startswith({str(away)!r}); print(json.dumps(test_network.digests()))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "HOME": str(tmp_path)}
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert other.returncode == 0, other.stderr
    assert json.loads(other.stdout) == digests()


def test_writing_again_gives_the_same_bytes_whatever_the_layout_and_mode_and_leaves_everything_as_it_was():
    description, files = made("resnet20")[2:]
    model = network("resnet20", in_channels=1, stem="small").to(memory_format=torch.channels_last)
    statistics = calibrate(model, [Instance.parse("stem@0.5"), FULL], calibration(1, 9))
    reference = calibrate(network("resnet20", in_channels=1, stem="small"), [FULL], calibration(1, 9))
    for side, wanted in ((statistics.mean, reference.mean), (statistics.var, reference.var)):
        side |= wanted  # convolutions of another layout round elsewhere
    model.train()
    model.layer2.eval()
    modes = [module.training for module in model.modules()]
    tensors = [*model.state_dict().values(), *statistics.mean.values(), *statistics.var.values()]
    before = [(tensor.clone(), tensor.data_ptr(), tensor.stride()) for tensor in tensors]
    random = torch.get_rng_state(), np.random.get_state()[1].tolist(), torch.get_default_dtype()
    one = OneInstance(model, FULL, statistics)
    assert {form: WRITERS[form](one, description) for form in FORMS} == files
    assert torch.equal(torch.get_rng_state(), random[0])
    assert (np.random.get_state()[1].tolist(), torch.get_default_dtype()) == random[1:]
    for tensor in one.state_dict().values():
        tensor.fill_(0)
    assert [module.training for module in model.modules()] == modes
    after = [*model.state_dict().values(), *statistics.mean.values(), *statistics.var.values()]
    for tensor, (was, place, strides) in zip(after, before, strict=True):
        assert torch.equal(tensor, was)
        assert (tensor.data_ptr(), tensor.stride()) == (place, strides)


def test_results_of_one_number_are_no_batch():
    model, x_NCHW = create_model("timm/convnext_atto", num_classes=7), images(3, 3, 64)
    one = OneInstance(model, FULL, calibrate(model, [FULL], []))
    content = to_onnx(one, describe("timm/convnext_atto", FULL, 3, "imagenet", 64))
    infos = [value.type.tensor_type.shape.dim for value in onnx.load_from_string(content).graph.value_info]
    assert any(len(shape) == 0 for shape in infos)
    with torch.no_grad():
        equal(run("onnx", content, x_NCHW), one(x_NCHW), 1e-4)


def test_an_instance_without_statistics():
    model = network("resnet20", in_channels=1)
    statistics = calibrate(model, [FULL], calibration(1, 8))
    with pytest.raises(NotFoundError, match=r"no BatchNorm statistics of layer2\.1\.bn1 after layer2\.0@0\.5; calibrate"):
        OneInstance(model, Instance.parse("layer2.0@0.5"), statistics)
    with pytest.raises(InstanceError, match="no point 'maxpool'"):
        OneInstance(model, Instance.parse("maxpool@0.5"), statistics)


def test_the_adaptive_pool_is_torchs_at_every_size_up_to_twenty():
    maps = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    for length in range(1, 21):
        for out in range(1, length + 1):
            x_NCHW = maps[:, :, :length, :5]
            for size in ([out, 3], [out, 5], [out, 1]):
                assert torch.equal(static_max_pool(x_NCHW, size)[0], F.adaptive_max_pool2d(x_NCHW, size))
                assert torch.equal(
                    static_max_pool(x_NCHW.mT, size[::-1])[0], F.adaptive_max_pool2d(x_NCHW.mT.contiguous(), size[::-1])
                )


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 130), width=st.integers(1, 130), data=st.data())
def test_the_adaptive_pool_is_torchs_at_large_sizes(height, width, data):
    size = [data.draw(st.integers(1, 2 * height)), data.draw(st.integers(1, width))]
    x_NCHW = torch.randn(1, 2, height, width, generator=torch.Generator().manual_seed(height * 131 + width)) - 5
    pooled, places = static_max_pool(x_NCHW, size)
    assert torch.equal(pooled, F.adaptive_max_pool2d(x_NCHW, size))
    assert (places.shape, places.dtype) == (pooled.shape, torch.int64)
