"""The kinds of artifacts as plain data: the name of each kind, its layers, and the stage that makes it. Needs no torch.

The result of a stage is an artifact of one kind. The entry of a kind holds everything that is known about it without running
a stage.
"""

import re
from dataclasses import dataclass

from sdpctl.budget import LABEL
from sdpctl.table import Table

MODEL = "model.safetensors"
HISTORY = "history.jsonl"
RECIPE = "recipe.yaml"
TRAINING_STATE = "training-state.safetensors"
IMPORTED = "import.json"
LEFT_OUT = "left-out.json"
STATISTICS = "statistics.safetensors"
NODES = "nodes.json"
RESULTS = "results.json"
PREDICTIONS = "predictions.safetensors"
COSTS = "costs.json"
TRIALS = "trials.jsonl"
RESULT = "result.json"
CASCADES = "cascade.json"
AGENT_DOCUMENT = "agent.json"
POLICY = "policy.safetensors"
ROLLOUTS = "rollouts.safetensors"
CURVE = "curve.jsonl"
EXPORT = "export.json"
CARD = "card.md"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of artifact.

    Args:
        name: name of the kind in the store.
        command: the command that makes artifacts of this kind; `run` lists its result under this name.
        version: part of every key; it is increased when the same inputs would lead to a different result.
        suffixes: regular expressions of the endings of tags of this kind, after the name and a dot; empty for a checkpoint.
        document: title of the JSON layer that describes the artifact; None if there is no such layer.
        check: `module:attribute` of the function that checks this layer.
        section: recipe section that adds the stage to `run`; None for a stage that `run` always or never includes.
        settings: `module:class` of this section.
        stage: `module:class` of the stage that makes artifacts of this kind, if a section adds it to `run`.
    """

    name: str
    command: str
    version: int = 1
    suffixes: tuple[str, ...] = ()
    document: str | None = None
    check: str | None = None
    section: str | None = None
    settings: str | None = None
    stage: str | None = None


CHECKPOINT = Kind(name="checkpoint", command="train", version=1)
BN_STATISTICS = Kind(
    name="bn-statistics",
    command="calibrate-bn",
    version=2,
    suffixes=("bn",),
    document=NODES,
    check="sdpctl.instance:check_nodes",
)
EVALUATION = Kind(
    name="evaluation",
    command="eval-instances",
    version=5,
    suffixes=("eval", "holdout"),
    document=RESULTS,
    check="sdpctl.stages.documents:check_evaluation",
)
PROFILE = Kind(
    name="profile",
    command="profile-flops",
    version=1,
    suffixes=("profile",),
    document=COSTS,
    check="sdpctl.stages.documents:check_profile",
    section="profile",
    settings="sdpctl.engine.settings:ProfileSettings",
    stage="sdpctl.stages.profile:Profile",
)
SEARCH = Kind(
    name="search",
    command="search",
    version=3,
    suffixes=(rf"search(\.{LABEL})?",),
    document=RESULT,
    check="sdpctl.stages.documents:check_search",
    section="search",
    settings="sdpctl.search.settings:SearchSettings",
    stage="sdpctl.stages.search:Search",
)
AGENT = Kind(
    name="agent",
    command="agent",
    version=1,
    suffixes=("agent",),
    document=AGENT_DOCUMENT,
    check="sdpctl.stages.documents:check_agent",
    section="search",
    settings="sdpctl.search.settings:SearchSettings",
    stage="sdpctl.stages.agent:TrainAgent",
)
CASCADE = Kind(
    name="cascade",
    command="cascade",
    version=1,
    suffixes=(rf"cascade(\.{LABEL})?",),
    document=CASCADES,
    check="sdpctl.stages.documents:check_cascade",
    section="cascade",
    settings="sdpctl.search.settings:CascadeSettings",
    stage="sdpctl.stages.cascade:ChooseCascade",
)
EXPORTED = Kind(
    name="export",
    command="export",
    version=1,
    suffixes=(r"export\.[a-z0-9-]+\.[0-9a-f]{12}",),
    document=EXPORT,
    check="sdpctl.export.description:check_export",
    section="export",
    settings="sdpctl.export.settings:ExportSettings",
    stage="sdpctl.stages.export:Export",
)

REPORT = Kind(
    name="report",
    command="report",
    version=1,
    suffixes=(r"report(\.(png|svg))?(\.[0-9a-f]{12})?",),
    section="report",
    settings="sdpctl.report.settings:ReportSettings",
    stage="sdpctl.stages.report:Report",
)

KINDS = Table("kind of artifact", [CHECKPOINT, BN_STATISTICS, EVALUATION, PROFILE, SEARCH, AGENT, CASCADE, EXPORTED, REPORT])
"""The kinds, in the order in which `run` makes them."""


def without_suffix(tag: str, kind: str) -> str:
    """Return the tag of an artifact without the suffix of its kind: `digits` for `digits.bn`; a checkpoint's tag has none."""
    suffixes = "|".join(KINDS[kind].suffixes) if kind in KINDS else ""
    return re.sub(rf"\.({suffixes})$", "", tag) if suffixes else tag
