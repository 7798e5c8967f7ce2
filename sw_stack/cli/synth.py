"""`kvstrata synth`: device resources per block."""

from typing import Annotated

import typer


def command(
    family: Annotated[str, typer.Option(help="xcup (UltraScale+), xc7 (7-series) or both")] = "both",
    as_json: Annotated[bool, typer.Option("--json", help="print the table as JSON")] = False,
) -> None:
    """Synthesise every block and print LUT, FF, DSP, BRAM, URAM and logic depth; then the sums of the u280 engine and
    the in-storage unit beside the published ones, which docs/resources.json keeps for the report."""
    from dataclasses import asdict

    from golden.spec import KVStrataError
    from hw.blocks import BLOCKS
    from hw.flow.synth import FAMILIES, resources
    from sw_stack.cli.output import note, show_json, show_rows, track
    from sw_stack.report import resources as whole

    if family not in {*FAMILIES, "both"}:
        raise KVStrataError(f"a family is one of {', '.join(FAMILIES)} or both, not {family!r}")
    families = list(FAMILIES) if family == "both" else [family]
    rows = []
    for name, block in track([item for item in BLOCKS.items() if item[1].family in families], "Synthesis"):
        table = resources(block.make, name.partition("_")[2], block.family, area=block.area)
        rows.append({"block": name, "family": FAMILIES[block.family], **asdict(table)})
    sums = []
    if family == "both":
        note("summing the engine and the in-storage unit")
        sums = whole.synthesised()
        whole.store(sums)
    if as_json:
        show_json({"blocks": rows, "sums": sums})
        return
    show_rows("Resources by block (Yosys)", rows, as_json)
    if sums:
        show_rows("Sums by part, copies counted", sums, as_json)
        show_rows("Sums beside published designs and devices", whole.compared(sums), as_json)
