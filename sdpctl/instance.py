"""Instances: which points of a network shrink their feature map, and by how much.

An instance is written `full`, `layer2.3@0.5` or `layer1.0@0.75+layer3.2@0.5`. The public method (Kuen et al., CVPR 2018)
uses instances with at most one point below 1; a search uses any number.
"""

import re
import reprlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sdpctl import fields
from sdpctl.errors import InstanceError, shortened, shown

_STEM_POINTS = ("stem", "maxpool")
ALL = "all"
"""Stands for every point that an instance does not name."""

_PART = re.compile(r"(?P<point>[A-Za-z0-9_][A-Za-z0-9_.-]{0,199})@(?P<ratio>[A-Za-z0-9.-]{1,30})")

MOST_INSTANCES = 2**16
"""Maximum number of instances in a document; the grid of 67 points at 9 ratios has 604."""

_LONGEST = 20_000
"""Maximum length of an instance's text, in characters; an instance with a ratio at each of 200 points has a tenth of it."""


def _canonical(point: str) -> tuple[bool, list[tuple[bool, int | str]]]:
    words = re.findall(r"\d+|\D+", point)
    return point not in _STEM_POINTS, [(not w.isdigit(), int(w) if w.isdigit() else w) for w in words]


@dataclass(frozen=True)
class Instance:
    """A ratio for each point; a point that is not named has the ratio 1.

    Equal choices give equal instances: the order of the points does not matter, and ratios of 1 are dropped.

    Args:
        choices: (point, ratio) pairs, ratios in (0, 1].

    Raises:
        InstanceError: if a ratio is outside (0, 1], or a point is given twice.
    """

    choices: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        seen = set()
        for point, ratio in self.choices:
            if not 0 < ratio <= 1:
                raise InstanceError(f"{point}@{ratio:g}: a ratio must be above 0 and at most 1, for example {point}@0.5")
            if point in seen:
                raise InstanceError(f"{point} is given twice in one instance; name each point once")
            seen.add(point)
        kept = ((point, float(ratio)) for point, ratio in self.choices if ratio != 1)
        object.__setattr__(self, "choices", tuple(sorted(kept, key=lambda choice: _canonical(choice[0]))))

    @classmethod
    def parse(cls, text: str) -> "Instance":
        """Parse `full`, `layer2.3@0.5`, or several points joined by `+`; `str` is the inverse.

        Raises:
            InstanceError: if the text is none of these.
        """
        if text.strip() == "full":
            return FULL
        if len(text) > _LONGEST:
            raise InstanceError(
                f"{text[:40]!r}... is not an instance: it has {len(text):,} characters, at most {_LONGEST:,} are read"
            )
        choices = []
        for part in text.split("+"):
            match = _PART.fullmatch(part.strip())
            try:
                ratio = float(match["ratio"]) if match else 0.0
            except ValueError:
                match = None
            if match is None:
                raise InstanceError(f"{shown(text)} is not an instance; write 'full', 'layer2.3@0.5', or several joined by '+'")
            choices.append((match["point"], ratio))
        return cls(tuple(choices))

    @classmethod
    def of(cls, value: "Instance | str") -> "Instance":
        """Return an instance, parsing it if it is given as text."""
        return value if isinstance(value, Instance) else cls.parse(value)

    def __str__(self) -> str:
        return "+".join(f"{point}@{ratio!r}" for point, ratio in self.choices) or "full"

    def ratio(self, point: str) -> float:
        """Return the ratio at a point: its own, or the ratio of `all`, or 1 if the instance names neither."""
        choices = dict(self.choices)
        return choices.get(point, choices.get(ALL, 1.0))

    def among(self, points: Iterable[str]) -> "Instance":
        """Return this instance restricted to some points, which is a node of the tree of instances."""
        return Instance(tuple((point, self.ratio(point)) for point in points))

    def check(self, points: Sequence[str]) -> "Instance":
        """Check that a network has every point of this instance, and return the instance.

        Args:
            points: the points of the network.

        Raises:
            InstanceError: if the network lacks a point; the message names the point, and those of the network.
        """
        for point, _ in self.choices:
            if point not in (ALL, *points):
                raise InstanceError(f"{shortened(str(self))}: the network has no point {point!r}; it has {', '.join(points)}")
        return self


FULL = Instance()

Named = TypeVar("Named", bound=Hashable)
"""What stands for an instance or a cascade: itself, or its text."""


def exact_text(parse: Callable[[str], object], article: str, noun: str) -> fields.Check:
    """Accept a text in a document that is exactly what `str` writes of the value that it stands for.

    Args:
        parse: parses the text, and raises an `InstanceError` if it cannot.
        article: of the noun: a or an.
        noun: the kind of value, for error messages.
    """

    def check(value: Any, place: str) -> None:
        if not isinstance(value, str):
            raise ValueError(f"{place}: expected the text of {article} {noun}, found {reprlib.repr(value)}")
        try:
            written = str(parse(value))
        except InstanceError as error:
            raise ValueError(f"{place}: {error}") from error
        if written != value:
            raise ValueError(f"{place}: this {noun} is written {written}, found {reprlib.repr(value)}")

    return check


instance_text: fields.Check = exact_text(Instance.parse, "an", "instance")
"""Accept the text of an instance in a document."""

check_nodes: fields.Check = fields.section(
    {
        "batches": fields.whole(0),
        "images": fields.whole(0),
        "instances": fields.listed(instance_text, 1, MOST_INSTANCES),
        "nodes": fields.mapped(instance_text, fields.listed(fields.text(), 1, 10_000)),
    },
    {"tuned": fields.mapped(instance_text, fields.listed(fields.text(), 1, 20_000))},
)
"""Accept the document that describes statistics: their instances, and the names of the batch norms of each tree node.

`tuned` names the parameters that were fine-tuned, by tree node. Statistics of a network without batch norms have no nodes; no
batch was read for them.
"""


def pareto_optimal(costs_and_scores: Mapping[Named, tuple[float, float]]) -> set[Named]:
    """Return the Pareto-optimal instances: no instance has at most their cost and at least their score, and is better in one.

    Args:
        costs_and_scores: cost (lower is better) and score (higher is better) of each instance, or of its text.
    """
    best: set[Named] = set()
    ceiling = float("-inf")
    for cost in sorted({cost for cost, _ in costs_and_scores.values()}):
        peers = {instance: score for instance, (c, score) in costs_and_scores.items() if c == cost}
        top = max(peers.values())
        if top > ceiling:
            best |= {instance for instance, score in peers.items() if score == top}
            ceiling = top
    return best
