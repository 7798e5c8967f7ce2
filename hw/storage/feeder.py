"""From filtered pages to kernel beats: one feeder per kernel walks the ledger of its passes.

The ledger says which page comes next, or why it does not; a pass that loses a page ends with that reason and touches no
other pass.
"""

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.storage import BEAT_ELEMENTS, TOKEN_BITS, PageKind, Status
from hw.storage.kernel import BEAT, HEAD, Op
from hw.storage.nfc.layouts import PAGE
from hw.storage.passes import LEDGER, SLOTS

JOB = data.StructLayout({"sparse": 1, "tokens": TOKEN_BITS + 1})
FAULT = data.StructLayout({"slot": range(SLOTS), "status": 4, "index": TOKEN_BITS})
MEAN_ROW = 7
"""v-bar is stored as an eighth query."""


class Feeder(wiring.Component):
    """Ports:

    - `ledger`, `page`: the kernel's pages in order. `o`: beats to the kernel; `kernel_idle` from it.
    - `slot`: job of the running pass; `job` and `ready` (its alpha is known) answer in the same cycle.
    - `address` (row of q, slice) and `elements`, one cycle later.
    - `score` (one cycle): a pass asks for the token selection, which answers with `score_ready` from then on;
      `scored` (one cycle): its last score has been made.
    - `fault` (one cycle): a page of `slot` failed; `ended` (one cycle): an exact pass is over, `failed` or with
      output to come.
    """

    def __init__(self):
        super().__init__(
            {
                "wide": In(1),
                "m_log2": In(2),
                "queries": In(3),
                "ledger": In(stream.Signature(LEDGER)),
                "page": In(stream.Signature(PAGE)),
                "o": Out(stream.Signature(BEAT)),
                "kernel_idle": In(1),
                "slot": Out(range(SLOTS)),
                "job": In(JOB),
                "ready": In(1),
                "address": Out(data.StructLayout({"slice": 3, "row": 3})),
                "elements": In(data.ArrayLayout(16, BEAT_ELEMENTS)),
                "score": Out(1),
                "score_ready": In(1),
                "scored": Out(1),
                "fault_valid": Out(1),
                "fault": Out(FAULT),
                "ended": Out(1),
                "failed": Out(1),
            }
        )

        # State that proofs refer to: beats of a page pass (this is state "beats", as a register of its own: their
        # handshake awaits no decoder); of the present beat, its number in the row, token or group, whether it begins a
        # block or a channel's row, and whether it ends its row; the page's group of 16 tokens; tokens or channels of
        # the block that are still to come, the present one included.
        self.passing = Signal()
        self.count, self.first, self.row_end = Signal(7), Signal(), Signal()
        self.half, self.marks = Signal(), Signal(16)

    def elaborate(self, platform):
        m = Module()
        entry, page, beat = self.ledger.p, self.page.p, self.o.p
        approximate = Signal()
        failed = Signal()
        slot = Signal(range(SLOTS))
        row, slice_ = Signal(3), Signal(3)
        left = Signal(TOKEN_BITS + 1)  # approximate pass: tokens not yet scored
        fresh, asked = Signal(), Signal()
        exact_sparse = self.job.sparse & ~approximate
        m.d.comb += [
            self.slot.eq(slot),
            self.address.row.eq(row),
            self.address.slice.eq(slice_),
            self.fault.slot.eq(slot),
            self.fault.index.eq(entry.index),
            self.fault.status.eq(Mux(entry.status != 0, entry.status, Status.UNCORRECTABLE_PAGE)),
        ]
        last_slice = Mux(self.wide, 7, 3)
        span = Signal(11)
        m.d.comb += span.eq(2048 >> self.m_log2)
        ending = Signal()
        settled = self._settled(m, ending)
        drained = Signal(7)  # rows of the block that have been scored
        skip = failed & ~approximate
        moved = self.passing & self.page.valid & (self.o.ready | skip)
        with m.If(self.passing):
            m.d.comb += self.page.ready.eq(self.o.ready | skip)
        with m.If(moved):
            self._advance(m, page)
            with m.If(self.row_end):
                m.d.sync += fresh.eq(0)

        with m.FSM():
            with m.State("idle"), m.If(self.ledger.valid):
                m.d.sync += [
                    slot.eq(entry.slot),
                    approximate.eq(entry.kind == PageKind.K_CHANNEL),
                    failed.eq(0),
                    row.eq(0),
                    slice_.eq(0),
                    fresh.eq(1),
                    asked.eq(0),
                ]
                m.next = "start"
            with m.State("start"):
                known = approximate | ~self.job.sparse | self.ready
                m.d.comb += [
                    beat.op.eq(Op.START),
                    beat.first.eq(1),
                    beat.last.eq(1),
                    self.o.valid.eq(known),
                ]
                head = data.View(HEAD, Cat(beat.data)[: HEAD.size])
                m.d.comb += [
                    head.wide.eq(self.wide),
                    head.queries.eq(self.queries),
                    head.approximate.eq(approximate),
                    head.sparse.eq(exact_sparse),
                ]
                m.d.sync += left.eq(self.job.tokens)
                with m.If(known & self.o.ready):
                    m.next = "fetch"
            with m.State("fetch"):
                m.next = "query"
            with m.State("query"):
                mean, row_read = row == MEAN_ROW, slice_ == last_slice
                m.d.comb += [
                    beat.op.eq(Mux(mean, Op.MEAN, Op.QUERY)),
                    beat.data.eq(self.elements),
                    beat.index.eq(row),
                    beat.first.eq(slice_ == 0),
                    beat.last.eq(row_read),
                    self.o.valid.eq(1),
                ]
                with m.If(self.o.ready):
                    m.d.sync += slice_.eq(slice_ + 1)
                    m.next = "fetch"
                    with m.If(row_read):
                        m.d.sync += [slice_.eq(0), row.eq(Mux(row == self.queries, MEAN_ROW, row + 1))]
                        with m.If(mean | ((row == self.queries) & ~exact_sparse)):
                            m.next = "page"
            with m.State("page"), m.If(self.ledger.valid):
                with m.If(entry.status != 0):
                    m.d.comb += self.fault_valid.eq(1)
                    m.d.sync += failed.eq(1)
                    m.next = "next"
                with m.Elif(self.page.valid):
                    with m.If(page.fail):
                        m.d.comb += [self.fault_valid.eq(1), self.page.ready.eq(1)]
                        m.d.sync += failed.eq(1)
                        m.next = "next"
                    with m.Else():
                        m.d.sync += self.passing.eq(1)
                        m.next = "beats"
                        self._begin(m, page)
            with m.State("beats"):
                self._beat(m, fresh, entry)
                m.d.comb += self.o.valid.eq(self.page.valid & ~skip)
                with m.If(moved & page.last):
                    m.d.sync += self.passing.eq(0)
                    m.next = "next"
            with m.State("next"):
                m.d.comb += self.ledger.ready.eq(1)
                m.d.sync += drained.eq(0)
                m.next = "page"
                with m.If(approximate & entry.block_end):
                    m.next = "ask"
                with m.Elif(entry.last):
                    m.next = "end"
            with m.State("ask"):
                m.d.comb += self.score.eq(~asked)
                m.d.sync += asked.eq(1)
                with m.If(asked & self.score_ready):
                    m.next = "drain"
            with m.State("drain"):
                m.d.comb += [
                    beat.op.eq(Op.DRAIN),
                    beat.first.eq(1),
                    beat.last.eq(1),
                    beat.mask.eq(Mux(left >= 16, 0xFFFF, (1 << left[:4]) - 1)),
                    self.o.valid.eq(1),
                ]
                with m.If(self.o.ready):
                    m.d.sync += [left.eq(Mux(left >= 16, left - 16, 0)), drained.eq(drained + 1), fresh.eq(1)]
                    with m.If(left <= 16):
                        m.next = "end"
                    with m.Elif(drained == (span >> 4) - 1):
                        m.next = "page"
            with m.State("end"):
                m.d.comb += ending.eq(1)
                with m.If(~approximate):
                    m.d.comb += [self.ended.eq(1), self.failed.eq(failed)]
                    m.next = "idle"
                with m.Elif(settled):
                    m.d.comb += self.scored.eq(1)
                    m.next = "idle"
        return m

    def _settled(self, m, ending):
        """Since its last beat the kernel has been idle for a few cycles, so that what the beat caused has happened."""
        still = Signal(4)
        m.d.sync += still.eq(Mux(ending & self.kernel_idle, Mux(still == 15, 15, still + 1), 0))
        return still == 15

    def _begin(self, m, page):
        """Before a page's first beat."""
        low = page.mask[:16].any()
        m.d.sync += [
            self.half.eq(~low),
            self.count.eq(0),
            self.row_end.eq(0),
            self.first.eq(1),
            self.marks.eq(Mux(low, page.mask[:16], page.mask[16:])),
        ]

    def _others(self):
        """Marks but the present one, which is the lowest."""
        return self.marks & (self.marks - 1)[:16]

    def _beat(self, m, fresh, entry):
        page, beat = self.page.p, self.o.p
        others = self._others()
        lowest = self.marks & ~others
        channel = Cat((lowest & sum(1 << n for n in range(16) if n >> bit & 1)).any() for bit in range(3))
        no_more = self.half | ~page.mask[16:].any()
        m.d.comb += [beat.data.eq(page.data), beat.mask.eq(Mux(self.half, page.mask[16:], page.mask[:16]))]
        m.d.comb += beat.first.eq(self.first)
        with m.Switch(page.kind):
            with m.Case(PageKind.K_TOKEN):
                m.d.comb += [
                    beat.op.eq(Op.K),
                    beat.last.eq(self.row_end & (others == 0)),
                ]
            with m.Case(PageKind.V_TOKEN):
                m.d.comb += [
                    beat.op.eq(Op.V),
                    beat.last.eq(self.row_end),
                    beat.flag.eq(entry.last & no_more),
                ]
            with m.Default():
                m.d.comb += [
                    beat.op.eq(Op.CHANNEL),
                    beat.index.eq((entry.group << self.m_log2) + channel),
                    beat.last.eq(self.row_end),
                    beat.flag.eq(fresh),
                ]

    def _advance(self, m, page):
        before_last, others = Signal(7), self._others()
        one_left = others == 0
        with m.Switch(page.kind):
            with m.Case(PageKind.K_TOKEN):
                m.d.comb += before_last.eq(Mux(self.wide, 6, 2))
            with m.Case(PageKind.V_TOKEN):
                m.d.comb += before_last.eq(Mux(self.wide, 126, 62))
            with m.Default():
                m.d.comb += before_last.eq((128 >> self.m_log2) - 2)
        with m.If(~self.row_end):
            m.d.sync += [self.count.eq(self.count + 1), self.row_end.eq(self.count == before_last)]
            m.d.sync += self.first.eq(0)
        with m.Else():
            m.d.sync += [
                self.count.eq(0),
                self.row_end.eq(0),
                self.first.eq((page.kind != PageKind.K_TOKEN) | one_left),
                self.marks.eq(others),
            ]
            with m.If((page.kind == PageKind.V_TOKEN) | one_left):
                m.d.sync += [self.half.eq(1), self.marks.eq(page.mask[16:])]
