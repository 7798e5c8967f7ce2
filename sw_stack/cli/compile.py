"""`kvstrata compile`: instruction streams of a decoder."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    image: Annotated[Path | None, typer.Argument(help="image directory; none with --config")] = None,
    config: Annotated[
        Path | None, typer.Option(help="config.json of a Llama-shaped model: shapes alone")
    ] = None,
    engine: Annotated[str, typer.Option(help="engine of --config: tiny, small or u280")] = "u280",
    weights: Annotated[str, typer.Option(help="weight format of --config")] = "w4",
    context: Annotated[int, typer.Option(min=1, help="context of --config")] = 4096,
    chunk: Annotated[int | None, typer.Option(min=1, help="tokens per prefill pass; none: as fits")] = None,
    out: Annotated[Path | None, typer.Option(help="directory for the encoded programs")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Compile decode, prefill and head programs and print their sizes and predicted cycles."""
    import time

    from golden.spec import KVStrataError
    from golden.spec.engine import ENGINE_CONFIGS
    from sw_stack.cli.output import show_rows
    from sw_stack.compile.decoder import compile_model
    from sw_stack.compile.program import step_registers
    from sw_stack.compile.schedule import schedule
    from sw_stack.compile.shapes import nominal_norms, read_config
    from sw_stack.pack.image import Image
    from sw_stack.pack.memory_map import MemoryMap

    if (image is None) == (config is None):
        raise KVStrataError("compile takes an image directory or --config, one of the two")
    if engine not in ENGINE_CONFIGS:
        raise KVStrataError(f"an engine is one of {', '.join(ENGINE_CONFIGS)}; got {engine!r}")
    start = time.perf_counter()
    if image is not None:
        opened = Image.open(image)
        memory_map, norms = opened.map, opened.norm_exponents
    else:
        assert config is not None
        model = read_config(config)
        memory_map = MemoryMap(model, ENGINE_CONFIGS[engine], weights, "kv4", context)
        norms = nominal_norms(model)
    compiled = compile_model(memory_map, norms, chunk)
    seconds = time.perf_counter() - start
    rows = []
    for program in compiled.programs.values():
        registers = {int(r): v for r, v in step_registers(memory_map, 0, max(1, program.tokens)).items()}
        rows.append(
            {
                "program": program.name,
                "tokens": program.tokens or 1,
                "instructions": len(program.instructions),
                "bytes": program.size_bytes,
                "predicted_cycles": schedule(program, memory_map.engine, registers).cycles,
            }
        )
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            partial = out / f".{program.name}.partial"
            partial.write_bytes(program.encoded().tobytes())
            partial.rename(out / f"{program.name}.bin")
    show_rows(f"{memory_map.model.name} on {memory_map.engine.name}, {seconds:.1f} s", rows, as_json)
