"""`sdpctl models`."""

from sdpctl.cli.layout import Column, Table
from sdpctl.cli.options import Json
from sdpctl.cli.output import Output
from sdpctl.models.registry import ARCHITECTURES


def models(json_: Json = False) -> None:
    """List the architectures and their points."""
    output = Output(json_mode=json_)
    rows = [
        {"arch": name, "family": arch.family, "block": arch.block, "stem": arch.stem, "points": list(arch.points())}
        for name, arch in ARCHITECTURES.items()
    ]
    columns = [Column("arch"), Column("family", drop=5), Column("block", drop=1), Column("stem", drop=2)]
    columns += [Column("points", "right"), Column("first", drop=4), Column("last", drop=3)]
    table = Table("", columns)
    for row in rows:
        cells, points = (str(row[name]) for name in ("arch", "family", "block", "stem")), row["points"]
        table.add_row(*cells, str(len(points)), points[0], points[-1])
    output.result("models", {"rows": rows}, [table])
