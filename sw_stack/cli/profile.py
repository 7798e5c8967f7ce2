"""`kvstrata profile`: where the cycles of a pass go, per unit and per instruction."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    image: Annotated[Path, typer.Argument(help="image directory of `pack`")],
    program: Annotated[str, typer.Option(help="decode, prefill or head")] = "decode",
    position: Annotated[int, typer.Option(min=0, help="slot of the pass's first token")] = 0,
    memory: Annotated[
        str, typer.Option(help="hbm, random (rtl alone), or a fixed latency in cycles")
    ] = "hbm",
    device: Annotated[
        str, typer.Option(help="timing: predict; rtl: measure on the Verilated engine")
    ] = "timing",
    wave: Annotated[
        str | None, typer.Option(help="first:last cycle of which device rtl writes a waveform")
    ] = None,
    wave_file: Annotated[Path, typer.Option(help="where the waveform (VCD) goes")] = Path("wave.vcd"),
    trace: Annotated[Path | None, typer.Option(help="file for a timeline that Perfetto opens")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Busy share and stall reasons of every unit in a pass, and a timeline of all instructions."""
    import json

    from golden.spec import KVStrataError
    from golden.spec.engine import Unit
    from hw.flow.cache import write_atomically
    from sw_stack.cli.output import note, show_json, show_rows
    from sw_stack.compile.decoder import compile_model
    from sw_stack.pack.image import Image
    from sw_stack.runtime.profile import run_profile, timeline, window

    opened = Image.open(image, verify=False)
    known = compile_model(opened.map, opened.norm_exponents).programs
    if program not in known:
        raise KVStrataError(f"a program is one of {', '.join(known)}; got {program!r}")
    chosen = known[program]
    cycles = None if wave is None else window(wave)
    if wave is not None and device != "rtl":
        raise KVStrataError(f"a waveform comes from device rtl; got {device!r}")
    result = run_profile(opened, chosen, position, device, memory, cycles, wave_file)
    if wave is not None:
        note(f"waveform in {wave_file}")
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
        show_json(
            {
                "program": program,
                "position": position,
                "device": device,
                "cycles": result.cycles,
                "units": rows,
            }
        )
        return
    how = "measured" if device == "rtl" else "predicted"
    show_rows(f"{program} at {position}: {result.cycles} cycles {how}", rows, False)
