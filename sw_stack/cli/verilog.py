"""`kvstrata verilog`: the Verilog of every top-level block, with its ports."""

from typing import Annotated

import typer


def command(as_json: Annotated[bool, typer.Option("--json", help="print the list as JSON")] = False) -> None:
    """Write the Verilog and port list of every top-level block to build/verilog-out/."""
    import json

    from hw.blocks import BLOCKS
    from hw.flow.cache import build_dir, write_atomically
    from hw.flow.verilog import emit
    from sw_stack.cli.output import show_rows, track

    rows = []
    for name, block in track(BLOCKS.items(), "Verilog"):
        design = emit(block.make, name)
        path = build_dir() / "verilog-out" / f"{name}.v"
        write_atomically(path, design.text)
        ports = {p: {"direction": d, "width": w, "signed": s} for p, (d, w, s) in design.ports.items()}
        write_atomically(path.with_suffix(".json"), json.dumps(ports, indent=1))
        rows.append({"block": name, "ports": len(ports), "lines": design.text.count("\n"), "file": str(path)})
    show_rows("Verilog", rows, as_json)
