"""From sources to batches: which images, in what order, and what becomes of them."""

import random
import shutil
from collections import Counter
from multiprocessing import active_children

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight
from torchvision.transforms import v2

from sdpctl.data.files import locate
from sdpctl.data.loader import (
    ImageData,
    Normalise,
    cropped,
    distortions,
    prepared,
    training_transforms,
)
from sdpctl.data.pixels import INTERPOLATIONS, Middle
from sdpctl.data.settings import DataSettings
from sdpctl.errors import DataError

IMAGENET = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

BOTH_WORKERS = pytest.mark.parametrize("workers", [0, 2])

# What torch says of a machine with one core, and Python 3.12 of forking; neither concerns these tests.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


def brightness(batches):
    """Return the numbers of numbered images from their brightness in the middle, batch by batch."""
    mean, std = IMAGENET
    found = []
    for x_NCHW, _ in batches:
        middle_NC = ((x_NCHW * std + mean) * 255)[:, :, x_NCHW.shape[2] // 2, x_NCHW.shape[3] // 2]
        found.append(middle_NC[:, 0].round().int().tolist())
    return found


def flat(batches):
    return [number for batch in batches for number in batch]


def same(one, other):
    one, other = list(one), list(other)
    return len(one) == len(other) and all(
        torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


def images(batches):
    """Return the set of images, as bytes."""
    return {image.contiguous().numpy().tobytes() for x_NCHW, _ in batches for image in x_NCHW}


def noise(width, height):
    """Return an image of random pixels."""
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8))


class TestSplits:
    @pytest.mark.parametrize(("share", "counts"), [(0.1, [1, 2, 3]), (0.2, [2, 4, 6])])
    def test_holdout_is_stratified(self, share, counts, open_data, numbered):
        data = open_data("imagefolder", numbered, holdout=share)
        labels = [label for _, labels_N in data.holdout(4) for label in labels_N.tolist()]
        assert [labels.count(i) for i in range(3)] == counts
        assert len(labels) == sum(counts)

    def test_holdout_is_never_trained_on(self, open_data, numbered):
        data = open_data("imagefolder", numbered, batch_size=5)
        held = flat(brightness(data.holdout(4)))
        trained = flat(brightness(batch for epoch in range(4) for batch in data.training(epoch)))
        calibrated = flat(brightness(data.calibration(100)))
        assert len(held) == len(set(held)) == 6
        assert set(trained) == set(range(61)) - set(held)
        assert set(calibrated) <= set(trained)

    def test_holdout_depends_on_the_seed(self, open_data, numbered):
        held = [flat(brightness(open_data("imagefolder", numbered, seed=seed).holdout(9))) for seed in (0, 0, 1)]
        assert held[0] == held[1]
        assert held[0] != held[2]

    def test_no_holdout(self, open_data, numbered):
        data = open_data("imagefolder", numbered, holdout=0.0)
        assert list(data.holdout(4)) == []
        assert len(data.train_indices) == 61

    @pytest.mark.parametrize(("batch_size", "sizes"), [(5, [5, 5, 2]), (12, [12]), (100, [12])])
    def test_every_test_image_exactly_once(self, batch_size, sizes, open_data, numbered):
        batches = brightness(open_data("imagefolder", numbered).test(batch_size))
        assert [len(batch) for batch in batches] == sizes
        assert flat(batches) == list(range(61, 73))

    def test_a_part_of_the_test_images(self, open_data, numbered):
        data = open_data("imagefolder", numbered)
        batches = brightness(data.test(4, batches=2))
        assert [len(batch) for batch in batches] == [4, 4]
        assert len(set(flat(batches)) & set(range(61, 73))) == 8
        assert brightness(data.test(4, batches=2)) == batches
        assert brightness(open_data("imagefolder", numbered, seed=1).test(4, batches=2)) != batches

    @pytest.mark.parametrize("batches", [3, 50])
    def test_a_part_that_is_the_whole(self, batches, open_data, numbered):
        assert flat(brightness(open_data("imagefolder", numbered).test(4, batches=batches))) == list(range(61, 73))

    def test_labels_are_those_of_the_images(self, open_data, numbered):
        data = open_data("imagefolder", numbered)
        for batch in data.training(0):
            labels = [0 if number < 10 else 1 if number < 30 else 2 for number in flat(brightness([batch]))]
            assert batch[1].tolist() == labels

    def test_digits(self, open_data):
        data = open_data("digits", batch_size=64)
        assert len(data.train_indices) + len(data.holdout_indices) + data.test_size == 1797
        assert data.steps_per_epoch == len(data.train_indices) // 64


class TestOrder:
    @pytest.mark.parametrize(("batch_size", "steps"), [(8, 6), (11, 5), (55, 1)])
    def test_an_epoch_is_full_batches_of_different_images(self, batch_size, steps, open_data, numbered):
        data = open_data("imagefolder", numbered, batch_size=batch_size)
        assert data.steps_per_epoch == steps
        batches = brightness(data.training(0))
        assert [len(batch) for batch in batches] == [batch_size] * steps
        assert len(set(flat(batches))) == batch_size * steps

    def test_epochs_differ_and_seeds_differ(self, open_data, numbered):
        data = open_data("imagefolder", numbered)
        orders = [flat(brightness(data.training(epoch))) for epoch in (0, 1)]
        orders.append(flat(brightness(data.calibration(100))))
        orders.append(flat(brightness(open_data("imagefolder", numbered, seed=1).training(0))))
        assert len(set(map(tuple, orders))) == 4

    def test_what_an_epoch_leaves_out_changes(self, open_data, numbered):
        data = open_data("imagefolder", numbered)
        assert len({frozenset(flat(brightness(data.training(epoch)))) for epoch in range(3)}) == 3

    def test_calibration(self, open_data, numbered):
        data = open_data("imagefolder", numbered)
        everything = brightness(data.calibration(100))
        assert [len(batch) for batch in everything] == [8] * 6
        assert brightness(data.calibration(2)) == everything[:2]

    @BOTH_WORKERS
    @pytest.mark.parametrize("start", [1, 5, 6])
    def test_an_epoch_can_be_joined_late(self, start, workers, open_data, photos):
        data = open_data("imagefolder", photos, augment="crop-flip", workers=workers)
        assert same(data.training(3, start), list(data.training(3))[start:])

    def test_an_epoch_can_be_left_early(self, open_data, photos):
        data = open_data("imagefolder", photos, augment="crop", workers=2)
        left = data.training(0)
        next(left)
        left.close()
        assert same(data.training(1), open_data("imagefolder", photos, augment="crop").training(1))

    @pytest.mark.parametrize("augment", ["crop", "none"])
    def test_workers_end_with_the_data(self, augment, open_data, photos):
        before = set(active_children())
        data = open_data("imagefolder", photos, augment=augment, workers=2)
        for batches in (data.training(0), data.holdout(4), data.test(4)):
            next(batches)
            batches.close()
        del batches
        assert len(set(active_children()) - before) == 6
        del data
        assert set(active_children()) <= before


class TestSameEverywhere:
    @pytest.mark.parametrize("augment", ["resized-crop", "crop-flip"])
    def test_with_any_number_of_workers(self, augment, open_data, photos):
        alone, helped = (open_data("imagefolder", photos, augment=augment, image_size=12, workers=w) for w in (0, 2))
        for epoch in (0, 1):
            assert same(alone.training(epoch), helped.training(epoch))
        assert same(alone.calibration(2), helped.calibration(2))
        assert same(alone.holdout(4), helped.holdout(4))
        assert same(alone.test(5), helped.test(5))

    def test_in_memory_with_any_number_of_workers(self, open_data):
        alone, helped = (open_data(augment="crop", image_size=16, batch_size=128, workers=w) for w in (0, 2))
        assert same(alone.training(0), helped.training(0))

    @pytest.mark.parametrize(
        ("augment", "again"), [("none", True), ("crop", False), ("crop-flip", False), ("resized-crop", False)]
    )
    def test_augmentation_is_drawn_anew_each_epoch(self, augment, again, open_data, photos):
        data = open_data("imagefolder", photos, augment=augment, image_size=16, batch_size=11)
        first, second = images(data.training(0)), images(data.training(1))
        assert len(first) == len(second) == 55
        assert len(first & second) == 55 if again else len(first & second) < 20

    def test_augmentation_depends_on_the_seed(self, open_data, photos):
        first, second = (
            images(open_data("imagefolder", photos, augment="crop-flip", image_size=16, holdout=0.0, seed=seed).training(0))
            for seed in (0, 1)
        )
        assert len(first & second) < 20

    def test_global_generators_change_nothing(self, open_data, photos):
        found = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            found.append(list(open_data("imagefolder", photos, augment="resized-crop").training(0)))
        assert same(*found)

    @BOTH_WORKERS
    @pytest.mark.parametrize("augment", ["none", "crop-flip"])
    def test_global_generators_are_left_alone(self, augment, workers, open_data, photos):
        data = open_data("imagefolder", photos, augment=augment, workers=workers)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        for batches in (data.training(0), data.calibration(2), data.holdout(4), data.test(4)):
            next(batches)
            assert torch.equal(torch.get_rng_state(), before[0])
            batches.close()
        assert random.getstate() == before[1]
        assert np.random.get_state()[1].tolist() == before[2]


DECODERS = pytest.mark.parametrize(("decoder", "levels"), [("pil", 0), ("torchvision", 1)])
"""The decoders, and by how many levels of 255 a resized pixel may differ from PIL's."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

COLOURS = {
    "1": (1, (255, 255, 255)),
    "L": (77, (77, 77, 77)),
    "LA": ((77, 255), (77, 77, 77)),
    "RGB": ((10, 20, 30), (10, 20, 30)),
    "RGBA": ((10, 20, 30, 255), (10, 20, 30)),
    "CMYK": ((255, 55, 0, 0), (0, 200, 255)),
}
"""A colour in each mode, and the red, green and blue it is."""


class TestImages:
    def test_batches_are_float32_channels_last(self, open_data, photos):
        x_NCHW, labels_N = next(open_data("imagefolder", photos, image_size=12).training(0))
        assert x_NCHW.shape == (8, 3, 12, 12)
        assert x_NCHW.dtype == torch.float32
        assert x_NCHW.is_contiguous(memory_format=torch.channels_last)
        assert (labels_N.shape, labels_N.dtype) == ((8,), torch.int64)

    @pytest.fixture
    def opened(self, tmp_path, open_data):
        """Open a folder whose only test image is this one; return it as the network sees it."""

        def open_(image, name="0.png", *, save=None, **chosen):
            for part, count in (("train", 2), ("val", 1)):
                for label in ("a", "b"):
                    folder = tmp_path / part / label
                    folder.mkdir(parents=True)
                    for i in range(count):
                        Image.new("RGB", (8, 8)).save(folder / f"{i}.bmp")
            (tmp_path / "val" / "a" / "0.bmp").unlink()
            image.save(tmp_path / "val" / "a" / name, **(save or {}))
            data = open_data("imagefolder", tmp_path, batch_size=2, holdout=0.0, **chosen)
            (x_NCHW, _), *_ = data.test(2)
            return x_NCHW[0]

        return open_

    def test_a_photograph_that_was_stored_turned(self, opened, tmp_path):
        upright = Image.new("RGB", (8, 8), (255, 255, 255))
        upright.paste((0, 0, 0), (0, 0, 8, 4))
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned a quarter clockwise
        x_CHW = opened(upright.transpose(Image.Transpose.ROTATE_90), "0.jpg", save={"exif": exif, "quality": 95})
        assert x_CHW[:, :4].max() < -1.5
        assert x_CHW[:, 4:].min() > 1.5

    def test_normalisation_by_hand(self, opened):
        x_CHW = opened(Image.new("RGB", (8, 8), (255, 0, 51)))
        expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
        torch.testing.assert_close(x_CHW, torch.tensor(expected).view(3, 1, 1).expand(3, 8, 8), rtol=0, atol=1e-5)

    @DECODERS
    @pytest.mark.parametrize(("name", "side"), [("IMAGENET1K_V1", None), ("IMAGENET1K_V2", 232)])
    def test_imagenets_preprocessing_is_torchvisions_pixel_by_pixel(self, opened, name, side, decoder, levels):
        image = noise(310, 245)
        expected = torchvision.models.ResNet50_Weights[name].transforms()(image)
        x_CHW = opened(image, image_size=224, augment="resized-crop", resize=side, decoder=decoder)
        torch.testing.assert_close(x_CHW, expected, rtol=0, atol=levels / 255 / min(STD) + 1e-5)

    @DECODERS
    @pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
    def test_mean_deviation_size_and_interpolation_may_be_chosen(self, opened, interpolation, decoder, levels):
        image, mean, std = noise(90, 70), (0.1, 0.2, 0.3), (0.5, 0.25, 1.0)
        given = {"resize": 40, "mean": mean, "std": std, "interpolation": interpolation, "decoder": decoder}
        x_CHW = opened(image, image_size=32, augment="resized-crop", **given)
        kind = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC, "nearest": Image.Resampling.NEAREST}
        small = image.resize((51, 40), kind[interpolation]).crop((10, 4, 42, 36))  # torchvision rounds half to even: 9.5 is 10
        by_hand = torch.from_numpy(np.asarray(small) / 255).permute(2, 0, 1)
        by_hand = (by_hand - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        torch.testing.assert_close(x_CHW.double(), by_hand, rtol=0, atol=levels / 255 / min(std) + 1e-5)

    def test_training_images_are_resized_by_the_same_interpolation(self):
        for interpolation in ("bilinear", "bicubic"):
            crop, _ = training_transforms("resized-crop", 32, interpolation)
            assert crop.interpolation.value == interpolation

    def test_colour_becomes_grey(self, opened):
        x_CHW = opened(Image.new("RGB", (8, 8), (200, 100, 50)), in_channels=1)
        grey = (0.299 * 200 + 0.587 * 100 + 0.114 * 50) / 255
        mean, std = (0.485 + 0.456 + 0.406) / 3, (0.229 + 0.224 + 0.225) / 3
        torch.testing.assert_close(x_CHW, torch.full((1, 8, 8), (grey - mean) / std), rtol=0, atol=0.51 / 255 / std)

    def test_colour_in_memory_becomes_grey(self):
        colour = torch.tensor([200, 100, 50], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 4)
        grey = prepared(colour, 1, [])
        assert (grey.shape, grey.dtype) == ((2, 1, 4, 4), torch.uint8)
        assert (grey.float() - (0.299 * 200 + 0.587 * 100 + 0.114 * 50)).abs().max() <= 1

    def test_grey_in_memory_becomes_colour(self, open_data):
        (grey, labels_N), *_ = open_data().test(16)
        (colour, same_labels_N), *_ = open_data(in_channels=3).test(16)
        assert grey.shape == (16, 1, 8, 8)
        torch.testing.assert_close(colour, grey.expand(-1, 3, -1, -1))
        assert torch.equal(labels_N, same_labels_N)

    def test_digits_are_centred(self, open_data):
        x_NCHW = torch.cat([x for x, _ in open_data(holdout=0.0, batch_size=64).training(0)])
        assert abs(x_NCHW.mean()) < 0.02
        assert abs(x_NCHW.std() - 1) < 0.02

    @pytest.mark.parametrize("mode", COLOURS)
    def test_images_of_every_mode(self, mode, opened):
        colour, (red, green, blue) = COLOURS[mode]
        x_CHW = opened(Image.new(mode, (8, 8), colour), "0.tif")
        mean, std = IMAGENET
        expected = torch.tensor([red, green, blue]).view(3, 1, 1).expand(3, 8, 8)
        torch.testing.assert_close((x_CHW * std + mean) * 255, expected.float(), rtol=0, atol=1e-2)

    @pytest.mark.parametrize(
        "transparency", [{}, {"transparency": 0}, {"transparency": bytes([0, 128])}], ids=["none", "colour", "bytes"]
    )
    def test_images_with_a_palette(self, transparency, opened):
        image = Image.new("P", (8, 8), 1)
        image.putpalette([1, 2, 3, 40, 50, 60])
        x_CHW = opened(image, save=transparency)
        mean, std = IMAGENET
        expected = torch.tensor([40.0, 50.0, 60.0]).view(3, 1, 1).expand(3, 8, 8)
        torch.testing.assert_close((x_CHW * std + mean) * 255, expected, rtol=0, atol=1e-2)

    def test_cmyk_jpegs(self, opened):
        x_CHW = opened(Image.new("CMYK", (8, 8), (255, 55, 0, 0)), "0.jpg")
        mean, std = IMAGENET
        expected = torch.tensor([0.0, 200.0, 255.0]).view(3, 1, 1).expand(3, 8, 8)
        torch.testing.assert_close((x_CHW * std + mean) * 255, expected, rtol=0, atol=4)

    def test_the_middle_of_a_wide_image(self, opened):
        wide = Image.new("RGB", (24, 8), (255, 0, 0))
        wide.paste((0, 255, 0), (8, 0, 16, 8))
        mean, std = IMAGENET
        expected = torch.tensor([0.0, 255.0, 0.0]).view(3, 1, 1).expand(3, 8, 8)
        torch.testing.assert_close((opened(wide) * std + mean) * 255, expected, rtol=0, atol=1e-2)

    def test_seven_eighths_of_the_image_where_training_resizes(self):
        for size in (32, 128, 224):
            side = DataSettings(dataset="digits", augment="resized-crop").side_of(size)
            resize, crop = Middle(side, size, "bilinear").transforms()
            assert crop.size == (size, size)
            assert [round(s * 7 / 8) for s in resize.size] == [size]

    @pytest.mark.parametrize("augment", ["none", "crop", "crop-flip"])
    def test_the_whole_image_elsewhere(self, augment):
        resize, crop = Middle(DataSettings(dataset="digits", augment=augment).side_of(32), 32, "bilinear").transforms()
        assert (resize.size, crop.size) == ([32], (32, 32))

    @pytest.mark.parametrize("augment", ["crop", "crop-flip"])
    @pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (3, 17), (1, 7)])
    def test_crops_of_a_batch_are_those_of_torchvision_one_by_one(self, augment, channels, size):
        images = torch.randint(256, (40, channels, size, size), dtype=torch.uint8)
        seeds = [2**62 + 977 * k for k in range(40)]
        wanted = []
        for image, seed in zip(images, seeds, strict=True):
            torch.manual_seed(seed)
            for transform in training_transforms(augment, size):
                image = transform(image)
            wanted.append(image)
        before = torch.get_rng_state()
        found = cropped(images, seeds, padding=size // 8, flip=augment == "crop-flip")
        assert torch.equal(found, torch.stack(wanted))
        assert torch.equal(torch.get_rng_state(), before)
        assert (found != images).any() == (size > 7 or augment == "crop-flip")

    def test_crops_are_of_the_image_padded_by_an_eighth(self):
        image = torch.arange(1, 257, dtype=torch.uint8).where(torch.arange(256) < 255, 7).view(1, 16, 16)
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
        windows = {padded[:, y : y + 16, x : x + 16].contiguous().numpy().tobytes() for y in range(5) for x in range(5)}
        (crop,) = training_transforms("crop", 16)
        torch.manual_seed(0)
        drawn = Counter(crop(image).contiguous().numpy().tobytes() for _ in range(100))
        assert drawn.keys() <= windows
        assert len(drawn) > 10


HALF_A_LEVEL = 0.5 / 255 / min(STD)
"""How far the mean colour in whole pixel values may be from 0 after normalisation."""


class TestDistortions:
    @pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
    @pytest.mark.parametrize("augmentation", [None, v2.TrivialAugmentWide, v2.RandAugment])
    def test_photographs_are_distorted_as_in_torchvisions_references(self, augmentation, interpolation):
        """The order of `ClassificationPresetTrain` of torchvision's references, with its draws."""
        mode = INTERPOLATIONS[interpolation]
        reference = v2.Compose(
            [
                v2.RandomResizedCrop(24, interpolation=mode, antialias=True),
                v2.RandomHorizontalFlip(),
                *([augmentation(interpolation=mode)] if augmentation else []),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
                v2.RandomErasing(p=0.5),
            ]
        )
        name = {None: None, v2.TrivialAugmentWide: "trivial", v2.RandAugment: "rand"}[augmentation]
        settings = DataSettings(dataset="imagefolder", auto_augment=name, random_erasing=0.5, interpolation=interpolation)
        ours = v2.Compose([*training_transforms("resized-crop", 24, interpolation), *distortions(settings, 3)])
        normalise, erased = Normalise(MEAN, STD, torch.device("cpu")), 0
        for seed in range(60):
            image = noise(40, 30)
            torch.manual_seed(seed)
            wanted = reference(image)
            torch.manual_seed(seed)
            pixels = ours(image)
            found = normalise(pixels[None])[0]
            rectangle = (wanted == 0).all(0)
            erased += bool(rectangle.any())
            assert (found - wanted)[:, ~rectangle].abs().max() < 1e-5
            assert pixels.dtype == torch.uint8
            assert not rectangle.any() or found[:, rectangle].abs().max() < HALF_A_LEVEL
        assert 15 < erased < 45

    @pytest.mark.parametrize("channels", [1, 3])
    def test_images_in_memory_are_distorted_alike(self, channels):
        """They are cropped as tensors and distorted as PIL images."""
        settings = DataSettings(dataset="cifar10", auto_augment="trivial", random_erasing=0.3, interpolation="bicubic")
        transforms = v2.Compose([*training_transforms("crop-flip", 16), *distortions(settings, channels)])
        image = torch.randint(256, (channels, 16, 16), dtype=torch.uint8)
        colour = [round(255 * mean) for mean in settings.normalisation(channels)[0]]
        for seed in range(40):
            torch.manual_seed(seed)
            wanted = v2.RandomHorizontalFlip()(v2.RandomCrop(16, padding=2)(image))
            wanted = v2.functional.to_pil_image(wanted)
            wanted = v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BICUBIC)(wanted)
            wanted = v2.functional.pil_to_tensor(wanted)
            wanted = v2.RandomErasing(p=0.3, value=[float(c) for c in colour])(wanted)
            torch.manual_seed(seed)
            assert torch.equal(transforms(image), wanted)

    @BOTH_WORKERS
    @pytest.mark.parametrize("augment", ["none", "crop", "crop-flip", "resized-crop"])
    @pytest.mark.parametrize(("dataset", "size"), [("digits", 8), ("imagefolder", 16)])
    def test_training_and_calibration_are_distorted_and_nothing_else(self, dataset, size, augment, workers, open_data, photos):
        plain, distorted = (
            open_data(dataset, photos, augment=augment, image_size=size, workers=workers, **keys)
            for keys in ({}, {"auto_augment": "rand", "random_erasing": 1.0})
        )
        x_NCHW, _ = next(distorted.training(0))
        assert not torch.equal(x_NCHW, next(plain.training(0))[0])
        mean, std = plain.settings.normalisation(x_NCHW.shape[1])
        colour = torch.tensor([round(255 * channel) for channel in mean], dtype=torch.uint8)
        erased_NCHW = Normalise(mean, std, torch.device("cpu"))(colour.view(1, -1, 1, 1).expand_as(x_NCHW))
        assert (x_NCHW == erased_NCHW).all(1).flatten(1).any(1).all()  # a pixel of each image, at least
        assert not same(distorted.calibration(1), plain.calibration(1))
        assert same(distorted.holdout(4), plain.holdout(4))
        assert same(distorted.test(5, 2), plain.test(5, 2))

    @pytest.mark.parametrize("augment", ["none", "crop", "resized-crop"])
    def test_with_any_number_of_workers_and_joined_late(self, augment, open_data, photos):
        keys = {"auto_augment": "trivial", "random_erasing": 0.5, "balance": "sampler"}
        for dataset in ("digits", "imagefolder"):
            alone, helped = (open_data(dataset, photos, augment=augment, workers=workers, **keys) for workers in (0, 2))
            whole = list(alone.training(1))
            assert same(helped.training(1, 2), whole[2:])
            assert not same(alone.training(0), whole)


class TestBalance:
    """The 61 images of `numbered` are 10, 20 and 31 of three classes."""

    def test_the_sampler_draws_each_class_equally_often(self, open_data, numbered):
        plain, data = (open_data("imagefolder", numbered, balance=balance) for balance in (None, "sampler"))
        assert data.steps_per_epoch == plain.steps_per_epoch == 6
        labels, numbers = [], []
        for epoch in range(60):
            batches = list(data.training(epoch))
            assert [len(labels_N) for _, labels_N in batches] == [8] * 6
            labels += [label for _, labels_N in batches for label in labels_N.tolist()]
            numbers.append(flat(brightness(batches)))
        shares = torch.bincount(torch.tensor(labels)) / len(labels)
        deviation = (1 / 3 * 2 / 3 / len(labels)) ** 0.5
        assert (shares - 1 / 3).abs().max() < 4 * deviation
        drawn = Counter(number for epoch in numbers for number in epoch)
        assert drawn.keys() == set(plain.train_indices)
        assert all(len(set(epoch)) < len(epoch) for epoch in numbers)  # with replacement
        assert len(set(map(tuple, numbers))) == 60
        assert numbers[0] == flat(brightness(open_data("imagefolder", numbered, balance="sampler").training(0)))
        assert numbers[0] != flat(brightness(open_data("imagefolder", numbered, balance="sampler", seed=1).training(0)))

    def test_calibration_draws_as_training_does(self, open_data, numbered):
        ants, ants_plain = (
            labels_N.tolist().count(0)
            for settings in ({"balance": "sampler"}, {})
            for _, labels_N in open_data("imagefolder", numbered, batch_size=50, **settings).calibration(1)
        )
        assert ants_plain <= 9 < 11 < ants

    def test_an_image_that_is_drawn_again_is_augmented_differently(self, open_data, photos):
        data = open_data("imagefolder", photos, balance="sampler", augment="resized-crop", image_size=16)
        batches = list(data.training(0))
        assert len(images(batches)) == 48

    def test_the_weights_of_the_loss_are_scikit_learns(self, open_data, numbered):
        data = open_data("imagefolder", numbered, balance="loss")
        labels = data.labels[data.train_indices].numpy()
        wanted = compute_class_weight("balanced", classes=np.arange(3), y=labels)
        torch.testing.assert_close(data.class_weights, torch.tensor(wanted, dtype=torch.float32))
        assert same(data.training(0), open_data("imagefolder", numbered).training(0))
        assert open_data("imagefolder", numbered).class_weights is None
        assert open_data("imagefolder", numbered, balance="sampler").class_weights is None

    def test_a_class_without_training_images_weighs_nothing(self, numbered, tmp_path):
        shutil.copytree(numbered, tmp_path / "images")
        shutil.rmtree(tmp_path / "images" / "train" / "bee")
        settings = {"dataset": "imagefolder", "root": str(tmp_path / "images"), "batch_size": 8, "workers": 0, "image_size": 8}
        located = locate("imagefolder", tmp_path / "images", partial=True)
        data = ImageData(DataSettings(**settings, balance="loss"), located, torch.device("cpu"), in_channels=3, seed=0)
        labels = data.labels[data.train_indices].numpy()
        ant, cat = compute_class_weight("balanced", classes=np.array([0, 2]), y=labels)
        assert data.class_weights.tolist() == pytest.approx([ant, 0, cat])
        data = ImageData(DataSettings(**settings, balance="sampler"), located, torch.device("cpu"), in_channels=3, seed=0)
        counts = Counter(label for epoch in range(20) for _, labels_N in data.training(epoch) for label in labels_N.tolist())
        assert counts.keys() == {0, 2}
        assert 0.8 < counts[0] / counts[2] < 1.25


def failure(batches):
    """Return the error's text, and keep nothing that would keep workers alive."""
    try:
        list(batches)
    except DataError as error:
        return str(error)
    return pytest.fail("nothing went wrong")


class TestErrors:
    @pytest.fixture
    def damaged(self, tmp_path):
        """Return an image folder, one of whose training images ends early, and that image."""
        for part in ("train", "val"):
            for label in ("a", "b"):
                (tmp_path / part / label).mkdir(parents=True)
                for i in range(4):
                    Image.effect_noise((32, 32), 50).save(tmp_path / part / label / f"{i}.jpg")
        path = tmp_path / "train" / "b" / "2.jpg"
        path.write_bytes(path.read_bytes()[:-300])
        return tmp_path, path

    @BOTH_WORKERS
    def test_an_image_that_ends_early(self, workers, damaged, open_data):
        root, path = damaged
        data = open_data("imagefolder", root, batch_size=2, holdout=0.0, augment="crop", workers=workers)
        message = failure(data.training(0))
        assert message.startswith(f"{path}: this image cannot be decoded (")
        assert message.endswith("; replace or remove it")
        assert "\n" not in message
        assert "worker" not in message
        assert len(list(data.test(4))) == 2

    @pytest.mark.parametrize("content", [b"", b"not an image"])
    def test_what_is_no_image(self, content, damaged, open_data):
        root, path = damaged
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            list(open_data("imagefolder", root, batch_size=2, holdout=0.0).training(0))
        assert str(caught.value).startswith(f"{path}: this image cannot be decoded (")

    def test_an_image_too_large_to_be_true(self, numbered, open_data, monkeypatch):
        data = open_data("imagefolder", numbered)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
        with pytest.raises(DataError, match=r"\.png: this image cannot be decoded \("):
            list(data.test(4))

    def test_fewer_images_than_a_batch(self, numbered, open_data):
        with pytest.raises(DataError) as caught:
            open_data("imagefolder", numbered, batch_size=56)
        assert str(caught.value) == "55 training images do not fill one batch: lower data.batch_size=56"
        assert open_data("imagefolder", numbered, batch_size=55).steps_per_epoch == 1

    def test_fewer_images_than_batch_norm_needs(self, tmp_path, open_data):
        for part in ("train", "val"):
            (tmp_path / part / "a").mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / part / "a" / "0.png")
        with pytest.raises(DataError) as caught:
            open_data("imagefolder", tmp_path, batch_size=2)
        assert str(caught.value) == "1 training image is left, and BatchNorm needs two or more: add images"

    @pytest.mark.parametrize(("holdout", "names"), [(0.6, "'a'"), (0.9, "'a', 'b'")])
    def test_a_class_that_is_held_out_entirely(self, holdout, names, tmp_path, open_data):
        for label, count in (("a", 1), ("b", 3), ("c", 20)):
            for part in ("train", "val"):
                (tmp_path / part / label).mkdir(parents=True)
                for i in range(count):
                    Image.new("RGB", (8, 8)).save(tmp_path / part / label / f"{i}.png")
        with pytest.raises(DataError) as caught:
            open_data("imagefolder", tmp_path, batch_size=2, holdout=holdout)
        expected = f"data.holdout={100 * holdout:g}% leaves no training image of {names}; lower it, or add images"
        assert str(caught.value) == expected
