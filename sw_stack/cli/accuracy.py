"""`kvstrata accuracy`: quality of formats and policies on the real model, beside the bytes they read."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from golden.accuracy_rows import Row
    from golden.loaders.checkpoint import Checkpoint


def command(
    match: Annotated[
        list[str] | None, typer.Argument(help="only rows whose name holds one of these texts")
    ] = None,
    context: Annotated[list[int] | None, typer.Option(help="only these context lengths")] = None,
    long: Annotated[bool, typer.Option(help="contexts beyond 1,024 tokens too")] = True,
    model: Annotated[
        Path | None, typer.Option(help="GGUF file or checkpoint folder; SmolLM2 if none")
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(help="instead of the grid: w4, w2-g32 gptq, w2s24 sparsegpt gptq, float wanda, ..."),
    ] = None,
    kv: Annotated[
        list[str] | None,
        typer.Option(
            help="instead of the grid: float (binary16), kv8, kv4, kivi4, kivi2; -centred behind it"
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="instead of the grid: dense, lambda-limit:S+W, lambda-cache:S+W, sparq:r,share, sparf:r,share"
        ),
    ] = None,
    level: Annotated[
        list[str] | None,
        typer.Option(help="instead of the grid: exact, float (float activations) or float-a8"),
    ] = None,
    jobs: Annotated[int, typer.Option(help="rows measured side by side (1.5 GB each)")] = 1,
    measure: Annotated[bool, typer.Option(help="measure rows that have no kept result")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print the rows as JSON")] = False,
) -> None:
    """Measure what has not been measured, keep it, and show the table; a complete grid of SmolLM2 also writes
    docs/accuracy.md. Any of --weights, --kv, --policy, --level measures their combinations instead of the grid."""
    from golden.accuracy import Results, check_rows, missing
    from golden.accuracy_page import total_bytes
    from golden.accuracy_rows import check_row, combinations, grid
    from golden.llama import english_text
    from golden.loaders import load
    from golden.spec import KVStrataError
    from hw.flow.cache import build_dir
    from sw_stack.cli.output import show_rows

    if jobs < 1:
        raise KVStrataError(f"the number of jobs must be at least 1, got {jobs}.")
    everything = list(grid())
    own = any((weights, kv, policy, level))
    asked = combinations(context or [256], weights, kv, policy, level) if own else everything
    rows = [r for r in asked if _wanted(r, match, context, long)]
    if not rows:
        raise KVStrataError(
            f"a filter must leave at least one row of the grid, got {match or 'none'} "
            f"at contexts {context or 'of all lengths'}."
        )
    for row in rows:
        check_row(row)
    checkpoint, directory = load(model), build_dir() / "accuracy"
    check_rows(rows, checkpoint)
    text, results = english_text(), Results(directory / "results.sqlite")
    todo = missing(rows, checkpoint, text.sha256, results) if measure else []
    _measure(todo, checkpoint, model, directory, jobs)
    keys = [(r, results.get(r.key(checkpoint, text.sha256))) for r in rows]
    done = [result for _, result in keys if result]
    if not done:
        raise KVStrataError("the table needs at least one measured row, got none: run make accuracy.")
    export(done, directory)
    if model is None and not own:
        kept = [results.get(r.key(checkpoint, text.sha256)) for r in everything]
        write_page([r for r in kept if r], len(everything), checkpoint, text.name, text.sha256)
    shown = (
        "name",
        "context",
        "bits_per_weight",
        "perplexity",
        "top1_agreement",
        "kl_nats",
        "attention_error",
        "passkey",
    )
    table = [{k: r[k] for k in shown} | {"bytes_per_token": total_bytes(r)} for r in done]
    show_rows("Accuracy", done if as_json else table, as_json)


def _wanted(row: "Row", match: list[str] | None, context: list[int] | None, long: bool) -> bool:
    named = not match or any(m in row.name for m in match)
    return named and (not context or row.context in context) and (long or row.context <= 1024)


def _measure(
    todo: "list[Row]", checkpoint: "Checkpoint", model: Path | None, directory: Path, jobs: int
) -> None:
    """Each result is kept, and shown as progress, as soon as it is there; what is interrupted goes on the next time."""
    from golden.accuracy import measure_rows
    from sw_stack.cli.output import console

    if not todo:
        return
    from rich.progress import Progress

    with Progress(console=console) as progress:
        task = progress.add_task("Accuracy", total=len(todo))
        if jobs == 1:
            for result in measure_rows(todo, checkpoint, directory):
                progress.update(task, advance=1, description=f"{result['name']} at {result['context']}")
            return
        for done in _side_by_side(todo, checkpoint, model, directory, jobs):
            progress.update(task, completed=done)


def _side_by_side(
    todo: "list[Row]", checkpoint: "Checkpoint", model: Path | None, directory: Path, jobs: int
) -> Iterator[int]:
    """Rows done so far, every second, while processes measure a share each."""
    import os
    from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
    from multiprocessing import get_context

    from golden.accuracy import Results, missing
    from golden.llama import english_text

    sha256, results = english_text().sha256, Results(directory / "results.sqlite")
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(_share, s, model, directory, jobs, os.getpid()) for s in shares(todo, jobs)}
        while running:
            ended, running = wait(running, timeout=1, return_when=FIRST_EXCEPTION)
            for share in ended:
                share.result()
            yield len(todo) - len(missing(todo, checkpoint, sha256, results))


def shares(todo: "list[Row]", jobs: int) -> "list[list[Row]]":
    """Rows grouped by weights and context, in order; large groups are cut where weights cost little to make again."""
    groups: dict[Any, list[Row]] = {}
    for row in todo:
        groups.setdefault((row.level, row.recipe, row.context > 1024 and row.context), []).append(row)
    most = max(1, len(todo) // jobs)
    return [
        group[i : i + size]
        for group in groups.values()
        for size in [len(group) if group[0].recipe.needs_calibration else most]
        for i in range(0, len(group), size)
    ]


def _share(rows: "list[Row]", model: Path | None, directory: Path, jobs: int, parent: int) -> None:
    import os

    import torch

    from golden.accuracy import measure_rows
    from golden.loaders import load

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    for _ in measure_rows(rows, load(model), directory):
        if os.getppid() != parent:  # ended from outside: the next run goes on
            return


def export(done: list[dict[str, Any]], directory: Path) -> None:
    """The rows as Parquet, and the Pareto plot, beside the kept results."""
    import polars

    from golden.accuracy_page import pareto_plot

    temporary = directory / ".accuracy.parquet.tmp"
    polars.DataFrame(done).write_parquet(temporary)
    temporary.replace(directory / "accuracy.parquet")
    save_figure(pareto_plot(done), directory / "pareto.svg")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as SVG without dates or random ids, so that equal results give equal files."""
    import io

    import matplotlib

    from hw.flow.cache import write_atomically

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "kvstrata", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    write_atomically(path, buffer.getvalue())


def write_page(
    done: list[dict[str, Any]], planned: int, checkpoint: Any, text_name: str, text_sha256: str
) -> None:
    """docs/accuracy.md and its plot, once every row of the grid is measured: a part would take committed rows away."""
    from golden.accuracy_page import page, pareto_plot
    from hw.flow.cache import ROOT, write_atomically
    from sw_stack.cli.output import note

    if len(done) < planned:
        note(f"docs/accuracy.md stays as it is: {len(done)} of {planned} rows of the grid are measured here")
        return
    write_atomically(ROOT / "docs" / "accuracy.md", page(done, planned, checkpoint, text_name, text_sha256))
    save_figure(pareto_plot(done), ROOT / "docs" / "accuracy-pareto.svg")
    note(f"docs/accuracy.md: {len(done)} of {planned} rows")
