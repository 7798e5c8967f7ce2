"""`kvstrata device`: one device on its own, every limit of its bandwidth, and what it reaches page by page."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    kind: Annotated[str, typer.Argument(help="ssd, csd, fpga, gpu or link")],
    name: Annotated[str, typer.Argument(help="preset or TOML file")],
    kib: Annotated[float, typer.Option(help="size of a random read of a drive")] = 4.0,
    depth: Annotated[int, typer.Option(help="reads outstanding, per thread or HBM channel")] = 32,
    threads: Annotated[int, typer.Option(help="threads that submit reads to a drive")] = 1,
    profile: Annotated[
        Path | None,
        typer.Option(help="GPU: compare with measured kernels (columns as sim/data/gpu_ops_a100.csv)"),
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="field=value")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the rows as JSON")] = False,
) -> None:
    """Show what a device reaches and which limit binds: a drive by size and depth, HBM by access size, GPU kernels."""
    from sim.devices.probe import probe
    from sim.overrides import parse
    from sw_stack.cli.output import show_rows

    rows = probe(kind, name, parse(set_ or []), kib, depth, threads, profile)
    show_rows(f"{kind} {name}", rows, as_json)
