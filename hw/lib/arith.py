"""Integer arithmetic of the formats page as hardware: rounding, saturation, normalising, dividing, square root.

The functions are combinational and exact; each result has the width its name or argument promises. The sequential
units move one number at a time: they serve scalars that exist once per vector (a reciprocal, a root), never elements.
"""

from amaranth import Cat, Const, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.lib.streams import check_count


def resize(x: Value, bits: int) -> Value:
    """`x` as `bits` bits of its own signedness: sign- or zero-extended, or its low bits."""
    if len(x) >= bits:
        low = x[:bits]
        return low.as_signed() if x.shape().signed else low
    pad = x[-1].replicate(bits - len(x)) if x.shape().signed else Const(0, bits - len(x))
    joined = Cat(x, pad)
    return joined.as_signed() if x.shape().signed else joined


def shift_left(x: Value, n: int) -> Value:
    """`x * 2**n` for a constant `n >= 0`, keeping signedness; `n` bits wider."""
    joined = Cat(Const(0, n), x) if n else x
    return joined.as_signed() if x.shape().signed else joined


def round_half(y: Value) -> Value:
    """Round a number with one fraction bit to an integer, ties towards plus infinity: `rnd_shift(y, 1)`."""
    return (y >> 1) + y[0]


def rnd_shift(x: Value, n: Value | int) -> Value:
    """`rnd_shift` of the formats page: `(x + 2**(n-1)) >> n`, `x` for `n = 0`; ties towards plus infinity.

    `n` is a constant or an unsigned value. One shifter and one adder: the bit shifted out last is the rounding.
    """
    if isinstance(n, int):
        return round_half(x >> (n - 1)) if n else x
    return round_half(shift_left(x, 1) >> n)


def saturate(x: Value, bits: int) -> Value:
    """`sat` of the formats page: signed `x` clamped to the signed range of `bits` bits."""
    if len(x) <= bits:
        return resize(x, bits)
    top = x[bits - 1 :]
    fits = top.all() | ~top.any()
    limit = Cat((~x[-1]).replicate(bits - 1), x[-1])
    return Mux(fits, x[:bits], limit).as_signed()


def absolute(x: Value) -> Value:
    """|x| of a signed value as an unsigned one of the same width, which holds `2**(bits-1)`."""
    return Mux(x[-1], -x, x)[: len(x)]


def leading_one(x: Value) -> Value:
    """Position of the highest one of an unsigned value (0 of 0); one multiplexer per halving of the width."""
    if len(x) == 1:
        return Const(0, 1)
    half_bits = (len(x) - 1).bit_length() - 1
    low, high = x[: 1 << half_bits], x[1 << half_bits :]
    if not half_bits:
        return high
    found = high.any()
    inner = Mux(found, leading_one(high), leading_one(low))
    return Cat(resize(inner, half_bits), found)


def bit_length(x: Value) -> Value:
    """Position of the highest one plus 1 of an unsigned value, 0 of 0; a tree of logarithmic depth."""
    return Mux(x.any(), leading_one(x) + 1, 0)[: len(x).bit_length()]


def normalise(x: Value, length: Value) -> Value:
    """Unsigned `x` of bit length `length` shifted left until its highest bit is one. Same width."""
    return (x << (len(x) - length)[: len(x).bit_length()])[: len(x)]


def product(a: Value, b: Value) -> Value:
    """`a * b`, exactly, at the width that holds it."""
    return resize(a * b, len(a) + len(b))


def thrice(a: Value) -> Value:
    """`3 * a`: what `digit_product` adds up, computed once for all products of the same `a`."""
    return resize(a + shift_left(a, 1), len(a) + 2)


def digit_product(m: Module, name: str, a: Value, three: Value, b: Value) -> Value:
    """`a * b` of a signed and an unsigned value in LUTs, where DSPs are short, with one register inside: the product of
    a cycle's operands is there in the next. `three` is `thrice(a)`.

    A row per two bits of `b` adds 0, a, 2a or 3a to the rows below, one LUT and carry per bit. Rows are kept apart:
    merged into one sum, synthesis builds a compressor three times as large.
    """
    width, out = len(a) + 2, len(a) + len(b)
    b = resize(b, len(b) + len(b) % 2)
    terms = [resize(x, width) for x in (a, shift_left(a, 1), three)]
    cut = len(b) // 4 * 2
    total, done = Const(0, signed(1)), []
    for low in range(0, len(b), 2):
        if low == cut:
            b, total, *rest = _registers(m, name, b, total, *terms, Cat(*done))
            terms, done = rest[:-1], [rest[-1]]
        one, two, three = terms
        multiple = Mux(b[low + 1], Mux(b[low], three, two), Mux(b[low], one, 0))[:width].as_signed()
        row = Signal(signed(width + 1), name=f"{name}_row_{low}", attrs={"keep": 1})
        m.d.comb += row.eq(total + multiple)
        done.append(row if low + 2 == len(b) else row[:2])
        total = row >> 2
    return Cat(*done)[:out].as_signed()


def one_of_four(m: Module, name: str, places: list[Value], select: Value) -> Value:
    """`places[select]`, two bits: a LUT per bit, kept so that synthesis does not mix the stages of a shifter."""
    chosen = Signal(places[0].shape(), name=name, attrs={"keep": 1})
    with m.Switch(select):
        for n, place in enumerate(places):
            with m.Case(n):
                m.d.comb += chosen.eq(place)
    return chosen


def _registers(m: Module, name: str, *values: Value) -> list[Signal]:
    held = [Signal(v.shape(), name=f"{name}_{i}", reset_less=True) for i, v in enumerate(values)]
    m.d.sync += [register.eq(value) for register, value in zip(held, values)]
    return held


class Divider(wiring.Component):
    """`floor(n / d)` by restoring division, `digits` quotient bits per cycle.

    `i`: stream of `{n: unsigned(numerator_bits), d: unsigned(divisor_bits)}` with `n < d * 2**quotient_bits`;
    `o`: stream of `unsigned(quotient_bits)`. One division at a time: the next begins when the quotient is taken.
    A quotient that does not fit gives unspecified bits, never a hang.

    Timing: the output is valid `latency` cycles after the input transfer; a new input is taken in the cycle of the
    output transfer, so back-to-back divisions are `latency` cycles apart.
    """

    def __init__(self, numerator_bits: int, divisor_bits: int, quotient_bits: int, *, digits: int = 2):
        for name, value in (
            ("Numerator", numerator_bits),
            ("Divisor", divisor_bits),
            ("Quotient", quotient_bits),
        ):
            check_count(f"{name} bits of a divider", value, 1)
        check_count("Quotient digits per cycle", digits, 1)
        if quotient_bits % digits:
            raise ValueError(
                f"Quotient bits must be a multiple of the digits per cycle, not {quotient_bits} by {digits}"
            )
        if quotient_bits > numerator_bits:
            raise ValueError(
                f"A quotient has at most the numerator's {numerator_bits} bits, not {quotient_bits}"
            )
        self._n, self._d, self._q, self._digits = numerator_bits, divisor_bits, quotient_bits, digits
        request = data.StructLayout({"n": unsigned(numerator_bits), "d": unsigned(divisor_bits)})
        super().__init__(
            {"i": In(stream.Signature(request)), "o": Out(stream.Signature(unsigned(quotient_bits)))}
        )

    @property
    def latency(self) -> int:
        """Cycles from the input transfer to the valid quotient."""
        return self._q // self._digits + 1

    def elaborate(self, platform):
        m = Module()
        remainder = Signal(max(self._d, self._n - self._q) + 1)
        quotient = Signal(self._q)
        divisor = Signal(self._d)
        left = Signal(range(self.latency))
        rest, bits = remainder, quotient
        for digit in range(self._digits):
            grown = Cat(bits[-1], rest)
            less = Signal(signed(len(grown) + 1), name=f"less_{digit}")
            m.d.comb += less.eq(grown - divisor)
            fits = ~less[-1]
            rest = Mux(fits, less, grown)[: len(remainder)]
            bits = Cat(fits, bits[:-1])
        m.d.comb += [
            self.o.payload.eq(quotient),
            self.i.ready.eq((left == 0) & (~self.o.valid | self.o.ready)),
        ]
        with m.If(self.o.ready):
            m.d.sync += self.o.valid.eq(0)
        with m.If(left != 0):
            m.d.sync += [remainder.eq(rest), quotient.eq(bits), left.eq(left - 1), self.o.valid.eq(left == 1)]
        with m.Elif(self.i.valid & self.i.ready):
            m.d.sync += [
                remainder.eq(self.i.p.n >> self._q),
                quotient.eq(self.i.p.n),
                divisor.eq(self.i.p.d),
                left.eq(self._q // self._digits),
            ]
        return m


class ISqrt(wiring.Component):
    """`isqrt(u)` (floor) of an unsigned number of `bits` (even) bits, `digits` root bits per cycle.

    `i`: stream of `unsigned(bits)`; `o`: stream of `unsigned(bits / 2)`. Timing as `Divider`.
    """

    def __init__(self, bits: int, *, digits: int = 2):
        check_count("Operand bits of a square root", bits, 2)
        check_count("Root digits per cycle", digits, 1)
        if bits % (2 * digits):
            raise ValueError(
                f"Operand bits must be a multiple of twice the digits per cycle, not {bits} by {digits}"
            )
        self._bits, self._digits = bits, digits
        super().__init__(
            {"i": In(stream.Signature(unsigned(bits))), "o": Out(stream.Signature(unsigned(bits // 2)))}
        )

    @property
    def latency(self) -> int:
        """Cycles from the input transfer to the valid root."""
        return self._bits // 2 // self._digits + 1

    def elaborate(self, platform):
        m = Module()
        half = self._bits // 2
        operand = Signal(self._bits)
        remainder = Signal(half + 2)
        root = Signal(half)
        left = Signal(range(self.latency))
        rest, found, feed = remainder, root, operand
        for digit in range(self._digits):
            grown = Cat(feed[-2:], rest)
            less = Signal(signed(len(grown) + 1), name=f"less_{digit}")
            m.d.comb += less.eq(grown - Cat(Const(1, 2), found))
            fits = ~less[-1]
            rest = Mux(fits, less, grown)[: len(remainder)]
            found = Cat(fits, found[:-1])
            feed = Cat(Const(0, 2), feed[:-2])
        m.d.comb += [
            self.o.payload.eq(root),
            self.i.ready.eq((left == 0) & (~self.o.valid | self.o.ready)),
        ]
        with m.If(self.o.ready):
            m.d.sync += self.o.valid.eq(0)
        with m.If(left != 0):
            m.d.sync += [
                operand.eq(feed),
                remainder.eq(rest),
                root.eq(found),
                left.eq(left - 1),
                self.o.valid.eq(left == 1),
            ]
        with m.Elif(self.i.valid & self.i.ready):
            m.d.sync += [
                operand.eq(self.i.payload),
                remainder.eq(0),
                root.eq(0),
                left.eq(half // self._digits),
            ]
        return m
