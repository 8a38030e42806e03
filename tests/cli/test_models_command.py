"""`sdpctl models`: architectures by pattern, and the points of one with their costs."""

import sys

import pytest
import timm
import torch
from command import called, document, light, one_line
from ptflops import get_model_complexity_info

from sdpctl.cli.options import complete_architectures
from sdpctl.models import libraries
from sdpctl.models.libraries import LIBRARIES
from sdpctl.models.registry import ARCHITECTURES


def listed(folder, *arguments):
    """Return the names that a pattern finds."""
    return [row["arch"] for row in document(folder, "models", *arguments)["rows"]]


@pytest.mark.parametrize("text", ["timm", "timm/", "timm/*"])
def test_a_library_is_listed_whole(tmp_path, text):
    names = listed(tmp_path, text)
    assert set(names) >= {"timm/resnet50", "timm/mobilenetv4_conv_small", "timm/nfnet_l0"}
    assert all(name.startswith("timm/") for name in names)
    assert {name.removeprefix("timm/") for name in names} == set(timm.list_models())


def test_patterns_and_parts_of_names(tmp_path):
    found = listed(tmp_path, "timm/*mobilenet*")
    assert {name.removeprefix("timm/") for name in found} == set(timm.list_models("*mobilenet*"))
    assert listed(tmp_path, "resnet50") == ["resnet50"]
    assert listed(tmp_path, "timm/resnet50") == ["timm/resnet50"]
    assert set(listed(tmp_path, "resnext50")) == {"resnext50"}
    assert set(listed(tmp_path, "*resnext50*")) > {"resnext50", "timm/resnext50_32x4d", "torchvision/resnext50_32x4d"}
    assert listed(tmp_path, "squeezenet1") == ["torchvision/squeezenet1_0", "torchvision/squeezenet1_1"]
    assert listed(tmp_path) == list(ARCHITECTURES)


def test_a_list_is_one_name_a_line_and_loads_nothing_heavy(tmp_path):
    (shown, _) = light(tmp_path, ["models", "torchvision/vgg1*"], ["models", "timm", "--json"])
    names = ["vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn"]
    caption = "8 networks; `sdpctl models ARCH --points` shows the points of one"
    assert shown.splitlines() == ["arch", *(f"torchvision/{name}" for name in names), caption]


def test_a_row_of_a_network_of_a_library_says_what_is_known_without_tracing(tmp_path):
    (row,) = document(tmp_path, "models", "timm/test_resnet")["rows"]
    assert row == {"arch": "timm/test_resnet", "family": "timm", "block": None, "stem": None, "points": None}


def test_the_points_of_a_network_of_a_library(tmp_path):
    shown = document(tmp_path, "models", "timm/test_resnet", "--points", "--image-size", 64)
    assert (shown["arch"], shown["image_size"]) == ("timm/test_resnet", 64)
    network = timm.create_model("test_resnet").eval()
    shapes = {}
    for name, module in network.named_modules():
        module.register_forward_hook(lambda *call, name=name: shapes.update({name: list(call[2].shape[1:])}))
    network(torch.zeros(1, 3, 64, 64))
    maps = {row["point"]: row["map"] for row in shown["rows"]}
    assert maps == {point: shapes[point] for point in maps}
    macs, params = get_model_complexity_info(network, (3, 64, 64), as_strings=False, print_per_layer_stat=False, backend="aten")
    assert (shown["macs"], shown["params"]) == (macs, params)
    shares = [row["relative"] for row in shown["rows"]]
    assert shares == sorted(shares)
    assert all(row["relative"] == row["macs"] / macs for row in shown["rows"])
    assert shown["rows"][-1]["macs"] == macs - network.num_features * 1000 - 1000


def test_the_points_of_an_own_architecture_with_the_cost_up_to_each(tmp_path):
    rows = document(tmp_path, "models", "resnet20", "--points")["rows"]
    assert [row["point"] for row in rows] == list(ARCHITECTURES["resnet20"].points())
    assert rows[0] == {"point": "stem", "map": [16, 32, 32], "macs": 442_368, "relative": 442_368 / 40_551_050}
    done = called(tmp_path, "models", "resnet20", "--points")
    assert done.stdout.splitlines()[0] == "resnet20: 10 points, 40.6 M MACs for an image of 32 px"
    assert done.stdout.splitlines()[2].split() == ["stem", "16x32x32", "442,368", "1.1", "%"]


def test_completion_offers_a_library_until_it_is_chosen():
    assert set(complete_architectures("t")) == {"twopipe", "torchvision/", "timm/"}
    assert set(complete_architectures("")) == {*ARCHITECTURES, "torchvision/", "timm/"}
    assert set(complete_architectures("timm/resnet18")) == {f"timm/{name}" for name in timm.list_models("resnet18*")}
    assert set(complete_architectures("ti")) == {f"timm/{name}" for name in timm.list_models()}
    assert list(complete_architectures("timm/no-such")) == []
    assert list(complete_architectures("resnet1")) == ["resnet18", "resnet101", "resnet152", "resnet14", "resnet110"]


@pytest.mark.parametrize("words", [["models", "timm"], ["models", "timm/*", "--json"], ["profile-flops", "timm/resnet50"]])
def test_a_library_that_is_not_installed(tmp_path, monkeypatch, words):
    monkeypatch.setattr(libraries, "find_spec", lambda name: None)
    library = LIBRARIES["timm"]
    for name in ("_sources", "networks", "renamed"):
        monkeypatch.setitem(vars(library), name, getattr(type(library), name).func(library))
    wanted = "timm is not installed, so its networks are not known; `pip install timm` installs it"
    one_line(called(tmp_path, *words), 2, wanted)


def test_a_library_that_cannot_be_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "sdpctl.models.timm_networks", raising=False)
    wanted = "timm cannot be imported (", "install it with `pip install timm`"
    one_line(called(tmp_path, "profile-flops", "timm/test_byobnet"), 2, *wanted)
    (tmp_path / "r.yaml").write_text("name: r\nmodel: {arch: timm/test_byobnet}\ndata: {dataset: digits}\n")
    one_line(called(tmp_path, "run", "r.yaml"), 3, "r.yaml:2:15: model.arch: ", *wanted)


def test_an_image_that_a_network_cannot_take(tmp_path):
    recipe = "name: r\nmodel: {arch: timm/test_convnext}\ndata: {dataset: digits, image_size: 3}\n"
    (tmp_path / "r.yaml").write_text(recipe)
    wanted = "timm/test_convnext cannot take images of 3 px ("  # the reason is torch's, in the words of its version
    line = one_line(called(tmp_path, "run", "r.yaml"), 3, f"r.yaml:3:37: data.image_size: {wanted}")
    assert line.endswith("); it is meant for 160 px")
    one_line(called(tmp_path, "profile-flops", "timm/test_convnext", "--image-size", 3), 2, f"--image-size 3: {wanted}")
