"""The engine: products and layers against their byte and multiplier bounds, the U280 composition, simulation speed."""

import resource
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from amaranth import Module, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from golden.spec.engine import SMALL, U280, EngineConfig, StreamFormat, weight_stream
from golden.spec.formats import WEIGHT_FORMATS
from golden.spec.memory import MemoryModel
from hw.engine.compose import compose
from hw.flow.verilator import build_harness
from hw.flow.verilog import emit
from sw_stack.device.rtl import RtlDevice
from sw_stack.pack.stream import pack_matrix
from sw_stack.report.resources import ENGINES
from sw_stack.rtl.core import CoreJob, CoreResult, run_core
from sw_stack.rtl.engine import engine_program
from sw_stack.rtl.layer import Layer, llama_2_7b, predict, random_hidden, random_layer
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


BALANCED = replace(SMALL, name="balanced", lanes_per_channel=4)
"""`small` with as many lanes as its channels feed with W4: a word of weights per channel and cycle."""
PROMPT = 8
"""Tokens of a prefill pass that the balanced engine's buffers hold for the simulated layer."""
BARE_ROWS, BARE_INNER, BARE_CYCLES = 16, 64, 200_000
BARE_SHARE = 150 / 440
"""The target against what the bare array does where the target was set, in million MAC/s each."""


class BareArray(wiring.Component):
    """A yardstick of the machine: signed 8-bit by 4-bit products, registered, and the sums of its rows."""

    a: In(8 * BARE_INNER)
    w: In(4 * BARE_INNER * BARE_ROWS)
    y: Out(32 * BARE_ROWS)

    def elaborate(self, platform):
        m = Module()
        for row in range(BARE_ROWS):
            products = []
            for n in range(BARE_INNER):
                product = Signal(signed(12))
                weight = self.w.word_select(row * BARE_INNER + n, 4).as_signed()
                m.d.sync += product.eq(self.a.word_select(n, 8).as_signed() * weight)
                products.append(product)
            m.d.sync += self.y.word_select(row, 32).eq(_tree(products))
        return m


def _tree(terms: list[Any]) -> Any:
    """The terms' sum as a tree of adders."""
    while len(terms) > 1:
        terms = [left + right for left, right in zip(terms[::2], terms[1::2], strict=True)]
    return terms[0]


def _children_s() -> float:
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime


def bare_rate(program: Path) -> float:
    """MAC per second of processor time of the bare array's simulation with new operands in every cycle."""
    before = _children_s()
    subprocess.run([str(program), str(BARE_CYCLES)], check=True, stdout=subprocess.DEVNULL)
    return BARE_CYCLES * BARE_ROWS * BARE_INNER / (_children_s() - before)


def layer_rate(layer: Layer, prompt: int, answer: int) -> float:
    """MAC per second of processor time of a whole engine with its memories: a decoder layer over a cache that is
    nearly full, one pass of `prompt` tokens if there are any, then `answer` decode steps."""
    model, engine = layer.map.model, layer.map.engine
    start = model.context - prompt - answer
    passes = [("prefill", start, prompt)] if prompt else []
    passes += [("decode", start + prompt + n, 1) for n in range(answer)]
    engine_program(engine)
    steps, before = 0, _children_s()
    device = RtlDevice(layer.image)
    for name, slot, tokens in passes:
        hidden = np.stack([random_hidden(model, slot + n) for n in range(tokens)])
        steps += layer.run(device, name, slot, hidden).counters["array_steps"]
    device.close()
    return steps * engine.macs_per_cycle / (_children_s() - before)


def verilated_rows(runs: int = 6) -> list[dict[str, Any]]:
    """A wide W4 decoder layer simulated: as many tokens in a prefill pass as in decode steps, and decode alone; the
    same beside the bare array, which says how fast the machine is.

    The best of some runs of each in alternation, since other work on the machine can only lengthen one.
    """
    shape = replace(llama_2_7b(context=256), hidden=2048, heads=16, kv_heads=16, ffn=4096)
    array = build_harness(emit(BareArray(), "bare"), [Path(__file__).parent / "bare_array.cpp"])
    both, decode, small, bare = list[float](), list[float](), list[float](), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        wide, narrow = (
            random_layer(Path(folder) / c.name, shape, c, "w4", chunk=chunk)
            for c, chunk in ((BALANCED, PROMPT), (SMALL, 1))
        )
        for _ in range(runs):
            both.append(layer_rate(wide, PROMPT, PROMPT))
            decode.append(layer_rate(wide, 0, 1))
            small.append(layer_rate(narrow, 0, 1))
            bare.append(bare_rate(array))
    return [
        _row("engine.verilated.mac_per_s", max(both), "MAC/s", 150e6, "higher"),
        _row("engine.verilated.mac_per_s.decode", max(decode), "MAC/s", 150e6, "higher"),
        _row("engine.verilated.mac_per_s.decode.small", max(small), "MAC/s", 150e6, "higher"),
        _row("engine.verilated.bare_array_share", max(both) / max(bare), "1", BARE_SHARE, "higher"),
    ]


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
    return [*rows, *verilated_rows()]


def _row(name: str, value: float, unit: str, target: float, better: str) -> dict[str, Any]:
    return {"id": name, "value": value, "unit": unit, "target": target, "better": better}
