"""`sdpctl profile-flops`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdpctl.bounds import LARGEST_IMAGE, MOST_CLASSES
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
from sdpctl.cli.output import Output, check_output, write_csv
from sdpctl.cli.tables import cost_table, segment_table, sorted_rows
from sdpctl.errors import IntegrityError, NotFoundError, UsageError, did_you_mean
from sdpctl.models.registry import ARCHITECTURES, Stem

if TYPE_CHECKING:
    from sdpctl.pipeline.context import Context


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
    from sdpctl.pipeline.context import Context

    output = Output(json_mode=json_, quiet=quiet, verbose=verbose)
    check_output(csv, force=force)
    if sort not in (Sort.macs, Sort.instance):
        raise UsageError(f"--sort {sort}: a profile has no scores; use --sort macs or --sort instance")
    if ratio_list is not None and instances is not None:
        raise UsageError("--ratios and --instances exclude each other; give one")
    is_architecture = what in ARCHITECTURES
    is_recipe = Path(what).suffix in (".yaml", ".yml") or Path(what).is_file()
    for given, option, fits in (
        (set_, "--set", not is_architecture),
        (stem, "--stem", is_architecture),
        (num_classes, "--num-classes", is_recipe or is_architecture),
    ):
        if given and not fits:
            raise UsageError(f"{option} does not apply to {what}; `sdpctl profile-flops --help` says what it applies to")
    wanted, shrink_by = comma_separated(instances), ratios(ratio_list)
    context = Context(path=store, report=output, force=force, dry_run=dry_run)
    if is_architecture:
        document = _architecture(what, image_size, num_classes, stem, wanted, shrink_by)
    else:
        sets = {"data.image_size": image_size, "model.num_classes": num_classes}
        overrides = [*(set_ or ()), *(f"{key}={value}" for key, value in sets.items() if value)]
        document = _stage(what, is_recipe, overrides, wanted, shrink_by, context)
    if "rows" not in document:
        output.result("profile-flops", document)
        return
    rows = document["rows"] = sorted_rows(document["rows"], sort)
    write_csv(None if dry_run else csv, rows)
    name = document.get("tag") or what
    title = f"{name}: one image of {document['image_size']} px, {document['model']['num_classes']} classes"
    tables = [segment_table(row, document["model"]["arch"]) for row in rows] if per_segment else [cost_table(title, rows)]
    if not per_segment:
        document["rows"] = [{column: value for column, value in row.items() if column != "segments"} for row in rows]
    output.result("profile-flops", document, tables, [document["digest"]] if "digest" in document else [])


def _architecture(
    arch: str,
    image_size: int | None,
    num_classes: int | None,
    stem: Stem | None,
    wanted: list[str] | None,
    shrink_by: tuple[float, ...] | None,
) -> dict[str, Any]:
    """Count an architecture as it was published: at 224 px with 1000 classes, or at 32 px with 10 with the small stem."""
    from sdpctl.models.settings import ModelSettings
    from sdpctl.pipeline.context import named
    from sdpctl.pipeline.instances import cost_rows, profile_model
    from sdpctl.sdpoint import sdpoint_instances

    plain = ARCHITECTURES[arch]
    stem = stem or plain.stem
    size = image_size or (224 if stem == "imagenet" else 32)
    if size < plain.reduction(stem):
        raise UsageError(f"--image-size {size}: {arch} divides the size by {plain.reduction(stem)}; give at least that")
    model = ModelSettings(arch=arch, num_classes=num_classes or (1000 if stem == "imagenet" else 10), stem=stem)
    listed = named(wanted, model.points) if wanted else sdpoint_instances(model, shrink_by or (0.5, 0.75))
    rows = cost_rows(profile_model(model, size, listed), listed, per_segment=True)
    return {"image_size": size, "model": model.plain, "rows": rows}


def _stage(
    what: str,
    is_recipe: bool,
    overrides: list[str],
    wanted: list[str] | None,
    shrink_by: tuple[float, ...] | None,
    context: "Context",
) -> dict[str, Any]:
    """Count the network of a recipe or an artifact, as the stage of that name."""
    from sdpctl.pipeline.context import grid, named, open_artifact
    from sdpctl.pipeline.instances import document, profile
    from sdpctl.pipeline.workspace import with_classes
    from sdpctl.recipe.load import load_recipe

    if is_recipe:
        recipe = with_classes(load_recipe(Path(what), overrides))
        name = recipe.name
    else:
        try:
            opened = open_artifact(what, context, overrides)
        except (IntegrityError, NotFoundError) as error:
            hint = did_you_mean(what, ARCHITECTURES)
            raise type(error)(f"{what} is neither an architecture{hint} nor a recipe file; as an artifact: {error}") from error
        recipe, name = opened.recipe, opened.name
    shrink_by = shrink_by or (recipe.profile.ratios if recipe.profile else None)
    artifact = profile(recipe, context, named(wanted, recipe.model.points) if wanted else grid(recipe, shrink_by), name)
    if artifact is None:
        return {"dry_run": True}
    return {"digest": artifact.digest, "tag": artifact.tag} | document(artifact, context)
