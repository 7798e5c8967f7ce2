"""Designs under test of the memory regressions."""

from amaranth import Module, unsigned
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from hw.engine.mem.address import AddressGenerator, descriptor_layout
from hw.engine.mem.axi import axi_read, axi_write
from hw.engine.mem.reader import ReadChannel
from hw.engine.mem.striped import StripedReader
from hw.engine.mem.writer import WriteChannel
from hw.lib.streams import connect

ADDR_BITS = 20
DATA_BITS = 64
BEAT_BYTES = DATA_BITS // 8
CHANNELS = 3
LEVELS = 2


def striped_reader() -> StripedReader:
    """Three narrow channels, two loops: small enough to run thousands of cycles under cocotb."""
    return StripedReader(CHANNELS, addr_bits=ADDR_BITS, data_bits=DATA_BITS, fifo_beats=64, levels=LEVELS)


class Copier(wiring.Component):
    """Reads one descriptor and writes the beats by another: a whole read and a whole write path."""

    def __init__(self):
        descriptor = stream.Signature(descriptor_layout(ADDR_BITS, LEVELS))
        super().__init__(
            {
                "source": In(descriptor),
                "target": In(descriptor),
                "strb": In(BEAT_BYTES),
                "region_limit": In(ADDR_BITS + 1),
                "axi_read": Out(axi_read(ADDR_BITS, DATA_BITS)),
                "axi_write": Out(axi_write(ADDR_BITS, DATA_BITS)),
                "abort": In(1),
                "clear": In(1),
                "done": Out(1),
                "idle": Out(1),
                "read_fault": Out(unsigned(3)),
                "write_fault": Out(unsigned(3)),
                "write_fault_addr": Out(32),
            }
        )

    def elaborate(self, platform):
        m = Module()
        sizes = {"addr_bits": ADDR_BITS, "data_bits": DATA_BITS}
        m.submodules.from_ = source = AddressGenerator(**sizes, levels=LEVELS)
        m.submodules.to = target = AddressGenerator(**sizes, levels=LEVELS)
        m.submodules.reader = reader = ReadChannel(**sizes, fifo_beats=64)
        m.submodules.writer = writer = WriteChannel(**sizes)
        for block in (source, target, reader, writer):
            m.d.comb += [block.abort.eq(self.abort), block.clear.eq(self.clear)]
        for block in (source, target):
            m.d.comb += block.region_limit.eq(self.region_limit)
        connect(m, wiring.flipped(self.source), source.i)
        connect(m, wiring.flipped(self.target), target.i)
        connect(m, source.o, reader.i)
        connect(m, target.o, writer.i)
        connect(m, reader.axi, wiring.flipped(self.axi_read))
        connect(m, writer.axi, wiring.flipped(self.axi_write))
        m.d.comb += [
            writer.w.payload.data.eq(reader.o.payload),
            writer.w.payload.strb.eq(self.strb),
            writer.w.valid.eq(reader.o.valid),
            reader.o.ready.eq(writer.w.ready),
            self.done.eq(writer.done),
            self.idle.eq(reader.idle & writer.idle & ~source.busy & ~target.busy),
            self.read_fault.eq(reader.fault.code | source.fault.code),
            self.write_fault.eq(writer.fault.code | target.fault.code),
            self.write_fault_addr.eq(writer.fault.addr | target.fault.addr),
        ]
        return m


def pack(addr: int, beats: int, counts=(1, 1), strides=(0, 0)) -> int:
    """A descriptor as the integer on its port."""
    layout = descriptor_layout(ADDR_BITS, LEVELS)
    fields = {
        "addr": addr,
        "beats": beats,
        "counts": list(counts),
        "strides": [s % (1 << ADDR_BITS) for s in strides],
    }
    return layout.const(fields).as_bits()
