"""`kvstrata cells`: every operator at many shapes on the RTL, bits against golden and cycles against the prediction."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    engine: Annotated[
        str, typer.Option(help="engine configuration: small has room for every cell")
    ] = "small",
    every: Annotated[int, typer.Option(min=1, help="run one cell in so many")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="simulations side by side")] = 2,
    page: Annotated[
        Path | None, typer.Option(help="also write the error table to this Markdown file")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print every cell as JSON")] = False,
) -> None:
    """Run the sweep; the first byte that differs ends it with a sentence."""
    from golden.spec import KVStrataError
    from golden.spec.engine import ENGINE_CONFIGS
    from hw.flow.cache import write_atomically
    from sw_stack.cli.output import console, show_json, show_rows
    from sw_stack.device import sweep
    from sw_stack.device.cells import cells

    if engine not in ENGINE_CONFIGS:
        raise KVStrataError(f"an engine is one of {', '.join(ENGINE_CONFIGS)}; got {engine!r}")
    chosen = list(cells())[::every]
    with console.status("building") as status:
        results = sweep.run(
            ENGINE_CONFIGS[engine],
            chosen,
            workers,
            lambda done, total: status.update(f"{done}/{total} cells"),
        )
    if page is not None:
        write_atomically(page, sweep.page(results, engine))
    if as_json:
        show_json([result.to_json() for result in results])
        return
    show_rows(f"{len(results)} cells on {engine}", sweep.table(results), False)
