"""`kvstrata check-rtl`: operands of a real run through Verilated RTL, element by element."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    prompt: Annotated[str | None, typer.Option(help="whose run the operands come from")] = None,
    engine: Annotated[str, typer.Option(help="engine configuration to build: tiny, small")] = "small",
    vectors: Annotated[
        list[Path] | None, typer.Option(help="vector files of make vectors instead of a run")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the rows as JSON")] = False,
) -> None:
    """Compare RTL and golden model on real matrix products and a real attention head; exit 1 on any difference."""
    import tempfile

    from golden.spec import KVStrataError
    from golden.spec.engine import ENGINE_CONFIGS
    from sw_stack.chain import language, rtl
    from sw_stack.cli.output import note, show_rows

    if engine not in ENGINE_CONFIGS:
        raise KVStrataError(f"an engine configuration is one of {', '.join(ENGINE_CONFIGS)}, not {engine!r}")
    if vectors:
        rows = rtl.check_vectors(vectors, engine, note)
    else:
        with tempfile.TemporaryDirectory() as work:
            language.capture(Path(work), prompt or language.DEFAULT_PROMPT, progress=note)
            rows = rtl.check(Path(work) / "operands.safetensors", engine, note)
    show_rows("RTL against golden", rows, as_json)
    if wrong := [row for row in rows if not row["bit_exact"]]:
        raise KVStrataError(f"{wrong[0]['name']}: {wrong[0]['first_difference']}")
