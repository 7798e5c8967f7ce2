"""The dot-product unit of an attention kernel: 16 exact multipliers and 16 adders, wired as a tree or side by side.

One unit serves every product of attention (docs/storage.md):

- tree: 16 products of one beat are added pairwise; `dot` is q.k of 16 channels or p.V of 16 tokens, and `total`
  adds a carried value to it;
- spread: each lane adds its product to its own carried value, for channel-indexed pages, where a beat is one
  channel of 16 tokens.
"""

from amaranth import Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.storage import BEAT_ELEMENTS
from hw.storage.fp import UNPACKED, Add32, Mul16, pipe

LEVELS = BEAT_ELEMENTS.bit_length() - 1
LANES_32 = data.ArrayLayout(32, BEAT_ELEMENTS)
OPERANDS = data.ArrayLayout(UNPACKED, BEAT_ELEMENTS)


class DotUnit(wiring.Component):
    """Ports: `a`, `b` operands; `spread` with the products' operands (it is delayed inside); `carry` per lane, due when
    the products are (`product_latency`); `carry_total`, due when `dot` is. Outputs free-run:

    - `dot`: tree, `dot_latency` after the operands; `total = dot + carry_total`, `total_latency`.
    - `lanes`: products + `carry`, `lanes_latency`, meaningful for operands that came with `spread`.

    The adders are shared: operands of the two wirings must be `dot_latency` cycles apart.
    """

    product_latency = Mul16.latency
    lanes_latency = Mul16.latency + Add32.latency
    dot_latency = Mul16.latency + LEVELS * Add32.latency
    total_latency = dot_latency + Add32.latency

    a: In(OPERANDS)
    b: In(OPERANDS)
    spread: In(1)
    carry: In(LANES_32)
    carry_total: In(32)
    dot: Out(32)
    total: Out(32)
    lanes: Out(LANES_32)

    def elaborate(self, platform):
        m = Module()
        products = []
        for lane in range(BEAT_ELEMENTS):
            m.submodules[f"mul_{lane}"] = mul = Mul16()
            m.d.comb += [mul.a.eq(self.a[lane]), mul.b.eq(self.b[lane])]
            products.append(mul.o)
        # The last stage has a reset, so that it stays a register: a shift register is slow to give its bit, and the
        # adders compare what they select.
        spread = Signal()
        m.d.sync += spread.eq(pipe(m, self.spread, self.product_latency - 1, "spread"))
        row, used, adders = products, 0, []
        while len(row) > 1:
            sums = []
            for left, right in zip(row[0::2], row[1::2]):
                sums.append(self._adder(m, used, spread, left, right, products[used]))
                used += 1
            row = sums
            adders += sums
        total = self._adder(m, used, spread, row[0], self.carry_total, products[used])
        m.d.comb += [self.dot.eq(row[0]), self.total.eq(total)]
        m.d.comb += [self.lanes[lane].eq(o) for lane, o in enumerate([*adders, total])]
        return m

    def _adder(self, m, index, spread, left, right, product):
        m.submodules[f"add_{index}"] = adder = Add32()
        m.d.comb += [
            adder.a.eq(Mux(spread, product, left)),
            adder.b.eq(Mux(spread, self.carry[index], right)),
        ]
        return adder.o


class BeatTree(wiring.Component):
    """The upper levels of a dot product, over the dh / 16 beats of a token: neighbours first, like the tree below.

    Ports: `i` with `valid` and `beat`, the beat's number in the token; `o` follows the token's last beat by
    `latency(wide)` cycles, wide for head size 128. The block around counts the cycles; there is no output valid.
    """

    i: In(32)
    valid: In(1)
    beat: In(3)
    wide: In(1)
    o: Out(32)

    @staticmethod
    def latency(wide: bool) -> int:
        """Cycles from a token's last beat to its dot product."""
        return (3 if wide else 2) * Add32.latency

    def elaborate(self, platform):
        m = Module()
        value, valid, beat, results = self.i, self.valid, self.beat, []
        for level in range(3):
            m.submodules[f"add_{level}"] = adder = Add32()
            held = Signal(32, name=f"held_{level}", reset_less=True)
            below = beat[:level].all() if level else 1
            with m.If(valid & below & ~beat[level]):
                m.d.sync += held.eq(value)
            m.d.comb += [adder.a.eq(held), adder.b.eq(value)]
            value = adder.o
            results.append(value)
            for stage in range(Add32.latency):
                later = Signal(4, name=f"tag_{level}_{stage}", reset_less=True)
                m.d.sync += later.eq(valid << 3 | beat)
                valid, beat = later[3], later[:3]
        m.d.comb += self.o.eq(Mux(self.wide, results[2], results[1]))
        return m
