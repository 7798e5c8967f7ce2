"""A lane behind its multipliers: group scaling and the exact accumulators of one output row."""

from amaranth import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.formats import ATTN_ACC_BITS
from hw.engine.array import DOT_BITS, LanePair
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


class LaneControl(data.Struct):
    """What every lane gets alongside a dot product: the activation group's sidecar and the accumulator to update."""

    valid: 1
    values: 1
    first: 1
    slot: 5
    addend: signed(ADDEND_BITS)
    shift: 6
    decay: 6


class Lane(wiring.Component):
    """Scale a dot product into one of the accumulators: `(acc >> decay or 0) + dot * scale + sum(a) * minimum`.

    Weights and keys: scale and minimum are the row's fp16 records and `addend` the sum of the activations.
    Values: the product is `dot << shift`, plus `addend` as it is; scale and minimum are ignored.
    Accumulator `slot` = bank * vectors + vector, 56 bits. `load` takes `scale` and `minimum` with the weight step of the
    multipliers; they meet the dot products of that step. `dot` and `control` belong to the same cycle; the accumulator
    holds the result `latency` cycles later. `drained` reads accumulator `drain` combinationally.
    """

    latency = 4

    def __init__(self, vectors: int):
        self._slots = BANKS * vectors
        super().__init__(
            {
                "load": In(1),
                "dot": In(signed(DOT_BITS)),
                "scale": In(16),
                "minimum": In(16),
                "control": In(LaneControl),
                "drain": In(range(self._slots)),
                "drained": Out(signed(ATTN_ACC_BITS)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        wide = ATTN_ACC_BITS
        scale, minimum = self._records(m)
        c1, c2, c3 = (Signal(LaneControl, name=f"control_{i}") for i in (1, 2, 3))
        m.d.sync += [c1.eq(self.control), c2.eq(c1), c3.eq(c2)]

        product, least = Signal(signed(34)), Signal(signed(26))
        shift, least_shift = Signal(6), Signal(5)
        m.d.sync += [
            product.eq(self.dot * Mux(self.control.values, 1, mantissa(scale))),
            shift.eq(Mux(self.control.values, self.control.shift, half_shift(scale))),
            least.eq(self.control.addend[:14].as_signed() * mantissa(minimum)),
            least_shift.eq(half_shift(minimum)),
        ]
        scaled, addend, update = Signal(signed(wide)), Signal(signed(wide)), Signal(signed(wide))
        m.d.sync += [
            scaled.eq(product << shift),
            addend.eq(Mux(c1.values, c1.addend, least << least_shift)),
            update.eq(scaled + addend),
        ]
        m.submodules.accumulators = acc = TypedMemory(
            signed(wide), self._slots, read_ports=2, asynchronous_read=True, ram_style="distributed"
        )
        old = Mux(c3.first, 0, Mux(c3.values, acc.r[0].data >> c3.decay, acc.r[0].data))
        m.d.comb += [
            acc.r[0].addr.eq(c3.slot),
            acc.w.addr.eq(c3.slot),
            acc.w.en.eq(c3.valid),
            acc.w.data.eq(old + update),
            acc.r[1].addr.eq(self.drain),
            self.drained.eq(acc.r[1].data),
        ]
        return m

    def _records(self, m):
        """The step's fp16 records, delayed as the multipliers delay its codes."""
        records = Cat(self.scale, self.minimum)
        for stage in range(1 + LanePair.latency):
            later = Signal(32, name=f"records_{stage}")
            if stage == 0:
                with m.If(self.load):
                    m.d.sync += later.eq(records)
            else:
                m.d.sync += later.eq(records)
            records = later
        return data.View(Half, records[:16]), data.View(Half, records[16:])
