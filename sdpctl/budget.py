"""A budget, the maximum cost of one image; and a range of budgets."""

import re
from dataclasses import dataclass
from fractions import Fraction

from sdpctl.errors import UsageError, shown

_TEXT = re.compile(r"(?P<number>\d+(\.\d*)?|\.\d+)\s*(?P<unit>%|[kMG]?)", re.ASCII)
_LONGEST = 100
"""Maximum length of a budget's text, in characters."""
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}

LABEL = r"(any|\d+(\.\d+)?(pct|[kMG]?))"
"""Regular expression of what `label` returns."""
_DIGITS = 24
"""Maximum length of the number in a label: a tag has room for it, and no network has as many MACs."""


@dataclass(frozen=True)
class Budget:
    """A maximum number of MACs per image, absolute or as a share of the MACs of `full`.

    Args:
        text: the budget as the user wrote it, for example `50%` or `1.2G`.
        amount: MACs, or the share, above 0.
        relative: whether `amount` is a share.
    """

    text: str
    amount: Fraction
    relative: bool

    @classmethod
    def parse(cls, value: "str | int | float") -> "Budget":
        """Parse `50%`, `1.2G`, `350M`, or a number of MACs.

        Raises:
            UsageError: if the value is none of these, or not above 0.
        """
        text = f"{value:.0f}" if isinstance(value, float) and value >= 1 else str(value).strip()
        match = _TEXT.fullmatch(text) if len(text) <= _LONGEST else None
        amount = Fraction(match["number"]) if match else Fraction(0)
        relative = match is not None and match["unit"] == "%"
        if match is None or amount <= 0 or (not relative and amount * _UNITS[match["unit"]] < 1):
            raise UsageError(
                f"{shown(text)} is not a budget; write a share of `full` as 50%, or MACs as 1.2G, 350M or a number"
            )
        return cls(text, amount / 100 if relative else amount * _UNITS[match["unit"]], relative)

    def macs(self, full: int) -> int:
        """Return the maximum number of MACs, given the MACs of `full`."""
        return int(self.amount * full if self.relative else self.amount)

    @property
    def label(self) -> str:
        """The budget as part of a tag: `50pct`, `37.5pct`, `1.2G`, `1258309`; one label for `50%`, ` 50.0 %` and `050%`."""
        match = _TEXT.fullmatch(self.text)
        assert match is not None
        whole, _, decimals = match["number"].partition(".")
        number = f"{whole.lstrip('0') or '0'}.{decimals}"[:_DIGITS]
        number = number.rstrip("0").rstrip(".") if "." in number else number
        return f"{number}{'pct' if self.relative else match['unit']}"


def label(max_macs: str | None) -> str:
    """Return the last part of the tag of a search within a budget; `any` if there is no budget."""
    return "any" if max_macs is None else Budget.parse(max_macs).label


_DOTS = ".."


@dataclass(frozen=True)
class BudgetRange:
    """A range of budgets; `str` gives the text that `parse` reads.

    Args:
        lowest: the lowest budget of the range.
        highest: the highest budget of the range; it may equal the lowest.

    Raises:
        UsageError: if both are shares, or both are MACs, and the lowest is more than the highest.
    """

    lowest: Budget
    highest: Budget

    def __post_init__(self) -> None:
        if self.lowest.relative == self.highest.relative and self.lowest.amount > self.highest.amount:
            raise UsageError(
                f"{shown(str(self))} is not a range of budgets: {self.lowest.text} is more than {self.highest.text}; "
                "write the lower budget first"
            )

    @classmethod
    def parse(cls, value: str) -> "BudgetRange":
        """Parse two budgets with two dots between them, such as `30%..90%` or `50M..1.2G`.

        Raises:
            UsageError: if the text is not a range of budgets.
        """
        lowest, dots, highest = (part.strip() for part in value.partition(_DOTS))
        wrong = UsageError(
            f"{shown(value)} is not a range of budgets; write two budgets with two dots between them, as 30%..90% or 50M..1.2G"
        )
        if not dots or lowest.endswith("."):  # `2.` and two dots would be read back as 2 and a number below 1
            raise wrong
        try:
            ends = Budget.parse(lowest), Budget.parse(highest)
        except UsageError:
            raise wrong from None
        return cls(*ends)

    def __str__(self) -> str:
        return f"{self.lowest.text}{_DOTS}{self.highest.text}"

    def macs(self, full: int) -> tuple[int, int]:
        """Return the lowest and the highest number of MACs, given the MACs of `full`.

        Raises:
            UsageError: if one end is a share and the other is MACs, and the lowest is more than the highest.
        """
        lowest, highest = self.lowest.macs(full), self.highest.macs(full)
        if lowest > highest:
            raise UsageError(
                f"{shown(str(self))} is not a range of budgets of this network: {self.lowest.text} is {lowest:,} MACs, more "
                f"than {self.highest.text} ({highest:,}); lower the first budget, or write both as shares"
            )
        return lowest, highest
