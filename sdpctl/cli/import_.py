"""`sdpctl import`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sdpctl.cli.options import DEFAULT_STORE, DryRun, Json, Quiet, Set, StorePath, Verbose, complete_architectures
from sdpctl.cli.output import Output


def import_(
    arch: Annotated[
        str,
        typer.Option(
            "--arch", metavar="ARCH", help="What the weights are of.", autocompletion=complete_architectures, show_default=False
        ),
    ],
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="A state dict: .pth, .pth.tar or .safetensors.", show_default=False)
    ] = None,
    torchvision: Annotated[
        str | None,
        typer.Option("--torchvision", metavar="NAME", help="Fetch torchvision's, e.g. IMAGENET1K_V2.", show_default=False),
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Take the moving average of the weights that the file holds.")] = False,
    set_: Set = None,
    dry_run: DryRun = False,
    store: StorePath = DEFAULT_STORE,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make a checkpoint of weights from elsewhere.

    Those of torchvision or of the public SDPoint code fit as they are. A pickle is never run.
    Say with --set which images they are for: data.dataset, data.root, data.image_size; `full` is then scored on test images.
    Say too what the file does not tell: data.mean, data.std, and model.shortcut of a CIFAR ResNet.
    """
    from sdpctl.pipeline.context import Context
    from sdpctl.pipeline.imported import import_weights

    output = Output(json_mode=json_, quiet=quiet, verbose=verbose)
    context = Context(path=store, report=output, dry_run=dry_run)
    done = import_weights(file, context, arch=arch, torchvision=torchvision, ema=ema, overrides=set_ or ())
    if done is None:
        output.result("import", {"dry_run": True})
        return
    artifact = done.artifact
    document = {"digest": artifact.digest, "tag": artifact.tag}
    score = None if done.score is None else asdict(done.score)
    output.result("import", document | {"full": score, "warning": done.warning}, (), [artifact.digest])
