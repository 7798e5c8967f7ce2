"""`kvstrata reproduce`: published results beside modelled ones."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    write: Annotated[Path | None, typer.Option(help="write the page (docs/reproduction.md) here")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print rows and summary as JSON")] = False,
) -> None:
    """Model every published figure of InstInfer and AccLLM that can be expressed, with the error of each."""
    from sim import others
    from sim.reproduce import Outcome, findings, markdown, rows, summary
    from sw_stack.cli.output import note, show_json, show_rows, track, write_file

    outcomes = [Outcome(row, row.model()) for row in track(rows(), "Reproducing")]
    beyond = [Outcome(row, row.model()) for row in track(others.rows(), "Other systems")]
    if write:
        write_file(write, markdown(outcomes, beyond))
        note(f"wrote {write}")
    if as_json:
        data = {
            "rows": [o.to_dict() for o in outcomes],
            "others": [o.to_dict() for o in beyond],
            "summary": summary(outcomes),
            "findings": findings(),
        }
        show_json(data)
        return
    for title, found in (("Published and modelled", outcomes), ("Other systems", beyond)):
        show_rows(title, [{k: v for k, v in o.to_dict().items() if k != "note"} for o in found], False)
    show_rows("Summary", [{"metric": k, "value": v} for k, v in summary(outcomes).items()], False)
