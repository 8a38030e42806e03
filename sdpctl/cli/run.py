"""`sdpctl run`."""

from typing import Any

from sdpctl.cli.options import DEFAULT_STORE, Csv, DryRun, Force, Json, Quiet, RecipeFile, Set, Sort, SortBy, StorePath, Verbose
from sdpctl.cli.output import Output, check_output, write_csv
from sdpctl.cli.tables import score_table, search_tables, sorted_rows


def run(
    recipe: RecipeFile,
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
    """Train, calibrate, evaluate, and show the table of all instances.

    What the store has is not done again; a training that was interrupted goes on.
    """
    from sdpctl.pipeline.context import Context
    from sdpctl.pipeline.instances import document
    from sdpctl.pipeline.run import run as stages
    from sdpctl.recipe.load import load_recipe

    output = Output(json_mode=json_, quiet=quiet, verbose=verbose)
    check_output(csv, force=force)
    context = Context(path=store, report=output, force=force, dry_run=dry_run)
    done = stages(load_recipe(recipe, set_ or ()), context)
    shown: dict[str, Any] = {name: {"digest": a.digest, "tag": a.tag} for name, a in done.items()}
    shown |= {"dry_run": True} if dry_run else {}
    tables = []
    if (evaluation := done.get("eval-instances")) is not None:
        results = document(evaluation, context)
        rows = sorted_rows(results["rows"], sort)
        write_csv(None if dry_run else csv, rows)
        shown["eval-instances"] |= {"images": results["images"], "rows": rows}
        tables.append(score_table(f"{evaluation.tag}: {results['images']:,} test images", rows, results["images"]))
    if (found := done.get("search")) is not None:
        result = document(found, context)
        shown["search"] |= result
        tables += search_tables(str(found.tag), result)
    output.result("run", shown, tables, [artifact.digest for artifact in done.values()])
