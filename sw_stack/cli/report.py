"""`kvstrata report`: the whole chain, from a prompt to build/report/."""

from pathlib import Path
from typing import Annotated

import typer

from sw_stack.chain.language import DEFAULT_PROMPT


def command(
    prompt: Annotated[str, typer.Option(help="what to ask the model")] = DEFAULT_PROMPT,
    tokens: Annotated[int, typer.Option(min=1, help="tokens to write at most")] = 48,
    perplexity_tokens: Annotated[
        int, typer.Option(min=256, help="tokens of English text to measure on")
    ] = 512,
    model: Annotated[
        str | None, typer.Option(help="GGUF file or checkpoint folder; SmolLM2-135M if none")
    ] = None,
    machine: Annotated[str, typer.Option(help="machine preset or TOML file")] = "reference",
    engine: Annotated[
        str, typer.Option(help="engine configuration that the RTL check builds: tiny, small")
    ] = "small",
    output: Annotated[Path | None, typer.Option(help="directory to write; build/report/ if none")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print summary.json")] = False,
) -> None:
    """Real model, golden model, RTL, measured cycles, system model: write the report."""
    import time

    from sw_stack.cli.output import console, note, show_json, show_rows
    from sw_stack.report.build import build, relative
    from sw_stack.report.page import shares

    start = time.perf_counter()

    def progress(text: str) -> None:
        note(f"[{time.perf_counter() - start:5.1f} s] {text}")
        status.update(text)

    with console.status("starting") as status:
        directory, summary = build(
            prompt=prompt,
            new_tokens=tokens,
            perplexity_tokens=perplexity_tokens,
            model=model,
            machine=machine,
            engine=engine,
            output=output,
            progress=progress,
        )
    if as_json:
        show_json(summary)
        return
    for level in summary["generated"]["levels"]:
        agreement = (
            "" if level["agreement"] is None else f" ({100 * level['agreement']:.0f}% of positions as float)"
        )
        typer.echo(f"\n{level['name']}{agreement}\n  {level['text']}")
    typer.echo()
    show_rows("Perplexity", summary["accuracy"]["rows"], False)
    checked = ("name", "shape", "bit_exact", "cycles", "bound_cycles")
    show_rows(
        "RTL against golden", [{key: row[key] for key in checked} for row in summary["rtl"]["rows"]], False
    )
    shown = ("model", "scheme", "batch", "tokens_per_s", "bottleneck", "breakdown")
    rows = [{key: row[key] for key in shown} for row in summary["system"]["rows"]]
    show_rows("System", [{**row, "breakdown": shares(row["breakdown"])} for row in rows], False)
    note(f"wrote {relative(directory)}/index.html in {time.perf_counter() - start:.0f} s")
