"""The DMA unit: vectors between auxiliary memory and the vector buffer."""

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from golden.spec.engine import WORD_BITS, WORD_BYTES, EngineConfig, Error
from golden.spec.memory import MAX_BURST_BEATS, MemoryFault
from hw.engine.interfaces import DmaOp, unit_port, vb_read, vb_write
from hw.engine.mem.address import AddressGenerator
from hw.engine.mem.axi import axi_read, axi_write
from hw.engine.mem.channels import ADDR_BITS, error_of
from hw.engine.mem.reader import ReadChannel
from hw.engine.mem.writer import WriteChannel, write_beat
from hw.lib.streams import StreamFIFO, connect

READ_FIFO_BEATS = 64
VB_QUEUE = 4
"""Vector-buffer words that may wait between a granted read and the write buffer."""


class DmaUnit(wiring.Component):
    """Executes `DmaOp`s, one at a time.

    READ: memory words to VB words; `done` in the cycle after the last VB write was granted. WRITE: VB words to memory
    words, the last one of a vector with byte strobes; `done` when the last response has arrived.

    Timing with memory latency L and a vector buffer that always grants: READ finishes `read_cycles(words, L)` cycles
    after the op's transfer for words that cover L; one VB word per cycle either way.

    `unit.error` is `Error.ADDRESS` (outside `memory_bytes`, or unaligned), `SHAPE` (empty) or `BUS`, and stays
    until reset. `abort` drops the op and drains the memory ports; hold it until `idle`, then reset.

    Raises ValueError unless a memory word holds whole VB words.
    """

    def __init__(self, config: EngineConfig, *, memory_bytes: int = 1 << ADDR_BITS):
        vb_bits = 32 * config.vector_lanes
        if WORD_BITS % vb_bits:
            raise ValueError(f"A {WORD_BITS}-bit memory word must hold whole VB words, not {vb_bits} bits")
        self._config = config
        self._ratio = WORD_BITS // vb_bits
        self._memory_bytes = memory_bytes
        super().__init__(
            {
                "unit": In(unit_port(DmaOp)),
                "axi_read": Out(axi_read(ADDR_BITS, WORD_BITS)),
                "axi_write": Out(axi_write(ADDR_BITS, WORD_BITS)),
                "vb_read": Out(vb_read(config)),
                "vb_write": Out(vb_write(config)),
                "abort": In(1),
                "idle": Out(1),
            }
        )

    @staticmethod
    def read_cycles(words: int, memory_latency: int) -> int:
        """Cycles from a READ's transfer to its done pulse, for one vector of `words` VB words of 64 bytes."""
        return 1 + AddressGenerator.latency + ReadChannel.latency + memory_latency + words

    def elaborate(self, platform):
        m = Module()
        m.submodules.generator = generator = AddressGenerator(addr_bits=ADDR_BITS, data_bits=WORD_BITS)
        m.submodules.reader = reader = ReadChannel(
            addr_bits=ADDR_BITS, data_bits=WORD_BITS, fifo_beats=READ_FIFO_BEATS
        )
        m.submodules.writer = writer = WriteChannel(
            addr_bits=ADDR_BITS, data_bits=WORD_BITS, fifo_beats=2 * MAX_BURST_BEATS
        )
        connect(m, reader.axi, wiring.flipped(self.axi_read))
        connect(m, writer.axi, wiring.flipped(self.axi_write))
        for block in (generator, reader, writer):
            m.d.comb += block.abort.eq(self.abort)

        op = Signal(DmaOp)
        running, posted, finished = Signal(), Signal(), Signal()
        failed = self.unit.error != Error.NONE
        m.d.comb += [
            self.unit.op.ready.eq(~running & ~failed & ~self.abort),
            self.unit.done.eq(finished),
            self.idle.eq(~running & ~generator.busy & reader.idle & writer.idle),
        ]
        with m.If(self.unit.op.valid & self.unit.op.ready):
            m.d.sync += [op.eq(self.unit.op.payload), running.eq(1), posted.eq(0)]
        with m.Elif(self.abort | finished):
            m.d.sync += running.eq(0)

        # Bursts go to the port of the op's direction.
        m.d.comb += [
            generator.region_limit.eq(self._memory_bytes),
            generator.i.valid.eq(running & ~posted & ~self.abort),
            generator.i.payload.addr.eq(op.addr),
            generator.i.payload.beats.eq((op.count + self._ratio - 1) // self._ratio),
            generator.i.payload.counts[0].eq(op.vectors),
            generator.i.payload.strides[0].eq(op.stride),
            reader.i.payload.eq(generator.o.payload),
            writer.i.payload.eq(generator.o.payload),
            reader.i.valid.eq(generator.o.valid & ~op.write),
            writer.i.valid.eq(generator.o.valid & op.write),
            generator.o.ready.eq(Mux(op.write, writer.i.ready, reader.i.ready)),
        ]
        with m.If(generator.i.valid & generator.i.ready):
            m.d.sync += posted.eq(1)

        error_of(m, self._first_fault(generator, reader, writer), self.unit.error)
        read_done = self._to_buffer(m, op, running & ~op.write, reader)
        self._from_buffer(m, op, running & op.write & posted & ~self.abort, writer)
        m.d.comb += finished.eq(read_done | writer.done)
        return m

    @staticmethod
    def _first_fault(*blocks):
        code = MemoryFault.NONE
        for block in reversed(blocks):
            code = Mux(block.fault.code != MemoryFault.NONE, block.fault.code, code)
        return code

    def _walk(self, m, op, enable, step, name):
        """(address, part, ends of vector, ends of op) of the VB word whose turn it is; `step` moves on."""
        word, vector = Signal(16, name=f"{name}_word"), Signal(8, name=f"{name}_vector")
        start, part = (
            Signal(20, name=f"{name}_start"),
            Signal(range(max(2, self._ratio)), name=f"{name}_part"),
        )
        fresh = Signal(init=1, name=f"{name}_fresh")
        base = Mux(fresh, op.dst, start)
        row_ends, ends = Signal(name=f"{name}_row_ends"), Signal(name=f"{name}_ends")
        m.d.comb += [row_ends.eq(word + 1 == op.count), ends.eq(row_ends & (vector + 1 == op.vectors))]
        with m.If(~enable):
            m.d.sync += [word.eq(0), vector.eq(0), part.eq(0), fresh.eq(1)]
        with m.Elif(step):
            m.d.sync += [
                word.eq(Mux(row_ends, 0, word + 1)),
                part.eq(Mux(row_ends | (part == self._ratio - 1), 0, part + 1)),
            ]
            with m.If(row_ends):
                m.d.sync += [vector.eq(vector + 1), start.eq(base + op.dst_stride), fresh.eq(0)]
        return (base + word)[:20], part, row_ends, ends

    def _to_buffer(self, m, op, enable, reader):
        """READ: each memory word to its VB words; returns a pulse after the last grant."""
        port, width = self.vb_write, 32 * self._config.vector_lanes
        done, last = Signal(), Signal()
        granted = port.en & port.rdy
        active = enable & ~done & ~last
        address, part, row_ends, ends = self._walk(m, op, active, granted, "read")
        m.d.comb += [
            port.en.eq(active & reader.o.valid),
            port.addr.eq(address),
            port.data.eq(reader.o.payload.word_select(part, width)),
            port.mask.eq(~0),
            reader.o.ready.eq(granted & (row_ends | (part == self._ratio - 1))),
            done.eq(last & enable),
        ]
        m.d.sync += last.eq(granted & ends)
        return done

    def _from_buffer(self, m, op, enable, writer):
        """WRITE: granted reads queue, parts gather into memory words with strobes for what a vector has."""
        port, width = self.vb_read, 32 * self._config.vector_lanes
        landed, over = Signal(), Signal()
        ends_vector, part_of = Signal(), Signal(range(max(2, self._ratio)))
        m.submodules.queue = queue = StreamFIFO(write_beat(WORD_BITS), VB_QUEUE)
        connect(m, queue.o, writer.w)
        granted = port.en & port.rdy
        address, part, row_ends, ends = self._walk(m, op, enable, granted, "write")
        m.d.comb += [
            port.en.eq(enable & ~over & (queue.level + landed < VB_QUEUE)),
            port.addr.eq(address),
        ]
        with m.If(~enable):
            m.d.sync += [over.eq(0), landed.eq(0)]
        with m.Else():
            m.d.sync += landed.eq(granted)
            with m.If(granted & ends):
                m.d.sync += over.eq(1)
        with m.If(granted):
            m.d.sync += [part_of.eq(part), ends_vector.eq(row_ends)]
        gathered, strobes = Signal(WORD_BITS), Signal(WORD_BYTES)
        data, strb = Signal(WORD_BITS), Signal(WORD_BYTES)
        parts = [
            Mux(part_of == n, port.data, gathered[n * width : (n + 1) * width]) for n in range(self._ratio)
        ]
        lanes = [
            Mux(part_of == n, (1 << width // 8) - 1, strobes[n * width // 8 : (n + 1) * width // 8])
            for n in range(self._ratio)
        ]
        whole = ends_vector | (part_of == self._ratio - 1)
        m.d.comb += [
            data.eq(Cat(*(p[:width] for p in parts))),
            strb.eq(Cat(*(lane[: width // 8] for lane in lanes))),
            queue.i.payload.data.eq(data),
            queue.i.payload.strb.eq(strb),
            queue.i.valid.eq(landed & whole),
        ]
        with m.If(~enable | (landed & whole)):
            m.d.sync += strobes.eq(0)
        with m.Elif(landed):
            m.d.sync += [gathered.eq(data), strobes.eq(strb)]
