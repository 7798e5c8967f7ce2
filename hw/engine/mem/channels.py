"""The LOAD unit: weight and KV words of every channel into the array's word streams."""

from amaranth import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from golden.spec.engine import WORD_BITS, WORD_BYTES, EngineConfig, Error
from golden.spec.memory import CHANNEL_BYTES, MemoryFault
from hw.engine.interfaces import LoadOp, unit_port, word_stream
from hw.engine.mem.axi import axi_read
from hw.engine.mem.striped import COUNTER_BITS, StripedReader
from hw.lib.streams import connect

ADDR_BITS = 32
BURSTS_AHEAD = 12
"""Bursts of a channel on their way at most: memory answers in order, so APPEND's words wait behind those that were
asked for before. The latency and a refresh (some 100 cycles) are covered by half as many of the longest ones."""
OFFSET_BITS = WORD_BYTES.bit_length() - 1

ERROR_OF_FAULT = {
    MemoryFault.UNALIGNED: Error.ADDRESS,
    MemoryFault.OUT_OF_REGION: Error.ADDRESS,
    MemoryFault.EMPTY: Error.SHAPE,
    MemoryFault.SLVERR: Error.BUS,
    MemoryFault.DECERR: Error.BUS,
    MemoryFault.PROTOCOL: Error.BUS,
}


def error_of(m: Module, fault_code, error) -> None:
    """Drive `error` (an engine `Error` code) from a `MemoryFault` code."""
    with m.Switch(fault_code):
        for fault, code in ERROR_OF_FAULT.items():
            with m.Case(fault):
                m.d.comb += error.eq(code)


class ChannelReaders(wiring.Component):
    """Executes `LoadOp`s on all weight channels in lock step (`StripedReader`), one prefetch FIFO per channel.

    `unit.done` pulses when a LOAD's last burst is requested: its words arrive in order and the array waits for
    them. `unit.error` is `Error.ADDRESS`, `SHAPE` or `BUS` and stays until `clear`; `fault_addr` and `fault_channel`
    say where. An op whose words lie beyond `channel_bytes` is refused before any address leaves.

    Timing: `first_word(L)` cycles from an op's transfer to the first word, then one word per cycle and channel
    while the FIFO covers the memory latency L.
    """

    def __init__(self, config: EngineConfig, *, channel_bytes: int = CHANNEL_BYTES):
        if not WORD_BYTES <= channel_bytes <= 1 << ADDR_BITS or channel_bytes % WORD_BYTES:
            raise ValueError(
                f"A channel holds whole words up to {1 << ADDR_BITS} bytes, not {channel_bytes!r}"
            )
        self._config = config
        self._channel_bytes = channel_bytes
        self._reader = StripedReader(
            config.channels, addr_bits=ADDR_BITS, data_bits=WORD_BITS, fifo_beats=config.fifo_words,
            max_bursts=BURSTS_AHEAD,
        )  # fmt: skip
        super().__init__(
            {
                "unit": In(unit_port(LoadOp)),
                "words": Out(word_stream()).array(config.channels),
                "axi": Out(axi_read(ADDR_BITS, WORD_BITS)).array(config.channels),
                "abort": In(1),
                "clear": In(1),
                "idle": Out(1),
                "fault_addr": Out(ADDR_BITS),
                "fault_channel": Out(range(max(2, config.channels))),
                "busy": Out(COUNTER_BITS),
                "word_count": Out(COUNTER_BITS),
                "starved": Out(COUNTER_BITS),
                "blocked": Out(COUNTER_BITS),
                "full": Out(COUNTER_BITS),
            }
        )

    @staticmethod
    def first_word(memory_latency: int) -> int:
        """Cycles from an op's transfer to its first valid word."""
        return StripedReader.first_beat(memory_latency)

    def elaborate(self, platform):
        m = Module()
        m.submodules.reader = reader = self._reader
        op, job = self.unit.op, reader.i
        high = ADDR_BITS - OFFSET_BITS
        beyond = op.payload.addr[high:].any()
        refused = Signal()
        m.d.comb += [
            job.payload.addr.eq(op.payload.addr << OFFSET_BITS),
            job.payload.beats.eq(op.payload.count),
            job.payload.counts[0].eq(op.payload.runs),
            job.payload.strides[0].eq(op.payload.stride << OFFSET_BITS),
            job.valid.eq(op.valid & ~beyond & ~refused),
            op.ready.eq(job.ready & ~beyond & ~refused),
            reader.region_base.eq(0),
            reader.region_limit.eq(self._channel_bytes),
            reader.abort.eq(self.abort),
            reader.clear.eq(self.clear),
            self.unit.done.eq(reader.requested),
            self.idle.eq(reader.idle),
            self.fault_addr.eq(reader.fault.addr),
            self.fault_channel.eq(reader.fault_channel),
            self.busy.eq(reader.busy),
            self.word_count.eq(reader.beats),
            self.starved.eq(reader.starved),
            self.blocked.eq(reader.blocked),
            self.full.eq(reader.full),
        ]
        with m.If(self.clear):
            m.d.sync += refused.eq(0)
        with m.Elif(op.valid & beyond & ~self.abort):
            m.d.sync += refused.eq(1)
        error_of(m, reader.fault.code, self.unit.error)
        with m.If(refused):
            m.d.comb += self.unit.error.eq(Error.ADDRESS)
        for index in range(self._config.channels):
            connect(m, reader.o[index], wiring.flipped(self.words[index]))
            connect(m, reader.axi[index], wiring.flipped(self.axi[index]))
        return m
