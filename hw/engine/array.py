"""The multiplier array: pairs of output rows on packed DSP multipliers, for every weight format.

A pair of rows owns 32 multipliers of 27 x 18 bits, and each does two multiply-accumulates per cycle:

- dense: `(w1 + w2 * 2**18) * a`: two rows share an activation. Stored fields are unsigned, so the operand is a
  concatenation; chains of four keep both 18-bit fields exact (4 * 255 * 127 < 2**17).
- 2:4: `(a1 + a2 * 2**15) * (w2 + w1 * 2**15)`: nothing is shared, the middle field is `a1 * w1 + a2 * w2` (pair-dot).
  a1 enters as a1 + 128, so that this operand too is a concatenation; `128 * sum(w1)` is taken off again, and w1 is odd,
  so the borrow of a negative w2 just clears its lowest bit.

The weight operands stay while activation vectors pass: matrix-vector is the case of one vector.
"""

from amaranth import Cat, Const, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.engine import STEP
from hw.lib.arith import round_half

CHAIN = 4
FIELD = 18
PAIR_FIELD = 15
SUM_BITS = 2 * FIELD
DOT_BITS = 22
QUADS = STEP // 2


def _pattern_selects(pattern):
    """Positions of the two kept weights of a quad, for the six legal pattern codes."""
    first = Mux(pattern < 3, 0, Mux(pattern == 5, 2, 1))
    second = Mux(pattern == 0, 1, Mux((pattern == 1) | (pattern == 3), 2, 3))
    return first[:2], second[:2]


class LanePair(wiring.Component):
    """Dot products of two output rows with 32 (dense) or 64 (2:4) activations per cycle.

    `load` takes a weight step; it is used from the next cycle on, with the `acts` of that cycle. `correction` (what the
    offset of dense codes added: 128 * sum of the activations, or 0) comes `latency - 1` cycles after its activations.
    `dots` of the activations of cycle t are valid in cycle t + `latency`.

    `planes[p]`: row r and position k at bit `(r * 32 + k) * 2`. `patterns[j]`: bit j of a pattern at `r * 16 + quad`.
    `dense_acts`: the 32 activations of a dense step; `acts`: the 64 of a 2:4 step.
    """

    latency = 4

    def __init__(self):
        super().__init__(
            {
                "load": In(1),
                "sparse": In(1),
                "planes": In(data.ArrayLayout(unsigned(4 * STEP), 4)),
                "patterns": In(data.ArrayLayout(unsigned(2 * QUADS), 3)),
                "dense_acts": In(8 * STEP),
                "acts": In(16 * STEP),
                "correction": In(signed(DOT_BITS)),
                "dots": Out(data.ArrayLayout(signed(DOT_BITS), 2)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        weights, first, second, sparse = self._weights(m)
        products = [self._multiplier(m, j, weights, first[j], second[j], sparse) for j in range(STEP)]
        sums = []
        for chain in range(STEP // CHAIN):
            total = Signal(SUM_BITS, name=f"sum_{chain}")
            m.d.sync += total.eq(sum(products[CHAIN * chain : CHAIN * (chain + 1)])[:SUM_BITS])
            sums.append(total)
        self._dots(m, sums, self._correction(m, weights, sparse))
        return m

    def _weights(self, m):
        """Weight registers: unsigned fields per row and position, selects per multiplier, mode."""
        weights = [[Signal(8, name=f"w_{r}_{k}") for k in range(STEP)] for r in range(2)]
        first = [Signal(2, name=f"first_{j}") for j in range(STEP)]
        second = [Signal(2, name=f"second_{j}") for j in range(STEP)]
        sparse = Signal()
        with m.If(self.load):
            m.d.sync += sparse.eq(self.sparse)
            for r in range(2):
                for k in range(STEP):
                    bit = (r * STEP + k) * 2
                    m.d.sync += weights[r][k].eq(Cat(plane[bit : bit + 2] for plane in self.planes))
            for j in range(STEP):
                one, two = _pattern_selects(Cat(plane[j] for plane in self.patterns))
                m.d.sync += [
                    first[j].eq(Mux(self.sparse, one, 3)),
                    second[j].eq(Mux(self.sparse, two, 0)),
                ]
        return weights, first, second, sparse

    def _multiplier(self, m, j, weights, first, second, sparse):
        """One DSP: operand registers, then the product register."""
        row, quad = divmod(j, QUADS)
        c1, c2 = weights[row][2 * quad], weights[row][2 * quad + 1]
        acts = [self.acts[32 * quad + 8 * i : 32 * quad + 8 * i + 8] for i in range(4)]
        x = Signal(signed(27), name=f"x_{j}")
        y = Signal(signed(FIELD), name=f"y_{j}")
        low, high = Signal(8, name=f"low_{j}"), Signal(12, name=f"high_{j}")
        with m.Switch(first):
            for i in range(3):
                with m.Case(i):
                    m.d.comb += low.eq(acts[i] ^ 0x80)
            with m.Default():
                m.d.comb += low.eq(weights[0][j])
        with m.Switch(second):
            for i in range(1, 4):
                with m.Case(i):
                    m.d.comb += high.eq(Cat(acts[i], acts[i][7].replicate(4)))
            with m.Default():
                m.d.comb += high.eq(Cat(Const(0, 3), weights[1][j]))
        kept = Cat(Const(1, 1), c2[0], (~c2[1]).replicate(13), c2[1], c1[0], ~c1[1])
        dense = self.dense_acts[8 * j : 8 * j + 8]
        product = Signal(SUM_BITS, name=f"product_{j}")
        m.d.sync += [
            x.eq(Cat(low, Const(0, 7), high)),
            y.eq(Mux(sparse, kept, Cat(dense, dense[7].replicate(10)))),
            product.eq(x * y),
        ]
        return product

    def _correction(self, m, weights, sparse):
        """What to take off each row, aligned with the chain sums, and the mode there."""
        mode = sparse
        rows = [sum(weights[r][2 * q][:2] for q in range(QUADS)) for r in range(2)]
        for stage in range(3):
            delayed = [Signal(6, name=f"codes_{r}_{stage}") for r in range(2)]
            later = Signal(name=f"sparse_{stage}")
            m.d.sync += [*(d.eq(r) for d, r in zip(delayed, rows)), later.eq(mode)]
            rows, mode = delayed, later
        bias = 128 * 3 * QUADS
        sparse_terms = [Cat(Const(0, 8), codes, Const(0, 1)).as_signed() - bias for codes in rows]
        return [Mux(mode, term, self.correction) for term in sparse_terms], mode

    def _dots(self, m, sums, corrections):
        terms, sparse = corrections
        middle = [round_half(total[PAIR_FIELD - 1 : 2 * PAIR_FIELD].as_signed()) for total in sums]
        middle = [value[:PAIR_FIELD].as_signed() for value in middle]
        low = [total[:FIELD].as_signed() for total in sums]
        high = [round_half(total[FIELD - 1 :].as_signed())[:FIELD].as_signed() for total in sums]
        half = len(sums) // 2
        zero = Const(0, signed(1))
        rows = [
            [Mux(sparse, middle[q] if q < half else zero, low[q]) for q in range(len(sums))],
            [Mux(sparse, middle[q] if q >= half else zero, high[q]) for q in range(len(sums))],
        ]
        for r in range(2):
            m.d.sync += self.dots[r].eq(sum(rows[r]) - terms[r])
