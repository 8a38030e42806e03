"""The names of the libraries' networks, and the architectures that are found by them."""

from importlib.metadata import version

import pytest
import timm
import torchvision

from sdpctl.errors import UsageError
from sdpctl.models import libraries
from sdpctl.models.libraries import LIBRARIES, Library
from sdpctl.models.registry import ARCHITECTURES, TracedArchitecture, architecture, list_models


def test_timms_networks_are_those_that_timm_lists():
    assert list(LIBRARIES["timm"].networks) == sorted(timm.list_models())


def test_torchvisions_networks_are_those_that_classify_images():
    assert list(LIBRARIES["torchvision"].networks) == sorted(torchvision.models.list_models(module=torchvision.models))


@pytest.mark.parametrize("name", ["timm/resnet50", "torchvision/mobilenet_v3_small"])
def test_an_architecture_is_found_by_its_librarys_name(name):
    found = architecture(name)
    library, network = name.split("/")
    assert found == TracedArchitecture(name=name, family=library, network=network)
    assert name in ARCHITECTURES


@pytest.mark.parametrize(
    "name",
    ["timm/resnet49", "timm", "timm/", "torchvision/fasterrcnn_resnet50_fpn", "resnet50/timm", "keras/x"],
)
def test_other_names_are_not_architectures(name):
    assert name not in ARCHITECTURES
    with pytest.raises(UsageError):
        architecture(name)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("timm/resnet18x", f"timm {timm.__version__} has no network 'resnet18x' (did you mean 'resnet18'?); `sdpctl models "),
        (
            "torchvision/mobilenetv3_large",
            f"torchvision {version('torchvision')} has no network 'mobilenetv3_large' (did you mean 'mobilenet_v3_large'?); ",
        ),
        (
            "timm/resnet50.a1_in1k",
            "'timm/resnet50.a1_in1k' names weights; the architecture is timm/resnet50, and `sdpctl import --timm` or "
            "train.init takes weights",
        ),
    ],
)
def test_an_unknown_name_is_answered_with_what_helps(name, says):
    with pytest.raises(UsageError) as caught:
        architecture(name)
    assert str(caught.value).startswith(says)


def test_a_library_that_is_not_installed_has_no_networks(monkeypatch):
    monkeypatch.setattr(libraries, "find_spec", lambda name: None)
    absent = Library(name="timm", registers="@register_model", code="nowhere:Nothing")
    assert not absent.networks
    monkeypatch.setitem(LIBRARIES._entries, "timm", absent)
    assert "timm/resnet50" not in ARCHITECTURES
    with pytest.raises(UsageError) as caught:
        architecture("timm/resnet50")
    says = "timm is not installed, so its networks are not known; `pip install timm` installs it"
    assert str(caught.value) == says


def test_an_iteration_yields_this_packages_architectures_alone():
    assert list(ARCHITECTURES) == list_models()
    assert not any("/" in name for name in ARCHITECTURES)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("resnet1*", ["resnet18", "resnet101", "resnet152", "resnet14", "resnet110"]),
        ("timm/resnet?4", ["timm/resnet34"]),
        ("*/mobilenet_v3_*", ["torchvision/mobilenet_v3_large", "torchvision/mobilenet_v3_small"]),
        ("*googlenet", ["torchvision/googlenet"]),
        ("torchvision/vit*_1[0-9]", ["torchvision/vit_b_16", "torchvision/vit_h_14", "torchvision/vit_l_16"]),
        ("nothing*", []),
    ],
)
def test_a_pattern_matches_whole_names_in_order(pattern, names):
    assert [arch.name for arch in ARCHITECTURES.matching(pattern)] == names


def test_every_network_matches_the_star():
    count = sum(len(library.networks) for library in LIBRARIES.values())
    assert len(ARCHITECTURES.matching("*")) == len(list_models()) + count
