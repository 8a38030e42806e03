"""The command line: one thin module per command. Heavy imports are inside the commands, so that `--help` is fast."""

import errno
import os
import warnings
from collections.abc import Sequence
from traceback import walk_tb
from typing import Annotated

import typer

from sdpctl.cli.calibrate_bn import calibrate_bn
from sdpctl.cli.doctor import doctor
from sdpctl.cli.eval_instances import eval_instances
from sdpctl.cli.export import export
from sdpctl.cli.import_ import import_
from sdpctl.cli.init import init
from sdpctl.cli.latency import latency
from sdpctl.cli.models import models
from sdpctl.cli.output import say
from sdpctl.cli.predict import predict
from sdpctl.cli.profile_flops import profile_flops
from sdpctl.cli.recipe import recipe_app
from sdpctl.cli.report import report
from sdpctl.cli.run import run
from sdpctl.cli.search import search
from sdpctl.cli.stopping import stoppable
from sdpctl.cli.store import store_app
from sdpctl.cli.streams import open_streams, unwritten
from sdpctl.cli.train import train
from sdpctl.engine.allocator import keep_freed_memory
from sdpctl.engine.distributed import blamed, dismiss, follows, lead
from sdpctl.engine.threads import wait_briefly
from sdpctl.errors import ResourceError, SdpctlError, UsageError, shortened

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


app.command("init")(init)
app.command("run")(run)
app.command("train")(train)
app.command("calibrate-bn")(calibrate_bn)
app.command("eval-instances")(eval_instances)
app.command("eval", hidden=True)(eval_instances)
app.command("search")(search)
app.command("profile-flops")(profile_flops)
app.command("export")(export)
app.command("report")(report)
app.command("import")(import_)
app.command("predict")(predict)
app.command("latency")(latency)
app.command("models")(models)
app.command("doctor")(doctor)
app.add_typer(recipe_app, name="recipe")
app.add_typer(store_app, name="store")


def main() -> None:
    """Run the command line and exit with its code, or with 7 if standard output could not be written."""
    open_streams()
    try:
        _command()
    except SystemExit as ended:
        if (reason := unwritten()) is None:
            dismiss(ended.code)
            raise
        _say(f"standard output cannot be written ({reason}); everything else is done: run the command again to see its result")
        dismiss(ended.code or ResourceError.exit_code)
        raise SystemExit(ended.code or ResourceError.exit_code) from None


def _say(*lines: str) -> None:
    say(*(f"sdpctl: {line}" for line in lines))


_BATCHES = {
    "sdpctl.engine.evaluate": "lower evaluate.batch_size, or set memory",
    "sdpctl.engine.calibrate": "lower data.batch_size, or set memory",
    "sdpctl.engine.train": "lower data.batch_size or data.image_size",
}
"""Advice for a batch of images that did not fit into memory, by the module that runs the batch."""


def _less_memory(error: Exception) -> str:
    """Return advice for an out-of-memory error: a smaller batch helps only if a batch was too large."""
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in walk_tb(error.__traceback__)]
    ours = [name for name in modules if name.startswith("sdpctl.")]
    advice = [_BATCHES[name] for name in ours if name in _BATCHES and not ours[-1].startswith("sdpctl.data.")]
    return advice[-1] if advice else "close other programs, or use a machine with more memory"


def _command() -> None:
    """Run the command. This is the only place that turns errors into messages and exit codes."""
    keep_freed_memory()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # damaged images are reported in lines of our own
    wait_briefly()
    try:
        if follows():
            from sdpctl.stages.shared import follow

            follow(_explained)
        with stoppable():
            lead(_say)
            app(prog_name="sdpctl")
    except Exception as error:
        if os.environ.get("SDPCTL_DEBUG"):
            raise
        lines, code = blamed(error, *_explained(error))
        _say(*lines)
        raise SystemExit(code) from None


def _explained(error: Exception) -> tuple[Sequence[str], int]:
    """Return the lines that a user sees of an error, and the exit code."""
    if isinstance(error, SdpctlError):
        return error.lines, error.exit_code
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return [f"{shortened(str(error.filename))}: this path is too long; give a shorter one"], UsageError.exit_code
    reason = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "out of memory" in reason or "can't allocate memory" in reason:
        return [f"out of memory ({reason}); {_less_memory(error)}"], ResourceError.exit_code
    return [f"this is a bug: {type(error).__name__}: {reason}; SDPCTL_DEBUG=1 shows where"], SdpctlError.exit_code
