"""`kvstrata profile`: where the cycles of a pass go, per unit and per instruction."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    image: Annotated[Path, typer.Argument(help="image directory of `pack`")],
    program: Annotated[str, typer.Option(help="decode, prefill or head")] = "decode",
    position: Annotated[int, typer.Option(min=0, help="slot of the pass's first token")] = 0,
    latency: Annotated[int, typer.Option(min=1, help="memory latency in cycles")] = 40,
    trace: Annotated[Path | None, typer.Option(help="file for a timeline that Perfetto opens")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Predict a pass: busy share and stall reasons of every unit, and a timeline of all instructions."""
    import json

    from golden.spec import KVStrataError
    from golden.spec.engine import Unit
    from hw.flow.cache import write_atomically
    from sw_stack.cli.output import note, show_json, show_rows
    from sw_stack.compile.decoder import compile_model
    from sw_stack.compile.program import step_registers
    from sw_stack.compile.schedule import MemoryTiming, schedule
    from sw_stack.pack.image import Image
    from sw_stack.runtime.profile import timeline

    opened = Image.open(image, verify=False)
    known = compile_model(opened.map, opened.norm_exponents).programs
    if program not in known:
        raise KVStrataError(f"a program is one of {', '.join(known)}; got {program!r}")
    chosen = known[program]
    registers = {int(r): v for r, v in step_registers(opened.map, position, max(1, chosen.tokens)).items()}
    result = schedule(chosen, opened.map.engine, registers, MemoryTiming(latency))
    rows = [
        {
            "unit": unit.name.lower(),
            "instructions": sum(s.unit is unit for s in result.slots),
            "busy_cycles": result.busy[unit],
            "busy_share": round(result.busy_share(unit), 4),
            "stalls": ", ".join(f"{why} {n}" for why, n in sorted(result.stalls(unit).items())),
        }
        for unit in Unit
    ]
    if trace is not None:
        events = timeline(result, opened.map.engine.clock_mhz, f"{program} at {position}")
        write_atomically(trace, json.dumps(events))
        note(f"timeline in {trace}")
    if as_json:
        show_json({"program": program, "position": position, "cycles": result.cycles, "units": rows})
        return
    show_rows(f"{program} at {position}: {result.cycles} cycles predicted", rows, False)
