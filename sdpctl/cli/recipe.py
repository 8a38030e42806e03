"""`sdpctl recipe`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from sdpctl.cli.command import PRINTS, Session, command
from sdpctl.cli.options import RecipeFile
from sdpctl.errors import DataError, RecipeError, UsageError

recipe_app = typer.Typer(help="Look at recipes.", no_args_is_help=True)


@recipe_app.command("ls")
@command("recipe-ls", *PRINTS)
def ls(
    session: Session, folder: Annotated[Path, typer.Argument(help="Folder that holds the recipes.")] = Path("recipes")
) -> None:
    """List the recipes of a folder."""
    from sdpctl.cli.rows import RecipeRow
    from sdpctl.cli.tables import recipe_table
    from sdpctl.recipe.load import load_recipe

    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder; give the folder that holds the recipes")
    rows: list[RecipeRow] = []
    problems: list[str] = []
    for path in sorted(folder.glob("*.yaml")):
        try:
            recipe = load_recipe(path)
        except (RecipeError, UsageError) as error:
            problems += str(error).splitlines()
            continue
        rows.append(
            RecipeRow(
                recipe=str(path),
                name=recipe.name,
                arch=recipe.model.arch,
                dataset=recipe.data.dataset,
                image_size=recipe.data.image_size,
                epochs=recipe.train.epochs,
            )
        )
    table = recipe_table(rows)
    session.result({"rows": table.records()}, [table])
    if problems:
        raise RecipeError(problems)


@recipe_app.command("show")
@command("recipe-show", "set_", *PRINTS)
def show(session: Session, recipe: RecipeFile) -> None:
    """Show a recipe with every default filled in, as YAML."""
    from sdpctl.recipe.load import dump_yaml, load_recipe
    from sdpctl.stages.workspace import with_classes

    read = load_recipe(recipe, session.overrides)
    try:
        complete = with_classes(read).complete()
    except DataError as error:
        session.output.note(f"the number of classes is not known: {error}")
        complete = read.complete()
    if session.output.mode == "json":
        session.result({"recipe": complete})
    else:
        session.output.content(dump_yaml(complete).encode())


@recipe_app.command("schema")
def schema() -> None:
    """Print the JSON schema of recipes for editors, which is also recipes/schema.json."""
    from sdpctl.recipe.schema import json_schema

    sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")
