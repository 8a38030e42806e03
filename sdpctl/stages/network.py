"""A trained network as the stages use it: its checkpoint, its recipe, and the fingerprint of its data."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sdpctl.data.files import identified_by
from sdpctl.errors import IntegrityError, NotFoundError, RecipeError, UsageError
from sdpctl.fields import is_name
from sdpctl.instance import Instance
from sdpctl.kinds import KINDS, RECIPE, without_suffix
from sdpctl.recipe.document import decode, parse_yaml
from sdpctl.recipe.load import dump_yaml, parse_recipe
from sdpctl.recipe.resolved import Resolved
from sdpctl.recipe.schema import LOCAL_KEYS, STORED_DEFAULTS, UNRECORDED_KEYS, Recipe
from sdpctl.sdpoint import sdpoint_instances
from sdpctl.stages.context import Context
from sdpctl.stages.stage import Stage, Stored
from sdpctl.stages.workspace import LOCAL
from sdpctl.store import Artifact


def overridable() -> list[str]:
    """Return the sections and keys that may be set for an existing checkpoint; all others describe its training."""
    optional = dict.fromkeys(kind.section for kind in KINDS.values() if kind.section is not None)
    return ["data", "calibrate", "evaluate", *optional, "device", "memory"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedNetwork:
    """A checkpoint, and the recipe for the artifacts that are made from it.

    Args:
        checkpoint: the stage that makes the checkpoint, or the stored checkpoint.
        resolved: the recipe with overrides applied, the data's fingerprint and the digest of `train.init`.
        name: first part of the tags of new artifacts.
        statistics: the BatchNorm statistics that the user named, directly or by an artifact made from them.
        overridden: the sections that overrides change.
        trained_on: fingerprint of the training data; None if it is not known.
    """

    checkpoint: Stage
    resolved: Resolved
    name: str
    statistics: Artifact | None = None
    overridden: frozenset[str] = field(default_factory=frozenset)
    trained_on: str | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self.resolved.recipe

    def with_known_data(self, context: Context) -> "TrainedNetwork":
        """Return the network with its data's fingerprint; read the data only if an override changes it or it is not known yet.

        Raises:
            DataError: if the data is missing, or does not match the recipe's fingerprint.
        """
        looks = "data" in self.overridden or self.resolved.fingerprint is None
        return self.with_data(context) if looks else self

    def with_data(self, context: Context) -> "TrainedNetwork":
        """Compute the data's fingerprint, and return the network with it; warn the user if the training used different data.

        Raises:
            DataError: if the data is missing, or does not match the recipe's fingerprint.
        """
        resolved = context.workspace.resolve(self.recipe)
        found, trained_on = str(resolved.fingerprint), self.trained_on
        if self.recipe.data.fingerprint is None and trained_on not in (None, found):
            known, now = identified_by(trained_on), identified_by(found)
            verdict = "this is not the training data" if known == now else "this may or may not be the training data"
            why = "" if known == now else f", made by data.identify={known}, which cannot be compared with {now}"
            fingerprints = f"its fingerprint is {found[:12]}, not {trained_on[:12]}{why}"
            context.note_once(f"{self.name}: {verdict} ({fingerprints}); the training may have used held-out and test images")
        return replace(self, resolved=replace(self.resolved, recipe=resolved.recipe, fingerprint=resolved.fingerprint))

    def with_statistics(self, statistics: Artifact) -> "TrainedNetwork":
        """Return the network with the statistics that its instances will use."""
        return replace(self, statistics=statistics)

    def changed(self, **sections: Any) -> "TrainedNetwork":
        """Return the network with some sections of its recipe replaced."""
        return replace(self, resolved=replace(self.resolved, recipe=self.recipe.changed(**sections)))


def grid(recipe: Recipe, ratios: Sequence[float] | None = None) -> list[Instance]:
    """Return the instances that a recipe lists, or the SDPoint grid, `full` first; with default ratios if SDPoint is off."""
    if recipe.sdpoint is not None and recipe.sdpoint.instances and ratios is None:
        return named(recipe.sdpoint.instances, recipe.model.points)
    return sdpoint_instances(recipe, ratios or recipe.ratios)


def named(texts: Sequence[str], points: Sequence[str]) -> list[Instance]:
    """Return the instances that texts name, without duplicates.

    Raises:
        InstanceError: if a text cannot be parsed, or names a point that the network does not have.
    """
    return list(dict.fromkeys(Instance.parse(text).check(points) for text in texts))


def counted(instances: Sequence[Instance]) -> str:
    """Return the number of instances with its noun, such as `1 instance`."""
    return f"{len(instances)} instance{'' if len(instances) == 1 else 's'}"


def recipe_layer(resolved: Resolved) -> bytes:
    """Return the recipe layer of an artifact as bytes."""
    return dump_yaml(resolved.identity()).encode()


def recipe_of(artifact: Artifact, context: Context) -> Recipe:
    """Return the recipe that is stored in an artifact.

    Raises:
        IntegrityError: if the stored recipe is not valid, or holds local paths or settings of the machine that wrote it.
    """
    called = f"recipe of {f'{artifact.tag}, ' if artifact.tag else ''}{artifact.short}"
    try:
        text = _recipe_text(artifact, context)
        _check_foreign(parse_yaml(text, called).data, called)
        return parse_recipe(text, called, (), STORED_DEFAULTS)
    except RecipeError as error:
        raise IntegrityError(
            f"{error.problems[0]}; the artifact is damaged, or a newer sdpctl made it: restore it from a copy, or make it again"
        ) from error


def _check_foreign(plain: Any, called: str) -> None:
    """Refuse a stored recipe with keys that choose where this machine reads and writes.

    Raises:
        IntegrityError: if there is such a key; the message names it.
    """
    for path in LOCAL_KEYS + UNRECORDED_KEYS:
        part = plain
        for key in path:
            part = part.get(key) if isinstance(part, dict) else None
        if part is not None:
            raise IntegrityError(f"{called}: {'.'.join(path)} does not belong in an artifact; get it from a source you trust")


def _recipe_text(artifact: Artifact, context: Context) -> str:
    return decode(context.store.read(artifact, RECIPE), f"recipe of {artifact.short}")


def open_network(ref: str, context: Context, overrides: Sequence[str] = ()) -> TrainedNetwork:
    """Find a checkpoint, or the checkpoint that an artifact was made from.

    Args:
        ref: a tag, a digest, or the beginning of a digest.
        context: gives the store.
        overrides: overrides of the recipe.

    Raises:
        IntegrityError: if there is no store, or an artifact of the lineage is missing or damaged.
        NotFoundError: if there is no such artifact, or it was not made from a checkpoint.
        RecipeError: if the recipe is not valid with the overrides.
        UsageError: if an override would change how the checkpoint was trained.
    """
    store = context.store
    chain = context.lineage(store.resolve(ref))
    artifact, checkpoint = chain[0], chain[-1]
    if checkpoint.kind != "checkpoint":
        raise NotFoundError(
            f"{ref} is of kind {artifact.kind} and was not made from a checkpoint; `sdpctl store ls` lists the checkpoints"
        )
    statistics = next((link for link in chain if link.kind == "bn-statistics"), None)
    overridden = frozenset(_overridden(override, ref, statistics) for override in overrides)
    trained = recipe_of(checkpoint, context)
    recipe = _with_local_keys(checkpoint, trained, f"recipe of {ref}", context, overrides)
    tagged = artifact if artifact.tag else checkpoint
    name = without_suffix(tagged.tag, tagged.kind) if tagged.tag else checkpoint.short
    if not is_name(name):  # names of files will begin with it
        raise IntegrityError(
            f"{store.path / 'index.json'}: {tagged.tag!r} is not a tag; give the digest {artifact.digest} a new one"
        )
    return TrainedNetwork(
        checkpoint=Stored(checkpoint),
        resolved=Resolved(recipe, recipe.data.fingerprint),
        name=name,
        statistics=statistics,
        overridden=overridden,
        trained_on=trained.data.fingerprint,
    )


def _overridden(override: str, ref: str, statistics: Artifact | None) -> str:
    """Return the section that an override changes.

    Raises:
        UsageError: if the section can no longer be changed.
    """
    section = override.partition("=")[0].partition(".")[0]
    if section not in (known := overridable()):
        raise UsageError(f"--set {override}: {ref} is trained already; only {', '.join(known)} can be set for it")
    if section == "calibrate" and statistics is not None:
        raise UsageError(f"--set {override}: {ref} has its statistics already; name the checkpoint instead to calibrate again")
    return section


def _with_local_keys(checkpoint: Artifact, trained: Recipe, called: str, context: Context, overrides: Sequence[str]) -> Recipe:
    """Return a checkpoint's recipe with the local keys that were last used with its data, and with overrides applied."""
    local = context.workspace.local(trained.data.fingerprint or "")
    used = {".".join(path) for path in LOCAL_KEYS} - {"data.download"}
    known = {key: value for key, value in local.items() if key in used}
    text = _recipe_text(checkpoint, context)
    if known:
        try:
            parse_recipe(text, LOCAL, (), STORED_DEFAULTS | known)
        except RecipeError as error:
            raise IntegrityError(
                f"{context.path / LOCAL}: this file is damaged ({error.problems[0]}); remove it and name the data with "
                "--set data.root="
            ) from error
    return parse_recipe(text, called, overrides, STORED_DEFAULTS | known)
