"""TensorBoard: event files in the folder `tensorboard` of the store, one subfolder a run."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch.utils.tensorboard.writer import SummaryWriter

from sdpctl.errors import ResourceError
from sdpctl.tracking.tracker import Run, Tracker, curve_name


class TensorBoard(Tracker):
    """Event files, written by `torch.utils.tensorboard`. TensorBoard replaces the figures of steps that are written again."""

    def __init__(self, run: Run, first_step: int | None = None) -> None:
        self.folder = run.folder / "tensorboard" / run.name / run.id
        with self._writing():
            self.writer = SummaryWriter(str(self.folder), purge_step=first_step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add points to curves."""
        with self._writing():
            for name, value in values.items():
                self.writer.add_scalar(curve_name(name), value, step)
            self.writer.flush()

    def document(self, name: str, text: str) -> None:
        """Add a text, which TensorBoard shows as a block of code."""
        with self._writing():
            self.writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()))

    def settings(self, values: Mapping[str, object]) -> None:
        """Do nothing: the recipe is a document, and TensorBoard's table of hyperparameters needs the final figures."""

    def close(self) -> None:
        """Close the event file."""
        with self._writing():
            self.writer.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ResourceError(f"{self.folder}: cannot be written to: {error.strerror or error}") from error
