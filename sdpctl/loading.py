"""Open the runtime of a network, given a folder, a tag or a digest."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sdpctl.errors import DataError, IntegrityError, NotFoundError, UsageError
from sdpctl.kinds import CASCADE, EXPORTED, NODES
from sdpctl.plan import Plan
from sdpctl.stages.calibrate import Statistics
from sdpctl.stages.context import Context
from sdpctl.stages.describing import describe, fitting_cascades, statistics_of
from sdpctl.stages.layers import calibrated_instances, read_document, reader
from sdpctl.stages.network import TrainedNetwork, named, open_network
from sdpctl.stages.reporter import Progress
from sdpctl.store import Artifact

if TYPE_CHECKING:
    from sdpctl.engine.settings import Precision
    from sdpctl.export.bundle import Bundle
    from sdpctl.export.description import Description
    from sdpctl.instance import Instance
    from sdpctl.runtime import Runtime


class _Silent:
    """A reporter that shows nothing."""

    def note(self, text: str) -> None:
        """Ignore the message."""

    def detail(self, text: str) -> None:
        """Ignore the message."""

    def progress(self, text: str, total: int, done: int = 0) -> AbstractContextManager[Progress]:  # noqa: ARG002
        """Return a progress bar that is not shown."""
        return nullcontext(self)

    def advance(self, text: str = "") -> None:
        """Ignore the step."""


def load(
    ref: str | Path, *, store: str | Path | None = None, device: str = "auto", precision: "Precision" = "fp32"
) -> "Runtime":
    """Open a network from a bundle or a store; the network chooses its instance within a budget.

    Args:
        ref: the folder of a bundle; or a tag or digest of a bundle, of a calibrated and evaluated checkpoint, or of an artifact
            that was made from such a checkpoint.
        store: folder of the store; `SDPCTL_STORE` or `.sdpctl` by default.
        device: `auto` (CUDA if the machine has it), `cpu`, `cuda`, `cuda:1`.
        precision: `fp32`, or `bf16` under autocast.

    Raises:
        IntegrityError: if there is no store, or an artifact or the bundle is damaged.
        NotFoundError: if there is no such artifact, or its checkpoint was not calibrated or evaluated.
        ResourceError: if the machine has no such device.
    """
    from sdpctl.runtime import Runtime

    path = Path(store or os.environ.get("SDPCTL_STORE") or ".sdpctl")
    context = Context(path=path, report=_Silent(), dry_run=True)
    return Runtime(open_bundle(ref, context), device=device, precision=precision)


def open_bundle(
    ref: str | Path,
    context: Context,
    overrides: Sequence[str] = (),
    *,
    instance: str | None = None,
    chosen: bool = True,
    cascade: bool | None = None,
    calibrates: bool = True,
) -> "Bundle":
    """Open a network as a bundle; compute missing statistics and evaluations, except in a dry run.

    Args:
        ref: a reference as in `load`.
        context: gives the store.
        overrides: overrides of the recipe.
        instance: the only instance that is needed; by default all calibrated instances.
        chosen: whether an instance will be chosen at run time; if so, their accuracy on held-out images is needed.
        cascade: whether a cascade will be chosen at run time. True: use the statistics of `NAME.cascade` unless the reference
            names statistics. False: list no cascade. None: list the cascades that fit the statistics.
        calibrates: whether missing statistics may be gathered.

    Raises:
        NotFoundError: if there is no such artifact; or, in a dry run, if statistics or evaluations are missing.
        UsageError: if there are overrides for an export, or a path is not a bundle.
    """
    from sdpctl.export import bundle as files
    from sdpctl.export.bundle import BUNDLE

    if files.is_bundle(Path(ref)):
        _require_no_overrides(ref, overrides)
        return files.read_bundle(Path(ref))
    try:
        store = context.store
        artifact = store.resolve(str(ref))
    except (NotFoundError, IntegrityError) as error:
        if not os.path.exists(ref):  # noqa: PTH110  a path's own method fails for a name that is too long
            raise
        raise UsageError(f"{ref}: this is not a bundle; a bundle is a folder that contains {BUNDLE}") from error
    if artifact.kind == EXPORTED.name:
        _require_no_overrides(ref, overrides)
        if BUNDLE not in artifact.layers:
            raise UsageError(f"{ref} is not a bundle but a different export; `sdpctl export --format bundle` makes a bundle")
        return files.open_bundle(reader(store, artifact), str(ref))
    network = open_network(str(ref), context, overrides)
    choice = None
    if cascade is not False:
        choice = artifact if artifact.kind == CASCADE.name else context.tagged(f"{network.name}.cascade")
    if cascade and network.statistics is None and choice is not None and choice.kind == CASCADE.name:
        theirs, ours = (context.lineage(each)[-1].digest for each in (choice, artifact))
        network = network.with_statistics(statistics_of(choice, context)) if theirs == ours else network
    return _assemble(network, str(ref), context, choice, instance=instance, chosen=chosen, calibrates=calibrates)


def _assemble(
    network: TrainedNetwork,
    ref: str,
    context: Context,
    choice: Artifact | None,
    *,
    instance: str | None,
    chosen: bool,
    calibrates: bool,
) -> "Bundle":
    """Return a stored network as a bundle, with the chosen cascades that fit."""
    from sdpctl.export import bundle as files
    from sdpctl.export.bundle import STATISTICS, WEIGHTS

    plan, store = Plan(context), context.store
    checkpoint = plan.need(network.checkpoint)
    wanted = None if instance is None else named([instance], network.recipe.model.points)
    statistics = plan.need(Statistics(network, wanted, calibrates=calibrates))
    if checkpoint is None or statistics is None:
        raise _not_evaluated(network, ref)
    network = network.with_known_data(context).with_statistics(statistics)
    instances = calibrated_instances(store, statistics) if wanted is None else wanted
    description = _described(plan, network, instances, ref, chosen=chosen)
    cascades = fitting_cascades(network, statistics, instances, choice, context)
    description = replace(description, cascades=tuple(cascades)).check()
    read = {WEIGHTS: reader(store, checkpoint), STATISTICS: reader(store, statistics)}
    nodes = read_document(store, statistics)
    return files.assemble(description, nodes, lambda title, limit: read[title](title, limit), ref, NODES)


def _described(
    plan: Plan, network: TrainedNetwork, instances: "Sequence[Instance]", ref: str, *, chosen: bool
) -> "Description":
    """Describe instances; omit their held-out accuracy if it cannot be measured, since a user can still name an instance.

    Raises:
        NotFoundError: in a dry run, if the instances are not evaluated.
    """
    checkpoint, statistics = plan.need(network.checkpoint), network.statistics
    assert checkpoint is not None
    assert statistics is not None
    for with_held_out in (True, False) if chosen else (False,):
        try:
            steps = describe(network, checkpoint, statistics, instances, plan.context, chosen=with_held_out)
            description = plan.follow(steps)
        except DataError as error:
            if not with_held_out:
                raise
            reason = str(error).splitlines()[-1]
            plan.context.report.note(f"{ref}: the accuracy on held-out images cannot be measured ({reason})")
            continue
        if description is not None:
            return description
    raise _not_evaluated(network, ref)


def _not_evaluated(network: TrainedNetwork, ref: str) -> NotFoundError:
    return NotFoundError(f"{ref} is not evaluated yet; run `sdpctl eval-instances {network.name}` first")


def _require_no_overrides(ref: str | Path, overrides: Sequence[str]) -> None:
    """Refuse overrides of an export.

    Raises:
        UsageError: if there are overrides; the message names the first one.
    """
    if overrides:
        raise UsageError(f"--set {overrides[0]}: {ref} is an export, whose settings cannot be changed; leave this override out")
