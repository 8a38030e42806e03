"""What the stages share: who is told, what is known already, what a reference means."""

import hashlib
import os
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from sdpctl.errors import IntegrityError, NotFoundError, RecipeError, UsageError
from sdpctl.fields import is_name
from sdpctl.instance import Instance
from sdpctl.pipeline.artifacts import RECIPE
from sdpctl.pipeline.workspace import LOCAL, Workspace
from sdpctl.recipe.document import decode, parse_yaml
from sdpctl.recipe.load import dump_yaml, parse_recipe
from sdpctl.recipe.schema import LOCAL_KEYS, UNRECORDED_KEYS, Recipe
from sdpctl.sdpoint import sdpoint_instances
from sdpctl.store import Artifact, Store
from sdpctl.store.layout import canonical

VERSIONS = {"checkpoint": 1, "bn-statistics": 2, "evaluation": 4, "profile": 1, "search": 2, "export": 1}
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
        trained_on: fingerprint of the data of the training, where it is known.
    """

    checkpoint: Artifact
    statistics: Artifact | None
    recipe: Recipe
    name: str
    given: frozenset[str] = frozenset()
    trained_on: str | None = None

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
        return Workspace(self.path, self.report, dry_run=self.dry_run)

    @cached_property
    def store(self) -> Store:
        """The store, which must exist."""
        return Store(self.path)

    @property
    def is_there(self) -> bool:
        """Whether there is a store, whole or not."""
        return os.path.lexists(self.path)

    def find_store(self) -> None:
        """Make the store where there is none; one that is there may be read-only, and still have the answer."""
        if not self.dry_run and not os.path.lexists(self.path / "oci-layout"):
            Store.create(self.path)

    def prepare(self) -> None:
        """Make sure, before any work is done, that the store can be written to; make it where there is none."""
        if not self.dry_run:
            Store.create(self.path)

    def known(self, key: str, tag: str, *, moves: bool = True) -> Artifact | None:
        """Return what the key led to before, tagged anew if the tag moves; None where it is to be done (again)."""
        if self.force or not self.is_there:
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
        if not self.is_there:
            return None
        return self.store.tagged(tag)

    def fingerprinted(self, opened: Opened) -> Opened:
        """Look at the data again, and return the same with its fingerprint; say so where it is not that of the training."""
        recipe = self.workspace.fingerprint(opened.recipe)
        if opened.recipe.data.fingerprint is None and opened.trained_on not in (None, recipe.data.fingerprint):
            self.report.note(
                f"{opened.name}: this is not the data of the training (fingerprint {str(recipe.data.fingerprint)[:12]}, not "
                f"{str(opened.trained_on)[:12]}); held-out and test images may have been trained on"
            )
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


def recipe_of(artifact: Artifact, context: Context) -> Recipe:
    """Return the recipe an artifact was made by.

    Raises:
        IntegrityError: where the stored recipe does not hold, or says where the machine that wrote it reads and writes.
    """
    called = f"recipe of {f'{artifact.tag}, ' if artifact.tag else ''}{short(artifact)}"
    try:
        text = _recipe_text(artifact, context)
        _check_foreign(parse_yaml(text, called).data, called)
        return parse_recipe(text, called)
    except RecipeError as error:
        raise IntegrityError(
            f"{error.problems[0]}; the artifact is damaged, or a newer sdpctl made it: restore it from a copy, or make it again"
        ) from error


def _check_foreign(plain: Any, called: str) -> None:
    """Refuse a recipe from a store that says where this machine reads and writes.

    Raises:
        IntegrityError: naming the key.
    """
    for path in LOCAL_KEYS + UNRECORDED_KEYS:
        part = plain
        for key in path:
            part = part.get(key) if isinstance(part, dict) else None
        if part is not None:
            raise IntegrityError(f"{called}: {'.'.join(path)} does not belong in an artifact; get it from a source you trust")


def _recipe_text(artifact: Artifact, context: Context) -> str:
    return decode(context.store.read(artifact, RECIPE), f"recipe of {short(artifact)}")


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
    trained = recipe_of(checkpoint, context)
    local = context.workspace.local(trained.data.fingerprint or "")
    used = {".".join(path) for path in LOCAL_KEYS} - {"data.download"}
    known = {key: value for key, value in local.items() if key in used}
    text = _recipe_text(checkpoint, context)
    if known:
        try:
            parse_recipe(text, LOCAL, (), known)
        except RecipeError as error:
            raise IntegrityError(
                f"{context.path / LOCAL}: this file is damaged ({error.problems[0]}); remove it and name the data with "
                "--set data.root="
            ) from error
    recipe = parse_recipe(text, f"recipe of {ref}", overrides, known)
    tag = artifact.tag or checkpoint.tag
    name = _DERIVED.sub("", tag) if tag else short(checkpoint)
    if not is_name(name):  # it becomes the name of files
        raise IntegrityError(f"{store.path / 'index.json'}: {tag!r} is not a tag; give the digest {artifact.digest} a new one")
    return Opened(checkpoint, statistics, recipe, name, frozenset(given), trained.data.fingerprint)
