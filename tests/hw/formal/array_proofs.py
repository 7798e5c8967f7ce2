"""What a multiplier gets from its selects and from the pre-adder, against the numbers that the packings name; and what
an accumulator keeps of its value, against a shift."""

from itertools import combinations

from amaranth import Array, Assert, Assume, Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In

from golden.spec.formats import ATTN_ACC_BITS
from hw.engine.array import FIELD, PAIR_FIELD, Operands, _selects, shared_operand
from hw.engine.lane import UpdateControl, decayed, reach

KEPT = [*combinations(range(4), 2), (0, 0), (0, 0)]
"""Positions that patterns 0 to 5 keep; 6 and 7 are none."""


class OperandProof(wiring.Component):
    """Both operands of one multiplier, for every weight, pattern, activation and mode that a step may hold."""

    def __init__(self, shared=shared_operand):
        self._shared = shared
        super().__init__(
            {
                "acts": In(32),
                "dense": In(8),
                "weights": In(16),
                "codes": In(4),
                "pattern": In(3),
                "sparse": In(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        first, second = _selects(tuple(self.pattern[j : j + 1] for j in range(3)), self.sparse)
        o = Operands(
            first=Cat(*first),
            second=Cat(*second),
            sparse=self.sparse,
            acts=[self.acts[8 * i : 8 * i + 8] for i in range(4)],
            weights=(self.weights[:8], self.weights[8:]),
            codes=(self.codes[:2], self.codes[2:]),
            shared=self._shared(self.dense, self.sparse),
        )
        shared, codes = o.halves()
        x, y = Signal(27), Signal(FIELD)
        one, two = (Array(o.acts[kept[n]].as_signed() for kept in KEPT)[self.pattern] for n in range(2))
        w1, w2 = (2 * code - 3 for code in o.codes)
        sparse_x = one + 128 + ((two + 128) << PAIR_FIELD)
        sparse_y = w2 + (w1 << PAIR_FIELD)
        m.d.comb += [
            # A 2:4 step has no plane but the lowest, and none of the patterns 6 and 7.
            Assume(~self.sparse | ((self.weights & 0xFCFC) == 0)),
            Assume(~(self.pattern[1] & self.pattern[2])),
            x.eq(Mux(self.sparse, sparse_x, self.weights[:8] + (self.weights[8:] << FIELD))),
            y.eq(Mux(self.sparse, sparse_y, self.dense.as_signed())),
            Assert(o.selected(m) == x),
            Assert((shared + Mux(self.sparse, codes, Const(0, FIELD)))[:FIELD] == y),
        ]
        return m


class DecayProof(wiring.Component):
    """An accumulator's old value, for every shift: its three stages leave `old >> decay`, or 0 of a first update."""

    def __init__(self, reach=reach):
        self._reach = reach
        super().__init__({"old": In(signed(ATTN_ACC_BITS)), "decay": In(6), "first": In(1)})

    def elaborate(self, platform):
        m = Module()
        update = Signal(UpdateControl)
        m.d.comb += [
            update.decay.eq(self.decay),
            update.first.eq(self.first),
            update.reach.eq(self._reach(self.decay, self.first)),
            Assert(decayed(m, self.old, update) == Mux(self.first, 0, self.old >> self.decay)),
        ]
        return m
