"""`sdpctl search`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

import typer

from sdpctl.cli.command import WRITES, Session, command
from sdpctl.cli.options import Ref, comma_separated, complete_strategies
from sdpctl.errors import UsageError
from sdpctl.search.catalog import AGENT, STRATEGIES


@command("search", "csv", *WRITES)
def search(
    session: Session,
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
            help=f"{', '.join(STRATEGIES)}; surrogate by default.",
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
            "--evaluations",
            min=0,
            max=10**6,
            help="Number of networks that a strategy may score; 100 by default.",
            show_default=False,
        ),
    ] = None,
    ratios: Annotated[
        str | None,
        typer.Option(
            "--ratios", metavar="LIST", help="Ratios to choose from at each point; 1,0.75,0.5 by default.", show_default=False
        ),
    ] = None,
    points: Annotated[
        str | None,
        typer.Option("--points", metavar="LIST", help="Points that may downsample; all by default.", show_default=False),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            "--budgets",
            metavar="RANGE",
            help="Train an agent for a range of budgets, e.g. 30%..90%, with --strategy ppo, dqn or reinforce.",
            show_default=False,
        ),
    ] = None,
    agent: Annotated[
        str | None,
        typer.Option(
            "--agent",
            metavar="REF",
            help="Take the proposals of a trained agent; --evaluations 0, the default then, takes the first.",
            show_default=False,
        ),
    ] = None,
    cascade: Annotated[
        bool,
        typer.Option("--cascade", help="Choose a cascade of calibrated instances; --max-macs then limits the mean."),
    ] = False,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage",
            metavar="URL",
            help="An Optuna database that processes and machines share; SDPCTL_STORAGE may hold one with its password.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Find the best ratio for every point of a trained network, within a budget.

    Shows the winner beside the best single-point instance, the winner of random search and the full network, and the Pareto
    front. Commits the result as NAME.search and NAME.search.BUDGET. A stopped search continues; processes may share a search.

    With --budgets, trains an agent that proposes a network for every budget of the range, as NAME.agent.

    With --cascade, chooses instances that answer easy images cheaply and pass hard images on, as NAME.cascade.
    """
    if cascade:
        others = {
            "--strategy": strategy,
            "--compare": compare,
            "--seeds": seeds,
            "--evaluations": evaluations,
            "--ratios": ratios,
            "--points": points,
            "--budgets": budgets,
            "--agent": agent,
            "--storage": storage,
        }
        _choose_cascade(replace(session, command="cascade"), ref, max_macs, others)
        return
    from sdpctl.cli.tables import pareto_table, proposal_table, winner_table
    from sdpctl.stages.agent import TrainAgent
    from sdpctl.stages.layers import read_document
    from sdpctl.stages.network import open_network
    from sdpctl.stages.search import Search

    for option, value, other, excluded in (
        ("--strategy", strategy, "--compare", compare),
        ("--agent", agent, "--strategy", strategy),
        ("--budgets", budgets, "--max-macs", max_macs),
        ("--budgets", budgets, "--agent", agent),
    ):
        if value is not None and excluded is not None:
            raise UsageError(f"{option} and {other} exclude each other; give one")
    values = {"max_macs": max_macs, "strategy": strategy, "seeds": seeds, "evaluations": evaluations, "storage": storage}
    values |= {"budgets": budgets, "policy": agent}
    if agent is not None and compare is None:
        values |= {"strategy": AGENT, "evaluations": evaluations or 0}
    if budgets is None and (agent is not None or max_macs is not None):
        values["budgets"] = ""  # the recipe may have a range, from which an agent was trained
    overrides = search_overrides(values, {"compare": compare, "ratios": ratios, "points": points})

    context = session.context
    network = open_network(ref, context, [*session.overrides, *overrides])
    learns = network.recipe.search is not None and network.recipe.search.budgets is not None
    artifact = session.plan.run(TrainAgent(network, anew=session.force) if learns else Search(network, anew=session.force))
    if artifact is None:
        session.planned()
        return
    if learns:
        document = read_document(context.store, artifact)
        table = proposal_table(str(artifact.tag), document)
        session.write_csv(table)
        session.artifact(artifact, document, [table])
        return
    result = read_document(context.store, artifact)

    front = pareto_table(result)
    session.write_csv(front)
    session.artifact(artifact, result, [winner_table(str(artifact.tag), result), front])


def _choose_cascade(session: Session, ref: str, max_macs: str | None, others: Mapping[str, str | int | None]) -> None:
    """Choose a cascade, and show it.

    Raises:
        UsageError: if an option of the search for instances is given.
    """
    from sdpctl.cli.tables import cascade_table, front_table, member_table
    from sdpctl.stages.cascade import ChooseCascade
    from sdpctl.stages.layers import read_document
    from sdpctl.stages.network import open_network

    if given := [option for option, value in others.items() if value is not None]:
        raise UsageError(
            f"{given[0]} and --cascade exclude each other: a cascade is chosen among calibrated instances; give one of them"
        )
    context = session.context
    network = open_network(ref, context, [*session.overrides, *([] if max_macs is None else [f"cascade.max_macs={max_macs}"])])
    artifact = session.plan.run(ChooseCascade(network))
    if artifact is None:
        session.planned()
        return
    document = read_document(context.store, artifact)
    front = front_table(document)
    session.write_csv(front)
    session.artifact(artifact, document, [cascade_table(str(artifact.tag), document), member_table(document), front])


def search_overrides(values: Mapping[str, str | int | None], lists: Mapping[str, str | None]) -> list[str]:
    """Return the overrides of a recipe's section `search` for the options of the command line.

    Args:
        values: values of options with one value, by key of the section; None for an option that was not given.
        lists: values of options with a comma-separated list, in the same form.

    Raises:
        UsageError: if a list is empty.
    """
    overrides = [f"search.{key}={value}" for key, value in values.items() if value is not None]
    given = {key: comma_separated(text) for key, text in lists.items()}
    return overrides + [f"search.{key}=[{', '.join(parts)}]" for key, parts in given.items() if parts is not None]
