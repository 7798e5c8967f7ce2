"""Cells of the sweep: one operator at one shape, batch, sequence and format, as a program with its memories.

A cell reads its operands from auxiliary memory, runs the operator on random data and leaves the result in memory, so
that two devices can be compared byte for byte. Caches and weights are random codes with finite scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np

from golden.attention import ScoreScale
from golden.spec.engine import (
    STEP,
    WORD_BYTES,
    Codes,
    EngineConfig,
    KVLayout,
    Op,
    value_stream,
    weight_stream,
)
from golden.spec.formats import ATTN_TILE
from sw_stack.compile.builder import Builder, Instruction, Span
from sw_stack.pack.stream import Fields, pack_matrix, stream_fields

INPUT, OUTPUT, AUX_BYTES = 1 << 16, 1 << 21, 1 << 22
"""Auxiliary memory of a cell: instructions, operands, results."""
SLOTS = 512
WEIGHT_FORMATS = (
    *(product(("w8", "w4", "w2"), (32, 64, 128))),
    ("w2s24", 64),
    ("w2s24", 128),
)
EXPONENT_MASK = 63


@dataclass(frozen=True)
class Cell:
    """`batch` vectors (tokens, or query heads); `sequence` slots of a cache, 0 without one."""

    operator: str
    shape: tuple[int, ...]
    batch: int
    sequence: int
    format: str

    @property
    def name(self) -> str:
        """In one line."""
        sides = " x ".join(map(str, self.shape))
        return f"{self.operator} {sides}, batch {self.batch}, sequence {self.sequence}, {self.format}"


@dataclass
class Work:
    """A cell ready to run: instructions at auxiliary word 0, memories before the run."""

    instructions: tuple[Instruction, ...]
    channels: np.ndarray
    """uint8 [C, words, 64]."""
    aux: np.ndarray


def cells() -> Iterator[Cell]:
    """Every cell of the sweep."""
    for (name, group), inner, rows, batch in product(
        WEIGHT_FORMATS, (128, 384, 640, 1536), (96, 576), (1, 2, 5, 16)
    ):
        yield Cell("linear", (rows, inner), batch, 0, f"{name} group {group}")
    for (name, group), inner, batch in product(WEIGHT_FORMATS, (256, 768), (1, 4, 16)):
        yield Cell("linear onto residual", (160, inner), batch, 0, f"{name} group {group}")
    for name, inner, batch in product(("w8", "w4", "w2", "w2s24"), (64, 576, 1536), (1, 3, 8, 16)):
        yield Cell("norm and linear", (64, inner), batch, 0, f"{name} group 64")
    for operator, count, batch in product(("norm", "gate", "add"), (32, 96, 576, 1536), (1, 3, 8, 16)):
        yield Cell(operator, (count,), batch, 0, "q16")
    for size, heads in product((32, 64, 128, 256), (1, 3, 9, 16)):
        yield Cell("rope", (heads, size), 1, 0, "q16")
    for size, bits, group, slots in product(
        (32, 64, 128, 256), (4, 8), (1, 3, 4, 8), (1, 16, 31, 32, 33, 100, 511)
    ):
        yield Cell("attention", (group, size), 1, slots, f"kv{bits}")
    for size, bits, group, tokens, slots in product((64, 128), (4, 8), (1, 3), (2, 4), (0, 32, 90)):
        yield Cell("attention", (group, size), tokens, slots + tokens, f"kv{bits}")
    for kind, bits, size, slot, tokens in product(
        "kv", (4, 8), (32, 64, 128, 256), (0, 5, 31, 64), (1, 3, 8)
    ):
        yield Cell(f"append {kind}", (size,), tokens, slot + tokens, f"kv{bits}")
    for words, vectors in product((1, 7, 64, 200), (1, 4, 16)):
        yield Cell("read and write", (words,), vectors, 0, "q16")


def build(cell: Cell, config: EngineConfig) -> Work:
    """The program and the memories of a cell; the data follow from the cell alone."""
    seed = int.from_bytes(cell.name.encode()[-8:], "little") + sum(cell.name.encode())
    bench = _Bench(cell, config, np.random.default_rng(seed))
    _BUILDERS[cell.operator](bench)
    return bench.work()


class _Bench:
    """Collects a cell's program; VB bank b begins at word `bank(b)`."""

    def __init__(self, cell: Cell, config: EngineConfig, random: np.random.Generator) -> None:
        self.cell, self.config, self.random = cell, config, random
        self.builder = Builder()
        self.aux = np.zeros(AUX_BYTES, np.uint8)
        self.channels = np.zeros((config.channels, 1, WORD_BYTES), np.uint8)
        self._input, self._output = INPUT, OUTPUT

    def bank(self, index: int) -> int:
        return index * self.config.vb_words // 4

    def words(self, elements: int) -> int:
        return -(-elements // self.config.lanes) * (self.config.lanes // self.config.vector_lanes)

    def place(self, values: np.ndarray) -> tuple[int, int]:
        """Rows int32 [n, w] into auxiliary memory; (address, stride)."""
        raw = np.ascontiguousarray(values.astype("<i4")).view(np.uint8)
        stride = -(-raw.shape[1] // WORD_BYTES) * WORD_BYTES
        base = self._input
        for i, row in enumerate(raw):
            self.aux[base + i * stride : base + i * stride + len(row)] = row
        self._input += stride * len(raw)
        return base, stride

    def read(self, values: np.ndarray, dst: int, dst_stride: int) -> None:
        """Rows into VB."""
        address, stride = self.place(values)
        count = -(-values.shape[1] // self.config.vector_lanes)
        self.builder.emit(
            Op.READ, "operand", [], [Span("vb", dst, dst + len(values) * dst_stride)], addr=address, count=count,
            vectors=len(values), stride=stride, dst=dst, dst_stride=dst_stride,
        )  # fmt: skip

    def write(self, src: int, stride: int, vectors: int, elements: int) -> None:
        """VB rows to the results."""
        count = -(-elements // self.config.vector_lanes)
        size = -(-4 * count * self.config.vector_lanes // WORD_BYTES) * WORD_BYTES
        self.builder.emit(
            Op.WRITE, "result", [Span("vb", src, src + vectors * stride)], [], addr=self._output, count=count,
            vectors=vectors, stride=size, dst=src, dst_stride=stride,
        )  # fmt: skip
        self._output += size * vectors

    def vector(self, op: Op, width: int, count: int, vectors: int, **fields: int) -> None:
        """A vector operation from bank 0 (and 1) to bank 2, `width` words a vector."""
        b = [Span("vb", self.bank(1), self.bank(2))]
        self.builder.emit(
            op, op.name.lower(), [Span("vb", 0, self.bank(1)), *b], [Span("vb", self.bank(2), self.bank(3))],
            **{"addr": 0, "stride": width, "addr_b": self.bank(1), "count": count, "vectors": vectors,
               "dst": self.bank(2), "dst_stride": width, **fields},
        )  # fmt: skip

    def quant(self, address: int, width: int, count: int, vectors: int, **fields: int) -> None:
        """Vectors to A8 words 0 on and scales 0 on."""
        self.builder.emit(
            Op.QUANT, "quant", [Span("vb", address, address + vectors * width)],
            [Span("act", 0, 1), Span("table", 0, 1)],
            **{"addr": address, "stride": width, "count": count, "vectors": vectors, "dst": 0,
               "dst_stride": 2 * self.act_words(count), "table": 0, **fields},
        )  # fmt: skip

    @staticmethod
    def act_words(count: int) -> int:
        return -(-count // 64)

    def q16(self, *shape: int) -> np.ndarray:
        """Activations around one, some large."""
        return np.round(self.random.standard_normal(shape) * 65536 * self.random.choice([1, 1, 1, 20], shape))

    def work(self) -> Work:
        instructions = tuple(self.builder.finish())
        raw = b"".join(i.word().to_bytes(32, "little") for i in instructions)
        self.aux[: len(raw)] = np.frombuffer(raw, np.uint8)
        return Work(instructions, self.channels, self.aux)


# --- products ----------------------------------------------------------------------------------------------
@lru_cache(maxsize=64)
def _weights(config: EngineConfig, name: str, group: int, rows: int, inner: int) -> np.ndarray:
    """Random weights of a format as channel words."""
    random = np.random.default_rng(rows * inner + group)
    stream = weight_stream(name, group)
    kept = inner // 2 if stream.codes is Codes.S24 else inner
    scale = random.uniform(0.001, 0.02, (rows, inner // group)).astype("<f2")
    minimum = (-scale * 2).astype("<f2").view(np.uint16) if stream.minimum else None
    pattern = (
        random.integers(0, 6, (rows, inner // 4)).astype(np.uint8) if stream.codes is Codes.S24 else None
    )
    codes = random.integers(0, 1 << stream.codes.bits, (rows, kept)).astype(np.uint8)
    return pack_matrix(config, stream, Fields(codes, scale.view(np.uint16), minimum, pattern))


def _product(bench: _Bench, dst: int, accumulate: int = 0) -> None:
    name, _, group = bench.cell.format.split()
    rows, inner = bench.cell.shape
    stream = weight_stream(name, int(group))
    bench.channels = _weights(bench.config, name, int(group), rows, inner)
    blocks, batch = -(-rows // bench.config.lanes), bench.cell.batch
    out = Span("vb", dst, dst + batch * bench.words(rows))
    bench.builder.emit(Op.LOAD, "weights", addr=0, count=bench.channels.shape[1], runs=1)
    bench.builder.emit(
        Op.MATRIX, "linear", [Span("act", 0, 1), Span("table", 0, 1), *([out] if accumulate else [])], [out],
        **stream_fields(stream), accumulate=accumulate, count=blocks, steps=inner // stream.codes.step, vectors=batch,
        addr=0, stride=bench.act_words(inner), table=0, dst=dst, dst_stride=bench.words(rows),
    )  # fmt: skip
    bench.write(dst, bench.words(rows), batch, rows)


def _linear(bench: _Bench) -> None:
    (rows, inner), batch = bench.cell.shape, bench.cell.batch
    width = bench.words(inner)
    bench.read(bench.q16(batch, inner), 0, width)
    if "residual" in bench.cell.operator:
        bench.read(bench.q16(batch, rows), bench.bank(3), bench.words(rows))
        bench.quant(0, width, inner, batch)
        _product(bench, bench.bank(3), accumulate=1)
    elif "norm" in bench.cell.operator:
        _norm_of(bench, width, inner, batch)
        bench.quant(bench.bank(2), width, inner, batch, fresh=1)
        _product(bench, bench.bank(3))
    else:
        bench.quant(0, width, inner, batch)
        _product(bench, bench.bank(3))


# --- vectors -----------------------------------------------------------------------------------------------
def _norm_of(bench: _Bench, width: int, count: int, batch: int) -> None:
    bench.read(bench.random.integers(-(1 << 14), 1 << 14, (1, count)), bench.bank(1), width)
    bench.vector(Op.NORM, width, count, batch, exponent=10, epsilon=1 << 20)


def _elementwise(bench: _Bench) -> None:
    (count,), batch = bench.cell.shape, bench.cell.batch
    width = bench.words(count)
    bench.read(bench.q16(batch, count), 0, width)
    if bench.cell.operator == "norm":
        _norm_of(bench, width, count, batch)
    else:
        bench.read(bench.q16(batch, count), bench.bank(1), width)
        bench.vector(Op[bench.cell.operator.upper()], width, count, batch, stride_b=width)
    bench.write(bench.bank(2), width, batch, count)


def _rope(bench: _Bench) -> None:
    heads, size = bench.cell.shape
    width = size // bench.config.vector_lanes
    bench.read(bench.q16(heads, size), 0, width)
    angle = bench.random.uniform(0, 6.28, size // 2)
    row = np.stack([np.cos(angle), np.sin(angle)], -1).reshape(1, -1)
    bench.read(np.round(row * (1 << 14)), bench.bank(1), width)
    bench.vector(Op.ROPE, width, size, heads)
    bench.write(bench.bank(2), width, heads, size)


def _copy(bench: _Bench) -> None:
    (words,), batch = bench.cell.shape, bench.cell.batch
    elements = words * bench.config.vector_lanes
    bench.read(bench.q16(batch, elements), 0, words)
    bench.write(0, words, batch, elements)


# --- KV cache ----------------------------------------------------------------------------------------------
def _layout(bench: _Bench, size: int) -> KVLayout:
    return KVLayout(bench.config, int(bench.cell.format[2:]), size, SLOTS)


def _half_pairs(random: np.random.Generator, count: int) -> np.ndarray:
    """uint8 [count, 4]: scale and minimum of a slot."""
    scale = random.uniform(0.01, 0.3, count).astype("<f2")
    return np.stack([scale, (-scale * 7).astype("<f2")], -1).view(np.uint8)


def _cache(bench: _Bench, layout: KVLayout) -> None:
    """Random keys, then values, in every slot."""
    random, config = bench.random, bench.config
    words = layout.key_words + layout.value_words
    bench.channels = random.integers(0, 256, (config.channels, words, WORD_BYTES), np.uint8)
    lanes = config.lanes_per_channel
    for word in range(0, layout.key_words, layout.key_block_words):
        pairs = _half_pairs(random, config.channels * lanes).reshape(config.channels, lanes * 4)
        bench.channels[:, word] = 0
        bench.channels[:, word, : lanes * 4] = pairs


def _attention(bench: _Bench) -> None:
    """Queries [batch, group] of one KV head over a cache: token t sees the slots up to its own."""
    (group, size), tokens, end = bench.cell.shape, bench.cell.batch, bench.cell.sequence
    config, layout = bench.config, _layout(bench, size)
    _cache(bench, layout)
    vectors, width, scale = tokens * group, size // config.vector_lanes, ScoreScale.of(size)
    bench.read(bench.q16(vectors, size), 0, width)
    slots = np.frombuffer(_half_pairs(bench.random, SLOTS).tobytes(), "<i4")[None]
    bench.read(slots, bench.bank(1), SLOTS // config.vector_lanes)
    bench.quant(0, width, size, vectors, factor=scale.mantissa, exponent=scale.exponent & EXPONENT_MASK)
    blocks, score_words = -(-end // config.lanes), SLOTS // config.vector_lanes
    kv = int(Codes.U4 if layout.bits == 4 else Codes.U8)
    emit, scores = bench.builder.emit, bench.bank(3)
    emit(Op.LOAD, "keys", addr=0, count=blocks * layout.key_block_words, runs=1)
    emit(
        Op.MATRIX, "keys", [Span("act", 0, 1), Span("table", 0, 1)], [Span("vb", scores, bench.bank(4))], codes=kv,
        scaled=1, minimum=1, group_steps=size // STEP, count=blocks, steps=size // STEP, vectors=vectors, addr=0,
        stride=bench.act_words(size), table=0, dst=scores, dst_stride=score_words,
    )  # fmt: skip
    tiles, p8 = -(-end // ATTN_TILE), config.act_words // 2
    for t in range(tokens):
        first = t * group
        emit(
            Op.SOFTMAX, "softmax", [Span("vb", scores, bench.bank(4)), Span("vb", bench.bank(1), bench.bank(2))],
            [Span("act", p8, p8 + 1), Span("table", 32, 33)], addr=scores + first * score_words, stride=score_words,
            addr_b=bench.bank(1), count=end - tokens + t + 1, vectors=group, dst=2 * (p8 + first * (SLOTS // 64)),
            dst_stride=2 * (SLOTS // 64), table=32 + first, vec_group=group, high=0xFFFF,
        )  # fmt: skip
    run = value_stream(layout.bits).words_per_block(config, tiles)
    out = layout.value_blocks * config.lanes // config.vector_lanes
    emit(
        Op.LOAD,
        "values",
        addr=layout.key_words,
        count=run,
        runs=layout.value_blocks,
        stride=layout.value_block_words,
    )
    emit(
        Op.MATRIX, "values", [Span("act", p8, p8 + 1), Span("table", 32, 33)], [Span("vb", bench.bank(2), scores)],
        codes=kv, values=1, group_steps=1, count=tiles, steps=layout.value_blocks, vectors=vectors, addr=p8,
        stride=SLOTS // 64, table=32, dst=bench.bank(2), dst_stride=out, vec_rows=size,
    )  # fmt: skip
    bench.write(bench.bank(2), out, vectors, size)


def _append(bench: _Bench) -> None:
    """Quantise and store vectors of one head behind others that a cache holds."""
    (size,), tokens, end = bench.cell.shape, bench.cell.batch, bench.cell.sequence
    layout, width = _layout(bench, size), size // bench.config.vector_lanes
    _cache(bench, layout)
    bench.read(bench.q16(tokens, size), 0, width)
    bench.builder.emit(
        Op.KVQUANT, "kvquant", [Span("vb", 0, tokens * width)], addr=0, stride=width, count=size, vectors=tokens,
        bits=layout.bits,
    )  # fmt: skip
    bits = layout.bits
    if bench.cell.operator == "append k":
        bench.builder.emit(
            Op.APPEND_K, "append", addr=end - tokens, count=tokens, bits=bits, head_size=size, base=0
        )
    else:
        bench.builder.emit(
            Op.APPEND_V, "append", addr=end - tokens, count=tokens, bits=bits, head_size=size, base=layout.key_words,
            block_words=layout.value_block_words, row=0, scale_base=OUTPUT,
        )  # fmt: skip


_BUILDERS: dict[str, Callable[[_Bench], None]] = {
    "linear": _linear,
    "linear onto residual": _linear,
    "norm and linear": _linear,
    "norm": _elementwise,
    "gate": _elementwise,
    "add": _elementwise,
    "rope": _rope,
    "attention": _attention,
    "append k": _append,
    "append v": _append,
    "read and write": _copy,
}
