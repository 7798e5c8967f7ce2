"""Ring of filtered pages of one kernel and channel: room is given in order, filled in any, played back in order."""

from amaranth import Module, Mux, Shape, Signal, Value
from amaranth.lib import data, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.storage import PAGE_BEATS
from hw.lib.memories import TypedMemory
from hw.lib.streams import check_count
from hw.storage.nfc.gate import GATED, START_BITS
from hw.storage.nfc.layouts import DESCRIPTOR, SLOTS, flow


class PageRing(wiring.Component):
    """Give pages room by their filtered size, take their rows in any order of pages, and play the pages back in order.

    Ports:
    - `desc`: descriptors of the kernel's pages in order, each of at least one row. As soon as the rows fit behind those
      of the pages before it, the page gets a slot; `grant` (one cycle) says that the page may come under this name.
    - `slot` asks for the descriptor of a granted page; `placed` answers in the same cycle.
    - `write`: judged beats of granted pages, one page after the other. Kept beats fill the lanes of a row in ascending
      order. `end` closes the page; of a page that fails one row of zeros is played.
    - `o`: `{row, first, last, fail, desc}`, rows of the pages in the order of `desc`, without a bubble inside a page or
      between pages that are there; a page's first row is offered `latency` cycles after its `end`, if it is the oldest.

    A page's rows and its slot are free again once its last row has been read; nothing is ever written that has no room.
    """

    latency = 5

    def __init__(
        self,
        depth: int,
        *,
        slots: int = SLOTS,
        page_rows: int = PAGE_BEATS,
        desc: data.StructLayout = DESCRIPTOR,
        beat: data.StructLayout = GATED,
    ):
        check_count("Depth of a page ring", depth, page_rows)
        if depth & (depth - 1) or depth > 1 << START_BITS:
            raise ValueError(
                f"the depth of a page ring is a power of two up to {1 << START_BITS}, not {depth}"
            )
        self._depth, self._slots, self._desc = depth, slots, desc
        self._beat_bits = Shape.cast(beat["data"].shape).width
        self._lanes = 1 << Shape.cast(beat["lane"].shape).width
        self._placed = data.StructLayout({**dict(desc.members), "start": START_BITS})
        row = self._beat_bits * self._lanes
        self._row_page = data.StructLayout({"row": row, "first": 1, "last": 1, "fail": 1, "desc": desc})
        super().__init__(
            {
                "desc": In(stream.Signature(desc)),
                "grant": Out(flow(range(slots))),
                "slot": In(range(slots)),
                "placed": Out(self._placed),
                "write": In(flow(beat)),
                "o": Out(stream.Signature(self._row_page)),
            }
        )

        # State that proofs refer to: rows given to pages and not yet free, slots in use.
        self.used, self.held = Signal(range(depth + 1)), Signal(range(slots + 1))

    def elaborate(self, platform):
        m = Module()
        bits = (self._depth - 1).bit_length()
        m.submodules.table = table = memory.Memory(
            shape=self._placed, depth=self._slots, init=[], attrs={"ram_style": "distributed"}
        )
        row_shape = data.ArrayLayout(self._beat_bits, self._lanes)
        m.submodules.rows = rows = TypedMemory(row_shape, self._depth, granularity=1, ram_style="block")
        asked = table.read_port(domain="comb")
        m.d.comb += [asked.addr.eq(self.slot), self.placed.eq(asked.data)]
        arrived, failed = Signal(self._slots), Signal(self._slots)
        taken, freed, freed_rows = self._play(m, rows, table, arrived, failed, bits)
        given = self._give(m, table, bits)
        m.d.sync += [
            self.held.eq(self.held + given - taken),
            self.used.eq(self.used + Mux(given, self.desc.p.last_row + 1, 0) - Mux(freed, freed_rows + 1, 0)),
        ]
        self._fill(m, rows, arrived, failed, bits)
        return m

    def _give(self, m, table, bits):
        """Room and a slot for the next page: judged in one cycle, given in the next, so a page every other cycle."""
        fits, start, slot = Signal(), Signal(bits), Signal(range(self._slots))
        given = Signal()
        write = table.write_port()
        m.d.sync += fits.eq(
            self.desc.valid
            & ~given
            & (self.held != self._slots)
            & (self.used + self.desc.p.last_row < self._depth)
        )
        m.d.comb += [
            given.eq(fits),
            self.desc.ready.eq(given),
            self.grant.valid.eq(given),
            self.grant.payload.eq(slot),
            write.addr.eq(slot),
            write.en.eq(given),
            *(write.data[name].eq(self.desc.p[name]) for name, _ in self._desc),
            write.data.start.eq(start),
        ]
        with m.If(given):
            m.d.sync += [slot.eq(slot + 1), start.eq(start + self.desc.p.last_row + 1)]
        return given

    def _fill(self, m, rows, arrived, failed, bits):
        """Lanes of rows where the page's room begins; the slot of a whole page is noted."""
        write, head, row = self.write.payload, Signal(bits), Signal(bits)
        kept = self.write.valid & write.keep
        m.d.comb += [
            row.eq(Mux(write.begin, write.start, head)),
            rows.w.addr.eq(row),
            *(rows.w.data[n].eq(write.data) for n in range(self._lanes)),
            rows.w.en.eq(Mux(kept, Value.cast(1) << write.lane, 0)),
        ]
        with m.If(self.write.valid):
            m.d.sync += head.eq(row + (write.keep & (write.lane == self._lanes - 1)))
        with m.If(self.write.valid & write.end):
            m.d.sync += [
                arrived.bit_select(write.slot, 1).eq(1),
                failed.bit_select(write.slot, 1).eq(write.fail),
            ]

    def _play(self, m, rows, table, arrived, failed, bits):
        """Pages in order of slots: the page, address, memory and output registers stand still together."""
        advance, take = Signal(), Signal()
        oldest = Signal(range(self._slots))
        found = table.read_port(domain="comb")
        page, standing, fail = Signal(self._placed), Signal(), Signal()
        row, left, first = Signal(bits), Signal.like(page.last_row), Signal()
        final = fail | (left == 0)
        read_valid, read = Signal(), Signal(self._row_page)
        out = self.o.payload
        here = arrived.bit_select(oldest, 1)
        m.d.comb += [
            found.addr.eq(oldest),
            advance.eq(~self.o.valid | self.o.ready),
            take.eq((~standing | (advance & final)) & here),
            rows.r[0].addr.eq(row),
            rows.r[0].en.eq(advance),
        ]
        with m.If(advance):
            m.d.sync += [
                read_valid.eq(standing),
                read.first.eq(first),
                read.last.eq(final),
                read.fail.eq(fail),
                *(read.desc[name].eq(page[name]) for name, _ in self._desc),
                self.o.valid.eq(read_valid),
                out.eq(read),
                out.row.eq(Mux(read.fail, 0, Value.cast(rows.r[0].data))),
                row.eq(row + 1),
                left.eq(left - 1),
                first.eq(0),
            ]
            with m.If(final):
                m.d.sync += standing.eq(0)
        with m.If(take):
            m.d.sync += [
                oldest.eq(oldest + 1),
                arrived.bit_select(oldest, 1).eq(0),
                standing.eq(1),
                page.eq(found.data),
                fail.eq(failed.bit_select(oldest, 1)),
                row.eq(found.data.start),
                left.eq(found.data.last_row),
                first.eq(1),
            ]
        return take, standing & advance & final, page.last_row
