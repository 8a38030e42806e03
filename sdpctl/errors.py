"""Everything that can go wrong, and the exit code each failure ends with.

SdpctlError                  1   a bug, when nothing below fits
├── UsageError               2   arguments that make no sense, a missing recipe, an output that exists
│   └── InstanceError        2   an instance that does not parse, or names a point the network lacks
├── RecipeError              3   a recipe that does not hold
├── NotFoundError            4   no artifact of that name, or more than one
├── IntegrityError           5   no store there, a newer one, or bytes that are not what their digest says
├── StoreLockedError         6   another process holds the store
├── ResourceError            7   device, data, permission, disk
│   ├── DataError            7   data that is missing, unreadable, or not what was promised
│   └── LoaderError          7   processes that load data and died, or could not be started
├── BudgetError              8   a budget that no instance meets
├── DivergedError            9   the loss is no longer finite
└── RunInterruptedError129, 130, 143  SIGHUP, SIGINT or SIGTERM; what there was is committed
"""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` where a known word is near, else nothing."""
    near = get_close_matches(word[:100], list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def shortened(text: str, most: int = 80) -> str:
    """Return text as an error shows it: what is beyond `most` characters is counted."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def shown(value: object) -> str:
    """Return a value as an error quotes it: control characters escaped, and not too long."""
    return shortened(repr(value))


class SdpctlError(Exception):
    """Base of every expected failure.

    Args:
        lines: what a user sees, mostly one line; a newline within a line does not begin another.
    """

    exit_code = 1

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)
        self.lines = lines

    def __str__(self) -> str:
        return "\n".join(self.lines)


class UsageError(SdpctlError):
    """Arguments that make no sense."""

    exit_code = 2


class InstanceError(UsageError, ValueError):
    """An instance that does not parse, or that the network lacks the points for."""


class RecipeError(SdpctlError):
    """A recipe with one or more problems, each a line of its own."""

    exit_code = 3

    def __init__(self, problems: list[str]) -> None:
        super().__init__(*problems)
        self.problems = problems


class NotFoundError(SdpctlError):
    """No artifact of that name, or more than one."""

    exit_code = 4


class IntegrityError(SdpctlError):
    """No store, a newer one, or damaged bytes."""

    exit_code = 5


class StoreLockedError(SdpctlError):
    """Another process holds the store."""

    exit_code = 6


class ResourceError(SdpctlError):
    """A device, a permission, a disk."""

    exit_code = 7


class DataError(ResourceError):
    """Data that is missing, unreadable, or not what was promised."""


class LoaderError(ResourceError):
    """The processes that load data died, or could not be started."""


class BudgetError(SdpctlError):
    """A budget that no instance meets."""

    exit_code = 8


class DivergedError(SdpctlError):
    """The loss is no longer finite."""

    exit_code = 9


class RunInterruptedError(SdpctlError):
    """The run was asked to stop by a signal."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum
