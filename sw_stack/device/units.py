"""What each instruction does to the golden device's state, in the formats of docs/formats.md.

Vectors go through golden/ops.py as torch.int64; positions come from golden.spec.engine. Every address is checked
before anything is written, so a faulting instruction changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from golden import ops
from golden.spec.engine import (
    SOFTMAX_EMPTY,
    SOFTMAX_STATE,
    STEP,
    WORD_BITS,
    WORD_BYTES,
    Codes,
    Error,
    KVLayout,
    Op,
    StreamFormat,
)
from golden.spec.formats import (
    ACC_PRESHIFT,
    ATTN_TILE,
    FP16_FRAC,
    L_EXTRA_FRAC,
    P_CODE_BITS,
    P_FRAC,
    VEC_BITS,
    VEC_FRAC,
)
from sw_stack.device.state import EngineState, KVRecord, Loaded
from sw_stack.pack.stream import operands, unpack_matrix

Fields = dict[str, int]
A8_GROUPS_PER_WORD = 2
OUTPUT_SHIFT = 23
"""Post-shift of a normalised attention output (docs/formats.md section 8)."""


class UnitError(Exception):
    """A fault of one instruction; the device adds where."""

    def __init__(self, code: Error, what: str) -> None:
        self.code = code
        super().__init__(what)


def execute(state: EngineState, op: Op, fields: Fields) -> None:
    """Carry out one instruction."""
    _EXECUTE[op](state, fields)


def inputs_ready(state: EngineState, op: Op, fields: Fields) -> bool:
    """Whether the streams hold what the instruction takes."""
    if op is Op.MATRIX:
        if fields["follows"] and state.counted < _groups_followed(fields):
            return False
        return sum(part.words for part in state.loaded) >= _matrix_words(state, fields)
    if op in (Op.APPEND_K, Op.APPEND_V):
        return len(state.records) >= fields["count"]
    return True


# --- vector buffer ------------------------------------------------------------------------------------
def _vectors(state: EngineState, fields: Fields, which: str = "addr", stride: str = "stride") -> torch.Tensor:
    """Operand int64 [vectors, count]."""
    lanes, count = state.config.vector_lanes, fields["count"]
    starts = (fields[which] + np.arange(fields["vectors"]) * fields[stride]) * lanes
    if (
        count < 1
        or not len(starts)
        or starts[-1] + count > len(state.vb)
        or starts[0] + count > len(state.vb)
    ):
        raise UnitError(
            Error.ADDRESS, f"vectors of {count} elements at VB word {fields[which]} leave the buffer"
        )
    return torch.from_numpy(state.vb[starts[:, None] + np.arange(count)])


def _store(state: EngineState, fields: Fields, values: torch.Tensor, joins: int = 0) -> None:
    lanes = state.config.vector_lanes
    starts = (fields["dst"] + np.arange(len(values)) * fields["dst_stride"]) * lanes
    if starts.max() + values.shape[1] > len(state.vb):
        raise UnitError(Error.ADDRESS, f"results at VB word {fields['dst']} leave the buffer")
    state.vb[starts[:, None] + np.arange(values.shape[1])] = values.numpy()
    written = (
        fields["dst"],
        len(values),
        fields["dst_stride"] if len(values) > 1 else 0,
        values.shape[1],
    )
    state.fresh = _joined(state, written) if joins else written


def _joined(state: EngineState, written: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """`fresh` of an instruction that writes promises that it goes on where the one before ended its vectors."""
    first, *same, count = state.fresh or (0, 0, 0, 0)
    if (first + count // state.config.vector_lanes, *same) != written[
        :3
    ] or count % state.config.vector_lanes:
        raise UnitError(Error.SHAPE, f"vectors at {written} do not continue those of {state.fresh}")
    return (first, written[1], written[2], count + written[3])


def _check_fresh(state: EngineState, fields: Fields) -> None:
    """`fresh` promises that the instruction just before wrote exactly this operand."""
    stride = fields["stride"] if fields["vectors"] > 1 else 0
    mine = (fields["addr"], fields["vectors"], stride, fields["count"])
    if fields.get("fresh") and state.fresh != mine:
        raise UnitError(Error.SHAPE, f"fresh extremes are of {state.fresh}, not of {mine}")
    state.fresh = None


# --- memory units -------------------------------------------------------------------------------------
def _load(state: EngineState, f: Fields) -> None:
    last = f["addr"] + (f["runs"] - 1) * f["stride"] + f["count"]
    if last > state.channels.shape[1] or f["count"] < 1 or f["runs"] < 1:
        raise UnitError(
            Error.ADDRESS, f"channels have {state.channels.shape[1]} words; a load ends at {last}"
        )
    for run in range(f["runs"]):
        state.loaded.append(Loaded(f["addr"] + run * f["stride"], f["count"]))


def _dma(state: EngineState, f: Fields, write: bool) -> None:
    lanes = state.config.vector_lanes
    size = f["count"] * lanes
    for i in range(f["vectors"]):
        address, element = f["addr"] + i * f["stride"], (f["dst"] + i * f["dst_stride"]) * lanes
        if address % WORD_BYTES or address + 4 * size > len(state.aux) or element + size > len(state.vb):
            raise UnitError(Error.ADDRESS, f"{4 * size} bytes at {address:#x} and VB word {element // lanes}")
        memory = state.aux[address : address + 4 * size]
        if write:
            memory[:] = state.vb[element : element + size].astype("<i4").view(np.uint8)
        else:
            state.vb[element : element + size] = memory.view("<i4")


def _append_k(state: EngineState, f: Fields) -> None:
    layout = _layout(state, f)
    _check_turn(state, f)
    for slot, record in _taken(state, f):
        planes = _crumb_bytes(record.codes, f["bits"])
        for step in range(f["head_size"] // STEP):
            for plane in range(f["bits"] // 2):
                channel, word, bit = layout.key_code_position(slot, step * STEP, plane, f["turn"])
                at = state.channels[channel, f["base"] + word]
                at[bit // 8 : bit // 8 + STEP // 4] = planes[plane, step * STEP // 4 :][: STEP // 4]
        channel, word, bit = layout.key_scale_position(slot, f["turn"])
        pair = np.array([record.scale, record.minimum], "<u2").view(np.uint8)
        state.channels[channel, f["base"] + word, bit // 8 : bit // 8 + 4] = pair


def _append_v(state: EngineState, f: Fields) -> None:
    layout, per_channel = _layout(state, f), state.config.lanes_per_channel
    # Words between row blocks come with the instruction; the layout's own positions are inside a block.
    block, lane = np.divmod(f["row"] + np.arange(f["head_size"]), state.config.lanes)
    channel, place = np.divmod(lane, per_channel)
    for slot, record in _taken(state, f):
        for plane in range(f["bits"] // 2):
            _, word, bit = layout.value_code_position(slot, 0, plane)
            _, next_word, next_bit = layout.value_code_position(slot, 1, plane)
            lane_bits = (next_word - word) * WORD_BITS + next_bit - bit
            bits = word * WORD_BITS + bit + place * lane_bits
            at = (channel, f["base"] + block * f["block_words"] + bits // WORD_BITS, bits % WORD_BITS // 8)
            shift = (bits % 8).astype(np.uint8)
            two = (record.codes >> (2 * plane) & 3).astype(np.uint8) << shift
            state.channels[at] = state.channels[at] & ~(np.uint8(3) << shift) | two
        pair = np.array([record.scale, record.minimum], "<u2").view(np.uint8)
        state.aux[f["scale_base"] + 4 * slot :][:4] = pair


def _layout(state: EngineState, f: Fields) -> KVLayout:
    return KVLayout(state.config, f["bits"], f["head_size"], 1 << 16)


def _check_turn(state: EngineState, f: Fields) -> None:
    if f["turn"] >= state.config.turns:
        raise UnitError(Error.SHAPE, f"a row block has {state.config.turns} turns; got {f['turn']}")


def _taken(state: EngineState, f: Fields) -> list[tuple[int, KVRecord]]:
    records = [state.records.popleft() for _ in range(f["count"])]
    if any(len(r.codes) != f["head_size"] for r in records):
        raise UnitError(
            Error.SHAPE, f"appended vectors have {f['head_size']} elements; got others in the stream"
        )
    return [(f["addr"] + i, r) for i, r in enumerate(records)]


def _crumb_bytes(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [planes, dh / 4]: two bits of four neighbours per byte."""
    fours = codes.reshape(-1, 4).astype(np.uint8)
    shifts = 2 * np.arange(4, dtype=np.uint8)
    return np.stack(
        [np.bitwise_or.reduce((fours >> (2 * p) & 3) << shifts, axis=1) for p in range(bits // 2)]
    )


# --- matrix unit --------------------------------------------------------------------------------------
def _matrix_stream(f: Fields) -> StreamFormat:
    scaled, minimum, offset = (bool(f[name]) for name in ("scaled", "minimum", "offset"))
    return StreamFormat(Codes(f["codes"]), scaled, minimum, offset, f["group_steps"])


def _shape(f: Fields) -> tuple[int, int]:
    """(row blocks, steps): values swap the two."""
    return (f["steps"], f["count"]) if f["values"] else (f["count"], f["steps"])


def _matrix_words(state: EngineState, f: Fields) -> int:
    blocks, steps = _shape(f)
    return blocks * _matrix_stream(f).words_per_block(state.config, steps)


def _groups_followed(f: Fields) -> int:
    """Groups of codes that a row block reads."""
    return _shape(f)[1] * Codes(f["codes"]).step // STEP


def _matrix(state: EngineState, f: Fields) -> None:
    if f["follows"] and f["vectors"] != 1:
        raise UnitError(Error.SHAPE, f"a product follows the codes of one vector; got {f['vectors']}")
    if not 1 <= f["vectors"] <= state.config.tokens:
        raise UnitError(
            Error.SHAPE, f"the array passes 1 to {state.config.tokens} vectors; got {f['vectors']}"
        )
    _check_turn(state, f)
    blocks, steps = _shape(f)
    weights = _weights(state, f, blocks, steps)
    groups = (
        f["addr"] * A8_GROUPS_PER_WORD + np.arange(f["vectors"])[:, None] * f["stride"] * A8_GROUPS_PER_WORD
    )
    groups = groups + np.arange(weights.shape[1] // STEP)
    if groups.max() >= len(state.act):
        raise UnitError(Error.ADDRESS, f"activations at A8 word {f['addr']} leave the buffer")
    codes = torch.from_numpy(state.act[groups].reshape(f["vectors"], -1))
    sides = torch.from_numpy(state.sides[groups])
    acc = _value_products(weights, codes, sides) if f["values"] else ops.accumulate(codes, weights)
    entries = torch.from_numpy(state.table[f["table"] : f["table"] + f["vectors"]])
    pre, mult, post = entries[:, 0], entries[:, 1], entries[:, 2]
    y = ops.sat(ops.rnd_shift(ops.rnd_shift(acc, pre[:, None]) * mult[:, None], post[:, None]), VEC_BITS)
    _drain(state, f, y.numpy())
    if f["collect"]:
        _collect(state, f, y.shape[1])
    state.counted -= _groups_followed(f) * f["follows"]


def _weights(state: EngineState, f: Fields, blocks: int, steps: int) -> torch.Tensor:
    """float64 [rows, K] of integers, taken from the loaded words."""
    need, parts = _matrix_words(state, f), []
    while need > 0:
        part = state.loaded.popleft()
        take = min(need, part.words)
        parts.append(Loaded(part.start, take))
        if take < part.words:
            state.loaded.appendleft(Loaded(part.start + take, part.words - take))
        need -= take
    key = (parts[0].start, need, blocks, steps, f["codes"], f["group_steps"])
    constant = len(parts) == 1 and parts[0].start + parts[0].words <= state.constant_words
    if constant and key in state.decoded:
        return state.decoded[key]
    words = np.concatenate([state.channels[:, p.start : p.start + p.words] for p in parts], 1)
    integers = _integers(state, f, words, steps)
    if constant:
        state.decoded[key] = integers
    return integers


def _integers(state: EngineState, f: Fields, words: np.ndarray, steps: int) -> torch.Tensor:
    stream = _matrix_stream(f)
    fields = unpack_matrix(state.config, stream, words, steps)
    codes = operands(stream, fields).astype(np.float64)
    if not stream.scaled:
        return torch.from_numpy(codes)
    assert fields.scale is not None
    width = stream.group_steps * stream.codes.step
    scale = _int24(fields.scale).repeat(width, 1)[:, : codes.shape[1]]
    codes *= scale
    if fields.minimum is not None:
        codes += _int24(fields.minimum).repeat(width, 1)[:, : codes.shape[1]]
    return torch.from_numpy(codes)


def _int24(bits: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(bits).view(np.float16).astype(np.float64) * (1 << FP16_FRAC)


def _value_products(weights: torch.Tensor, codes: torch.Tensor, sides: torch.Tensor) -> torch.Tensor:
    """int64 [vectors, rows]: acc = (acc >> decay) + (dot << shift) + addend, tile by tile."""
    tiles = weights.shape[1] // STEP
    dots = torch.einsum(
        "vtk,rtk->vtr", codes.double().unflatten(1, (tiles, STEP)), weights.unflatten(1, (tiles, STEP))
    ).long()
    acc = torch.zeros(len(codes), len(weights), dtype=torch.int64)
    for t in range(tiles):
        addend, shift, decay = (sides[:, t, i, None] for i in range(3))
        acc = (acc >> decay) + (dots[:, t] << shift) + addend
    return acc


def _drain(state: EngineState, f: Fields, y: np.ndarray) -> None:
    lanes = state.config.vector_lanes
    y = y.reshape(len(y), -1, state.config.turns, lanes)[:, :, np.arange(state.config.turns) ^ f["turn"]]
    for v, row in enumerate(y.reshape(len(y), -1)):
        if f["vec_group"]:
            first = v // f["vec_group"] * f["vec_rows"]
            row = row[first : first + f["vec_rows"]]
        start = (f["dst"] + v * f["dst_stride"]) * lanes
        if start + len(row) > len(state.vb):
            raise UnitError(Error.ADDRESS, f"product rows at VB word {f['dst']} leave the buffer")
        old = state.vb[start : start + len(row)]
        limit = 1 << (VEC_BITS - 1)
        old[:] = np.clip(row + old, -limit, limit - 1) if f["accumulate"] else row


def _collect(state: EngineState, f: Fields, rows: int) -> None:
    """A product's results as one vector for `fresh`: they must lie behind each other."""
    rows = f["vec_rows"] if f["vec_group"] else rows
    if f["vectors"] > 1 and f["dst_stride"] * state.config.vector_lanes != rows:
        raise UnitError(Error.SHAPE, f"collected results of {rows} rows lie {f['dst_stride']} words apart")
    written = (f["dst"], 1, 0, rows * f["vectors"])
    state.fresh = _joined(state, written) if f["joins"] else written


# --- vector unit --------------------------------------------------------------------------------------
def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def _norm(state: EngineState, f: Fields) -> None:
    x, w = _vectors(state, f), _vectors(state, f, "addr_b", "stride_b")
    _check_fresh(state, f)
    weight = ops.NormWeight(w, _signed(f["exponent"], 6), f["epsilon"])
    _store(state, f, ops.rmsnorm(x, weight))


def _quant(state: EngineState, f: Fields) -> None:
    x = _vectors(state, f)
    _check_fresh(state, f)
    x = ops.relu(x) if f["rectify"] else x
    a8 = ops.quantise_a8(x)
    mult, post = a8.mantissa, -a8.exponent
    if f["factor"]:
        mult, post = ops.rnd_shift(mult * f["factor"], 16), post - 16 + f["exponent"]
    groups = -(-f["count"] // STEP)
    padded = torch.nn.functional.pad(a8.codes, (0, groups * STEP - f["count"])).unflatten(1, (groups, STEP))
    sides = np.zeros((len(x), groups, 3), np.int64)
    sides[..., 0] = padded.sum(-1).numpy()
    if f["counted"] and len(x) != 1:
        raise UnitError(Error.SHAPE, f"a product follows the codes of one vector; got {len(x)}")
    _store_act(state, f, padded.numpy().astype(np.int8), sides)
    state.counted += groups * f["counted"]
    _store_table(state, f, torch.stack([torch.full_like(mult, ACC_PRESHIFT), mult, post], 1))


def _store_act(state: EngineState, f: Fields, codes: np.ndarray, sides: np.ndarray) -> None:
    at = f["dst"] + np.arange(len(codes))[:, None] * f["dst_stride"] + np.arange(codes.shape[1])
    if at.max() >= len(state.act):
        raise UnitError(Error.ADDRESS, f"codes at A8 group {f['dst']} leave the buffer")
    state.act[at], state.sides[at] = codes, sides


def _store_table(state: EngineState, f: Fields, entries: torch.Tensor) -> None:
    if f["table"] + len(entries) > len(state.table):
        raise UnitError(Error.ADDRESS, f"the table has {len(state.table)} entries; got entry {f['table']}")
    state.table[f["table"] : f["table"] + len(entries)] = entries.numpy()


def _rope(state: EngineState, f: Fields) -> None:
    x, row = _vectors(state, f), _vectors(state, f, "addr_b", "stride_b")
    _store(state, f, ops.rope(x, row[:, 0::2], row[:, 1::2]), f.get("fresh", 0))


def _gate(state: EngineState, f: Fields) -> None:
    _store(
        state,
        f,
        ops.gate_product(_vectors(state, f), _vectors(state, f, "addr_b", "stride_b")),
        f.get("fresh", 0),
    )


def _add(state: EngineState, f: Fields) -> None:
    _store(
        state,
        f,
        ops.residual(_vectors(state, f), _vectors(state, f, "addr_b", "stride_b")),
        f.get("fresh", 0),
    )


def _kvquant(state: EngineState, f: Fields) -> None:
    x = _vectors(state, f)
    _check_fresh(state, f)
    kv = ops.quantise_kv(x, f["bits"])
    scales, minima = (t.numpy().astype(np.float16).view(np.uint16) for t in (kv.scale, kv.minimum))
    for codes, scale, minimum in zip(kv.codes.numpy().astype(np.uint8), scales, minima, strict=True):
        state.records.append(KVRecord(codes, int(scale), int(minimum)))


def _softmax(state: EngineState, f: Fields) -> None:
    """Online softmax of section 8, tile by tile, with the codes that the value product needs."""
    z, records = _vectors(state, f), _vectors(state, f, "addr_b", "stride_b")
    slots, tiles = f["count"], -(-f["count"] // ATTN_TILE)
    s, token = torch.arange(slots), torch.arange(len(z))[:, None] // max(1, f["vec_group"])
    low = f["low"] - (f["low"] >> 15 << 16)  # signed: a window may reach back before slot 0
    sinks = (f["sinks"] + f["sinks_live"]) & 0xFFF
    live = (s < sinks) | ((s >= low + token) & (s < f["high"] + token))
    pad = tiles * ATTN_TILE - slots
    z, live, records = (torch.nn.functional.pad(x, (0, pad)) for x in (z, live, records))
    scale, minimum = (
        torch.from_numpy(_int24((records >> shift & 0xFFFF).numpy().astype(np.uint16))).long()
        for shift in (0, 16)
    )
    codes = np.zeros((len(z), tiles, STEP), np.int8)
    sides = np.zeros((len(z), tiles, 3), np.int64)
    totals = [_softmax_vector(z[v], live[v], scale[v], minimum[v], codes[v], sides[v]) for v in range(len(z))]
    _check_states(state, f)
    _store_act(state, f, codes, sides)
    _store_table(state, f, torch.tensor([_output_scale(total) for _, total in totals]))
    if f["export"]:
        _export_states(state, f, totals)


def _check_states(state: EngineState, f: Fields) -> None:
    if f["export"] and f["state"] + f["vectors"] > state.config.vb_words:
        raise UnitError(Error.ADDRESS, f"softmax states at VB word {f['state']} leave the buffer")


def _export_states(state: EngineState, f: Fields, totals: list[tuple[int, int]]) -> None:
    """SOFTMAX_STATE of each vector into the first elements of its word."""
    lanes = state.config.vector_lanes
    for v, (maximum, total) in enumerate(totals):
        words = np.array([maximum, total & 0xFFFFFFFF, total >> 32], np.int64).astype(np.int32)
        state.vb[(f["state"] + v) * lanes :][: len(SOFTMAX_STATE)] = words


def _softmax_vector(
    z: torch.Tensor,
    live: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor,
    codes: np.ndarray,
    sides: np.ndarray,
) -> tuple[int, int]:
    """Fill one vector's codes [tiles, 32] and sidecars [tiles, 3]; its maximum and sum."""
    top, total = None, 0
    for t in range(len(codes)):
        at = slice(t * ATTN_TILE, (t + 1) * ATTN_TILE)
        if not live[at].any():
            continue
        ceiling = -(-int(z[at][live[at]].max()) >> VEC_FRAC)
        new = ceiling if top is None else max(top, ceiling)
        decay = 63 if top is None else min(new - top, 63)
        p = torch.where(live[at], ops.exp2_neg(((new << VEC_FRAC) - z[at]).clamp(min=0)), 0)
        total = (total >> decay) + (int(p.sum()) << L_EXTRA_FRAC)
        w = p * scale[at]
        sh = max(int(w.max()).bit_length() - P_CODE_BITS, P_FRAC)
        codes[t] = ops.rnd_shift(w, sh).clamp(max=127).numpy()
        addend = int(ops.rnd_shift((p * minimum[at]).sum(), P_FRAC))
        sides[t] = (addend, sh - P_FRAC, decay)
        top = new
    return SOFTMAX_EMPTY if top is None else top, total


def _output_scale(total: int) -> tuple[int, int, int]:
    """Table entry (g, rl, 23) of a softmax sum."""
    if not total:
        return 0, 0, OUTPUT_SHIFT
    bits = total.bit_length()
    return bits - 31, ((1 << 31) - 1) // (total >> (bits - 16)), OUTPUT_SHIFT


_EXECUTE: dict[Op, Callable[[EngineState, Fields], None]] = {
    Op.LOAD: _load,
    Op.MATRIX: _matrix,
    Op.NORM: _norm,
    Op.QUANT: _quant,
    Op.ROPE: _rope,
    Op.GATE: _gate,
    Op.SOFTMAX: _softmax,
    Op.KVQUANT: _kvquant,
    Op.ADD: _add,
    Op.READ: lambda state, f: _dma(state, f, write=False),
    Op.WRITE: lambda state, f: _dma(state, f, write=True),
    Op.APPEND_K: _append_k,
    Op.APPEND_V: _append_v,
}
