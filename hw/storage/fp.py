"""Pipelined binary16 and binary32 units (docs/formats-storage.md, section 1), for 285 MHz on a 7-series device.

All units run freely: an operand pair enters every cycle and the result leaves `latency` cycles later; there is no
valid and no stall inside, the surrounding block carries the validity beside them and only admits what it can take.
binary32 travels in its 32-bit encoding, without subnormals and without negative zero; NaN is F32_NAN.
"""

from amaranth import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.storage import F16_NAN, F32_NAN, RECIPROCAL_BITS, SCALE_BITS, SCORE_BITS, SCORE_FRAC

UNPACKED = data.StructLayout({"frac": 10, "exp": 6, "sign": 1})
"""A binary16 number with its leading one in place: value 1.frac * 2**(exp - 31), so subnormals have an exponent too.
exp = 0 is zero; exp = 63 infinity (frac = 0) or NaN."""
UNPACKED_SPECIAL = 63
UNPACKED_BIAS = 31

UNPACK_LATENCY = 2
SCORE_FLAGS = data.StructLayout({"z": signed(SCORE_BITS), "poison": 1, "dead": 1})
"""A score with its special cases: `poison` for NaN and +inf, `dead` for -inf."""


def pipe(m: Module, value: Value, stages: int, name: str, *, init: int = 0) -> Value:
    """`value`, `stages` cycles later; no reset, so that synthesis may use shift registers."""
    for stage in range(stages):
        register = Signal(value.shape(), name=f"{name}_{stage + 1}", reset_less=True, init=init)
        m.d.sync += Value.cast(register).eq(Value.cast(value))
        value = register
    return value


def _registered(m: Module, name: str, value: Value) -> Signal:
    register = Signal(Value.cast(value).shape(), name=name, reset_less=True)
    m.d.sync += register.eq(value)
    return register


def leading_zeros(x: Value, low: int = 0) -> Value:
    """Zeros above the highest one of `x`, whose width is a power of two; width - 1 for x = 0."""
    if len(x) == 1:
        return Const(0, 1)
    half = len(x) // 2
    high, rest = x[half:], x[:half]
    empty = ~high.any()
    if half == 1:
        return empty
    return Cat(Mux(empty, leading_zeros(rest), leading_zeros(high)), empty)


class Unpack16(wiring.Component):
    """One binary16 pattern into `UNPACKED`; subnormals are normalised, zeros lose their sign."""

    i: In(16)
    o: Out(UNPACKED)
    latency = UNPACK_LATENCY

    def elaborate(self, platform):
        m = Module()
        fraction, exponent = self.i[:10], self.i[10:15]
        zeros = _registered(m, "zeros", leading_zeros(Cat(Const(0, 6), fraction)))
        subnormal = _registered(m, "subnormal", exponent == 0)
        zero = _registered(m, "zero", (exponent == 0) & (fraction == 0))
        special = _registered(m, "special", exponent == 31)
        held = _registered(m, "held", self.i)
        m.d.sync += self.o.sign.eq(held[15] & ~zero)
        with m.If(zero):
            m.d.sync += [self.o.frac.eq(0), self.o.exp.eq(0)]
        with m.Elif(subnormal):
            # z zeros above the leading one of 10 fraction bits: value = 1.x * 2**(-15 - z)
            m.d.sync += [self.o.frac.eq((held[:10] << 1) << zeros), self.o.exp.eq(UNPACKED_BIAS - 15 - zeros)]
        with m.Else():
            exp = Mux(special, UNPACKED_SPECIAL, held[10:15] + (UNPACKED_BIAS - 15))
            m.d.sync += [self.o.frac.eq(held[:10]), self.o.exp.eq(exp)]
        return m


class Mul16(wiring.Component):
    """Exact product of two `UNPACKED` numbers as binary32; one DSP."""

    a: In(UNPACKED)
    b: In(UNPACKED)
    o: Out(32)
    latency = 5

    def elaborate(self, platform):
        m = Module()
        a, b = _registered(m, "a_1", self.a.as_value()), _registered(m, "b_1", self.b.as_value())
        va, vb = data.View(UNPACKED, a), data.View(UNPACKED, b)
        m_1 = _registered(m, "m_1", Cat(va.frac, Const(1, 1)) * Cat(vb.frac, Const(1, 1)))
        product = _registered(m, "product", m_1)

        def special(v):
            return v.exp == UNPACKED_SPECIAL

        def nan(v):
            return special(v) & (v.frac != 0)

        zero = _registered(m, "zero_2", (va.exp == 0) | (vb.exp == 0))
        infinite = _registered(m, "infinite_2", special(va) | special(vb))
        bad = _registered(m, "bad_2", nan(va) | nan(vb))
        sign = _registered(m, "sign_2", va.sign ^ vb.sign)
        exponent = _registered(m, "exponent_2", va.exp + vb.exp)
        # 1.f * 1.f * 2**(ea + eb - 62), biased by 127; bit 21 of the product says that it is 2 or more
        nan_3 = _registered(m, "nan_3", bad | (infinite & zero))
        zero_3 = _registered(m, "zero_3", zero)
        infinite_3 = _registered(m, "infinite_3", infinite)
        sign_3 = _registered(m, "sign_3", sign)
        exponent_3 = _registered(m, "exponent_3", (exponent + (127 - 2 * UNPACKED_BIAS))[:8])
        wide = product[21]
        fraction = _registered(
            m,
            "fraction_4",
            Mux(wide, Cat(Const(0, 2), product[:21]), Cat(Const(0, 3), product[:20])),
        )
        exponent_4 = _registered(m, "exponent_4", (exponent_3 + wide)[:8])
        nan_4, zero_4 = _registered(m, "nan_4", nan_3), _registered(m, "zero_4", zero_3)
        infinite_4, sign_4 = _registered(m, "infinite_4", infinite_3), _registered(m, "sign_4", sign_3)
        with m.If(nan_4):
            m.d.sync += self.o.eq(F32_NAN)
        with m.Elif(zero_4):
            m.d.sync += self.o.eq(0)
        with m.Elif(infinite_4):
            m.d.sync += self.o.eq(Cat(Const(0, 23), Const(255, 8), sign_4))
        with m.Else():
            m.d.sync += self.o.eq(Cat(fraction, exponent_4, sign_4))
        return m


class Add32(wiring.Component):
    """Sum of two binary32 numbers, nearest, ties to even, tiny results to +0."""

    a: In(32)
    b: In(32)
    o: Out(32)
    latency = 10

    def elaborate(self, platform):
        m = Module()

        def reg(name, value):
            return _registered(m, name, value)

        # 1: order the operands by magnitude; both exponent differences beside the comparison
        a_1, b_1 = reg("a_1", self.a), reg("b_1", self.b)
        swap_1 = reg("swap_1", self.a[:31] < self.b[:31])
        ab_1, ba_1 = reg("ab_1", self.a[23:31] - self.b[23:31]), reg("ba_1", self.b[23:31] - self.a[23:31])
        full_a, full_b = reg("full_a", self.a[23:31] == 255), reg("full_b", self.b[23:31] == 255)
        odd_a, odd_b = reg("odd_a", self.a[:23].any()), reg("odd_b", self.b[:23].any())
        # 2: select; an exponent of 0 is the number 0
        big_2, small_2 = reg("big_2", Mux(swap_1, b_1, a_1)), reg("small_2", Mux(swap_1, a_1, b_1))
        shift_2 = reg("shift_2", Mux(swap_1, ba_1, ab_1)[:8])
        minus_2 = reg("minus_2", a_1[31] ^ b_1[31])
        inf_2 = reg("inf_2", full_a | full_b)
        nan_2 = reg("nan_2", (full_a & odd_a) | (full_b & odd_b) | (full_a & full_b & (a_1[31] ^ b_1[31])))
        # 3, 4: align the smaller significand: 24 bits, guard, round, sticky
        small = Cat(Const(0, 2), small_2[:23], small_2[23:31].any())
        far = shift_2[5:].any()
        by8 = [small >> (8 * n) for n in range(4)]
        lost8 = [small[: 8 * n].any() if n else Const(0) for n in range(4)]
        coarse = Mux(shift_2[4], Mux(shift_2[3], by8[3], by8[2]), Mux(shift_2[3], by8[1], by8[0]))
        lost = Mux(shift_2[4], Mux(shift_2[3], lost8[3], lost8[2]), Mux(shift_2[3], lost8[1], lost8[0]))
        small_3 = reg("small_3", Mux(far, 0, coarse)[:26])
        sticky_3 = reg("sticky_3", Mux(far, small_2[23:31].any(), lost))
        shift_3 = reg("shift_3", shift_2[:3])
        below = Cat(small_3[:n].any() if n else Const(0) for n in range(8)).bit_select(shift_3, 1)
        small_4 = reg("small_4", Cat(sticky_3 | below, (small_3 >> shift_3)[:26]))
        big_3 = reg("big_3", big_2)
        big_4 = reg("big_4", big_3)
        minus_4 = pipe(m, minus_2, 2, "minus_p")
        # 5: one adder; the result is never negative, because the operands are ordered
        # (the extra bit below makes the carry of the two's complement, so that one carry chain is enough)
        large = Cat(minus_4, Const(0, 3), big_4[:23], big_4[23:31].any(), Const(0, 1))
        operand = Cat(minus_4, small_4 ^ minus_4.replicate(27), minus_4)
        total = reg("total", (large + operand)[1:29])
        # 6: which group of four holds the leading one
        groups = Cat(total[4 * n : 4 * n + 4].any() for n in range(7))
        lead = Signal(3)
        for n in range(7):
            with m.If(groups[n]):
                m.d.comb += lead.eq(6 - n)
        lead_6 = reg("lead_6", lead)
        zero_6 = reg("zero_6", ~groups.any())
        total_6 = reg("total_6", total)
        exponent_6 = pipe(m, big_4[23:31], 2, "exponent_p")
        # 7: shift by whole groups
        total_7 = reg("total_7", (total_6 << Cat(Const(0, 2), lead_6))[:28])
        exponent_7 = reg("exponent_7", (exponent_6 + 1 - Cat(Const(0, 2), lead_6)).as_signed()[:10])
        # 8: shift inside the group
        fine = Mux(total_7[27], 0, Mux(total_7[26], 1, Mux(total_7[25], 2, 3)))
        total_8 = reg("total_8", (total_7 << fine)[:28])
        exponent_8 = reg("exponent_8", (exponent_7 - fine)[:10])
        # 9: round; a carry out of the fraction runs into the exponent
        round_up = total_8[3] & (total_8[:3].any() | total_8[4])
        tiny_9 = reg("tiny_9", exponent_8[9] | (exponent_8 == 0))
        packed_9 = reg("packed_9", (Cat(total_8[4:27], exponent_8) + round_up)[:33])
        zero_9 = pipe(m, zero_6, 3, "zero_p")
        sign_9 = pipe(m, big_2[31], 7, "sign_p")
        inf_9, nan_9 = pipe(m, inf_2, 7, "inf_p"), pipe(m, nan_2, 7, "nan_p")
        # 10: special cases
        overflow = inf_9 | (packed_9[23:31].all() & ~packed_9[32]) | (packed_9[31] & ~packed_9[32])
        with m.If(nan_9):
            m.d.sync += self.o.eq(F32_NAN)
        with m.Elif((tiny_9 | zero_9) & ~inf_9):
            m.d.sync += self.o.eq(0)
        with m.Elif(overflow):
            m.d.sync += self.o.eq(Cat(Const(0, 23), Const(255, 8), sign_9))
        with m.Else():
            m.d.sync += self.o.eq(Cat(packed_9[:31], sign_9))
        return m


class Scale32(wiring.Component):
    """`scale2(x, d)`: x * 2**-d for an unsigned `d`, tiny results to +0."""

    i: In(32)
    d: In(8)
    o: Out(32)
    latency = 2

    def elaborate(self, platform):
        m = Module()
        exponent = self.i[23:31]
        difference = _registered(m, "difference", exponent - self.d)
        keep = _registered(m, "keep", exponent == 255)
        held = _registered(m, "held", self.i)
        with m.If(keep):
            m.d.sync += self.o.eq(held)
        with m.Elif(difference[8] | (difference == 0)):
            m.d.sync += self.o.eq(0)
        with m.Else():
            m.d.sync += self.o.eq(Cat(held[:23], difference[:8], held[31]))
        return m


class Score(wiring.Component):
    """`score(s, c, frac)`: a dot product times an unsigned 17-bit constant into Q16 log2 units; one DSP.

    `c` and `frac` are constant while scores are in flight.
    """

    s: In(32)
    c: In(SCALE_BITS)
    frac: In(5)
    o: Out(SCORE_FLAGS)
    latency = 7

    def elaborate(self, platform):
        m = Module()
        s, limit = self.s, (1 << (SCORE_BITS - 1)) - 1
        f_1 = _registered(m, "f_1", Cat(s[:23], s[23:31].any()))
        n_1 = _registered(m, "n_1", (self.frac + (127 + 23 - SCORE_FRAC) - s[23:31]).as_signed()[:10])
        full_1, odd_1 = (
            _registered(m, "full_1", s[23:31] == 255),
            _registered(m, "odd_1", s[:23].any()),
        )
        sign_1 = _registered(m, "sign_1", s[31])
        m_2 = _registered(m, "m_2", f_1 * self.c)
        product = _registered(m, "product", m_2)
        # shift n of a 41-bit product: below 1 saturates, above 42 leaves nothing
        n_2 = _registered(m, "n_2", n_1)
        small = _registered(m, "small", n_2[9] | (n_2 == 0))
        large = _registered(m, "large", ~n_2[9] & (n_2 > 42))
        n_3 = _registered(m, "n_3", n_2[:6] - 1)
        coarse = _registered(m, "coarse", product >> Cat(Const(0, 3), n_3[3:6]))
        n_4 = _registered(m, "n_4", n_3[:3])
        small_4, large_4 = _registered(m, "small_4", small), _registered(m, "large_4", large)
        fine = _registered(m, "fine", Mux(large_4, 0, (coarse >> n_4)[: SCALE_BITS + 24]))
        small_5 = _registered(m, "small_5", small_4)
        zero_5 = pipe(m, f_1[23], 4, "nonzero_p")
        rounded = _registered(m, "rounded", (fine[1:] + fine[0])[: SCALE_BITS + 24])
        over_6 = _registered(m, "over_6", small_5 & zero_5)
        full_6, odd_6 = pipe(m, full_1, 5, "full_p"), pipe(m, odd_1, 5, "odd_p")
        sign_6 = pipe(m, sign_1, 5, "sign_p")
        minus_inf = full_6 & (odd_6 | sign_6)
        magnitude = Mux(over_6 | full_6 | rounded[SCORE_BITS - 1 :].any(), limit, rounded[: SCORE_BITS - 1])
        m.d.sync += [
            self.o.z.eq(Mux(Mux(full_6, minus_inf, sign_6), -magnitude, magnitude)),
            self.o.poison.eq(full_6 & (odd_6 | ~sign_6)),
            self.o.dead.eq(full_6 & ~odd_6 & sign_6),
        ]
        return m


class MulInt32(wiring.Component):
    """`mulint(x, n, f)`: binary32 times an unsigned 17-bit integer times 2**-f, one rounding; one DSP."""

    i: In(32)
    n: In(RECIPROCAL_BITS)
    f: In(6)
    o: Out(32)
    latency = 8

    def elaborate(self, platform):
        m = Module()

        def reg(name, value):
            return _registered(m, name, value)

        x = self.i
        f_1, n_1 = reg("f_1", Cat(x[:23], x[23:31].any())), reg("n_1", self.n)
        exponent_1 = reg("exponent_1", (x[23:31] - self.f).as_signed()[:10])
        full_1, odd_1 = reg("full_1", x[23:31] == 255), reg("odd_1", x[:23].any())
        zero_1, none_1 = reg("zero_1", x[23:31] == 0), reg("none_1", self.n == 0)
        m_2 = reg("m_2", f_1 * n_1)
        product = reg("product", m_2)
        # 4, 5: the leading one of the product is in its upper 18 bits; shift it to bit 40
        # (padded to 43 bits, so that the groups of four are whole)
        padded = Cat(product, Const(0, 2))
        lead = Signal(3)
        for n in range(5):
            with m.If(padded[23 + 4 * n : 27 + 4 * n].any()):
                m.d.comb += lead.eq(4 - n)
        lead_4 = reg("lead_4", lead)
        product_4 = reg("product_4", padded)
        exponent_4 = pipe(m, exponent_1, 3, "exponent_p")
        shifted_5 = reg("shifted_5", (product_4 << Cat(Const(0, 2), lead_4))[:43])
        exponent_5 = reg(
            "exponent_5", (exponent_4.as_signed() + 19 - Cat(Const(0, 2), lead_4)).as_signed()[:11]
        )
        fine = Mux(shifted_5[42], 0, Mux(shifted_5[41], 1, Mux(shifted_5[40], 2, 3)))
        shifted_6 = reg("shifted_6", (shifted_5 << fine)[:43])
        exponent_6 = reg("exponent_6", (exponent_5 - fine)[:11])
        round_up = shifted_6[18] & (shifted_6[:18].any() | shifted_6[19])
        packed_7 = reg("packed_7", (Cat(shifted_6[19:42], exponent_6) + round_up)[:34])
        tiny_7 = reg("tiny_7", exponent_6[10] | (exponent_6 == 0))
        zero_7 = pipe(m, zero_1 | none_1, 6, "zero_p")
        full_7 = pipe(m, full_1, 6, "full_p")
        nan_7 = pipe(m, full_1 & (odd_1 | none_1), 6, "nan_p")
        sign_7 = pipe(m, reg("sign_1", x[31]), 6, "sign_p")
        with m.If(nan_7):
            m.d.sync += self.o.eq(F32_NAN)
        with m.Elif((zero_7 | tiny_7) & ~full_7):
            m.d.sync += self.o.eq(0)
        with m.Elif(full_7 | (packed_7[31:33] != 0) | packed_7[23:31].all()):
            m.d.sync += self.o.eq(Cat(Const(0, 23), Const(255, 8), sign_7))
        with m.Else():
            m.d.sync += self.o.eq(Cat(packed_7[:31], sign_7))
        return m


class ToFp16(wiring.Component):
    """binary32 to binary16, nearest, ties to even, subnormals kept, overflow to infinity."""

    i: In(32)
    o: Out(16)
    latency = 4

    def elaborate(self, platform):
        m = Module()
        x = self.i
        exponent = x[23:31]
        # A normal binary16 has exponent 113 or more; below it the significand moves right by 113 - e.
        normal = exponent >= 113
        shift_1 = _registered(m, "shift_1", Mux(normal, 0, 113 - exponent)[:7])
        target_1 = _registered(m, "target_1", Mux(normal, exponent - 112, 0)[:8])
        significand_1 = _registered(m, "significand_1", Cat(x[:23], exponent.any()))
        nan_1 = _registered(m, "nan_1", (exponent == 255) & x[:23].any())
        sign_1 = _registered(m, "sign_1", x[31])
        # significand, 13 bits below the fp16 lsb; 12 steps down leave the guard bit at most
        spread = Cat(Const(0, 12), significand_1) >> Mux(shift_1[4:].any(), 15, shift_1[:4])
        moved_2 = _registered(m, "moved_2", Mux(shift_1 > 12, 0, spread)[:36])
        target_2, nan_2, sign_2 = (
            _registered(m, "target_2", target_1),
            _registered(m, "nan_2", nan_1),
            _registered(m, "sign_2", sign_1),
        )
        round_up = moved_2[24] & (moved_2[:24].any() | moved_2[25])
        packed_3 = _registered(m, "packed_3", (Cat(moved_2[25:35], target_2) + round_up)[:19])
        nan_3, sign_3 = _registered(m, "nan_3", nan_2), _registered(m, "sign_3", sign_2)
        with m.If(nan_3):
            m.d.sync += self.o.eq(F16_NAN)
        with m.Elif(packed_3[10:] >= 31):
            m.d.sync += self.o.eq(Cat(Const(0, 10), Const(31, 5), sign_3))
        with m.Else():
            m.d.sync += self.o.eq(Cat(packed_3[:15], sign_3 & packed_3[:15].any()))
        return m
