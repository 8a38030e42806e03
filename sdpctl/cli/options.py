"""Options of the commands, each defined once. Completion reads tables of plain data and index.json, and never imports torch."""

import math
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdpctl.cascade import Cascade, is_cascade
from sdpctl.errors import UsageError, shortened, shown
from sdpctl.instance import ALL, Instance
from sdpctl.kinds import CASCADE
from sdpctl.models.libraries import LIBRARIES
from sdpctl.models.registry import ARCHITECTURES
from sdpctl.search.catalog import STRATEGIES
from sdpctl.untrusted import DOCUMENT_BYTES, load_json, printable, read_regular

if TYPE_CHECKING:
    from sdpctl.stages.context import Context

DEFAULT_STORE = Path(".sdpctl")


class SplitName(StrEnum):
    """The images that are scored."""

    test = "test"
    holdout = "holdout"


class Sort(StrEnum):
    """A column by which a table of instances is sorted."""

    macs = "macs"
    top1 = "top1"
    top5 = "top5"
    loss = "loss"
    instance = "instance"


def complete_tags(context: typer.Context, incomplete: str) -> Iterator[str]:
    """Yield the tags that begin with a text, from the store of the command line or the environment; none if it is damaged."""
    index = Path(context.params.get("store") or DEFAULT_STORE) / "index.json"
    try:
        entries = load_json(read_regular(index, limit=DOCUMENT_BYTES))["manifests"]
        tags = [(entry.get("annotations") or {}).get("org.opencontainers.image.ref.name", "") for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # completion has no place for a message
    yield from (tag for tag in tags if isinstance(tag, str) and tag.isprintable() and tag and tag.startswith(incomplete))


def complete_architectures(incomplete: str) -> Iterator[str]:
    """Yield the architectures whose names begin with a text; for several libraries only their names, such as `timm/`."""
    names = [name for name in ARCHITECTURES if name.startswith(incomplete)]
    prefixes = [f"{library}/" for library in LIBRARIES]
    near = [prefix for prefix in prefixes if prefix.startswith(incomplete) or incomplete.startswith(prefix)]
    if not names and len(near) == 1:  # a shell would end the word after the only completion
        networks = (f"{near[0]}{network}" for network in LIBRARIES[near[0].rstrip("/")].networks)
        near = [name for name in networks if name.startswith(incomplete)]
    yield from (*names, *near)


def complete_points(incomplete: str) -> Iterator[str]:
    """Yield a comma-separated list of instances whose last word is completed to a point."""
    done, comma, last = incomplete.rpartition(",")
    points = {point for arch in ARCHITECTURES.values() for stem in ("imagenet", "small") for point in arch.points(stem)}
    for point in sorted(points | {"full", ALL}):
        if point.startswith(last):
            yield f"{done}{comma}{point}"


def complete_strategies(incomplete: str) -> Iterator[str]:
    """Yield the strategies of a search whose names begin with a text."""
    yield from (name for name in STRATEGIES if name.startswith(incomplete))


def comma_separated(text: str | None) -> list[str] | None:
    """Split a comma-separated list of the command line; None for an option that was not given.

    Raises:
        UsageError: if the list is empty.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise UsageError(
            f"an empty list ({shown(text)}) on the command line; give at least one element, or leave the option out"
        )
    return parts


def instances_of(text: str | None, from_search: str | None, points: Sequence[str], context: "Context") -> list[Instance] | None:
    """Return the instances that the command line names; None if it names none.

    Args:
        text: comma-separated list of `--instances`.
        from_search: reference of `--from-search`.
        points: points of the network.
        context: gives the store.

    Raises:
        InstanceError: if an instance cannot be parsed, or names a point that the network does not have.
        NotFoundError: if the reference is not a search.
        UsageError: if both options are given, or the list is empty.
    """
    from sdpctl.stages.network import named
    from sdpctl.stages.search import found_instances

    texts = comma_separated(text)
    if from_search is None:
        return None if texts is None else named(texts, points)
    if texts is not None:
        raise UsageError("--instances and --from-search exclude each other; give one")
    return found_instances(context.store.resolve(from_search), context, points)


def choices_of(
    text: str | None, from_search: str | None, points: Sequence[str], context: "Context"
) -> tuple[list[Instance] | None, list[Cascade]]:
    """Return the instances and the cascades that the command line names; the members of a cascade are among the instances.

    Args:
        text: comma-separated list of `--instances`, which may contain cascades.
        from_search: reference of `--from-search`, a search or a choice of a cascade.
        points: points of the network.
        context: gives the store.

    Returns:
        The instances, None if the command line names none, and the cascades.

    Raises:
        InstanceError: if an instance or a cascade cannot be parsed, or names a point that the network does not have.
        NotFoundError: if the reference is neither a search nor a choice of a cascade.
        UsageError: if both options are given, or the list is empty.
    """
    from sdpctl.stages.cascade import chosen_cascades

    texts = comma_separated(text)
    found: list[Instance | Cascade]
    if from_search is not None and texts is None and (artifact := context.store.resolve(from_search)).kind == CASCADE.name:
        found = chosen_cascades(artifact, context, points)
    elif from_search is None and texts is not None and any(map(is_cascade, texts)):
        found = [(Cascade if is_cascade(one) else Instance).parse(one).check(points) for one in texts]
    else:
        return instances_of(text, from_search, points, context), []
    cascades = list(dict.fromkeys(one for one in found if isinstance(one, Cascade)))
    instances = [one for one in found if isinstance(one, Instance)]
    return list(dict.fromkeys([*instances, *(member for cascade in cascades for member in cascade.members)])), cascades


def finite(option: typer.CallbackParam, value: float | None) -> float | None:
    """Return a number of the command line.

    Raises:
        UsageError: if the number is infinite or NaN.
    """
    if value is not None and not math.isfinite(value):
        raise UsageError(f"{option.opts[0]} {value}: give a finite number")
    return value


def ratios(text: str | None) -> tuple[float, ...] | None:
    """Return the ratios of the command line; None for an option that was not given.

    Raises:
        UsageError: if a ratio is not a number above 0 and below 1, or occurs twice.
    """
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in comma_separated(text) or ())
    except ValueError:
        values = ()
    if not (text.isascii() and "_" not in text and all(0 < value < 1 for value in values)) or len(set(values)) < max(
        1, len(values)
    ):
        raise UsageError(
            f"--ratios {shortened(printable(text))}: give different numbers above 0 and below 1, for example --ratios 0.75,0.5"
        )
    return values


RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file.", show_default=False)]
Ref = Annotated[
    str,
    typer.Argument(
        metavar="REF",
        help="A tag, a digest, or the first characters of a digest.",
        autocompletion=complete_tags,
        show_default=False,
    ),
]
StorePath = Annotated[Path, typer.Option("--store", envvar="SDPCTL_STORE", help="The artifact store.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print digests only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print details too.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Set a key of the recipe, e.g. train.epochs=5; may be repeated.", show_default=False
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Compute again, and replace output files.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done; write nothing.")]
Csv = Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Also write the table as CSV.", show_default=False)]
Instances = Annotated[
    str | None,
    typer.Option(
        "--instances",
        metavar="LIST",
        help="Comma-separated, e.g. full,layer2.3@0.5; all SDPoint instances by default.",
        autocompletion=complete_points,
        show_default=False,
    ),
]
Ratios = Annotated[
    str | None, typer.Option("--ratios", metavar="LIST", help="Comma-separated, e.g. 0.75,0.5.", show_default=False)
]
SortBy = Annotated[Sort, typer.Option("--sort", help="The column to sort by.")]
FromSearch = Annotated[
    str | None,
    typer.Option(
        "--from-search",
        metavar="TAG",
        help="Use the instances that a search or a choice of cascades found: the best, its front, and full.",
        autocompletion=complete_tags,
        show_default=False,
    ),
]
InstanceName = Annotated[
    str | None,
    typer.Option(
        "--instance",
        metavar="INSTANCE",
        help="An instance, e.g. layer2.3@0.5.",
        autocompletion=complete_points,
        show_default=False,
    ),
]
MaxMacs = Annotated[
    str | None,
    typer.Option(
        "--max-macs", metavar="BUDGET", help="Maximum cost of an image: 50%, 1.2G, or a number of MACs.", show_default=False
    ),
]
MaxLatency = Annotated[
    float | None,
    typer.Option(
        "--max-latency-ms",
        metavar="MS",
        min=0,
        callback=finite,
        help="Maximum latency in milliseconds per image, measured on this machine.",
        show_default=False,
    ),
]
NoCalibrate = Annotated[bool, typer.Option("--no-calibrate", help="Refuse an instance without BatchNorm statistics.")]
