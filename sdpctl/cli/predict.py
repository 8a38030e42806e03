"""`sdpctl predict`."""

from pathlib import Path
from typing import Annotated

import typer

from sdpctl.cli.command import COMPUTES, Session, command
from sdpctl.cli.options import InstanceName, MaxLatency, MaxMacs, NoCalibrate, Ref


@command("predict", *COMPUTES)
def predict(
    session: Session,
    ref: Ref,
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE...", help="Image files, and folders of them.", readable=False, show_default=False),
    ],
    instance: InstanceName = None,
    max_macs: MaxMacs = None,
    max_latency_ms: MaxLatency = None,
    cascade: Annotated[
        bool,
        typer.Option(
            "--cascade",
            help="Run a cascade: a cheap instance answers easy images; the budget limits the mean cost of an image.",
        ),
    ] = False,
    no_calibrate: NoCalibrate = False,
) -> None:
    """Classify images by the most accurate instance, or cascade of instances, within a budget.

    REF may also be the folder of a bundle. A folder of images is searched with its subfolders.
    Instances without statistics or scores are calibrated and evaluated first, on the data of the training.
    Without that data, `full` runs unless --instance is given.
    """
    from sdpctl.cli.tables import prediction_table
    from sdpctl.prediction import predict as classify

    result = classify(
        ref,
        images,
        session.context,
        session.overrides,
        instance=instance,
        max_macs=max_macs,
        max_latency_ms=max_latency_ms,
        cascade=cascade,
        calibrates=not no_calibrate,
    )
    likeliest = [image["top"][0]["class"] for image in result["images"]]
    session.result(result, [prediction_table(ref, result)], likeliest)
