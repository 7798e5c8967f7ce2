"""The multiplier array: pairs of output rows on packed DSP multipliers, for every weight format.

A pair of rows owns 32 multipliers of 27 x 18 bits, and each does two multiply-accumulates per cycle:

- dense: `(w1 + w2 * 2**18) * a`: two rows share an activation. Stored fields are unsigned, so the operand is a
  concatenation. A chain of eight sums to 19 bits a field (8 * 255 * 127 < 2**18), one more than there is room for: the
  upper field's lowest bit, which is known without it (the parity of the products' lowest bits), tells the overlap.
- 2:4: `(a1 + a2 * 2**15) * (w2 + w1 * 2**15)`: nothing is shared, the middle field is `a1 * w1 + a2 * w2` (pair-dot).
  Activations enter as a + 128, so that this operand too is a concatenation; `128 * sum(w)` is taken off again. Weights
  are 2 c - 3 = (2 c + 1) - 4 of their codes: the pre-adder takes the four off, and its gate chooses between them and
  the activation of a dense step, so that the second operand needs no LUT at all.

The weight operands stay while activation vectors pass: matrix-vector is the case of one vector.

A chain is eight DSP48E2 on one cascade: operand and product registers inside, four post-adders between registers of
the sum. `primitives` builds it so. Without it the same dot products, of the same cycles, are written as sums of
products, for simulation; `tests/rtl/test_engine_dsp.py` holds the two against each other.
"""

import itertools
from dataclasses import dataclass

from amaranth import Cat, ClockSignal, Const, Instance, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.engine import STEP
from hw.lib.arith import shift_left
from hw.lib.pipeline import Pipe

CHAIN = 8
HOPS = 4
"""Post-adders of a cascade between two registers of the sum."""
FIELD = 18
PAIR_FIELD = 15
SUM_BITS = 2 * FIELD + 2
WHOLE = 64
"""Bits of a simulator's word."""
HALF = WHOLE // 2
"""Of each of two sums in one."""
BLOCK = WHOLE // 4
"""Positions of both rows of which a word holds two bits each."""
DOT_BITS = 21
"""32 * 255 * 127 < 2**20."""
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


SPARSE_SHARED = 0xFC
"""What `shared` holds in a 2:4 step: -4, which the codes of both weights are short of."""


def shared_operand(acts: Value, sparse: Value, width: int = 9) -> Value:
    """`LanePair.shared` from the activations of a dense step: the same for every pair, so that it is made once.

    A position is `width` bits: the activation and its sign extension, of which the device needs bit 17 alone. In a 2:4
    step it is -4 - 4 * 2**15 there; the form that is simulated does not read it then.
    """
    positions = [acts[8 * j : 8 * j + 8] for j in range(len(acts) // 8)]
    return Cat(
        Cat(Mux(sparse, SPARSE_SHARED, act)[:8], (act[7] & ~sparse).replicate(width - 8)) for act in positions
    )


@dataclass(frozen=True)
class Operands:
    """What a multiplier chooses its two operands from."""

    first: Value
    second: Value
    sparse: Value
    acts: list[Value]
    weights: tuple[Value, Value]
    codes: tuple[Value, Value]
    shared: Value

    def selected(self, m) -> Value:
        """The first operand by the selects alone, which read the weights where a step is dense: one LUT per bit."""
        low, high = Signal(8, name="low"), Signal(8, name="high")
        with m.Switch(self.first):
            for i in range(3):
                with m.Case(i):
                    m.d.comb += low.eq(self.acts[i] ^ 0x80)
            with m.Default():
                m.d.comb += low.eq(self.weights[0])
        with m.Switch(self.second):
            for i in range(1, 4):
                with m.Case(i):
                    m.d.comb += high.eq(self.acts[i] ^ 0x80)
            with m.Default():
                m.d.comb += high.eq(Cat(Const(0, 3), self.weights[1][:5]))
        return Cat(low, Const(0, 7), high, self.weights[1][5:], Const(0, 1))

    def halves(self) -> tuple[Value, Value]:
        """Two terms of the second operand, both nothing but wires: in a 2:4 step their sum, else the first alone."""
        c1, c2 = self.codes
        codes = Cat(Const(1, 1), c2, Const(0, 12), Const(1, 1), c1)
        return Cat(self.shared[:8], self.shared[7].replicate(9), self.shared[8]), codes


class LanePair(wiring.Component):
    """Dot products of two output rows with 32 (dense) or 64 (2:4) activations per cycle.

    `load` takes a weight step; it is used from the next cycle on, with the `acts` of that cycle. `correction` (what the
    offset of dense codes takes: -128 * sum of the activations, or 0; 0 in a 2:4 step) comes `latency - 1` cycles after
    its activations. `dots` of the activations of cycle t are valid in cycle t + `latency` if `valid` was high in cycle
    t; on the device, stages without work stand still.

    `planes[p][h]`: row r and position `BLOCK * h` + k at bit `(r * BLOCK + k) * 2`; a 2:4 step has plane 0 alone, the
    others zero. `wide`: planes 2 and 3 are not zero; the device does not ask. `patterns[j]`: bit j of a pattern at
    `r * 16 + quad`. `shared`: `shared_operand` of the 32 activations of a dense step, or of none, in 9 bits each on the
    device and in `WHOLE` for simulation; `acts`: the 64 of a 2:4 step.
    """

    latency = 5

    def __init__(self, positions: int = STEP, *, primitives: bool = False):
        if positions % (2 * CHAIN) or not 2 * CHAIN <= positions <= STEP:
            raise ValueError(f"A pair has a multiple of {2 * CHAIN} positions up to {STEP}, not {positions}")
        self._positions = positions
        self._primitives = primitives
        self._shared_bits = 9 if primitives else WHOLE
        super().__init__(
            {
                "load": In(1),
                "valid": In(1),
                "sparse": In(1),
                "wide": In(1),
                "planes": In(WHOLE).array(4, positions // BLOCK),
                "patterns": In(data.ArrayLayout(unsigned(positions), 3)),
                "shared": In(self._shared_bits * positions),
                "acts": In(16 * positions),
                "correction": In(signed(DOT_BITS)),
                "dots": Out(data.ArrayLayout(signed(DOT_BITS), 2)),
            }
        )

    def elaborate(self, platform):
        m, positions = Module(), self._positions
        words, first, second, sparse = self._weights(m)
        weights = [
            [_word(words, k).word_select(4 * r + k % BLOCK // 4, 8) for k in range(positions)]
            for r in range(2)
        ]
        operands = [self._operands(j, weights, first[j], second[j], sparse) for j in range(positions)]
        if not self._primitives:
            self._arithmetic(m, operands, words, sparse)
            return m
        enables = [self.valid]
        for stage in range(1, self.latency):
            later = Signal(name=f"valid_{stage}")
            m.d.sync += later.eq(enables[-1])
            enables.append(later)
        corrections = self._correction(m, weights, sparse)
        sums, parities = [], []
        for c in range(positions // CHAIN):
            links = operands[CHAIN * c : CHAIN * (c + 1)]
            sums.append(_cascade(m, c, links, enables))
            parities.append(_parity(m, c, links))
        self._dots(m, sums, parities, corrections, enables[-1])
        return m

    def _weights(self, m):
        """Weight registers: unsigned fields per row and position, selects per multiplier, mode.

        The fields of a block of positions are four words: word k % 4, and there byte k % 16 // 4 of the row's half. All
        crumbs of a plane then reach their places with one shift and mask per word, and both rows' fields leave it with
        another. Where it is simulated, planes 2 and 3 have registers of their own, which mostly stay as they are.
        """
        positions, words = self._positions, []
        crumbs = Const(sum(3 << (8 * i) for i in range(8)), WHOLE)
        selects = [Signal(positions, name=f"select_{i}", reset_less=True) for i in range(4)]
        sparse = Signal(reset_less=True)
        with m.If(self.load):
            m.d.sync += sparse.eq(self.sparse)
        with m.If(self.load & (self._primitives | self.sparse)):
            first, second = _selects(self.patterns, self.sparse)
            m.d.sync += [bit.eq(new) for bit, new in zip(selects, first + second)]
        for h, s in itertools.product(range(positions // BLOCK), range(4)):
            parts = [(((self.planes[p][h] >> 2 * s) & crumbs) << 2 * p)[:WHOLE] for p in range(4)]
            word = Signal(WHOLE, name=f"w_{h}_{s}", reset_less=True)
            if self._primitives:
                with m.If(self.load):
                    m.d.sync += word.eq(parts[0] | parts[1] | parts[2] | parts[3])
            else:
                high = Signal(WHOLE, name=f"high_{h}_{s}", reset_less=True)
                with m.If(self.load):
                    m.d.sync += word.eq(parts[0] | parts[1])
                with m.If(self.load & self.wide):
                    m.d.sync += high.eq(parts[2] | parts[3])
                with m.Elif(self.load):
                    m.d.sync += high.eq(0)
                word = word | high
            words.append(word)
        first = [Cat(selects[0][j], selects[1][j]) for j in range(positions)]
        second = [Cat(selects[2][j], selects[3][j]) for j in range(positions)]
        return words, first, second, sparse

    def _operands(self, j, weights, first, second, sparse):
        """What multiplier j gets, in front of its registers."""
        row, quad = divmod(j, self._positions // 2)
        return Operands(
            first=first,
            second=second,
            sparse=sparse,
            acts=[self.acts[32 * quad + 8 * i : 32 * quad + 8 * i + 8] for i in range(4)],
            weights=(weights[0][j], weights[1][j]),
            codes=(weights[row][2 * quad][:2], weights[row][2 * quad + 1][:2]),
            shared=self.shared.word_select(j, self._shared_bits),
        )

    def _correction(self, m, weights, sparse):
        """What to add to each row, aligned with the chain sums, and the mode there; a 2:4 step: -128 * sum(2 c - 3)."""
        mode, half = sparse, 3 * self._positions // 2
        rows = [(sum(~w[:2] & 3 for w in weights[r]) - half)[:8].as_signed() for r in range(2)]
        for stage in range(self.latency - 1):
            delayed = [Signal(signed(8), name=f"codes_{r}_{stage}", reset_less=True) for r in range(2)]
            later = Signal(name=f"sparse_{stage}", reset_less=True)
            with m.If(mode):
                m.d.sync += [d.eq(r) for d, r in zip(delayed, rows)]
            m.d.sync += later.eq(mode)
            rows, mode = delayed, later
        return [Mux(mode, shift_left(row, 8), self.correction) for row in rows], mode

    def _arithmetic(self, m, operands, words, sparse):
        """The same dot products from ordinary sums, as a simulator computes them fastest; registers follow.

        A sum is read by its register alone, under the condition that it is wanted: a simulator then skips it otherwise.
        """
        half, late = self._positions // 2, Signal(name="sparse_late", reset_less=True)
        totals = [Signal(WHOLE, name=f"total_{r}", reset_less=True) for r in range(2)]
        codes = Signal(WHOLE, reset_less=True)
        m.d.sync += late.eq(sparse)
        with m.If(self.valid & sparse):
            m.d.sync += codes.eq(sum(words)[:WHOLE])  # a byte of 3 at most from each
            m.d.sync += [t.eq(_sparse_sum(operands[half * r :][:half])) for r, t in enumerate(totals)]
        with m.Elif(self.valid):
            m.d.sync += totals[0].eq(_dense_sum(operands, words))
        dots = [Signal(signed(DOT_BITS), name=f"sum_{r}", reset_less=True) for r in range(2)]
        with m.If(late):
            for r, dot in enumerate(dots):
                weights = sum(codes.word_select(4 * r + i, 8) for i in range(4))
                m.d.sync += dot.eq(_upper(totals[r]) + shift_left(3 * half - weights, 8))
        with m.Else():
            m.d.sync += [dots[0].eq(totals[0][:DOT_BITS]), dots[1].eq(_upper(totals[0]))]
        for r, dot in enumerate(dots):
            dot = Pipe(m).reg(dot, f"sum_{r}", self.latency - 3)
            m.d.comb += self.dots[r].eq(
                Pipe(m).reg((dot + self.correction)[:DOT_BITS].as_signed(), f"dot_{r}")
            )

    def _dots(self, m, sums, parities, corrections, enable):
        """Adds the fields of all chains: a row's own chains in a 2:4 step, its field of every chain in a dense one.

        What rounds a field is a carry of the adder that takes it: no field is corrected in front.
        """
        terms, sparse = corrections
        # The lower field's top bit lies on the upper field's lowest one.
        tops = [total[FIELD] ^ parity for total, parity in zip(sums, parities)]
        dense = [
            [(Cat(total[:FIELD], top).as_signed(), Const(0, 1)) for total, top in zip(sums, tops)],
            [(total[FIELD:].as_signed(), top) for total, top in zip(sums, tops)],
        ]
        half = len(sums) // 2
        for r in range(2):
            own, other = slice(half * r, half * (r + 1)), slice(half * (1 - r), half * (2 - r))
            fields = [
                (
                    Mux(sparse, total[PAIR_FIELD : 2 * PAIR_FIELD].as_signed(), field),
                    Mux(sparse, total[PAIR_FIELD - 1], carry),
                )
                for total, (field, carry) in zip(sums[own], dense[r][own])
            ]
            fields += [(Mux(sparse, 0, field), carry & ~sparse) for field, carry in dense[r][other]]
            (total, carry), *rest = fields
            for field, next_carry in [*rest, (terms[r], Const(0, 1))]:
                total, carry = _add(total, field, carry), next_carry
            dot = Signal(signed(DOT_BITS), name=f"dot_{r}", reset_less=True)
            with m.If(enable):
                m.d.sync += dot.eq(total)
            m.d.comb += self.dots[r].eq(dot)


def _word(words, position) -> Value:
    """Which of the weight words holds the fields of a position."""
    return words[position // BLOCK * 4 + position % 4]


def _dense_sum(operands, words) -> Value:
    """Both rows' dot products, `HALF` bits apart: a product of one activation and both rows' weights after the other.

    A negative lower one has borrowed from the upper.
    """
    total = Const(0, WHOLE)
    for j, o in enumerate(operands):
        pair = (_word(words, j) >> 8 * (j % BLOCK // 4)) & Const(0xFF << HALF | 0xFF, WHOLE)
        total = (total + (pair * o.shared)[:WHOLE])[:WHOLE]
    return total


def _sparse_sum(operands) -> Value:
    """One row's `sum((a + 128) * (2 c - 3))` in the upper half.

    A product is (a1 + 128 + (a2 + 128) * 2**HALF) * (w2 + w1 * 2**HALF); weights are odd, so the borrow of a negative
    w2 just clears the lowest bit of w1.
    """
    total = Const(0, WHOLE)
    for o in operands:
        biased = [act ^ 0x80 for act in o.acts]
        one = Mux(o.first[1], biased[2], Mux(o.first[0], biased[1], biased[0]))
        two = Mux(o.second[1], Mux(o.second[0], biased[3], biased[2]), biased[1])
        c1, c2 = o.codes
        lower = Cat(Const(1, 1), c2[0], (~c2[1]).replicate(HALF - 2))
        upper = Cat(c2[1], c1[0], (~c1[1]).replicate(HALF - 2))
        x = Cat(one, Const(0, HALF - 8), two, Const(0, HALF - 8))
        total = (total + (x * Cat(lower, upper))[:WHOLE])[:WHOLE]
    return total


def _upper(total: Value) -> Value:
    """The upper half of a word, without what a negative lower half has borrowed."""
    return (total[HALF:] + total[HALF - 1])[:HALF]


def _add(a: Value, b: Value, carry: Value) -> Value:
    """`a + b + carry` of signed values in one adder, whose lowest bit makes the carry."""
    return (Cat(Const(1, 1), a).as_signed() + Cat(carry, b).as_signed())[1 : 1 + DOT_BITS].as_signed()


_MULTIPLY_ADD = {"USE_MULT": "MULTIPLY", "AMULTSEL": "A", "BMULTSEL": "AD", "PREADDINSEL": "B", "MREG": 1, "BREG": 1,
                 "BCASCREG": 1, "DREG": 1, "INMODEREG": 1}  # fmt: skip
_UNUSED_REGISTERS = (
    "CREG",
    "OPMODEREG",
    "ALUMODEREG",
    "CARRYINREG",
    "CARRYINSELREG",
)
_ZERO = {"C": 48, "ALUMODE": 4, "CARRYIN": 1, "CARRYINSEL": 3, "CEALUMODE": 1, "CEB1": 1, "CEC": 1, "CECARRYIN": 1,
         "CECTRL": 1, "RSTA": 1, "RSTALLCARRYIN": 1, "RSTALUMODE": 1, "RSTB": 1, "RSTC": 1, "RSTCTRL": 1, "RSTD": 1,
         "RSTINMODE": 1, "RSTM": 1, "RSTP": 1}  # fmt: skip


def _cascade(m, index, operands, enables):
    """The same on a cascade of DSP48E2: the second four operands wait in a second register, that of the pre-adder for
    the second operand. The pre-adder adds the codes (port B) to what all pairs share (port D), or a gate drops them."""
    above, total = Const(0, 48), Signal(48, name=f"cascade_{index}")
    for j, choice in enumerate(operands):
        x, (shared, codes) = choice.selected(m), choice.halves()
        ends = (j + 1) % HOPS == 0
        below = Signal(48, name=f"pcout_{index}_{j}")
        depth = 1 + j // HOPS
        registers = {"AREG": depth, "ACASCREG": depth, "ADREG": depth - 1, "PREG": int(ends)}
        parameters = {**_MULTIPLY_ADD, **registers, **dict.fromkeys(_UNUSED_REGISTERS, 0)}
        m.submodules[f"dsp_{index}_{j}"] = Instance(
            "DSP48E2",
            **{f"p_{k}": v for k, v in parameters.items()},
            **{f"i_{k}": Const(0, n) for k, n in _ZERO.items()},
            **{f"i_CE{port}": enables[0] for port in ("A1", "B2", "D", "INMODE")},
            i_CEA2=enables[depth - 1],
            i_CEAD=enables[depth - 1],
            i_CEM=enables[depth],
            i_CEP=enables[depth + 1],
            i_CLK=ClockSignal(),
            i_A=Cat(x, Const(0, 3)),
            i_B=codes,
            i_D=Cat(shared, shared[-1].replicate(9)),
            i_INMODE=Cat(Const(0, 1), ~choice.sparse, Const(0b001, 3)),
            i_OPMODE=Const(0b00_001_01_01 if j else 0b00_000_01_01, 9),
            i_PCIN=above,
            o_PCOUT=below,
            **({"o_P": total} if j == CHAIN - 1 else {}),
        )
        above = below
    return total[:SUM_BITS]


def _parity(m, index, operands):
    """Lowest bit of a dense chain's upper field, with the chain's sum."""
    odd = Const(0, 1)
    for o in operands:
        odd = odd ^ (o.weights[1][0] & o.shared[0])
    for stage in range(LanePair.latency - 1):
        later = Signal(name=f"odd_{index}_{stage}", reset_less=True)
        m.d.sync += later.eq(odd)
        odd = later
    return odd
