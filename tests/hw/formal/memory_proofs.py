"""Properties of the memory masters: no address outside its region or across 4 KB, every beat once, AXI's stability."""

from amaranth import Module, Mux, Signal, Value
from amaranth.hdl import Assert, Assume

from golden.spec.memory import MemoryFault
from hw.engine.mem.address import AddressGenerator
from hw.engine.mem.axi import ReadMux
from hw.engine.mem.reader import ReadChannel
from hw.engine.mem.writer import WriteChannel
from hw.engine.write_mux import WriteMux
from tests.hw.formal.harness import Proof, past, producer, stable

ADDR_BITS = 12
MAX_BURST = 4
LEVELS = 2


def generator(levels: int = LEVELS) -> AddressGenerator:
    return AddressGenerator(addr_bits=ADDR_BITS, data_bits=512, levels=levels, max_burst=MAX_BURST)


class RegionProof(Proof):
    """For any descriptor, region and stalls, and for all time: a burst that leaves lies in the region and inside one
    aligned block of the longest burst, hence never crosses 4 KB; and it holds until it is taken."""

    def __init__(self):
        self.dut = generator()
        job = len(Value.cast(self.dut.i.payload))
        super().__init__(
            {"valid": 1, "job": job, "ready": 1, "base": ADDR_BITS, "limit": ADDR_BITS + 1, "clear": 1}
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.dut = dut = self.dut
        producer(m, dut.i, self.valid, self.job)
        m.d.comb += [
            dut.o.ready.eq(self.ready),
            dut.region_base.eq(self.base),
            dut.region_limit.eq(self.limit),
            dut.clear.eq(self.clear),
        ]
        live, (base, limit) = past(m, self.base, self.limit)
        with m.If(live):
            m.d.comb += [Assume(self.base == base), Assume(self.limit == limit)]
        stable(m, dut.o.valid, dut.o.ready, dut.o.payload)
        burst = dut.o.payload
        with m.If(dut.o.valid & live):
            m.d.comb += [
                Assert(burst.addr >= self.base),
                Assert(burst.addr + (burst.len + 1) * 64 <= self.limit),
                Assert(burst.addr[:6] == 0),
                Assert((burst.addr[6:] % MAX_BURST) + burst.len < MAX_BURST),
            ]
        stage = dut._stage
        with m.If(dut._active):
            m.d.comb += [
                Assert(dut._left != 0),
                Assert(dut._job.beats != 0),
                Assert(dut._left <= dut._job.beats),
            ]
        with m.If(dut._staged):
            m.d.comb += [
                Assert(stage.addr[:6] == 0),
                Assert((stage.addr[6:] % MAX_BURST) + stage.len < MAX_BURST),
            ]
        with m.If(dut.fault.code == MemoryFault.OUT_OF_REGION):
            m.d.comb += Assert(~live | ~dut.i.ready)
        return m


class CoverageProof(Proof):
    """Every beat of a descriptor once and in order, for all time: any base, row length, strides and stalls; two
    loops of up to two turns, so that a row's start is a choice of terms and no product. `last` marks the end exactly,
    bursts are as long as the row and the alignment allow, and the pipeline behind the cut loses and doubles none."""

    def __init__(self, dut: AddressGenerator | None = None):
        self.dut = dut or generator()
        job = len(Value.cast(self.dut.i.payload))
        super().__init__({"valid": 1, "job": job, "ready": 1})

    def elaborate(self, platform):
        m = Module()
        m.submodules.dut = dut = self.dut
        producer(m, dut.i, self.valid, self.job)
        m.d.comb += [dut.o.ready.eq(self.ready), dut.region_limit.eq(1 << ADDR_BITS)]
        want = dut.i.payload
        m.d.comb += Assume((want.counts[0] <= 2) & (want.counts[1] <= 2))

        job = Signal(want.shape())
        turn = Signal(LEVELS)  # loop indices, 0 or 1
        done = Signal(24)  # beats of this row so far
        with m.If(dut.i.valid & dut.i.ready):
            m.d.sync += [job.eq(want), turn.eq(0), done.eq(0)]
        word = self.rows(m, dut, job, turn, done)
        burst = Signal(dut.o.payload.shape())
        room = MAX_BURST - word % MAX_BURST
        left = job.beats - done
        ends = [turn[n] + 1 == job.counts[n] for n in range(LEVELS)]
        row_ends = left <= room
        m.d.comb += [
            burst.addr.eq(word << 6),
            burst.len.eq(Mux(row_ends, left, room) - 1),
            burst.last.eq(row_ends & ends[0] & ends[1]),
        ]
        with m.If(dut._step):
            m.d.sync += done.eq(Mux(row_ends, 0, done + room))
            with m.If(row_ends):
                m.d.sync += turn[0].eq(~ends[0])
                with m.If(ends[0]):
                    m.d.sync += turn[1].eq(~ends[1])
        with m.If(dut._active):
            m.d.comb += [
                Assert(Value.cast(dut._job) == Value.cast(job)),
                Assert(done < job.beats),
                Assert(dut._left == left),
                Assert(dut._cursor == word),
                *(Assert(dut._turns[n] + turn[n] == job.counts[n]) for n in range(LEVELS)),
                *(Assert((dut._turns[n] != 0) & (job.counts[n] <= 2)) for n in range(LEVELS)),
            ]
        live, (stepped, was_last) = past(m, dut._step, burst.last)
        with m.If(live & stepped):
            m.d.comb += Assert(dut._active == ~was_last)
        m.d.comb += Assert(~dut._step | dut._active)
        self.pipeline(m, dut, burst)
        return m

    def rows(self, m, dut, job, turn, done):
        """Word address of the next beat, one bit beyond the space; the design keeps the same starts of rows."""
        first = job.addr[6:]
        strides = [job.strides[n].as_signed()[6:].as_signed() for n in range(LEVELS)]
        outer = (first + Mux(turn[1], strides[1], 0))[:7]
        row = (outer + Mux(turn[0], strides[0], 0))[:7]
        with m.If(dut._active):
            m.d.comb += [Assert(dut._starts[1] == outer), Assert(dut._starts[0] == row)]
        word = Signal(7)
        m.d.comb += word.eq(row + done)
        return word

    def pipeline(self, m, dut, burst):
        """What was cut waits in the stage, then at the output, and leaves once."""
        stage, output = Signal(burst.shape()), Signal(burst.shape())
        pending = Signal(3)
        m.d.sync += pending.eq(pending + dut._step - (dut.o.valid & dut.o.ready))
        with m.If(dut._step):
            m.d.sync += stage.eq(burst)
        with m.If(dut._checked):
            m.d.sync += output.eq(stage)
        m.d.comb += Assert(pending == dut._staged + dut.o.valid)
        with m.If(dut._staged):
            m.d.comb += Assert(Value.cast(dut._stage) == Value.cast(stage))
        with m.If(dut.o.valid):
            m.d.comb += Assert(Value.cast(dut.o.payload) == Value.cast(output))


class SkippingGenerator(AddressGenerator):
    """A mutant: forgets a beat at the end of each burst."""

    def elaborate(self, platform):
        m = super().elaborate(platform)
        with m.If(self._step):
            m.d.sync += self._cursor.eq(self._cursor + 2)
        return m


READ = {"addr_bits": ADDR_BITS, "data_bits": 32, "max_burst": 2, "max_bursts": 2}


class ReadChannelProof(Proof):
    """Whatever the memory's pace: the FIFO has room for every beat that arrives, so `rready` is honest; requests and
    output hold until taken. The memory is assumed to answer no more beats than were requested, marking last ones."""

    def __init__(self, *, abort: bool):
        self.dut = ReadChannel(fifo_beats=4, **READ)
        burst = len(Value.cast(self.dut.i.payload))
        names = {
            "valid": 1,
            "burst": burst,
            "ready": 1,
            "arready": 1,
            "rvalid": 1,
            "rdata": 4,
            "rresp": 2,
            "rlast": 1,
        }
        super().__init__(names | ({"abort": 1} if abort else {}))
        self.aborts = abort

    def elaborate(self, platform):
        m = Module()
        m.submodules.dut = dut = self.dut
        axi = dut.axi
        producer(m, dut.i, self.valid, self.burst)
        m.d.comb += [
            dut.o.ready.eq(self.ready),
            axi.arready.eq(self.arready),
            axi.rvalid.eq(self.rvalid),
            axi.rdata.eq(self.rdata),
            axi.rresp.eq(self.rresp),
            axi.rlast.eq(self.rlast),
        ]
        requested, arrived = dut.i.valid & dut.i.ready, axi.rvalid & axi.rready
        outstanding = Signal(4)
        m.d.sync += outstanding.eq(outstanding + Mux(requested, dut.i.payload.len + 1, 0) - arrived)
        m.d.comb += [Assume(~axi.rvalid | (outstanding != 0)), Assert(axi.rready)]
        stable(m, axi.arvalid, axi.arready, axi.araddr, axi.arlen)
        with m.If(axi.rvalid):
            m.d.comb += Assert(dut._fifo.i.ready)
        if self.aborts:
            self.abort_rules(m, dut, outstanding)
        else:
            stable(m, dut.o.valid, dut.o.ready, dut.o.payload[:4])
            m.d.comb += Assert(dut._space + dut._fifo.level + outstanding == 4)
            m.d.comb += Assert(dut._fifo.level >= dut._fifo.o.valid)
        return m

    def abort_rules(self, m, dut, outstanding):
        m.d.comb += [dut.abort.eq(self.abort), Assume(dut._latch.i.code != MemoryFault.PROTOCOL)]
        live, (aborting, idle) = past(m, self.abort, dut.idle)
        with m.If(live & aborting & ~idle):
            m.d.comb += Assume(self.abort)
        with m.If(dut.idle):
            m.d.comb += Assert(outstanding == 0)
        with m.If(self.abort):
            m.d.comb += Assert(~dut.o.valid)


class WriteChannelProof(Proof):
    """Write data of a burst follows its address at once and without a gap, exactly as many beats as announced, and
    address and data hold until taken; nothing is announced before its data is there."""

    def __init__(self):
        self.dut = WriteChannel(fifo_beats=4, **READ)
        burst = len(Value.cast(self.dut.i.payload))
        super().__init__(
            {
                "valid": 1,
                "burst": burst,
                "wvalid": 1,
                "beat": 4,
                "awready": 1,
                "wready": 1,
                "bvalid": 1,
                "bresp": 2,
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.dut = dut = self.dut
        axi = dut.axi
        producer(m, dut.i, self.valid, self.burst)
        producer(m, dut.w, self.wvalid, self.beat)
        m.d.comb += [
            axi.awready.eq(self.awready),
            axi.wready.eq(self.wready),
            axi.bvalid.eq(self.bvalid),
            axi.bresp.eq(self.bresp),
        ]
        stable(m, axi.awvalid, axi.awready, axi.awaddr, axi.awlen)
        stable(m, axi.wvalid, axi.wready, axi.wdata[:4], axi.wlast)
        start, sent = dut.i.valid & dut.i.ready, axi.wvalid & axi.wready
        came, bursts, answered = Signal(6), Signal(6), Signal(6)
        beats = Signal(6)
        m.d.sync += [
            came.eq(came + (dut.w.valid & dut.w.ready)),
            beats.eq(beats + sent),
            answered.eq(answered + (axi.bvalid & axi.bready)),
            bursts.eq(bursts + (sent & axi.wlast)),
        ]
        announced = Signal(6)
        m.d.sync += announced.eq(announced + Mux(start, dut.i.payload.len + 1, 0))
        m.d.comb += [
            Assume(~axi.bvalid | (answered < bursts)),
            Assert(axi.bready),
            Assert(announced <= came),
            Assert(beats <= announced),
            # The last beat of a burst is the last one announced.
            Assert(~sent | (axi.wlast == (beats + 1 == announced))),
        ]
        live, (was_sent, was_last) = past(m, sent, axi.wlast)
        with m.If(live & was_sent & ~was_last):
            m.d.comb += Assert(axi.wvalid)
        return m


class ReadMuxProof(Proof):
    """Two masters on a port: requests hold once shown, and an answer reaches the master of its ID alone."""

    def __init__(self):
        super().__init__({"valid": 2, "addr": 8, "arready": 1, "rvalid": 1, "rid": 1, "ready": 2})

    def elaborate(self, platform):
        m = Module()
        m.submodules.dut = dut = ReadMux(ADDR_BITS, 32, 2)
        port = dut.port
        for n, master in enumerate(dut.masters):
            addr = self.addr.word_select(n, 4)
            m.d.comb += [
                master.arvalid.eq(self.valid[n]),
                master.araddr.eq(addr),
                master.rready.eq(self.ready[n]),
            ]
            live, (valid, ready, was) = past(m, master.arvalid, master.arready, addr)
            with m.If(live & valid & ~ready):
                m.d.comb += [Assume(self.valid[n]), Assume(addr == was)]
            m.d.comb += Assert(master.rvalid == (port.rvalid & (port.rid == n)))
            with m.If(master.arvalid & master.arready):
                m.d.comb += [Assert(port.arid == n), Assert(port.araddr == addr), Assert(port.arvalid)]
        m.d.comb += [port.arready.eq(self.arready), port.rvalid.eq(self.rvalid), port.rid.eq(self.rid)]
        m.d.comb += Assert(port.rready == self.ready.bit_select(port.rid, 1))
        stable(m, port.arvalid, port.arready, port.araddr, port.arid)
        return m


class WriteMuxProof(Proof):
    """Two masters on a write port: what is shown holds until taken, beats and addresses never mix, and an answer
    reaches the master whose burst it is. The memory is assumed to answer only bursts it has seen."""

    def __init__(self):
        super().__init__({"aw": 2, "w": 2, "addr": 8, "data": 8, "awready": 1, "wready": 1, "bvalid": 1})

    def elaborate(self, platform):
        m = Module()
        m.submodules.dut = dut = WriteMux(ADDR_BITS, 32, 2)
        port = dut.port
        m.d.comb += [port.awready.eq(self.awready), port.wready.eq(self.wready), port.bvalid.eq(self.bvalid)]
        open_ = [Signal(4, name=f"open_{n}") for n in range(2)]
        total = sum(open_)
        m.d.comb += Assume(~self.bvalid | (total != 0))
        for n, master in enumerate(dut.masters):
            addr, beat = self.addr.word_select(n, 4), self.data.word_select(n, 4)
            m.d.comb += [
                master.awvalid.eq(self.aw[n]),
                master.awaddr.eq(addr),
                master.wvalid.eq(self.w[n]),
                master.wdata.eq(beat),
                master.bready.eq(1),
            ]
            live, (aw, awr, was_addr, w, wr, was_beat) = past(
                m, master.awvalid, master.awready, addr, master.wvalid, master.wready, beat
            )
            with m.If(live & aw & ~awr):
                m.d.comb += [Assume(self.aw[n]), Assume(addr == was_addr)]
            with m.If(live & w & ~wr):
                m.d.comb += [Assume(self.w[n]), Assume(beat == was_beat)]
            opened, closed = master.awvalid & master.awready, master.bvalid & master.bready
            m.d.sync += open_[n].eq(open_[n] + opened - closed)
            with m.If(closed):
                m.d.comb += Assert(open_[n] != 0)
            with m.If(opened):
                m.d.comb += [Assert(port.awvalid & port.awready), Assert(port.awaddr == addr)]
            with m.If(master.wvalid & master.wready):
                m.d.comb += [Assert(port.wvalid & port.wready), Assert(port.wdata[:4] == beat)]
        taken = [
            (master.awvalid & master.awready) | (master.wvalid & master.wready) for master in dut.masters
        ]
        m.d.comb += Assert(~(taken[0] & taken[1]))
        # An accepted burst, beat or answer at the port is one at a master.
        m.d.comb += Assert(self.bvalid == (dut.masters[0].bvalid | dut.masters[1].bvalid))
        stable(m, port.awvalid, port.awready, port.awaddr)
        stable(m, port.wvalid, port.wready, port.wdata[:4])
        return m


class UncheckedRegionProof(RegionProof):
    """A mutant of the environment: the region shrinks under way, so a burst on offer may lie outside it."""

    def elaborate(self, platform):
        m = Module()
        m.submodules.dut = dut = self.dut
        producer(m, dut.i, self.valid, self.job)
        m.d.comb += [dut.o.ready.eq(self.ready), dut.region_limit.eq(self.limit)]
        with m.If(dut.o.valid):
            m.d.comb += Assert(dut.o.payload.addr < self.limit)
        return m
