"""What the stages share: who is told, what is known already, what a reference means."""

import hashlib
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from sdpctl.errors import NotFoundError, UsageError
from sdpctl.instance import Instance, sdpoint_instances
from sdpctl.pipeline.artifacts import RECIPE
from sdpctl.pipeline.workspace import Workspace
from sdpctl.recipe.load import dump_yaml, parse_recipe
from sdpctl.recipe.schema import Recipe
from sdpctl.store import Artifact, Store
from sdpctl.store.layout import canonical

VERSIONS = {"checkpoint": 1, "bn-statistics": 1, "evaluation": 3, "profile": 1, "search": 1, "export": 1}
"""By kind; raised when a stage would lead to something else from the same inputs."""

_DERIVED = re.compile(r"(\.(bn|eval|holdout|profile|search|export\.[a-z-]+\.[0-9a-f]{12}))+$")
"""What a stage appends to the tag of its input."""


class Progress(Protocol):
    """A bar on a terminal; nothing elsewhere."""

    def advance(self, text: str = "") -> None:
        """Count one more, and show what is worth knowing of it."""


class Reporter(Protocol):
    """Who is told what happens; the stages themselves print nothing."""

    def note(self, text: str) -> None:
        """Say what a user wants to know."""

    def detail(self, text: str) -> None:
        """Say what a curious user wants to know."""

    def progress(self, text: str, total: int, done: int = 0) -> AbstractContextManager[Progress]:
        """Show how far something is."""


@dataclass(frozen=True)
class Opened:
    """What a stage works on, with what it was made from.

    Args:
        checkpoint: the weights.
        statistics: the BatchNorm statistics, where those or something made from them was meant.
        recipe: of the checkpoint, overrides applied.
        name: what tags of new artifacts begin with.
        given: the sections that overrides concern.
    """

    checkpoint: Artifact
    statistics: Artifact | None
    recipe: Recipe
    name: str
    given: frozenset[str] = frozenset()

    @property
    def other_data(self) -> bool:
        """Whether the data has to be looked at before anything is looked up: it was set, or never seen."""
        return "data" in self.given or self.recipe.data.fingerprint is None


@dataclass(frozen=True, kw_only=True)
class Context:
    """What every stage is given beside its inputs.

    Args:
        path: of the store.
        report: who is told what happens.
        force: do it again even where the store has the answer.
        dry_run: look everything up, write nothing.
        calibrates: whether a stage may gather the statistics it lacks.
        aside: what a stage makes on the way to something else takes a tag only where it is all that the stage would make by
            itself, and the tag is not of the same checkpoint.
    """

    path: Path
    report: Reporter
    force: bool = False
    dry_run: bool = False
    calibrates: bool = True
    aside: bool = False

    @cached_property
    def workspace(self) -> Workspace:
        """What lies beside the store's blobs."""
        return Workspace(self.path, dry_run=self.dry_run)

    @cached_property
    def store(self) -> Store:
        """The store, which must exist."""
        return Store(self.path)

    def prepare(self) -> None:
        """Make the store where there is none, and make sure that it can be written to."""
        if not self.dry_run:
            Store.create(self.path)

    def known(self, key: str, tag: str, *, moves: bool = True) -> Artifact | None:
        """Return what the key led to before, tagged anew if the tag moves; None where it is to be done (again)."""
        if self.force or not self.path.exists():
            return None
        artifact = self.store.find(key)
        if artifact is None:
            self.report.detail(f"{tag}: nothing in the store has the key {key[:12]}")
            return None
        self.report.note(f"{tag}: in the store already, {short(artifact)}")
        tagged = self.tagged(tag)
        if tagged is not None and tagged.digest == artifact.digest:
            return tagged
        return artifact if self.dry_run or not moves else self.store.tag(artifact, tag)

    def moves(self, tag: str, checkpoint: Artifact, *, whole: bool) -> bool:
        """Say whether a stage moves a tag to what it makes of a checkpoint, for all its instances or for some."""
        if not self.aside:
            return True
        tagged = self.tagged(tag)
        return whole and (tagged is None or self.lineage(tagged)[-1].digest != checkpoint.digest)

    def lineage(self, artifact: Artifact) -> list[Artifact]:
        """Return an artifact, what it was made from, and so on."""
        chain = [artifact]
        while (subject := chain[-1].subject) is not None:
            chain.append(self.store.at(subject))
        return chain

    def tagged(self, tag: str) -> Artifact | None:
        """Return what a tag points at, if anything."""
        if not self.path.exists():
            return None
        return next((artifact for artifact in self.store.artifacts() if artifact.tag == tag), None)

    def fingerprinted(self, opened: Opened) -> Opened:
        """Look at the data again, and return the same with its fingerprint."""
        recipe = self.workspace.fingerprint(opened.recipe)
        return replace(opened, recipe=recipe)


def counted(instances: Sequence[Instance]) -> str:
    """Say how many instances there are."""
    return f"{len(instances)} instance{'' if len(instances) == 1 else 's'}"


def short(artifact: Artifact) -> str:
    """Return the first twelve hex digits of a digest: enough to name it."""
    return artifact.digest.removeprefix("sha256:")[:12]


def stage_key(kind: str, **inputs: Any) -> str:
    """Return the hash of what a stage's result depends on."""
    return hashlib.sha256(canonical({"stage": kind, "version": VERSIONS[kind]} | inputs)).hexdigest()


def recipe_layer(recipe: Recipe) -> bytes:
    """Return the resolved recipe as it is kept in every artifact it led to."""
    return dump_yaml(recipe.identity()).encode()


def recipe_of(artifact: Artifact, context: Context) -> Recipe:
    """Return the recipe an artifact was made by."""
    return parse_recipe(context.store.read(artifact, RECIPE).decode(), f"recipe of {short(artifact)}")


def grid(recipe: Recipe, ratios: Sequence[float] | None = None) -> list[Instance]:
    """Return the instances of a recipe: those it lists, or SDPoint's, `full` first; at the default ratios where it is off."""
    if recipe.sdpoint is not None and recipe.sdpoint.instances and ratios is None:
        return named(recipe.sdpoint.instances, recipe.model.points)
    return sdpoint_instances(recipe, ratios or recipe.ratios)


def named(texts: Sequence[str], points: Sequence[str]) -> list[Instance]:
    """Return the instances of these texts, each once.

    Raises:
        InstanceError: where one does not parse, or names a point the network lacks.
    """
    return list(dict.fromkeys(Instance.parse(text).check(points) for text in texts))


OVERRIDABLE = ("data", "calibrate", "evaluate", "search", "export", "device", "memory")
"""What may be set for a checkpoint that is there; the rest says how it came to be."""


def open_artifact(ref: str, context: Context, overrides: Sequence[str] = ()) -> Opened:
    """Resolve a reference to a checkpoint, or to something made from one.

    Raises:
        IntegrityError: where there is no store, or a link of the lineage is missing or damaged.
        NotFoundError: where there is no such artifact, or it is something else.
        RecipeError: where the recipe does not hold with the overrides.
        UsageError: where an override concerns what is settled already.
    """
    store = context.store
    chain = context.lineage(store.resolve(ref))
    artifact, checkpoint = chain[0], chain[-1]
    if checkpoint.kind != "checkpoint":
        raise NotFoundError(f"{ref} is of kind {artifact.kind}, not made from a checkpoint; `sdpctl store ls` lists those")
    statistics = next((link for link in chain if link.kind == "bn-statistics"), None)
    given = set()
    for override in overrides:
        section = override.partition("=")[0].partition(".")[0]
        if section not in OVERRIDABLE:
            raise UsageError(f"--set {override}: {ref} is trained already; only {', '.join(OVERRIDABLE)} can be set for it")
        if section == "calibrate" and statistics is not None:
            raise UsageError(f"--set {override}: {ref} has its statistics already; give the checkpoint to calibrate anew")
        given.add(section)
    text, source = store.read(checkpoint, RECIPE).decode(), f"recipe of {ref}"
    fingerprint = parse_recipe(text, source).data.fingerprint or ""
    recipe = parse_recipe(text, source, overrides, context.workspace.local(fingerprint))
    tag = artifact.tag or checkpoint.tag
    name = _DERIVED.sub("", tag) if tag else short(checkpoint)
    return Opened(checkpoint, statistics, recipe, name, frozenset(given))
