"""Page filter of one flash channel: raw pages and descriptors in, marked entries out, per kernel."""

from amaranth import Module, Mux
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from golden.spec.storage import PAGE_BEATS, SLOT_BITS
from hw.lib.streams import check_count
from hw.storage.nfc.gate import EntryGate
from hw.storage.nfc.layouts import CHANNEL, DESCRIPTOR, PAGE, flow
from hw.storage.nfc.ring import PageRing

RING_PAGES = 4
"""Pages that a filter holds for each kernel by default: how far a channel runs ahead of it (FLS-11)."""


class PageFilter(wiring.Component):
    """Pass the marked entries of raw pages, at one channel beat per cycle whatever the marks.

    Ports:
    - `desc`: per kernel, a descriptor per page in the order in which the kernel takes them.
    - `grant`: per kernel, the slot under which its oldest page that has none may come now: there is room for it.
    - `i`: raw pages (`CHANNEL_BEAT`) under the names of their grants, in any order, never refused.
    - `o`: per kernel, filtered pages (`PAGE_BEAT`, whose rules `golden.spec.storage` states) in order. A page's first
      beat leaves `latency` cycles after its last beat came in, if nothing is queued before it; from then on a beat
      every cycle.

    `ring_pages` whole pages fit each kernel's ring (a power of two); many more when few entries are marked.
    """

    latency = EntryGate.latency + PageRing.latency - 1

    def __init__(self, kernels: int = 2, *, ring_pages: int = RING_PAGES):
        self._kernels = check_count("Kernels of a page filter", kernels, 1)
        self._ring_pages = ring_pages
        super().__init__(
            {
                "desc": In(stream.Signature(DESCRIPTOR)).array(kernels),
                "grant": Out(flow(SLOT_BITS)).array(kernels),
                "i": In(flow(CHANNEL)),
                "o": Out(stream.Signature(PAGE)).array(kernels),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.gate = gate = EntryGate()
        connect(m, flipped(self.i), gate.i)
        placed = []
        for n in range(self._kernels):
            m.submodules[f"ring_{n}"] = ring = PageRing(self._ring_pages * PAGE_BEATS)
            connect(m, flipped(self.desc[n]), ring.desc)
            m.d.comb += [
                self.grant[n].valid.eq(ring.grant.valid),
                self.grant[n].payload.eq(ring.grant.payload),
                ring.slot.eq(self.i.payload.slot),
                ring.write.valid.eq(gate.o.valid & (gate.o.payload.kernel == n)),
                ring.write.payload.eq(gate.o.payload),
                self.o[n].valid.eq(ring.o.valid),
                ring.o.ready.eq(self.o[n].ready),
                self.o[n].p.data.eq(ring.o.p.row),
                *(self.o[n].p[name].eq(ring.o.p[name]) for name in ("first", "last", "fail")),
                *(self.o[n].p[name].eq(ring.o.p.desc[name]) for name in ("kind", "mask", "tag")),
            ]
            placed.append(ring.placed)
        m.d.comb += gate.page.eq(Mux(self.i.payload.kernel, placed[-1], placed[0]))
        return m
