"""The options that several commands share, and the session that they are read into."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

from sdpctl.cli.files import check_output, write_file
from sdpctl.cli.options import DEFAULT_STORE, Csv, DryRun, Force, Json, Quiet, Set, Sort, SortBy, StorePath, Verbose
from sdpctl.cli.output import Output
from sdpctl.cli.row_table import RowTable

if TYPE_CHECKING:
    from sdpctl.plan import Plan
    from sdpctl.stages.context import Context
    from sdpctl.store import Artifact

Own = ParamSpec("Own")

SHARED: Mapping[str, tuple[Any, Any]] = {
    "sort": (SortBy, Sort.macs),
    "csv": (Csv, None),
    "set_": (Set, None),
    "force": (Force, False),
    "dry_run": (DryRun, False),
    "store": (StorePath, DEFAULT_STORE),
    "json_": (Json, False),
    "quiet": (Quiet, False),
    "verbose": (Verbose, False),
}
"""Type and default of each shared option by the name of its parameter, in the order in which `--help` lists them."""

PRINTS = ("json_",)
"""Options of a command that prints a result."""

READS = ("store", "json_", "quiet")
"""Options of a command that reads a store."""

COMPUTES = ("set_", *READS, "verbose")
"""Options of a command that runs a network."""

WRITES = ("force", "dry_run", *COMPUTES)
"""Options of a command that makes artifacts."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """One call of a command, with its shared options.

    Args:
        command: name of the JSON document's schema, `sdpctl.<command>/1`.
        output: prints notes and results.
        store: path of the store.
        overrides: overrides of the recipe, each `key=value`.
        force: compute again, and replace output files.
        dry_run: write nothing.
        csv: path of the table as CSV.
        sort: column by which the table is sorted.
    """

    command: str
    output: Output
    store: Path = DEFAULT_STORE
    overrides: tuple[str, ...] = ()
    force: bool = False
    dry_run: bool = False
    csv: Path | None = None
    sort: Sort = Sort.macs

    @cached_property
    def context(self) -> "Context":
        """The context of the command's stages."""
        from sdpctl.engine.distributed import the_ranks
        from sdpctl.stages.context import Context

        return Context(path=self.store, report=self.output, dry_run=self.dry_run, ranks=the_ranks())

    @cached_property
    def plan(self) -> "Plan":
        """The plan of the command."""
        from sdpctl.plan import Plan

        return Plan(self.context, force=self.force)

    def result(self, document: Mapping[str, Any], tables: Sequence[RowTable[Any]] = (), digests: Sequence[str] = ()) -> None:
        """Print the result of the command in the format that `--json` or `--quiet` selects; in a dry run after its plan."""
        from sdpctl.cli.tables import plan_table

        if self.dry_run and "plan" in vars(self):
            steps = plan_table(self.command, self.plan.steps)
            document = dict(document) | {"dry_run": True, "plan": steps.records()}
            tables = [steps, *tables]
        self.output.result(self.command, document, tables, digests)

    def artifact(self, artifact: "Artifact", document: Mapping[str, Any], tables: Sequence[RowTable[Any]] = ()) -> None:
        """Print an artifact as the result of the command."""
        self.result({"digest": artifact.digest, "tag": artifact.tag} | dict(document), tables, [artifact.digest])

    def planned(self) -> None:
        """Print the plan of a dry run that found work to do."""
        self.result({})

    def write_csv(self, table: RowTable[Any]) -> None:
        """Write a table to the file of `--csv`, unless this is a dry run.

        Raises:
            ResourceError: if the file cannot be written.
        """
        if self.csv is not None and not self.dry_run:
            write_file(self.csv, table.csv())


def command(name: str, *options: str) -> Callable[[Callable[Concatenate[Session, Own], None]], Callable[..., None]]:
    """Add shared options to a command: they follow the function's own parameters, and it receives them as a session.

    Args:
        name: name of the command in JSON documents.
        options: keys of `SHARED`.
    """

    def decorate(function: Callable[Concatenate[Session, Own], None]) -> Callable[..., None]:
        call: Callable[..., None] = function
        own = list(inspect.signature(function).parameters.values())[1:]
        shared = [
            inspect.Parameter(option, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=annotation)
            for option, (annotation, default) in SHARED.items()
            if option in options
        ]

        @wraps(function)
        def run(**values: Any) -> None:
            said = {parameter.name: values.pop(parameter.name) for parameter in shared}
            call(_session(name, said), **values)

        parameters = [*own, *shared]
        vars(run)["__signature__"] = inspect.Signature(parameters)
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _session(name: str, said: dict[str, Any]) -> Session:
    """Return the session for the values of the shared options.

    Raises:
        UsageError: if two options exclude each other, or the CSV file cannot be written.
    """
    said["output"] = Output(json_mode=said.pop("json_"), quiet=said.pop("quiet", False), verbose=said.pop("verbose", False))
    said["overrides"] = tuple(said.pop("set_", None) or ())
    session = Session(command=name, **said)
    if session.csv is not None:
        check_output(session.csv, force=session.force)
    return session
