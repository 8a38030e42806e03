"""The decoder `nvjpeg`, on a CPU: everything but the call that decodes; and on a GPU, where there is one."""

import pytest
import torch
from PIL import Image

from sdpctl.data import encoded
from sdpctl.data.encoded import Task, finished, packed
from sdpctl.data.files import locate
from sdpctl.data.loader import ImageData
from sdpctl.data.pixels import MODES, Part, Wanted, part_of, read
from sdpctl.data.settings import DataSettings
from sdpctl.errors import DataError, RecipeError, ResourceError
from sdpctl.recipe.load import parse_recipe

CPU = torch.device("cpu")

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


@pytest.fixture
def open_photos(photos):
    def open_(decoder, root=photos, device=CPU, **chosen):
        usual = {"image_size": 12, "batch_size": 8, "workers": 0}  # no image is twice as large, so none is decoded at a half
        settings = DataSettings(dataset="imagefolder", root=str(root), decoder=decoder, **(usual | chosen))
        return ImageData(settings, locate("imagefolder", root), device, in_channels=3, seed=0)

    return open_


def batches(loader, keys):
    listed = [keys[i : i + 8] for i in range(0, len(keys), 8)]
    return [(pixels_NCHW.clone(), labels_N.clone()) for pixels_NCHW, labels_N in loader.pixels(listed)]


def assert_same(one, other, levels=0):
    for (found, labels), (wanted, same_labels) in zip(one, other, strict=True):
        assert torch.equal(labels, same_labels)
        assert (found.int() - wanted.int()).abs().max() <= levels
        assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augment", ["none", "crop", "crop-flip", "resized-crop"])
def test_batches_are_those_of_the_decoder_torchvision(augment, workers, open_photos):
    ours, theirs = (open_photos(name, augment=augment, workers=workers) for name in ("nvjpeg", "torchvision"))
    for part, keys in (("_training", ours._order("1")), ("_holdout", [("", 3), ("", 5)]), ("_test", [("", 0), ("", 7)])):
        assert_same(batches(getattr(ours, part), keys), batches(getattr(theirs, part), keys))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(orientation, flip, tmp_path):
    """The part is neither square nor in the middle, so that a wrong turn would move it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.radial_gradient("L").resize((30, 21)).convert("RGB")
    image.paste((200, 10, 90), (3, 4, 12, 9))
    image.save(tmp_path / "a.jpg", exif=exif)
    jpeg = read(tmp_path / "a.jpg", "RGB")
    wanted = Wanted(Part(2, 1, 12, 17), 9, 9)
    content, table = packed([Task.of(jpeg, wanted, flip=flip)])
    (found,) = finished(content, table, mode="RGB", size=9, interpolation="bilinear", device=CPU, again=None)
    part = part_of(tmp_path / "a.jpg", "RGB", lambda *_: wanted, "bilinear")
    assert torch.equal(found, part.flip(2) if flip else part)


@pytest.fixture
def mixed(tmp_path):
    """Return an image folder of JPEGs, PNGs and a JPEG in CMYK."""
    for part in ("train", "val"):
        for label in "ab":
            (tmp_path / part / label).mkdir(parents=True)
            for i, (suffix, mode) in enumerate([("jpg", "RGB"), ("png", "RGB"), ("jpg", "CMYK"), ("jpg", "L"), ("gif", "L")]):
                noise = Image.effect_noise((24 + i, 20), 60).convert(mode)
                noise.save(tmp_path / part / label / f"{i}.{suffix}")
    return tmp_path


@pytest.mark.parametrize("augment", ["crop-flip", "resized-crop"])
def test_images_of_other_formats(augment, mixed, open_photos):
    keys = {"augment": augment, "batch_size": 2, "holdout": 0.0}
    ours, theirs = (open_photos(name, mixed, **keys) for name in ("nvjpeg", "torchvision"))
    assert_same(batches(ours._training, ours._order("0")), batches(theirs._training, ours._order("0")))
    assert_same(batches(ours._test, [("", i) for i in range(10)]), batches(theirs._test, [("", i) for i in range(10)]))


@pytest.mark.parametrize("augment", ["crop-flip", "resized-crop"])
def test_images_that_the_device_refuses_are_decoded_on_the_cpu(augment, open_photos, monkeypatch):
    """As nvJPEG does, the call refuses a whole batch because of one image."""
    ours, theirs = (open_photos(name, augment=augment) for name in ("nvjpeg", "torchvision"))
    refused = []

    def refuse(contents, mode, device):
        if any(len(content) % 3 == 0 for content in contents):
            refused.append(len(contents))
            raise RuntimeError("nvjpeg")
        return [torch.ops.image.decode_jpeg(content, MODES[mode], False) for content in contents]

    monkeypatch.setattr(encoded, "_decode", refuse)
    before = torch.get_rng_state()
    found = batches(ours._training, ours._order("0"))
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(found, batches(theirs._training, ours._order("0")))
    assert refused.count(1) > 1


def test_a_damaged_image_has_the_usual_error(mixed, open_photos):
    path = mixed / "val" / "a" / "0.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    errors = []
    for decoder in ("nvjpeg", "torchvision"):
        data = open_photos(decoder, mixed, batch_size=2, holdout=0.0)
        with pytest.raises(DataError) as caught:
            batches(data._test, [("", 0)])
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    assert errors[0].startswith(f"{path}: this image cannot be decoded (image file is truncated")


def test_a_cpu_is_refused_in_one_line(open_photos):
    with pytest.raises(ResourceError) as caught:
        next(open_photos("nvjpeg").training(0))
    assert str(caught.value) == (
        "data.decoder=nvjpeg decodes on an NVIDIA GPU, and this command runs on the CPU; set data.decoder=torchvision"
    )


@pytest.mark.parametrize("key", ["auto_augment=rand", "random_erasing=0.5", "cache=ram", "presize=true"])
def test_what_the_device_does_not_do_is_refused(key):
    text = "name: a\nmodel: {arch: resnet20, num_classes: 2}\ndata: {dataset: imagefolder, augment: resized-crop}\n"
    parse_recipe(text, "r.yaml", [f"data.{key}"])
    with pytest.raises(RecipeError, match=rf"data\.{key.partition('=')[0]}: `decoder: nvjpeg`"):
        parse_recipe(text, "r.yaml", [f"data.{key}", "data.decoder=nvjpeg"])


@pytest.mark.gpu
@pytest.mark.parametrize("augment", ["none", "crop-flip", "resized-crop"])
def test_a_gpu_decodes_the_same_images(augment, open_photos):
    """nvJPEG's inverse transform and interpolation of colours differ from libjpeg's by a few levels."""
    ours = open_photos("nvjpeg", device=torch.device("cuda"), augment=augment)
    theirs = open_photos("torchvision", augment=augment)
    for (x_NCHW, labels_N), (wanted_NCHW, same_N) in zip(ours.training(0), theirs.training(0), strict=True):
        assert x_NCHW.device.type == "cuda"
        assert torch.equal(labels_N.cpu(), same_N)
        assert (x_NCHW.cpu() - wanted_NCHW).abs().mean() < 0.1
