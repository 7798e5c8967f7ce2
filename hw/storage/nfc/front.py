"""The flash side as one block: page reads in, filtered pages per kernel out, flash channels in between."""

from amaranth import Cat, Const, Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from golden.spec.storage import FILTER_DESCRIPTOR, PPN, TAG_BITS
from hw.lib.streams import PipeStage, StreamFIFO, check_count
from hw.storage.nfc.filter import RING_PAGES, PageFilter
from hw.storage.nfc.gate import legal_marks
from hw.storage.nfc.layouts import CHANNEL, DESCRIPTOR, PAGE, layout_of
from hw.storage.nfc.order import PageOrder

READ = data.StructLayout({"ppn": layout_of(PPN), **dict(FILTER_DESCRIPTOR.fields)})
"""One page to read: where it lies and what its filter needs to know."""
READ_QUEUE = 512
"""Reads per kernel that wait for room in the channels' queues: two heads of 2K tokens."""


class FlashFront(wiring.Component):
    """Read pages from `channels` flash channels, filter them, and give each kernel its pages in order of request.

    Ports:
    - `read`: pages in order of request; the top tag bit names the kernel (`PageOrder`). They queue per kernel and go to
      the channels in turns, so that a long run of pages for one kernel does not starve the other.
      A page without a marked entry is dropped here: no channel reads it, no kernel sees it.
    - `command`: per channel, the physical page to read next; a channel answers in order.
    - `beat`: per channel, the raw pages after ECC.
    - `page`: per kernel, filtered pages (`PAGE_BEAT`).

    `outstanding` reads per channel may be under way: enough of them keep every die of the channel sensing.
    A channel number that does not exist is the caller's fault: bound it before (`Status.OUTSIDE_DEVICE`).
    """

    def __init__(
        self, channels: int = 8, kernels: int = 2, *, outstanding: int = 64, ring_pages: int = RING_PAGES
    ):
        self._channels = check_count("Channels of the flash side", channels, 2)
        self._kernels = check_count("Kernels of the flash side", kernels, 1)
        self._outstanding, self._ring_pages = outstanding, ring_pages
        super().__init__(
            {
                "read": In(stream.Signature(READ)),
                "command": Out(stream.Signature(layout_of(PPN))).array(channels),
                "beat": In(stream.Signature(CHANNEL)).array(channels),
                "page": Out(stream.Signature(PAGE)).array(kernels),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.order = order = PageOrder(self._channels, self._kernels)
        source = self._take_turns(m)
        read, go, ready = source.payload, Signal(), []
        for n in range(self._channels):
            m.submodules[f"filter_{n}"] = page_filter = PageFilter(ring_pages=self._ring_pages)
            m.submodules[f"descriptors_{n}"] = descriptors = StreamFIFO(DESCRIPTOR, self._outstanding)
            m.submodules[f"commands_{n}"] = commands = StreamFIFO(layout_of(PPN), self._outstanding)
            connect(m, descriptors.o, page_filter.desc)
            connect(m, commands.o, flipped(self.command[n]))
            connect(m, flipped(self.beat[n]), page_filter.i)
            connect(m, page_filter.o, order.i[n])
            here = read.ppn.channel == n
            m.d.comb += [
                commands.i.payload.eq(read.ppn),
                *(descriptors.i.payload[name].eq(read[name]) for name, _ in FILTER_DESCRIPTOR.fields),
                commands.i.valid.eq(go & here),
                descriptors.i.valid.eq(go & here),
            ]
            ready.append(~here | (commands.i.ready & descriptors.i.ready))
        kernel = read.tag[TAG_BITS - (self._kernels - 1).bit_length() :]
        for n in range(self._kernels):
            depth = self._channels * self._outstanding
            m.submodules[f"order_{n}"] = queue = StreamFIFO(range(self._channels), depth, kind="block")
            connect(m, queue.o, order.order[n])
            connect(m, order.o[n], flipped(self.page[n]))
            here = (kernel == n) if self._kernels > 1 else Const(1, 1)
            m.d.comb += [queue.i.payload.eq(read.ppn.channel), queue.i.valid.eq(go & here)]
            ready.append(~here | queue.i.ready)
        m.d.comb += [source.ready.eq(Cat(ready).all()), go.eq(source.valid & source.ready)]
        return m

    def _take_turns(self, m):
        """A read per cycle out of the kernels' queues, alternating between those that hold any."""
        read = self.read.payload
        wanted = (read.mask & legal_marks(read)).any()
        kernel = read.tag[TAG_BITS - (self._kernels - 1).bit_length() :]
        m.submodules.slice = chosen = PipeStage(READ)
        queues = []
        for n in range(self._kernels):
            m.submodules[f"reads_{n}"] = queue = StreamFIFO(READ, READ_QUEUE, kind="block")
            here = (kernel == n) if self._kernels > 1 else Const(1, 1)
            m.d.comb += [queue.i.payload.eq(read), queue.i.valid.eq(self.read.valid & wanted & here)]
            with m.If(here):
                m.d.comb += self.read.ready.eq(~wanted | queue.i.ready)
            queues.append(queue)
        turn = Signal(range(self._kernels))
        for offset in reversed(range(self._kernels)):
            # The later assignment wins: the kernel whose turn it is, then the ones behind it.
            for n, queue in enumerate(queues):
                with m.If((turn == (n - offset) % self._kernels) & queue.o.valid):
                    m.d.comb += [chosen.i.valid.eq(1), chosen.i.payload.eq(queue.o.payload)]
                    m.d.comb += [
                        other.o.ready.eq(chosen.i.ready if other is queue else 0) for other in queues
                    ]
                    with m.If(chosen.i.ready):
                        m.d.sync += turn.eq((n + 1) % self._kernels)
        return chosen.o
