"""Ring buffer of filtered pages: rows are written as they come, and offered once their page is complete."""

from amaranth import Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.lib.memories import TypedMemory
from hw.lib.streams import StreamFIFO, check_count

MARGIN = 4
"""Rows and pages kept free for what is under way when `room` falls (see `PageRing.grace`)."""


class PageRing(wiring.Component):
    """Store the rows of whole pages and play them back in order, without a bubble inside a page.

    Ports:
    - `write`: `{data, lane, keep, end, fail, wanted, meta}`, never refused. Kept beats fill the lanes of a row in
      ascending order; a page is a whole number of rows. `end` closes the page: it is committed, or, when it fails,
      its rows are taken back and one row of zeros stands for it; a page that is not wanted leaves no trace.
    - `room`: after it falls, `grace` more writes are safe.
    - `o`: `{row, first, last, fail, meta}`; a page's first row is offered `latency` cycles after its `end`.

    A page has at most `depth - MARGIN` rows; up to `slots` pages wait.
    """

    latency = 4
    grace = 4

    def __init__(self, lane_bits: int, lanes: int, depth: int, slots: int, meta: data.StructLayout):
        check_count("Depth of a page ring", depth, 2 * MARGIN)
        check_count("Slots of a page ring", slots, 2 * MARGIN)
        if depth & (depth - 1):
            raise ValueError(f"the depth of a page ring is a power of two, not {depth}")
        self._lane_bits, self._lanes, self._depth, self._slots, self._meta = (
            lane_bits,
            lanes,
            depth,
            slots,
            meta,
        )
        written = data.StructLayout(
            {
                "data": lane_bits,
                "lane": range(lanes),
                "keep": 1,
                "end": 1,
                "fail": 1,
                "wanted": 1,
                "meta": meta,
            }
        )
        read = data.StructLayout({"row": lane_bits * lanes, "first": 1, "last": 1, "fail": 1, "meta": meta})
        super().__init__(
            {
                "write": In(stream.Signature(written, always_ready=True)),
                "room": Out(1),
                "o": Out(stream.Signature(read)),
            }
        )

        # State that proofs refer to: rows written, rows of closed pages, rows read; each modulo twice the depth.
        bits = (depth - 1).bit_length() + 1
        self.head, self.start, self.tail = Signal(bits), Signal(bits), Signal(bits)

    def elaborate(self, platform):
        m = Module()
        bits = (self._depth - 1).bit_length()
        row_shape = data.ArrayLayout(self._lane_bits, self._lanes)
        m.submodules.rows = rows = TypedMemory(row_shape, self._depth, granularity=1, ram_style="block")
        page = data.StructLayout({"rows": bits + 1, "fail": 1, "meta": self._meta})
        m.submodules.pages = pages = StreamFIFO(page, self._slots)

        # --- writing
        start, head, tail = self.start, self.head, self.tail
        write = self.write.payload
        kept = self.write.valid & write.keep
        after = Signal(bits + 1)
        m.d.comb += [
            after.eq(head + (kept & (write.lane == self._lanes - 1))),
            rows.w.addr.eq(head[:bits]),
            *(rows.w.data[n].eq(write.data) for n in range(self._lanes)),
            rows.w.en.eq(Mux(kept, Value.cast(1) << write.lane, 0)),
            pages.i.payload.rows.eq(after - start),
            pages.i.payload.fail.eq(write.fail),
            pages.i.payload.meta.eq(write.meta),
            pages.i.valid.eq(self.write.valid & write.end & write.wanted),
        ]
        m.d.sync += head.eq(after)
        with m.If(self.write.valid & write.end):
            with m.If(write.fail):
                m.d.sync += head.eq(start)
            with m.Else():
                m.d.sync += start.eq(after)
        m.d.sync += self.room.eq(
            ((head - tail)[: bits + 1] <= self._depth - MARGIN) & (pages.level <= self._slots - MARGIN)
        )

        # --- reading: address, memory, output register; all three stand still when the output does
        advance = Signal()
        index, stand = Signal(bits + 1), pages.o.payload
        final = Signal()
        read_valid, read = Signal(), Signal.like(self.o.payload)
        m.d.comb += [
            advance.eq(~self.o.valid | self.o.ready),
            final.eq(stand.fail | (index + 1 == stand.rows)),
            pages.o.ready.eq(advance & final),
            rows.r[0].addr.eq(tail[:bits]),
            rows.r[0].en.eq(advance),
        ]
        with m.If(advance):
            m.d.sync += [
                read_valid.eq(pages.o.valid),
                read.first.eq(index == 0),
                read.last.eq(final),
                read.fail.eq(stand.fail),
                read.meta.eq(stand.meta),
                self.o.valid.eq(read_valid),
                self.o.payload.eq(read),
                self.o.payload.row.eq(Mux(read.fail, 0, Value.cast(rows.r[0].data))),
            ]
            with m.If(pages.o.valid):
                m.d.sync += index.eq(Mux(final, 0, index + 1))
                with m.If(~stand.fail):
                    m.d.sync += tail.eq(tail + 1)
        return m
