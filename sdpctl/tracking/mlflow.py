"""MLflow: a run on the server or in the folder that MLflow's own environment variables name."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import time

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from sdpctl.errors import ResourceError, shortened
from sdpctl.tracking.tracker import Run, Tracker, curve_name

EXPERIMENT = "sdpctl"
"""The experiment of all runs, unless MLFLOW_EXPERIMENT_NAME names one."""

ID = "sdpctl.run"
"""The tag by which a run is found again."""

MOST_AT_ONCE = 100
"""Params that MLflow takes in one call."""

MOST_CHARACTERS = 500
"""Length of a param's value that every version of MLflow takes."""


class MLflow(Tracker):
    """A run of MLflow, with metrics, params, and the recipe as an artifact."""

    def __init__(self, run: Run, first_step: int | None = None) -> None:
        del first_step  # MLflow keeps both values of a step that is written twice, and draws the later one
        with _asking():
            self.client = MlflowClient()
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
            known = self.client.get_experiment_by_name(name)
            experiment = self.client.create_experiment(name) if known is None else known.experiment_id
            called = f"{run.name}/{run.id}"
            runs = self.client.search_runs([experiment], f"tags.`{ID}` = '{called}'", max_results=1)
            made = runs[0] if runs else self.client.create_run(experiment, tags={ID: called}, run_name=run.name)
            self.id = made.info.run_id
            self.client.update_run(self.id, status="RUNNING")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics."""
        now = int(1000 * time())
        with _asking():
            self.client.log_batch(self.id, [Metric(curve_name(name), value, now, step) for name, value in values.items()])

    def document(self, name: str, text: str) -> None:
        """Log a text as an artifact of the run."""
        with _asking():
            self.client.log_text(self.id, text, name)

    def settings(self, values: Mapping[str, object]) -> None:
        """Log params."""
        params = [Param(key, shortened(str(value), MOST_CHARACTERS - 30)) for key, value in values.items()]
        with _asking():
            for begin in range(0, len(params), MOST_AT_ONCE):
                self.client.log_batch(self.id, params=params[begin : begin + MOST_AT_ONCE])

    def close(self) -> None:
        """Say that the run has ended."""
        with _asking():
            self.client.set_terminated(self.id)


@contextmanager
def _asking() -> Iterator[None]:
    try:
        yield
    except (MlflowException, OSError) as error:
        reason = shortened(" ".join(str(error).split()), 300)
        raise ResourceError(f"MLflow does not answer: {reason}; see MLFLOW_TRACKING_URI") from error
