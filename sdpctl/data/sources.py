"""The two splits of a data set, opened."""

from collections.abc import Sequence
from pathlib import Path

from sdpctl.data.reader import Located, reader_of
from sdpctl.data.source import Source
from sdpctl.errors import DataError
from sdpctl.randomness import stream
from sdpctl.untrusted import printable_path


def download(dataset: str, root: Path) -> None:
    """Download a data set from its authors' server; archives that are already in the folder are not fetched again.

    Args:
        dataset: name of the data set in `DATASETS`.
        root: the folder for its files; it is created if it does not exist.

    Raises:
        DataError: if the data set cannot be downloaded.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        reader_of(dataset).download(root)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{printable_path(root)}: {dataset} could not be downloaded ({error}); fetch it by hand and set data.root"
        ) from error


def open_sources(dataset: str, root: Path, located: Located) -> tuple[Source, Source]:
    """Open a data set whose files were found.

    Args:
        dataset: name of the data set in `DATASETS`.
        root: the folder that holds its files.
        located: the files of the data set, as `locate` found them.

    Returns:
        The training split and the test split.

    Raises:
        DataError: if the content of the files is not valid.
    """
    return reader_of(dataset).open(root, located)


def stratified(labels: Sequence[int], share: float, *, seed: int, name: str) -> list[int]:
    """Draw the same share of every class.

    Returns:
        Sorted indices. The rounded share of each class is drawn from (seed, name, class).
    """
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    drawn = (stream(seed, name, label).sample(indices, round(share * len(indices))) for label, indices in members.items())
    return sorted(index for indices in drawn for index in indices)
