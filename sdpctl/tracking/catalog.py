"""The trackers as plain data. Needs neither torch nor the trackers' packages."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec

from sdpctl.errors import ResourceError
from sdpctl.table import Table


@dataclass(frozen=True, kw_only=True)
class TrackerInfo:
    """The facts about a tracker that are known without its package.

    Args:
        name: name of the tracker in recipes; the extra of sdpctl that installs it has the same name.
        module: the module that its package brings.
        code: `module:class` of its implementation, a `sdpctl.tracking.tracker.Tracker`.
    """

    name: str
    module: str
    code: str


TRACKERS = Table(
    "tracker",
    [
        TrackerInfo(name="tensorboard", module="tensorboard", code="sdpctl.tracking.tensorboard:TensorBoard"),
        TrackerInfo(name="mlflow", module="mlflow", code="sdpctl.tracking.mlflow:MLflow"),
    ],
)


def check_installed(names: Iterable[str]) -> None:
    """Check that the packages of trackers are installed.

    Raises:
        ResourceError: if one is missing; the message has the command that installs it.
    """
    for name in names:
        if find_spec(TRACKERS[name].module) is None:
            raise ResourceError(
                f"train.track: {name} is not installed; install it with pip install 'sdpctl[{name}]', or set train.track=[]"
            )
