"""Which instance is meant: choosing on held-out images."""

from collections.abc import Sequence

from sdpctl.budget import Budget
from sdpctl.errors import BudgetError
from sdpctl.instance import FULL, Instance, pareto_optimal
from sdpctl.pipeline.context import Context, Opened, grid
from sdpctl.pipeline.instances import calibrated_instances, evaluated, known_statistics, profile_model, statistics_for
from sdpctl.uncertainty import choice_notes


def calibrated(opened: Opened, context: Context) -> list[Instance]:
    """Return the instances that are calibrated; the SDPoint grid where none is."""
    statistics = known_statistics(opened, context) or statistics_for(opened, context, grid(opened.recipe))
    return grid(opened.recipe) if statistics is None else calibrated_instances(statistics, context)


def within(opened: Opened, instances: Sequence[Instance], budget: Budget) -> list[Instance]:
    """Return the instances within a budget.

    Raises:
        BudgetError: where there is none; it names the cheapest.
    """
    costs = profile_model(opened.recipe.model, opened.recipe.data.image_size, instances)
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


def front(opened: Opened, context: Context, instances: Sequence[Instance]) -> list[Instance] | None:
    """Return the instances that no other beats on held-out images, the cheapest first; of equals one.

    Returns:
        The instances, the last of them the most accurate; None on a dry run that would have to evaluate.
    """
    # All that are calibrated, so that another budget finds them evaluated.
    results = evaluated(opened, context, list(dict.fromkeys([*calibrated(opened, context), *instances])), "holdout")
    if results is None:
        return None
    rows = {Instance.parse(row["instance"]): row for row in results["rows"]}
    scores = {instance: (rows[instance]["macs"], rows[instance]["top1"]) for instance in instances}
    accuracy = [top1 for _, top1 in scores.values()]
    for line in choice_notes(accuracy, max(accuracy), results["images"]):
        context.report.note(f"{opened.name}: {line}")
    optimal = pareto_optimal(scores)
    one_of_equals = {scores[instance]: instance for instance in reversed(instances) if instance in optimal}
    return sorted(one_of_equals.values(), key=lambda instance: scores[instance])
