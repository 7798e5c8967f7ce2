"""The vector buffer: Q16 words in four banks, shared by the drain, the vector unit and the DMA unit."""

from functools import partial

from amaranth import Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import wiring
from amaranth.lib.wiring import In

from golden.spec.engine import VB_BANKS, EngineConfig
from hw.engine.interfaces import vb_read, vb_write
from hw.lib.memories import TypedMemory
from hw.lib.shared import place

READERS = ("drain", "a", "b", "dma")
WRITERS = ("drain_w", "y", "dma_w")
URAM_WORDS = 4096
"""Banks at least this deep are built of URAM."""


class VectorBuffer(wiring.Component):
    """Ports by requester, in order of priority: reads `drain`, `a`, `b`, `dma`; writes `drain_w`, `y`, `dma_w`.

    A request is granted in the cycle in which `en & rdy`; `rdy` is low only while a requester of higher priority uses
    the same bank. Read data come one cycle after the grant; a read of a word that is written in the same cycle gives
    the old word. The drain has the first place of both orders and never waits.
    """

    latency = 1

    def __init__(self, config: EngineConfig):
        self._config = config
        super().__init__(
            {**{n: In(vb_read(config)) for n in READERS}, **{n: In(vb_write(config)) for n in WRITERS}}
        )

    def elaborate(self, platform):
        m = Module()
        config = self._config
        depth = config.vb_words // VB_BANKS
        low = (depth - 1).bit_length()
        readers, writers = [getattr(self, n) for n in READERS], [getattr(self, n) for n in WRITERS]
        width = 32 * config.vector_lanes
        style = "ultra" if depth >= URAM_WORDS else "block"
        for port in (*readers, *writers):
            m.d.comb += port.rdy.eq(1)
        bank = partial(TypedMemory, unsigned(width), depth, granularity=32, ram_style=style)
        banks = []
        for b in range(VB_BANKS):
            memory = place(m, platform, f"bank_{b}", "vector_bank", bank)
            read, write = memory.r[0], memory.w
            for port in reversed(readers):
                with m.If(self._wants(port, b, low)):
                    m.d.comb += [read.addr.eq(port.addr), read.en.eq(1)]
            for port in reversed(writers):
                with m.If(self._wants(port, b, low)):
                    m.d.comb += [write.addr.eq(port.addr), write.en.eq(port.mask), write.data.eq(port.data)]
            banks.append(Value.cast(read.data))
        for order in (readers, writers):
            for i, port in enumerate(order):
                for other in order[:i]:
                    with m.If(other.en & (self._bank(other, low) == self._bank(port, low))):
                        m.d.comb += port.rdy.eq(0)
        for name, port in zip(READERS, readers):
            chosen = Signal(range(VB_BANKS), name=f"{name}_bank")
            m.d.sync += chosen.eq(self._bank(port, low))
            data = banks[0]
            for b in range(1, VB_BANKS):
                data = Mux(chosen == b, banks[b], data)
            m.d.comb += port.data.eq(data)
        return m

    @staticmethod
    def _bank(port, low):
        return port.addr[low : low + (VB_BANKS - 1).bit_length()]

    def _wants(self, port, bank, low):
        return port.en & (self._bank(port, low) == Const(bank, (VB_BANKS - 1).bit_length()))
