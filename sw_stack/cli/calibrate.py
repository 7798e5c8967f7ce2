"""`kvstrata calibrate`: measure the cycle tables that the system model reads."""

from typing import Annotated

import typer


def command(
    block: Annotated[str | None, typer.Option(help="this table alone, e.g. engine_layer")] = None,
    check: Annotated[bool, typer.Option(help="compare with the committed tables and change nothing")] = False,
) -> None:
    """Run every calibrated shape on Verilated RTL and write sim/calibration/*.json."""
    from golden.spec import KVStrataError
    from sw_stack.cli.output import console, note
    from sw_stack.rtl.calibrate import TABLES, check_committed, measure

    blocks = [table.block for table in TABLES]
    if block is not None and block not in blocks:
        raise KVStrataError(f"a calibrated block is one of {', '.join(blocks)}; got {block!r}")
    with console.status("building the RTL") as status:
        for table in (t for t in TABLES if block in (None, t.block)):
            (check_committed if check else measure)(table, status.update)
            note(f"{table.path.name}: {'as committed' if check else 'measured'}")
