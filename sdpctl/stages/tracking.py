"""Tracking: hand the figures of a training, and of everything made from its checkpoint, to the trackers of the recipe."""

from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

from sdpctl.errors import ResourceError
from sdpctl.kinds import AGENT, CURVE, EVALUATION, RECIPE, RESULT, RESULTS, SEARCH, TRIALS
from sdpctl.stages.context import Context
from sdpctl.stages.stage import Tracked
from sdpctl.store import Artifact
from sdpctl.table import load
from sdpctl.tracking.catalog import TRACKERS
from sdpctl.untrusted import load_json

Layers = Mapping[str, bytes]
Figures = Iterator[tuple[int, dict[str, float]]]
"""Steps, and the values of curves at each."""


class Tracking:
    """The open trackers of a run, as a context manager.

    A tracker that fails does not end the work that it watches: the user is told once, and this tracker gets nothing more.

    Args:
        tracked: the trackers.
        key: key of the checkpoint.
        context: gives the folder beside the blobs, and the reporter.
        first_step: steps from this one on are written again; None if no earlier figures are replaced.

    Raises:
        ResourceError: if a tracker cannot be reached.
    """

    def __init__(self, tracked: Tracked, key: str, context: Context, first_step: int | None = None) -> None:
        self.context = context
        self.trackers: dict[str, Any] = {}
        if tracked.by:
            from sdpctl.tracking.tracker import Run

            run = Run(name=tracked.name, id=key[:12], folder=context.path)
            self.trackers = {each: load(TRACKERS[each].code)(run, first_step) for each in tracked.by}

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._each(lambda tracker: tracker.close())

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add the values of curves at a step."""
        self._each(lambda tracker: tracker.scalars(values, step))

    def document(self, name: str, text: str) -> None:
        """Keep a text."""
        self._each(lambda tracker: tracker.document(name, text))

    def settings(self, values: Mapping[str, object]) -> None:
        """Keep what the training was started with, by dotted key."""
        self._each(lambda tracker: tracker.settings(values))

    def _each(self, hand_over: Callable[[Any], None]) -> None:
        for name, tracker in list(self.trackers.items()):
            try:
                hand_over(tracker)
            except ResourceError as error:
                del self.trackers[name]
                tell_stopped(name, error, self.context)


def tell_stopped(name: str, error: ResourceError, context: Context) -> None:
    """Tell the user that a tracker gets nothing more."""
    context.report.note(f"tracking by {name} has stopped, and the work goes on: {error}")


def track(artifact: Artifact, layers: Layers, tracked: Tracked, context: Context) -> None:
    """Hand the figures of a committed result to the trackers of a recipe.

    A tracker that cannot be reached does not fail the command, since its result is committed: the user is told.

    Args:
        artifact: the result.
        layers: its layers.
        tracked: the trackers.
        context: gives the store.
    """
    for name in tracked.by:
        checkpoint = context.lineage(artifact)[-1]
        try:
            opened = Tracking(Tracked((name,), tracked.name), checkpoint.key or checkpoint.digest.partition(":")[2], context)
        except ResourceError as error:
            tell_stopped(name, error, context)
            continue
        with opened as tracking:
            for step, values in FIGURES.get(artifact.kind, _no_figures)(layers):
                tracking.scalars(values, step)
            tracking.document(f"{artifact.kind}.digest.txt", artifact.digest)
            if artifact.digest == checkpoint.digest:
                tracking.document(RECIPE, layers[RECIPE].decode())


def epoch_figures(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of an epoch, given its record in the history and, if known, images per second."""
    values = {f"train/{key}": value for key, value in record.items() if key in ("loss", "accuracy", "lr", "images_per_second")}
    for instance, scores in record.get("validation", {}).items():
        values |= {f"validation/{score}/{instance}": value for score, value in scores.items()}
    return values


def _no_figures(layers: Layers) -> Figures:  # noqa: ARG001
    yield from ()


def _records(layer: bytes) -> list[dict[str, Any]]:
    return [load_json(line) for line in layer.splitlines()]


def _evaluation(layers: Layers) -> Figures:
    """Yield the accuracy of each instance, and the curve of accuracy by cost, whose steps are MACs."""
    results = load_json(layers[RESULTS])
    for row in results["rows"]:
        yield 0, {f"{results['split']}/top1/{row['instance']}": row["top1"]}
    for row in sorted(results["rows"], key=lambda row: row["macs"]):
        yield row["macs"], {f"{results['split']}/top1_by_macs": row["top1"]}


def _search(layers: Layers) -> Figures:
    """Yield the reward of each scored network, and the best so far, for each run of a strategy."""
    best: dict[str, list[float]] = {}
    budget = (load_json(layers[RESULT]).get("budget") or {}).get("text", "any")
    for trial in _records(layers[TRIALS]):
        for run in trial["runs"]:
            rewards = best.setdefault(run, [])
            rewards.append(max([trial["reward"], *rewards[-1:]]))
            prefix = f"search/{budget}/{run}"
            yield len(rewards), {f"{prefix}/reward": trial["reward"], f"{prefix}/best": rewards[-1]}


def _agent(layers: Layers) -> Figures:
    """Yield the learning curve of an agent; its steps are scored networks."""
    for record in _records(layers[CURVE]):
        yield record["evaluations"], {f"agent/{key}": value for key, value in record.items() if key != "evaluations"}


FIGURES: dict[str, Callable[[Layers], Figures]] = {EVALUATION.name: _evaluation, SEARCH.name: _search, AGENT.name: _agent}
"""The figures of a result by the kind of its artifact. Those of a training are handed over epoch by epoch."""
