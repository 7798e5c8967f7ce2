"""The flash side as one block: page reads in, filtered pages per kernel out, flash channels in between."""

from amaranth import Cat, Const, Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from golden.spec.storage import FILTER_DESCRIPTOR, MASK_BITS, PPN, SLOT_BITS, TAG_BITS, PageKind
from hw.lib.streams import PipeStage, StreamFIFO, check_count
from hw.storage.nfc.filter import RING_PAGES, PageFilter
from hw.storage.nfc.gate import legal_marks
from hw.storage.nfc.layouts import CHANNEL, COMMAND, DESCRIPTOR, PAGE, flow, layout_of
from hw.storage.nfc.order import PageOrder

READ = data.StructLayout({"ppn": layout_of(PPN), **dict(FILTER_DESCRIPTOR.fields)})
"""One page to read: where it lies and what its filter needs to know."""
COUNTED = data.StructLayout({**dict(READ.members), "marks": data.ArrayLayout(5, 2)})
"""A read and the number of marks in each half of its mask: the halves' sum is due only behind the register."""
SIZED = data.StructLayout({**dict(READ.members), "last_row": DESCRIPTOR["last_row"].shape})
"""A read and the number of the last beat that passes."""
OUTSTANDING = 64
"""Reads of a channel that may wait in front of it, and for each kernel reads that may wait for a grant."""
READ_QUEUE = 512
"""Reads per kernel that wait for room in the channels' queues: two heads of 2K tokens."""


class PageSize(wiring.Component):
    """Reads into reads of known size: how many beats of the page its filter passes, of wanted pages only.

    Marks of entries that the page does not have are dropped. Three registers lie between; a read per cycle.
    """

    latency = 3

    i: In(stream.Signature(READ))
    o: Out(stream.Signature(SIZED))

    def elaborate(self, platform):
        m = Module()
        m.submodules.legal = legal = PipeStage(READ)
        m.submodules.count = count = PipeStage(COUNTED)
        m.submodules.size = size = PipeStage(SIZED)
        connect(m, size.o, flipped(self.o))
        self._pass(m, self.i, legal.i)
        m.d.comb += legal.i.p.mask.eq(self.i.p.mask & legal_marks(self.i.p))
        self._pass(m, legal.o, count.i)
        marks = legal.o.p.mask
        for half in range(2):
            m.d.comb += count.i.p.marks[half].eq(_ones(marks.word_select(half, MASK_BITS // 2)))
        self._pass(m, count.o, size.i)
        read = count.o.p
        low, high = read.marks
        others, both = (low + high - 1)[:5], low.any() & high.any()
        # of 2^s beats for each mark or group the last one's number ends in s ones
        with m.Switch(Cat(read.wide_head, read.kind)):
            for wide in (0, 1):
                with m.Case(wide | PageKind.K_TOKEN << 1):
                    m.d.comb += size.i.p.last_row.eq(Cat(Const(-1, 2 + wide), others))
                with m.Case(wide | PageKind.V_TOKEN << 1):
                    m.d.comb += size.i.p.last_row.eq(Cat(Const(-1, 6 + wide), both))
            with m.Default(), m.Switch(read.m_log2):
                for m_log2 in (1, 2, 3):
                    with m.Case(m_log2):
                        m.d.comb += size.i.p.last_row.eq(Cat(Const(-1, 7 - m_log2), others))
        return m

    @staticmethod
    def _pass(m, a, b):
        """A stream into the next register; what changes on the way is assigned after this."""
        m.d.comb += [b.valid.eq(a.valid), a.ready.eq(b.ready)]
        m.d.comb += [b.payload[name].eq(a.payload[name]) for name, _ in READ]


def _ones(bits):
    """Number of ones, as a tree."""
    if len(bits) == 1:
        return bits
    half = len(bits) // 2
    return _ones(bits[:half]) + _ones(bits[half:])


class FlashFront(wiring.Component):
    """Read pages from `channels` flash channels, filter them, and give each kernel its pages in order of request.

    Ports:
    - `read`: pages in order of request; the top tag bit names the kernel. They queue per kernel and go to the channels
      in turns, so that a long run of pages for one kernel does not starve the other.
      A page without a marked entry is dropped here: no channel reads it, no kernel sees it.
    - `command`: per channel, the physical page to sense next.
    - `grant`: per channel and kernel, the slot under which the kernel's oldest read of the channel that has none may
      be sent; a grant may come before its command. The channel sends whichever granted page it has.
    - `beat`: per channel, the raw pages after ECC, never refused.
    - `page`: per kernel, filtered pages (`PAGE_BEAT`).

    `outstanding` reads per channel and kernel wait for a grant: enough of them keep every die of the channel sensing.
    A channel number that does not exist is the caller's fault: bound it before (`Status.OUTSIDE_DEVICE`).
    """

    def __init__(
        self,
        channels: int = 8,
        kernels: int = 2,
        *,
        outstanding: int = OUTSTANDING,
        ring_pages: int = RING_PAGES,
    ):
        self._channels = check_count("Channels of the flash side", channels, 2)
        self._kernels = check_count("Kernels of the flash side", kernels, 1)
        self._outstanding, self._ring_pages = outstanding, ring_pages
        super().__init__(
            {
                "read": In(stream.Signature(READ)),
                "command": Out(stream.Signature(COMMAND)).array(channels),
                "grant": Out(flow(SLOT_BITS)).array(channels, kernels),
                "beat": In(flow(CHANNEL)).array(channels),
                "page": Out(stream.Signature(PAGE)).array(kernels),
            }
        )

    def _kernel_of(self, read):
        """The kernel that a read is for."""
        return read.tag[TAG_BITS - (self._kernels - 1).bit_length() :] if self._kernels > 1 else Const(0, 1)

    def elaborate(self, platform):
        m = Module()
        m.submodules.sizes = sizes = PageSize()
        connect(m, self._take_turns(m), sizes.i)
        read, kernel, go = sizes.o.p, self._kernel_of(sizes.o.p), Signal()
        orders = self._orders(m)
        ready = []
        for n in range(self._channels):
            m.submodules[f"filter_{n}"] = page_filter = PageFilter(self._kernels, ring_pages=self._ring_pages)
            m.submodules[f"commands_{n}"] = commands = StreamFIFO(COMMAND, self._outstanding)
            connect(m, commands.o, flipped(self.command[n]))
            connect(m, flipped(self.beat[n]), page_filter.i)
            here = read.ppn.channel == n
            m.d.comb += [
                commands.i.p.ppn.eq(read.ppn),
                commands.i.p.kernel.eq(kernel),
                commands.i.valid.eq(go & here),
            ]
            ready.append(~here | commands.i.ready)
            for k, order in enumerate(orders):
                m.submodules[f"descriptors_{n}_{k}"] = queue = StreamFIFO(DESCRIPTOR, self._outstanding)
                connect(m, queue.o, page_filter.desc[k])
                connect(m, page_filter.grant[k], flipped(self.grant[n][k]))
                connect(m, page_filter.o[k], order.i[n])
                mine = here & (kernel == k)
                m.d.comb += [queue.i.payload[name].eq(read[name]) for name, _ in DESCRIPTOR]
                m.d.comb += queue.i.valid.eq(go & mine)
                ready.append(~mine | queue.i.ready)
        for k, order in enumerate(orders):
            m.submodules[f"order_queue_{k}"] = queue = StreamFIFO(
                range(self._channels), self._channels * self._outstanding, kind="block"
            )
            connect(m, queue.o, order.order)
            m.d.comb += [queue.i.payload.eq(read.ppn.channel), queue.i.valid.eq(go & (kernel == k))]
            ready.append((kernel != k) | queue.i.ready)
        m.d.comb += [sizes.o.ready.eq(Cat(ready).all()), go.eq(sizes.o.valid & sizes.o.ready)]
        return m

    def _orders(self, m):
        orders = []
        for k in range(self._kernels):
            m.submodules[f"order_{k}"] = order = PageOrder(self._channels)
            connect(m, order.o, flipped(self.page[k]))
            orders.append(order)
        return orders

    def _take_turns(self, m):
        """A read per cycle out of the kernels' queues, alternating between those that hold any."""
        read = self.read.payload
        wanted = (read.mask & legal_marks(read)).any()
        kernel = self._kernel_of(read)
        m.submodules.slice = chosen = PipeStage(READ)
        queues = []
        for n in range(self._kernels):
            m.submodules[f"reads_{n}"] = queue = StreamFIFO(READ, READ_QUEUE, kind="block")
            here = kernel == n
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
