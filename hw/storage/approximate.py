"""Alpha of SparF: how much of the approximate softmax the selected tokens hold (docs/formats-storage.md, section 6).

The probabilities of the approximate pass are kept as they leave the softmax, in 16 bits, with the running maximum
of their group; the selection reads them back token by token while the pages of the exact pass are on their way.
"""

from amaranth import Array, Cat, Const, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from golden.spec.storage import ALPHA_FRAC, GROUP_TOKENS, L_BITS, L_EXTRA_FRAC, MAXIMUM_BITS, RECIPROCAL_BITS
from hw.lib.arith import Divider, bit_length
from hw.lib.memories import TypedMemory
from hw.storage.fp import _registered, pipe
from hw.storage.lane import PROBABILITY
from hw.storage.topk.unit import TopK

_PIPE = 5
"""From a token's address to its weight in the sum."""


class AlphaUnit(wiring.Component):
    """Ports:

    - `probability`: what the kernel's lanes give in the approximate pass; `clear` before its first group.
    - `capture`: the pass has ended; `sum` holds. Rows are taken from then on.
    - `row`: the selection, a mask per 16 tokens; every row is passed on at `selected` and its tokens are summed, one
      per cycle (`whole` says that all tokens are selected, which makes alpha 1).
    - `alpha`: per lane, from `done` (one cycle) until the next `done`.
    """

    def __init__(self, max_tokens: int, lanes: int):
        self._tokens, self._lanes = max_tokens, lanes
        row = TopK.row_layout(max_tokens, GROUP_TOKENS)
        super().__init__(
            {
                "clear": In(1),
                "probability": In(PROBABILITY).array(lanes),
                "capture": In(1),
                "sum": In(unsigned(L_BITS)).array(lanes),
                "whole": In(1),
                "row": In(stream.Signature(row)),
                "selected": Out(stream.Signature(row)),
                "alpha": Out(ALPHA_FRAC + 1).array(lanes),
                "done": Out(1),
                "idle": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        lanes = range(self._lanes)
        groups = self._tokens // GROUP_TOKENS
        m.submodules.weights = weights = TypedMemory(
            data.ArrayLayout(16, self._lanes), self._tokens, ram_style="block"
        )
        m.submodules.maxima = maxima = TypedMemory(
            data.ArrayLayout(MAXIMUM_BITS, self._lanes), groups, ram_style="block"
        )
        group = Signal(range(groups))
        lead = self.probability[0]
        recording = Signal()  # the kernel may take a dense head before the selection has been read
        tops = [Signal(signed(MAXIMUM_BITS), name=f"top_{n}") for n in lanes]
        with m.If(self.clear):
            m.d.sync += [group.eq(0), recording.eq(1)]
        with m.Elif(self.capture):
            m.d.sync += recording.eq(0)
        with m.Elif(recording & lead.last):
            m.d.sync += group.eq(group + 1)
            m.d.sync += [top.eq(p.maximum) for top, p in zip(tops, self.probability)]
        m.d.comb += [
            weights.w.addr.eq(Cat(lead.slot, group)),
            weights.w.en.eq(recording & lead.valid),
            maxima.w.addr.eq(group),
            maxima.w.en.eq(recording & lead.last),
            Cat(weights.w.data).eq(Cat(p.p for p in self.probability)),
            Cat(maxima.w.data).eq(Cat(p.maximum for p in self.probability)),
        ]

        # --- the selection, a token per cycle
        left, row_index = Signal(GROUP_TOKENS), Signal(range(groups))
        ended, armed, forwarded = Signal(), Signal(), Signal()
        lowest = left & (-left)[:GROUP_TOKENS]
        token = Signal(4)
        m.d.comb += token.eq(
            Cat((lowest & sum(1 << n for n in range(16) if n >> bit & 1)).any() for bit in range(4))
        )
        reading = Signal()
        m.d.comb += [
            self.selected.payload.eq(self.row.payload),
            weights.r[0].addr.eq(Cat(token, row_index)),
            weights.r[0].en.eq(1),
            maxima.r[0].addr.eq(row_index),
            maxima.r[0].en.eq(1),
        ]
        totals = [Signal(L_BITS, name=f"total_{n}") for n in lanes]
        in_sum = pipe(m, reading, _PIPE, "in_sum")
        for n in lanes:
            pattern, top = weights.r[0].data[n], maxima.r[0].data[n].as_signed()
            exponent = pattern[10:15]
            significand = Cat(pattern[:10], exponent.any())
            integer_2 = _registered(
                m, f"integer_{n}", (significand << Mux(exponent.any(), exponent - 1, 0)[:4])[:25]
            )
            fall_2 = _registered(m, f"fall_{n}", (tops[n] - top)[: MAXIMUM_BITS + 1])
            gone = fall_2[6:].any()
            coarse_3 = _registered(
                m, f"coarse_{n}", Mux(gone, 0, (integer_2 << L_EXTRA_FRAC) >> Cat(Const(0, 3), fall_2[3:6]))
            )
            fine_4 = _registered(m, f"fine_{n}", coarse_3 >> _registered(m, f"fall_low_{n}", fall_2[:3]))
            weight_5 = _registered(m, f"weight_{n}", fine_4)
            with m.If(self.capture):
                m.d.sync += totals[n].eq(0)
            with m.Elif(in_sum):
                m.d.sync += totals[n].eq(totals[n] + weight_5)

        sums = [Signal(L_BITS, name=f"sum_{n}") for n in lanes]
        whole = Signal()
        with m.If(self.capture):
            m.d.sync += [armed.eq(1), whole.eq(self.whole)]
            m.d.sync += [held.eq(port) for held, port in zip(sums, self.sum)]
        m.d.comb += self.idle.eq(0)
        lane = Signal(range(self._lanes))
        wait = Signal(range(_PIPE + 3))
        start_ratio, ratio_done = Signal(), Signal()
        with m.FSM():
            with m.State("row"):
                m.d.comb += self.idle.eq(~armed)
                m.d.comb += [
                    self.selected.valid.eq(self.row.valid & armed & ~forwarded),
                    self.row.ready.eq(armed & self.selected.ready),
                ]
                with m.If(self.row.valid & self.row.ready):
                    m.d.sync += [
                        left.eq(self.row.p.mask),
                        row_index.eq(self.row.p.row),
                        ended.eq(self.row.p.last),
                    ]
                    with m.If(self.row.p.mask.any() | self.row.p.last):
                        m.next = "tokens"
            with m.State("tokens"):
                m.d.comb += reading.eq(left.any())
                m.d.sync += [left.eq(left & ~lowest), wait.eq(_PIPE + 1)]
                with m.If((left & ~lowest) == 0):
                    m.next = "row"
                    with m.If(ended):
                        m.next = "settle"
            with m.State("settle"):
                m.d.sync += [wait.eq(wait - 1), lane.eq(0)]
                with m.If(wait == 0):
                    m.d.comb += start_ratio.eq(1)
                    m.next = "ratio"
            with m.State("ratio"), m.If(ratio_done):
                m.d.sync += lane.eq(lane + 1)
                with m.If(lane == self._lanes - 1):
                    m.d.sync += armed.eq(0)
                    m.d.comb += self.done.eq(1)
                    m.next = "row"
                with m.Else():
                    m.next = "again"
            with m.State("again"):
                m.d.comb += start_ratio.eq(1)
                m.next = "ratio"
        self._ratio(m, Array(totals)[lane], Array(sums)[lane], lane, whole, start_ratio, ratio_done)
        return m

    def _ratio(self, m, total, whole_sum, lane, whole, start, done):
        """alpha of one lane: total / whole_sum, Q16."""
        m.submodules.divider = divider = Divider(34, RECIPROCAL_BITS, RECIPROCAL_BITS, digits=1)
        # the lane stands still from the cycle before `start`
        total, whole_sum = _registered(m, "picked_total", total), _registered(m, "picked_sum", whole_sum)
        length, down, up = Signal(6), Signal(6), Signal(6)
        above, top = Signal(L_BITS), Signal(L_BITS)
        product = Signal(24 + RECIPROCAL_BITS)
        m.d.comb += [divider.i.p.n.eq((1 << 33) - 1), divider.i.p.d.eq(top[-RECIPROCAL_BITS:])]
        with m.FSM(name="ratio"):
            with m.State("idle"), m.If(start):
                m.next = "length"
            with m.State("length"):
                m.d.sync += length.eq(bit_length(whole_sum))
                m.next = "amount"
            with m.State("amount"):
                m.d.sync += [down.eq(length - 24), up.eq(L_BITS - length)]
                m.next = "shift"
            with m.State("shift"):
                m.d.sync += [above.eq(total >> down), top.eq(whole_sum << up)]
                m.next = "divide"
            with m.State("divide"):
                m.d.comb += divider.i.valid.eq(1)
                with m.If(divider.i.ready):
                    m.next = "multiply"
            with m.State("multiply"):
                m.d.comb += divider.o.ready.eq(1)
                with m.If(divider.o.valid):
                    m.d.sync += product.eq(above[:24] * divider.o.payload)
                    m.next = "round"
            with m.State("round"):
                quotient = (product + (1 << 23)) >> 24
                limited = Mux(whole | quotient[ALPHA_FRAC:].any(), 1 << ALPHA_FRAC, quotient[:ALPHA_FRAC])
                with m.Switch(lane):
                    for n in range(self._lanes):
                        with m.Case(n):
                            m.d.sync += self.alpha[n].eq(limited)
                m.d.comb += done.eq(1)
                m.next = "idle"


assert ceil_log2(GROUP_TOKENS) == 4
