"""The options of an export, and the recipe overrides that they stand for."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sdpctl.budget import Budget
from sdpctl.errors import UsageError
from sdpctl.export.catalog import FORMATS
from sdpctl.instance import Instance


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """A request for an export; an option that is None is left to the recipe.

    Args:
        form: name of the format.
        instance: the instance to export.
        max_macs: maximum MACs per image; the most accurate instance within this budget is exported.
        max_latency_ms: maximum latency in milliseconds per image, measured on this machine; the most accurate instance within
            this budget is exported.
        from_search: reference of a search; the instances that the search found are exported.
        cascade: reference of a choice of cascades, from which cascades are exported.
        instances: `all`, `pareto` or texts of instances, for a format that holds several instances.
        raw_input: whether the export takes uint8 pixels.
        precision: precision of the files: fp32, fp16 or int8.
        max_drop: maximum loss of top-1 accuracy in a lower precision, in percentage points.
        opset: version of the ONNX operators.
        check: a second runtime in which the files are checked.
    """

    form: str | None = None
    instance: str | None = None
    max_macs: str | None = None
    max_latency_ms: float | None = None
    from_search: str | None = None
    cascade: str | None = None
    instances: str | Sequence[str] | None = None
    raw_input: bool = False
    precision: str | None = None
    max_drop: float | None = None
    opset: int | None = None
    check: str | None = None

    def _ways(self) -> list[str]:
        """Return the given options that choose instances."""
        ways = {
            "--instance": self.instance,
            "--max-macs": self.max_macs,
            "--max-latency-ms": self.max_latency_ms,
            "--from-search": self.from_search,
            "--instances": self.instances,
        }
        return [option for option, value in ways.items() if value is not None]

    def of(self, ref: str, kind: str) -> "ExportRequest":
        """Complete the request for an artifact: a search or a choice of cascades is exported unless an option says otherwise.

        Args:
            ref: reference of the artifact.
            kind: kind of the artifact.

        Raises:
            UsageError: if two options choose instances, or the format cannot hold a chosen cascade.
        """
        ways = self._ways()
        if len(ways) > 1:
            raise UsageError(f"{ways[0]} and {ways[1]} exclude each other; give one")
        if kind == "cascade":
            if self.form is not None and not FORMATS.find(self.form).takes_cascades:
                fitting = ", ".join(name for name, form in FORMATS.items() if form.takes_cascades)
                raise UsageError(
                    f"{ref} is a choice of cascades, and the format {self.form} holds one instance; give one of the formats "
                    f"{fitting}, or name the checkpoint"
                )
            return replace(self, cascade=ref, form=self.form or "onnx-cascade")
        return replace(self, from_search=ref) if kind == "search" and not ways else self

    def _settings(self) -> list[str]:
        """Return the request's settings of the recipe section `export`, as overrides."""
        several = self.instances
        if several is not None and not isinstance(several, str):
            several = [str(Instance.parse(text)) for text in several]
        settings: dict[str, Any] = {
            "format": self.form,
            "instance": None if self.instance is None else str(Instance.parse(self.instance)),
            "max_macs": None if self.max_macs is None else Budget.parse(self.max_macs).text,
            "instances": several,
            "raw_input": self.raw_input or None,
            "precision": self.precision,
            "max_drop": self.max_drop,
            "opset": self.opset,
            "check": self.check,
        }
        return [f"export.{key}={json.dumps(value)}" for key, value in settings.items() if value is not None]

    def overrides(self, said: Sequence[str]) -> list[str]:
        """Return the overrides of the recipe; if any option is given, the request replaces the recipe's section `export`.

        Args:
            said: overrides of `--set`.

        Raises:
            UsageError: if an instance or the budget cannot be parsed.
        """
        settings = self._settings()
        return [*(["export={}"] if settings or self._ways() else []), *said, *settings]

    def check_copied(self, ref: str, said: Sequence[str]) -> None:
        """Refuse options that would change an existing export, since its files can only be written again.

        Args:
            ref: reference of the export.
            said: overrides of `--set`.

        Raises:
            UsageError: if there is an option or override of the export.
        """
        if self.overrides(said):
            raise UsageError(
                f"{ref} is an export already; give the checkpoint to export again, or leave all options out to write its files"
            )
