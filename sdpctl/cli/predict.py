"""`sdpctl predict`."""

from pathlib import Path
from typing import Annotated

import typer

from sdpctl.cli.options import (
    DEFAULT_STORE,
    InstanceName,
    Json,
    MaxLatency,
    MaxMacs,
    NoCalibrate,
    Quiet,
    Ref,
    Set,
    StorePath,
    Verbose,
)
from sdpctl.cli.output import Output
from sdpctl.cli.tables import prediction_table


def predict(
    ref: Ref,
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE...", help="Image files, and folders of them.", readable=False, show_default=False),
    ],
    instance: InstanceName = None,
    max_macs: MaxMacs = None,
    max_latency_ms: MaxLatency = None,
    no_calibrate: NoCalibrate = False,
    set_: Set = None,
    store: StorePath = DEFAULT_STORE,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Say what is on images, by the most accurate instance within a budget.

    REF may be the folder of a bundle too. Of a folder all images in it and below are taken. Calibrates and evaluates first
    where nothing did, which takes the training's data; where that is gone, `full` runs unless --instance says otherwise.
    """
    from sdpctl.pipeline.context import Context
    from sdpctl.pipeline.predict import predict as stage

    output = Output(json_mode=json_, quiet=quiet, verbose=verbose)
    context = Context(path=store, report=output, calibrates=not no_calibrate)
    result = stage(ref, images, context, set_ or (), instance=instance, max_macs=max_macs, max_latency_ms=max_latency_ms)
    best = [image["top"][0]["class"] for image in result["images"]]
    output.result("predict", result, [prediction_table(ref, result)], best)
