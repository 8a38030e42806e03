"""`sdpctl train`."""

from typing import Annotated

import typer

from sdpctl.cli.command import WRITES, Session, command
from sdpctl.cli.options import RecipeFile


@command("train", *WRITES)
def train(
    session: Session,
    recipe: RecipeFile,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted training of the same recipe.")] = False,
) -> None:
    """Train a network; each step draws one SDPoint instance.

    Commits the checkpoint as NAME. Ctrl-C finishes the step, saves NAME.partial and exits with 130.
    """
    from sdpctl.kinds import HISTORY
    from sdpctl.recipe.load import load_recipe
    from sdpctl.stages.layers import read_records
    from sdpctl.stages.train import Train

    stage = Train(load_recipe(recipe, session.overrides), resume=resume and not session.force)
    artifact = session.plan.run(stage)
    if artifact is None:
        session.planned()
        return
    history = read_records(session.context.store, artifact, HISTORY)
    session.artifact(artifact, {"metrics": history[-1] if history else {}})
