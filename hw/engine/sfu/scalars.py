"""What exists once per vector: scales, reciprocals, roots and fp16 records, by one sequential unit.

The unit takes the extremes or the sum of squares of a vector and returns what the lanes multiply by and shift by in
the next pass. One divider and one square root serve every kind; sections are those of docs/formats.md.
"""

from amaranth import Cat, Const, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.spec import formats
from hw.engine.interfaces import OutputScale
from hw.engine.sfu.lanes import N1_BIAS, OFFSET_BITS
from hw.lib import arith
from hw.lib.pipeline import Pipe

SUM_BITS = 47
"""Sum of squares of up to 2**16 elements of at most 2**15."""
ENERGY_BITS = 49
"""Sum of squares plus epsilon."""
EPSILON_BITS = 48
RECIP_BITS = 16
"""Every reciprocal of the formats page is a 31-bit numerator over a 16-bit divisor, normalised: 16 quotient bits."""
RECIP_ONE = (1 << 31) - 1
VECTOR_INDEX = unsigned(8)


class ScalarKind(enum.Enum, shape=2):
    """What to compute of a vector."""

    A8 = 0
    SQUARE_SHIFT = 1
    NORM = 2
    KV = 3


class ScalarRequest(data.Struct):
    """Reduced values of vector `v` and the constants of its operation.

    `least`, `most`: extremes in Q16 (all kinds but NORM). `total`: sum of shifted squares, `shift`: their shift s,
    `epsilon`: En (NORM). `factor`, `exponent`: 0, or C and e_C of attention queries (A8). `wide`: 8-bit KV codes.
    """

    kind: ScalarKind
    v: VECTOR_INDEX
    least: signed(formats.VEC_BITS)
    most: signed(formats.VEC_BITS)
    total: unsigned(SUM_BITS)
    shift: unsigned(5)
    epsilon: unsigned(EPSILON_BITS)
    factor: unsigned(16)
    exponent: unsigned(6)
    wide: unsigned(1)


class LaneScalars(data.Struct):
    """What the lanes need for a vector: see `LaneControl`; `scale` and `minimum` are the fp16 record of KV."""

    m1: unsigned(17)
    n1: unsigned(6)
    m0: signed(OFFSET_BITS)
    scale: unsigned(16)
    minimum: unsigned(16)


class ScalarResult(data.Struct):
    """`lanes` for vector `v`; `output` is its entry of the output scale table (A8)."""

    kind: ScalarKind
    v: VECTOR_INDEX
    lanes: LaneScalars
    output: OutputScale


class Fp16Rounder(wiring.Component):
    """Magnitude `x * 2**-w` to binary16, to nearest with ties to even; `latency` cycles, one per cycle, no handshake.

    `floor_shift` is `w - 24`, what is cut off a subnormal; at least -8. `half`: the bits without sign. `m`, `q`: the
    rounded value is `m * 2**(q - 8 - w)`, `m` at most 2048. Values from 65520 are not for this unit: a record of the
    KV cache stays below 513.
    """

    BITS = 44
    LIFT = 8
    """A minimum has 16 fraction bits, a subnormal 24."""
    latency = 6

    def __init__(self):
        super().__init__(
            {
                "x": In(unsigned(self.BITS)),
                "floor_shift": In(signed(6)),
                "half": Out(unsigned(15)),
                "m": Out(unsigned(12)),
                "q": Out(unsigned(6)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        pipe = Pipe(m)
        wide = self.BITS + self.LIFT
        x, floor = pipe.reg(self.x, "x"), pipe.reg(self.floor_shift, "floor", 2)
        normal = pipe.reg(arith.bit_length(x), "length") - 11
        cut = pipe.reg((Mux(normal > floor, normal, floor) + self.LIFT)[:6], "cut")
        above = pipe.reg((Mux(normal > floor, normal - floor, 0))[:6], "above", 3)
        shifted = Cat(Const(0, wide + self.LIFT), pipe.reg(x, "x_late", 2)) >> cut
        kept = pipe.reg(shifted[: wide + 12], "kept")
        integer, fraction = kept[wide:], kept[:wide]
        up = pipe.reg(fraction[-1] & (fraction[:-1].any() | integer[0]), "up")
        integer = pipe.reg(integer, "integer")
        m.d.comb += self.q.eq(pipe.reg(cut, "q", 3))
        m.d.sync += [self.m.eq(integer + up), self.half.eq(Cat(Const(0, 10), above[:5]) + integer + up)]
        return m


class _Pending(data.Struct):
    """What a request needs besides its reciprocal, while the divider works."""

    kind: ScalarKind
    v: VECTOR_INDEX
    n1: unsigned(6)
    m0: signed(OFFSET_BITS)
    scale: unsigned(16)
    minimum: unsigned(16)
    flat: unsigned(1)
    live: unsigned(1)
    mantissa: unsigned(16)
    minus_exponent: signed(8)
    factor: unsigned(16)


class ScalarUnit(wiring.Component):
    """Requests in, results out, in order: one request is prepared while another one is divided.

    `latency(kind)` cycles from a request's transfer to its valid result when the unit is empty. Under load the results
    of one kind are `period(kind)` cycles apart; a request of kind SQUARE_SHIFT waits until no division is left.
    """

    DIVIDE = RECIP_BITS // 2 + 1

    def __init__(self):
        self._divider = arith.Divider(31, 17, RECIP_BITS)
        self._root = arith.ISqrt(32)
        self._rounder = Fp16Rounder()
        super().__init__({"i": In(stream.Signature(ScalarRequest)), "o": Out(stream.Signature(ScalarResult))})

    @staticmethod
    def preparation(kind: ScalarKind) -> int:
        """Cycles from the transfer of a request to its division (SQUARE_SHIFT: to its result)."""
        root = 32 // 2 // 2 + 1
        return {
            ScalarKind.SQUARE_SHIFT: 4,
            ScalarKind.A8: 4,
            ScalarKind.NORM: 5 + root,
            ScalarKind.KV: 5 + Fp16Rounder.latency,
        }[kind]

    @staticmethod
    def latency(kind: ScalarKind) -> int:
        """Cycles from the transfer of a request to its valid result."""
        divides = kind is not ScalarKind.SQUARE_SHIFT
        return ScalarUnit.preparation(kind) + (ScalarUnit.DIVIDE + 1 if divides else 0)

    @staticmethod
    def period(kind: ScalarKind) -> int:
        """Cycles between results when requests wait."""
        if kind is ScalarKind.SQUARE_SHIFT:
            return ScalarUnit.preparation(kind)
        return max(ScalarUnit.preparation(kind) + 1, ScalarUnit.DIVIDE)

    def elaborate(self, platform):
        m = Module()
        m.submodules.divider = divider = self._divider
        m.submodules.root = self._root
        m.submodules.rounder = self._rounder
        request, pending = Signal(ScalarRequest), Signal(_Pending)
        dividing = Signal()
        self._free = ~dividing & (~self.o.valid | self.o.ready)
        self._start = Signal()
        m.d.comb += [
            self._root.o.ready.eq(1),
            divider.o.ready.eq(~self.o.valid | self.o.ready),
            self._start.eq(divider.i.valid & divider.i.ready),
        ]
        with m.If(self.o.ready):
            m.d.sync += self.o.valid.eq(0)
        self._finish(m, pending, dividing)
        with m.If(self._start):
            m.d.sync += [
                dividing.eq(1),
                pending.kind.eq(request.kind),
                pending.v.eq(request.v),
                pending.factor.eq(request.factor),
            ]
        with m.FSM(name="prepare"):
            with m.State("IDLE"):
                m.d.comb += self.i.ready.eq(1)
                with m.If(self.i.valid):
                    m.d.sync += request.eq(self.i.payload)
                    with m.Switch(self.i.p.kind):
                        with m.Case(ScalarKind.NORM):
                            m.next = "ENERGY"
                        with m.Case(ScalarKind.KV):
                            m.next = "SPAN"
                        with m.Default():
                            m.next = "AMAX"
            self._a8(m, request, pending)
            self._norm(m, request, pending)
            self._kv(m, request, pending)
        return m

    def _finish(self, m: Module, pending, dividing) -> None:
        """The quotient joins what was prepared; the output scale has settled by then."""
        divider, lanes, output = self._divider, self.o.p.lanes, self.o.p.output
        scaled = Signal(32)
        m.d.sync += scaled.eq(pending.mantissa * pending.factor)
        attention = pending.factor != 0
        with m.If(divider.o.valid & divider.o.ready):
            m.d.sync += [
                dividing.eq(0),
                self.o.valid.eq(1),
                self.o.p.kind.eq(pending.kind),
                self.o.p.v.eq(pending.v),
                # A scale that rounds to zero has no reciprocal: its codes are zero.
                lanes.m1.eq(Mux((pending.kind == ScalarKind.KV) & pending.flat, 0, divider.o.payload)),
                lanes.n1.eq(pending.n1),
                lanes.m0.eq(pending.m0),
                lanes.scale.eq(pending.scale),
                lanes.minimum.eq(pending.minimum),
                output.pre.eq(formats.ACC_PRESHIFT),
                output.mult.eq(
                    Mux(pending.live, Mux(attention, arith.rnd_shift(scaled, 16), pending.mantissa), 0)
                ),
                output.post.eq(pending.minus_exponent),
            ]

    def _divide(self, m: Module, numerator: int, divisor, *fields) -> None:
        """Offer a division; the assignments `fields` to what is pending happen with its start."""
        m.d.comb += [
            self._divider.i.valid.eq(1),
            self._divider.i.p.n.eq(numerator),
            self._divider.i.p.d.eq(divisor),
        ]
        with m.If(self._start):
            m.d.sync += fields
            m.next = "IDLE"

    def _a8(self, m: Module, request, pending) -> None:
        bits = formats.VEC_BITS
        amax, length = Signal(bits), Signal(range(bits + 1))
        divisor, lanes = Signal(17), self.o.p.lanes
        with m.State("AMAX"):
            low, high = arith.absolute(request.least), arith.absolute(request.most)
            m.d.sync += amax.eq(Mux(low > high, low, high))
            m.next = "LENGTH"
        with m.State("LENGTH"):
            m.d.sync += length.eq(arith.bit_length(amax))
            m.next = "SHIFT"
        with m.State("SHIFT"):
            normal = arith.normalise(amax, length)
            m.d.sync += divisor.eq(normal[16:] + normal[:16].any())
            with m.If(request.kind != ScalarKind.SQUARE_SHIFT):
                m.next = "DIVISOR"
            with m.Elif(self._free):
                shift = Mux(length > 15, length - 15, 0)
                m.d.sync += [
                    self.o.valid.eq(1),
                    self.o.p.kind.eq(request.kind),
                    self.o.p.v.eq(request.v),
                    lanes.m1.eq(1),
                    lanes.n1.eq(shift + N1_BIAS),
                ]
                m.next = "IDLE"
        # -se of the A8 scale, or of its product with the attention constant.
        live = length != 0
        plain = Mux(live, formats.A8_SCALE_EXP_BIAS + 16 - length, 0)
        with m.State("DIVISOR"):
            self._divide(
                m,
                formats.A8_MAX << formats.A8_RECIP_SHIFT,
                divisor,
                pending.mantissa.eq(arith.rnd_shift(divisor * formats.A8_DIV127, 16)),
                pending.n1.eq(length + (formats.A8_RECIP_SHIFT - 16 + N1_BIAS)),
                pending.live.eq(live),
                pending.minus_exponent.eq(Mux(request.factor != 0, plain - 16 + request.exponent, plain)),
            )

    def _norm(self, m: Module, request, pending) -> None:
        epsilon, energy = Signal(EPSILON_BITS), Signal(ENERGY_BITS)
        length = Signal(range(ENERGY_BITS + 1))
        with m.State("ENERGY"):
            m.d.sync += epsilon.eq(arith.rnd_shift(request.epsilon, Cat(Const(0, 1), request.shift)))
            m.next = "ADD"
        with m.State("ADD"):
            total = request.total + epsilon
            m.d.sync += energy.eq(Mux(total == 0, 1, total))
            m.next = "LENGTH-OF-ENERGY"
        with m.State("LENGTH-OF-ENERGY"):
            m.d.sync += length.eq(arith.bit_length(energy))
            m.next = "ROOT"
        with m.State("ROOT"):
            top = arith.normalise(energy, length)[ENERGY_BITS - 32 :]
            m.d.comb += [self._root.i.valid.eq(1), self._root.i.payload.eq(Mux(length[0], top >> 1, top))]
            m.next = "ROOT-WAIT"
        divisor = Signal(16)
        with m.State("ROOT-WAIT"):
            m.d.sync += divisor.eq(self._root.o.payload)
            with m.If(self._root.o.valid):
                m.next = "RECIPROCAL"
        half = ((length + 1) >> 1) - 16
        with m.State("RECIPROCAL"):
            self._divide(m, RECIP_ONE, divisor, pending.n1.eq(half + request.shift + (9 + N1_BIAS)))

    def _kv(self, m: Module, request, pending) -> None:
        clip, rounder = formats.KV_CLIP_BITS, self._rounder
        least, most = Signal(signed(clip)), Signal(signed(clip))
        span, product = Signal(unsigned(clip + 1)), Signal(Fp16Rounder.BITS)
        cycle = Signal(range(Fp16Rounder.latency + 2))
        offset, minimum = Signal(signed(OFFSET_BITS)), Signal(16)
        (narrow_c, narrow_f), (wide_c, wide_f) = formats.KV_RANGE_DIV[4], formats.KV_RANGE_DIV[8]
        m.d.comb += [rounder.x.eq(arith.absolute(least)), rounder.floor_shift.eq(formats.VEC_FRAC - 24)]
        with m.State("SPAN"):
            m.d.sync += [
                least.eq(arith.saturate(request.least, clip)),
                most.eq(arith.saturate(request.most, clip)),
                cycle.eq(0),
            ]
            m.next = "ROUND"
        with m.State("ROUND"):
            # The minimum enters the rounder in cycle 0; the range needs two cycles for its product.
            m.d.sync += [
                cycle.eq(cycle + 1),
                span.eq(most - least),
                product.eq(span * Mux(request.wide, wide_c, narrow_c)),
            ]
            with m.If(cycle == Fp16Rounder.latency):
                value = (rounder.m << rounder.q)[Fp16Rounder.LIFT :][: OFFSET_BITS - 1]
                m.d.sync += [
                    offset.eq(Mux(least < 0, -value, value)),
                    minimum.eq(Cat(rounder.half, least < 0)),
                ]
            with m.If(cycle >= 2):
                floor = [f + formats.VEC_FRAC - 24 for f in (narrow_f, wide_f)]
                m.d.comb += [
                    rounder.x.eq(product),
                    rounder.floor_shift.eq(Mux(request.wide, floor[1], floor[0])),
                ]
            with m.If(cycle == Fp16Rounder.latency + 1):
                m.next = "RECORD"
        scale, mantissa, exponent = Signal(15), Signal(11), Signal(signed(8))
        with m.State("RECORD"):
            length = arith.bit_length(rounder.m)
            weight = Mux(request.wide, wide_f, narrow_f) + formats.VEC_FRAC + Fp16Rounder.LIFT
            m.d.sync += [
                scale.eq(rounder.half),
                mantissa.eq(arith.normalise(rounder.m, length) >> 1),
                exponent.eq(rounder.q + length - weight - 11),
            ]
            m.next = "MANTISSA"
        with m.State("MANTISSA"):
            self._divide(
                m,
                ((1 << 26) - 1) << 5,
                mantissa << 5,
                pending.n1.eq(42 + N1_BIAS + exponent),
                pending.flat.eq(mantissa == 0),
                pending.m0.eq(offset),
                pending.minimum.eq(minimum),
                pending.scale.eq(scale),
            )
