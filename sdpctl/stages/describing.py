"""The description of a network for exports and the runtime: its input, its classes, and each instance's cost and scores."""

import re
from collections.abc import Generator, Sequence
from dataclasses import replace

from sdpctl.errors import IntegrityError
from sdpctl.export.description import CascadeOption, Description, Input, Option
from sdpctl.instance import FULL, Instance
from sdpctl.kinds import BN_STATISTICS, CASCADE, IMPORTED
from sdpctl.models import architecture
from sdpctl.stages.context import Context
from sdpctl.stages.evaluate import Scores, scored_alike
from sdpctl.stages.layers import read_document, read_origin
from sdpctl.stages.network import TrainedNetwork, recipe_of
from sdpctl.stages.profile import count_costs
from sdpctl.stages.stage import Stage
from sdpctl.store import Artifact

_WORDNET_ID = re.compile(r"n\d{8}")


def describe(
    network: TrainedNetwork,
    checkpoint: Artifact,
    statistics: Artifact,
    instances: Sequence[Instance],
    context: Context,
    *,
    chosen: bool,
    raw: bool = False,
    cascades: Sequence[CascadeOption] = (),
) -> Generator[Stage, Artifact, Description]:
    """Describe instances of a network; yields the evaluations that the description needs.

    Args:
        network: a trained network.
        checkpoint: the checkpoint with its weights.
        statistics: statistics that cover the instances.
        instances: the instances to describe.
        context: gives the store.
        chosen: whether an instance will be chosen at run time; if so, their accuracy on held-out images is needed.
        raw: whether the input consists of uint8 pixels.
        cascades: cascades of the instances, the cheapest on held-out images first.

    Raises:
        IntegrityError: if an evaluation does not belong to this network.
    """
    network = network.with_statistics(statistics)
    test = read_document(context.store, (yield Scores(network, instances)))
    heldout_images, heldout_top1 = 0, {}
    if chosen:
        heldout = read_document(context.store, (yield Scores(network, instances, "holdout")))
        heldout_images = heldout["images"]
        heldout_top1 = {row["instance"]: row["top1"] for row in heldout["rows"]}
    recipe = network.recipe
    data = recipe.data
    mean, std = data.normalisation(recipe.model.in_channels)
    rows = {row["instance"]: row for row in test["rows"]}
    options = (
        Option(
            instance=instance,
            **{key: rows[str(instance)].get(key) for key in ("macs", "params", "relative", "top1", "top5", "loss")},
            heldout_top1=heldout_top1.get(str(instance)),
        )
        for instance in instances
    )
    description = Description(
        name=network.name,
        network=replace(recipe.model, stem=recipe.model.stem or architecture(recipe.model.arch).stem),
        input=Input(
            size=recipe.scored_size,
            resize=data.side_of(recipe.scored_size),
            mean=mean,
            std=std,
            raw=raw,
            interpolation=data.resampling,
        ),
        classes=_class_names(test["classes"], checkpoint, context),
        options=tuple(sorted(options, key=lambda option: option.macs)),
        full_macs=count_costs(recipe.model, recipe.scored_size, [FULL])[FULL].macs,
        checkpoint=checkpoint.digest,
        statistics=statistics.digest,
        test_images=test["images"],
        heldout_images=heldout_images,
        cascades=tuple(cascades),
    )
    try:
        return description.check()
    except ValueError as error:
        raise IntegrityError(f"{network.name}: its evaluation does not fit its network ({error}); evaluate it again") from error


def chosen_cascade_options(artifact: Artifact, context: Context) -> list[CascadeOption]:
    """Return the cascades of a choice, the best one and those of its front, the cheapest on held-out images first."""
    document = read_document(context.store, artifact)
    rows = {row["cascade"]: row for row in (document["best"], *document["front"]) if "cascade" in row}
    return sorted(map(CascadeOption.parse, rows.values()), key=lambda option: option.heldout_macs)


def statistics_of(choice: Artifact, context: Context) -> Artifact:
    """Return the statistics with which cascades were chosen.

    Raises:
        IntegrityError: if the choice was not made from BatchNorm statistics.
    """
    statistics = None if choice.subject is None else context.store.at(choice.subject)
    if statistics is None or statistics.kind != BN_STATISTICS.name:
        raise IntegrityError(f"{choice.digest}: these cascades were not chosen with BatchNorm statistics; choose them again")
    return statistics


def scored_alike_by(artifact: Artifact, network: TrainedNetwork, context: Context) -> bool:
    """Return whether an artifact was scored on the images, and in the way, of a network's recipe."""
    return scored_alike(recipe_of(artifact, context).identity(), network.resolved.identity())


def fitting_cascades(
    network: TrainedNetwork, statistics: Artifact, instances: Sequence[Instance], artifact: Artifact | None, context: Context
) -> list[CascadeOption]:
    """Return the cascades that a description may list; tell the user which chosen cascades are left out, and why.

    Args:
        network: a trained network.
        statistics: statistics of the description's instances.
        instances: the instances of the description.
        artifact: the choice of cascades; None if there is none.
        context: gives the store.

    Returns:
        The cascades whose members are all among the instances, the cheapest on held-out images first; none if the choice
        belongs to other statistics, or was scored in a different way.
    """
    if artifact is None or artifact.kind != CASCADE.name:
        return []
    called = artifact.tag or artifact.short
    if artifact.subject is None or artifact.subject.digest != statistics.digest:
        context.note_once(f"{called} belongs to different BatchNorm statistics than {network.name}; its cascades are left out")
        return []
    if not scored_alike_by(artifact, network, context):
        context.note_once(f"{called} was scored with different settings of data or evaluate; its cascades are left out")
        return []
    options = chosen_cascade_options(artifact, context)
    fitting = [option for option in options if set(option.cascade.members) <= set(instances)]
    if left_out := len(options) - len(fitting):
        context.note_once(
            f"{called}: {left_out} of {len(options)} cascades are left out, since the instances lack some of their members"
        )
    return fitting


def _class_names(classes: Sequence[str], checkpoint: Artifact, context: Context) -> tuple[str, ...]:
    """Return the names of the classes: those of the data, or those that came with imported weights.

    The weights' names are used if the data's class folders have WordNet ids instead of names, as those of ImageNet have, and
    there are as many. Sorted, as folders are, these ids are in the order of ImageNet's classes.
    """
    if all(_WORDNET_ID.fullmatch(name) for name in classes) and IMPORTED in checkpoint.layers:
        names = read_origin(context.store, checkpoint).get("classes", [])
        if len(names) == len(classes):
            return tuple(names)
    return tuple(classes)
