"""The command line: one thin module a verb. Heavy imports stand inside the commands, so that `--help` is quick."""

import os
import sys
from typing import Annotated

import typer

from sdpctl.cli.calibrate_bn import calibrate_bn
from sdpctl.cli.eval_instances import eval_instances
from sdpctl.cli.export import export
from sdpctl.cli.import_ import import_
from sdpctl.cli.models import models
from sdpctl.cli.predict import predict
from sdpctl.cli.profile_flops import profile_flops
from sdpctl.cli.recipe import recipe_app
from sdpctl.cli.run import run
from sdpctl.cli.search import search
from sdpctl.cli.stopping import stoppable
from sdpctl.cli.store import store_app
from sdpctl.cli.train import train
from sdpctl.engine.allocator import keep_freed_memory
from sdpctl.engine.threads import wait_briefly
from sdpctl.errors import SdpctlError

EXIT_CODES = (
    "Exit codes: 0 ok, 1 bug, 2 usage, 3 invalid recipe, 4 artifact not found, 5 integrity failure, 6 store locked, "
    "7 resource (device, data, permission, disk), 8 budget infeasible, 9 training diverged, "
    "129 SIGHUP, 130 SIGINT, 143 SIGTERM."
)

app = typer.Typer(
    name="sdpctl",
    help="SDPoint networks: train once, run at many costs.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _program(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as version_of

        typer.echo(version_of("sdpctl"))
        raise typer.Exit


app.command("run")(run)
app.command("train")(train)
app.command("calibrate-bn")(calibrate_bn)
app.command("eval-instances")(eval_instances)
app.command("eval", hidden=True)(eval_instances)
app.command("search")(search)
app.command("profile-flops")(profile_flops)
app.command("export")(export)
app.command("import")(import_)
app.command("predict")(predict)
app.command("models")(models)
app.add_typer(recipe_app, name="recipe")
app.add_typer(store_app, name="store")


def main() -> None:
    """Run the command line; the only place where an error becomes a line and an exit code."""
    keep_freed_memory()
    wait_briefly()
    try:
        with stoppable():
            app(prog_name="sdpctl")
    except SdpctlError as error:
        if os.environ.get("SDPCTL_DEBUG"):
            raise
        sys.stderr.write("".join(f"sdpctl: {line}\n" for line in str(error).splitlines()))
        raise SystemExit(error.exit_code) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except Exception as error:
        if os.environ.get("SDPCTL_DEBUG"):
            raise
        reason = " ".join(str(error).split())
        if isinstance(error, MemoryError) or "out of memory" in reason or "can't allocate memory" in reason:
            sys.stderr.write(f"sdpctl: out of memory ({reason}); lower data.batch_size or data.image_size\n")
            raise SystemExit(7) from None
        sys.stderr.write(f"sdpctl: this is a bug: {type(error).__name__}: {reason}; SDPCTL_DEBUG=1 shows where\n")
        raise SystemExit(1) from None
