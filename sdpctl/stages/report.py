"""The report: one page, or one picture, of what the store knows about networks. It is made of stored tables alone."""

import base64
import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from sdpctl.errors import NotFoundError, UsageError
from sdpctl.instance import FULL, Instance, pareto_optimal
from sdpctl.kinds import (
    AGENT,
    CASCADE,
    CHECKPOINT,
    EVALUATION,
    HISTORY,
    PREDICTIONS,
    RECIPE,
    REPORT,
    SEARCH,
    TRIALS,
    without_suffix,
)
from sdpctl.report.settings import ReportFormat, ReportSettings
from sdpctl.stages.context import Context
from sdpctl.stages.documents import check_epoch, check_trial
from sdpctl.stages.evaluate import Evaluate
from sdpctl.stages.layers import read_checked_records, read_document
from sdpctl.stages.network import TrainedNetwork, counted, open_network, recipe_of
from sdpctl.stages.optional import OptionalStage
from sdpctl.stages.predictions import read_predictions
from sdpctl.stages.profile import cost_rows, count_costs
from sdpctl.stages.stage import Job, Made, Stage, Steps, Stored, key_of
from sdpctl.store import Artifact
from sdpctl.table import load

if TYPE_CHECKING:
    from torch import Tensor

TABLES = (EVALUATION, SEARCH, AGENT, CASCADE)
"""The kinds of artifacts whose tables a report shows."""

MOST_CLASS_VALUES = 60_000
"""The largest number of accuracies by class in a page; beyond it, only Pareto-optimal instances and `full` have them."""

MOST_CONFUSIONS = 10
"""The number of confusions that a page lists for an instance."""

Json = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Shown:
    """A network of a report.

    Args:
        network: the network.
        tables: the stages that make the tables to show.
    """

    network: TrainedNetwork
    tables: Sequence[Stage]


class Report(OptionalStage):
    """Show networks in a page, or their costs and accuracies in a picture.

    Args:
        shown: the networks.
        form: the format.
    """

    kind = REPORT

    def __init__(self, shown: Sequence[Shown], form: ReportFormat) -> None:
        self.shown = shown
        self.form = form
        self.versions = versions()  # a missing package is noticed before a run begins

    @classmethod
    def of(cls, network: TrainedNetwork) -> "Report":
        """Return the report of all tables that a network's recipe asks for."""
        tables: list[Stage] = [Evaluate(network)]
        for kind in TABLES:
            if kind.stage is not None and kind.section is not None and network.recipe.optional(kind.section) is not None:
                optional: type[OptionalStage] = load(kind.stage)
                tables += [] if (stage := optional.of(network)) is None else [stage]
        return cls([Shown(network, tables)], (network.recipe.report or ReportSettings()).format)

    @property
    def tag(self) -> str:
        """`NAME.report`; the tag of a picture ends with its format, and the tag of several networks with 12 digits."""
        first, *others = [one.network.name for one in self.shown]
        digits = hashlib.sha256("\n".join(others).encode()).hexdigest()[:12]
        form = "" if self.form == "html" else f".{self.form}"
        return f"{first}.report{form}" + (f".{digits}" if others else "")

    @property
    def title(self) -> str:
        """The name of the layer."""
        return f"report.{self.form}"

    def steps(self, context: Context) -> Steps:
        """Ask for the checkpoints and the tables."""
        found: list[tuple[TrainedNetwork, Artifact, list[Artifact]]] = []
        for one in self.shown:
            checkpoint = yield one.network.checkpoint
            tables = []
            for stage in one.tables:
                tables.append((yield stage))
            found.append((one.network, checkpoint, tables))
        shown = [
            {"name": network.name, "checkpoint": checkpoint.digest, "tables": [[_label(a), a.digest] for a in tables]}
            for network, checkpoint, tables in found
        ]
        _, checkpoint, tables = found[0]
        return Job(
            key=key_of(self.kind, shown=shown, format=self.form, versions=self.versions),
            make=lambda: self._made(found, context),
            subject=tables[0] if tables else checkpoint,
        )

    def task(self, context: Context) -> str:  # noqa: ARG002
        """Return the format and the number of networks."""
        networks = len(self.shown)
        return f"draw {self.title} of {networks} network{'' if networks == 1 else 's'}"

    def _made(self, found: "Sequence[tuple[TrainedNetwork, Artifact, list[Artifact]]]", context: Context) -> Made:
        from sdpctl.report.page import MOST_BYTES, page, picture

        document = _Gathered(context).document(found)
        if self.form != "html" and not document["rows"]:
            names = ", ".join(one.network.name for one in self.shown)
            raise NotFoundError(
                f"{names}: there is nothing to draw yet; run `sdpctl eval-instances {names.split(',')[0]}` first"
            )
        content = page(document) if self.form == "html" else picture(document, self.form)
        if len(content) > MOST_BYTES:
            context.report.note(f"{self.tag}: {len(content):,} bytes are much for a page; name fewer tables")
        rows = len(document["rows"])
        return Made({self.title: content}, f"{self.title} of {rows} row{'' if rows == 1 else 's'}, {len(content):,} bytes")


def versions() -> dict[str, str]:
    """Return the versions of the programs that draw a report.

    Raises:
        ResourceError: if the package that draws charts is not installed.
    """
    from sdpctl.report.page import require_library

    return {"sdpctl": version("sdpctl"), "vl-convert-python": require_library()}


def shown_by(refs: Sequence[str], context: Context, overrides: Sequence[str] = ()) -> list[Shown]:
    """Return the networks that references name, each once, in the order of the references.

    A checkpoint stands for all tables of it that have a tag; an evaluation, a search, an agent or a cascade for itself alone.

    Args:
        refs: tags or digests.
        context: gives the store.
        overrides: overrides of the recipes.

    Raises:
        NotFoundError: if there is no such artifact.
        UsageError: if an artifact is of a kind that a report does not show.
    """
    networks: dict[str, TrainedNetwork] = {}
    tables: dict[str, dict[str, Artifact]] = {}
    for ref in refs:
        artifact = context.store.resolve(ref)
        if artifact.kind not in [kind.name for kind in (CHECKPOINT, *TABLES)]:
            listed = ", ".join(kind.name for kind in (CHECKPOINT, *TABLES))
            raise UsageError(f"{ref} is of kind {artifact.kind}; a report shows artifacts of the kinds {listed}")
        network = open_network(ref, context, overrides)
        checkpoint = context.lineage(artifact)[-1].digest
        networks.setdefault(checkpoint, network)
        own = tables.setdefault(checkpoint, {})
        for table in _tables_of(network.name, checkpoint, context) if artifact.kind == CHECKPOINT.name else [artifact]:
            own.setdefault(table.digest, table)
    return [
        Shown(network, [Stored(table) for table in tables[checkpoint].values()]) for checkpoint, network in networks.items()
    ]


def _tables_of(name: str, checkpoint: str, context: Context) -> Iterator[Artifact]:
    """Yield the tagged tables of a checkpoint: evaluations, then searches, agents and cascades, each ordered by tag."""
    tagged = [artifact for artifact in context.store.artifacts() if artifact.tag is not None]
    for kind in TABLES:
        for artifact in sorted(tagged, key=lambda artifact: str(artifact.tag)):
            named = artifact.kind == kind.name and without_suffix(str(artifact.tag), kind.name) == name
            if named and context.lineage(artifact)[-1].digest == checkpoint:
                yield artifact


def _label(artifact: Artifact) -> str:
    """Return the tag of an artifact, or the beginning of its digest."""
    return artifact.tag or artifact.short


class _Gathered:
    """Gathers the document of a report: plain data that the page shows.

    Args:
        context: gives the store.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.rows: list[Json] = []
        self.classes: list[Json] = []
        self.searches: list[Json] = []
        self.predictions: list[Json] = []

    def document(self, found: "Sequence[tuple[TrainedNetwork, Artifact, list[Artifact]]]") -> Json:
        """Return the document of networks with their checkpoints and tables."""
        from sdpctl.report.page import library_versions

        networks = [self._network(*one) for one in found]
        return {
            "title": ", ".join(network["name"] for network in networks),
            "networks": networks,
            "series": list(dict.fromkeys(row["series"] for row in self.rows)),
            "rows": self.rows,
            "classes": self.classes,
            "searches": self.searches,
            "predictions": self.predictions,
            "versions": versions() | library_versions(),
        }

    def _network(self, network: TrainedNetwork, checkpoint: Artifact, tables: list[Artifact]) -> Json:
        store, name = self.context.store, network.name
        recipe = recipe_of(checkpoint, self.context)
        recipes = [{"of": _label(checkpoint), "text": store.read(checkpoint, RECIPE).decode()}]
        for table in tables:
            document = read_document(store, table)
            series = {"series": _label(table), "network": name, "kind": table.kind}
            if table.kind == EVALUATION.name:
                self._evaluation(series, table, document)
            elif table.kind == SEARCH.name:
                self._search(series, table, document)
            elif table.kind == AGENT.name:
                self._agent(series, table, document)
            else:
                self._cascade(series, document)
            text = store.read(table, RECIPE).decode()
            if text not in [known["text"] for known in recipes]:
                recipes.append({"of": _label(table), "text": text})
        epochs = read_checked_records(store, checkpoint, HISTORY, check_epoch) if HISTORY in checkpoint.layers else []
        plain = [row["instance"] for row in self.rows if row["network"] == name and not row["cascade"]]
        instances = list(dict.fromkeys([FULL, *map(Instance.parse, plain)]))
        costs = count_costs(recipe.model, recipe.scored_size, instances)
        profile = cost_rows(costs, instances, per_segment=True)
        return {
            "name": name,
            "arch": recipe.model.arch,
            "dataset": recipe.data.dataset,
            "image_size": recipe.scored_size,
            "instances": counted(instances),
            "evaluated": any(table.kind == EVALUATION.name for table in tables),
            "points": list(recipe.points),
            "epochs": [_epoch(record) for record in epochs],
            "segments": [segment["name"] for segment in profile[0]["segments"]],
            "profile": [
                {
                    "instance": row["instance"],
                    "macs": [segment["macs"] for segment in row["segments"]],
                    "maps": [segment["out"] for segment in row["segments"]],
                }
                for row in profile
            ],
            "lineage": self._lineage(tables or [checkpoint]),
            "recipes": recipes,
        }

    def _lineage(self, artifacts: Sequence[Artifact]) -> list[Json]:
        """Return the artifacts, and everything that they were made from, oldest first."""
        found: dict[str, Json] = {}
        tags = {artifact.digest: artifact.tag for artifact in self.context.store.artifacts() if artifact.tag}
        for artifact in artifacts:
            for link in reversed(self.context.lineage(artifact)):
                subject = None if link.subject is None else link.subject.digest
                tag = link.tag or tags.get(link.digest)
                found[link.digest] = {"tag": tag, "kind": link.kind, "digest": link.digest, "subject": subject}
        return list(found.values())

    def _add(self, series: Json, rows: Sequence[Json], images: int, split: str = "test") -> list[Json]:
        """Add rows of a series, with the Pareto-optimal rows marked; of rows with one instance, the first counts."""
        named = {row.get("cascade") or row["instance"]: row for row in reversed(rows)}
        best = pareto_optimal({name: (row["macs"], row["top1"]) for name, row in named.items()})
        added = [
            series
            | {
                "row": len(self.rows) + number,
                "instance": name,
                "cascade": "cascade" in row,
                "macs": row["macs"],
                "params": row.get("params"),
                "relative": row["relative"],
                "top1": row["top1"],
                "top5": row.get("top5"),
                "loss": row["loss"],
                "front": name in best,
                "images": images,
                "split": split,
            }
            for number, (name, row) in enumerate(reversed(named.items()))
        ]
        self.rows += added
        return added

    def _evaluation(self, series: Json, artifact: Artifact, results: Json) -> None:
        rows = [*results["rows"], *(results.get("cascades") or ())]
        added = self._add(series, rows, results["images"], results.get("split", "test"))
        if PREDICTIONS in artifact.layers and "classes" in results:
            self._predictions(series, artifact, results, added)
        if results.get("class_images") is None or not all(row.get("by_class") for row in results["rows"]):
            return
        everything = len(results["classes"]) * len(results["rows"]) <= MOST_CLASS_VALUES
        fronts = {row["instance"]: row for row in added}
        kept = {
            str(fronts[row["instance"]]["row"]): row["by_class"]
            for row in results["rows"]
            if everything or fronts[row["instance"]]["front"] or row["instance"] == str(FULL)
        }
        self.classes.append(series | {"names": results["classes"], "images": results["class_images"], "top1": kept})

    def _predictions(self, series: Json, artifact: Artifact, results: Json, added: list[Json]) -> None:
        """Add the largest confusions of each instance, and the images that only costly instances get right."""
        table, names = results["rows"], results["classes"]
        known = read_predictions(self.context.store, artifact, len(table), results["images"], len(names))
        numbers = {row["instance"]: row["row"] for row in added}
        macs = [row["macs"] for row in table]
        least = min(range(len(table)), key=lambda row: macs[row])
        images = []
        for image, picture in zip(known.pictured.tolist(), known.pictures, strict=True):
            needed = known.cheapest_right(image, macs)
            if needed is not None:
                images.append(
                    {
                        "image": image,
                        "label": int(known.labels[image]),
                        "predicted": int(known.predicted[least, image]),
                        "instance": table[needed]["instance"],
                        "relative": table[needed]["relative"],
                        "picture": _data_url(picture),
                    }
                )
        confusions = {
            str(numbers[row["instance"]]): known.confusions(number, MOST_CONFUSIONS) for number, row in enumerate(table)
        }
        self.predictions.append(
            series | {"names": names, "confusions": confusions, "cheapest": table[least]["instance"], "images": images}
        )

    def _search(self, series: Json, artifact: Artifact, result: Json) -> None:
        tested = [row for row in (result["best"], *result["runs"], result["full"], *result["pareto"]) if row.get("test")]
        self._add(series, [row | row["test"] for row in tested], result["full"]["test"]["images"])
        self._scored(series, artifact, result["full"]["heldout"]["images"], (result.get("budget") or {}).get("macs"))
        self.searches[-1]["winners"] = [
            {"run": row["run"], "seed": row["seed"], "evaluations": row["evaluations"], **_winner(row)}
            for row in result["runs"]
        ] + [{"run": "full", "seed": None, "evaluations": None, **_winner(result["full"])}]

    def _agent(self, series: Json, artifact: Artifact, document: Json) -> None:
        proposed = [row for row in document["proposals"] if row.get("test")]
        full = document.get("full") or {}
        full = [full] if full.get("test") else []
        tested = [row | row["test"] for row in [*proposed, *full]]
        if tested:
            self._add(series, tested, tested[0]["images"])
        self._scored(series, artifact, document["proposals"][0]["heldout"]["images"], None)

    def _scored(self, series: Json, artifact: Artifact, images: int, budget: int | None) -> None:
        """Add the networks that a search or an agent scored."""
        trials = read_checked_records(self.context.store, artifact, TRIALS, check_trial)
        kept = [{key: trial[key] for key in ("instance", "macs", "runs", "reward", "top1")} for trial in trials]
        self.searches.append(series | {"budget": budget, "images": images, "trials": kept, "winners": []})

    def _cascade(self, series: Json, document: Json) -> None:
        rows = [
            document["best"],
            *document["front"],
            *([document["single"]] if document.get("single") else []),
            document["full"],
        ]
        self._add(series, rows, document["images"])


def _data_url(picture_CHW: "Tensor") -> str:
    """Return a uint8 picture as a PNG in a data URL."""
    from PIL import Image

    array = picture_CHW.permute(1, 2, 0).numpy()
    image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    content = io.BytesIO()
    image.save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def _winner(row: Json) -> Json:
    """Return the winner of a run, or `full`, as the page shows it."""
    return {
        "run": row.get("run", str(FULL)),
        "evaluations": row.get("evaluations"),
        "instance": row["instance"],
        "macs": row["macs"],
        "relative": row["relative"],
        "heldout": row["heldout"]["top1"],
        "test": row["test"]["top1"],
    }


def _epoch(record: Json) -> Json:
    """Return an epoch as the page shows it: the validation of each instance beside the training."""
    kept = {key: record[key] for key in ("epoch", "loss", "accuracy", "lr") if record.get(key) is not None}
    if record.get("validation"):
        kept["validation"] = {name: score["top1"] for name, score in record["validation"].items()}
    return kept
