"""The fetcher: a program's words from auxiliary memory, far enough ahead to hide its latency."""

from amaranth import Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.engine import INSTRUCTION_BITS, WORD_BITS, WORD_BYTES, Error
from golden.spec.memory import MAX_BURST_BEATS
from hw.engine.dispatch import Instruction
from hw.engine.mem.axi import axi_read
from hw.engine.mem.reader import ReadChannel
from hw.engine.queue import PC_BITS

FIFO_BEATS = 2 * MAX_BURST_BEATS
PER_WORD = WORD_BITS // INSTRUCTION_BITS
ADDR_BITS = 32


class Fetcher(wiring.Component):
    """Streams instructions from word `program` after `start`, until `stop`.

    Reads ahead past the end of the program (within the address space); `stop` swallows what is in flight and holds
    until `idle`. An instruction word that memory answers with an error is not delivered: `error` is `Error.BUS`, `pc`
    the index of the instruction that could not be read.
    """

    def __init__(self):
        super().__init__(
            {
                "start": In(1),
                "stop": In(1),
                "program": In(ADDR_BITS),
                "axi": Out(axi_read(ADDR_BITS, WORD_BITS)),
                "o": Out(stream.Signature(Instruction)),
                "idle": Out(1),
                "error": Out(4),
                "pc": Out(PC_BITS),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.reader = reader = ReadChannel(
            addr_bits=ADDR_BITS, data_bits=WORD_BITS, fifo_beats=FIFO_BEATS
        )
        running, address, half = Signal(), Signal(ADDR_BITS), Signal(range(PER_WORD))
        burst = reader.i
        left = MAX_BURST_BEATS - (address // WORD_BYTES)[: MAX_BURST_BEATS.bit_length() - 1]
        m.d.comb += [
            burst.valid.eq(running & ~self.stop),
            burst.p.addr.eq(address),
            burst.p.len.eq(left - 1),
            reader.abort.eq(self.stop),
            reader.clear.eq(self.start),
            self.idle.eq(reader.idle & ~running),
            self.o.p.word.eq(reader.o.payload.word_select(half, INSTRUCTION_BITS)),
            self.o.p.pc.eq(self.pc),
            self.o.valid.eq(reader.o.valid & (reader.fault.code == 0)),
            reader.o.ready.eq(self.o.valid & self.o.ready & (half == PER_WORD - 1)),
        ]
        with m.If(reader.fault.code != 0):
            m.d.comb += self.error.eq(Error.BUS)
        with m.If(burst.valid & burst.ready):
            m.d.sync += address.eq(address + left * WORD_BYTES)
        with m.If(self.o.valid & self.o.ready):
            m.d.sync += [half.eq(half + 1), self.pc.eq(self.pc + 1)]
        with m.If(self.stop):
            m.d.sync += running.eq(0)
        with m.Elif(self.start):
            m.d.sync += [running.eq(1), address.eq(self.program * WORD_BYTES), half.eq(0), self.pc.eq(0)]
        for name, member in reader.axi.signature.members.items():
            ours, theirs = getattr(self.axi, name), getattr(reader.axi, name)
            m.d.comb += ours.eq(theirs) if member.flow is wiring.Out else theirs.eq(ours)
        return m
