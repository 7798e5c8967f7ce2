"""Bus side of the APPEND unit: single words with byte strobes out to any channel, the touched bytes of a tile in."""

from amaranth import Array, Cat, Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.engine import WORD_BITS, WORD_BYTES
from hw.engine.mem.axi import BURST_INCR, OKAY, axi_read, axi_write
from hw.lib.memories import TypedMemory

ADDR_BITS = 32
WORD_SIZE = WORD_BYTES.bit_length() - 1
PIECES = 8
"""Pieces of 8 bytes in a word: the 32 positions of one lane, step and plane."""
TILE_WORDS = 4
"""Words of a channel that one tile of V spans at most: 4 planes of 8 lanes."""
IN_FLIGHT_BITS = 12


def word_write(targets: int) -> data.StructLayout:
    """One word for port `target`: byte address, data and byte strobes."""
    return data.StructLayout(
        {"target": range(targets), "addr": ADDR_BITS, "data": WORD_BITS, "strb": WORD_BYTES}
    )


class WordWriter(wiring.Component):
    """Single-word writes to `ports` AXI ports from one shared register, so wide data is held once.

    Takes a word per cycle while the addressed ports accept address and data at once; `quiet` when every response has
    arrived; `bad` pulses on a response that is not OKAY.
    """

    latency = 1
    """From the transfer at `i` to address and data valid."""

    def __init__(self, ports: int):
        self._ports = ports
        super().__init__(
            {
                "i": In(stream.Signature(word_write(ports))),
                "axi": Out(axi_write(ADDR_BITS, WORD_BITS)).array(ports),
                "quiet": Out(1),
                "bad": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        held = Signal(word_write(self._ports))
        address, beat = Signal(self._ports), Signal(self._ports)
        in_flight = Signal(IN_FLIGHT_BITS)
        address_left = address & ~Cat(port.awready for port in self.axi)
        beat_left = beat & ~Cat(port.wready for port in self.axi)
        answers = [port.bvalid for port in self.axi]
        accepted = self.i.valid & self.i.ready
        m.d.comb += [
            self.i.ready.eq(~address_left.any() & ~beat_left.any() & ~in_flight.all()),
            self.quiet.eq(in_flight == 0),
            self.bad.eq(Cat(port.bvalid & (port.bresp != OKAY) for port in self.axi).any()),
        ]
        m.d.sync += [
            address.eq(address_left),
            beat.eq(beat_left),
            in_flight.eq(in_flight + accepted - sum(answers)),
        ]
        with m.If(accepted):
            chosen = 1 << self.i.payload.target
            m.d.sync += [held.eq(self.i.payload), address.eq(chosen), beat.eq(chosen)]
        for n, port in enumerate(self.axi):
            m.d.comb += [
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
    """Reads the same `words` words from every channel in `mask` and keeps of each piece the one byte that changes.

    `go` starts (only while `quiet`); `got[c]` counts the words that channel c has delivered; `old[c]` shows, for word
    `part`, byte `byte` of its eight pieces. `bad` pulses on an answer that is not OKAY. Words are read singly, since
    a tile may start anywhere and a burst must not cross 4 KB.
    """

    def __init__(self, channels: int):
        self._channels = channels
        super().__init__(
            {
                "go": In(1),
                "mask": In(channels),
                "addr": In(ADDR_BITS),
                "words": In(range(TILE_WORDS + 1)),
                "byte": In(range(PIECES)),
                "part": In(range(TILE_WORDS)),
                "got": Out(range(TILE_WORDS + 1)).array(channels),
                "old": Out(8 * PIECES).array(channels),
                "axi": Out(axi_read(ADDR_BITS, WORD_BITS)).array(channels),
                "quiet": Out(1),
                "bad": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        asking, waiting = Signal(self._channels), Signal(self._channels)
        address, words = Signal(ADDR_BITS), Signal(range(TILE_WORDS + 1))
        m.d.comb += [
            self.quiet.eq(~waiting.any()),
            self.bad.eq(Cat(port.rvalid & (port.rresp != OKAY) for port in self.axi).any()),
        ]
        with m.If(self.go):
            m.d.sync += [address.eq(self.addr), words.eq(self.words)]
        for n, port in enumerate(self.axi):
            asked = Signal(range(TILE_WORDS + 1), name=f"asked_{n}")
            rows = TypedMemory(8 * PIECES, TILE_WORDS, asynchronous_read=True)
            m.submodules[f"rows_{n}"] = rows
            pieces = [
                Array(port.rdata.word_select(8 * q + b, 8) for b in range(8))[self.byte]
                for q in range(PIECES)
            ]
            m.d.comb += [
                port.araddr.eq(address + (asked << WORD_SIZE)),
                port.arsize.eq(WORD_SIZE),
                port.arburst.eq(BURST_INCR),
                port.arvalid.eq(asking[n]),
                port.rready.eq(1),
                rows.w.addr.eq(self.got[n]),
                rows.w.data.eq(Cat(pieces)),
                rows.w.en.eq(port.rvalid),
                rows.r[0].addr.eq(self.part),
                self.old[n].eq(rows.r[0].data),
            ]
            with m.If(self.go & self.mask[n]):
                m.d.sync += [asking[n].eq(1), waiting[n].eq(1), self.got[n].eq(0), asked.eq(0)]
            with m.Else():
                with m.If(asking[n] & port.arready):
                    m.d.sync += [asked.eq(asked + 1), asking[n].eq(asked + 1 != words)]
                with m.If(port.rvalid):
                    m.d.sync += self.got[n].eq(self.got[n] + 1)
                    with m.If(self.got[n] + 1 == words):
                        m.d.sync += waiting[n].eq(0)
        return m
