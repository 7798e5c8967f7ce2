"""`kvstrata calibrate`: measure the cycle tables that the system model reads."""

from typing import Annotated

import typer


def command(
    check: Annotated[bool, typer.Option(help="compare with the committed tables and change nothing")] = False,
) -> None:
    """Run every calibrated shape on Verilated RTL and write sim/calibration/*.json."""
    from sw_stack.cli.output import console, note
    from sw_stack.rtl.calibrate import TABLES, check_committed, measure

    with console.status("building the RTL") as status:
        for table in TABLES:
            (check_committed if check else measure)(table, status.update)
            note(f"{table.path.name}: {'as committed' if check else 'measured'}")
