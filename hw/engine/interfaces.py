"""Typed boundaries between the engine's blocks: docs/engine.md draws how they meet.

Every stream follows the valid/ready rules of `amaranth.lib.stream`. A `Request`-style port (vector buffer) is
granted in the cycle in which `en & rdy`; read data is on `data` in the cycle after the grant and only then.
"""

from amaranth import signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.engine import STEP, TURN_BITS, WORD_BITS, EngineConfig

VB_ADDR = 20
"""Address bits of a VB word (Q16 elements, `vector_lanes` of them, element 0 in the low bits)."""
GROUP_ADDR = 17
"""Address bits of an activation group of 32 (half an A8 word): group g is half g & 1 of word g >> 1."""
TABLE_ADDR = 8


def word_stream():
    """64-byte memory words: one per weight channel into the array."""
    return stream.Signature(unsigned(WORD_BITS))


def vb_read(config: EngineConfig):
    """Read port of the vector buffer, seen from the reader."""
    return wiring.Signature(
        {
            "en": Out(1),
            "addr": Out(VB_ADDR),
            "rdy": In(1),
            "data": In(32 * config.vector_lanes),
        }
    )


def vb_write(config: EngineConfig):
    """Write port of the vector buffer, seen from the writer. `mask` enables elements."""
    return wiring.Signature(
        {
            "en": Out(1),
            "addr": Out(VB_ADDR),
            "data": Out(32 * config.vector_lanes),
            "mask": Out(config.vector_lanes),
            "rdy": In(1),
        }
    )


class GroupSide(data.Struct):
    """Sidecar of 32 activation codes (64 bits).

    QUANT writes `addend` = sum of the 32 codes (signed), `shift` = `decay` = 0. SOFTMAX writes, per tile,
    `addend` = rnd_shift(sum p * int24(vmin), 15), `shift` = sh - 15, `decay` = min(d, 63).
    """

    addend: signed(52)
    shift: 6
    decay: 6


def act_write():
    """Write port of the A8 buffer, seen from the writer; always accepted. One group of 32 int8 codes.

    `counted`: the group is one of those that a product `follows`.
    """
    return wiring.Signature(
        {
            "en": Out(1),
            "addr": Out(GROUP_ADDR),
            "codes": Out(8 * STEP),
            "side": Out(GroupSide),
            "counted": Out(1),
        }
    )


def collected(config: EngineConfig):
    """A VB word that a collecting product writes, seen from the drain; always accepted.

    `last` of its row block, whose extremes join those before if it `joins`.
    """
    return wiring.Signature(
        {"en": Out(1), "data": Out(32 * config.vector_lanes), "last": Out(1), "joins": Out(1)}
    )


class OutputScale(data.Struct):
    """y = sat(rnd_shift(rnd_shift(acc, pre) * mult, post), 32): how a drained accumulator becomes Q16.

    QUANT writes (8, sm, -se), or with a factor C for attention queries (8, rnd_shift(sm * C, 16), -se - 16 + e_C);
    SOFTMAX writes (g, rl, 23).
    """

    pre: 6
    mult: 17
    post: 6


def table_write():
    """Write port of the output scale table, seen from the writer; always accepted."""
    return wiring.Signature({"en": Out(1), "addr": Out(TABLE_ADDR), "entry": Out(OutputScale)})


class VectorOp(data.Struct):
    """A decoded vector instruction; fields as in golden.spec.engine.FIELDS, registers already added."""

    op: 8
    addr: 20
    count: 16
    vectors: 8
    stride: 16
    addr_b: 20
    stride_b: 16
    dst: 20
    dst_stride: 16
    table: 8
    fresh: 1
    exponent: 6
    epsilon: 48
    factor: 16
    vec_group: 5
    sinks: 12
    low: 16
    high: 16
    export: 1
    state: VB_ADDR
    bits: 4
    rectify: 1
    counted: 1


def kv_record(config: EngineConfig):
    """A beat of a quantised K or V vector: `vector_lanes` codes; every beat carries the vector's scale and minimum."""
    return data.StructLayout(
        {
            "codes": data.ArrayLayout(unsigned(8), config.vector_lanes),
            "scale": 16,
            "minimum": 16,
            "last": 1,
        }
    )


class LoadOp(data.Struct):
    """`runs` runs of `count` words, `stride` words apart, from word `addr` of every weight channel alike."""

    addr: 32
    count: 24
    runs: 16
    stride: 24


class DmaOp(data.Struct):
    """`vectors` vectors of `count` VB words between auxiliary memory and the vector buffer.

    Memory: byte address addr + i * stride (stride in bytes), 64-byte aligned. VB: word dst + i * dst_stride.
    A VB word is `4 * vector_lanes` bytes of little-endian int32; the last memory word of a vector may be partial.
    """

    write: 1
    addr: 32
    count: 16
    vectors: 8
    stride: 24
    dst: 20
    dst_stride: 16


class AppendOp(data.Struct):
    """Write `count` K or V vectors of the `kv_record` stream to slots addr, addr + 1, ...

    `base` and `scale_base` and the positions are those of golden.spec.engine.KVLayout: `base` is a channel word,
    `block_words` its `value_block_words`, `row` the head's first row in its block (values), `scale_base` the auxiliary
    byte address of slot 0's V scale record, `turn` that of the head's row blocks (keys).
    """

    values: 1
    addr: 16
    count: 8
    bits: 4
    head_size: 9
    base: 32
    block_words: 24
    row: 9
    scale_base: 32
    turn: TURN_BITS


def unit_port(op):
    """A unit's command port, seen from the controller.

    `done` pulses once per finished op, in order; `error` is sticky (golden.spec.engine.Error).
    """
    return wiring.Signature({"op": Out(stream.Signature(op)), "done": In(1), "error": In(4)})


class MatrixOp(data.Struct):
    """A decoded matrix instruction; fields as in golden.spec.engine.FIELDS, registers already added.

    `blocks` row blocks of `steps` steps. The controller swaps `count` and `steps` when `values` is set.
    """

    codes: 2
    scaled: 1
    minimum: 1
    offset: 1
    values: 1
    accumulate: 1
    group_steps: 4
    blocks: 16
    steps: 16
    vectors: 5
    addr: 16
    stride: 12
    table: 8
    dst: 20
    dst_stride: 16
    vec_group: 5
    vec_rows: 9
    follows: 1
    collect: 1
    joins: 1
    turn: TURN_BITS
