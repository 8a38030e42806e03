"""The formats of an export, as plain data. Needs no torch."""

from dataclasses import dataclass

from sdpctl.table import Table


@dataclass(frozen=True, kw_only=True)
class FormatInfo:
    """What an export is written as.

    Args:
        name: what a recipe calls it.
        suffix: of the file or folder on disk, without the dot.
        file: what the file of one instance is called in the store; None for a folder of many instances.
    """

    name: str
    suffix: str
    file: str | None = None

    @property
    def several(self) -> bool:
        """Whether it holds many instances."""
        return self.file is None


FORMATS = Table(
    "format",
    [
        FormatInfo(name="onnx", suffix="onnx", file="model.onnx"),
        FormatInfo(name="torch-export", suffix="pt2", file="model.pt2"),
        FormatInfo(name="bundle", suffix="bundle"),
    ],
)
