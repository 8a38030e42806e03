"""`sdpctl run`."""

from typing import Any

from sdpctl.cli.command import WRITES, Session, command
from sdpctl.cli.options import RecipeFile
from sdpctl.cli.row_table import RowTable


@command("run", "sort", "csv", *WRITES)
def run(session: Session, recipe: RecipeFile) -> None:
    """Train, calibrate, evaluate, and show the table of all instances.

    Results that the store holds are not computed again; an interrupted training continues.
    """
    from sdpctl.cli.rows import score_rows
    from sdpctl.cli.tables import (
        cascade_table,
        front_table,
        member_table,
        pareto_table,
        proposal_table,
        score_table,
        sorted_rows,
        winner_table,
    )
    from sdpctl.recipe.load import load_recipe
    from sdpctl.stages.calibrate import calibration_notes
    from sdpctl.stages.layers import read_document
    from sdpctl.stages.run import stages_of

    context = session.context
    stages = stages_of(load_recipe(recipe, session.overrides), context, resume=False if session.force else None)
    made = {name: session.plan.run(stage) for name, stage in stages.items()}
    artifacts = {name: artifact for name, artifact in made.items() if artifact is not None}
    documents = {
        name: read_document(context.store, artifacts[name])
        for name in ("eval-instances", "search", "agent", "cascade")
        if name in artifacts
    }

    shown: dict[str, Any] = {name: {"digest": artifact.digest, "tag": artifact.tag} for name, artifact in artifacts.items()}
    tables: list[RowTable[Any]] = []
    if (results := documents.get("eval-instances")) is not None:
        images = results["images"]
        rows = sorted_rows(score_rows(results), session.sort)
        evaluation = artifacts["eval-instances"]
        notes = calibration_notes(evaluation, context)
        table = score_table(f"{evaluation.tag}: {images:,} test images", rows, images, notes)
        session.write_csv(table)
        shown["eval-instances"] |= {"images": images, "rows": table.records()}
        tables.append(table)
    if (result := documents.get("search")) is not None:
        shown["search"] |= result
        tables += [winner_table(str(artifacts["search"].tag), result), pareto_table(result)]
    if (trained := documents.get("agent")) is not None:
        shown["agent"] |= trained
        tables.append(proposal_table(str(artifacts["agent"].tag), trained))
    if (chosen := documents.get("cascade")) is not None:
        shown["cascade"] |= chosen
        tables += [cascade_table(str(artifacts["cascade"].tag), chosen), member_table(chosen), front_table(chosen)]
    session.result(shown, tables, [artifact.digest for artifact in artifacts.values()])
