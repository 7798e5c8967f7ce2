"""A lane behind its multipliers: group scaling and the exact accumulators of one output row."""

import enum

from amaranth import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.engine import EngineConfig
from golden.spec.formats import ATTN_ACC_BITS
from hw.engine.array import DOT_BITS, WHOLE, LanePair
from hw.lib.arith import digit_product, one_of_four, resize, shift_left, thrice
from hw.lib.memories import TypedMemory
from hw.lib.pipeline import Pipe

BANKS = 2
"""Row blocks in the accumulators at once: one that grows, others that wait for the drain."""
NARROW_BANKS = 8
"""The same, of few vectors (`narrow`): row blocks of keys are shorter than their drain, those of values much longer."""
ADDEND_BITS = 52
SUM_BITS = 14


def narrow(tokens: int) -> int:
    """Vectors at most of an operation that has `NARROW_BANKS`."""
    return BANKS * tokens // NARROW_BANKS


def accumulator_banks(config: EngineConfig, vectors: int) -> int:
    """Banks that an operation of so many vectors uses."""
    return NARROW_BANKS if vectors <= narrow(config.tokens) else BANKS


class Half(data.Struct):
    """A binary16 number, finite."""

    fraction: 10
    exponent: 5
    sign: 1


def half_shift(half):
    """Left shift, 0 to 29, that makes the mantissa an integer multiple of 2**-24: the exponent less 1, but 0 of 0."""
    e = half.exponent  # bit by bit, because an adder has a carry chain to enter
    return Cat((~(e[i] ^ e[:i].any()) if i else ~e[0]) & e.any() for i in range(len(e)))


class RecordControl(data.Struct):
    """Two cycles before the dot product: whether a tile of values scales it, and by which shift (0 to 35)."""

    values: 1
    shift: 6


class ScaleControl(data.Struct):
    """With the dot product: the sum of the activations (0 to a tile of values), and three times it."""

    sum: signed(SUM_BITS)
    thrice: signed(SUM_BITS + 2)


class AddControl(data.Struct):
    """Two cycles later: what a tile of values adds as it is."""

    values: 1
    addend: signed(ADDEND_BITS)


class UpdateControl(data.Struct):
    """Four cycles later: the accumulator to update; `reach` of `decay` and `first` is made once for all lanes."""

    valid: 1
    first: 1
    slot: 5
    decay: 6
    reach: 2


class Multipliers(enum.Enum):
    """Where a lane's two products are made: the device has fewer DSPs to spare than lanes have products."""

    INFERRED = 0
    """Whole numbers in products and one shift, as a simulator computes them fastest: the same accumulators."""
    SCALE_IN_DSP = 1
    """The minimum's product in LUTs."""
    LUTS = 2
    """Both."""


FINE = 2
"""Low bits of a scale's shift, applied to the mantissa in front of the multiplier, which has room for it."""
MANTISSA_BITS = 11
FACTOR_BITS = MANTISSA_BITS + (1 << FINE) - 1
BEYOND = 5
"""Bit of a tile's shift that says 32 or more: the mantissa of a tile is then 16 instead of 1."""


class Lane(wiring.Component):
    """Scale a dot product into one of the accumulators: `(acc >> decay or 0) + dot * scale + sum(a) * minimum`.

    Weights and keys: scale and minimum are the row's fp16 records and `sum` the sum of the activations; decay is 0.
    Values: the product is `dot << shift`, plus `addend` as it is; scale and minimum are ignored. Accumulator `slot` =
    bank * vectors + vector, 56 bits. `load` takes `scale` and `minimum` with the weight step of the multipliers; they
    meet the dot products of that step. `dot` and `control` belong to cycle t, `record` to t - 2, `add` to t + 2,
    `update` to t + 4; the accumulator holds the result in t + `latency`. `drained` reads accumulator `drain`
    combinationally.

    Magnitudes are multiplied and shifted; a negative record inverts its term in front of an adder, whose carry
    completes the two's complement.
    """

    latency = 5

    def __init__(self, vectors: int, multipliers: Multipliers = Multipliers.INFERRED):
        self._slots = BANKS * vectors
        self._multipliers = multipliers
        super().__init__(
            {
                "load": In(1),
                "scale": In(16),
                "minimum": In(16),
                "record": In(RecordControl),
                "dot": In(signed(DOT_BITS)),
                "control": In(ScaleControl),
                "add": In(AddControl),
                "update": In(UpdateControl),
                "drain": In(range(self._slots)),
                "drained": Out(signed(ATTN_ACC_BITS)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        pipe = Pipe(m)
        if self._multipliers is Multipliers.INFERRED:
            self._whole_numbers(m, pipe)
            return m
        scale, least = self._records(m, pipe)
        product = pipe.reg(self._product(m, scale["factor"]), "product")
        shifted = self._left(m, "scaled", product, 4, self._delayed(m, "coarse_low", scale["coarse"][:2], 2))
        addend, completed = self._addend(m, pipe, least)
        scaled = pipe.reg(shifted, "scaled")
        high = self._delayed(m, "coarse_high", scale["coarse"][2], 3)
        negative = self._delayed(m, "negative", scale["sign"], 3)
        term = Mux(high, shift_left(scaled, 16), scaled)[:ATTN_ACC_BITS] ^ negative.replicate(ATTN_ACC_BITS)
        change = pipe.reg(_add(addend, term, negative), "change")
        completed = pipe.reg(completed, "completed")
        old, new = self._accumulators(m)
        m.d.comb += new.eq(_add(change, decayed(m, old, self.update), completed))
        return m

    def _whole_numbers(self, m, pipe):
        """The same, cycle by cycle, modulo 2**64: both terms at once, and registers behind them."""
        records = Signal(32, reset_less=True)
        with m.If(self.load):
            m.d.sync += records.eq(Cat(self.scale, self.minimum))
        late = pipe.reg(records, "late", LanePair.latency - 2)
        scale, least = _whole(late[:16]), _whole(late[16:])
        values = self.record.values
        factor = pipe.reg(Mux(values, Const(1, 1) << self.record.shift, scale), "factor", 2)
        least = pipe.reg(Mux(values, 0, least), "least", 2)
        dot, total = (resize(x, WHOLE).as_unsigned() for x in (self.dot, self.control.sum))
        terms = ((dot * factor)[:WHOLE] + (total * least)[:WHOLE])[:WHOLE]
        addend = resize(self.add.addend, WHOLE).as_unsigned() & self.add.values.replicate(WHOLE)
        change = pipe.reg((pipe.reg(terms, "terms", 2) + addend)[:WHOLE], "change", 2)
        old, new = self._accumulators(m)
        shifted = Mux(self.update.decay.any(), old >> self.update.decay, old)  # weights never shift
        kept = shifted.as_unsigned() & (~self.update.first).replicate(ATTN_ACC_BITS)
        m.d.comb += new.eq((kept + change)[:ATTN_ACC_BITS])

    @staticmethod
    def _delayed(m, name, value, cycles):
        """`value` some cycles later, in registers with a reset: those without become a shift register, in LUTs."""
        for cycle in range(cycles):
            later = Signal(value.shape(), name=f"{name}_{cycle}")
            m.d.sync += Value.cast(later).eq(Value.cast(value))
            value = later
        return value

    @staticmethod
    def _left(m, name, x, unit, select):
        """`x << unit * select` for two bits of `select`."""
        width = min(len(x) + 3 * unit, ATTN_ACC_BITS)
        return one_of_four(
            m, f"{name}_{unit}", [resize(shift_left(x, unit * n), width) for n in range(4)], select
        )

    def _addend(self, m, pipe, least):
        """The minimum's term or the tile's addend, and the carry that a negative minimum still needs."""
        shift = self._delayed(m, "least_shift", least["shift"], 2)
        negative = self._delayed(m, "least_negative", least["sign"], 2)
        product = digit_product(m, "least", self.control.sum, self.control.thrice, least["mantissa"])
        product = pipe.reg(product, "least")
        fine = self._left(m, "least", product, 1, shift[:2])
        coarse = self._left(m, "least", fine, 4, shift[2:4])
        wide = Mux(shift[4], shift_left(coarse, 16), coarse)[:ATTN_ACC_BITS] ^ negative.replicate(
            ATTN_ACC_BITS
        )
        values = self.add.values
        addend = Mux(values, resize(self.add.addend, ATTN_ACC_BITS), wide)[:ATTN_ACC_BITS].as_signed()
        return pipe.reg(addend, "addend"), pipe.reg(negative & ~values, "least_completed")

    def _accumulators(self, m):
        """The accumulator to update, and what to set for its new value."""
        m.submodules.accumulators = acc = TypedMemory(
            signed(ATTN_ACC_BITS), self._slots, read_ports=2, asynchronous_read=True, ram_style="distributed"
        )
        m.d.comb += [
            acc.r[0].addr.eq(self.update.slot),
            acc.w.addr.eq(self.update.slot),
            acc.w.en.eq(self.update.valid),
            acc.r[1].addr.eq(self.drain),
            self.drained.eq(acc.r[1].data),
        ]
        return acc.r[0].data, acc.w.data

    def _product(self, m, factor):
        if self._multipliers is Multipliers.LUTS:
            return digit_product(m, "product", self.dot, thrice(self.dot), factor)
        return Pipe(m).reg(self.dot * factor, "multiplied")

    def _records(self, m, pipe):
        """The step's records as factor and shift, delayed as its codes are; a tile of values has its own shift."""
        held = []
        for name, bits in (("scale", self.scale), ("minimum", self.minimum)):
            half = data.View(Half, bits)
            layout = data.StructLayout({"mantissa": MANTISSA_BITS, "shift": 5, "sign": 1})
            record = Signal(layout, name=name, reset_less=True)
            with m.If(self.load):
                m.d.sync += [
                    record.mantissa.eq(Cat(half.fraction, half.exponent != 0)),
                    record.shift.eq(half_shift(half)),
                    record.sign.eq(half.sign),
                ]
            held.append(self._delayed(m, f"{name}_late", record, LanePair.latency - 2))
        scale, least = held[0], self._delayed(m, "least_record", held[1], 2)
        values, shift = self.record.values, self.record.shift
        last = Signal(scale.shape(), name="scale_last", reset_less=True)
        beyond = shift[BEYOND]
        one = Cat(~beyond, Const(0, 3), beyond, Const(0, MANTISSA_BITS - 5))
        own = Cat(shift[:FINE], shift[FINE:BEYOND] | beyond.replicate(BEYOND - FINE))
        m.d.sync += [
            last.mantissa.eq(Mux(values, one, scale.mantissa)),
            last.shift.eq(Mux(values, own, scale.shift)),
            last.sign.eq(scale.sign & ~values),
        ]
        fine = [resize(shift_left(last.mantissa, n), FACTOR_BITS) for n in range(4)]
        return (
            {
                "factor": pipe.reg(one_of_four(m, "fine", fine, last.shift[:FINE]), "factor"),
                "coarse": pipe.reg(last.shift[FINE:], "coarse"),
                "sign": pipe.reg(last.sign, "sign"),
            },
            {"mantissa": least.mantissa, "shift": least.shift, "sign": least.sign},
        )


def _whole(bits):
    """A binary16 record in units of 2**-24, as a simulator's word."""
    half = data.View(Half, bits)
    normal = half.exponent != 0
    shift = (half.exponent - normal)[:5]
    magnitude = resize(Cat(half.fraction, normal) << shift, WHOLE)
    return ((magnitude ^ half.sign.replicate(WHOLE)) + half.sign)[:WHOLE]


def reach(decay, first):
    """What the upper bits of an accumulator become: 0 themselves, 1 those 16 places above, 2 the sign, 3 nothing."""
    return Cat(first | (decay[4] & ~decay[5]), first | decay[5])


def decayed(m, old, update):
    """`old >> decay`, or 0 of a first update: two stages of a LUT a bit, and a third that the adder behind shares.

    Of the 32 upper bits, 32 and 48 places leave the same: the sign. That makes room for nothing among the four that two
    bits choose from, so that the LUT of the adder holds them all; the bits below have a stage of their own.
    """
    wide, low = len(old), len(old) - 32
    for unit in (1, 4):
        places = [resize(old >> unit * n, wide) for n in range(4)]
        old = one_of_four(m, f"decayed_{unit}", places, update.decay.bit_select(unit.bit_length() - 1, 2))
    places = [(old >> 16 * n)[:low] for n in range(4)]
    below = one_of_four(m, "decayed_16", places, update.decay[4:]) & (~update.first).replicate(low)
    near = Mux(update.reach[0], resize(old >> 16, wide), old)
    far = old[-1].replicate(32) & (~update.reach[0]).replicate(32)
    return Cat(below, Mux(update.reach[1], far, near[low:])).as_signed()


def _add(a, b, carry):
    """`a + b + carry` at the accumulators' width; the lowest bit of the adder makes the carry."""
    return (Cat(Const(1, 1), a) + Cat(carry, b))[1 : 1 + ATTN_ACC_BITS].as_signed()
