"""What lies beside the blobs of a store and is in no artifact: where data is on this machine, its file hashes, the logs."""

import json
import os
import time
from pathlib import Path
from typing import Any

from sdpctl.data.files import FileHashes, Located, fingerprint, locate
from sdpctl.errors import DataError, IntegrityError
from sdpctl.recipe.schema import LOCAL_KEYS, Recipe
from sdpctl.store.files import locked, replace_file, writing
from sdpctl.untrusted import DOCUMENT_BYTES, load_json, read_regular

LOCAL = "local.json"


class Workspace:
    """A store's path and the files beside its blobs.

    Args:
        path: of the store.
        dry_run: nothing is written, not even the store made.
    """

    def __init__(self, path: Path, *, dry_run: bool = False) -> None:
        self.path = path
        self.dry_run = dry_run
        self._fingerprints: dict[tuple[str, Path], str] = {}

    def fingerprint(self, recipe: Recipe) -> Recipe:
        """Find the recipe's data, downloading where it says so, and return the recipe with the data's fingerprint.

        Raises:
            DataError: where the data is missing, or is not what the recipe's fingerprint promises.
        """
        data = recipe.data
        root = data.folder
        if (data.dataset, root) not in self._fingerprints:
            self._fingerprints[data.dataset, root] = fingerprint(data.dataset, self._located(recipe), self._hashes())
        found = self._fingerprints[data.dataset, root]
        if data.fingerprint not in (None, found):
            raise DataError(
                f"{root}: this is not the data the recipe names (fingerprint {found[:12]}, not {str(data.fingerprint)[:12]}); "
                "point --set data.root= to that, or use this with --set data.fingerprint=null"
            )
        if self._remembers:
            self._remember(found, recipe)
        return recipe.model_copy(update={"data": data.model_copy(update={"fingerprint": found})})

    @property
    def _remembers(self) -> bool:
        """Whether what saves time later is written down: not on a dry run, and not in a store that one may only read."""
        return not self.dry_run and os.access(self.path, os.W_OK, effective_ids=True)

    def _hashes(self) -> FileHashes:
        path = self.path / "files.sqlite"
        if os.path.lexists(path) and not path.is_file():
            raise IntegrityError(f"{path}: this is not a regular file; remove it")
        return FileHashes(path, remember=self._remembers)

    def _located(self, recipe: Recipe) -> Located:
        dataset, root = recipe.data.dataset, recipe.data.folder
        try:
            return locate(dataset, root)
        except DataError:
            if self.dry_run or not recipe.data.download:
                raise
        from sdpctl.data.sources import download

        download(dataset, root)
        return locate(dataset, root)

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
        plain = recipe.model_dump(mode="json", by_alias=True)
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
        """Append a line to `logs/<tag>.jsonl`: what a clock measures belongs in no artifact."""
        with writing(self.path):
            (self.path / "logs").mkdir(exist_ok=True)
            path = self.path / "logs" / f"{tag}.jsonl"
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC  # never waits for a FIFO's reader
            with os.fdopen(os.open(path, flags, 0o644), "w", encoding="utf-8") as file:
                file.write(json.dumps({"time": round(time.time(), 3)} | fields) + "\n")
