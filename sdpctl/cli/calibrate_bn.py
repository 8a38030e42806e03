"""`sdpctl calibrate-bn`."""

from typing import Annotated

import typer

from sdpctl.bounds import MOST
from sdpctl.cli.options import (
    DEFAULT_STORE,
    DryRun,
    Force,
    FromSearch,
    Instances,
    Json,
    Quiet,
    Ref,
    Set,
    StorePath,
    Verbose,
    instances_of,
)
from sdpctl.cli.output import Output


def calibrate_bn(
    ref: Ref,
    instances: Instances = None,
    from_search: FromSearch = None,
    batches: Annotated[
        int | None,
        typer.Option("--batches", min=1, max=MOST, help="Calibration batches; the recipe's by default.", show_default=False),
    ] = None,
    set_: Set = None,
    force: Force = False,
    dry_run: DryRun = False,
    store: StorePath = DEFAULT_STORE,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Gather the BatchNorm statistics of every instance in one pass.

    Commits them as NAME.bn, by node of the tree of instances.
    """
    from sdpctl.pipeline.context import Context, open_artifact
    from sdpctl.pipeline.instances import calibrate, document

    output = Output(json_mode=json_, quiet=quiet, verbose=verbose)
    context = Context(path=store, report=output, force=force, dry_run=dry_run)
    overrides = [*(set_ or ()), *([f"calibrate.batches={batches}"] if batches else [])]
    artifact = calibrate(open_artifact(ref, context, overrides), context, instances_of(instances, from_search, context))
    if artifact is None:
        output.result("calibrate-bn", {"dry_run": True})
        return
    described = document(artifact, context)
    shown = {"digest": artifact.digest, "tag": artifact.tag} | {k: described[k] for k in ("instances", "batches", "images")}
    output.result("calibrate-bn", shown, (), [artifact.digest])
