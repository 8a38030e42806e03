"""The base classes of stages, and what a stage exchanges with the plan."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from sdpctl.kinds import Kind
from sdpctl.stages.context import Context
from sdpctl.store import Artifact
from sdpctl.store.layout import canonical


@dataclass(frozen=True)
class Made:
    """The result of a stage, not yet committed.

    Args:
        layers: content of the artifact's layers by title.
        summary: the result in a few words, for the user.
        replaces: an artifact that is removed once this result is committed, such as a half-finished training.
    """

    layers: Mapping[str, bytes]
    summary: str
    replaces: Artifact | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """The work of a stage, once everything that the stage needs is in the store.

    Args:
        key: hash of everything that the result depends on.
        make: does the work and returns the result.
        subject: the artifact that the result is made from; the store keeps it as long as the result.
        complete: whether the result covers everything that the stage makes by default, such as every instance of the grid.
        together: inputs by tag; these tags move too when a command that names this stage moves its tag.
        adapt: maps an artifact with the same key to the result that must be committed instead; None if the artifact fits.
        guard: context manager around work and commit; it delays signals so that no result is lost.
    """

    key: str
    make: Callable[[], Made]
    subject: Artifact | None = None
    complete: bool = True
    together: Mapping[str, Artifact] = field(default_factory=dict)
    adapt: Callable[[Artifact], Made | None] = lambda _: None
    guard: AbstractContextManager[object] = field(default_factory=nullcontext)


@dataclass(frozen=True)
class Tracked:
    """The trackers that get the figures of a result.

    Args:
        by: names of the trackers.
        name: name of the checkpoint, under which the trackers show the figures.
    """

    by: tuple[str, ...] = ()
    name: str = ""


Steps = Generator["Stage", Artifact, Job | Artifact | None]
"""Yields the stages that are needed and receives their artifacts. Returns the job of the stage; or a stored artifact that can
be used instead; or None, if a dry run cannot tell without doing some of the work."""


def key_of(kind: Kind, **inputs: Any) -> str:
    """Return the key of a result: a hash of its kind, the kind's version and all inputs."""
    parts = {"stage": kind.name, "version": kind.version} | inputs
    return hashlib.sha256(canonical(parts)).hexdigest()


class Stage(ABC):
    """One step of a plan; its result is one artifact."""

    kind: Kind

    @property
    @abstractmethod
    def tag(self) -> str:
        """The tag of the result."""

    @property
    def also(self) -> tuple[str, ...]:
        """Further tags of the result, which move by the same rule as `tag`; none by default."""
        return ()

    @property
    def tracked(self) -> Tracked:
        """The trackers that get the figures of the result; none by default."""
        return Tracked()

    @abstractmethod
    def steps(self, context: Context) -> Steps:
        """Yield the needed stages one after another, and return the job."""

    @abstractmethod
    def task(self, context: Context) -> str:
        """Return what the stage would do, in a few words, such as the number of instances and images."""


class Stored(Stage):
    """An artifact that is in the store already."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact

    @property
    def tag(self) -> str:
        """The tag by which the artifact was found; without a tag, the beginning of its digest."""
        return self.artifact.tag or self.artifact.short

    def steps(self, context: Context) -> Steps:  # noqa: ARG002
        """Return the artifact."""
        yield from ()
        return self.artifact

    def task(self, context: Context) -> str:  # noqa: ARG002
        """Return an empty text, since a stored artifact needs no work."""
        return ""
