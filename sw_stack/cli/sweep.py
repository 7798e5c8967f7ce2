"""`kvstrata sweep`: explore machines, schemes and workloads; interrupted sweeps resume."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    file: Annotated[Path, typer.Argument(help="sweep file (TOML); docs/system-model.md describes it")],
    store: Annotated[Path, typer.Option(help="SQLite file that results are appended to")] = Path(
        "build/sweeps.sqlite"
    ),
    workers: Annotated[int, typer.Option(help="local processes")] = 2,
    scheduler: Annotated[str, typer.Option(help="Dask scheduler host:port, to use many machines")] = "",
    parquet: Annotated[Path | None, typer.Option(help="export the table here")] = None,
    verify: Annotated[
        bool,
        typer.Option(help="measure the hardware of the Pareto points on RTL, in their own configurations"),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print all rows as JSON")] = False,
) -> None:
    """Run the points of a sweep that are not stored yet, then show its Pareto points."""
    from rich.progress import Progress

    from sim.pareto import front
    from sim.store import Store, write_parquet
    from sim.sweep import run
    from sim.sweepfile import load_sweep
    from sw_stack.chain.verify import configurations, measure
    from sw_stack.cli.output import note, show_json, show_rows, track

    sweep = load_sweep(file)
    with Store(store) as opened, Progress(transient=True) as bar:
        task = bar.add_task(f"Sweep {sweep.name}", total=None)
        rows = run(
            sweep,
            opened,
            workers,
            scheduler,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    if parquet:
        write_parquet(rows, parquet)
    good = [r for r in rows if r["status"] == "ok" and all(r.get(m) is not None for m in sweep.objectives)]
    best = front(good, {m: way == "max" for m, way in sweep.objectives.items()})
    axes = [*sweep.axes(), *sweep.range]
    if verify:
        found = [measure(c) for c in track(configurations(best, axes), "Measuring on RTL")]
        if not found:
            note("no Pareto point names an engine or a computational drive")
        show_rows("Hardware of the Pareto points on RTL", found, as_json)
        return
    if as_json:
        show_json(rows)
        return
    note(f"{len(rows)} points, {len(rows) - len(good)} refused; store {store}")
    varied = [name for name in axes if len({str(r[name]) for r in rows}) > 1]
    shown = [{k: r[k] for k in [*varied, *sweep.objectives, "bottleneck"]} for r in best]
    show_rows(f"Pareto points of {sweep.name}", shown, False)
    if any(r["scheme"].startswith(("csd", "fpga")) for r in best):
        note(f"`kvstrata sweep {file} --store {store} --verify` measures the hardware of these points on RTL")
