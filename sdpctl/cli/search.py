"""`sdpctl search`."""

from typing import Annotated

import typer

from sdpctl.cli.options import (
    DEFAULT_STORE,
    Csv,
    DryRun,
    Force,
    Json,
    Quiet,
    Ref,
    Set,
    StorePath,
    Verbose,
    comma_separated,
    complete_strategies,
)
from sdpctl.cli.output import Output, check_output, write_csv
from sdpctl.cli.tables import search_rows, search_tables
from sdpctl.errors import UsageError


def search(
    ref: Ref,
    max_macs: Annotated[
        str | None,
        typer.Option(
            "--max-macs", metavar="BUDGET", help="50%, 1.2G, or a number of MACs; 50% by default.", show_default=False
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            "--strategy",
            metavar="NAME",
            help="surrogate (the default), dqn, ppo, random, uniform, tpe, nsga2, greedy or exhaustive.",
            autocompletion=complete_strategies,
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option("--compare", metavar="LIST", help="Run several strategies, e.g. surrogate,dqn,ppo.", show_default=False),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option("--seeds", min=1, max=1000, help="Number of runs per strategy; 1 by default.", show_default=False),
    ] = None,
    evaluations: Annotated[
        int | None,
        typer.Option(
            "--evaluations", min=2, max=10**6, help="Networks a strategy may score; 100 by default.", show_default=False
        ),
    ] = None,
    ratios: Annotated[
        str | None,
        typer.Option(
            "--ratios", metavar="LIST", help="Ratios to choose from at each point; 1,0.75,0.5 by default.", show_default=False
        ),
    ] = None,
    points: Annotated[
        str | None, typer.Option("--points", metavar="LIST", help="Points that may shrink; all by default.", show_default=False)
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage",
            metavar="URL",
            help="An Optuna database that processes and machines share; SDPCTL_STORAGE may hold one with its password.",
            show_default=False,
        ),
    ] = None,
    csv: Csv = None,
    set_: Set = None,
    force: Force = False,
    dry_run: DryRun = False,
    store: StorePath = DEFAULT_STORE,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Find the best ratio for every point of a trained network, under a budget.

    Shows the winner beside the best single-point instance, the winner of random search and the full network, and the Pareto
    front. Commits both as NAME.search. A search that was stopped goes on; several processes may share one.
    """
    from sdpctl.pipeline.context import Context, open_artifact
    from sdpctl.pipeline.instances import document
    from sdpctl.pipeline.search import search as stage

    output = Output(json_mode=json_, quiet=quiet, verbose=verbose)
    check_output(csv, force=force)
    context = Context(path=store, report=output, force=force, dry_run=dry_run)
    if strategy is not None and compare is not None:
        raise UsageError("--strategy and --compare exclude each other; give one")
    scalars = {"max_macs": max_macs, "strategy": strategy, "seeds": seeds, "evaluations": evaluations, "storage": storage}
    lists = {"compare": compare, "ratios": ratios, "points": points}
    overrides = [f"search.{key}={value}" for key, value in scalars.items() if value is not None]
    overrides += [f"search.{key}=[{', '.join(comma_separated(text) or ())}]" for key, text in lists.items() if text is not None]
    artifact = stage(open_artifact(ref, context, [*(set_ or ()), *overrides]), context)
    if artifact is None:
        output.result("search", {"dry_run": True})
        return
    result = document(artifact, context)
    write_csv(None if dry_run else csv, search_rows(result["pareto"]))
    shown = {"digest": artifact.digest, "tag": artifact.tag} | result
    output.result("search", shown, search_tables(str(artifact.tag), result), [artifact.digest])
