"""`sdpctl train`."""

from typing import Annotated

import typer

from sdpctl.cli.options import DEFAULT_STORE, DryRun, Force, Json, Quiet, RecipeFile, Set, StorePath, Verbose
from sdpctl.cli.output import Output


def train(
    recipe: RecipeFile,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted training of the same recipe.")] = False,
    set_: Set = None,
    force: Force = False,
    dry_run: DryRun = False,
    store: StorePath = DEFAULT_STORE,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a network, drawing one SDPoint instance a step.

    Commits the checkpoint as NAME. Ctrl-C finishes the step, saves NAME.partial and exits with 130.
    """
    from sdpctl.pipeline.artifacts import HISTORY, read_records
    from sdpctl.pipeline.context import Context
    from sdpctl.pipeline.train import train as stage
    from sdpctl.recipe.load import load_recipe

    output = Output(json_mode=json_, quiet=quiet, verbose=verbose)
    context = Context(path=store, report=output, force=force, dry_run=dry_run)
    artifact = stage(load_recipe(recipe, set_ or ()), context, resume=resume)
    if artifact is None:
        output.result("train", {"dry_run": True})
        return
    history = read_records(context.store, artifact, HISTORY)
    metrics = history[-1] if history else {}
    output.result("train", {"digest": artifact.digest, "tag": artifact.tag, "metrics": metrics}, (), [artifact.digest])
