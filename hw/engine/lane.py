"""A lane behind its multipliers: group scaling and the exact accumulators of one output row."""

import enum

from amaranth import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.formats import ATTN_ACC_BITS
from hw.engine.array import DOT_BITS, LanePair
from hw.lib.arith import Multiples, digit_product, multiples
from hw.lib.memories import TypedMemory

BANKS = 2
ADDEND_BITS = 52


class Half(data.Struct):
    """A binary16 number, finite."""

    fraction: 10
    exponent: 5
    sign: 1


def mantissa(half):
    """Signed 12-bit mantissa of a finite fp16: value = mantissa * 2**(half_shift - 24)."""
    magnitude = Cat(half.fraction, half.exponent != 0, Const(0, 1)).as_signed()
    return Mux(half.sign, -magnitude, magnitude)[:12].as_signed()


def half_shift(half):
    """Left shift, 0 to 29, that makes the mantissa an integer multiple of 2**-24."""
    return Mux(half.exponent == 0, 0, half.exponent - 1)[:5]


class ScaleControl(data.Struct):
    """With the dot product: how the activation group scales it."""

    values: 1
    sum: signed(14)
    multiples: Multiples
    shift: 6


class AddControl(data.Struct):
    """Two cycles later: what a tile of values adds as it is."""

    values: 1
    addend: signed(ADDEND_BITS)


class UpdateControl(data.Struct):
    """Four cycles later: the accumulator to update."""

    valid: 1
    first: 1
    slot: 5
    decay: 6


class Multipliers(enum.Enum):
    """Where a lane's two products are made: the device has fewer DSPs to spare than lanes have products."""

    INFERRED = 0
    """Written as products, for simulation."""
    SCALE_IN_DSP = 1
    """The minimum's product in LUTs."""
    LUTS = 2
    """Both."""


FINE = 2
"""Low bits of a scale's shift, applied to the mantissa in front of the multiplier, which has room for it."""
FACTOR_BITS = 12 + (1 << FINE) - 1


class Lane(wiring.Component):
    """Scale a dot product into one of the accumulators: `(acc >> decay or 0) + dot * scale + sum(a) * minimum`.

    Weights and keys: scale and minimum are the row's fp16 records and `sum` the sum of the activations; decay is 0.
    Values: the product is `dot << shift`, plus `addend` as it is; scale and minimum are ignored. Accumulator `slot` =
    bank * vectors + vector, 56 bits. `load` takes `scale` and `minimum` with the weight step of the multipliers; they
    meet the dot products of that step. `dot` and `control` belong to cycle t, `add` to t + 2, `update` to t + 4; the
    accumulator holds the result in t + `latency`. `drained` reads accumulator `drain` combinationally.
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
        wide, control = ATTN_ACC_BITS, self.control
        factor, coarse, least_factor, least_shift = self._records(m)
        product = Signal(signed(DOT_BITS + FACTOR_BITS), reset_less=True)
        least = Signal(signed(26), reset_less=True)
        own = Const(1, signed(FACTOR_BITS)) << control.shift[:FINE]
        scaling = Mux(control.values, own, factor)[:FACTOR_BITS].as_signed()
        m.d.sync += [
            product.eq(self._product(m, scaling)),
            least.eq(self._least(m, least_factor)),
        ]
        shift = self._twice(m, "shift", Mux(control.values, control.shift >> FINE, coarse)[:4])
        later_shift = self._twice(m, "least_shift", least_shift)
        scaled, addend, change = (
            Signal(signed(wide), name=name, reset_less=True) for name in ("scaled", "addend", "change")
        )
        m.d.sync += [
            scaled.eq(product << Cat(Const(0, FINE), shift)),
            addend.eq(Mux(self.add.values, self.add.addend, least << later_shift)),
            change.eq(scaled + addend),
        ]
        m.submodules.accumulators = acc = TypedMemory(
            signed(wide), self._slots, read_ports=2, asynchronous_read=True, ram_style="distributed"
        )
        old = Mux(self.update.first, 0, acc.r[0].data >> self.update.decay)
        m.d.comb += [
            acc.r[0].addr.eq(self.update.slot),
            acc.w.addr.eq(self.update.slot),
            acc.w.en.eq(self.update.valid),
            acc.w.data.eq(old + change),
            acc.r[1].addr.eq(self.drain),
            self.drained.eq(acc.r[1].data),
        ]
        return m

    @staticmethod
    def _once(m, name, value):
        later = Signal(value.shape(), name=f"{name}_1", reset_less=True)
        m.d.sync += later.eq(value)
        return later

    def _twice(self, m, name, value):
        return self._once(m, f"{name}_later", self._once(m, name, value))

    def _product(self, m, scaling):
        if self._multipliers is not Multipliers.LUTS:
            return self._once(m, "scaled", self.dot * scaling)
        of_dot = Signal(Multiples)
        m.d.comb += [of_dot[name].eq(value) for name, value in multiples(self.dot).items()]
        return digit_product(m, "scaled", self.dot, of_dot, scaling)

    def _least(self, m, factor):
        if self._multipliers is Multipliers.INFERRED:
            return self._once(m, "least", self.control.sum * factor)
        return digit_product(m, "least", self.control.sum, self.control.multiples, factor)

    def _records(self, m):
        """The step's records as (scale factor, its shift, minimum factor, its shift), delayed as its codes are."""
        records = Cat(self.scale, self.minimum)
        for stage in range(LanePair.latency):
            later = Signal(32, name=f"records_{stage}", reset_less=True)
            if stage == 0:
                with m.If(self.load):
                    m.d.sync += later.eq(records)
            else:
                m.d.sync += later.eq(records)
            records = later
        scale, minimum = data.View(Half, records[:16]), data.View(Half, records[16:])
        shift = half_shift(scale)
        unpacked = (
            (Signal(signed(FACTOR_BITS), name="factor", reset_less=True), mantissa(scale) << shift[:FINE]),
            (Signal(3, name="coarse", reset_less=True), shift >> FINE),
            (Signal(signed(12), name="least_factor", reset_less=True), mantissa(minimum)),
            (Signal(5, name="least_shift", reset_less=True), half_shift(minimum)),
        )
        m.d.sync += [register.eq(value) for register, value in unpacked]
        return tuple(register for register, _ in unpacked)
