"""The checkpoints that a training begins with or learns from.

It begins with one of the store, or with weights of a library, which are fetched and stored once.
"""

from typing import Any

from sdpctl.errors import NotFoundError, RecipeError, UsageError
from sdpctl.kinds import CHECKPOINT
from sdpctl.models.registry import architecture
from sdpctl.recipe.resolved import Resolved
from sdpctl.recipe.schema import Recipe
from sdpctl.stages.context import Context
from sdpctl.stages.import_weights import ImportWeights, read_weights
from sdpctl.stages.network import recipe_of
from sdpctl.stages.stage import key_of
from sdpctl.store import Artifact


def begin_from(recipe: Recipe, context: Context) -> tuple[Recipe, Artifact | None]:
    """Return the checkpoint that `train.init` names, and the recipe with the preprocessing of a library's weights.

    Keys of `data` that the recipe sets are not changed. For a checkpoint of the store no key is changed; if the recipe prepares
    images differently than the checkpoint's recipe, the user is told.

    Returns:
        The recipe, and the checkpoint; None instead of the checkpoint if `train.init` is not set, or if this is a dry run and a
        library's weights are not in the store yet.

    Raises:
        DataError: if a library's weights cannot be fetched.
        NotFoundError: if the store has no such checkpoint.
        RecipeError: if a library has no weights of this name.
    """
    ref = recipe.train.init
    if ref is None:
        return recipe, None
    library, slash, name = ref.partition("/")
    if slash:
        stored = _library_checkpoint(library, name, context)
        return (recipe if stored is None else _with_preprocessing(recipe, stored, ref, context)), stored
    checkpoint = _stored_checkpoint(ref, "train.init", context)
    if differing := _differing(recipe, checkpoint, context):
        settings = ", ".join(f"data.{key}={_text(value)}" for key, value in differing.items())
        context.note_once(
            f"{recipe.name}: {ref} was made with {settings}; this recipe prepares images differently: set these keys, unless "
            "this is meant"
        )
    return recipe, checkpoint


def teacher_of(resolved: Resolved, context: Context) -> Artifact | None:
    """Return the checkpoint that `train.distill.teacher` names; None without a teacher, or if `full` teaches itself.

    If the teacher was trained on different images, or held out different ones, the user is told.

    Args:
        resolved: the recipe with the fingerprint of its data.
        context: gives the store.

    Raises:
        NotFoundError: if the store has no such checkpoint.
        RecipeError: if the teacher has a different number of classes or channels, cannot take images of this size, or was
            trained on images that were normalised differently.
    """
    recipe = resolved.recipe
    distill = recipe.train.distill
    if distill is None or distill.teacher == "self":
        return None
    key = "train.distill.teacher"
    if "/" in distill.teacher:
        raise RecipeError([f"{key}={distill.teacher}: a teacher is a checkpoint of the store; `sdpctl import` makes one"])
    teacher = _stored_checkpoint(distill.teacher, key, context)
    theirs, called = recipe_of(teacher, context), f"{key}: {distill.teacher}"
    classes = theirs.model.num_classes, recipe.model.num_classes
    if None not in classes and classes[0] != classes[1]:
        raise RecipeError([f"{called} has {classes[0]} classes, not {classes[1]}; name a teacher of the same classes"])
    if theirs.model.in_channels != recipe.model.in_channels:
        raise RecipeError(
            [f"{called} takes {theirs.model.in_channels} channels, not model.in_channels={recipe.model.in_channels}"]
        )
    size = recipe.data.image_size
    if (reason := architecture(theirs.model.arch).refused_size(size, theirs.model.stem)) is not None:
        raise RecipeError([f"{called} cannot take images of data.image_size={size}: {reason}"])
    channels = recipe.model.in_channels
    if (then := theirs.data.normalisation(channels)) != recipe.data.normalisation(channels):
        settings = ", ".join(f"data.{name}={_text(value)}" for name, value in zip(("mean", "std"), then, strict=True))
        raise RecipeError(
            [f"{called} was trained with {settings}; set the same values, since both networks see the same images"]
        )
    differing = [
        name
        for name, before, now in (
            ("data.fingerprint", theirs.data.fingerprint, resolved.fingerprint),
            ("data.holdout", theirs.data.holdout, recipe.data.holdout),
            ("seed", theirs.seed, recipe.seed),
        )
        if before != now
    ]
    if differing:
        context.note_once(
            f"{recipe.name}: the teacher {distill.teacher} was trained with a different {' and '.join(differing)}, so images "
            "that are held out here may be among its training images"
        )
    return teacher


def _stored_checkpoint(ref: str, key: str, context: Context) -> Artifact:
    """Return the checkpoint that a key of the recipe names.

    Raises:
        NotFoundError: if the store has no such checkpoint.
    """
    checkpoint = context.store.resolve(ref)
    if checkpoint.kind != CHECKPOINT.name:
        raise NotFoundError(
            f"{key}={ref} is of kind {checkpoint.kind}, not a checkpoint; `sdpctl store ls` lists the checkpoints"
        )
    return checkpoint


def _library_checkpoint(library: str, name: str, context: Context) -> Artifact | None:
    """Return weights of a library as a checkpoint of the store; fetch and store them unless the store has them."""
    if "." not in name:  # the library's default weights
        name = _full_name(library, name)
    key = key_of(CHECKPOINT, pretrained=f"{library}/{name}")
    found = context.by_key(key)
    if found is not None:
        return found
    _full_name(library, name)
    if context.dry_run:
        return None
    timm, torchvision = (name if library == each else None for each in ("timm", "torchvision"))
    stage = ImportWeights(read_weights(None, context, timm=timm, torchvision=torchvision))
    tag = stage.tag if context.tagged(stage.tag) is None else None
    artifact = context.store.commit(CHECKPOINT.name, stage.layers(), key=key, tag=tag)
    context.report.note(f"{library}/{name}: in the store as {tag or artifact.short}")
    return artifact


def _full_name(library: str, name: str) -> str:
    """Return a library's name of weights, with the network.

    Raises:
        RecipeError: if the library has no weights of this name.
    """
    from sdpctl.models.pretrained import pretrained

    try:
        found = pretrained(library, name)
    except UsageError as error:
        raise RecipeError([f"train.init={library}/{name}: {error}"]) from error
    return f"{found.network}.{found.weights}"


def _with_preprocessing(recipe: Recipe, checkpoint: Artifact, ref: str, context: Context) -> Recipe:
    """Return a recipe that prepares images as they were prepared for the weights, except for keys that it sets."""
    differing = _differing(recipe, checkpoint, context)
    if differing:
        settings = ", ".join(f"data.{key}={_text(value)}" for key, value in differing.items())
        context.note_once(f"{recipe.name}: {settings}, as {ref} was trained; the recipe does not set these keys")
    return recipe.changed(data=differing)


def _differing(recipe: Recipe, checkpoint: Artifact, context: Context) -> dict[str, Any]:
    """Return the keys of `data` that the recipe does not set, and that the checkpoint was trained with differently."""
    theirs, channels = recipe_of(checkpoint, context), recipe.model.in_channels
    if theirs.model.in_channels != channels:
        return {}
    then, now = ((*each.data.normalisation(channels), each.data.resampling) for each in (theirs, recipe))
    keys = ("mean", "std", "interpolation")
    return {
        key: before
        for key, before, after in zip(keys, then, now, strict=True)
        if getattr(recipe.data, key) is None and before != after
    }


def _text(value: object) -> str:
    return f"[{', '.join(f'{number:g}' for number in value)}]" if isinstance(value, tuple) else str(value)
