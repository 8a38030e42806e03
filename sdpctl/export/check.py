"""Comparing an export, run where it will be used, with the network it was made from; and timing it."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite
from statistics import median
from time import perf_counter

import numpy as np
import torch

from sdpctl.errors import IntegrityError
from sdpctl.export.format import Logits

DIFFERENCE = 1e-4
"""The largest allowed difference of a logit, as a fraction of the largest logit, or absolute where all are smaller than 1."""

AGREEMENT = 99.0
"""The share of images, in per cent, that must keep their class: rounding may swap two classes with nearly equal logits."""


@dataclass(frozen=True)
class Agreement:
    """How closely an export agrees with its source.

    Args:
        images: number of images compared.
        difference: largest absolute difference of two logits.
        scale: largest absolute logit of the source.
        top1: share of the images whose class is the same, in per cent.
    """

    images: int
    difference: float
    scale: float
    top1: float

    @property
    def holds(self) -> bool:
        """Whether difference and classes are both within their bounds."""
        return isfinite(self.difference) and self.difference <= DIFFERENCE * max(1, self.scale) and self.top1 >= AGREEMENT

    def require(self, what: str) -> "Agreement":
        """Return the agreement itself.

        Args:
            what: the name of the export in an error.

        Raises:
            IntegrityError: if it does not hold.
        """
        if not self.holds:
            raise IntegrityError(
                f"{what}: run outside, its logits differ by up to {self.difference:.2g} (at most {DIFFERENCE:g} of "
                f"{self.scale:.3g} is allowed) and {self.top1:.2f} % of the classes agree; nothing was written, report this"
            )
        return self


def compare(wanted: Logits, got: Logits) -> Agreement:
    """Compare the logits of the source and of the export, (..., N, K)."""
    same = wanted.argmax(-1) == got.argmax(-1)
    finite = np.isfinite(wanted).all() and np.isfinite(got).all()
    difference, scale = float(np.abs(wanted - got).max()), float(np.abs(wanted).max())
    return Agreement(wanted.shape[-2], difference if finite else inf, scale, 100 * float(same.mean()))


def latency(call: Callable[[], object], runs: int = 15) -> float:
    """Return the median duration of a call, in milliseconds, after two calls that do not count.

    Args:
        call: a call that runs one image.
        runs: number of calls that count.
    """
    times = []
    with torch.inference_mode():
        for _ in range(runs + 2):
            began = perf_counter()
            call()
            times.append(1000 * (perf_counter() - began))
    return median(times[2:])
