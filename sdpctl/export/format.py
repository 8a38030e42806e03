"""The interface of a format's code. `sdpctl.export.catalog.FORMATS` lists the formats; each has its own module."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdpctl.engine.calibrate import Statistics
from sdpctl.export.catalog import FORMATS, CheckedIn, Precision
from sdpctl.export.description import Description
from sdpctl.export.precision import Accuracies
from sdpctl.models.chain import Chain
from sdpctl.table import load

SUMS = "SHA256SUMS"

CHUNK = 32
"""Number of images per call when an export is run as a check."""

Logits = NDArray[np.float32]
Images = NDArray[np.generic]
"""Images as an export takes them, (N, C, H, W): float32 and normalised, or uint8 for raw input."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What an export is written from.

    Args:
        model: the network, on the CPU, in evaluation mode.
        statistics: BatchNorm statistics of the instances in the description, and of no others.
        description: the instances, the input, the classes.
        weights: returns the bytes of the checkpoint's model.safetensors.
        card: the model card, Markdown.
        opset: version of the ONNX operators; None for the exporter's own.
    """

    model: Chain
    statistics: Statistics
    description: Description
    weights: Callable[[], bytes]
    card: str
    opset: int | None = None


class Format(ABC):
    """How an export is written, run, timed and loaded."""

    @abstractmethod
    def write(self, source: Source) -> dict[str, bytes]:
        """Return the content of every file by name: the files of the format's entry in the table, and the card."""

    @abstractmethod
    def run(self, files: Mapping[str, bytes], images: Images) -> Logits:
        """Run the written files the way that a user will run them.

        Args:
            files: content by name, from `write`.
            images: images as the export takes them, (N, C, H, W).

        Returns:
            Logits, (I, N, K), of each instance in the order of the description; of a cascade its probabilities, (1, N, K).

        Raises:
            ResourceError: if the machine does not have enough memory or disk space to run the files.
            SdpctlError: if the files do not run.
        """

    def run_cascades(self, files: Mapping[str, bytes], images: Images) -> Logits:
        """Run the cascades of the written files; a format of several instances that has `graphs` must implement this method.

        Returns:
            Probabilities, (C, N, K), of each cascade in the order of the description.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no run_cascades, but its entry in the table of formats has graphs"
        )

    def one_call(self, files: Mapping[str, bytes], image: Images) -> Callable[[], object]:
        """Load the written files, and return a call that runs one image, so that its latency can be measured.

        A format whose entry in the table has `latency=True` must implement this method.

        Args:
            files: content by name, from `write`.
            image: an image as the export takes it, (1, C, H, W).
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no one_call, but its entry in the table of formats says latency=True"
        )

    def lowered(self, files: Mapping[str, bytes], precision: Precision, images: Callable[[], Images]) -> dict[str, bytes]:
        """Return the written files in a lower precision; input and output keep their types.

        A format whose entry in the table has more `precisions` than fp32 must implement this method.

        Args:
            files: content by name, from `write`.
            precision: fp16 or int8.
            images: returns calibration images as the export takes them, (N, C, H, W).
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no lowered, but its entry in the table of formats has {precision}"
        )

    def labelled(self, files: Mapping[str, bytes], accuracies: Accuracies) -> dict[str, bytes]:
        """Return the files in a lower precision with their accuracies in their metadata; see `lowered`."""
        raise NotImplementedError(
            f"{type(self).__name__} has no labelled, but its entry in the table of formats has {accuracies.name}"
        )

    def run_in(self, runtime: CheckedIn, files: Mapping[str, bytes], images: Images) -> Logits:
        """Run the written files in a second runtime; see `run`.

        A format whose entry in the table has `checks` must implement this method.

        Raises:
            ResourceError: if the runtime is not installed.
        """
        raise NotImplementedError(f"{type(self).__name__} has no run_in, but its entry in the table of formats has {runtime}")

    @abstractmethod
    def loading(self, images: str) -> str:
        """Return the part of the card that says how to load the export and run it, Markdown.

        Args:
            images: dtype, range and shape of the images that the export takes, as text.
        """


def sha256sums(files: Mapping[str, bytes]) -> bytes:
    """Return the hash of each file by name, as `sha256sum --check` reads it."""
    return "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items()).encode()


def format_of(name: str) -> Format:
    """Import the code of a format.

    Raises:
        UsageError: if there is no format of this name.
    """
    form: Format = load(FORMATS.find(name).code)()
    return form
