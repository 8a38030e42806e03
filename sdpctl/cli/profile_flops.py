"""`sdpctl profile-flops`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdpctl.cli.options import (
    DEFAULT_STORE,
    Csv,
    DryRun,
    Force,
    Instances,
    Json,
    Quiet,
    Ratios,
    Set,
    Sort,
    SortBy,
    StorePath,
    Verbose,
    comma_separated,
    complete_architectures,
    complete_tags,
    ratios,
)
from sdpctl.cli.output import Output, check_csv, write_csv
from sdpctl.cli.tables import cost_table, segment_table, sorted_rows
from sdpctl.errors import IntegrityError, NotFoundError, UsageError, did_you_mean
from sdpctl.models.registry import ARCHITECTURES, Stem

if TYPE_CHECKING:
    from sdpctl.recipe.schema import ModelSection


def _complete(context: typer.Context, incomplete: str) -> list[str]:
    return [*complete_architectures(incomplete), *complete_tags(context, incomplete)]


def profile_flops(
    what: Annotated[
        str,
        typer.Argument(
            metavar="ARCH|RECIPE|REF",
            help="An architecture, a recipe file, or an artifact.",
            autocompletion=_complete,
            show_default=False,
        ),
    ],
    image_size: Annotated[int | None, typer.Option("--image-size", min=1, help="Height and width.", show_default=False)] = None,
    num_classes: Annotated[
        int | None, typer.Option("--num-classes", min=2, help="Of an architecture or recipe.", show_default=False)
    ] = None,
    stem: Annotated[Stem | None, typer.Option("--stem", help="Of an architecture.", show_default=False)] = None,
    ratio_list: Ratios = None,
    instances: Instances = None,
    per_segment: Annotated[bool, typer.Option("--per-segment", help="Show where the MACs are.")] = False,
    sort: SortBy = Sort.macs,
    csv: Csv = None,
    set_: Set = None,
    force: Force = False,
    dry_run: DryRun = False,
    store: StorePath = DEFAULT_STORE,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Count the MACs and parameters of every instance, without data or weights.

    MACs of one image: convolutions and matrix products, by ptflops on the meta device. A recipe's or an artifact's table is
    committed as NAME.profile; an architecture's is only shown.
    """
    from sdpctl.instance import sdpoint_instances
    from sdpctl.pipeline.context import Context, grid, named, open_artifact
    from sdpctl.pipeline.instances import cost_rows, document, profile, profile_model
    from sdpctl.recipe.load import load_recipe

    output = Output(json_mode=json_, quiet=quiet, verbose=verbose)
    check_csv(csv, force=force)
    if sort not in (Sort.macs, Sort.instance):
        raise UsageError(f"--sort {sort}: a profile has no scores; sort by macs or instance")
    if ratio_list is not None and instances is not None:
        raise UsageError("--ratios and --instances exclude each other; give one")
    context = Context(path=store, report=output, force=force, dry_run=dry_run)
    wanted, shrink_by = comma_separated(instances), ratios(ratio_list)
    overrides = [*(set_ or ()), *([f"data.image_size={image_size}"] if image_size else [])]
    artifact = None
    is_recipe = Path(what).suffix in (".yaml", ".yml") or Path(what).is_file()
    for given, option, fits in (
        (set_, "--set", what not in ARCHITECTURES),
        (stem, "--stem", what in ARCHITECTURES),
        (num_classes, "--num-classes", is_recipe or what in ARCHITECTURES),
    ):
        if given and not fits:
            raise UsageError(f"{option} says nothing about {what}; `sdpctl profile-flops --help` says what it is for")
    if what in ARCHITECTURES:
        model, size = _network(what, image_size, num_classes, stem)
        listed = named(wanted, model.points) if wanted else sdpoint_instances(model, shrink_by or (0.5, 0.75))
        shown: dict[str, Any] = {"image_size": size}
        rows = cost_rows(profile_model(model, size, listed), listed, per_segment=True)
        title = f"{what}: one image of {size} px, {model.num_classes} classes"
    else:
        if is_recipe:
            recipe = load_recipe(Path(what), [*overrides, *([f"model.num_classes={num_classes}"] if num_classes else [])])
            name, subject = recipe.name, None
        else:
            try:
                opened = open_artifact(what, context, overrides)
            except (IntegrityError, NotFoundError) as error:
                hint = did_you_mean(what, ARCHITECTURES)
                raise type(error)(f"{what} is no architecture{hint} and no recipe file, and as an artifact: {error}") from error
            recipe, name, subject = opened.recipe, opened.name, opened.checkpoint
        named_ratios = recipe.profile.ratios if recipe.profile else None
        listed = named(wanted, recipe.model.points) if wanted else grid(recipe, shrink_by or named_ratios)
        artifact = profile(recipe, context, listed, name, subject)
        if artifact is None:
            output.result("profile-flops", {"dry_run": True})
            return
        size, rows = recipe.data.image_size, document(artifact, context)["rows"]
        shown = {"digest": artifact.digest, "tag": artifact.tag, "image_size": size}
        title = f"{artifact.tag}: one image of {size} px, {recipe.model.num_classes} classes"
    rows = sorted_rows(rows, sort)
    write_csv(None if dry_run else csv, rows)
    if not per_segment:
        rows = [{name: value for name, value in row.items() if name != "segments"} for row in rows]
    tables = [segment_table(row) for row in rows] if per_segment else [cost_table(title, rows)]
    output.result("profile-flops", shown | {"rows": rows}, tables, [artifact.digest] if artifact else [])


def _network(arch: str, image_size: int | None, num_classes: int | None, stem: Stem | None) -> "tuple[ModelSection, int]":
    from sdpctl.recipe.schema import ModelSection

    plain = ARCHITECTURES[arch]
    imagenet = (stem or plain.stem) == "imagenet"
    size = image_size or (224 if imagenet else 32)
    if size < plain.reduction(stem):
        raise UsageError(f"--image-size {size}: {arch} divides the size by {plain.reduction(stem)}; give at least that")
    return ModelSection(arch=arch, num_classes=num_classes or (1000 if imagenet else 10), stem=stem), size
