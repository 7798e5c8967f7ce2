"""`kvstrata pack`: memory images of a checkpoint for an engine."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    out: Annotated[Path, typer.Argument(help="directory of the images; replaced if it exists")],
    model: Annotated[
        str | None, typer.Option(help="GGUF file or checkpoint folder; SmolLM2-135M if none")
    ] = None,
    engine: Annotated[str, typer.Option(help="tiny, small or u280")] = "small",
    weights: Annotated[str, typer.Option(help="weight format: w8, w4, w2, w2s24")] = "w4",
    kv: Annotated[str, typer.Option(help="KV cache format: kv4, kv8")] = "kv4",
    context: Annotated[int, typer.Option(min=1, help="tokens that the KV cache holds")] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Pack every tensor into images for the engine's channels, with a manifest of addresses and hashes."""
    import time

    from golden.llama import load_model
    from sw_stack.cli.output import console, show_rows
    from sw_stack.pack.image import pack_checkpoint
    from sw_stack.runtime.machine import Setup, memory_map

    checkpoint = load_model(model)
    wanted = memory_map(checkpoint, Setup(engine, weights=weights, kv=kv, context=context))
    start = time.perf_counter()
    with console.status("packing") as status:
        pack_checkpoint(out, wanted, checkpoint, lambda name: status.update(f"packing {name}"))
    seconds = time.perf_counter() - start
    size = wanted.weight_words * 64 * wanted.engine.channels
    row = {
        "model": checkpoint.config.name,
        "channels": wanted.engine.channels,
        "weight_bytes": size,
        "kv_bytes": (wanted.channel_words - wanted.weight_words) * 64 * wanted.engine.channels,
        "aux_bytes": wanted.aux_bytes,
        "seconds": round(seconds, 3),
        "mb_per_s": round(size / 1e6 / seconds, 1),
    }
    show_rows(f"Images in {out}", [row], as_json)
