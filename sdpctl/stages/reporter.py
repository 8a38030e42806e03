"""How stages send messages to the user; they print nothing themselves."""

from contextlib import AbstractContextManager
from typing import Protocol


class Progress(Protocol):
    """A progress bar; it is shown only on a terminal."""

    def advance(self, text: str = "") -> None:
        """Count one more step, and show a short text beside the bar."""


class Reporter(Protocol):
    """Sends messages to the user."""

    def note(self, text: str) -> None:
        """Show a message that every user wants to see."""

    def detail(self, text: str) -> None:
        """Show a message that is only of interest with `--verbose`."""

    def progress(self, text: str, total: int, done: int = 0) -> AbstractContextManager[Progress]:
        """Show a progress bar of `total` steps."""
