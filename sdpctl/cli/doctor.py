"""`sdpctl doctor`."""

from sdpctl.cli.command import Session, command
from sdpctl.errors import ResourceError


@command("doctor", "store", "json_", "quiet")
def doctor(session: Session) -> None:
    """Say what this machine has, what is missing, and what to do about it.

    Exits with 7 if something is broken that sdpctl does not work without.
    """
    from sdpctl.cli.rows import CheckRow
    from sdpctl.cli.tables import check_table
    from sdpctl.machine import checks

    found = list(checks(session.store))
    table = check_table([CheckRow(name=one.name, state=one.state, found=one.found, advice=one.advice) for one in found])
    session.result({"rows": table.records()}, [table])
    if broken := [one.name for one in found if one.state == "broken"]:
        raise ResourceError(f"sdpctl does not work here before this is mended: {', '.join(broken)}; `sdpctl doctor` says how")
