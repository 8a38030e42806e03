"""SDPoint networks: train once, run at many costs.

The names below are loaded when they are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdpctl.instance import FULL, Instance
    from sdpctl.loading import load
    from sdpctl.models import create_model, list_models
    from sdpctl.sdpoint import sdpoint_instances
    from sdpctl.search.environment import Budgets, SearchEnv
    from sdpctl.search.space import Space

__all__ = ["FULL", "Budgets", "Instance", "SearchEnv", "Space", "create_model", "list_models", "load", "sdpoint_instances"]

_HOMES = {
    "FULL": "sdpctl.instance",
    "Budgets": "sdpctl.search.environment",
    "Instance": "sdpctl.instance",
    "SearchEnv": "sdpctl.search.environment",
    "Space": "sdpctl.search.space",
    "create_model": "sdpctl.models",
    "list_models": "sdpctl.models",
    "load": "sdpctl.loading",
    "sdpoint_instances": "sdpctl.sdpoint",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
