"""The context of all stages: the store, the files beside its blobs, and the reporter."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sdpctl.engine.distributed import ALONE, Ranks
from sdpctl.stages.reporter import Reporter
from sdpctl.stages.workspace import Workspace
from sdpctl.store import Artifact, Store


@dataclass(frozen=True, kw_only=True)
class Context:
    """The surroundings of a command.

    Args:
        path: path of the store.
        report: sends messages to the user.
        dry_run: look results up, but run and write nothing.
        ranks: the processes that work on the command, as rank 0 sees them; this process is rank 0.
    """

    path: Path
    report: Reporter
    dry_run: bool = False
    ranks: Ranks = ALONE

    @cached_property
    def workspace(self) -> Workspace:
        """The files beside the store's blobs."""
        return Workspace(self.path, self.report, dry_run=self.dry_run)

    @cached_property
    def store(self) -> Store:
        """The store.

        Raises:
            IntegrityError: if there is none.
        """
        return Store(self.path)

    @property
    def has_store(self) -> bool:
        """Whether the store's path exists, with an intact store or not."""
        return os.path.lexists(self.path)

    def make_store(self) -> None:
        """Create the store if it does not exist. An existing store may be read-only, since it may already have the result."""
        if not self.dry_run and not os.path.lexists(self.path / "oci-layout"):
            Store.create(self.path)

    def require_writable(self) -> None:
        """Check before any work that the store can be written to; create the store if it does not exist.

        Raises:
            ResourceError: if the store cannot be written to.
        """
        if not self.dry_run:
            Store.create(self.path)

    @cached_property
    def _told(self) -> set[str]:
        """What `note_once` told the user."""
        return set()

    def note_once(self, text: str) -> None:
        """Tell the user something that several stages of one command find out."""
        if text not in self._told:
            self._told.add(text)
            self.report.note(text)

    def tagged(self, tag: str) -> Artifact | None:
        """Return the artifact that a tag points at; None if there is none."""
        return self.store.tagged(tag) if self.has_store else None

    def by_key(self, key: str) -> Artifact | None:
        """Return the newest artifact with a key; None if there is none."""
        return self.store.find(key) if self.has_store else None

    def lineage(self, artifact: Artifact) -> list[Artifact]:
        """Return an artifact, the artifact that it was made from, and so on."""
        chain = [artifact]
        while (subject := chain[-1].subject) is not None:
            chain.append(self.store.at(subject))
        return chain
