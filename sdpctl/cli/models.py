"""`sdpctl models`."""

from sdpctl.cli.command import PRINTS, Session, command
from sdpctl.models.registry import ARCHITECTURES


@command("models", *PRINTS)
def models(session: Session) -> None:
    """List the architectures and their points."""
    from sdpctl.cli.rows import ArchitectureRow
    from sdpctl.cli.tables import architecture_table

    table = architecture_table(
        [
            ArchitectureRow(arch=name, family=arch.family, block=arch.block, stem=arch.stem, points=arch.points())
            for name, arch in ARCHITECTURES.items()
        ]
    )
    session.result({"rows": table.records()}, [table])
