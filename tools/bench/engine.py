"""The engine: products and layers against their byte and multiplier bounds, the U280 composition, simulation speed."""

import resource
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from golden.spec.engine import SMALL, U280, EngineConfig, StreamFormat, weight_stream
from golden.spec.formats import WEIGHT_FORMATS
from golden.spec.memory import MemoryModel
from hw.engine.compose import compose
from sw_stack.device.rtl import RtlDevice
from sw_stack.pack.stream import pack_matrix
from sw_stack.report.resources import ENGINES
from sw_stack.rtl.core import CoreJob, CoreResult, run_core
from sw_stack.rtl.engine import engine_program
from sw_stack.rtl.layer import llama_2_7b, predict, random_hidden, random_layer
from sw_stack.rtl.matvec import activation_groups, matrix_operation, random_codes, weight_fields

SLICE = replace(U280, name="u280-slice", channels=2, act_words=2048)
"""Two of the U280's channels with their lanes. All channels take words and steps together, so cycles are those of
the whole: 4,096 rows are 16 row blocks of 256 lanes there and 16 row blocks of 16 lanes here."""
ROWS, INNER, TOKENS = 4096, 4096, 128
LLAMA_LAYERS = 32


@dataclass(frozen=True)
class Operands:
    """Random weights of a format, packed, with their stream."""

    stream: StreamFormat
    words: np.ndarray
    rows: int


def packed(config: EngineConfig, name: str, rows: int, inner: int, seed: int = 1) -> Operands:
    """A legal weight matrix of format `name`."""
    rng, fmt = np.random.default_rng(seed), WEIGHT_FORMATS[name]
    stream = weight_stream(name, fmt.group)
    scales = rng.uniform(1e-3, 1e-2, (rows, inner // fmt.group)).astype(np.float16)
    minima = -scales if fmt.asymmetric else None
    fields = weight_fields(random_codes(rng, fmt, rows, inner), scales, minima, fmt)
    return Operands(stream, pack_matrix(config, stream, fields), rows)


def product(config: EngineConfig, o: Operands, inner: int, vectors: int, passes: int = 1) -> CoreResult:
    """`passes` products of the same weights with `vectors` vectors each."""
    operation = matrix_operation(config, o.stream, o.rows, inner, vectors)
    acts = np.random.default_rng(2).integers(-127, 128, (vectors, inner))
    return run_core(
        CoreJob(
            config,
            np.concatenate([o.words] * passes, 1),
            [operation] * passes,
            np.zeros((vectors * operation["dst_stride"], config.vector_lanes), np.int32),
            activation_groups(config, acts),
            dict.fromkeys(range(vectors), (8, 40000, 25)),
        )
    )


def beat_fraction(name: str) -> float:
    """Share of cycles that take a word of every channel, first to last, of a 4,096 x 4,096 matrix-vector product."""
    rows = ROWS // U280.lanes * SLICE.lanes
    return product(SLICE, packed(SLICE, name, rows, INNER), INNER, 1).beat_fraction


def mac_fraction(name: str) -> float:
    """Multiplier cycles over all cycles of a 128 x 4,096 x 4,096 product, 16 vectors per pass."""
    rows = ROWS // U280.lanes * SLICE.lanes
    result = product(SLICE, packed(SLICE, name, rows, INNER), INNER, SLICE.tokens, TOKENS // SLICE.tokens)
    return result.fired / result.cycles


def simulated_mac_per_s(runs: int = 8) -> float:
    """MAC per second of processor time of the whole `small` engine with its memories: a wide W4 decoder layer.

    The best of some runs, since other work on the machine can only lengthen one.
    """
    shape = replace(llama_2_7b(context=256), hidden=2048, heads=16, kv_heads=16, ffn=4096)
    rates = []
    with tempfile.TemporaryDirectory() as folder:
        layer = random_layer(Path(folder) / "image", shape, SMALL, "w4")
        engine_program(SMALL)
        for _ in range(runs):
            before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
            device = RtlDevice(layer.image)
            _, run = layer.step(device, random_hidden(shape))
            device.close()
            seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
            rates.append(run.counters["array_steps"] * SMALL.macs_per_cycle / seconds)
    return max(rates)


def llama_rows() -> list[dict[str, Any]]:
    """A Llama-2-7B layer and token on the U280's channels, at the end of 1,024 slots, by the recurrences of the
    schedule, which tests hold against the RTL (equal at a fixed latency) and the HBM model."""
    shape, rows = llama_2_7b(vocab=32000), []
    for name in ("w4", "w2s24"):
        predicted = predict(U280, name, shape, LLAMA_LAYERS, MemoryModel())
        rate = U280.clock_mhz * 1e6 / predicted.token_cycles
        rows.append(
            _row(f"engine.layer_llama7b.bound_ratio.{name}", predicted.bound_ratio, "1", 1.1, "lower")
        )
        rows.append(_row(f"engine.u280.llama7b_tokens_per_s.{name}", rate, "token/s", 220, "higher"))
    best = {**rows[-1], "id": "engine.u280.llama7b_tokens_per_s"}
    return [*rows, best]


def run() -> list[dict[str, Any]]:
    """Rows of `make bench` for the engine."""
    rows = llama_rows()
    rows += [
        _row(f"engine.mv.beat_fraction.{name}", beat_fraction(name), "1", 0.95, "higher")
        for name in WEIGHT_FORMATS
    ]
    rows += [
        _row(f"engine.mm.mac_fraction.{name}", mac_fraction(name), "1", 0.9, "higher")
        for name in ("w4", "w2", "w2s24")
    ]
    total = compose(U280)["total"]
    published, device = ENGINES["published: AccLLM"], ENGINES["device: XCU280"]
    limits = {**published, **{name: device[name] for name in ("ff", "bram", "uram")}, "logic_levels": 8}
    rows += [_row(f"engine.u280.{k}", getattr(total, k), "", limit, "lower") for k, limit in limits.items()]
    rows.append(_row("engine.verilated.mac_per_s", simulated_mac_per_s(), "MAC/s", 150e6, "higher"))
    return rows


def _row(name: str, value: float, unit: str, target: float, better: str) -> dict[str, Any]:
    return {"id": name, "value": value, "unit": unit, "target": target, "better": better}
