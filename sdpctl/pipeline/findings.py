"""The instances that a search found."""

from sdpctl.errors import NotFoundError
from sdpctl.pipeline.context import Context
from sdpctl.pipeline.instances import document


def found_instances(ref: str, context: Context) -> list[str]:
    """Return the best network of a search, its Pareto front and `full`.

    Raises:
        NotFoundError: where the reference is no search.
    """
    artifact = context.store.resolve(ref)
    if artifact.kind != "search":
        raise NotFoundError(f"{ref} is of kind {artifact.kind}, no search; `sdpctl search` makes one")
    result = document(artifact, context)
    rows = [result["best"], *result["pareto"], result["full"]]
    return list(dict.fromkeys(row["instance"] for row in rows))
