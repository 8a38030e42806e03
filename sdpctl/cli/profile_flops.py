"""`sdpctl profile-flops`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sdpctl.bounds import LARGEST_IMAGE, MOST_CLASSES
from sdpctl.cli.command import WRITES, Session, command
from sdpctl.cli.options import (
    Instances,
    Ratios,
    Sort,
    comma_separated,
    complete_architectures,
    complete_tags,
    ratios,
)
from sdpctl.cli.row_table import RowTable
from sdpctl.errors import UsageError
from sdpctl.models.libraries import LIBRARIES
from sdpctl.models.registry import ARCHITECTURES, Stem

if TYPE_CHECKING:
    from sdpctl.store import Artifact


def _complete(context: typer.Context, incomplete: str) -> list[str]:
    return [*complete_architectures(incomplete), *complete_tags(context, incomplete)]


@command("profile-flops", "sort", "csv", *WRITES)
def profile_flops(
    session: Session,
    what: Annotated[
        str,
        typer.Argument(
            metavar="ARCH|RECIPE|REF",
            help="An architecture, a recipe file, or an artifact.",
            autocompletion=_complete,
            show_default=False,
        ),
    ],
    image_size: Annotated[
        int | None, typer.Option("--image-size", min=1, max=LARGEST_IMAGE, help="Height and width.", show_default=False)
    ] = None,
    num_classes: Annotated[
        int | None,
        typer.Option(
            "--num-classes",
            min=2,
            max=MOST_CLASSES,
            help="Number of classes, for an architecture or a recipe.",
            show_default=False,
        ),
    ] = None,
    stem: Annotated[Stem | None, typer.Option("--stem", help="Stem, for an architecture.", show_default=False)] = None,
    ratio_list: Ratios = None,
    instances: Instances = None,
    per_segment: Annotated[bool, typer.Option("--per-segment", help="Show the MACs of each segment.")] = False,
) -> None:
    """Count the MACs and parameters of every instance, without data or weights.

    MACs are of one image: convolutions and matrix products, counted by ptflops on the meta device. The table of a recipe or an
    artifact is committed as NAME.profile; the table of an architecture is only shown.
    """
    from sdpctl.cli.rows import CostRow, ProfileRow
    from sdpctl.cli.tables import cost_table, segment_table, sorted_rows
    from sdpctl.stages.layers import read_document
    from sdpctl.stages.profile import open_profile, published_costs

    if session.sort not in (Sort.macs, Sort.instance):
        raise UsageError(f"--sort {session.sort}: a profile has no scores; use --sort macs or --sort instance")
    if ratio_list is not None and instances is not None:
        raise UsageError("--ratios and --instances exclude each other; give one")
    kind = subject_kind(what)
    check_options(what, kind, {"--set": session.overrides, "--stem": stem, "--num-classes": num_classes})
    wanted, shrink_by = comma_separated(instances), ratios(ratio_list)

    artifact: Artifact | None = None
    if kind == "architecture":
        costs = published_costs(what, image_size, num_classes, stem, wanted, shrink_by)
    else:
        context = session.context
        overrides = [*session.overrides, *profile_overrides(image_size, num_classes)]
        artifact = session.plan.run(open_profile(what, kind == "recipe", overrides, wanted, shrink_by, context))
        if artifact is None:
            session.planned()
            return
        costs = read_document(context.store, artifact)

    name = what if artifact is None else artifact.tag or what
    title = f"{name}: one image of {costs['image_size']} px, {costs['model']['num_classes']} classes"
    rows = sorted_rows([CostRow.read(row) for row in costs["rows"]], session.sort)
    table = cost_table(title, rows)
    session.write_csv(table)
    tables: list[RowTable[Any]] = [table]
    shown = costs | {"rows": table.records()}
    if per_segment:
        profiles = sorted_rows([ProfileRow.read(row) for row in costs["rows"]], session.sort)
        tables = [segment_table(row, costs["model"]["arch"]) for row in profiles]
        shown["rows"] = [row.record() for row in profiles]
    if artifact is None:
        session.result(shown, tables)
    else:
        session.artifact(artifact, shown, tables)


SubjectKind = Literal["architecture", "recipe", "artifact"]


def subject_kind(what: str) -> SubjectKind:
    """Return what a name stands for: an architecture, else the path of a recipe file, else the reference of an artifact.

    A name that begins with a library is an architecture, even if the library does not have it.
    """
    if what in ARCHITECTURES:
        return "architecture"
    if Path(what).suffix in (".yaml", ".yml") or Path(what).is_file():
        return "recipe"
    return "architecture" if what.partition("/")[0] in LIBRARIES else "artifact"


def check_options(what: str, kind: SubjectKind, options: Mapping[str, object]) -> None:
    """Refuse options that do not apply to the subject of a profile.

    Args:
        what: the subject.
        kind: kind of the subject.
        options: value by option; an option that was not given has a value that is false.

    Raises:
        UsageError: if an option does not apply; the message names it.
    """
    applies: dict[str, tuple[SubjectKind, ...]] = {
        "--set": ("recipe", "artifact"),
        "--stem": ("architecture",),
        "--num-classes": ("architecture", "recipe"),
    }
    for option, value in options.items():
        if value and kind not in applies[option]:
            raise UsageError(f"{option} does not apply to {what}; `sdpctl profile-flops --help` says what it applies to")


def profile_overrides(image_size: int | None, num_classes: int | None) -> list[str]:
    """Return the overrides of a recipe for the options of the command line."""
    settings = {"data.image_size": image_size, "evaluate.image_size": image_size, "model.num_classes": num_classes}
    return [f"{key}={value}" for key, value in settings.items() if value is not None]
