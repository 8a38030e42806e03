"""The whole way: from a recipe to the table."""

from sdpctl.pipeline.context import Context, Opened, grid
from sdpctl.pipeline.export import export
from sdpctl.pipeline.instances import calibrate, evaluate, profile
from sdpctl.pipeline.search import search
from sdpctl.pipeline.train import partial_tag, resolved, train
from sdpctl.recipe.schema import Recipe
from sdpctl.store import Artifact


def run(recipe: Recipe, context: Context) -> dict[str, Artifact]:
    """Train, calibrate, evaluate, and the optional stages the recipe names; what the store has is not done again.

    A training that was interrupted goes on.

    Returns:
        The artifacts by stage; on a dry run those there are already.
    """
    context.find_store()
    recipe = resolved(context.workspace.fingerprint(recipe), context)
    done: dict[str, Artifact] = {}
    unfinished = context.tagged(partial_tag(recipe)) is not None
    checkpoint = train(recipe, context, resume=unfinished and not context.force)
    if checkpoint is None:
        context.report.note(f"{recipe.name}: would then calibrate and evaluate {len(grid(recipe))} instances")
        return done
    done["train"] = checkpoint
    opened = Opened(checkpoint, None, recipe, recipe.name)
    statistics = calibrate(opened, context)
    if statistics is not None:
        done["calibrate-bn"] = statistics
        opened = Opened(checkpoint, statistics, recipe, recipe.name)
        evaluation = evaluate(opened, context)
        if evaluation is not None:
            done["eval-instances"] = evaluation
    if recipe.profile is not None:
        costs = profile(recipe, context, grid(recipe, recipe.profile.ratios), recipe.name)
        if costs is not None:
            done["profile-flops"] = costs
    if recipe.search is not None:
        found = search(Opened(checkpoint, None, recipe, recipe.name), context)
        if found is not None:
            done["search"] = found
    if recipe.export is not None and statistics is not None:
        exported = export(opened, context)
        if exported is not None:
            done["export"] = exported
    return done
