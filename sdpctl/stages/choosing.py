"""Choose instances by their accuracy on held-out images. Each choice yields the stages that it needs, as a stage does."""

from collections.abc import Generator, Sequence

from sdpctl.budget import Budget
from sdpctl.errors import BudgetError
from sdpctl.instance import FULL, Instance, pareto_optimal
from sdpctl.stages.calibrate import Statistics
from sdpctl.stages.context import Context
from sdpctl.stages.evaluate import Scores
from sdpctl.stages.layers import calibrated_instances, read_document
from sdpctl.stages.network import TrainedNetwork
from sdpctl.stages.profile import count_costs
from sdpctl.stages.stage import Stage
from sdpctl.store import Artifact
from sdpctl.uncertainty import choice_notes

Choice = Generator[Stage, Artifact, list[Instance]]


def calibrated(network: TrainedNetwork, context: Context, *, calibrates: bool) -> Choice:
    """Choose all calibrated instances; if there are none, the SDPoint grid."""
    statistics = yield Statistics(network, calibrates=calibrates)
    return calibrated_instances(context.store, statistics)


def within(network: TrainedNetwork, instances: Sequence[Instance], budget: Budget) -> list[Instance]:
    """Return the instances within a budget.

    Raises:
        BudgetError: if no instance is within the budget; the message names the cheapest one.
    """
    costs = count_costs(network.recipe.model, network.recipe.scored_size, instances)
    limit = budget.macs(costs[FULL].macs)
    found = [instance for instance in instances if costs[instance].macs <= limit]
    if not found:
        least = min(instances, key=lambda instance: costs[instance].macs)
        share = 100 * costs[least].macs / costs[FULL].macs
        raise BudgetError(
            f"--max-macs {budget.text}: no calibrated instance is within {limit:,} MACs; the cheapest, {least}, takes "
            f"{costs[least].macs:,} ({share:.1f} %)"
        )
    return found


def pareto_front(
    network: TrainedNetwork, context: Context, candidates: Sequence[Instance] | None = None, *, calibrates: bool
) -> Choice:
    """Choose the Pareto-optimal instances by MACs and held-out accuracy, the cheapest first; of equal instances, choose one.

    Args:
        network: a trained network.
        context: gives the store.
        candidates: the instances to choose among; by default all calibrated instances.
        calibrates: whether missing statistics may be gathered.

    Returns:
        The instances; the last of them is the most accurate.
    """
    known = yield from calibrated(network, context, calibrates=calibrates)
    candidates = known if candidates is None else candidates
    # Evaluate all calibrated instances, so that a later choice with a different budget finds their scores in the store.
    wanted = list(dict.fromkeys([*known, *candidates]))
    results = read_document(context.store, (yield Scores(network, wanted, "holdout", calibrates=calibrates)))
    rows = {Instance.parse(row["instance"]): row for row in results["rows"]}
    scores = {instance: (rows[instance]["macs"], rows[instance]["top1"]) for instance in candidates}
    accuracy = [top1 for _, top1 in scores.values()]
    for line in choice_notes(accuracy, max(accuracy), results["images"]):
        context.report.note(f"{network.name}: {line}")
    optimal = pareto_optimal(scores)
    one_of_equals = {scores[instance]: instance for instance in reversed(candidates) if instance in optimal}
    return sorted(one_of_equals.values(), key=lambda instance: scores[instance])
