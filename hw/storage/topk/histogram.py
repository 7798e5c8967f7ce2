"""One bank of the digit histogram: counts a digit per cycle, reads and clears a bin per cycle."""

from amaranth import Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from hw.lib.memories import TypedMemory


class HistogramBank(wiring.Component):
    """Counts of `1 << digit_bits` digits, each up to `most`.

    Counting: a digit enters with `valid` every cycle; it is in its bin `count_latency` cycles later.
    Scanning: with `scan` the count of bin `digit` appears on `count` `scan_latency` cycles later, and the bin is
    zero from then on. `scan` and `valid` are exclusive, and a scan starts `count_latency` after the last digit.

    The bins keep their contents through a reset, as LUT RAM does: whoever resets scans once before counting.
    """

    count_latency = 2
    scan_latency = 1

    def __init__(self, digit_bits: int, most: int):
        self._digit_bits = digit_bits
        self._most = most
        super().__init__(
            {
                "digit": In(digit_bits),
                "valid": In(1),
                "scan": In(1),
                "count": Out(range(most + 1)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.bins = bins = TypedMemory(
            range(self._most + 1), 1 << self._digit_bits, asynchronous_read=True, ram_style="distributed"
        )
        (read,) = bins.r

        # The count of a digit that entered one cycle earlier is still on its way to the bin.
        old = Signal(range(self._most + 1))
        new = Signal(range(self._most + 1))
        last = Signal(range(self._most + 1))
        digit, valid, repeated = Signal(self._digit_bits), Signal(), Signal()
        m.d.comb += [read.addr.eq(self.digit), read.en.eq(1)]
        m.d.sync += [
            old.eq(read.data),
            digit.eq(self.digit),
            valid.eq(self.valid),
            repeated.eq(valid & (self.digit == digit)),
            last.eq(new),
        ]
        m.d.comb += new.eq(Mux(repeated, last, old) + 1)
        m.d.comb += [
            bins.w.addr.eq(Mux(self.scan, self.digit, digit)),
            bins.w.data.eq(Mux(self.scan, 0, new)),
            bins.w.en.eq(valid | self.scan),
            self.count.eq(old),
        ]
        return m
