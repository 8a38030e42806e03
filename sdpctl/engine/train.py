"""Training: plain SGD, with one instance per step.

The loop does not wait for the device: losses are summed on the device, and `check_finite` reads them from time to time. A step
depends only on its number and on the state, so a training that was stopped and continued ends with the same bits.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sdpctl.engine.device import Batches, autocast
from sdpctl.engine.settings import TrainSettings
from sdpctl.errors import DivergedError
from sdpctl.models.chain import Chain
from sdpctl.sdpoint import Draw


def learning_rate(settings: TrainSettings, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step; steps are counted from 0 over the whole training."""
    warmup = settings.warmup_epochs * steps_per_epoch
    if step < warmup:
        return settings.lr * (step + 1) / math.ceil(warmup)
    if settings.schedule == "cosine":
        total = settings.epochs * steps_per_epoch
        return settings.lr * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
    passed = sum(step >= milestone * steps_per_epoch for milestone in settings.milestones)
    return settings.lr * settings.gamma**passed


class Trainer:
    """A training that can be stopped after any step and continued later.

    Args:
        model: a chain on its device; changed in place.
        settings: how to train.
        draw: maps a step to its instance.
        steps_per_epoch: number of batches per epoch.
        noise: maps a step to the seed of the random numbers that the network itself draws; None if it draws none.
    """

    def __init__(
        self,
        model: Chain,
        settings: TrainSettings,
        draw: Draw,
        steps_per_epoch: int,
        noise: Callable[[int], int] | None = None,
    ) -> None:
        memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
        self.model = model.to(memory_format=memory_format)
        self.settings = settings
        self.draw, self.noise = draw, noise
        self.steps_per_epoch = steps_per_epoch
        self.device = next(model.parameters()).device
        self.step = 0
        """Number of finished steps."""
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, hits, images of this epoch
        self._diverged_at = torch.full((), -1, device=self.device)

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return self.step // self.steps_per_epoch

    def steps(self, batches: Batches) -> Iterator[int]:
        """Train on each batch, and yield the number of finished steps after each.

        Args:
            batches: the remaining batches of the epoch, (x_NCHW, labels_N) on the model's device.
        """
        self.model.train()
        for x_NCHW, labels_N in batches:
            lr = learning_rate(self.settings, self.step, self.steps_per_epoch)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            if self.noise is not None:
                torch.default_generator.manual_seed(self.noise(self.step))
            with autocast(self.device, self.settings.precision):
                logits_NK = self.model(x_NCHW, self.draw(self.step))
            loss = F.cross_entropy(logits_NK.float(), labels_N, label_smoothing=self.settings.label_smoothing)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self._count(loss.detach(), logits_NK.detach(), labels_N)
            self.step += 1
            yield self.step

    def _count(self, loss: Tensor, logits_NK: Tensor, labels_N: Tensor) -> None:
        images = len(labels_N)
        hits = (logits_NK.argmax(1) == labels_N).sum()
        self._sums += torch.stack([loss.double() * images, hits.double(), torch.full_like(loss, images).double()])
        bad = (self._diverged_at < 0) & ~loss.isfinite()
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
        """Return the mean loss, the accuracy of the drawn instances in percent, and the last learning rate of the epoch."""
        self.check_finite()
        loss, hits, images = self._sums.tolist()
        self._sums.zero_()
        lr = learning_rate(self.settings, self.step - 1, self.steps_per_epoch)
        return {"loss": loss / images, "accuracy": 100 * hits / images, "lr": lr}

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that must be saved beside the model, so that a continued training ends with the same bits."""
        kept = {"step": torch.tensor(self.step), "sums": self._sums}
        for name, parameter in self.model.named_parameters():
            buffer = self.optimizer.state[parameter].get("momentum_buffer")
            if buffer is not None:
                kept[f"momentum.{name}"] = buffer
        return kept

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from a state that `state` returned; the caller loads the state of the model itself."""
        self.step = int(state["step"])
        self._sums.copy_(state["sums"])
        for name, parameter in self.model.named_parameters():
            if (buffer := state.get(f"momentum.{name}")) is not None:
                self.optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(buffer)
