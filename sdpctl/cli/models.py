"""`sdpctl models`."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated, Any

import typer

from sdpctl.bounds import LARGEST_IMAGE
from sdpctl.cli.command import PRINTS, Session, command
from sdpctl.cli.options import complete_architectures
from sdpctl.cli.row_table import RowTable
from sdpctl.errors import UsageError, shown
from sdpctl.models.libraries import LIBRARIES
from sdpctl.models.registry import ARCHITECTURES, Architecture, TracedArchitecture


@command("models", *PRINTS)
def models(
    session: Session,
    pattern: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="An architecture, a part of its name, a library, or a pattern such as 'timm/*mobilenet*'.",
            autocompletion=complete_architectures,
            show_default=False,
        ),
    ] = None,
    points: Annotated[bool, typer.Option("--points", help="Show the points of one architecture.")] = False,
    image_size: Annotated[
        int | None,
        typer.Option(
            "--image-size",
            min=1,
            max=LARGEST_IMAGE,
            help="Height and width for --points; by default those that the network is meant for.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """List the architectures, or the points of one.

    Without NAME, these are the architectures of this package. `timm` and `torchvision` list the networks of these libraries.
    """
    if image_size is not None and not points:
        raise UsageError("--image-size: only the costs of --points depend on it; add --points or leave this out")
    if points:
        _show_points(session, pattern, image_size)
        return
    from sdpctl.cli.rows import ArchitectureRow
    from sdpctl.cli.tables import architecture_table, network_table

    found = list(ARCHITECTURES.values()) if pattern is None else matching(pattern)
    ours, theirs = [
        [ArchitectureRow.of(arch) for arch in found if isinstance(arch, TracedArchitecture) is traced]
        for traced in (False, True)
    ]
    caption = f"{' and '.join(f'`sdpctl models {library}`' for library in LIBRARIES)} list the networks of these libraries"
    tables: list[RowTable[Any]] = [architecture_table(ours, [caption] if pattern is None else [])] if ours else []
    if theirs:
        tables.append(network_table(theirs))
    session.result({"rows": [row.record() for row in (*ours, *theirs)]}, tables)


def matching(text: str) -> Sequence[Architecture]:
    """Return the architectures that a text names: by a pattern with `*`, by a library, by the name, or by a part of the name.

    Raises:
        UsageError: if there is none; the message names the nearest.
    """
    if text.removesuffix("/") in LIBRARIES:
        found = ARCHITECTURES.matching(f"{text.removesuffix('/')}/*")
    elif any(sign in text for sign in "*?["):
        found = ARCHITECTURES.matching(text)
    elif text in ARCHITECTURES:
        return [ARCHITECTURES[text]]
    else:
        found = ARCHITECTURES.matching(f"*{text}*")
    if not found:
        raise UsageError(_unmatched(text))
    return found


def _unmatched(text: str) -> str:
    """Return the message for a text that no architecture matches."""
    library = text.partition("/")[0]
    if library in LIBRARIES and not LIBRARIES[library].networks:
        return ARCHITECTURES.unknown(f"{library}/")
    names = [arch.name for arch in ARCHITECTURES.matching(f"{library}/*" if library in LIBRARIES else "*")]
    near = get_close_matches("".join(sign for sign in text if sign not in "*?[]")[:100], names, n=3)
    nearest = f"; the nearest names are {', '.join(near)}" if near else ""
    return f"no architecture matches {shown(text)}{nearest}"


def _show_points(session: Session, name: str | None, image_size: int | None) -> None:
    """Show the points of an architecture.

    Raises:
        UsageError: if no single architecture is named, or it cannot take images of the size.
    """
    if name is None or any(sign in name for sign in "*?["):
        raise UsageError("--points shows one architecture; give its name, such as `sdpctl models timm/resnet50 --points`")
    ARCHITECTURES.find(name)
    from sdpctl.cli.rows import PointRow
    from sdpctl.cli.tables import point_table
    from sdpctl.stages.profile import point_costs

    costs = point_costs(name, image_size)
    table = point_table(costs, [PointRow.read(row) for row in costs["rows"]])
    session.result(costs | {"rows": table.records()}, [table])
