"""AXI4 write channel: bursts and beats in, responses counted, errors kept."""

from amaranth import Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.memory import MAX_BURST_BEATS, MemoryFault
from hw.engine.mem.axi import (
    BURST_INCR,
    Fault,
    FaultLatch,
    axi_write,
    burst_stream,
    check_burst,
    response_fault,
)
from hw.lib.streams import StreamFIFO, check_count


def write_beat(data_bits: int) -> data.StructLayout:
    """A beat to write: data and one strobe per byte."""
    return data.StructLayout({"data": data_bits, "strb": data_bits // 8})


class WriteChannel(wiring.Component):
    """One AXI4 write port.

    `i` takes bursts (from an address generator), `w` their beats in the same order. A burst's address is sent
    only when all its beats are in the buffer, so the write data channel never idles inside a burst and a slow producer
    cannot hold the memory. `done` pulses when the last response of a burst with `last` set has arrived: from then on
    every reader sees the data. Responses are always accepted.

    Timing: the address is valid in the cycle after burst and beats are both there, its first beat together with it
    or one cycle later; then one beat per cycle, also from burst to burst.

    `fault` keeps the first bad response with its burst's address; no further burst starts. `abort` finishes the burst
    on the bus (AXI has no other way), then drops all else; hold it until `idle`.
    """

    latency = 3
    """First beat's transfer at `w` to address valid: through the FIFO (2) and the address register (1)."""

    def __init__(
        self,
        *,
        addr_bits: int,
        data_bits: int,
        fifo_beats: int = 2 * MAX_BURST_BEATS,
        max_burst: int = MAX_BURST_BEATS,
        max_bursts: int = 16,
    ):
        check_burst(max_burst, data_bits)
        check_count("Write buffer beats (two of the longest bursts)", fifo_beats, 2 * max_burst)
        check_count("Bursts in flight", max_bursts, 2)
        self._addr_bits = addr_bits
        self._data_bits = data_bits
        self._fifo_beats = fifo_beats
        self._max_burst = max_burst
        self._max_bursts = max_bursts
        super().__init__(
            {
                "i": In(burst_stream(addr_bits, max_burst)),
                "w": In(stream.Signature(write_beat(data_bits))),
                "axi": Out(axi_write(addr_bits, data_bits)),
                "abort": In(1),
                "clear": In(1),
                "done": Out(1),
                "fault": Out(Fault),
                "idle": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.fifo = fifo = StreamFIFO(write_beat(self._data_bits), self._fifo_beats + 1, kind="block")
        flight = data.StructLayout({"addr": self._addr_bits, "last": 1})
        m.submodules.flights = flights = StreamFIFO(flight, self._max_bursts)
        m.submodules.latch = latch = FaultLatch()
        faulted = latch.o.code != MemoryFault.NONE

        # Beats of started bursts leave `uncommitted`; the rest is what the next burst may count on.
        uncommitted = Signal(range(self._fifo_beats + 2))
        sending = Signal()
        left = Signal(range(self._max_burst))
        start = Signal()
        sent = self.axi.wvalid & self.axi.wready
        last_sent = sent & self.axi.wlast
        m.d.comb += [
            self.w.ready.eq(fifo.i.ready & ~self.abort),
            fifo.i.valid.eq(self.w.valid & ~self.abort),
            fifo.i.payload.eq(self.w.payload),
            start.eq(self.i.valid & self.i.ready),
            self.i.ready.eq(
                (uncommitted > self.i.payload.len)
                & flights.i.ready
                & ~self.axi.awvalid
                & (~sending | last_sent)
                & ~self.abort
                & ~faulted
            ),
            flights.i.valid.eq(start),
            flights.i.payload.addr.eq(self.i.payload.addr),
            flights.i.payload.last.eq(self.i.payload.last),
            self.axi.awid.eq(0),
            self.axi.awsize.eq((self._data_bits // 8).bit_length() - 1),
            self.axi.awburst.eq(BURST_INCR),
        ]
        with m.If(start):
            m.d.sync += [
                self.axi.awaddr.eq(self.i.payload.addr),
                self.axi.awlen.eq(self.i.payload.len),
                self.axi.awvalid.eq(1),
                sending.eq(1),
                left.eq(self.i.payload.len),
            ]
        with m.Else():
            with m.If(self.axi.awready):
                m.d.sync += self.axi.awvalid.eq(0)
            with m.If(last_sent):
                m.d.sync += sending.eq(0)
            with m.If(sent):
                m.d.sync += left.eq(left - 1)

        dropping = self.abort & ~sending
        m.d.comb += [
            self.axi.wvalid.eq(fifo.o.valid & sending),
            self.axi.wdata.eq(fifo.o.payload.data),
            self.axi.wstrb.eq(fifo.o.payload.strb),
            self.axi.wlast.eq(left == 0),
            fifo.o.ready.eq(sent | dropping),
        ]
        arrived = fifo.i.valid & fifo.i.ready
        with m.If(dropping):
            m.d.sync += uncommitted.eq(0)
        with m.Else():
            m.d.sync += uncommitted.eq(uncommitted + arrived - Mux(start, self.i.payload.len + 1, 0))

        answered = self.axi.bvalid & self.axi.bready
        bad = Mux(flights.o.valid, response_fault(self.axi.bresp), MemoryFault.PROTOCOL)
        m.d.comb += [
            self.axi.bready.eq(1),
            flights.o.ready.eq(answered),
            self.done.eq(answered & flights.o.payload.last & flights.o.valid),
            latch.i.code.eq(Mux(answered, bad, MemoryFault.NONE)),
            latch.i.addr.eq(flights.o.payload.addr),
            latch.clear.eq(self.clear),
            self.fault.eq(latch.o),
            self.idle.eq(~sending & ~flights.o.valid & (fifo.level == 0)),
        ]
        return m
