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


class ScaleControl(data.Struct):
    """With the dot product: how the activation group scales it."""

    values: 1
    sum: signed(14)
    shift: 6


class AddControl(data.Struct):
    """One cycle later: what a tile of values adds as it is."""

    values: 1
    addend: signed(ADDEND_BITS)


class UpdateControl(data.Struct):
    """Three cycles later: the accumulator to update."""

    valid: 1
    first: 1
    slot: 5
    decay: 6


class Lane(wiring.Component):
    """Scale a dot product into one of the accumulators: `(acc >> decay or 0) + dot * scale + sum(a) * minimum`.

    Weights and keys: scale and minimum are the row's fp16 records and `sum` the sum of the activations; decay is 0.
    Values: the product is `dot << shift`, plus `addend` as it is; scale and minimum are ignored. Accumulator `slot` =
    bank * vectors + vector, 56 bits. `load` takes `scale` and `minimum` with the weight step of the multipliers; they
    meet the dot products of that step. `dot` and `control` belong to cycle t, `add` to t + 1, `update` to t + 3; the
    accumulator holds the result in t + `latency`. `drained` reads accumulator `drain` combinationally.
    """

    latency = 4

    def __init__(self, vectors: int):
        self._slots = BANKS * vectors
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
        wide = ATTN_ACC_BITS
        scale, minimum = self._records(m)
        product, least = Signal(signed(34), reset_less=True), Signal(signed(26), reset_less=True)
        shift, least_shift = Signal(6, reset_less=True), Signal(5, reset_less=True)
        m.d.sync += [
            product.eq(self.dot * Mux(self.control.values, 1, mantissa(scale))),
            shift.eq(Mux(self.control.values, self.control.shift, half_shift(scale))),
            least.eq(self.control.sum * mantissa(minimum)),
            least_shift.eq(half_shift(minimum)),
        ]
        scaled, addend, change = (
            Signal(signed(wide), name=name, reset_less=True) for name in ("scaled", "addend", "change")
        )
        m.d.sync += [
            scaled.eq(product << shift),
            addend.eq(Mux(self.add.values, self.add.addend, least << least_shift)),
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

    def _records(self, m):
        """The step's fp16 records, delayed as the multipliers delay its codes."""
        records = Cat(self.scale, self.minimum)
        for stage in range(1 + LanePair.latency):
            later = Signal(32, name=f"records_{stage}", reset_less=True)
            if stage == 0:
                with m.If(self.load):
                    m.d.sync += later.eq(records)
            else:
                m.d.sync += later.eq(records)
            records = later
        return data.View(Half, records[:16]), data.View(Half, records[16:])
