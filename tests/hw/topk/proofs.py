"""Properties of the parts that decide argtopk: the histogram counts exactly, and ties fill k and never more."""

from amaranth import Cat, Module, Mux, ResetSignal, Signal
from amaranth.hdl import Assert, Assume

from hw.storage.topk.histogram import HistogramBank
from hw.storage.topk.lanes import TieBreak
from tests.hw.formal.harness import Proof, past


class HistogramProof(Proof):
    """A freely chosen bin reads as the number of its digits since it was read last, whatever came in between."""

    MOST = 15

    def __init__(self):
        super().__init__({"digit": 2, "valid": 1, "scan": 1, "bin": 2})

    def elaborate(self, platform):
        m = Module()
        m.submodules.bank = bank = HistogramBank(2, self.MOST)
        chosen, start = Signal(2), Signal(init=1)
        m.d.sync += [start.eq(0), chosen.eq(self.bin)]
        m.d.comb += [
            Assume(start | (self.bin == chosen)),
            Assume(~(self.scan & self.valid)),
            Assume(~ResetSignal()),  # bins keep their counts through a reset, as the block says
            bank.digit.eq(self.digit),
            bank.valid.eq(self.valid),
            bank.scan.eq(self.scan),
        ]
        _, (counted,) = past(m, self.valid)
        m.d.comb += Assume(~(self.scan & counted))  # a scan starts `count_latency` after the last digit
        count, expected, asked = Signal(range(self.MOST + 1)), Signal(range(self.MOST + 1)), Signal()
        m.d.comb += Assume(count < self.MOST)
        here = self.digit == self.bin
        m.d.sync += [asked.eq(self.scan & here), expected.eq(count)]
        with m.If(self.valid & here):
            m.d.sync += count.eq(count + 1)
        with m.Elif(self.scan & here):
            m.d.sync += count.eq(0)
        with m.If(asked):
            m.d.comb += Assert(bank.count == expected)
        return m


class TieProof(Proof):
    """Over any rows: every lane above is marked, lanes equal are marked in order until `need` are, no lane else is."""

    LANES, MOST = 4, 12

    def __init__(self):
        super().__init__({"above": self.LANES, "equal": self.LANES, "valid": 1, "need": 4})

    def elaborate(self, platform):
        m = Module()
        m.submodules.ties = ties = TieBreak(self.LANES, self.MOST)
        need, start = Signal(4), Signal(init=1)
        m.d.sync += [start.eq(0), need.eq(self.need)]
        m.d.comb += [
            Assume(start | (self.need == need)),
            Assume(self.need <= self.MOST),
            Assume(~(start & self.valid)),
            Assume((self.above & self.equal) == 0),
            ties.start.eq(start),
            ties.need.eq(self.need),
            ties.above.eq(self.above),
            ties.equal.eq(self.equal),
            ties.valid.eq(self.valid),
        ]
        seen = Signal(6)  # equal lanes of earlier rows
        marks = []
        before = seen
        for n in range(self.LANES):
            marks.append(self.above[n] | (self.equal[n] & (before < self.need)))
            before = before + self.equal[n]
        m.d.comb += Assume(seen < 40)
        m.d.sync += seen.eq(Mux(self.valid, before, seen))
        expected, valid = Signal(self.LANES * TieBreak.latency), Signal(TieBreak.latency)
        m.d.sync += [expected.eq(Cat(*marks, expected)), valid.eq(Cat(self.valid, valid))]
        m.d.comb += Assert(ties.done == valid[-1])
        with m.If(valid[-1]):
            m.d.comb += Assert(ties.mask == expected[-self.LANES :])
        return m
