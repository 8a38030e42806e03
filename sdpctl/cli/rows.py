"""Typed rows of the tables. JSON and CSV have the fields of a row, in the order in which they are declared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from sdpctl.cascade import Cascade
from sdpctl.cli.row_table import Row
from sdpctl.models.registry import Architecture, TracedArchitecture


@dataclass(frozen=True, kw_only=True)
class CostRow(Row):
    """The cost of an instance.

    Args:
        instance: text of the instance.
        macs: MACs per image.
        params: number of parameters.
        relative: MACs as a share of those of `full`.
    """

    instance: str
    macs: int
    params: int
    relative: float


@dataclass(frozen=True, kw_only=True)
class ScoreRow(CostRow):
    """The cost of an instance and its score.

    Args:
        top1: top-1 accuracy in percent.
        top5: top-5 accuracy in percent; None for fewer than six classes.
        loss: mean cross-entropy.
    """

    top1: float
    top5: float | None
    loss: float


@dataclass(frozen=True, kw_only=True)
class CascadeScoreRow(ScoreRow):
    """A cascade in the table of an evaluation; its text is the `instance`, and `macs` are the mean of all images.

    Args:
        worst_macs: MACs of an image that all members see.
        left: share of the images that each member answers, in percent.
    """

    worst_macs: int
    left: tuple[float, ...]

    def cells(self) -> dict[str, Any]:
        """Return the row as CSV writes it, with the fields of the other rows."""
        return {key: value for key, value in self.record().items() if key not in ("worst_macs", "left")}

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Self:
        """Read a cascade of an evaluation."""
        return super().read({**document, "instance": document["cascade"], "left": tuple(document["left"])})


def score_rows(results: Mapping[str, Any]) -> list[ScoreRow]:
    """Read a row for each instance and each cascade of an evaluation."""
    cascades = [CascadeScoreRow.read(row) for row in results.get("cascades") or ()]
    return [*(ScoreRow.read(row) for row in results["rows"]), *cascades]


@dataclass(frozen=True, kw_only=True)
class ClassRow(Row):
    """The accuracy of instances on the images of one class.

    Args:
        class_: name of the class.
        images: number of its images.
        top1: top-1 accuracy in percent by the text of the instance; None without images.
    """

    class_: str
    images: int
    top1: Mapping[str, float | None]

    def cells(self) -> dict[str, Any]:
        """Return the row as CSV writes it, with a field for each instance."""
        return {"class": self.class_, "images": self.images, **self.top1}

    @classmethod
    def read_all(cls, results: Mapping[str, Any]) -> list[Self]:
        """Read a row for each class of an evaluation, in the order of the classes."""
        texts = [row["instance"] for row in results["rows"]]
        by_class = zip(*(row["by_class"] for row in results["rows"]), strict=True)
        return [
            cls(class_=name, images=images, top1=dict(zip(texts, accuracies, strict=True)))
            for name, images, accuracies in zip(results["classes"], results["class_images"], by_class, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class SegmentRow(Row):
    """The cost of a segment within one instance.

    Args:
        name: name of the segment.
        in_: shape of its input, without the batch.
        out: shape of its output, without the batch.
        macs: MACs per image.
        params: number of parameters.
    """

    name: str
    in_: Sequence[int]
    out: Sequence[int]
    macs: int
    params: int


@dataclass(frozen=True, kw_only=True)
class ProfileRow(CostRow):
    """The cost of an instance and of its segments."""

    segments: tuple[SegmentRow, ...]

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Self:
        """Read a row of a profile."""
        return super().read({**document, "segments": tuple(map(SegmentRow.read, document["segments"]))})


@dataclass(frozen=True, kw_only=True)
class SearchRow(Row):
    """A network that a search scored.

    Args:
        instance: text of the instance.
        macs: MACs per image.
        relative: MACs as a share of those of `full`.
        images: number of held-out images.
        heldout_top1: top-1 accuracy on held-out images in percent.
        test_top1: top-1 accuracy on test images in percent; None for a network that did not win.
    """

    instance: str
    macs: int
    relative: float
    images: int
    heldout_top1: float
    test_top1: float | None

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Self:
        """Read a network of a search's result."""
        heldout, test = document["heldout"], document.get("test", {})
        scores = {"images": heldout["images"], "heldout_top1": heldout["top1"], "test_top1": test.get("top1")}
        return super().read({**document, **scores})


@dataclass(frozen=True, kw_only=True)
class WinnerRow(SearchRow):
    """The winner of a run of a search, or `full`.

    Args:
        run: name of the run, mostly its strategy.
        seed: number of the run among those of the strategy; None for `full`.
        evaluations: number of networks that the run scored; None for `full`.
    """

    run: str
    seed: int | None
    evaluations: int | None


@dataclass(frozen=True, kw_only=True)
class ProposalRow(SearchRow):
    """The network that an agent proposes for a budget, or `full`.

    Args:
        budget: maximum MACs per image; None for `full`.
    """

    budget: int | None


@dataclass(frozen=True, kw_only=True)
class ChoiceRow(Row):
    """A cascade, or a single instance beside it.

    Args:
        choice: text of the cascade or instance.
        macs: mean MACs per test image.
        relative: these MACs as a share of those of `full`.
        worst_macs: MACs of an image that all members see.
        heldout_macs: mean MACs per held-out image.
        heldout_top1: top-1 accuracy on held-out images in percent.
        top1: top-1 accuracy on test images in percent.
        loss: mean cross-entropy on test images.
    """

    choice: str
    macs: int
    relative: float
    worst_macs: int
    heldout_macs: int
    heldout_top1: float
    top1: float
    loss: float

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Self:
        """Read a row of a chosen cascade's document."""
        if "cascade" in document:
            return super().read({**document, "choice": document["cascade"]})
        macs = document["macs"]
        return super().read({**document, "choice": document["instance"], "worst_macs": macs, "heldout_macs": macs})


@dataclass(frozen=True, kw_only=True)
class MemberRow(Row):
    """A member of a cascade.

    Args:
        member: text of the instance.
        macs: MACs that it adds for an image that reaches it.
        threshold: confidence from which on an image leaves; None for the last member.
        reached: share of the test images that reach it, in percent.
        left: share of the test images that it answers, in percent.
        heldout_left: share of the held-out images that it answers, in percent.
    """

    member: str
    macs: int
    threshold: float | None
    reached: float
    left: float
    heldout_left: float

    @classmethod
    def read_all(cls, document: Mapping[str, Any]) -> list[Self]:
        """Read a row for each member of a cascade, given the row of the cascade in a document."""
        cascade = Cascade.parse(document["cascade"])
        thresholds = (*cascade.thresholds, None)
        return [
            cls(
                member=str(member),
                macs=document["member_macs"][number],
                threshold=thresholds[number],
                reached=100 - sum(document["left"][:number]),
                left=document["left"][number],
                heldout_left=document["heldout_left"][number],
            )
            for number, member in enumerate(cascade.members)
        ]


@dataclass(frozen=True, kw_only=True)
class ExportRow(Row):
    """An exported instance.

    Args:
        instance: text of the instance.
        macs: MACs per image.
        relative: MACs as a share of those of `full`.
        top1: top-1 accuracy on test images in percent.
        heldout_top1: top-1 accuracy on held-out images in percent; None if the export does not choose among instances.
    """

    instance: str
    macs: int
    relative: float
    top1: float
    heldout_top1: float | None


@dataclass(frozen=True, kw_only=True)
class LatencyRow(Row):
    """The latency of a network on this machine.

    Args:
        file: path of the export.
        instance: text of the instance; empty for a file that does not say it.
        macs: MACs per image; None for a file that does not say them.
        relative: MACs as a share of those of `full`; None where they are not known.
        batch: number of images of a call.
        median_ms: median duration of a call in milliseconds.
        p95_ms: duration in milliseconds that 95 % of the calls do not exceed.
        images_per_second: images per second at the median.
        measured_on: device, cores, threads, library and precision.
    """

    file: str
    instance: str
    macs: int | None
    relative: float | None
    batch: int
    median_ms: float
    p95_ms: float
    images_per_second: float
    measured_on: str


@dataclass(frozen=True, kw_only=True)
class PredictionRow(Row):
    """A likely class of an image.

    Args:
        file: path of the image.
        place: 0 for the likeliest class.
        class_: name of the class.
        probability: probability of the class, in [0, 1].
        instance: text of the instance that answered the image.
    """

    file: str
    place: int
    class_: str
    probability: float
    instance: str


@dataclass(frozen=True, kw_only=True)
class ArtifactRow(Row):
    """An artifact of the store.

    Args:
        tag: tag of the artifact; None if no tag points at it.
        digest: digest of its manifest.
        kind: kind of the artifact, such as checkpoint or evaluation.
        subject: digest of the artifact that it was made from; None if there is none.
        bytes: size of its layers.
        created: date and time.
    """

    tag: str | None
    digest: str
    kind: str
    subject: str | None
    bytes: int
    created: str


@dataclass(frozen=True, kw_only=True)
class SharedRow(Row):
    """An artifact that is pushed to a registry or pulled from one.

    Args:
        tag: the first tag that the artifact gets; None if it gets none.
        digest: digest of its manifest.
        kind: kind of the artifact.
        bytes: size of its manifest and its layers.
        there: whether its manifest was there before.
    """

    tag: str | None
    digest: str
    kind: str
    bytes: int
    there: bool


@dataclass(frozen=True, kw_only=True)
class LayerRow(Row):
    """A layer of an artifact.

    Args:
        title: name of the layer within the artifact.
        digest: digest of its content.
        bytes: size of its content.
        media_type: MIME type of its content.
    """

    title: str
    digest: str
    bytes: int
    media_type: str


@dataclass(frozen=True, kw_only=True)
class LineageRow(Row):
    """An artifact that a different artifact was made from.

    Args:
        digest: digest of its manifest.
        tag: tag of the artifact; None if no tag points at it.
        kind: kind of the artifact; None if the store does not have it.
    """

    digest: str
    tag: str | None
    kind: str | None


@dataclass(frozen=True, kw_only=True)
class ArchitectureRow(Row):
    """An architecture.

    Args:
        arch: name of the architecture.
        family: name of its family; for a network of a library the name of the library.
        block: kind of its blocks; None for a network of a library.
        stem: default stem; None for a network of a library.
        points: names of its points, in network order; None for a network of a library, which must be traced first.
    """

    arch: str
    family: str
    block: str | None
    stem: str | None
    points: tuple[str, ...] | None

    @classmethod
    def of(cls, arch: Architecture) -> Self:
        """Return the row of an architecture."""
        if isinstance(arch, TracedArchitecture):
            return cls(arch=arch.name, family=arch.family, block=None, stem=None, points=None)
        return cls(arch=arch.name, family=arch.family, block=arch.block, stem=arch.stem, points=arch.points())


@dataclass(frozen=True, kw_only=True)
class PointRow(Row):
    """A point of an architecture.

    Args:
        point: name of the point.
        map: sizes of the map there, (C, H, W), before any shrinking.
        macs: MACs of one image from the input up to the point.
        relative: these MACs as a share of those of the whole network.
    """

    point: str
    map: Sequence[int]
    macs: int
    relative: float


@dataclass(frozen=True, kw_only=True)
class CheckRow(Row):
    """One thing that `doctor` looked at.

    Args:
        name: what was looked at.
        state: `ok`, `missing`, `warning` or `broken`.
        found: what was found.
        advice: what to do, or what it is for.
    """

    name: str
    state: str
    found: str
    advice: str


@dataclass(frozen=True, kw_only=True)
class FindingRow(Row):
    """What `init` found in a folder of images.

    Args:
        kind: `stop` if the recipe does not run before something is done, `check`, or `note`.
        found: what was found.
        advice: what it means, or what to do.
    """

    kind: str
    found: str
    advice: str


@dataclass(frozen=True, kw_only=True)
class SplitRow(Row):
    """A class of a folder of images.

    Args:
        class_: name of the class.
        train: number of training images.
        test: number of test images.
    """

    class_: str
    train: int
    test: int


@dataclass(frozen=True, kw_only=True)
class RecipeRow(Row):
    """A recipe file.

    Args:
        recipe: path of the file.
        name: name of the recipe.
        arch: the architecture.
        dataset: name of the data set.
        image_size: height and width of an image, in pixels.
        epochs: number of training epochs.
    """

    recipe: str
    name: str
    arch: str
    dataset: str
    image_size: int
    epochs: int


@dataclass(frozen=True, kw_only=True)
class StepRow(Row):
    """A stage in the plan of a dry run.

    Args:
        tag: tag of the stage.
        kind: kind of its artifact.
        digest: digest of the artifact in the store; None if the stage has to run.
        task: what the stage would do; None if the store has the artifact.
        reason: why the stage has to run; None if the store has the artifact.
    """

    tag: str
    kind: str
    digest: str | None
    task: str | None
    reason: str | None
