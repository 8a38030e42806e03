"""Training: plain SGD, with one or several instances per step.

The loop does not wait for the device: losses are summed on the device, and `check_finite` reads them from time to time. A step
depends only on its number and on the state, so a training that was stopped and continued ends with the same bits.

Suffixes of tensor names: N images, C channels, H height, W width, K classes.
"""

import copy
import math
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from sdpctl.engine.compile import Compiled
from sdpctl.engine.device import Batches, autocast
from sdpctl.engine.distributed import ALONE, GradientSums, Ranks
from sdpctl.engine.replay import Replay
from sdpctl.engine.settings import TrainSettings
from sdpctl.engine.sync_bn import synchronised
from sdpctl.engine.together import Together
from sdpctl.errors import DivergedError
from sdpctl.instance import Instance
from sdpctl.models.chain import Chain, batch_norm
from sdpctl.randomness import derive
from sdpctl.sdpoint import Draw


def learning_rate(lr: float, settings: TrainSettings, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step; steps are counted from 0 over the whole training.

    Args:
        lr: the rate after the warm-up.
        settings: the schedule and the warm-up.
        step: number of the step.
        steps_per_epoch: number of steps of an epoch.
    """
    warmup = settings.warmup_epochs * steps_per_epoch
    if step < warmup:
        return lr * (step + 1) / math.ceil(warmup)
    if settings.schedule == "cosine":
        total = settings.epochs * steps_per_epoch
        return lr * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
    passed = sum(step >= milestone * steps_per_epoch for milestone in settings.milestones)
    return lr * settings.gamma**passed


def parameter_groups(model: Chain, settings: TrainSettings) -> list[dict[str, Any]]:
    """Return the parameters as groups of an optimiser; the `initial_lr` of a group is its learning rate after the warm-up."""
    rates: dict[Tensor, float] = dict.fromkeys(model.parameters(), settings.lr)
    if settings.lr_body is not None:
        head = {model.get_parameter(name) for name in model.head_names}
        rates = {parameter: settings.lr if parameter in head else settings.lr_body for parameter in rates}
    if settings.layer_decay is not None:
        segments = model.segments()
        for i, segment in enumerate(segments):
            rate = settings.lr * settings.layer_decay ** (len(segments) - 1 - i)
            rates |= dict.fromkeys(model.parameters_of(segment), rate)
    groups: dict[float, list[Tensor]] = {}
    for parameter, rate in rates.items():
        groups.setdefault(rate, []).append(parameter)
    return [{"params": parameters, "initial_lr": rate} for rate, parameters in groups.items()]


def batch_mixing(model: Chain, settings: TrainSettings) -> v2.Transform | None:
    """Return the transform of a batch that blends or pastes images, and makes labels soft: (N, K); None without mixing."""
    chosen = [(v2.MixUp, settings.mixup), (v2.CutMix, settings.cutmix)]
    if not any(alpha for _, alpha in chosen):
        return None
    classes = model.get_parameter(model.head_names[0]).shape[0]
    return v2.RandomChoice([mix(alpha=alpha, num_classes=classes) for mix, alpha in chosen if alpha is not None])


def _wide(logits_NK: Tensor) -> Tensor:
    """Return logits in at least float32."""
    return logits_NK.to(torch.promote_types(logits_NK.dtype, torch.float32))


def seed_generators(device: torch.device, seed: int) -> None:
    """Seed torch's generators of the CPU and of a device."""
    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would queue a call for CUDA at each step
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


class Trainer:
    """A training that can be stopped after any step and continued later.

    Args:
        model: a chain on its device; changed in place.
        settings: how to train.
        draw: maps a step to its instances, `full` first if it teaches the others.
        steps_per_epoch: number of batches per epoch.
        seed: seed of the random numbers that mix a batch, and of those that the network itself draws.
        class_weights_K: weight of each class in the loss; equal weights by default.
        compiled: the compiled forward pass of the model; by default, the model itself runs.
        teacher: returns the logits, (N, K), that `settings.distill` compares with, on the model's device and without gradient;
            by default those of the first instance of the step.
        ranks: the processes that train together, each on its part of every batch. All have the same weights after each step.
            Without `sync_bn` a batch norm sees this rank's part only, so the running statistics of the ranks differ; those of
            rank 0 are the training's.
        batch_size: number of images of a batch of all ranks; only needed for several.
    """

    def __init__(
        self,
        model: Chain,
        settings: TrainSettings,
        draw: Draw,
        steps_per_epoch: int,
        *,
        seed: int = 0,
        class_weights_K: Tensor | None = None,
        compiled: Compiled | None = None,
        teacher: Callable[[Tensor], Tensor] | None = None,
        ranks: Ranks = ALONE,
        batch_size: int = 0,
    ) -> None:
        self.model = model.channels_last() if settings.channels_last else model.to(memory_format=torch.contiguous_format)
        self.device = next(model.parameters()).device
        self.settings = settings
        self.compiled = compiled
        self.draw, self.seed = draw, seed
        self.class_weights_K = class_weights_K
        self.ranks, self.batch_size = ranks, batch_size
        norm = synchronised(ranks) if ranks.several and settings.sync_bn else batch_norm
        self.forward = Together(model, norm) if compiled is None else compiled
        self.teacher = teacher
        self.steps_per_epoch = steps_per_epoch
        self.step = 0
        """Number of finished steps."""
        self.optimizer = torch.optim.SGD(
            parameter_groups(model, settings),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.evaluated = model if settings.ema is None else copy.deepcopy(model)
        """The network that is scored and stored: the averaged weights and running statistics if `ema` is set."""
        pairs = list(zip(self.evaluated.state_dict().values(), model.state_dict().values(), strict=True))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counters = [pair for pair in pairs if not pair[0].is_floating_point()]
        self.mixing = batch_mixing(model, settings)
        self.compile_seconds, self.compile_steps = 0.0, 0
        """Time and number of the steps in which segments were compiled."""
        self._gradients = GradientSums(ranks, model.parameters())
        itself = weakref.proxy(self)  # a cycle would keep the memory of the graphs after the training
        self._passing = self._pass if ranks.several or not model.repeats else Replay(lambda *given: itself._pass(*given))
        self._counted: Callable[[], None] = lambda: None
        """Waits until the counts of a step are those of all ranks."""
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, hits, images of this epoch
        self._diverged_at = torch.full((), -1, device=self.device)

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return self.step // self.steps_per_epoch

    @property
    def graphs(self) -> int:
        """Number of graphs that were compiled so far."""
        return 0 if self.compiled is None else self.compiled.graphs

    def steps(self, batches: Batches) -> Iterator[int]:
        """Train on each batch, and yield the number of finished steps after each.

        Args:
            batches: the remaining batches of the epoch, (x_NCHW, labels_N) on the model's device.
        """
        self.model.train()
        for x_NCHW, labels_N in batches:
            began, graphs = time.monotonic(), self.graphs
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(group["initial_lr"], self.settings, self.step, self.steps_per_epoch)
            mixed_NCHW, targets = self._mixed(x_NCHW, labels_N)
            if self.model.draws_in_training:
                seed_generators(self.device, self._mask_seed())
            counts = self._passing(mixed_NCHW, targets, self.draw(self.step))
            self._gradients.finish()
            self.optimizer.step()
            self._average()
            self._counted()
            self._count(counts)
            self.step += 1
            if self.graphs > graphs:
                self.compile_seconds += time.monotonic() - began
                self.compile_steps += 1
            yield self.step

    def _pass(self, x_NCHW: Tensor, targets: Tensor, instances: tuple[Instance, ...]) -> Tensor:
        """Compute the gradients of a step, and return its counts."""
        with autocast(self.device, self.settings.precision):
            logits_INK = [_wide(logits_NK) for logits_NK in self.forward(x_NCHW, instances)]
            taught_NK = None if self.teacher is None else _wide(self.teacher(x_NCHW))
        losses = [self._loss(logits_INK[0], targets, taught_NK)]
        if self.settings.distill is not None and taught_NK is None:
            taught_NK = logits_INK[0].detach()
        losses += [self._loss(logits_NK, targets, taught_NK) for logits_NK in logits_INK[1:]]
        loss = torch.stack(losses).sum()
        counts = self._counts(loss.detach() / len(losses), [logits_NK.detach() for logits_NK in logits_INK], targets)
        self._counted = self.ranks.begin_adding(counts)
        self.optimizer.zero_grad(set_to_none=self.device.type != "cuda")  # a CUDA graph needs gradients that stay in place
        loss.backward()  # type: ignore[no-untyped-call]
        return counts

    def _mixed(self, x_NCHW: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images and targets of the step: the labels (N,), or the soft labels of mixed images (N, K)."""
        if self.mixing is None:
            return x_NCHW, labels_N
        seed_generators(self.device, derive(self.seed, "mix", self.step))  # the same on every rank
        if not self.ranks.several:
            mixed_NCHW, targets_NK = self.mixing(x_NCHW, labels_N)
            return mixed_NCHW, targets_NK
        # Each image is mixed with the one before it, the first of the batch with the last.
        before = self.ranks.rank - 1
        images = self.ranks.gathered(x_NCHW[-1:])[before].contiguous(memory_format=torch.channels_last)
        labels = self.ranks.gathered(labels_N[-1:])[before]
        mixed_NCHW, targets_NK = self.mixing(torch.cat([images, x_NCHW]), torch.cat([labels, labels_N]))
        return mixed_NCHW[1:], targets_NK[1:]

    def _mask_seed(self) -> int:
        """Return the seed of what the network draws in this step: what it draws for each image differs between ranks."""
        apart = self.ranks.rank and self.model.draws_for_each_image
        return derive(self.seed, "masks", self.step, *((self.ranks.rank,) if apart else ()))

    def _loss(self, logits_NK: Tensor, targets: Tensor, taught_NK: Tensor | None) -> Tensor:
        """Return the mean loss of the batch; of several ranks, this rank's share of it: the shares add up to the mean.

        Args:
            logits_NK: logits of an instance.
            targets: labels (N,), or soft labels (N, K).
            taught_NK: logits of the teacher of this instance; None without a teacher.
        """
        distill = self.settings.distill
        if distill is None or taught_NK is None:
            return self._label_loss(logits_NK, targets)
        student, teacher = ((logits / distill.temperature).log_softmax(1) for logits in (logits_NK, taught_NK))
        divergence = F.kl_div(student, teacher, log_target=True, reduction="sum") * distill.temperature**2
        loss = distill.weight * divergence / (self.batch_size if self.ranks.several else len(logits_NK))
        return loss if distill.weight == 1 else loss + (1 - distill.weight) * self._label_loss(logits_NK, targets)

    def _label_loss(self, logits_NK: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of the batch, or this rank's share of it."""
        weight_K, smoothing = self.class_weights_K, self.settings.label_smoothing
        weight_K = None if weight_K is None else weight_K.to(logits_NK.dtype)
        targets = targets.to(logits_NK.dtype) if targets.is_floating_point() else targets
        if not self.ranks.several:
            return F.cross_entropy(logits_NK, targets, weight=weight_K, label_smoothing=smoothing)
        total: Tensor | int = self.batch_size
        if weight_K is not None and targets.dim() == 1:  # torch divides by the weights of the labels
            total = weight_K[targets].sum()
            self.ranks.add_up(total)
        return F.cross_entropy(logits_NK, targets, weight=weight_K, label_smoothing=smoothing, reduction="sum") / total

    @torch.no_grad()
    def _average(self) -> None:
        """Move the averaged weights towards the weights; after the first step, the average is the weights themselves."""
        if self.settings.ema is None:
            return
        averages, values = map(list, zip(*self._averaged, strict=True))
        torch._foreach_lerp_(averages, values, 1 - self.settings.ema if self.step else 1.0)
        for average, value in self._counters:
            average.copy_(value)

    def _counts(self, loss: Tensor, logits_INK: Sequence[Tensor], targets: Tensor) -> Tensor:
        """Return the loss times the number of images of the whole batch, the mean hits, and the images of this rank."""
        images = len(targets)
        labels_N = targets if targets.dim() == 1 else targets.argmax(1)
        hits = torch.stack([(logits_NK.argmax(1) == labels_N).sum() for logits_NK in logits_INK]).double().mean()
        whole = self.batch_size if self.ranks.several else images
        return torch.stack([loss.double() * whole, hits, torch.full_like(loss, images).double()])

    def _count(self, counts: Tensor) -> None:
        self._sums += counts
        bad = (self._diverged_at < 0) & ~counts[0].isfinite()
        self._diverged_at = torch.where(bad, self.step + 1, self._diverged_at)

    def check_finite(self) -> None:
        """Wait for the device, and check that all losses so far and the weights are finite.

        Raises:
            DivergedError: if one is not; the message names the first step, counted from 1, whose loss was not finite.
        """
        if (step := int(self._diverged_at)) >= 0:
            epoch = (step - 1) // self.steps_per_epoch + 1
            raise DivergedError(f"the loss is not finite at step {step} (epoch {epoch})")
        if not torch.stack([parameter.isfinite().all() for parameter in self.model.parameters()]).all():
            raise DivergedError(f"the weights are not finite after step {self.step}")

    def finish_epoch(self) -> dict[str, float]:
        """Return the mean loss, the accuracy of the trained instances in percent, and the last learning rate of the epoch.

        In steps with several instances, loss and accuracy are the means over the instances.
        The accuracy on mixed images counts the label with the larger weight.
        """
        self.check_finite()
        loss, hits, images = self._sums.tolist()
        self._sums.zero_()
        lr = learning_rate(self.settings.lr, self.settings, self.step - 1, self.steps_per_epoch)
        return {"loss": loss / images, "accuracy": 100 * hits / images, "lr": lr}

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that must be saved beside `evaluated`, so that a continued training ends with the same bits."""
        kept = {"step": torch.tensor(self.step), "sums": self._sums}
        if self.settings.ema is not None:
            kept |= {f"weights.{name}": t for name, t in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            buffer = self.optimizer.state[parameter].get("momentum_buffer")
            if buffer is not None:
                kept[f"momentum.{name}"] = buffer
        return kept

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from a state that `state` returned; the caller loads the state of `evaluated` itself."""
        if self.settings.ema is not None:
            self.model.load_state_dict({name: state[f"weights.{name}"] for name in self.model.state_dict()})
        self.step = int(state["step"])
        self._sums.copy_(state["sums"])
        for name, parameter in self.model.named_parameters():
            if (buffer := state.get(f"momentum.{name}")) is not None:
                self.optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(buffer)
