"""The section `report` of a recipe. Needs no torch."""

from dataclasses import dataclass
from typing import Literal

from sdpctl.section import Section

ReportFormat = Literal["html", "png", "svg"]


@dataclass(frozen=True, kw_only=True)
class ReportSettings(Section):
    """An optional stage: a page of the results, for a browser.

    Args:
        format: `html`, one file with everything; `png` or `svg`, the chart of cost against accuracy alone.
    """

    format: ReportFormat = "html"
