"""Compare the logits of an export with those of the network that it was made from, and measure its latency."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from sdpctl.errors import IntegrityError
from sdpctl.export.format import Logits
from sdpctl.export.run_folder import measured

DIFFERENCE = 1e-4
"""The maximum difference of a logit, as a fraction of the largest logit, or absolute if all logits are smaller than 1."""

AGREEMENT = 99.0
"""The minimum percentage of images with the same class. It is below 100, since rounding may swap nearly equal logits."""


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

    def require(self, what: str, results: str = "logits") -> "Agreement":
        """Check that the agreement is close enough, and return the agreement itself.

        Args:
            what: name of the export in an error.
            results: the results that were compared.

        Raises:
            IntegrityError: if the agreement is not close enough.
        """
        if not self.holds:
            raise IntegrityError(
                f"{what}: run outside, its {results} differ by up to {self.difference:.2g} (at most {DIFFERENCE:g} of "
                f"{self.scale:.3g} is allowed) and {self.top1:.2f} % of the classes agree; nothing was written, report this"
            )
        return self


def compare(wanted: Logits, got: Logits, counted_N: NDArray[np.bool_] | None = None) -> Agreement:
    """Compare the results of the source and of the export, (..., N, K).

    Args:
        wanted: logits or probabilities of the source.
        got: logits or probabilities of the export.
        counted_N: the images that count; all by default.

    Raises:
        IntegrityError: if no image counts.
    """
    if counted_N is not None:
        if not counted_N.any():
            raise IntegrityError(
                "no image can be compared, since rounding may send each image to a different member of the cascade; nothing "
                "was written, choose a different cascade"
            )
        wanted, got = wanted[..., counted_N, :], got[..., counted_N, :]
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
    with torch.inference_mode():
        return median(measured({"": call}, runs, warmup=2)[""])
