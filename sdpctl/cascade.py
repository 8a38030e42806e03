"""Cascades: an easy image is answered by a cheap instance, a hard image goes on to a costlier one.

A cascade is written `stem@0.5:0.9/full`: an image whose highest probability under `stem@0.5` is 0.9 or more is answered by
`stem@0.5`; every other image goes on to `full`. `stem@0.5~1.3:0.9/full~1.1` divides the logits by a temperature before the
probabilities are computed (Guo et al. 2017). `mean/stem@0.5:0.9/full` averages the probabilities of all members that have seen
the image.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sdpctl import fields
from sdpctl.errors import InstanceError, shown
from sdpctl.instance import Instance, exact_text

MOST_MEMBERS = 16
"""Maximum number of members of a cascade."""

_AVERAGED = "mean/"
_NUMBER = r"[0-9.][0-9.e+-]{0,30}"
_MEMBER = re.compile(rf"(?P<instance>[^~:]+)(~(?P<temperature>{_NUMBER}))?(:(?P<threshold>{_NUMBER}))?")


@dataclass(frozen=True)
class Branch:
    """Where a member continues what an earlier member computed.

    Args:
        earlier: number of the earlier member, counted from 0.
        point: the point at which the two part. The body of its segment is computed once for both.
    """

    earlier: int
    point: str


@dataclass(frozen=True)
class Cascade:
    """An ordered list of instances, each except the last with a threshold.

    Args:
        members: the instances, at least two, in the order in which they see an image.
        thresholds: for each member except the last, the confidence in (0, 1] from which on an image leaves: the highest
            probability of the member's answer.
        temperatures: for each member, the positive number by which its logits are divided.
        averaged: whether the answer of a member is the mean of its probabilities and those of all members before it.

    Raises:
        InstanceError: if there are too few or too many members, a member occurs twice, or a number is out of range.
    """

    members: tuple[Instance, ...]
    thresholds: tuple[float, ...]
    temperatures: tuple[float, ...]
    averaged: bool = False

    def __post_init__(self) -> None:
        count = len(self.members)
        if not 2 <= count <= MOST_MEMBERS:
            raise InstanceError(f"a cascade has 2 to {MOST_MEMBERS} members, got {count}; join them by '/'")
        if len(set(self.members)) < count:
            raise InstanceError(f"{self}: each member of a cascade occurs once")
        if len(self.thresholds) != count - 1 or len(self.temperatures) != count:
            raise InstanceError(
                f"a cascade of {count} members has {count - 1} thresholds and {count} temperatures, got {len(self.thresholds)} "
                f"and {len(self.temperatures)}"
            )
        for threshold in self.thresholds:
            if not 0 < threshold <= 1:
                raise InstanceError(f"{threshold!r}: a threshold is a probability above 0 and at most 1, for example 0.9")
        for temperature in self.temperatures:
            if not 0 < temperature < math.inf:
                raise InstanceError(f"{temperature!r}: a temperature is a number above 0, for example 1.5")

    @classmethod
    def parse(cls, text: str) -> "Cascade":
        """Parse a cascade; `str` is the inverse.

        Raises:
            InstanceError: if the text is not a cascade.
        """
        members, thresholds, temperatures = [], [], []
        parts = text.strip().removeprefix(_AVERAGED).split("/")
        for number, part in enumerate(map(str.strip, parts), 1):
            match = _MEMBER.fullmatch(part)
            if match is None or (match["threshold"] is None) != (number == len(parts)):
                raise InstanceError(
                    f"{shown(text)} is not a cascade; write each member except the last with its threshold, for example "
                    "stem@0.5:0.9/full"
                )
            try:
                temperatures.append(float(match["temperature"] or 1))
                thresholds += [float(match["threshold"])] if match["threshold"] else []
            except ValueError:
                raise InstanceError(
                    f"{shown(part)}: a temperature and a threshold are numbers, as in stem@0.5~1.3:0.9"
                ) from None
            members.append(Instance.parse(match["instance"]))
        return cls(tuple(members), tuple(thresholds), tuple(temperatures), text.strip().startswith(_AVERAGED))

    @classmethod
    def of(cls, value: "Cascade | str") -> "Cascade":
        """Return a cascade, parsing it if it is given as text."""
        return value if isinstance(value, Cascade) else cls.parse(value)

    def __str__(self) -> str:
        parts = []
        for i, (member, temperature) in enumerate(zip(self.members, self.temperatures, strict=True)):
            threshold = f":{self.thresholds[i]!r}" if i < len(self.thresholds) else ""
            parts.append(f"{member}{'' if temperature == 1 else f'~{temperature!r}'}{threshold}")
        return (_AVERAGED if self.averaged else "") + "/".join(parts)

    def check(self, points: Sequence[str]) -> "Cascade":
        """Check that the members are different networks, and that a network has all their points; return the cascade.

        Args:
            points: the points of the network, in network order.

        Raises:
            InstanceError: if the network lacks a point, or two members have the same ratio at every point.
        """
        for member in self.members:
            member.check(points)
        self.branches(points)
        return self

    def branches(self, points: Sequence[str]) -> tuple[Branch, ...]:
        """Return, for each member except the first, the earlier member that shares the longest prefix with it.

        Args:
            points: the points of the network, in network order.

        Raises:
            InstanceError: if two members have the same ratio at every point.
        """
        branches = []
        for j, member in enumerate(self.members[1:], 1):
            parted = []
            for earlier in self.members[:j]:
                differing = [k for k, point in enumerate(points) if earlier.ratio(point) != member.ratio(point)]
                if not differing:
                    raise InstanceError(f"{earlier} and {member} are the same network; name it once in a cascade")
                parted.append(differing[0])
            deepest = max(parted)
            branches.append(Branch(parted.index(deepest), points[deepest]))
        return tuple(branches)


def is_cascade(text: str) -> bool:
    """Return whether a text is meant as a cascade; an instance has no slash."""
    return "/" in text


cascade_text: fields.Check = exact_text(Cascade.parse, "a", "cascade")
"""Accept the text of a cascade in a document."""
