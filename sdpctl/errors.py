"""The tree of expected failures, and the exit code of each.

SdpctlError                  1   base class; the exit code of a bug
├── UsageError               2   invalid arguments, a missing recipe file, an output that exists
│   ├── InstanceError        2   an instance that does not parse, or names a point that the network lacks
│   └── ModelError           2   a network that cannot be run at several costs
├── RecipeError              3   an invalid recipe
├── NotFoundError            4   a reference that matches no artifact, or several
├── IntegrityError           5   a missing or newer store, or content that does not match its digest
├── StoreLockedError         6   a lock that a different process holds
├── ResourceError            7   a device, permission or disk problem
│   ├── DataError            7   data that is missing, unreadable, or does not match the recipe
│   ├── LoaderError          7   data processes that died or could not be started
│   └── RankError            7   a process that torchrun started with this one was killed, or cannot be reached
├── BudgetError              8   a budget that no instance meets, or a lower precision that loses too much accuracy
├── DivergedError            9   a loss or weights that are not finite
└── RunInterruptedError129, 130, 143  SIGHUP, SIGINT or SIGTERM; finished work is committed first
"""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the nearest known word, or an empty string if none is near."""
    near = get_close_matches(word[:100], list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def shortened(text: str, most: int = 80) -> str:
    """Return text for an error message: at most its first `most` characters, and its length if it is longer."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def shown(value: object) -> str:
    """Return the `repr` of a value for an error message, shortened; control characters are escaped."""
    return shortened(repr(value))


class SdpctlError(Exception):
    """Base class of every expected failure.

    Args:
        lines: the lines that a user sees, mostly one; a newline within a line does not begin a new one.
    """

    exit_code = 1

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)
        self.lines = lines

    def __str__(self) -> str:
        return "\n".join(self.lines)


class UsageError(SdpctlError):
    """Invalid arguments."""

    exit_code = 2


class InstanceError(UsageError, ValueError):
    """An instance that cannot be parsed, or that names a point which the network does not have."""


class ModelError(UsageError):
    """A network that cannot be run at several costs; the message says what was found."""


class RecipeError(SdpctlError):
    """An invalid recipe: one line for each problem."""

    exit_code = 3

    def __init__(self, problems: list[str]) -> None:
        super().__init__(*problems)
        self.problems = problems


class NotFoundError(SdpctlError):
    """A reference that matches no artifact, or several."""

    exit_code = 4


class IntegrityError(SdpctlError):
    """A missing store, a store of a newer version, or damaged content."""

    exit_code = 5


class StoreLockedError(SdpctlError):
    """A different process holds a lock of the store."""

    exit_code = 6


class ResourceError(SdpctlError):
    """A device, permission or disk problem."""

    exit_code = 7


class DataError(ResourceError):
    """Data that is missing, unreadable, or does not match the recipe."""


class LoaderError(ResourceError):
    """The data processes died or could not be started."""


class RankError(ResourceError):
    """A process that torchrun started together with this one was killed, or cannot be reached."""


class BudgetError(SdpctlError):
    """A budget that no instance meets, or a lower precision that loses more accuracy than allowed."""

    exit_code = 8


class DivergedError(SdpctlError):
    """The loss or the weights are not finite."""

    exit_code = 9


class RunInterruptedError(SdpctlError):
    """A signal asked the run to stop."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum
