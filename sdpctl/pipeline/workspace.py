"""What lies beside the blobs of a store and is in no artifact: where data is on this machine, its file hashes, the logs."""

import json
import time
from pathlib import Path
from typing import Any

from sdpctl.data.files import FileHashes, Located, fingerprint, locate
from sdpctl.errors import DataError, IntegrityError
from sdpctl.fields import is_name
from sdpctl.recipe.schema import LOCAL_KEYS, Recipe
from sdpctl.store.files import locked, replace_file, writing

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
            hashes = FileHashes(self.path / "files.sqlite", remember=not self.dry_run)
            self._fingerprints[data.dataset, root] = fingerprint(data.dataset, self._located(recipe), hashes)
        found = self._fingerprints[data.dataset, root]
        if data.fingerprint not in (None, found):
            raise DataError(
                f"{root}: this is not the data the recipe names (fingerprint {found[:12]}, not {str(data.fingerprint)[:12]}); "
                "point --set data.root= to that, or use this with --set data.fingerprint=null"
            )
        if not self.dry_run:
            self._remember(found, recipe)
        return recipe.model_copy(update={"data": data.model_copy(update={"fingerprint": found})})

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
        values = self._remembered().get(fingerprint, {})
        return dict(values)

    def _remembered(self) -> dict[str, Any]:
        path = self.path / LOCAL
        try:
            return dict(json.loads(path.read_bytes()))
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{path}: this file is damaged ({error}); remove it and name the data with --set data.root="
            ) from error

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
            replace_file(self.path / LOCAL, content, staging=self.path / "tmp")

    def log(self, tag: str, **fields: Any) -> None:
        """Append a line to `logs/<tag>.jsonl`: what a clock measures belongs in no artifact.

        Raises:
            IntegrityError: for a tag that is not one, and would lead out of the folder.
        """
        if not is_name(tag):
            raise IntegrityError(f"{self.path}: {tag!r} is not a tag; nothing is logged under it")
        with writing(self.path):
            (self.path / "logs").mkdir(exist_ok=True)
            with (self.path / "logs" / f"{tag}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": round(time.time(), 3)} | fields) + "\n")
