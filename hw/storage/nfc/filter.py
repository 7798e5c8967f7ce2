"""Page filter of one flash channel: raw pages and descriptors in, marked entries out."""

from amaranth import Module
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from golden.spec.storage import PAGE_BEATS
from hw.storage.nfc.gate import BEAT_BITS, GATED, LANES, EntryGate
from hw.storage.nfc.layouts import CHANNEL, DESCRIPTOR, PAGE
from hw.storage.nfc.ring import PageRing

RING_PAGES = 8
"""Pages that a filter holds by default: how far a channel runs ahead of the slowest one (FLS-11)."""

META = data.StructLayout({name: GATED[name].shape for name in ("kind", "mask", "tag")})


class PageFilter(wiring.Component):
    """Pass the marked entries of raw pages, at one channel beat per cycle whatever the marks.

    Ports: `desc` one `FILTER_DESCRIPTOR` per page in streaming order, `i` raw pages (`CHANNEL_BEAT`), `o` filtered
    pages (`PAGE_BEAT`, whose rules `golden.spec.storage` states). A page's first beat leaves `latency` cycles after
    its last beat came in, if nothing is queued before it; from then on a beat every cycle.

    `ring_pages` whole pages fit the buffer (a power of two); many more when few entries are marked. The channel is
    held up only when neither fits another row, that is when the reader falls behind.
    """

    latency = EntryGate.latency + PageRing.latency - 1

    def __init__(self, *, ring_pages: int = RING_PAGES, slots: int = 32):
        self._ring_pages, self._slots = ring_pages, slots
        super().__init__(
            {
                "desc": In(stream.Signature(DESCRIPTOR)),
                "i": In(stream.Signature(CHANNEL)),
                "o": Out(stream.Signature(PAGE)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.gate = gate = EntryGate()
        m.submodules.ring = ring = PageRing(
            BEAT_BITS, LANES, self._ring_pages * PAGE_BEATS, self._slots, META
        )
        connect(m, flipped(self.desc), gate.desc)
        connect(m, flipped(self.i), gate.i)
        judged, write = gate.o.payload, ring.write.payload
        m.d.comb += [gate.room.eq(ring.room), ring.write.valid.eq(gate.o.valid)]
        m.d.comb += [
            write[name].eq(judged[name]) for name in ("data", "lane", "keep", "end", "fail", "wanted")
        ]
        m.d.comb += [write.meta[name].eq(judged[name]) for name in ("kind", "mask", "tag")]
        page, out = ring.o.payload, self.o.payload
        m.d.comb += [
            self.o.valid.eq(ring.o.valid),
            ring.o.ready.eq(self.o.ready),
            out.data.eq(page.row),
            out.first.eq(page.first),
            out.last.eq(page.last),
            out.fail.eq(page.fail),
        ]
        m.d.comb += [out[name].eq(page.meta[name]) for name in ("kind", "mask", "tag")]
        return m
