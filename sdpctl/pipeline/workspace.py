"""What lies beside the blobs of a store and is in no artifact: where data is on this machine, its file hashes, the logs."""

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdpctl.data.files import FileHashes, Seen, Unreadable, class_names, locate, look_at, several
from sdpctl.data.reader import Located
from sdpctl.errors import DataError, IntegrityError
from sdpctl.fields import is_name
from sdpctl.pipeline.artifacts import LEFT_OUT
from sdpctl.recipe.schema import LOCAL_KEYS, Recipe
from sdpctl.store.files import locked, replace_file, writing
from sdpctl.store.layout import canonical
from sdpctl.untrusted import DOCUMENT_BYTES, load_json, printable, printable_path, read_regular

if TYPE_CHECKING:
    from sdpctl.pipeline.context import Reporter

LOCAL = "local.json"


class Workspace:
    """A store's path and the files beside its blobs.

    Args:
        path: of the store.
        report: who is told how far a first look at data is, and what is left out.
        dry_run: nothing is written, not even the store made.
    """

    def __init__(self, path: Path, report: "Reporter", *, dry_run: bool = False) -> None:
        self.path = path
        self.report = report
        self.dry_run = dry_run
        self._seen: dict[tuple[object, ...], Seen] = {}

    def fingerprint(self, recipe: Recipe) -> Recipe:
        """Find the recipe's data, downloading where it says so, and return the recipe with what was found.

        That is the data's fingerprint and, where the recipe does not say it, the number of classes.

        Raises:
            DataError: where the data is missing or unreadable, or is not what the recipe's fingerprint promises.
        """
        data = recipe.data
        seen = self.seen(recipe)
        found = seen.fingerprint
        if data.fingerprint not in (None, found):
            raise DataError(
                f"{printable_path(data.folder)}: this is not the data that was used before (fingerprint {found[:12]}, not "
                f"{str(data.fingerprint)[:12]}): images or classes were added, removed or changed; restore it, say where it is "
                "with --set data.root=FOLDER, or use this data with --set data.fingerprint=null"
            )
        if recipe.model.num_classes is None:
            recipe = _counted(recipe, seen.located.classes)
        if self._remembers:
            self._remember(found, recipe)
        return recipe.changed(data={"fingerprint": found})

    @property
    def _remembers(self) -> bool:
        """Whether what saves time later is written down: not on a dry run, and not in a store that one may only read."""
        return not self.dry_run and os.access(self.path, os.W_OK, effective_ids=True)

    def _hashes(self) -> FileHashes:
        path = self.path / "files.sqlite"
        if os.path.lexists(path) and not path.is_file():
            raise IntegrityError(f"{path}: this is not a regular file; remove it")
        return FileHashes(path, remember=self._remembers)

    def seen(self, recipe: Recipe) -> Seen:
        """Return the recipe's data as it was first seen here, looking at it where it was not.

        Raises:
            DataError: where the data is missing or unreadable.
        """
        data = recipe.data
        key = (data.dataset, data.folder, data.partial, data.skip_unreadable)
        if key not in self._seen:
            hashes = self._hashes()
            skip = data.skip_unreadable
            seen = look_at(data.dataset, self._located(recipe), hashes, skip_unreadable=skip, watch=self._watched)
            if bad := seen.left_out:
                named = several(f"{name} ({why})" for name, why in bad.items())
                self.report.note(
                    f"{printable_path(data.folder)}: {len(bad):,} of {len(bad) + len(seen.located.files):,} images are left "
                    f"out (data.skip_unreadable): {named}"
                )
                if self._remembers:
                    self.log(recipe.name, event="left out", images=dict(bad))
            self._seen[key] = seen
        return self._seen[key]

    def _watched(self, found: Iterable[str | Unreadable], total: int) -> Iterator[str | Unreadable]:
        with self.report.progress(f"looking at {total:,} files", total) as bar:
            for result in found:
                yield result
                bar.advance()

    def left_out(self, recipe: Recipe) -> dict[str, bytes]:
        """Return the layer that says which images of the recipe's data are not used and why; nothing where all are."""
        bad = self.seen(recipe).left_out
        return {LEFT_OUT: canonical({printable(name): why for name, why in bad.items()})} if bad else {}

    def _located(self, recipe: Recipe) -> Located:
        data = recipe.data
        try:
            return locate(data.dataset, data.folder, partial=bool(data.partial))
        except DataError:
            if self.dry_run or not data.download:
                raise
        from sdpctl.data.sources import download

        download(data.dataset, data.folder)
        return locate(data.dataset, data.folder)

    def local(self, fingerprint: str) -> dict[str, Any]:
        """Return the keys that cannot change a result, as they were last used with some data: values by dotted key."""
        return self._remembered().get(fingerprint, {})

    def _remembered(self) -> dict[str, dict[str, Any]]:
        path = self.path / LOCAL
        try:
            remembered = load_json(read_regular(path, limit=DOCUMENT_BYTES))
            if not isinstance(remembered, dict) or not all(isinstance(values, dict) for values in remembered.values()):
                raise TypeError("it is not an object of objects")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise IntegrityError(
                f"{path}: this file cannot be read ({reason}); remove it and name the data with --set data.root="
            ) from error
        return remembered

    def _remember(self, fingerprint: str, recipe: Recipe) -> None:
        plain = recipe.model_dump(mode="json")
        values: dict[str, Any] = {}
        for path in LOCAL_KEYS:
            value: Any = plain
            for key in path:
                value = value[key]
            values[".".join(path)] = value
        values["data.root"] = str(recipe.data.folder.absolute())
        values["data.download"] = False
        if self._remembered().get(fingerprint) == values:
            return
        with writing(self.path), locked(self.path / "index.lock", timeout=60):
            content = json.dumps(self._remembered() | {fingerprint: values}, indent=1).encode()
            staging = self.path / "tmp"
            staging.mkdir(exist_ok=True)  # another tool's copy has none
            replace_file(self.path / LOCAL, content, staging=staging)

    def log(self, tag: str, **fields: Any) -> None:
        """Append a line to `logs/<tag>.jsonl`: what a clock measures belongs in no artifact.

        Raises:
            IntegrityError: for a tag that is not one, and would lead out of the folder.
        """
        if not is_name(tag):
            raise IntegrityError(f"{self.path}: {tag!r} is not a tag; nothing is logged under it")
        with writing(self.path):
            (self.path / "logs").mkdir(exist_ok=True)
            path = self.path / "logs" / f"{tag}.jsonl"
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC  # never waits for a FIFO's reader
            with os.fdopen(os.open(path, flags, 0o644), "w", encoding="utf-8") as file:
                file.write(json.dumps({"time": round(time.time(), 3)} | fields) + "\n")


def with_classes(recipe: Recipe) -> Recipe:
    """Return a recipe with the number of classes that its data's folders name, where it does not say it.

    Raises:
        DataError: where the folders are not there.
    """
    if recipe.model.num_classes is not None:
        return recipe
    data = recipe.data
    try:
        classes = class_names(data.dataset, data.folder, partial=bool(data.partial))
    except DataError as error:
        raise DataError(f"{error}, or set model.num_classes=NUMBER") from error
    return _counted(recipe, classes)


def _counted(recipe: Recipe, classes: Sequence[str]) -> Recipe:
    if len(classes) < 2:
        folder = printable_path(recipe.data.folder)
        raise DataError(f"{folder}: there is only one class, {printable(classes[0])!r}; add a second one")
    return recipe.changed(model={"num_classes": len(classes)})
