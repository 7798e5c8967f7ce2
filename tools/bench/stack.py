"""The software stack: packing, compiling, FTL speed, predicted cycles, and decoding on the Verilated engine."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from golden.config import DecoderConfig
from golden.llama import load_model
from golden.spec.engine import SMALL, U280, WORD_BYTES
from golden.spec.memory import MemoryModel
from sw_stack.compile.decoder import compile_model
from sw_stack.compile.memory import MemoryTiming
from sw_stack.compile.shapes import nominal_norms
from sw_stack.pack.image import pack_checkpoint
from sw_stack.pack.memory_map import MemoryMap

LLAMA_7B = DecoderConfig("llama-2-7b", layers=32, hidden=4096, heads=32, kv_heads=32, head_size=128, ffn=11008,
                       vocab=32000, context=4096, rope_base=1e4, norm_eps=1e-5)  # fmt: skip


def row(name: str, value: float, unit: str, target: float, better: str) -> dict[str, Any]:
    """One benchmark row."""
    return {"id": f"stack.{name}", "value": value, "unit": unit, "target": target, "better": better}


def pack_mb_per_s() -> float:
    """SmolLM2 W4 into 16 channels."""
    checkpoint = load_model(None)
    memory_map = MemoryMap(checkpoint.config, SMALL, "w4", "kv4", 512)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        pack_checkpoint(Path(folder) / "image", memory_map, checkpoint)
        seconds = time.perf_counter() - start
    return memory_map.weight_words * WORD_BYTES * SMALL.channels / 1e6 / seconds


def compile_7b() -> tuple[float, int]:
    """(seconds, instruction bytes) for any length to 4,096 tokens."""
    start = time.perf_counter()
    memory_map = MemoryMap(LLAMA_7B, U280, "w2s24", "kv4", 4096)
    programs = compile_model(memory_map, nominal_norms(LLAMA_7B))
    for program in programs.programs.values():
        program.encoded()
    return time.perf_counter() - start, programs.size_bytes


def ftl_page_operations_per_s() -> float:
    """Pages programmed, looked up and reclaimed per second while 64 sequences of OPT-13B's shape decode.

    Counts pages alone: a token that only goes to a group buffer counts nothing.
    """
    import numpy as np

    from golden.spec.storage import PageKind
    from sw_stack.drive.flash import FlashArray, Geometry
    from sw_stack.drive.ftl import Ftl
    from sw_stack.drive.journal import Span
    from sw_stack.drive.shape import TaskShape

    shape = TaskShape(layers=2, q_heads=40, kv_heads=40, head_size=128, channels_per_page=8, max_tokens=2048)
    ftl = Ftl(FlashArray(Geometry(8, 8, 64, 256), store_data=False))
    ftl.configure(0, shape, shape.address_map(64))
    looked_up = 0
    start = time.perf_counter()
    for batch in range(64):
        for layer in range(shape.layers):
            ftl.append(0, batch, layer, 240, None)
    for _ in range(48):
        for layer in range(shape.layers):
            for batch in range(64):
                held = ftl.append(0, batch, layer, 1, None)
                if held % 16 == 0:
                    groups = np.arange(held // 16)
                    for view in (PageKind.K_TOKEN, PageKind.V_TOKEN):
                        looked_up += ftl.resolve(0, batch, layer, view, slice(None), groups).size
    released = ftl.reclaim(Span(0))
    return (ftl.flash.programs + looked_up + released) / (time.perf_counter() - start)


def measure(layers: int, memory: str, passes: tuple[int, ...]) -> tuple[float, list[tuple[str, int, float]]]:
    """(seconds of the last pass, (program, cycles, prediction's error in percent) of all) of the first layers."""
    from sw_stack.compile.program import step_registers
    from sw_stack.compile.schedule import schedule
    from sw_stack.runtime.machine import Setup, memory_model, open_session

    whole = load_model(None)
    checkpoint = replace(whole, config=replace(whole.config, layers=layers))
    session = open_session(checkpoint, Setup(device="rtl", context=64, memory=memory))
    timing, found = MemoryTiming.of(memory_model(memory)), []
    try:
        for tokens in passes:
            start, first = time.perf_counter(), len(session.runs)
            session.forward(list(range(tokens)))
            seconds = time.perf_counter() - start
            for name, result in session.runs[first:]:
                values = step_registers(session.programs.map, session.length - tokens, tokens)
                registers = {int(r): v for r, v in values.items()}
                program = session.programs.programs[name]
                cycles = schedule(program, session.programs.map.engine, registers, timing).cycles
                found.append((name, result.cycles, 100 * abs(cycles / result.cycles - 1)))
    finally:
        session.device.close()
    return seconds, found


def on_rtl() -> list[dict[str, Any]]:
    """Decode steps of the whole model on the Verilated `small` engine, and the prediction's error on every program."""
    seconds, fixed = measure(30, "20", (1, 1))
    _, hbm = measure(30, "hbm", (1, 1))
    _, prefill = measure(2, "hbm", (16, 1))
    decode, of_hbm = (max(c for name, c, _ in runs if name == "decode") for runs in (fixed, hbm))
    head = max(c for name, c, _ in hbm if name == "head")
    words = MemoryMap(load_model(None).config, SMALL, "w4", "kv4", 64).matrices["head"].words
    bound = words / MemoryTiming.of(MemoryModel()).words_per_cycle
    errors = [error for _, _, error in (*fixed, *hbm, *prefill)]
    return [
        row("rtl.seconds_per_token", seconds, "s", 2.0, "lower"),
        row("rtl.cycles_per_token_1024mac", decode, "cycles, 30 layers, memory latency 20", 150_000, "lower"),
        row("rtl.cycles_per_token_1024mac_hbm", of_hbm, "cycles, 30 layers, HBM model", 150_000, "lower"),
        row("rtl.head_over_bytes", head / bound, "cycles over those of its bytes, HBM model", 1.1, "lower"),
        row("predict.worst_error_pct", max(errors), "%", 2.0, "lower"),
    ]


def run() -> list[dict[str, Any]]:
    """All rows of the stack."""
    seconds, size = compile_7b()
    return [
        row("pack.mb_per_s", pack_mb_per_s(), "MB/s", 50, "higher"),
        row("compile.llama7b_s", seconds, "s", 60, "lower"),
        row("instructions.bytes", size, "bytes", 1 << 20, "lower"),
        row("ftl.ops_per_s", ftl_page_operations_per_s(), "pages/s", 100_000, "higher"),
        *on_rtl(),
    ]
