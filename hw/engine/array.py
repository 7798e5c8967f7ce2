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
"""Quads of a full row."""


def _selects(patterns, sparse):
    """Two bits of select for all multipliers at once: which of a quad's four activations is the first and the second
    operand; a dense step reads its weights instead (first = 3, second = 0).

    Patterns 0 to 5 keep positions (0,1) (0,2) (0,3) (1,2) (1,3) (2,3); `patterns[j]` is bit j of every pattern.
    """
    zero, one, two = patterns
    dense = (~sparse).replicate(len(zero))
    first = ((one & zero) | (two & ~zero) | dense, (two & zero) | dense)
    second = (~(one | zero) | (one & ~zero) | two, zero | one | two)
    return first, tuple(bit & ~dense for bit in second)


class LanePair(wiring.Component):
    """Dot products of two output rows with 32 (dense) or 64 (2:4) activations per cycle.

    `load` takes a weight step; it is used from the next cycle on, with the `acts` of that cycle. `correction` (what the
    offset of dense codes added: 128 * sum of the activations, or 0) comes `latency - 1` cycles after its activations.
    `dots` of the activations of cycle t are valid in cycle t + `latency`.

    `planes[p]`: row r and position k at bit `(r * 32 + k) * 2`. `patterns[j]`: bit j of a pattern at `r * 16 + quad`.
    `dense_acts`: the 32 activations of a dense step; `acts`: the 64 of a 2:4 step.
    """

    latency = 4

    def __init__(self, positions: int = STEP):
        if positions % (2 * CHAIN) or not 2 * CHAIN <= positions <= STEP:
            raise ValueError(f"A pair has a multiple of {2 * CHAIN} positions up to {STEP}, not {positions}")
        self._positions = positions
        super().__init__(
            {
                "load": In(1),
                "sparse": In(1),
                "planes": In(data.ArrayLayout(unsigned(4 * positions), 4)),
                "patterns": In(data.ArrayLayout(unsigned(positions), 3)),
                "dense_acts": In(8 * positions),
                "acts": In(16 * positions),
                "correction": In(signed(DOT_BITS)),
                "dots": Out(data.ArrayLayout(signed(DOT_BITS), 2)),
            }
        )

    def elaborate(self, platform):
        m, positions = Module(), self._positions
        weights, first, second, sparse = self._weights(m)
        products = [self._multiplier(m, j, weights, first[j], second[j], sparse) for j in range(positions)]
        sums = []
        for chain in range(positions // CHAIN):
            total = Signal(SUM_BITS, name=f"sum_{chain}", reset_less=True)
            m.d.sync += total.eq(sum(products[CHAIN * chain : CHAIN * (chain + 1)])[:SUM_BITS])
            sums.append(total)
        self._dots(m, sums, self._correction(m, weights, sparse))
        return m

    def _weights(self, m):
        """Weight registers: unsigned fields per row and position, selects per multiplier, mode.

        A row's 32 fields are four registers of eight: register k % 4, byte k // 4. All crumbs of a plane then reach
        their places with one shift and mask per register, which costs a simulator far less than a slice per field.
        """
        positions = self._positions
        crumbs = Const(sum(3 << (8 * i) for i in range(positions // 4)), 2 * positions)
        fields = [
            [Signal(2 * positions, name=f"w_{r}_{s}", reset_less=True) for s in range(4)] for r in range(2)
        ]
        bits = [Signal(positions, name=f"select_{i}", reset_less=True) for i in range(4)]
        sparse = Signal(reset_less=True)
        with m.If(self.load):
            first, second = _selects(self.patterns, self.sparse)
            m.d.sync += [sparse.eq(self.sparse), *(bit.eq(new) for bit, new in zip(bits, first + second))]
            for r in range(2):
                rows = [plane.word_select(r, 2 * positions) for plane in self.planes]
                for s in range(4):
                    parts = [
                        (((row >> (2 * s)) & crumbs) << (2 * p))[: 2 * positions]
                        for p, row in enumerate(rows)
                    ]
                    m.d.sync += fields[r][s].eq(parts[0] | parts[1] | parts[2] | parts[3])
        weights = [[fields[r][k % 4].word_select(k // 4, 8) for k in range(positions)] for r in range(2)]
        first = [Cat(bits[0][j], bits[1][j]) for j in range(positions)]
        second = [Cat(bits[2][j], bits[3][j]) for j in range(positions)]
        return weights, first, second, sparse

    def _multiplier(self, m, j, weights, first, second, sparse):
        """One DSP: operand registers, then the product register."""
        row, quad = divmod(j, self._positions // 2)
        c1, c2 = weights[row][2 * quad], weights[row][2 * quad + 1]
        acts = [self.acts[32 * quad + 8 * i : 32 * quad + 8 * i + 8] for i in range(4)]
        x = Signal(signed(27), name=f"x_{j}", reset_less=True)
        y = Signal(signed(FIELD), name=f"y_{j}", reset_less=True)
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
        product = Signal(SUM_BITS, name=f"product_{j}", reset_less=True)
        m.d.sync += [
            x.eq(Cat(low, Const(0, 7), high)),
            y.eq(Mux(sparse, kept, Cat(dense, dense[7].replicate(10)))),
            product.eq(x * y),
        ]
        return product

    def _correction(self, m, weights, sparse):
        """What to take off each row, aligned with the chain sums, and the mode there."""
        mode = sparse
        rows = [sum(weights[r][2 * q][:2] for q in range(self._positions // 2)) for r in range(2)]
        for stage in range(3):
            delayed = [Signal(6, name=f"codes_{r}_{stage}", reset_less=True) for r in range(2)]
            later = Signal(name=f"sparse_{stage}", reset_less=True)
            m.d.sync += [*(d.eq(r) for d, r in zip(delayed, rows)), later.eq(mode)]
            rows, mode = delayed, later
        bias = 128 * 3 * (self._positions // 2)
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
        dots = [Signal(signed(DOT_BITS), name=f"dot_{r}", reset_less=True) for r in range(2)]
        for r in range(2):
            m.d.comb += self.dots[r].eq(dots[r])
            m.d.sync += dots[r].eq(sum(rows[r]) - terms[r])
