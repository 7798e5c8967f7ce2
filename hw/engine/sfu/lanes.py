"""The lane array: one pipeline of two multipliers per lane that every vector operation shares.

A word of L elements enters per cycle, with the operation in its control field; `latency` cycles later the result
leaves. The multipliers are 32 x 18 bit, two DSP48E2 each; a third one serves the gate alone, whose second factor has
32 bits. Writing `rs` for `rnd_shift`:

    stage 1   p = rs(x1 * m1, n1)          x1, m1 chosen by the operation
    stage 2   y = sat(rs(p + x2 * m2, n2), 32)

| operation | x1 * m1, n1            | x2 * m2           | n2    | result |
|-----------|------------------------|-------------------|-------|--------|
| scale     | a * m1, n1             | none              | 0     | A8 codes; a copy with m1 = 1, n1 = 0 |
| square    | a * 1, n1              | p * p (p dropped) | 0     | squares for RMSNorm |
| norm      | a * m1, n1             | p * b (p dropped) | n2    | RMSNorm, b is w' |
| rope      | a * cos, 0             | partner * (-)sin  | 14    | b holds cos in even lanes, sin in odd ones |
| gate      | a * sigmoid(a), 16     | p * (b >> 16) + rs(p * low(b), 16) | 0 | silu(a) * b, low(b) = b mod 2**16 |
| add       | a * 1, 0               | b * 1             | 0     | a + b |
| kv        | (sat(a, 26) - m0) * m1, n1, clamped to 0..2**bits - 1 | none | 0 | KV codes |
"""

from amaranth import Cat, Const, EnableInserter, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, enum, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.spec import formats
from hw.engine.sfu import tables
from hw.lib import arith
from hw.lib.pipeline import Pipe
from hw.lib.streams import check_count

VEC = signed(formats.VEC_BITS)
FACTOR_BITS = 18
"""Second operand of each multiplier, signed: one side of a DSP48E2."""
SPLIT = 17
"""The 32-bit operand enters two DSPs as 17 low bits, unsigned, and the rest, signed."""
N1_BIAS = 6
"""Shift counts travel biased: RMSNorm of a tiny vector shifts left by as much as this (V = 1 gives n1 = -6)."""
P_BITS = formats.VEC_BITS + FACTOR_BITS
COARSE = 8
"""A shifter takes two cycles: multiples of this, then the rest with the rounding."""
OFFSET_BITS = formats.KV_CLIP_BITS + 1
"""An fp16-rounded minimum reaches +512.0 itself, one more than the clipped range."""


class LaneOp(enum.Enum, shape=3):
    """What a word of lanes undergoes; see the table above."""

    SCALE = 0
    SQUARE = 1
    NORM = 2
    ROPE = 3
    GATE = 4
    ADD = 5
    KV = 6


class LaneControl(data.Struct):
    """Per word: the operation and what it broadcasts to all lanes.

    `m1` unsigned 17 bit factor; `n1` shift plus `N1_BIAS`; `n2` second shift; `m0` KV minimum in Q16;
    `wide` chooses 8-bit KV codes.
    """

    op: LaneOp
    m1: unsigned(17)
    n1: unsigned(6)
    n2: unsigned(6)
    m0: signed(OFFSET_BITS)
    wide: unsigned(1)


def lane_word(lanes: int, tag) -> data.StructLayout:
    """Input payload: operands `a`, `b` (L x signed 32), control, and a tag that travels along."""
    words = data.ArrayLayout(VEC, lanes)
    return data.StructLayout({"a": words, "b": words, "control": LaneControl, "tag": tag})


def lane_result(lanes: int, tag) -> data.StructLayout:
    """Output payload: `y` (L x signed 32) and the tag of its word."""
    return data.StructLayout({"y": data.ArrayLayout(VEC, lanes), "tag": tag})


class Sigmoid(wiring.Component):
    """`sg = sigmoid(a)` of docs/formats.md section 9, 17 bit, 1.0 = 2**16; `latency` cycles, one value per cycle.

    No handshake: the pipeline around it owns the clock enable.
    """

    a: In(VEC)
    sg: Out(unsigned(17))

    latency = 4

    def elaborate(self, platform):
        m = Module()
        p = Pipe(m)
        table = tables.sigmoid_table()
        entry = data.StructLayout({"base": unsigned(16), "rise": unsigned(11)})
        rows = [{"base": low, "rise": high - low} for low, high in zip(table, table[1:])]
        m.submodules.table = rom = memory.Memory(shape=entry, depth=len(rows), init=rows)
        read = rom.read_port()

        magnitude = p.reg(arith.absolute(self.a), "magnitude")
        fraction_bits = formats.VEC_FRAC + formats.SIGMOID_RANGE_LOG2 - formats.SIGMOID_SEGMENTS_LOG2
        m.d.comb += [read.addr.eq(magnitude[fraction_bits : fraction_bits + 8]), read.en.eq(1)]
        top = magnitude[(tables.SIGMOID_LIMIT - 1).bit_length() :].any()
        base = p.reg(Mux(p.reg(top, "top"), tables.SIGMOID_ONE - 1, read.data.base), "base")
        fraction = p.reg(magnitude[:fraction_bits], "fraction")
        rise = p.reg(Mux(p.reg(top, "top_rise"), 0, read.data.rise) * fraction, "rise")
        negative = p.reg(self.a[-1], "negative", 3)
        positive = Signal(unsigned(17))
        m.d.comb += positive.eq(base + arith.rnd_shift(rise, fraction_bits))
        m.d.comb += self.sg.eq(p.reg(Mux(negative, tables.SIGMOID_ONE - positive, positive), "sg")[:17])
        return m


class _Multiply:
    """`x * factor` in two cycles on two DSPs: 17 low bits and the rest, then their sum."""

    cycles = 2

    @staticmethod
    def build(p: Pipe, name: str, x, factor):
        low = p.reg(Cat(x[:SPLIT], Const(0, 1)).as_signed() * factor, f"{name}_low")
        high = p.reg(x[SPLIT:].as_signed() * factor, f"{name}_high")
        return p.reg(arith.resize(low + arith.shift_left(high, SPLIT), P_BITS), f"{name}_product")


class LanePair(wiring.Component):
    """Two neighbouring lanes (a rotation pair of RoPE) without handshake; one word per cycle, `latency` cycles."""

    a: In(VEC).array(2)
    b: In(VEC).array(2)
    control: In(LaneControl)
    y: Out(VEC).array(2)

    first_cycles = 4 + _Multiply.cycles + 2
    """From the operands to `p`."""
    latency = first_cycles + 1 + _Multiply.cycles + 1 + 3

    def elaborate(self, platform):
        m = Module()
        control = [self.control]
        for cycle in range(self.latency):
            delayed = Signal(LaneControl, name=f"control_{cycle}", reset_less=True)
            m.d.sync += delayed.eq(control[-1])
            control.append(delayed)
        for lane in range(2):
            sigmoid = Sigmoid()
            m.submodules[f"sigmoid_{lane}"] = sigmoid
            m.d.comb += sigmoid.a.eq(self.a[lane])
            self._lane(m, lane, sigmoid.sg, control)
        return m

    def _lane(self, m: Module, lane: int, sg, control: list) -> None:
        p = Pipe(m, f"l{lane}_")
        a, partner, b = self.a[lane], self.a[1 - lane], self.b[lane]

        # Operands of the first product. Sigmoid takes four cycles, and everything else waits for it.
        clipped = p.reg(arith.saturate(a, formats.KV_CLIP_BITS), "clipped")
        offset = p.reg(clipped - control[1].m0, "offset", 2)
        a3, b3 = p.reg(a, "a", 3), p.reg(b, "b", 3)
        cos3 = p.reg(self.b[0][:FACTOR_BITS], "cos", 3)
        x1, m1 = Signal(VEC), Signal(signed(FACTOR_BITS))
        n1 = Signal(6)
        m.d.comb += [x1.eq(a3), m1.eq(control[3].m1), n1.eq(control[3].n1)]
        with m.Switch(control[3].op):
            with m.Case(LaneOp.KV):
                m.d.comb += x1.eq(offset)
            with m.Case(LaneOp.SQUARE):
                m.d.comb += m1.eq(1)
            with m.Case(LaneOp.ROPE):
                m.d.comb += [m1.eq(cos3.as_signed()), n1.eq(N1_BIAS)]
            with m.Case(LaneOp.ADD):
                m.d.comb += [m1.eq(1), n1.eq(N1_BIAS)]
            with m.Case(LaneOp.GATE):
                m.d.comb += n1.eq(N1_BIAS + formats.VEC_FRAC)
        x1_reg, m1_reg = p.reg(x1, "x1"), p.reg(m1, "m1")
        is_gate = control[4].op == LaneOp.GATE
        factor = Mux(is_gate, Cat(sg, Const(0, 1)), m1_reg).as_signed()
        first = _Multiply.build(p, "first", x1_reg, factor)
        shifted = _round_shift(p, "first", arith.shift_left(first, N1_BIAS), p.reg(n1, "n1", 3))
        result = shifted[:P_BITS].as_signed()

        # Operands of the second product.
        at = self.first_cycles
        op = control[at].op
        partner8, b8 = p.reg(partner, "partner", at), p.reg(b3, "b_late", at - 3)
        sin8 = p.reg(self.b[1][:FACTOR_BITS], "sin", at).as_signed()
        x2, m2, keep = Signal(VEC), Signal(signed(FACTOR_BITS)), Signal(signed(P_BITS))
        m.d.comb += [x2.eq(result), keep.eq(result)]
        with m.Switch(op):
            with m.Case(LaneOp.SQUARE):
                m.d.comb += [m2.eq(result[:FACTOR_BITS].as_signed()), keep.eq(0)]
            with m.Case(LaneOp.NORM):
                m.d.comb += [m2.eq(b8[:FACTOR_BITS].as_signed()), keep.eq(0)]
            with m.Case(LaneOp.ROPE):
                m.d.comb += [x2.eq(partner8), m2.eq(sin8 if lane else -sin8)]
            with m.Case(LaneOp.GATE):
                m.d.comb += m2.eq(b8[16:].as_signed())
            with m.Case(LaneOp.ADD):
                m.d.comb += [x2.eq(b8), m2.eq(1)]
            with m.Case(LaneOp.KV):
                m.d.comb += keep.eq(_clamp_code(result, control[at].wide))
        x2_reg = p.reg(x2, "x2")
        second = _Multiply.build(p, "second", x2_reg, p.reg(m2, "m2"))
        low_factor = Cat(p.reg(b8[:16], "b_low"), Const(0, 2)).as_signed()
        low = _Multiply.build(p, "low", x2_reg, low_factor)
        gated = control[at + 3].op == LaneOp.GATE
        addend = Mux(gated, low >> formats.VEC_FRAC, p.reg(keep, "keep", 3))
        half = gated & low[formats.VEC_FRAC - 1]
        total = p.reg(second + addend + half, "total")
        n2 = control[at + 4]
        n2_value = Mux(n2.op == LaneOp.ROPE, formats.ROPE_FRAC, Mux(n2.op == LaneOp.NORM, n2.n2, 0))
        rounded = _round_shift(p, "second", total, n2_value)
        m.d.comb += self.y[lane].eq(p.reg(arith.saturate(rounded, formats.VEC_BITS), "y"))


def _round_shift(p: Pipe, name: str, x, n):
    """`rnd_shift(x, n)` in two cycles."""
    coarse = p.reg(arith.shift_left(x, 1) >> ((n // COARSE) * COARSE), f"{name}_coarse")
    return p.reg(arith.round_half(coarse >> p.reg(n[:3], f"{name}_fine")), f"{name}_rounded")


def _clamp_code(x, wide):
    """`x` clamped to the KV code range: 0..255 if `wide`, else 0..15."""
    above = Mux(wide, x[8:].any(), x[4:].any())
    return Mux(x[-1], 0, Mux(above, Mux(wide, 255, 15), x[:8]))


class LaneArray(wiring.Component):
    """`lanes` lanes as a stream block: word in, word out `latency` cycles later, one per cycle.

    A stalled output stops the whole pipeline; nothing is dropped or reordered, and the tag leaves with its word.
    Raises ValueError unless `lanes` is an even number of at least 2.
    """

    latency = LanePair.latency

    def __init__(self, lanes: int, tag):
        check_count("Lanes of a lane array", lanes, 2)
        if lanes % 2:
            raise ValueError(f"Lanes of a lane array must be even, since RoPE rotates pairs, not {lanes}")
        self._lanes, self._tag = lanes, tag
        super().__init__(
            {
                "i": In(stream.Signature(lane_word(lanes, tag))),
                "o": Out(stream.Signature(lane_result(lanes, tag))),
            }
        )

    def elaborate(self, platform):
        m = Module()
        # An empty pipeline stands still, on the board for its power and in simulation for its time.
        move = Signal()
        valid = Signal(self.latency)
        m.d.comb += [
            self.i.ready.eq(~self.o.valid | self.o.ready),
            move.eq(self.i.ready & (self.i.valid | valid.any())),
            self.o.valid.eq(valid[-1]),
        ]
        tags = [self.i.p.tag]
        with m.If(move):
            m.d.sync += valid.eq(Cat(self.i.valid, valid[:-1]))
            for cycle in range(self.latency):
                tag = Signal(self._tag, name=f"tag_{cycle}", reset_less=True)
                m.d.sync += tag.eq(tags[-1])
                tags.append(tag)
        m.d.comb += self.o.p.tag.eq(tags[-1])
        for index in range(self._lanes // 2):
            pair = LanePair()
            m.submodules[f"pair_{index}"] = EnableInserter(move)(pair)
            m.d.comb += pair.control.eq(self.i.p.control)
            for lane in range(2):
                m.d.comb += [
                    pair.a[lane].eq(self.i.p.a[2 * index + lane]),
                    pair.b[lane].eq(self.i.p.b[2 * index + lane]),
                    self.o.p.y[2 * index + lane].eq(pair.y[lane]),
                ]
        return m
