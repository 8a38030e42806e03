"""`sdpctl calibrate-bn`."""

from typing import Annotated

import typer

from sdpctl.bounds import MOST
from sdpctl.cli.command import WRITES, Session, command
from sdpctl.cli.options import FromSearch, Instances, Ref, choices_of


@command("calibrate-bn", *WRITES)
def calibrate_bn(
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
            help="Number of calibration batches; that of the recipe by default.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Compute the BatchNorm statistics of every instance in one pass.

    Commits the statistics as NAME.bn, by node of the tree of instances.
    """
    from sdpctl.stages.calibrate import Calibrate
    from sdpctl.stages.layers import read_document
    from sdpctl.stages.network import open_network

    context = session.context
    network = open_network(ref, context, [*session.overrides, *([f"calibrate.batches={batches}"] if batches else [])])
    wanted, _ = choices_of(instances, from_search, network.recipe.model.points, context)
    artifact = session.plan.run(Calibrate(network, wanted))
    if artifact is None:
        session.planned()
        return
    nodes = read_document(context.store, artifact)
    session.artifact(artifact, {key: nodes[key] for key in ("instances", "batches", "images")})
