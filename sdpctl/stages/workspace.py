"""The files beside a store's blobs that are not part of any artifact: paths of data on this machine, file hashes, logs."""

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sdpctl.data.files import FileHashes, Seen, Unreadable, class_names, identified_by, locate, look_at, several
from sdpctl.data.reader import Located
from sdpctl.errors import DataError, IntegrityError
from sdpctl.fields import is_name
from sdpctl.kinds import LEFT_OUT
from sdpctl.recipe.resolved import Resolved
from sdpctl.recipe.schema import LOCAL_KEYS, Recipe
from sdpctl.stages.reporter import Reporter
from sdpctl.store.files import locked, replace_file, writing
from sdpctl.store.layout import canonical
from sdpctl.untrusted import DOCUMENT_BYTES, load_json, printable, printable_path, read_regular

LOCAL = "local.json"
LOGS = "logs"
PROCESSES = "processes"
STUDIES = "studies.sqlite"


class Workspace:
    """The files beside a store's blobs.

    Args:
        path: path of the store.
        report: shows the user the progress of the first look at the data, and which images are left out.
        dry_run: write no files.
    """

    def __init__(self, path: Path, report: Reporter, *, dry_run: bool = False) -> None:
        self.path = path
        self.report = report
        self.dry_run = dry_run
        self._seen: dict[tuple[object, ...], Seen] = {}

    def resolve(self, recipe: Recipe) -> Resolved:
        """Look at a recipe's data, downloading it if the recipe allows, and return the recipe with the data's fingerprint.

        If the recipe does not set the number of classes, the returned recipe has the number of class folders.

        Raises:
            DataError: if the data is missing or unreadable, or does not match the recipe's fingerprint.
        """
        data = recipe.data
        _check_kind(recipe)
        seen = self.seen(recipe)
        found = seen.fingerprint
        if data.fingerprint not in (None, found):
            raise DataError(
                f"{printable_path(data.folder)}: this is not the data that was used before (fingerprint {found[:12]}, not "
                f"{str(data.fingerprint)[:12]}): images or classes were added, removed or changed; restore it, name its folder "
                "with --set data.root=FOLDER, or use this data with --set data.fingerprint=null"
            )
        if recipe.model.num_classes is None:
            recipe = _counted(recipe, seen.located.classes)
        if self._remembers:
            self._remember(found, recipe)
        return Resolved(recipe, found)

    @property
    def _remembers(self) -> bool:
        """Whether file hashes and local keys are saved for later commands: not in a dry run, and not in a read-only store."""
        return not self.dry_run and os.access(self.path, os.W_OK, effective_ids=True)

    def _hashes(self) -> FileHashes:
        path = self.path / "files.sqlite"
        if os.path.lexists(path) and not path.is_file():
            raise IntegrityError(f"{path}: this is not a regular file; remove it")
        return FileHashes(path, remember=self._remembers)

    def seen(self, recipe: Recipe) -> Seen:
        """Return what the first look at a recipe's data found; look at the data now if this was not done yet.

        Raises:
            DataError: if the data is missing or unreadable.
        """
        data = recipe.data
        key = (data.dataset, data.folder, data.partial, data.folders, data.test_share, data.identify, data.skip_unreadable)
        if key not in self._seen:
            hashes = self._hashes()
            kind, skip = data.identify, data.skip_unreadable
            located = self._located(recipe)
            seen = look_at(data.dataset, located, hashes, identify=kind, skip_unreadable=skip, watch=self._watched)
            if bad := seen.left_out:
                named = several(f"{name} ({why})" for name, why in bad.items())
                self.report.note(
                    f"{printable_path(data.folder)}: {len(bad):,} of {len(bad) + len(seen.located.files):,} images "
                    f"{'is' if len(bad) == 1 else 'are'} left out (data.skip_unreadable): {named}"
                )
                if self._remembers:
                    self.log(recipe.name, event="left out", images=dict(bad))
            self._seen[key] = seen
        return self._seen[key]

    def _watched(self, found: Iterable[str | Unreadable], total: int) -> Iterator[str | Unreadable]:
        began = time.monotonic()
        with self.report.progress(f"looking at {total:,} files", total) as bar:
            for done, result in enumerate(found, 1):
                yield result
                bar.advance(f"{done / (time.monotonic() - began):,.0f}/s")

    def left_out(self, recipe: Recipe) -> dict[str, bytes]:
        """Return a layer that lists the unused images of a recipe's data and the reasons; no layer if all images are used."""
        bad = self.seen(recipe).left_out
        return {LEFT_OUT: canonical({printable(name): why for name, why in bad.items()})} if bad else {}

    def _located(self, recipe: Recipe) -> Located:
        data = recipe.data
        try:
            return locate(data.dataset, data.folder, partial=bool(data.partial), arrangement=data.arrangement)
        except DataError:
            if self.dry_run or not data.download:
                raise
        from sdpctl.data.sources import download

        download(data.dataset, data.folder)
        return locate(data.dataset, data.folder)

    def local(self, fingerprint: str) -> dict[str, Any]:
        """Return the values of the local keys, by dotted key, that were last used with the data of a fingerprint."""
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
            staging.mkdir(exist_ok=True)  # a store that a different tool copied may lack this folder
            replace_file(self.path / LOCAL, content, staging=staging)

    def log(self, tag: str, **fields: Any) -> None:
        """Append a line to `logs/<tag>.jsonl`. Measured times go to logs only, since artifacts must not depend on them.

        Raises:
            IntegrityError: if the text is not a tag; as part of a path it could lead out of the folder.
        """
        if not is_name(tag):
            raise IntegrityError(f"{self.path}: {tag!r} is not a tag; nothing is logged under it")
        with writing(self.path):
            (self.path / LOGS).mkdir(exist_ok=True)
            path = self.path / LOGS / f"{tag}.jsonl"
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC  # never waits for a FIFO's reader
            with os.fdopen(os.open(path, flags, 0o644), "w", encoding="utf-8") as file:
                file.write(json.dumps({"time": round(time.time(), 3)} | fields) + "\n")


def _check_kind(recipe: Recipe) -> None:
    """Check that a recipe's fingerprint, if there is one, can be compared with what `data.identify` leads to.

    Raises:
        DataError: if the fingerprint was made with the other value of `data.identify`.
    """
    data = recipe.data
    wanted = data.fingerprint
    if wanted is not None and (kind := identified_by(wanted)) != data.identify:
        raise DataError(
            f"{printable_path(data.folder)}: this data is identified by {data.identify} (data.identify), but the fingerprint "
            f"{wanted[:12]} was made by {kind}: the two cannot be compared; use data.identify={kind}, or use this data with "
            "--set data.fingerprint=null"
        )


def with_classes(recipe: Recipe) -> Recipe:
    """Return a recipe with its number of classes; if the recipe does not set it, count the class folders of its data.

    Raises:
        DataError: if the folders are missing.
    """
    if recipe.model.num_classes is not None:
        return recipe
    data = recipe.data
    try:
        classes = class_names(data.dataset, data.folder, partial=bool(data.partial), arrangement=data.arrangement)
    except DataError as error:
        raise DataError(f"{error}, or set model.num_classes=NUMBER") from error
    return _counted(recipe, classes)


def _counted(recipe: Recipe, classes: Sequence[str]) -> Recipe:
    if len(classes) < 2:
        folder = printable_path(recipe.data.folder)
        raise DataError(f"{folder}: there is only one class, {printable(classes[0])!r}; add a second one")
    return recipe.changed(model={"num_classes": len(classes)})
