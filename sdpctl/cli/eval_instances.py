"""`sdpctl eval-instances`, and its short name `eval`."""

from typing import Annotated

import typer

from sdpctl.bounds import MOST
from sdpctl.cli.options import (
    DEFAULT_STORE,
    Csv,
    DryRun,
    Force,
    FromSearch,
    Instances,
    Json,
    Quiet,
    Ref,
    Set,
    Sort,
    SortBy,
    SplitName,
    StorePath,
    Verbose,
    instances_of,
)
from sdpctl.cli.output import Output, check_output, write_csv
from sdpctl.cli.tables import score_table, sorted_rows


def eval_instances(
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
        typer.Option("--split", help="Evaluate the test images, or the held-out images, on which a choice may be made."),
    ] = SplitName.test,
    sort: SortBy = Sort.macs,
    csv: Csv = None,
    set_: Set = None,
    force: Force = False,
    dry_run: DryRun = False,
    store: StorePath = DEFAULT_STORE,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Score every instance on the test split, and show the table.

    Calibrates first where no statistics are there. Commits the table as NAME.eval, that of the held-out images as NAME.holdout.
    """
    from sdpctl.pipeline.context import Context, open_artifact
    from sdpctl.pipeline.instances import document, evaluate

    output = Output(json_mode=json_, quiet=quiet, verbose=verbose)
    check_output(csv, force=force)
    context = Context(path=store, report=output, force=force, dry_run=dry_run)
    overrides = [*(set_ or ()), *([f"evaluate.batches={batches}"] if batches else [])]
    opened = open_artifact(ref, context, overrides)
    artifact = evaluate(opened, context, instances_of(instances, from_search, context), split.value)
    if artifact is None:
        output.result("eval-instances", {"dry_run": True})
        return
    results = document(artifact, context)
    rows = sorted_rows(results["rows"], sort)
    write_csv(None if dry_run else csv, rows)
    title = f"{artifact.tag}: {results['images']:,} {'test' if split is SplitName.test else 'held-out'} images"
    shown = {"digest": artifact.digest, "tag": artifact.tag, "images": results["images"], "rows": rows}
    output.result("eval-instances", shown, [score_table(title, rows, results["images"])], [artifact.digest])
