"""Properties of the page passes, for bounded model checking."""

from amaranth import Module, Signal, Value
from amaranth.hdl import Assert, Assume

from golden.spec.storage import PageKind
from hw.storage.passes import PAGE_STEP, TokenPass
from tests.hw.formal.harness import Proof, producer, stable


class TokenPassProof(Proof):
    """Every page with a mark gives its K and then its V once, with its own number and marks; K of the next page comes
    before V; `first` is with the pass's first K alone and `last` with its last V alone."""

    def __init__(self):
        super().__init__({"valid": 1, "step": PAGE_STEP.size, "ready": 1})

    def elaborate(self, platform):
        m = Module()
        m.submodules.dut = dut = TokenPass()
        producer(m, dut.i, self.valid, self.step)
        m.d.comb += dut.o.ready.eq(self.ready)
        stable(m, dut.o.valid, dut.o.ready, dut.o.payload)
        step, out = dut.i.p, dut.o.p
        key_due, begun, ended = Signal(), Signal(), Signal()  # of the page taken last
        taken = Signal(PAGE_STEP)
        older, newer = Signal(PAGE_STEP), Signal(PAGE_STEP)  # pages whose V is due
        older_due, newer_due = Signal(), Signal()
        left = dut.o.valid & dut.o.ready
        with m.If(dut.i.valid & dut.i.ready):
            m.d.comb += [Assert(~key_due), Assert(~ended | ~older_due)]
            # a pass without any marked page has nothing to say, and none is ever asked for: k is at least 1
            m.d.comb += Assume(step.mask.any() | ~step.last | older_due)
            m.d.sync += [taken.eq(dut.i.payload), key_due.eq(step.mask.any()), ended.eq(step.last)]
        with m.If(left & (out.kind == PageKind.K_TOKEN)):
            m.d.comb += [
                Assert(key_due),
                Assert(Value.cast(out.index) == taken.index),
                Assert(out.mask == taken.mask),
                Assert(out.first == ~begun),
                Assert(~out.last),
                Assert(~newer_due),
            ]
            m.d.sync += [key_due.eq(0), begun.eq(1)]
            with m.If(older_due):
                m.d.sync += [newer.eq(taken), newer_due.eq(1)]
            with m.Else():
                m.d.sync += [older.eq(taken), older_due.eq(1)]
        with m.If(left & (out.kind != PageKind.K_TOKEN)):
            final = ended & ~key_due & ~newer_due
            m.d.comb += [
                Assert(out.kind == PageKind.V_TOKEN),
                Assert(older_due),
                Assert(out.index == older.index),
                Assert(out.mask == older.mask),
                Assert(newer_due | ended),
                Assert(out.last == final),
                Assert(~out.first),
            ]
            m.d.sync += [older.eq(newer), older_due.eq(newer_due), newer_due.eq(0)]
            with m.If(final):
                m.d.sync += [begun.eq(0), ended.eq(0)]
        return m
