"""From a reference to the runtime."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sdpctl.errors import DataError, IntegrityError, NotFoundError, UsageError
from sdpctl.pipeline.artifacts import NODES, reader
from sdpctl.pipeline.choice import calibrated
from sdpctl.pipeline.context import Context, Progress, named, open_artifact
from sdpctl.pipeline.export import describe
from sdpctl.pipeline.instances import document, statistics_for

if TYPE_CHECKING:
    from sdpctl.engine.settings import Precision
    from sdpctl.export.bundle import Bundle
    from sdpctl.runtime import Runtime


class _Silent:
    """Nobody is told anything."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def detail(self, text: str) -> None:
        """Say nothing."""

    def progress(self, text: str, total: int, done: int = 0) -> AbstractContextManager[Progress]:  # noqa: ARG002
        """Show nothing."""
        return nullcontext(self)

    def advance(self, text: str = "") -> None:
        """Count nothing."""


def load(
    ref: str | Path, *, store: str | Path | None = None, device: str = "auto", precision: "Precision" = "fp32"
) -> "Runtime":
    """Open a bundle, or what a store has: a network that picks its instance under a budget.

    Args:
        ref: the folder of a bundle; or a tag or digest of a bundle, of a checkpoint that was calibrated and evaluated, or of
            what was made from one.
        store: its folder; `SDPCTL_STORE` or `.sdpctl` by default.
        device: `auto` (CUDA where there is one), `cpu`, `cuda`, `cuda:1`.
        precision: `fp32`, or `bf16` under autocast.

    Raises:
        IntegrityError: where there is no store, or something in it or in the bundle is damaged.
        NotFoundError: where there is no such artifact, or it was not calibrated or evaluated.
        ResourceError: where the machine has no such device.
    """
    from sdpctl.runtime import Runtime

    where = Path(store or os.environ.get("SDPCTL_STORE") or ".sdpctl")
    context = Context(path=where, report=_Silent(), dry_run=True)
    return Runtime(open_bundle(ref, context), device=device, precision=precision)


def open_bundle(
    ref: str | Path,
    context: Context,
    overrides: Sequence[str] = (),
    *,
    instance: str | None = None,
    chosen: bool = True,
) -> "Bundle":
    """Return what a runtime needs; what is lacking is calibrated and evaluated, unless the run is dry.

    Args:
        ref: as in `load`.
        context: where, and who is told.
        overrides: of the recipe.
        instance: the only one that is needed; all that are calibrated by default.
        chosen: whether one will be chosen among them, which takes their accuracy on held-out images.

    Raises:
        NotFoundError: where there is no such artifact, or, on a dry run, where something is lacking.
        UsageError: for overrides of what is not made from a recipe.
    """
    from sdpctl.export import bundle as files
    from sdpctl.export.bundle import BUNDLE, STATISTICS, SUMS, WEIGHTS

    if files.is_bundle(Path(ref)):
        _nothing_set(ref, overrides)
        return files.read_bundle(Path(ref))
    context = replace(context, aside=True)
    try:
        store = context.store
        artifact = store.resolve(str(ref))
    except (NotFoundError, IntegrityError) as error:
        if not os.path.exists(ref):  # noqa: PTH110  a path's own method fails for a name that is too long
            raise
        raise UsageError(f"{ref}: this is no bundle; a bundle is a folder with a {BUNDLE} in it") from error
    if artifact.kind == "export":
        _nothing_set(ref, overrides)
        if SUMS not in artifact.layers:
            raise UsageError(f"{ref} is the file of one instance, no bundle; `sdpctl export --format bundle` makes one")
        return files.open_bundle(reader(store, artifact), str(ref))
    opened = open_artifact(str(ref), context, overrides)
    if opened.other_data:
        opened = context.fingerprinted(opened)
    wanted = calibrated(opened, context) if instance is None else named([instance], opened.recipe.model.points)
    statistics = statistics_for(opened, context, wanted)
    opened = replace(opened, statistics=statistics)
    try:
        description = describe(opened, context, wanted, chosen=chosen)
    except DataError as error:
        if not chosen:
            raise
        description = describe(opened, context, wanted, chosen=False)
        reason = str(error).splitlines()[-1]
        context.report.note(f"{ref}: the accuracy on held-out images cannot be measured ({reason})")
    if description is None and chosen:  # an instance can still be named
        description = describe(opened, context, wanted, chosen=False)
    if statistics is None or description is None:
        raise NotFoundError(f"{ref} is not evaluated yet; run `sdpctl eval-instances {opened.name}` first")
    read = {WEIGHTS: reader(store, opened.checkpoint), STATISTICS: reader(store, statistics)}
    nodes = document(statistics, context)
    return files.assemble(description, nodes, lambda title, limit: read[title](title, limit), str(ref), NODES)


def _nothing_set(ref: str | Path, overrides: Sequence[str]) -> None:
    if overrides:
        raise UsageError(f"--set {overrides[0]}: {ref} is an export, in which nothing can be set; leave it out")
