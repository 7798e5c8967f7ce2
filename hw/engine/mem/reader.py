"""AXI4 read channel with a prefetch FIFO: bursts in, beats out, enough in flight to hide the memory's latency."""

from amaranth import Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.memory import MAX_BURST_BEATS, MemoryFault
from hw.engine.mem.axi import (
    BURST_INCR,
    Fault,
    FaultLatch,
    axi_read,
    burst_stream,
    check_burst,
    response_fault,
)
from hw.lib.streams import StreamFIFO, check_count


class ReadChannel(wiring.Component):
    """One AXI4 read port.

    A burst is requested only when the prefetch FIFO has room for all of it, so `rready` is always high and the
    memory is never held up. `fifo_beats` bounds what is in flight: full rate needs it to cover the memory's latency,
    and a further refresh time where several channels advance in lock step.

    Timing, from a burst's transfer at `i` with memory latency L (cycles from `arvalid & arready` to `rvalid`): the
    address is valid 1 cycle later, the first beat leaves `latency + L` cycles after the transfer, then one per cycle.

    `fault` keeps the first bad answer with its burst's address; no further burst is requested and the beats received
    still flow. `abort` stops requests, swallows what is in flight and empties the FIFO; hold it until `idle`.
    Lowering `o.valid` on abort is the one exception to the stream rules. `clear` resets `fault`.
    """

    latency = 3
    """Burst transfer to address valid (1), and through the FIFO (2)."""

    def __init__(
        self,
        *,
        addr_bits: int,
        data_bits: int,
        fifo_beats: int,
        max_burst: int = MAX_BURST_BEATS,
        max_bursts: int = 64,
    ):
        check_burst(max_burst, data_bits)
        check_count("Prefetch FIFO beats (two of the longest bursts)", fifo_beats, 2 * max_burst)
        check_count("Bursts in flight", max_bursts, 2)
        self._addr_bits = addr_bits
        self._data_bits = data_bits
        self._fifo_beats = fifo_beats
        self._max_burst = max_burst
        self._max_bursts = max_bursts
        # One word beyond the credit: a full-depth block FIFO still accepts while its output register fills.
        self._fifo = StreamFIFO(data_bits, fifo_beats + 1, kind="block")
        self._latch = FaultLatch()
        self._space = Signal(range(fifo_beats + 1), init=fifo_beats)
        super().__init__(
            {
                "i": In(burst_stream(addr_bits, max_burst)),
                "axi": Out(axi_read(addr_bits, data_bits)),
                "o": Out(stream.Signature(data_bits)),
                "abort": In(1),
                "clear": In(1),
                "fault": Out(Fault),
                "idle": Out(1),
                "full": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.fifo = fifo = self._fifo
        flight = data.StructLayout({"addr": self._addr_bits, "len": range(self._max_burst)})
        m.submodules.flights = flights = StreamFIFO(flight, self._max_bursts)
        m.submodules.latch = latch = self._latch
        faulted = latch.o.code != MemoryFault.NONE

        # Addresses: a burst leaves when its beats have room, and its beats are reserved at once.
        space = self._space
        has_space = space > self.i.payload.len
        free = ~self.axi.arvalid | self.axi.arready
        request = Signal()
        m.d.comb += [
            self.i.ready.eq(has_space & flights.i.ready & free & ~self.abort & ~faulted),
            self.full.eq(self.i.valid & ~has_space),
            request.eq(self.i.valid & self.i.ready),
            flights.i.valid.eq(request),
            flights.i.payload.addr.eq(self.i.payload.addr),
            flights.i.payload.len.eq(self.i.payload.len),
            self.axi.arid.eq(0),
            self.axi.arsize.eq((self._data_bits // 8).bit_length() - 1),
            self.axi.arburst.eq(BURST_INCR),
        ]
        with m.If(request):
            m.d.sync += [
                self.axi.araddr.eq(self.i.payload.addr),
                self.axi.arlen.eq(self.i.payload.len),
                self.axi.arvalid.eq(1),
            ]
        with m.Elif(self.axi.arready):
            m.d.sync += self.axi.arvalid.eq(0)

        # Data: everything reserved is accepted; on abort it is swallowed.
        beat = Signal(range(self._max_burst))
        arrived = Signal()
        m.d.comb += [
            self.axi.rready.eq(1),
            arrived.eq(self.axi.rvalid & self.axi.rready),
            fifo.i.valid.eq(arrived),
            fifo.i.payload.eq(self.axi.rdata),
            flights.o.ready.eq(arrived & self.axi.rlast),
            self.o.payload.eq(fifo.o.payload),
            self.o.valid.eq(fifo.o.valid & ~self.abort),
            fifo.o.ready.eq(self.o.ready | self.abort),
        ]
        with m.If(arrived):
            m.d.sync += beat.eq(Mux(self.axi.rlast, 0, beat + 1))
        early_or_late = ~flights.o.valid | (self.axi.rlast != (beat == flights.o.payload.len))
        m.d.comb += [
            latch.i.code.eq(
                Mux(
                    arrived,
                    Mux(early_or_late, MemoryFault.PROTOCOL, response_fault(self.axi.rresp)),
                    MemoryFault.NONE,
                )
            ),
            latch.i.addr.eq(flights.o.payload.addr),
            latch.clear.eq(self.clear),
            self.fault.eq(latch.o),
            self.idle.eq(~self.axi.arvalid & ~flights.o.valid & (fifo.level == 0)),
        ]

        left = fifo.o.valid & fifo.o.ready
        with m.If(self.abort & self.idle):
            m.d.sync += [space.eq(self._fifo_beats), beat.eq(0)]
        with m.Else():
            m.d.sync += space.eq(space - Mux(request, self.i.payload.len + 1, 0) + left)
        return m
