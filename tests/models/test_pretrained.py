"""Weights that libraries offer: what they are called, where they come from, and the images that suit them."""

import numpy as np
import pytest
import timm
import torch
import torchvision
from networks import randomise_norms
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torchvision.transforms.v2 import functional as VF

from sdpctl.data import pixels
from sdpctl.data.loader import Normalise
from sdpctl.errors import DataError, ModelError, UsageError
from sdpctl.models.pretrained import pretrained

NAMES = ("resnet50.a1_in1k", "resnet18d.ra4_e3600_r224_in1k", "convnext_atto.d2_in1k", "mobilenetv3_small_100.lamb_in1k")


@pytest.fixture(scope="module")
def photograph():
    """An image whose sides are far from every size of a network."""
    pixels = np.random.default_rng(3).integers(0, 256, (17, 23, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((713, 519), Image.Resampling.BICUBIC)


def prepared(image, wanted):
    """Prepare a test image as an evaluation does."""
    for transform in pixels.Middle(wanted.resize, wanted.test_size, wanted.interpolation).transforms():
        image = transform(image)
    return Normalise(wanted.mean, wanted.std, torch.device("cpu"))(VF.pil_to_tensor(image)[None])[0]


@pytest.mark.parametrize("name", NAMES)
def test_images_are_prepared_as_timm_prepares_them(photograph, name):
    found = pretrained("timm", name).preprocessing
    config = timm.get_pretrained_cfg(name).to_dict()
    theirs = create_transform(**resolve_data_config(pretrained_cfg=config, use_test_size=True), is_training=False)
    torch.testing.assert_close(prepared(photograph, found), theirs(photograph), rtol=0, atol=1e-5)
    assert found.image_size == config["input_size"][1]


@pytest.mark.parametrize(
    "name",
    ["resnet50.IMAGENET1K_V1", "resnet50.IMAGENET1K_V2", "efficientnet_b1.IMAGENET1K_V2", "mobilenet_v3_large.IMAGENET1K_V1"],
)
def test_images_are_prepared_as_torchvision_prepares_them(photograph, name):
    found = pretrained("torchvision", name)
    theirs = torchvision.models.get_model_weights(found.network)[found.weights].transforms()
    resized = VF.resize(photograph, [found.preprocessing.resize], VF.InterpolationMode(found.preprocessing.interpolation))
    torch.testing.assert_close(prepared(photograph, found.preprocessing), theirs(photograph), rtol=0, atol=1e-5)
    assert min(resized.size) == theirs.resize_size[0]


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_that_convert_their_input_get_it_converted(photograph, torch_hub, name):
    """With pretrained weights, torchvision's modules turn normalised images into pixels in [-1, 1]."""
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    state = torchvision.models.get_model(name, weights=None, init_weights=False).state_dict()
    torch.save(state, torch_hub / weights.url.rpartition("/")[2])
    theirs = torchvision.models.get_model(name, weights=weights)
    images = weights.transforms()(photograph)[None]
    converted = theirs._transform_input(images)
    found = pretrained("torchvision", f"{name}.IMAGENET1K_V1")
    torch.testing.assert_close(prepared(photograph, found.preprocessing)[None], converted, rtol=0, atol=1e-5)
    assert (converted - images).abs().max() > 1


def test_the_name_says_which_weights(torch_hub):
    known = torchvision.models.ResNeXt50_32X4D_Weights
    for mark, entry in enumerate(known):
        torch.save({"mark": torch.tensor(float(mark))}, torch_hub / entry.url.rpartition("/")[2])
    for mark, entry in enumerate(known):
        found = pretrained("torchvision", f"resnext50_32x4d.{entry.name}")
        assert (found.source, found.name) == (entry.url, f"torchvision/resnext50_32x4d.{entry.name}")
        assert found.fetch()["mark"].item() == mark
        assert found.preprocessing.resize == {"IMAGENET1K_V1": 256, "IMAGENET1K_V2": 232}[entry.name]
        assert found.classes == tuple(entry.meta["categories"])


def test_a_network_alone_means_the_librarys_default():
    assert pretrained("torchvision", "resnet50").weights == torchvision.models.ResNet50_Weights.DEFAULT.name
    assert pretrained("timm", "resnet50").weights == timm.get_pretrained_cfg("resnet50").tag


def test_weights_of_timm_come_from_the_cache_of_huggingface_hub(timm_cache, capfd):
    theirs = randomise_norms(timm.create_model("mobilenetv3_small_050"))
    timm_cache("mobilenetv3_small_050.lamb_in1k", theirs.state_dict())
    found = pretrained("timm", "mobilenetv3_small_050.lamb_in1k")
    assert found.source == "https://huggingface.co/timm/mobilenetv3_small_050.lamb_in1k"
    state = found.fetch()
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in theirs.state_dict().items())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("library", "name"), [("timm", "resnet18.a1_in1k"), ("torchvision", "resnet18.IMAGENET1K_V1")])
def test_without_a_network_it_is_one_line_that_names_the_address(timm_cache, torch_hub, capfd, library, name):
    found = pretrained(library, name)
    with pytest.raises(DataError) as caught:
        found.fetch()
    (line,) = caught.value.lines
    assert line.startswith(f"{found.source}: these weights could not be fetched (")
    assert line.endswith(f"import it with `sdpctl import FILE --arch {library}/resnet18`")
    assert "\n" not in line
    assert not list(torch_hub.glob("*"))
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("content", [b"", b"weights of a network\n", b"\x80\x02}q\x00."])
def test_a_damaged_file_in_torchs_cache(torch_hub, content):
    found = pretrained("torchvision", "resnet18.IMAGENET1K_V1")
    (torch_hub / found.source.rpartition("/")[2]).write_bytes(content)
    with pytest.raises(DataError, match=r"these weights could not be fetched \("):
        found.fetch()


class Touches:
    """What leaves a mark when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return self.path.touch, ()


def test_pickled_code_in_torchs_cache_is_not_run(torch_hub, tmp_path):
    found = pretrained("torchvision", "resnet18.IMAGENET1K_V1")
    torch.save({"state_dict": Touches(tmp_path / "mark")}, torch_hub / found.source.rpartition("/")[2])
    with pytest.raises(DataError, match=r"these weights could not be fetched \("):
        found.fetch()
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("library", "name", "message"),
    [
        (
            "timm",
            "resnet50x",
            r"^timm [\d.]+ has no network 'resnet50x' \(did you mean 'resnet50\w?'\?\); `sdpctl models timm`",
        ),
        ("timm", "tv_resnet50", r"^timm now calls tv_resnet50 resnet50; name weights of resnet50$"),
        (
            "timm",
            "resnet50.a1_in1",
            r"^timm has no weights 'a1_in1' of resnet50 \(did you mean 'a1_in1k'\?\); it has a1_",
        ),
        ("torchvision", "resnet50.V9", r"^torchvision has no weights 'V9' of resnet50; it has IMAGENET1K_V2, IMAGENET1K_V1$"),
        ("torchvision", "resnet51", r"^torchvision [\d.+a-z]+ has no network 'resnet51' \(did you mean 'resnet\d+'\?\)"),
        ("torchvision", "mnasnet0_75.a", r"^torchvision has no weights 'a' of mnasnet0_75; it has IMAGENET1K_V1$"),
    ],
)
def test_names_that_a_library_does_not_know(library, name, message):
    with pytest.raises(UsageError, match=message):
        pretrained(library, name)


def test_a_network_without_weights():
    without = next(name for name in timm.list_models("resnet*") if not timm.list_pretrained(f"{name}.*"))
    with pytest.raises(UsageError, match=rf"^timm has no weights of {without}; import a file with --arch timm/{without}$"):
        pretrained("timm", without)


def test_a_library_that_is_not_installed(monkeypatch):
    def missing(place):
        raise ImportError("No module named 'timm'")

    monkeypatch.setattr("sdpctl.models.traced.load", missing)
    with pytest.raises(ModelError, match=r"^timm cannot be imported \(No module named 'timm'\); install it with `pip install"):
        pretrained("timm", "resnet18.a1_in1k")
