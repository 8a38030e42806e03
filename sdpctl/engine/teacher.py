"""The teacher of a distillation: `full` of a trained network, with statistics of the images that it teaches."""

import torch
from torch import Tensor

from sdpctl.engine.calibrate import CalibratedNorms, calibrate
from sdpctl.engine.device import Batches
from sdpctl.engine.distributed import ALONE, Ranks
from sdpctl.engine.tree import Tree
from sdpctl.instance import FULL
from sdpctl.models.chain import Chain

BATCHES = 32
"""Number of training batches that the teacher's batch norms are calibrated on."""


class Teacher:
    """A network whose `full` is asked for its logits.

    Its batch norms are calibrated first: the training images may be augmented or scaled differently than those that it was
    trained on, and the running statistics of an SDPoint training are a mixture of all instances.

    Args:
        model: the trained network, on its device; its weights do not change.
        batches: (x_NCHW, labels_N) on the same device, augmented as in the training; of several ranks, each has its own.
        ranks: the processes that share the batches.

    Raises:
        DataError: if there is no batch, or a batch has a single image.
    """

    def __init__(self, model: Chain, batches: Batches, ranks: Ranks = ALONE) -> None:
        model = model.channels_last().eval().requires_grad_(False)
        self._tree = Tree(model, [FULL])
        self._norms = CalibratedNorms(model, calibrate(model, [FULL], batches, ranks=ranks))

    @torch.no_grad()
    def __call__(self, x_NCHW: Tensor) -> Tensor:
        """Return the logits of normalised images, (N, K)."""
        return self._tree.walk(x_NCHW, self._norms)[FULL]
