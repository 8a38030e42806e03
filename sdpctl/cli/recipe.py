"""`sdpctl recipe`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from sdpctl.cli.layout import Column, Table
from sdpctl.cli.options import Json, RecipeFile, Set
from sdpctl.cli.output import Output
from sdpctl.errors import DataError, RecipeError, UsageError

recipe_app = typer.Typer(help="Look at recipes.", no_args_is_help=True)


@recipe_app.command("ls")
def ls(
    folder: Annotated[Path, typer.Argument(help="Folder of the recipes.")] = Path("recipes"),
    json_: Json = False,
) -> None:
    """List the recipes of a folder."""
    from sdpctl.recipe.load import load_recipe

    output = Output(json_mode=json_)
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder; give the folder that holds the recipes")
    rows, problems = [], []
    for path in sorted(folder.glob("*.yaml")):
        try:
            recipe = load_recipe(path)
        except (RecipeError, UsageError) as error:
            problems += str(error).splitlines()
            continue
        section = {"arch": recipe.model.arch, "dataset": recipe.data.dataset, "image_size": recipe.data.image_size}
        rows.append({"recipe": str(path), "name": recipe.name} | section | {"epochs": recipe.train.epochs})
    columns = [Column("recipe", folds="/"), Column("arch"), Column("data")]
    table = Table("", [*columns, Column("px", "right", drop=1), Column("epochs", "right", drop=2)])
    for row in rows:
        table.add_row(*(str(row[name]) for name in ("recipe", "arch", "dataset", "image_size", "epochs")))
    output.result("recipe-ls", {"rows": rows}, [table])
    if problems:
        raise RecipeError(problems)


@recipe_app.command("show")
def show(recipe: RecipeFile, set_: Set = None, json_: Json = False) -> None:
    """Show a recipe with every default filled in, as YAML."""
    from sdpctl.pipeline.workspace import with_classes
    from sdpctl.recipe.load import dump_yaml, load_recipe

    output = Output(json_mode=json_)
    read = load_recipe(recipe, set_ or ())
    try:
        loaded = with_classes(read).complete()
    except DataError as error:
        output.note(f"the number of classes is not known: {error}")
        loaded = read.complete()
    if json_:
        output.result("recipe-show", {"recipe": loaded})
    else:
        output.content(dump_yaml(loaded).encode())


@recipe_app.command("schema")
def schema() -> None:
    """Print the JSON schema of recipes, for editors: recipes/schema.json is this."""
    from sdpctl.recipe.schema import json_schema

    sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")
