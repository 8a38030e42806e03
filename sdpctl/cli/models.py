"""`sdpctl models`."""

from sdpctl.cli.options import Json
from sdpctl.cli.output import Output, make_table
from sdpctl.models.registry import ARCHITECTURES


def models(json_: Json = False) -> None:
    """List the architectures and their points."""
    output = Output(json_mode=json_)
    rows = [
        {"arch": name, "family": arch.family, "block": arch.block, "stem": arch.stem, "points": list(arch.points())}
        for name, arch in ARCHITECTURES.items()
    ]
    columns = ("arch", "family", "block", "stem")
    table = make_table("", [*((name, "left") for name in columns), ("points", "right"), ("first", "left"), ("last", "left")])
    for row in rows:
        points = row["points"]
        table.add_row(*(str(row[name]) for name in columns), str(len(points)), points[0], points[-1])
    output.result("models", {"rows": rows}, [table])
