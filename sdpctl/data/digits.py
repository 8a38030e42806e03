"""scikit-learn's handwritten digits: 1,797 images of 8x8 pixels that are installed with the library. Needs no files."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from sdpctl.data.reader import Located, Reader
from sdpctl.errors import DataError

if TYPE_CHECKING:
    from sdpctl.data.source import Source

DIGITS_SHA256 = "a19cb3d96bba7deace8ee5a513a6eb7bad0403d528f00bf4d351b6a7a55baa91"
"""SHA-256 of the pixels and labels as uint8; also the fingerprint of this data set."""


class Digits(Reader):
    """Reads the digits: a fifth of each class is the test split."""

    def locate(self, root: Path, *, partial: bool) -> Located:  # noqa: ARG002  there is no folder
        """Return no files and the known fingerprint."""
        return Located((), {}, fingerprint=DIGITS_SHA256)

    def open(self, root: Path, located: Located) -> "tuple[Source, Source]":  # noqa: ARG002  there is no folder
        """Open both splits.

        Raises:
            DataError: if the installed digits have a different hash.
        """
        import numpy as np
        import torch
        from sklearn.datasets import load_digits

        from sdpctl.data.source import Source
        from sdpctl.data.sources import stratified

        pixels, targets = load_digits(return_X_y=True)
        images = np.rint(pixels.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
        labels = targets.astype(np.uint8)
        if hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest() != DIGITS_SHA256:
            raise DataError("scikit-learn's digits are not the known 1,797 images; install scikit-learn again")
        test = torch.tensor(stratified(labels.tolist(), 0.2, seed=0, name="digits"))
        train = torch.tensor(sorted(set(range(len(labels))) - set(test.tolist())))
        classes = tuple("0123456789")
        x_NCHW, labels_N = torch.from_numpy(images), torch.from_numpy(labels).long()
        return Source(x_NCHW[train], labels_N[train], classes), Source(x_NCHW[test], labels_N[test], classes)
