"""The predictions of an evaluation: what each instance took each image for, and the images that need costly instances.

Names of tensors: I instances, N images, M pictures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdpctl.errors import IntegrityError
from sdpctl.kinds import PREDICTIONS
from sdpctl.stages.layers import reader
from sdpctl.store import Artifact, Store

if TYPE_CHECKING:
    from torch import Tensor

MOST_PICTURES = 24
"""Largest number of pictures that are kept."""

LARGEST_PICTURE = 64
"""Largest height and width of a picture that is kept, in pixels."""


@dataclass(frozen=True)
class Predictions:
    """The predictions of an evaluation.

    Args:
        labels: the labels, int32 (N,).
        predicted: the classes with the highest logits, int32 (I, N); the instances are the rows of the evaluation.
        pictured: the images that have a picture, int32 (M,); those that need the costliest instance come first.
        pictures: the pictures, uint8 (M, C, H, W).
    """

    labels: "Tensor"
    predicted: "Tensor"
    pictured: "Tensor"
    pictures: "Tensor"

    def confusions(self, row: int, most: int) -> list[tuple[int, int, int]]:
        """Return the most frequent confusions of an instance: label, predicted class, number of images."""
        import torch

        wrong_N = self.predicted[row] != self.labels
        pairs = torch.stack([self.labels[wrong_N], self.predicted[row][wrong_N]], dim=1)
        found, counts = torch.unique(pairs, dim=0, return_counts=True)
        listed = [(*pair, count) for pair, count in zip(found.tolist(), counts.tolist(), strict=True)]
        return sorted(listed, key=lambda each: (-each[2], each[0], each[1]))[:most]

    def cheapest_right(self, image: int, macs: Sequence[int]) -> int | None:
        """Return the row of the cheapest instance that predicts the label of an image; None if there is none."""
        right = [row for row, predicted in enumerate(self.predicted[:, image].tolist()) if predicted == self.labels[image]]
        return min(right, key=lambda row: macs[row], default=None)


def hardest(labels_N: "Tensor", predicted_IN: "Tensor", macs: Sequence[int]) -> list[int]:
    """Return images that only costly instances get right: those whose cheapest right instance costs most come first.

    An image that the cheapest instance of all gets right, or none, is not among them.

    Args:
        labels_N: the labels.
        predicted_IN: the predicted classes.
        macs: MACs of each instance.
    """
    import torch

    spent_I = torch.tensor(macs, dtype=torch.float64)
    needed_N = torch.where(predicted_IN == labels_N, spent_I[:, None], torch.inf).amin(0)
    hard = ((needed_N > spent_I.min()) & needed_N.isfinite()).nonzero()[:, 0].tolist()
    return sorted(hard, key=lambda image: (-float(needed_N[image]), image))[:MOST_PICTURES]


def predictions_layer(
    labels_N: "Tensor", predicted_IN: "Tensor", macs: Sequence[int], pictures: "Callable[[Sequence[int]], Tensor] | None"
) -> bytes:
    """Return the layer of predictions.

    Args:
        labels_N: the labels, int32.
        predicted_IN: the predicted classes, int32.
        macs: MACs of each instance.
        pictures: returns images by number, uint8 (M, C, H, W); None if they cannot be shown.
    """
    import torch
    import torch.nn.functional as F

    from sdpctl.engine.tensors import tensors_to_bytes

    chosen = [] if pictures is None else hardest(labels_N, predicted_IN, macs)
    shown = torch.empty(0, 1, 1, 1, dtype=torch.uint8)
    if pictures is not None and chosen:
        shown = pictures(chosen)
        if max(shown.shape[2:]) > LARGEST_PICTURE:
            small = F.adaptive_avg_pool2d(shown.double(), LARGEST_PICTURE)
            shown = small.round().to(torch.uint8)
    tensors = {
        "labels": labels_N,
        "predicted": predicted_IN,
        "pictured": torch.tensor(chosen, dtype=torch.int32),
        "pictures": shown,
    }
    return tensors_to_bytes(tensors)


def read_predictions(store: Store, evaluation: Artifact, instances: int, images: int, classes: int) -> Predictions:
    """Read the predictions of an evaluation.

    Args:
        store: the store.
        evaluation: the artifact.
        instances: number of its instances.
        images: number of its images.
        classes: number of its classes.

    Raises:
        IntegrityError: if the layer does not fit the table of the evaluation.
    """
    import torch

    from sdpctl.engine.tensors import bytes_to_tensors

    called = f"{evaluation.digest}: {PREDICTIONS}"
    most = 2**20 + 4 * images * (instances + 1) + MOST_PICTURES * 4 * LARGEST_PICTURE**2
    tensors = bytes_to_tensors(reader(store, evaluation)(PREDICTIONS, most), called)
    whole, byte = torch.int32, torch.uint8
    wanted = {"labels": ((images,), whole), "predicted": ((instances, images), whole)}
    shown = tensors.get("pictures", torch.empty(0))
    wanted["pictured"] = ((len(shown),), whole)
    fits = all(
        name in tensors and tuple(tensors[name].shape) == shape and tensors[name].dtype == dtype
        for name, (shape, dtype) in wanted.items()
    )
    fits = fits and shown.ndim == 4 and shown.dtype == byte and shown.shape[1] in (1, 3) and len(shown) <= MOST_PICTURES
    if fits:
        in_range = {"labels": classes, "predicted": classes, "pictured": images}
        fits = all(bool(((tensors[name] >= 0) & (tensors[name] < most)).all()) for name, most in in_range.items())
    if not fits:
        raise IntegrityError(f"{called} does not fit the table of this evaluation; evaluate again with --force")
    return Predictions(**{name: tensors[name] for name in ("labels", "predicted", "pictured", "pictures")})
