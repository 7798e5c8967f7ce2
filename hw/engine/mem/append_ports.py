"""Bus side of the APPEND unit: single words with byte strobes out to any channel, the touched bytes of a tile in."""

from amaranth import Array, Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.engine import WORD_BITS, WORD_BYTES
from hw.engine.mem.axi import BURST_INCR, OKAY, WRITE_ID_BITS, axi_read, axi_write
from hw.lib.memories import TypedMemory
from hw.lib.pipeline import fold

ADDR_BITS = 32
WORD_SIZE = WORD_BYTES.bit_length() - 1
PIECES = 8
"""Pieces of 8 bytes in a word: the 32 positions of one lane, step and plane."""
TILE_WORDS = 4
"""Words of a channel that one tile of V spans at most: 4 planes of 8 lanes."""
HEAD_MAX = 256
JOBS = 1 << WRITE_ID_BITS
"""Vectors whose writes may be without an answer; the number of each travels as the AXI ID."""
WRITES_MAX = HEAD_MAX * 4 // PIECES + 1
"""Writes of a vector at most: four planes of a piece's byte per row of V in a word each, and its scale record."""


def word_write(targets: int) -> data.StructLayout:
    """One word for port `target` in job `job`: byte address, data and byte strobes."""
    return data.StructLayout(
        {
            "target": range(targets),
            "job": WRITE_ID_BITS,
            "addr": ADDR_BITS,
            "data": WORD_BITS,
            "strb": WORD_BYTES,
        }
    )


class WordWriter(wiring.Component):
    """Single-word writes to `ports` AXI ports from one shared register, so wide data is held once.

    Takes a word per cycle while the addressed ports accept address and data at once. `answered[j]`: every word of job
    j that was taken has its response; `quiet`: every word of all. `bad` pulses on a response that is not OKAY. A job
    has at most `WRITES_MAX` words without response.
    """

    latency = 1
    """From the transfer at `i` to address and data valid."""
    answer_latency = 2
    """From a response on the bus to `answered`: the ports' responses are counted behind a register."""

    def __init__(self, ports: int):
        self._ports = ports
        super().__init__(
            {
                "i": In(stream.Signature(word_write(ports))),
                "axi": Out(axi_write(ADDR_BITS, WORD_BITS)).array(ports),
                "answered": Out(JOBS),
                "quiet": Out(1),
                "bad": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        held = Signal(word_write(self._ports))
        address, beat = Signal(self._ports), Signal(self._ports)
        address_left = address & ~Cat(port.awready for port in self.axi)
        beat_left = beat & ~Cat(port.wready for port in self.axi)
        accepted = self.i.valid & self.i.ready
        m.d.comb += [
            self.i.ready.eq(~address_left.any() & ~beat_left.any()),
            self.quiet.eq(self.answered.all()),
            self.bad.eq(Cat(port.bvalid & (port.bresp != OKAY) for port in self.axi).any()),
        ]
        m.d.sync += [address.eq(address_left), beat.eq(beat_left)]
        for job in range(JOBS):
            open_writes = Signal(range(WRITES_MAX + 1), name=f"open_writes_{job}")
            answers = fold([port.bvalid & (port.bid == job) for port in self.axi], lambda x, y: x + y)
            came = Signal(range(self._ports + 1), name=f"came_{job}")
            started = accepted & (self.i.payload.job == job)
            m.d.comb += self.answered[job].eq(open_writes == 0)
            m.d.sync += [came.eq(answers), open_writes.eq(open_writes + started - came)]
        with m.If(accepted):
            chosen = 1 << self.i.payload.target
            m.d.sync += [held.eq(self.i.payload), address.eq(chosen), beat.eq(chosen)]
        for n, port in enumerate(self.axi):
            m.d.comb += [
                port.awid.eq(held.job),
                port.awaddr.eq(held.addr),
                port.awsize.eq(WORD_SIZE),
                port.awburst.eq(BURST_INCR),
                port.awvalid.eq(address[n]),
                port.wdata.eq(held.data),
                port.wstrb.eq(held.strb),
                port.wlast.eq(1),
                port.wvalid.eq(beat[n]),
                port.bready.eq(1),
            ]
        return m


class TileReader(wiring.Component):
    """Reads the same `words` words from every channel in `mask` and queues of each piece the one byte that changes.

    `go` transfers a request with `ready`, as soon as the one before is on its way, or, for another `byte`, answered.
    `here[c]`: channel c has a word; `old[c]` shows that byte of its eight pieces, and `pop[c]` takes it. `rows` words
    of a channel at most may be asked for and not taken. `bad` pulses on an answer that is not OKAY. Words are read
    singly, since a tile may start anywhere and a burst must not cross 4 KB. `flush`, held until `quiet`, drops answers.
    """

    def __init__(self, channels: int, rows: int):
        self._channels, self._rows = channels, rows
        super().__init__(
            {
                "go": In(1),
                "ready": Out(1),
                "mask": In(channels),
                "addr": In(ADDR_BITS),
                "words": In(range(TILE_WORDS + 1)),
                "byte": In(range(PIECES)),
                "here": Out(channels),
                "pop": In(channels),
                "old": Out(8 * PIECES).array(channels),
                "axi": Out(axi_read(ADDR_BITS, WORD_BITS)).array(channels),
                "flush": In(1),
                "quiet": Out(1),
                "bad": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        asking, waiting = Signal(self._channels), Signal(self._channels)
        address, words, byte = Signal(ADDR_BITS), Signal(range(TILE_WORDS + 1)), Signal(range(PIECES))
        m.d.comb += [
            self.quiet.eq(~asking.any() & ~waiting.any()),
            self.ready.eq(~asking.any() & (self.quiet | (byte == self.byte))),
            self.bad.eq(Cat(port.rvalid & (port.rresp != OKAY) for port in self.axi).any()),
        ]
        starts = self.go & self.ready
        with m.If(starts):
            m.d.sync += [address.eq(self.addr), words.eq(self.words), byte.eq(self.byte)]
        for n, port in enumerate(self.axi):
            asked, due = (
                Signal(range(TILE_WORDS + 1), name=f"asked_{n}"),
                Signal(range(self._rows + 1), name=f"due_{n}"),
            )
            m.d.comb += [
                port.araddr.eq(address + (asked << WORD_SIZE)),
                port.arsize.eq(WORD_SIZE),
                port.arburst.eq(BURST_INCR),
                port.arvalid.eq(asking[n]),
                port.rready.eq(1),
            ]
            # Whether all channels wait for nothing is asked in every cycle: from a register of its own each.
            left = (due + (port.arvalid & port.arready) - port.rvalid)[: len(due)]
            m.d.sync += [due.eq(left), waiting[n].eq(left.any())]
            with m.If(starts & self.mask[n]):
                m.d.sync += [asking[n].eq(1), asked.eq(0)]
            with m.Elif(asking[n] & port.arready):
                m.d.sync += [asked.eq(asked + 1), asking[n].eq(asked + 1 != words)]
            self._queue(m, n, byte)
        return m

    def _queue(self, m: Module, n: int, byte) -> None:
        """Bytes of channel n in LUT RAM."""
        port, last = self.axi[n], self._rows - 1
        rows = TypedMemory(8 * PIECES, self._rows, asynchronous_read=True)
        m.submodules[f"rows_{n}"] = rows
        into, out = (Signal(range(self._rows), name=f"{name}_{n}") for name in ("into", "out"))
        held = Signal(range(self._rows + 1), name=f"held_{n}")
        pieces = [Array(port.rdata.word_select(8 * q + b, 8) for b in range(8))[byte] for q in range(PIECES)]
        m.d.comb += [
            rows.w.addr.eq(into),
            rows.w.data.eq(Cat(pieces)),
            rows.w.en.eq(port.rvalid),
            rows.r[0].addr.eq(out),
            self.old[n].eq(rows.r[0].data),
            self.here[n].eq(held != 0),
        ]
        m.d.sync += held.eq(held + port.rvalid - self.pop[n])
        with m.If(port.rvalid):
            m.d.sync += into.eq(Mux(into == last, 0, into + 1))
        with m.If(self.pop[n]):
            m.d.sync += out.eq(Mux(out == last, 0, out + 1))
        with m.If(self.flush):
            m.d.sync += [held.eq(0), into.eq(0), out.eq(0)]
