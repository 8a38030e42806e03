"""From sources to batches.

The order of an epoch is a function of (seed, epoch), the augmentation of a sample of (seed, epoch, index): a batch is the
same whatever the number of workers and wherever the training began. Images stay uint8 until they are on the device.

Names of tensors: N images, C channels, H and W height and width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as VF

from sdpctl.data.catalog import Augment, Interpolation, normalisation
from sdpctl.data.files import several
from sdpctl.data.images import decode
from sdpctl.data.reader import Located
from sdpctl.data.sources import Source, open_sources, stratified
from sdpctl.data.workers import Loader, received
from sdpctl.errors import DataError
from sdpctl.randomness import derive

Key = tuple[str, int]
"""What augments a sample (the epoch, or a name) and the sample's index."""

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which data, and how it becomes batches.

    Args:
        dataset: a name of the catalog.
        root: the folder its files are in.
        image_size: height and width of an image as the network sees it.
        in_channels: 1 or 3; colour becomes grey and grey becomes colour as needed.
        augment: of the training images; the test transform follows from it.
        batch_size: images a training or calibration batch.
        holdout: share of each class taken from the training split.
        seed: of order, augmentation and holdout.
        workers: processes that decode and augment.
        mean: of each channel, in [0, 1]; that of the data set's training images by default.
        std: likewise.
        resize: shorter side of a test image, in pixels, before its central part is taken; by default it follows from `augment`.
        interpolation: of resizing.
    """

    dataset: str
    root: Path
    image_size: int
    in_channels: int
    augment: Augment
    batch_size: int
    holdout: float
    seed: int
    workers: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: int | None = None
    interpolation: Interpolation = "bilinear"

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, in [0, 1]."""
        mean, std = normalisation(self.dataset, self.in_channels)
        return self.mean or mean, self.std or std

    @property
    def test_side(self) -> int:
        """Shorter side of a test image, in pixels, before its central part is taken."""
        return self.resize or resized(self.augment, self.image_size)


INTERPOLATIONS = {
    "bilinear": v2.InterpolationMode.BILINEAR,
    "bicubic": v2.InterpolationMode.BICUBIC,
    "nearest": v2.InterpolationMode.NEAREST_EXACT,  # the same pixels of images in memory as of files
}


def training_transforms(augment: Augment, size: int, interpolation: Interpolation = "bilinear") -> list[v2.Transform]:
    """Return what is drawn anew for each sample: crops of He et al. 2016 (padding of an eighth) or of Szegedy et al. 2015."""
    if augment == "resized-crop":
        crop_and_resize = v2.RandomResizedCrop(size, interpolation=INTERPOLATIONS[interpolation], antialias=True)
        return [crop_and_resize, v2.RandomHorizontalFlip()]
    crop = [v2.RandomCrop(size, padding=size // 8)] if augment != "none" else []
    return [*crop, v2.RandomHorizontalFlip()] if augment == "crop-flip" else list(crop)


def resized(augment: Augment, size: int) -> int:
    """Return the shorter side of a test image before its central part is taken."""
    return round(size * 256 / 224) if augment == "resized-crop" else size


def test_transforms(side: int, size: int, interpolation: Interpolation) -> list[v2.Transform]:
    """Return the transforms of a test image: its shorter side is scaled to `side`, then its central part is taken."""
    return [v2.Resize(side, interpolation=INTERPOLATIONS[interpolation], antialias=True), v2.CenterCrop(size)]


class ImageDataset(Dataset[object]):
    """Samples of a source, as uint8 tensors of one size.

    Args:
        source: where the images come from.
        in_channels: 1 or 3.
        seed: of the augmentation.
        fixed: transforms that are the same for each sample; done once where the images are in memory.
        drawn: transforms that draw from torch's global generator, seeded by sample.
    """

    def __init__(
        self, source: Source, *, in_channels: int, seed: int, fixed: list[v2.Transform], drawn: list[v2.Transform]
    ) -> None:
        self.source = source
        self.mode = "RGB" if in_channels == 3 else "L"
        self.seed = seed
        self.drawn = drawn
        if isinstance(source.images, Tensor):
            self.fixed: list[v2.Transform] = []
            self.images: Tensor | Sequence[Path] = prepared(source.images, in_channels, fixed)
        else:
            self.fixed = fixed
            self.images = source.images

    def __getitem__(self, key: Key) -> object:
        return self.__getitems__([key])

    def __getitems__(self, keys: list[Key]) -> Batch | DataError:
        """Return a batch, or the error to raise where the batch is used: raised here, a worker would wrap it."""
        indices = [index for _, index in keys]
        labels_N = self.source.labels[indices]
        if isinstance(self.images, Tensor) and not self.drawn:
            return self.images[indices], labels_N
        if isinstance(self.images, Tensor) and isinstance(crop := self.drawn[0], v2.RandomCrop):
            flip, seeds = len(self.drawn) > 1, [self._seed(*key) for key in keys]
            return cropped(self.images[indices], seeds, padding=crop.padding[0], flip=flip), labels_N
        before = torch.get_rng_state()
        try:
            return torch.stack([self._sample(*key) for key in keys]), labels_N
        except DataError as error:
            return error
        finally:
            torch.set_rng_state(before)

    def _seed(self, epoch: str, index: int) -> int:
        return derive(self.seed, "augment", epoch, index)

    def _sample(self, epoch: str, index: int) -> Tensor:
        image: Tensor | Path | Image.Image = self.images[index]
        if isinstance(image, Path):
            image = decode(image, self.mode)
        if self.drawn:
            torch.default_generator.manual_seed(self._seed(epoch, index))
        for transform in (*self.fixed, *self.drawn):
            image = transform(image)
        return image if isinstance(image, Tensor) else VF.pil_to_tensor(image)


def cropped(images_NCHW: Tensor, seeds: Sequence[int], *, padding: int, flip: bool) -> Tensor:
    """Do what torchvision's `RandomCrop` and `RandomHorizontalFlip` do to each image of a batch, in a few calls for all.

    Args:
        images_NCHW: of the size of the crop.
        seeds: of each image's draws, which are those of the two transforms one after the other.
        padding: zeros that are added on each side, in pixels.
        flip: whether half of the images are flipped.
    """
    generator = torch.Generator()
    places: list[tuple[int, int]] = []
    flipped: list[bool] = []
    for seed in seeds:
        generator.manual_seed(seed)
        draws = (int(torch.randint(2 * padding + 1, (), generator=generator)) if padding else 0 for _ in range(2))
        top, left = draws
        places.append((top, left))
        flipped.append(flip and float(torch.rand(1, generator=generator)) < 0.5)
    height, width = images_NCHW.shape[2:]
    windows = F.pad(images_NCHW, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
    tops, lefts = torch.tensor(places).unbind(1)
    crops_NCHW = windows[torch.arange(len(seeds)), :, tops, lefts]
    if flip:
        crops_NCHW[flipped] = crops_NCHW[flipped].flip(3)
    return crops_NCHW


def prepared(images: Tensor, in_channels: int, fixed: list[v2.Transform]) -> Tensor:
    """Return images in memory with the channels asked for, after the transforms that are the same for each."""
    if in_channels == 3 and images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    elif in_channels == 1 and images.shape[1] == 3:
        images = VF.rgb_to_grayscale(images)
    for transform in fixed:
        images = transform(images)
    return images.contiguous()


class Normalise:
    """Makes pixels what a network takes: less the mean, by the standard deviation, channel by channel.

    Args:
        mean: of each channel, in [0, 1].
        std: likewise.
        device: where the pixels are.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.scale = 1 / (255 * torch.tensor(std, device=device).view(1, -1, 1, 1))
        self.shift = -torch.tensor(mean, device=device).view(1, -1, 1, 1) * 255 * self.scale

    def __call__(self, pixels_NCHW: Tensor) -> Tensor:
        """Return uint8 images as normalised float32, channels_last."""
        x_NCHW = pixels_NCHW.to(torch.float32, memory_format=torch.channels_last)
        return torch.addcmul(self.shift, x_NCHW, self.scale)


class _Plan(Sampler[list[Key]]):
    """The batches to come; it may change between two passes, which persistent workers do not notice."""

    def __init__(self) -> None:
        self.batches: list[list[Key]] = []

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Loader:
    """Batches of one source on a device, normalised; nothing is opened before the first batch is asked for."""

    def __init__(
        self,
        source: Source,
        settings: DataSettings,
        device: torch.device,
        *,
        fixed: list[v2.Transform],
        drawn: list[v2.Transform],
    ) -> None:
        self.normalise = Normalise(*settings.normalisation, device)
        self.source, self.settings, self.device = source, settings, device
        self.fixed, self.drawn = fixed, drawn
        self.plan = _Plan()

    @cached_property
    def loader(self) -> Loader:
        """The worker processes, which live as long as this."""
        channels, seed = self.settings.in_channels, self.settings.seed
        dataset = ImageDataset(self.source, in_channels=channels, seed=seed, fixed=self.fixed, drawn=self.drawn)
        nothing_to_do = isinstance(dataset.images, Tensor) and not self.drawn
        workers = 0 if nothing_to_do else self.settings.workers
        return Loader(
            dataset,
            workers=workers,
            batch_sampler=self.plan,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else each pass draws from the global one
        )

    def batches(self, keys: Sequence[Key], batch_size: int) -> Iterator[Batch]:
        """Yield normalised images, float32 channels_last (N, C, H, W), and labels, (N,), of these samples in order."""
        for pixels_NCHW, labels_N in self.pixels(keys, batch_size):
            yield self.normalise(pixels_NCHW), labels_N

    def pixels(self, keys: Sequence[Key], batch_size: int) -> Iterator[Batch]:
        """Yield images as uint8 (N, C, H, W), and labels, of these samples in order."""
        self.plan.batches = [list(keys[i : i + batch_size]) for i in range(0, len(keys), batch_size)]
        for fetched in received(self.loader):
            if isinstance(fetched, DataError):
                raise fetched
            pixels_NCHW, labels_N = (part.to(self.device, non_blocking=True) for part in fetched)
            yield pixels_NCHW, labels_N


class ImageData:
    """A data set, split and ready.

    The holdout is taken from the training split, the same share of every class, and never trained on.

    Args:
        settings: which data, and how it becomes batches.
        located: its files.
        device: where the batches are wanted.

    Raises:
        DataError: where the data is not in the official format, or too little of it is left to train on.
    """

    def __init__(self, settings: DataSettings, located: Located, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        train, test = open_sources(settings.dataset, settings.root, located)
        self.classes = train.classes
        self.labels = train.labels
        self.holdout_indices = stratified(train.labels.tolist(), settings.holdout, seed=settings.seed, name="holdout")
        held = set(self.holdout_indices)
        self.train_indices = [index for index in range(len(train.labels)) if index not in held]
        holdout = f"data.holdout={100 * settings.holdout:g}%"
        if emptied := sorted(set(train.labels.tolist()) - set(train.labels[self.train_indices].tolist())):
            names = several(repr(self.classes[label]) for label in emptied)
            raise DataError(f"{holdout} leaves no training image of {names}; lower it, or add images")
        if (count := len(self.train_indices)) < settings.batch_size:
            raise DataError(
                f"{count} training images do not fill one batch: lower data.batch_size={settings.batch_size}"
                if count > 1
                else f"{count or 'no'} training image is left, and BatchNorm needs two or more: add images"
            )
        self.test_size = len(test.labels)
        fixed = test_transforms(settings.test_side, settings.image_size, settings.interpolation)
        drawn = training_transforms(settings.augment, settings.image_size, settings.interpolation)
        base = [] if settings.augment == "resized-crop" else fixed
        self._training = _Loader(train, settings, device, fixed=base, drawn=drawn)
        self._holdout = _Loader(train, settings, device, fixed=fixed, drawn=[])
        self._test = _Loader(test, settings, device, fixed=fixed, drawn=[])

    @property
    def steps_per_epoch(self) -> int:
        """Full batches of the training images; an epoch leaves out the few that do not fill one, others each time."""
        return len(self.train_indices) // self.settings.batch_size

    def _shuffled(self, indices: Sequence[int], *name: str | int) -> list[int]:
        generator = torch.Generator().manual_seed(derive(self.settings.seed, *name))
        return [indices[i] for i in torch.randperm(len(indices), generator=generator).tolist()]

    def _drawn(self, epoch: str, start: int, stop: int) -> Iterator[Batch]:
        size = self.settings.batch_size
        order = self._shuffled(self.train_indices, "order", epoch)[start * size : stop * size]
        return self._training.batches([(epoch, index) for index in order], size)

    def training(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield what is left of an epoch after `start` batches, augmented."""
        return self._drawn(str(epoch), start, self.steps_per_epoch)

    def calibration(self, batches: int) -> Iterator[Batch]:
        """Yield at most so many full batches of training images, augmented as in training."""
        return self._drawn("calibration", 0, min(batches, self.steps_per_epoch))

    def holdout(self, batch_size: int) -> Iterator[Batch]:
        """Yield every held-out image once, with the test transform."""
        return self._holdout.batches([("", index) for index in self.holdout_indices], batch_size)

    def holdout_part(self, start: int, stop: int, batch_size: int) -> Iterator[Batch]:
        """Yield some of the held-out images, with the test transform: a slice of them in an order drawn from the seed."""
        indices = sorted(self._shuffled(self.holdout_indices, "search")[start:stop])
        return self._holdout.batches([("", index) for index in indices], batch_size)

    def examples(self, count: int) -> Tensor:
        """Return so many test images, or all where there are fewer: uint8 (N, C, H, W), drawn from the seed."""
        drawn = sorted(self._shuffled(range(self.test_size), "examples")[:count])
        return torch.cat([pixels_NCHW for pixels_NCHW, _ in self._test.pixels([("", index) for index in drawn], 64)])

    def test(self, batch_size: int, batches: int | None = None) -> Iterator[Batch]:
        """Yield every test image once, with the test transform; or so many batches of images drawn from the seed."""
        indices: Sequence[int] = range(self.test_size)
        if batches is not None and batches * batch_size < self.test_size:
            indices = sorted(self._shuffled(indices, "test")[: batches * batch_size])
        return self._test.batches([("", index) for index in indices], batch_size)
