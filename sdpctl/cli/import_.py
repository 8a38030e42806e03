"""`sdpctl import`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sdpctl.cli.command import COMPUTES, Session, command
from sdpctl.cli.options import complete_architectures


@command("import", "dry_run", *COMPUTES)
def import_(
    session: Session,
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="A state dict: .pth, .pth.tar or .safetensors.", show_default=False)
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            "--arch",
            metavar="ARCH",
            help="Architecture of the weights: one of this package, timm/NAME or torchvision/NAME.",
            autocompletion=complete_architectures,
            show_default=False,
        ),
    ] = None,
    timm: Annotated[
        str | None,
        typer.Option("--timm", metavar="NAME", help="Fetch weights of timm, e.g. resnet50.a1_in1k.", show_default=False),
    ] = None,
    torchvision: Annotated[
        str | None,
        typer.Option(
            "--torchvision",
            metavar="NAME",
            help="Fetch weights of torchvision, e.g. resnet50.IMAGENET1K_V2.",
            show_default=False,
        ),
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Use the moving average of the weights in the file.")] = False,
) -> None:
    """Make a checkpoint from weights that a different program trained.

    Weights of torchvision, timm and the public SDPoint code fit as they are. Pickled code is never run.
    Name the images with --set: data.dataset, data.root, data.image_size; `full` is then scored on the test images.
    --timm and --torchvision use the libraries' caches, and take the preprocessing along. For a file, set what it does not
    contain: data.mean, data.std, data.interpolation, and model.shortcut of a CIFAR ResNet.
    """
    from sdpctl.stages.import_weights import ImportWeights, read_weights

    context = session.context
    found = read_weights(file, context, arch=arch, timm=timm, torchvision=torchvision, ema=ema, overrides=session.overrides)
    stage = ImportWeights(found)
    artifact = session.plan.run(stage)
    if artifact is None or session.dry_run:
        session.planned()
        return
    score = stage.score(context)
    full = None if score is None or score.full is None else asdict(score.full)
    session.artifact(artifact, {"full": full, "warning": None if score is None else score.warning})
