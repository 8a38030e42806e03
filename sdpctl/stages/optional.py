"""The stages that a recipe asks for by a section of its own."""

from abc import abstractmethod

from sdpctl.stages.network import TrainedNetwork
from sdpctl.stages.stage import Stage


class OptionalStage(Stage):
    """A stage that `run` includes when the recipe has its section."""

    @classmethod
    @abstractmethod
    def of(cls, network: TrainedNetwork) -> "OptionalStage | None":
        """Return the stage as the recipe of a network asks for it; None if its section asks for a different stage."""
