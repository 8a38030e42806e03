"""`sdpctl eval-instances`, and its short name `eval`."""

from typing import Annotated

import typer

from sdpctl.bounds import MOST
from sdpctl.cli.command import WRITES, Session, command
from sdpctl.cli.options import FromSearch, Instances, Ref, SplitName, choices_of
from sdpctl.errors import IntegrityError
from sdpctl.kinds import RESULTS


@command("eval-instances", "sort", "csv", *WRITES)
def eval_instances(
    session: Session,
    ref: Ref,
    instances: Instances = None,
    from_search: FromSearch = None,
    batches: Annotated[
        int | None,
        typer.Option(
            "--batches",
            min=1,
            max=MOST,
            help="Number of batches to evaluate, drawn from the seed; all by default.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        SplitName,
        typer.Option("--split", help="Score on the test images, or on the held-out images, on which instances may be chosen."),
    ] = SplitName.test,
    by_class: Annotated[
        bool, typer.Option("--by-class", help="Also show the accuracy of each class; --csv then writes this table.")
    ] = False,
) -> None:
    """Score every instance on the test split, and show the table.

    --instances takes cascades too, such as stem@0.5:0.9/full. Instances without statistics are calibrated first. Commits the
    table as NAME.eval; that of the held-out images as NAME.holdout.
    """
    from sdpctl.cli.rows import CascadeScoreRow, ClassRow, score_rows
    from sdpctl.cli.tables import class_table, score_table, sorted_rows
    from sdpctl.stages.calibrate import calibration_notes
    from sdpctl.stages.evaluate import Evaluate
    from sdpctl.stages.layers import read_document
    from sdpctl.stages.network import open_network

    context = session.context
    network = open_network(ref, context, [*session.overrides, *([f"evaluate.batches={batches}"] if batches else [])])
    wanted, cascades = choices_of(instances, from_search, network.recipe.model.points, context)
    artifact = session.plan.run(Evaluate(network, wanted, split.value, cascades=cascades))
    if artifact is None:
        session.planned()
        return
    results = read_document(context.store, artifact)
    images = results["images"]
    rows = sorted_rows(score_rows(results), session.sort)
    title = f"{artifact.tag}: {images:,} {'test' if split is SplitName.test else 'held-out'} images"
    table = score_table(title, rows, images, calibration_notes(artifact, context))
    document = {"images": images, "rows": table.records()}
    if not by_class:
        session.write_csv(table)
        session.artifact(artifact, document, [table])
        return
    if "class_images" not in results or not all("by_class" in row for row in results["rows"]):
        raise IntegrityError(f"{artifact.digest}: {RESULTS} has no accuracies by class; evaluate again with --force")
    classes = class_table(ClassRow.read_all(results), [row for row in rows if not isinstance(row, CascadeScoreRow)])
    session.write_csv(classes)
    session.artifact(artifact, document | {"by_class": classes.records()}, [table, classes])
