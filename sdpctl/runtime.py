"""A network that chooses its instance, or a cascade of instances, within a budget, call by call.

All instances share the weights. An instance differs only in the mean and variance of each batch norm channel, and instances
share these too where their paths in the tree are the same. A call does not change the network, so several threads may call it
at the same time.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as VF

from sdpctl.budget import Budget
from sdpctl.cascade import Cascade
from sdpctl.data.images import converted, decode
from sdpctl.data.loader import Normalise
from sdpctl.data.pixels import Middle
from sdpctl.engine.calibrate import CalibratedNorms
from sdpctl.engine.cascade import CascadeRun
from sdpctl.engine.device import autocast, pick_device
from sdpctl.engine.settings import Precision
from sdpctl.engine.tree import Tree
from sdpctl.engine.weights import fill
from sdpctl.errors import BudgetError, DataError, IntegrityError, NotFoundError, UsageError
from sdpctl.export.bundle import Bundle, only_needed, read_bundle
from sdpctl.export.description import CascadeOption, Description, Option, most_accurate
from sdpctl.export.latency import Latencies, named_among, torch_threads
from sdpctl.export.run_folder import LATENCY, WARMUP, latency_row, machine, machine_text, measured
from sdpctl.instance import Instance
from sdpctl.models import empty_model

Picture = str | Path | Image.Image | NDArray[np.uint8] | Tensor
"""The path of an image file, or its pixels."""


class Runtime:
    """A network of many instances, on one device.

    Args:
        bundle: description, weights and statistics.
        device: `auto` (CUDA if the machine has it, else the CPU), `cpu`, `cuda` or `cuda:1`.
        precision: `fp32`, or `bf16` under autocast.

    Raises:
        IntegrityError: if the weights have a different number of classes than the description.
        NotFoundError: if an instance has no statistics.
        ResourceError: if the machine does not have the device.
        UsageError: if the precision is unknown.
    """

    def __init__(self, bundle: Bundle, *, device: str = "auto", precision: Precision = "fp32") -> None:
        if precision not in ("fp32", "bf16"):
            raise UsageError(f"precision {precision!r}: choose fp32 or bf16")
        self.description: Description = bundle.description
        self.device = pick_device(device)
        self.precision: Precision = precision
        model = empty_model(self.description.network)
        model.to_empty(device="cpu")
        if not fill(model, dict(bundle.weights)):
            raise IntegrityError(
                f"{self.description.name}: the weights have a different number of classes than the description; export it again"
            )
        self.network = model.to(self.device).channels_last().eval()
        statistics = only_needed(bundle.statistics, self.network, self.description)
        self._norms = CalibratedNorms(self.network, statistics.to(self.device))
        self._trees = {option.instance: Tree(self.network, [option.instance]) for option in self.instances}
        self._cascades = {option.cascade: CascadeRun(self.network, option.cascade, self._norms) for option in self.cascades}
        self._milliseconds: dict[int, Mapping[Instance, float]] = {}
        self.refused_latencies: str | None = None
        """Why the table of the bundle's latency.json is not used, if it is not."""
        if bundle.latencies is not None:
            self._keep(bundle.latencies)
        takes = self.description.input
        self._normalise = Normalise(takes.mean, takes.std, torch.device("cpu"))
        self._fixed = v2.Compose(Middle(takes.resize, takes.size, takes.interpolation).transforms())

    @property
    def instances(self) -> tuple[Option, ...]:
        """The instances with their cost and accuracy, the cheapest first."""
        return self.description.options

    @property
    def cascades(self) -> tuple[CascadeOption, ...]:
        """The cascades with their mean cost and accuracy, the cheapest on held-out images first."""
        return self.description.cascades

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the logits."""
        return self.description.classes

    def __call__(
        self,
        x_NCHW: Tensor,
        *,
        max_macs: str | float | None = None,
        max_latency_ms: float | None = None,
        instance: Instance | str | None = None,
        cascade: Cascade | str | bool = False,
    ) -> Tensor:
        """Run one instance, or a cascade of instances, on a batch. The arguments choose it as in `pick`.

        Args:
            x_NCHW: normalised images of the input size of the network, on any device.
            max_macs: maximum MACs per image: a number, `1.2G`, or a share of `full` such as `50%`. For a cascade, the budget is
                for the mean over the held-out images.
            max_latency_ms: maximum latency of this call in milliseconds, as measured by `measure_latency`, or by the command
                `sdpctl latency` on this machine.
            instance: the instance to run.
            cascade: whether to run a cascade; or the cascade to run, any cascade of the instances in the bundle.

        Returns:
            Logits, (N, K), float32, on the device of the network; of a cascade, log-probabilities.

        Raises:
            BudgetError: if no instance or cascade is within the budget.
            InstanceError: if the cascade cannot be parsed.
            NotFoundError: if the instance or cascade is not in the bundle.
            UsageError: if the images have a different shape or dtype, the latency was not measured, or arguments exclude each
                other.
        """
        self._check_images(x_NCHW)
        if cascade is False:
            size = max(1, len(x_NCHW))
            option = self.pick(max_macs=max_macs, max_latency_ms=max_latency_ms, instance=instance, batch_size=size)
            return self._run(x_NCHW, option.instance)
        check_cascade(cascade, max_macs, max_latency_ms, instance)
        log_probabilities_NK, _ = self.run_cascade(x_NCHW, self._best_cascade(max_macs).cascade if cascade is True else cascade)
        return log_probabilities_NK

    def run_cascade(self, x_NCHW: Tensor, cascade: Cascade | str) -> tuple[Tensor, Tensor]:
        """Run a cascade on a batch. Each member runs once, on the images that no earlier member answered.

        Args:
            x_NCHW: normalised images of the input size of the network, on any device.
            cascade: any cascade of the instances in the bundle.

        Returns:
            Log-probabilities, (N, K), float32, and the number of the member that answered each image, (N,), int64, both on the
            device of the network.

        Raises:
            InstanceError: if the cascade cannot be parsed, or two of its members are the same network.
            NotFoundError: if a member is not in the bundle.
            UsageError: if the images have a different shape or dtype.
        """
        self._check_images(x_NCHW)
        cascade = Cascade.of(cascade)
        for member in cascade.members:
            self._named(member)
        run = self._cascades.get(cascade) or CascadeRun(self.network, cascade, self._norms)
        with torch.inference_mode(), autocast(self.device, self.precision):
            return run(self._on_device(x_NCHW))

    def _check_images(self, x_NCHW: Tensor) -> None:
        takes, channels = self.description.input, self.description.network.in_channels
        if not isinstance(x_NCHW, Tensor):
            raise UsageError(f"images must be a tensor, got {type(x_NCHW).__name__}; `preprocess` turns an image into one")
        if not x_NCHW.is_floating_point() or tuple(x_NCHW.shape[1:]) != (channels, takes.size, takes.size):
            raise UsageError(
                f"images of dtype {x_NCHW.dtype} and shape {tuple(x_NCHW.shape)}: this network takes normalised images of "
                f"shape (N, {channels}, {takes.size}, {takes.size}); `preprocess` turns an image into one"
            )

    def _on_device(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW.to(self.device, torch.float32, non_blocking=True, memory_format=torch.channels_last)

    @torch.inference_mode()
    def _run(self, x_NCHW: Tensor, instance: Instance) -> Tensor:
        with autocast(self.device, self.precision):
            return self._trees[instance].walk(self._on_device(x_NCHW), self._norms)[instance].float()

    @overload
    def pick(
        self,
        *,
        max_macs: str | float | None = None,
        max_latency_ms: float | None = None,
        instance: Instance | str | None = None,
        batch_size: int = 1,
        cascade: Literal[False] = False,
    ) -> Option: ...

    @overload
    def pick(
        self,
        *,
        max_macs: str | float | None = None,
        max_latency_ms: float | None = None,
        instance: Instance | str | None = None,
        batch_size: int = 1,
        cascade: Cascade | str | Literal[True],
    ) -> CascadeOption: ...

    def pick(
        self,
        *,
        max_macs: str | float | None = None,
        max_latency_ms: float | None = None,
        instance: Instance | str | None = None,
        batch_size: int = 1,
        cascade: Cascade | str | bool = False,
    ) -> Option | CascadeOption:
        """Return the instance or cascade that a call would run: the named one, or the most accurate one within the budgets.

        Accuracy is the accuracy on the held-out images. Of two equally accurate instances, the cheaper one is chosen. Without a
        budget every instance may be chosen. The cost of a cascade is its mean MACs per held-out image. The latency of a cascade
        depends on the images, so no cascade is chosen by it.

        Args:
            max_macs: maximum MACs per image: a number, `1.2G`, or a share of `full` such as `50%`.
            max_latency_ms: maximum latency of a batch in milliseconds.
            instance: the instance to return.
            batch_size: size of the batch that `max_latency_ms` refers to.
            cascade: whether to choose among the cascades; or the cascade to return, one of `cascades`.

        Raises:
            BudgetError: if no instance or cascade is within the budget; the message names the cheapest.
            InstanceError: if the cascade cannot be parsed.
            NotFoundError: if the instance or cascade is not in the bundle, or there is no held-out accuracy to choose by.
            UsageError: if both an instance and a budget are given, or the latency was not measured; or if a cascade is given
                together with an instance or a latency.
        """
        if cascade is not False:
            check_cascade(cascade, max_macs, max_latency_ms, instance)
            return self._best_cascade(max_macs) if cascade is True else self._named_cascade(Cascade.of(cascade))
        if instance is not None:
            if max_macs is not None or max_latency_ms is not None:
                raise UsageError("an instance and a budget exclude each other; give one")
            return self._named(Instance.of(instance))
        within, asked = self.instances, []
        if max_macs is not None:
            limit = Budget.parse(max_macs).macs(self.description.full_macs)
            within = tuple(option for option in within if option.macs <= limit)
            asked.append(f"{limit:,} MACs")
        if max_latency_ms is not None:
            if not max_latency_ms > 0:
                raise UsageError(f"max_latency_ms is {max_latency_ms}; give milliseconds above 0")
            milliseconds = self._measured(batch_size)
            within = tuple(option for option in within if milliseconds[option.instance] <= max_latency_ms)
            asked.append(f"{max_latency_ms:g} ms")
        if not within:
            raise BudgetError(f"no instance is within {' and '.join(asked)}; the cheapest, {self._cheapest(batch_size)}")
        if any(option.heldout_top1 is None for option in within):
            raise NotFoundError(
                f"{self.description.name}: there is no held-out accuracy to choose by; name an instance, or, if images are "
                f"held out, run `sdpctl eval-instances {self.description.name} --split holdout` first"
            )
        return max(within, key=lambda option: (option.heldout_top1 or 0, -option.macs))

    def _named(self, instance: Instance) -> Option:
        for option in self.instances:
            if option.instance == instance:
                return option
        names = ", ".join(str(option.instance) for option in self.instances)
        raise NotFoundError(f"{self.description.name} has no instance {instance}; it has {names}")

    def _best_cascade(self, max_macs: str | float | None) -> CascadeOption:
        if not self.cascades:
            raise self._without_cascades()
        limit = self.cascades[-1].heldout_macs if max_macs is None else Budget.parse(max_macs).macs(self.description.full_macs)
        return most_accurate(self.cascades, limit)

    def _named_cascade(self, cascade: Cascade) -> CascadeOption:
        if not self.cascades:
            raise self._without_cascades()
        for option in self.cascades:
            if option.cascade == cascade:
                return option
        names = ", ".join(str(option.cascade) for option in self.cascades)
        raise NotFoundError(f"{self.description.name} has no results for the cascade {cascade}; it has results for {names}")

    def _without_cascades(self) -> NotFoundError:
        name = self.description.name
        return NotFoundError(
            f"{name} has no cascade to choose; `sdpctl search {name} --cascade --max-macs 50%` makes some, and then "
            f"`sdpctl export {name} --format bundle` takes them along"
        )

    def _measured(self, batch_size: int) -> Mapping[Instance, float]:
        milliseconds = self._milliseconds
        known = [size for size in milliseconds if size >= batch_size]
        if not known:
            reason = f" ({self.refused_latencies})" if self.refused_latencies else ""
            raise UsageError(
                f"the latency of a batch of {batch_size} was not measured{reason}; call measure_latency({batch_size}) first"
            )
        return milliseconds[min(known)]

    def _cheapest(self, batch_size: int) -> str:
        option = self.instances[0]
        text = f"{option.instance}, takes {option.macs:,} MACs"
        if self.knows_latency(batch_size):
            times = self._measured(batch_size)
            quickest = min(times, key=lambda instance: times[instance])
            text += f", the quickest, {quickest}, {times[quickest]:.3g} ms"
        return text

    @property
    def machine(self) -> dict[str, Any]:
        """What a latency depends on here, except for the network: device, cores, threads, library and precision."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        return machine(f"torch {torch.__version__}", torch.get_num_threads(), device, self.precision)

    def knows_latency(self, batch_size: int) -> bool:
        """Return whether the latency of a batch of this size, or of a larger one, was measured."""
        return any(size >= batch_size for size in self._milliseconds)

    def _keep(self, latencies: Mapping[str, Any]) -> None:
        """Use the table of a bundle's latency.json if it was measured on this machine, and remember why if it was not."""
        if latencies["machine"] != self.machine:
            there, here = machine_text(latencies["machine"]), machine_text(self.machine)
            self.refused_latencies = f"{LATENCY} was measured on {there}, and this is {here}"
            return
        for row in latencies["rows"]:
            kept = self._milliseconds.get(row["batch"], {})
            self._milliseconds[row["batch"]] = {**kept, Instance.parse(row["instance"]): row["median_ms"]}

    def measure_latency(self, batch_size: int = 1, *, runs: int = 9) -> dict[Instance, float]:
        """Measure the latency of each instance on this device, and keep it for `max_latency_ms`.

        The instances take turns, so that a machine that slows down slows down all of them.

        Args:
            batch_size: size of the batch.
            runs: number of calls per instance, of which the median counts, after one call that does not count.

        Returns:
            Milliseconds per call, by instance.

        Raises:
            UsageError: if either number is below 1.
        """
        times = self.time_calls(self._trees, batch_size, runs, warmup=1)
        medians = {instance: median(seen) for instance, seen in times.items()}
        self._milliseconds = self._milliseconds | {
            batch_size: medians
        }  # a new mapping: other threads may be reading the old one
        return medians

    def time_calls(
        self, instances: Iterable[Instance], batch_size: int, runs: int, warmup: int = WARMUP
    ) -> dict[Instance, list[float]]:
        """Return the milliseconds of each counted call of some instances, which take turns.

        Args:
            instances: the instances.
            batch_size: size of the batch.
            runs: number of calls per instance that count.
            warmup: number of calls before, which do not count.

        Raises:
            UsageError: if the size or the number of calls is below 1.
        """
        if batch_size < 1 or runs < 1:
            raise UsageError(f"batch_size={batch_size}, runs={runs}: both must be at least 1")
        takes = self.description.input
        x_NCHW = torch.zeros(batch_size, self.description.network.in_channels, takes.size, takes.size, device=self.device)

        def call(instance: Instance) -> None:
            self._run(x_NCHW, instance)
            self._wait()

        self._wait()
        by_text = {str(instance): instance for instance in instances}
        times = measured({text: partial(call, instance) for text, instance in by_text.items()}, runs, warmup)
        return {by_text[text]: seen for text, seen in times.items()}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def preprocess(self, image: Picture) -> Tensor:
        """Turn an image into the input of the network: upright, opaque, scaled, cropped and normalised.

        Args:
            image: an image file, a PIL image, or uint8 pixels: an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or a tensor
                (C, H, W).

        Returns:
            A batch of one image, float32, normalised, (1, C, H, W), on the CPU.

        Raises:
            DataError: if the file is not an image, or the pixels have a different shape or dtype.
        """
        mode = "RGB" if self.description.network.in_channels == 3 else "L"
        opened = decode(Path(image), mode) if isinstance(image, str | Path) else converted(_pillow(image), mode)
        pixels_CHW = VF.pil_to_tensor(self._fixed(opened))
        return self._normalise(pixels_CHW[None])


def measure_bundle(
    folder: Path, batches: Sequence[int], repeats: int, threads: int | None, instances: Sequence[str] | None
) -> Latencies:
    """Measure instances of a bundle in torch, on a GPU if the machine has one.

    Args:
        folder: the bundle.
        batches: numbers of images of a call.
        repeats: number of calls that count.
        threads: number of threads of torch; by default as many as it uses.
        instances: texts of the instances; all by default.

    Raises:
        DataError: if a file cannot be read.
        IntegrityError: if the bundle is damaged.
        NotFoundError: if the bundle has no such instance.
    """
    with torch_threads(threads):
        model = Runtime(read_bundle(folder, latencies=False))
        macs = {str(option.instance): option.macs for option in model.instances}
        chosen = [Instance.parse(name) for name in named_among(instances, list(macs), folder)]
        rows = [
            latency_row(str(instance), batch, seen)
            for batch in batches
            for instance, seen in model.time_calls(chosen, batch, repeats).items()
        ]
        return Latencies(model.machine, rows, macs, model.description.full_macs)


def check_cascade(
    cascade: Cascade | str | Literal[True],
    max_macs: str | float | None,
    max_latency_ms: float | None,
    instance: Instance | str | None,
) -> None:
    """Refuse what cannot be combined with a cascade.

    Raises:
        UsageError: if an instance, a latency, or both a budget and a named cascade are given.
    """
    if instance is not None:
        raise UsageError("an instance and a cascade exclude each other; give one")
    if max_latency_ms is not None:
        raise UsageError(
            "max_latency_ms: the latency of a cascade depends on the images; choose a cascade by max_macs, or an instance by "
            "latency"
        )
    if cascade is not True and max_macs is not None:
        raise UsageError("a named cascade and a budget exclude each other; give one")


def _pillow(image: Image.Image | NDArray[np.uint8] | Tensor) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, Tensor | np.ndarray):
        raise DataError(f"a {type(image).__name__} is not an image; give a path, a PIL image, an array or a tensor")
    pixels = np.asarray(image.movedim(0, -1).cpu() if isinstance(image, Tensor) and image.dim() == 3 else image)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    grey, colour = pixels.ndim == 2, pixels.ndim == 3 and pixels.shape[-1] in (3, 4)
    if pixels.dtype != np.uint8 or not pixels.size or not (grey or colour):
        raise DataError(
            f"pixels of shape {tuple(image.shape)} and dtype {pixels.dtype} are not an image; give uint8 pixels, as an array "
            "(H, W, C) or a tensor (C, H, W)"
        )
    return Image.fromarray(pixels)
