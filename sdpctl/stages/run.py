"""A whole run: all stages of a recipe."""

from sdpctl.kinds import BN_STATISTICS, CHECKPOINT, EVALUATION, KINDS
from sdpctl.recipe.schema import Recipe
from sdpctl.stages.calibrate import Calibrate
from sdpctl.stages.context import Context
from sdpctl.stages.evaluate import Evaluate
from sdpctl.stages.network import TrainedNetwork
from sdpctl.stages.optional import OptionalStage
from sdpctl.stages.stage import Stage
from sdpctl.stages.train import Train, resolve
from sdpctl.table import load


def stages_of(recipe: Recipe, context: Context, *, resume: bool | None = None) -> dict[str, Stage]:
    """Return the stages of a recipe by command, in order: train, calibrate, evaluate, and each optional stage of the recipe.

    Args:
        recipe: the recipe; a section of an optional stage adds this stage.
        context: gives the store and the data's remembered fingerprint.
        resume: continue an interrupted training; by default if there is one.

    Raises:
        DataError: if the data is missing, or does not match the recipe's fingerprint.
        NotFoundError: if the checkpoint that `train.init` names does not exist.
    """
    context.make_store()
    train = Train(recipe, resume=resume)
    network = TrainedNetwork(checkpoint=train, resolved=resolve(recipe, context), name=recipe.name)
    calibrate = Calibrate(network)
    stages: dict[str, Stage] = {
        CHECKPOINT.command: train,
        BN_STATISTICS.command: calibrate,
        EVALUATION.command: Evaluate(network, statistics=calibrate),
    }
    for kind in KINDS.values():
        if kind.stage is not None and kind.section is not None and recipe.optional(kind.section) is not None:
            optional: type[OptionalStage] = load(kind.stage)
            if (stage := optional.of(network)) is not None:
                stages[kind.command] = stage
    return stages
