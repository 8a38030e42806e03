"""Batches of normalised images, made from the sources of a data set.

The order of an epoch is a function of (seed, epoch), and the augmentation of a sample a function of (seed, epoch, index) and of
how often the epoch had the sample before. A batch therefore depends on neither the number of workers nor the step at which
training started. Images stay uint8 until they are on the device.

Suffixes of tensor names: N images, C channels, H height, W width.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler, WeightedRandomSampler
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as VF

from sdpctl.data.cache import Cache, Content, Resized
from sdpctl.data.catalog import Augment, Decoder, Interpolation
from sdpctl.data.encoded import Task, finished, packed
from sdpctl.data.files import several
from sdpctl.data.images import decode
from sdpctl.data.pixels import INTERPOLATIONS, Middle, Part, Wanted, part_of, read, require_decoder, resized
from sdpctl.data.reader import Located
from sdpctl.data.settings import DataSettings, Preparation
from sdpctl.data.source import Source
from sdpctl.data.sources import open_sources, stratified
from sdpctl.data.transfer import to_device, transferred
from sdpctl.data.workers import Loader, received, slot_size
from sdpctl.errors import DataError, ResourceError
from sdpctl.randomness import derive

Key = tuple[str, int]
"""The name that seeds a sample's augmentation (its epoch, for example), and the sample's index."""

Batch = tuple[Tensor, Tensor]


def training_transforms(augment: Augment, size: int, interpolation: Interpolation = "bilinear") -> list[v2.Transform]:
    """Return the random crops and flips: crops of He et al. 2016 (padded by an eighth) or of Szegedy et al. 2015."""
    if augment == "resized-crop":
        crop_and_resize = v2.RandomResizedCrop(size, interpolation=INTERPOLATIONS[interpolation], antialias=True)
        return [crop_and_resize, v2.RandomHorizontalFlip()]
    crop = [v2.RandomCrop(size, padding=size // 8)] if augment != "none" else []
    return [*crop, v2.RandomHorizontalFlip()] if augment == "crop-flip" else list(crop)


def distortions(settings: DataSettings, in_channels: int) -> list[v2.Transform]:
    """Return the random transforms that follow crop and flip: automatic augmentation, and erasing.

    A rectangle is filled with the mean colour, rounded to whole pixel values. It becomes 0 when the image is normalised, as in
    torchvision's references, where images are erased after they are normalised.
    """
    transforms: list[v2.Transform] = []
    if settings.auto_augment is not None:
        augmentation = {"trivial": v2.TrivialAugmentWide, "rand": v2.RandAugment}[settings.auto_augment]
        # PIL has every interpolation; for tensors, torchvision lacks bicubic
        transforms += [v2.ToPILImage(), augmentation(interpolation=INTERPOLATIONS[settings.resampling]), v2.PILToTensor()]
    if settings.random_erasing is not None:
        mean, _ = settings.normalisation(in_channels)
        colour = [float(round(255 * channel)) for channel in mean]
        transforms += [v2.PILToTensor(), v2.RandomErasing(p=settings.random_erasing, value=colour)]
    return transforms


class ImageDataset(Dataset[object]):
    """Samples of a source, as uint8 tensors of one size.

    Args:
        source: the images and labels.
        in_channels: 1 or 3.
        seed: seed of the augmentation.
        fixed: the transform without randomness; applied only once if the images are in memory.
        drawn: random transforms, which draw from torch's global generator; it is seeded for each sample.
        interpolation: interpolation of resizing random crops.
        decoder: decoder of image files.
        presize: the transform that scales a whole image before its random crop is resized; None to crop the image itself.
        stored: the images of a cache: after `fixed`, or scaled by it, or scaled by `presize`.
    """

    def __init__(
        self,
        source: Source,
        *,
        in_channels: int,
        seed: int,
        fixed: Middle | None,
        drawn: list[v2.Transform],
        interpolation: Interpolation,
        decoder: Decoder,
        presize: Middle | None = None,
        stored: Resized | None = None,
    ) -> None:
        self.source = source
        self.in_channels = in_channels
        self.mode = "RGB" if in_channels == 3 else "L"
        self.seed, self.interpolation, self.decoder = seed, interpolation, decoder
        self.fixed, self.presize, self.drawn = fixed, presize, drawn
        self.images: Tensor | Resized | Sequence[Path]
        if isinstance(source.images, Tensor):
            self.images = prepared(source.images, in_channels, [] if fixed is None else fixed.transforms())
        else:
            self.images = source.images if stored is None else stored

    @property
    def in_memory(self) -> bool:
        """Whether the images are a tensor in memory, so that nothing has to be decoded."""
        return isinstance(self.images, Tensor)

    def __getitem__(self, key: Key) -> object:
        return self.__getitems__([key])

    def __getitems__(self, keys: list[Key]) -> tuple[Tensor, ...] | DataError:
        """Return images and labels, or with `decoder: nvjpeg` two tensors for `pixels` and the labels.

        An error is returned, for the caller to raise; a worker would wrap an error that is raised here.
        """
        labels_N = self.source.labels[[index for _, index in keys]]
        before = torch.get_rng_state()
        try:
            if self.on_device:
                return *packed([self._task(*key) for key in keys]), labels_N
            return self._pixels(keys), labels_N
        except DataError as error:
            return error
        finally:
            torch.set_rng_state(before)

    @property
    def on_device(self) -> bool:
        """Whether the device decodes the images."""
        return self.decoder == "nvjpeg" and not self.in_memory

    def pixels(self, parts: Sequence[Tensor], keys: Sequence[Key], device: torch.device) -> Tensor:
        """Return the images of a batch on a device, uint8 (N, C, H, W).

        Args:
            parts: what `__getitems__` returned, without the labels.
            keys: the keys of the batch.
            device: the device.
        """
        if not self.on_device:
            (images_NCHW,) = parts
            return to_device(images_NCHW, device)
        content, table = parts
        first = self.drawn[0] if self.drawn else None
        size = first.size[0] if isinstance(first, v2.RandomResizedCrop) else self._middle.size
        images_NCHW = finished(
            content,
            table,
            mode=self.mode,
            size=size,
            interpolation=self.interpolation,
            device=device,
            again=lambda i: self._on_cpu(keys[i]),
        )
        if isinstance(first, v2.RandomCrop):
            seeds = [self._seed(*key) for key in keys]
            return cropped(images_NCHW, seeds, padding=first.padding[0], flip=len(self.drawn) > 1)
        return images_NCHW

    def _task(self, epoch: str, index: int) -> Task:
        """Return what the device has to do for an image; random crops of a fixed size are taken afterwards."""
        path, resized_crop = self.images[index], self.drawn[0] if self.drawn else None
        if not isinstance(path, Path):
            raise TypeError("only files are decoded on the device")
        file = read(path, self.mode)
        if isinstance(file, Image.Image):
            return Task(self._on_cpu((epoch, index)))
        if not isinstance(resized_crop, v2.RandomResizedCrop):
            return Task.of(file, self._middle.scaled(file.height, file.width), flip=False)
        torch.default_generator.manual_seed(self._seed(epoch, index))
        wanted = drawn_part(resized_crop, file.height, file.width)
        return Task.of(file, wanted, flip=float(torch.rand(1)) < 0.5)

    def _on_cpu(self, key: Key) -> Tensor:
        """Return the image of a file that the device does not decode, without a random crop of a fixed size."""
        if not self.drawn or not isinstance(self.drawn[0], v2.RandomResizedCrop):
            return self._still(key[1])
        with torch.random.fork_rng(devices=()):
            return self._sample(*key)

    def _pixels(self, keys: list[Key]) -> Tensor:
        if not self.drawn:
            return self._unchanged([index for _, index in keys])
        if isinstance(crop := self.drawn[0], v2.RandomCrop) and self._only_crops:
            images_NCHW, seeds = self._unchanged([index for _, index in keys]), [self._seed(*key) for key in keys]
            return cropped(images_NCHW, seeds, padding=crop.padding[0], flip=len(self.drawn) > 1)
        return _together([self._sample(*key) for key in keys])

    @property
    def _only_crops(self) -> bool:
        return all(isinstance(transform, v2.RandomCrop | v2.RandomHorizontalFlip) for transform in self.drawn)

    def _seed(self, epoch: str, index: int) -> int:
        return derive(self.seed, "augment", epoch, index)

    def _unchanged(self, indices: list[int]) -> Tensor:
        """Return images after the fixed transform."""
        return self.images[indices] if isinstance(self.images, Tensor) else _together([self._still(i) for i in indices])

    def _still(self, index: int) -> Tensor:
        """Return an image that is not in memory after the fixed transform."""
        image: Path | Tensor = self.images[index]
        return self._middle.of(image, self.mode, self.decoder) if isinstance(image, Path) else self._middle.centred(image)

    @property
    def _middle(self) -> Middle:
        if self.fixed is None:
            raise TypeError("these images are cropped at random, and have no fixed transform")
        return self.fixed

    def _sample(self, epoch: str, index: int) -> Tensor:
        """Return an image after the random transforms."""
        torch.default_generator.manual_seed(self._seed(epoch, index))
        first, *others = self.drawn
        image: Tensor | Image.Image
        if isinstance(first, v2.RandomResizedCrop) and not isinstance(self.images, Tensor):
            image = self._part(self.images[index], first)
        else:
            image = first(self.images[index] if isinstance(self.images, Tensor) else self._still(index))
        for transform in others:
            if isinstance(transform, v2.RandomHorizontalFlip) and isinstance(image, Tensor):  # quicker than the transform
                image = image.flip(2) if float(torch.rand(1)) < transform.p else image
            else:
                image = transform(image)
        return image if isinstance(image, Tensor) else VF.pil_to_tensor(image)

    def _part(self, image: Path | Tensor, crop: v2.RandomResizedCrop) -> Tensor | Image.Image:
        """Return a random part of an image, resized."""
        if isinstance(image, Path) and self.presize is not None:
            image = self.presize.of(image, self.mode, self.decoder, whole=True)
        if isinstance(image, Path) and self.decoder == "pil":
            part: Image.Image = crop(decode(image, self.mode))
            return part
        choose = partial(drawn_part, crop)
        if isinstance(image, Path):
            return part_of(image, self.mode, choose, self.interpolation, shrinks=True)
        return resized(image, choose(*image.shape[1:]), self.interpolation)


def _together(images: Sequence[Tensor]) -> Tensor:
    """Return images of one size as a batch in channels_last, which is how they are decoded and resized."""
    batch_NCHW = torch.empty((len(images), *images[0].shape), dtype=torch.uint8, memory_format=torch.channels_last)
    for place_CHW, image_CHW in zip(batch_NCHW, images, strict=True):
        place_CHW.copy_(image_CHW)
    return batch_NCHW


def drawn_part(crop: v2.RandomResizedCrop, height: int, width: int) -> Wanted:
    """Draw the part of an image that torchvision's `RandomResizedCrop` would take, from torch's global generator."""
    image_CHW = torch.empty(1).expand(1, height, width)  # the transform looks at its size only
    drawn = crop.make_params([image_CHW])
    return Wanted(Part(drawn["top"], drawn["left"], drawn["height"], drawn["width"]), *crop.size)


def cropped(images_NCHW: Tensor, seeds: Sequence[int], *, padding: int, flip: bool) -> Tensor:
    """Apply torchvision's `RandomCrop` and `RandomHorizontalFlip` to each image of a batch, with a few calls per batch.

    Args:
        images_NCHW: uint8, of the size of the crop.
        seeds: seed of each image; the draws equal those of the two transforms applied one after the other.
        padding: width of the zeros added on each side, in pixels.
        flip: whether an image is flipped with probability one half.
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
    """Return images with `in_channels` channels, after the fixed transforms."""
    if in_channels == 3 and images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    elif in_channels == 1 and images.shape[1] == 3:
        images = VF.rgb_to_grayscale(images)
    for transform in fixed:
        images = transform(images)
    return images.contiguous()


class Normalise:
    """Normalise pixels: subtract the mean and divide by the standard deviation of each channel.

    Args:
        mean: mean of each channel, in [0, 1].
        std: standard deviation of each channel, in [0, 1].
        device: device of the pixels.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.scale = 1 / (255 * torch.tensor(std, device=device).view(1, -1, 1, 1))
        self.shift = -torch.tensor(mean, device=device).view(1, -1, 1, 1) * 255 * self.scale

    def __call__(self, pixels_NCHW: Tensor) -> Tensor:
        """Return uint8 images as normalised float32, channels_last."""
        x_NCHW = pixels_NCHW.to(torch.float32, memory_format=torch.channels_last)
        if x_NCHW.device.type == "cpu":  # vectorised: otherwise the CPU's kernel loops over the channels of each pixel
            shape_1CHW = (1, *x_NCHW.shape[1:])
            shift, scale = (
                values.expand(shape_1CHW).contiguous(memory_format=torch.channels_last) for values in (self.shift, self.scale)
            )
            return torch.addcmul(shift, x_NCHW, scale, out=x_NCHW)
        return torch.addcmul(self.shift, x_NCHW, self.scale)


def presized(settings: DataSettings) -> Middle:
    """Return the transform that scales a whole image before its random crop is resized."""
    return Middle(settings.side_of(settings.image_size), settings.image_size, settings.resampling)


class _Plan(Sampler[list[Key]]):
    """The batches of the next pass. They may change between passes without restarting persistent workers."""

    def __init__(self) -> None:
        self.batches: list[list[Key]] = []

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Loader:
    """Loads normalised batches of one source to a device; the workers start with the first batch.

    Args:
        source: the images and labels.
        settings: the section `data` of a recipe.
        device: device of the batches.
        in_channels: 1 or 3.
        seed: seed of the augmentation.
        fixed: the transform without randomness, if there is one.
        drawn: random transforms.
        size: height and width of a sample, in pixels.
        stored: returns the images of a cache; None if they are not cached.
    """

    def __init__(
        self,
        source: Source,
        settings: DataSettings,
        device: torch.device,
        *,
        in_channels: int,
        seed: int,
        fixed: Middle | None,
        drawn: list[v2.Transform],
        size: int,
        stored: Callable[[], Resized] | None = None,
    ) -> None:
        self.normalise = Normalise(*settings.normalisation(in_channels), device)
        self.source, self.settings, self.device = source, settings, device
        self.in_channels, self.seed = in_channels, seed
        self.fixed, self.drawn, self.size = fixed, drawn, size
        self.stored = stored
        self.plan = _Plan()

    @cached_property
    def dataset(self) -> ImageDataset:
        """The samples; a cache is made now unless an earlier command made it."""
        settings = self.settings
        return ImageDataset(
            self.source,
            in_channels=self.in_channels,
            seed=self.seed,
            fixed=self.fixed,
            drawn=self.drawn,
            interpolation=settings.resampling,
            decoder=settings.decoder,
            presize=presized(settings) if settings.presizes else None,
            stored=None if self.stored is None else self.stored(),
        )

    @cached_property
    def loader(self) -> Loader:
        """The worker processes; they live as long as this object."""
        workers = 0 if self.dataset.in_memory and not self.drawn else self.settings.processes
        largest = max(map(len, self.plan.batches), default=0)
        size = slot_size(largest * self.in_channels * self.size**2, largest * self.source.labels.element_size())
        return Loader(self.dataset, workers=workers, batches=self.plan, size=size)

    def batches(self, batches: list[list[Key]]) -> Iterator[Batch]:
        """Yield normalised images, float32 (N, C, H, W) in channels_last, and labels, int64 (N,), of each batch in order.

        Raises:
            ResourceError: if the device is to decode, and is a CPU.
        """
        if self.dataset.on_device and self.device.type == "cpu":
            raise ResourceError(
                "data.decoder=nvjpeg decodes on an NVIDIA GPU, and this command runs on the CPU; set data.decoder=torchvision"
            )
        for pixels_NCHW, labels_N in self.pixels(batches):
            yield self.normalise(pixels_NCHW), labels_N.clone()

    def pixels(self, batches: list[list[Key]]) -> Iterator[Batch]:
        """Yield images, uint8 (N, C, H, W), and labels, int64 (N,), of each batch in order.

        A batch on the CPU is overwritten when the next one is asked for.
        """
        self.plan.batches = batches
        yield from transferred(self._fetched(), self._moved, self.device)

    def _fetched(self) -> Iterator[tuple[list[Key], tuple[Tensor, ...]]]:
        """Yield the keys of each batch and what a worker made of them.

        Raises:
            DataError: if an image cannot be decoded.
        """
        for keys, fetched in zip(self.plan.batches, received(self.loader), strict=True):
            if isinstance(fetched, DataError):
                raise fetched
            yield keys, fetched

    def _moved(self, batch: tuple[list[Key], tuple[Tensor, ...]]) -> Batch:
        keys, (*parts, labels_N) = batch
        return self.dataset.pixels(parts, keys, self.device), to_device(labels_N, self.device)


def share_of(count: int, rank: int, ranks: int) -> slice:
    """Return a process's contiguous part of a batch; the parts of two processes differ by at most one image."""
    return slice(count * rank // ranks, count * (rank + 1) // ranks)


class ImageData:
    """The batches of a data set: for training, calibration, the holdout and the test split.

    The holdout is the same share of every class of the training split, and is never trained on.

    Args:
        settings: the section `data` of a recipe.
        located: the files of the data set.
        device: device of the batches.
        in_channels: channels of an image, 1 or 3; colour becomes grey, and grey becomes colour, as needed.
        seed: seed of order, augmentation and holdout.
        scored_size: height and width of a test image and of a held-out image, in pixels; `image_size` by default.
        rank: number of this process among those that share the images.
        ranks: number of these processes. A process has its contiguous part of each training batch, whole calibration batches
            `rank`, `rank + ranks` and so on, and images `rank`, `rank + ranks` and so on of the held-out and test images.
        cache: keeps resized images; None to decode the files for each batch.

    Raises:
        DataError: if the data is not in the official format, or if too few training images are left.
        ResourceError: if torchvision cannot decode JPEGs and the decoder is not `pil`.
    """

    def __init__(
        self,
        settings: DataSettings,
        located: Located,
        device: torch.device,
        *,
        in_channels: int,
        seed: int,
        scored_size: int | None = None,
        rank: int = 0,
        ranks: int = 1,
        cache: Cache | None = None,
    ) -> None:
        self.settings, self.seed = settings, seed
        self.rank, self.ranks, self.cache = rank, ranks, cache
        self.device = device
        train, test = open_sources(settings.dataset, settings.folder, located)
        if settings.decoder != "pil" and not isinstance(train.images, Tensor):
            require_decoder()
        self.classes = train.classes
        self.labels = train.labels
        self.holdout_indices = stratified(train.labels.tolist(), settings.holdout, seed=seed, name="holdout")
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
        self.scored_size = size = scored_size or settings.image_size
        fixed = self._middle(size)
        base = self._base(settings.preparation)
        loader = partial(_Loader, settings=settings, device=device, in_channels=in_channels, seed=seed)

        scaled_once = presized(settings) if settings.presizes else base
        mode = "RGB" if in_channels == 3 else "L"

        def stored(source: Source, part: Sequence[tuple[str, int]], middle: Middle | None) -> Callable[[], Resized] | None:
            """Return a function that makes or opens the cache of a source at its first call; None if there is no cache."""
            if cache is None or middle is None or isinstance(source.images, Tensor):
                return None
            names, whole = [name for name, _ in part], middle is scaled_once and settings.presizes
            content = Content.of(cache.fingerprint, names, mode, settings.decoder, middle, whole=whole)
            load = partial(middle.of, mode=mode, decoder=settings.decoder, whole=whole)
            return lru_cache(partial(cache.resized, content, source.images, load, settings.processes))

        of_training = stored(train, located.train, scaled_once)
        of_holdout = of_training if fixed == scaled_once else None  # at a different size, the few images are decoded each time
        self._scaled_once, self._of_training = scaled_once, of_training
        self._training = self._training_loader(train, in_channels, settings.preparation)
        self._prepared = {settings.preparation: self._training}
        self._holdout = loader(train, fixed=fixed, drawn=[], size=size, stored=of_holdout)
        self._test = loader(test, fixed=fixed, drawn=[], size=size, stored=stored(test, located.test, fixed))

    def _middle(self, size: int) -> Middle:
        """Return the test transform for images of a size, in pixels; `data.resize` belongs to images that are scored."""
        settings = self.settings
        side = settings.side_of(size) if settings.resize is None else round(settings.resize * size / self.scored_size)
        return Middle(side, size, settings.resampling)

    def _base(self, preparation: Preparation) -> Middle | None:
        """Return the part of the transform of training images that is not random; None if there is no such part."""
        crops = preparation.augmented and self.settings.augment == "resized-crop"
        return None if crops else self._middle(preparation.image_size)

    def _training_loader(
        self,
        source: Source,
        in_channels: int,
        preparation: Preparation,
    ) -> _Loader:
        """Return a loader of training images; those at a different size than the training's are decoded each time."""
        size = preparation.image_size
        settings, drawn = replace(self.settings, image_size=size), list[v2.Transform]()
        if preparation.augmented:
            drawn += training_transforms(settings.augment, size, settings.resampling) + distortions(settings, in_channels)
        base = self._base(preparation)
        once = presized(settings) if preparation.augmented and settings.presizes else base
        return _Loader(
            source,
            settings,
            self.device,
            in_channels=in_channels,
            seed=self.seed,
            fixed=base,
            drawn=drawn,
            size=size,
            stored=self._of_training if once == self._scaled_once else None,
        )

    def _calibrating(self, preparation: Preparation | None) -> _Loader:
        """Return the loader of calibration images; by default they are prepared as in training."""
        preparation = preparation or self.settings.preparation
        if preparation not in self._prepared:
            training = self._training
            self._prepared[preparation] = self._training_loader(training.source, training.in_channels, preparation)
        return self._prepared[preparation]

    def fill_cache(self, name: str, preparation: Preparation | None = None) -> None:
        """Resize the images of a cache now, unless this was done; otherwise the first batch waits for it.

        Args:
            name: `training`, `calibration`, `test`, `holdout` or `holdout_part`, a method that yields batches.
            preparation: of `calibration`: how the images are prepared; as in training by default.
        """
        loader = {"test": self._test, "holdout": self._holdout, "holdout_part": self._holdout}.get(name)
        if (stored := (loader or self._calibrating(preparation)).stored) is not None:
            stored()

    @property
    def steps_per_epoch(self) -> int:
        """Number of full batches in an epoch; the images left over differ from epoch to epoch."""
        return len(self.train_indices) // self.settings.batch_size

    def _shuffled(self, indices: Sequence[int], *name: str | int) -> list[int]:
        generator = torch.Generator().manual_seed(derive(self.seed, *name))
        return [indices[i] for i in torch.randperm(len(indices), generator=generator).tolist()]

    @cached_property
    def _class_counts(self) -> Tensor:
        """The number of training images of each class, without the holdout."""
        return torch.bincount(self.labels[self.train_indices], minlength=len(self.classes))

    @property
    def class_weights(self) -> Tensor | None:
        """The weight of each class in the training loss, n/(K*n_c); 0 for a class without images. None for equal weights."""
        if self.settings.balance != "loss":
            return None
        counts_K = self._class_counts
        weights_K = len(self.train_indices) / (counts_K.count_nonzero() * counts_K)
        return weights_K.where(counts_K > 0, 0).to(self.device)

    def _order(self, epoch: str) -> list[Key]:
        """Return the keys of an epoch: each training image once, or with `balance: sampler` each class equally often."""
        if self.settings.balance != "sampler":
            return [(epoch, index) for index in self._shuffled(self.train_indices, "order", epoch)]
        weights = (1 / self._class_counts)[self.labels[self.train_indices]]
        generator = torch.Generator().manual_seed(derive(self.seed, "order", epoch))
        keys, seen = [], Counter[int]()
        for place in WeightedRandomSampler(weights.tolist(), len(weights), generator=generator):
            index = self.train_indices[place]
            keys.append((f"{epoch}/{seen[index]}", index))  # an image that is drawn again is augmented differently
            seen[index] += 1
        return keys

    def _cut(self, epoch: str, start: int, stop: int, size: int) -> list[list[Key]]:
        keys = self._order(epoch)
        return [keys[i * size : (i + 1) * size] for i in range(start, stop)]

    def _scored(self, loader: _Loader, indices: Sequence[int], batch_size: int) -> Iterator[Batch]:
        keys = [("", index) for index in indices[self.rank :: self.ranks]]
        size = -(-batch_size // self.ranks)
        return loader.batches([keys[i : i + size] for i in range(0, len(keys), size)])

    def batches_to_score(self, images: int, batch_size: int) -> int:
        """Return the number of this process's batches if all processes together score a number of images."""
        return -(-len(range(self.rank, images, self.ranks)) // -(-batch_size // self.ranks))

    def training(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the augmented batches of an epoch from batch `start` on."""
        whole = self._cut(str(epoch), start, self.steps_per_epoch, self.settings.batch_size)
        return self._training.batches([keys[share_of(len(keys), self.rank, self.ranks)] for keys in whole])

    def calibration_batches(self, batches: int, preparation: Preparation) -> int:
        """Return the number of batches of all processes that `calibration` yields.

        Args:
            batches: maximum number of batches.
            preparation: how the images are prepared.

        Raises:
            DataError: if the training images do not fill one batch.
        """
        count, size = len(self.train_indices), preparation.batch_size
        if count < size:
            raise DataError(f"{count} training images do not fill one batch: lower calibrate.batch_size={size}")
        return min(batches, count // size)

    def calibration(self, batches: int, preparation: Preparation | None = None) -> Iterator[Batch]:
        """Yield at most `batches` full batches of training images.

        Args:
            batches: maximum number of batches of all processes.
            preparation: how the images are prepared; as in training by default.
        """
        preparation = preparation or self.settings.preparation
        whole = self._cut("calibration", 0, self.calibration_batches(batches, preparation), preparation.batch_size)
        return self._calibrating(preparation).batches(whole[self.rank :: self.ranks])

    def finetuning(self, name: str, steps: int, preparation: Preparation) -> Iterator[Batch]:
        """Yield a whole batch of training images for each step of a fine-tuning, the same on every process.

        Args:
            name: determines order and augmentation, together with the seed.
            steps: number of batches; the images are shuffled anew after each pass over them.
            preparation: how the images become batches.
        """
        whole, epoch = list[list[Key]](), 0
        while len(whole) < steps:
            count = self.calibration_batches(steps - len(whole), preparation)
            whole += self._cut(f"finetune/{name}/{epoch}", 0, count, preparation.batch_size)
            epoch += 1
        return self._calibrating(preparation).batches(whole)

    def holdout(self, batch_size: int) -> Iterator[Batch]:
        """Yield every held-out image once, with the test transform."""
        return self._scored(self._holdout, self.holdout_indices, batch_size)

    def holdout_part(self, start: int, stop: int, batch_size: int) -> Iterator[Batch]:
        """Yield the held-out images `start` to `stop` of an order drawn from the seed, with the test transform."""
        indices = sorted(self._shuffled(self.holdout_indices, "search")[start:stop])
        return self._scored(self._holdout, indices, batch_size)

    def examples(self, count: int) -> Tensor:
        """Return at most `count` test images, drawn from the seed: uint8 (N, C, H, W)."""
        return self.pictures(sorted(self._shuffled(range(self.test_size), "examples")[:count]))

    def pictures(self, indices: Sequence[int]) -> Tensor:
        """Return test images by their place in the test split: uint8 (N, C, H, W)."""
        return self._pixels(self._test, indices)

    def training_examples(self, count: int) -> Tensor:
        """Return at most `count` training images, drawn from the seed, with the test transform: uint8 (N, C, H, W)."""
        return self._pixels(self._holdout, sorted(self._shuffled(self.train_indices, "examples")[:count]))

    def _pixels(self, loader: _Loader, indices: Sequence[int]) -> Tensor:
        keys = [("", index) for index in indices]
        batches = [keys[i : i + 64] for i in range(0, len(keys), 64)]
        return torch.cat([pixels_NCHW.clone() for pixels_NCHW, _ in loader.pixels(batches)])

    def test_pixels(self, batch_size: int) -> Iterator[Batch]:
        """Yield every test image once with the test transform, uint8 (N, C, H, W), and the labels, int64 (N,).

        A batch is overwritten when the next one is asked for.
        """
        keys = [("", index) for index in range(self.test_size)]
        return self._test.pixels([keys[i : i + batch_size] for i in range(0, len(keys), batch_size)])

    def test(self, batch_size: int, batches: int | None = None) -> Iterator[Batch]:
        """Yield every test image once, with the test transform; with `batches`, this number of batches, drawn from the seed."""
        indices: Sequence[int] = range(self.test_size)
        if batches is not None and batches * batch_size < self.test_size:
            indices = sorted(self._shuffled(indices, "test")[: batches * batch_size])
        return self._scored(self._test, indices, batch_size)
