"""The base class of trackers, and a run, which a tracker shows."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training and everything that is made from its checkpoint.

    Args:
        name: name of the checkpoint.
        id: identifies the training: runs of one name with different recipes have different ids.
        folder: folder beside the store's blobs; trackers that write files use a subfolder.
    """

    name: str
    id: str
    folder: Path


class Tracker(ABC):
    """An open run of a tracking program.

    Args:
        run: the run, which is continued if the program has it.
        first_step: steps from this one on are written again; None if no earlier figures are replaced.

    Raises:
        ResourceError: from every method, if the program cannot be reached or written to.
    """

    @abstractmethod
    def __init__(self, run: Run, first_step: int | None = None) -> None: ...

    @abstractmethod
    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add the values of curves at a step; names may have slashes."""

    @abstractmethod
    def document(self, name: str, text: str) -> None:
        """Keep a text, such as `recipe.yaml`."""

    @abstractmethod
    def settings(self, values: Mapping[str, object]) -> None:
        """Keep what the training was started with, by dotted key."""

    @abstractmethod
    def close(self) -> None:
        """Write what is left."""


def curve_name(text: str) -> str:
    """Return a name that every tracker accepts: `top1/stem_0.5` for `top1/stem@0.5`."""
    return re.sub(r"[^\w./-]", "_", text)
