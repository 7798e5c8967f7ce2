"""Properties of the flash side: no marked entry lost, no other passed, order kept."""

from amaranth import Cat, Const, Module, Mux, Signal, Value
from amaranth.hdl import Assert, Assume
from amaranth.lib import data

from golden.spec.storage import MASK_BITS, PageKind
from hw.storage.nfc.gate import GATED, EntryGate
from hw.storage.nfc.layouts import CHANNEL, DESCRIPTOR
from hw.storage.nfc.order import PageOrder
from hw.storage.nfc.ring import MARGIN, PageRing
from tests.hw.formal.harness import Proof, producer


class GateProof(Proof):
    """Each beat of each page is judged by the marks of the page's own descriptor, as the page formats place entries.

    The reference works on element numbers, as `golden.spec.storage` states them; framing is free, so that pages cut
    short or too long are covered: nothing of them passes once they went wrong, and they fail.
    """

    def __init__(self):
        super().__init__(
            {"desc_valid": 1, "desc": DESCRIPTOR.size, "valid": 1, "beat": CHANNEL.size, "room": 1}
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.gate = gate = EntryGate()
        producer(m, gate.desc, self.desc_valid, self.desc)
        producer(m, gate.i, self.valid, self.beat)
        m.d.comb += gate.room.eq(self.room)
        desc, beat = Signal(DESCRIPTOR), gate.i.payload
        have, position, wrong = Signal(), Signal(9), Signal()
        given = data.View(DESCRIPTOR, self.desc)
        m.d.comb += Assume((given.kind != PageKind.K_CHANNEL) | (given.m_log2 != 0))
        accept = gate.i.valid & gate.i.ready
        with m.If(accept & beat.last):
            m.d.sync += have.eq(0)
        with m.If(gate.desc.valid & gate.desc.ready):
            m.d.sync += [desc.eq(gate.desc.payload), have.eq(1)]
        m.d.comb += Assert(~(gate.desc.valid & gate.desc.ready) | ~have | (accept & beat.last))
        m.d.comb += Assert(~accept | (have & self.room))
        misplaced = (beat.first != (position == 0)) | (beat.last != (position == 511))
        with m.If(accept):
            m.d.sync += [
                position.eq(Mux(beat.last, 0, position + 1)),
                wrong.eq(~beat.last & (wrong | misplaced)),
            ]
        # Ties between the reference and the design, for the induction.
        m.d.comb += [
            Assert(gate.held == have),
            Assert(~have | (Value.cast(gate.current) == Value.cast(desc))),
            Assert(~have | (desc.kind != PageKind.K_CHANNEL) | (desc.m_log2 != 0)),
            Assert(gate.count == position),
            Assert(gate.broken == wrong),
        ]

        marks = desc.mask
        keep, elements, wanted = self._reference(m, desc, marks, position)
        m.d.comb += Assert(~have | (gate.wanted == wanted))
        expected, valid = [Signal(GATED, name=f"expected_{n}") for n in (0, 1)], Signal(2)
        m.d.sync += [
            valid.eq(Cat(accept, valid)),
            expected[1].eq(expected[0]),
            expected[0].data.eq(beat.data & Cat(bit.replicate(16) for bit in elements)),
            expected[0].keep.eq(keep & ~wrong & ~misplaced),
            expected[0].lane.eq(position[:2]),
            expected[0].end.eq(beat.last),
            expected[0].fail.eq(wrong | misplaced | beat.fail),
            expected[0].wanted.eq(wanted),
            expected[0].kind.eq(desc.kind),
            expected[0].mask.eq(desc.mask),
            expected[0].tag.eq(desc.tag),
        ]
        m.d.comb += Assert(gate.o.valid == valid[1])
        with m.If(valid[1]):
            for name, _ in GATED:
                m.d.comb += Assert(gate.o.payload[name] == expected[1][name])
        return m

    @staticmethod
    def _reference(m, desc, marks, position):
        """(beat is kept, the four elements that survive, any entry of the page is marked)."""
        wide, keeps = desc.wide_head, []
        for j in range(4):
            element = Cat(Const(j, 2), position)
            k_token = Mux(wide, element >> 7, element >> 6)
            v_token = Mux(wide, element >> 11, element >> 10)[:1] * 16 + element[:4]
            channel = Mux(desc.m_log2 == 1, element >> 10, Mux(desc.m_log2 == 2, element >> 9, element >> 8))
            entry = Signal(5, name=f"entry_{j}")
            with m.If(desc.kind == PageKind.V_TOKEN):
                m.d.comb += entry.eq(v_token)
            with m.Elif(desc.kind == PageKind.K_CHANNEL):
                m.d.comb += entry.eq(channel)
            with m.Else():
                m.d.comb += entry.eq(k_token)
            keeps.append(marks.bit_select(entry, 1))
        is_v = desc.kind == PageKind.V_TOKEN
        upper = ~wide & (position >= 256)
        group = Mux(upper, marks[16:], marks[:16]).any()
        entries = Mux(desc.kind == PageKind.K_CHANNEL, 1 << desc.m_log2, Mux(wide, 16, MASK_BITS))
        wanted = Cat(marks[n] & (n < entries) for n in range(MASK_BITS)).any()
        return Mux(is_v, group, keeps[0]), [keep | ~is_v for keep in keeps], wanted


class RingProof(Proof):
    """Rows of committed pages come out in order, each once, unchanged, framed by their pages; failed pages take their
    rows back and appear as one row of zeros; unwanted pages leave no trace. A freely chosen row is followed."""

    def __init__(self):
        self._meta = data.StructLayout({"tag": 1})
        super().__init__({"write": 6, "valid": 1, "ready": 1, "row": 4, "page": 4})

    def elaborate(self, platform):
        m = Module()
        m.submodules.ring = ring = PageRing(8, 2, 8, 8, self._meta)
        write = ring.write.payload
        keep, end, fail, wanted, tag, bit = self.write
        lane, rows = Signal(), Signal(4)
        m.d.comb += [
            ring.write.valid.eq(self.valid),
            write.data.eq(bit),
            write.lane.eq(lane),
            write.keep.eq(keep),
            write.end.eq(end),
            write.fail.eq(fail),
            write.wanted.eq(wanted),
            write.meta.tag.eq(tag),
            ring.o.ready.eq(self.ready),
        ]
        room = Signal(ring.grace, init=0)
        m.d.sync += room.eq(Cat(ring.room, room))
        kept = self.valid & keep
        after = Signal(4)
        m.d.comb += after.eq(rows + (kept & lane))
        m.d.comb += [
            Assume(~self.valid | ring.room | room.any()),
            # Pages are whole rows, at most depth - MARGIN of them; a good page has rows just when it is wanted.
            Assume(after <= 8 - MARGIN),
            Assume(~(self.valid & end & ~fail) | (lane == (keep & 1)) | (~keep & ~lane)),
            Assume(~(self.valid & end & ~fail) | ((after != 0) == wanted)),
            Assume(~(self.valid & end & ~fail) | ~(keep & ~lane)),
            Assume(~(self.valid & end & ~wanted) | (after == 0)),
        ]
        with m.If(self.valid):
            m.d.sync += [lane.eq(Mux(end, 0, lane ^ kept)), rows.eq(Mux(end, 0, after))]

        # --- what must come out: row number `row` of all committed ones, and page number `page`
        chosen_row, chosen_page = Signal(4), Signal(4)
        first = Signal(init=1)
        m.d.sync += [first.eq(0), chosen_row.eq(self.row), chosen_page.eq(self.page)]
        with m.If(~first):
            m.d.comb += [Assume(self.row == chosen_row), Assume(self.page == chosen_page)]
        committed, pages = Signal(6), Signal(6)
        value, low = Signal(16), Signal()
        page_rows, page_fail, page_tag = Signal(4), Signal(), Signal()
        with m.If(kept):
            m.d.sync += low.eq(bit)
            with m.If(lane & (committed + rows == self.row)):
                m.d.sync += value.eq(Cat(low, Const(0, 7), bit))
        with m.If(self.valid & end):
            with m.If(~fail):
                m.d.sync += committed.eq(committed + after)
            with m.If(wanted):
                m.d.sync += pages.eq(pages + 1)
                with m.If(pages == self.page):
                    m.d.sync += [page_rows.eq(after), page_fail.eq(fail), page_tag.eq(tag)]

        out = ring.o.payload
        seen, seen_pages, seen_rows = Signal(6), Signal(6), Signal(4)
        with m.If(ring.o.valid):
            m.d.comb += [Assert(seen_pages < pages), Assert(out.first == (seen_rows == 0))]
            with m.If(out.fail):
                m.d.comb += [Assert(out.row == 0), Assert(out.first & out.last)]
            with m.Else():
                m.d.comb += Assert(seen < committed)
                with m.If(seen == self.row):
                    m.d.comb += Assert(out.row == value)
            with m.If(seen_pages == self.page):
                m.d.comb += [
                    Assert(out.fail == page_fail),
                    Assert(out.meta.tag == page_tag),
                    Assert(page_fail | (out.last == (seen_rows + 1 == page_rows))),
                ]
            with m.If(self.ready):
                m.d.sync += [
                    seen.eq(seen + ~out.fail),
                    seen_rows.eq(Mux(out.last, 0, seen_rows + 1)),
                    seen_pages.eq(seen_pages + out.last),
                ]
        # Whatever was committed comes out: an idle output with pages inside lasts for the latency only.
        waiting = Signal(4)
        with m.If(ring.o.valid | (pages == seen_pages)):
            m.d.sync += waiting.eq(0)
        with m.Else():
            m.d.sync += waiting.eq(waiting + 1)
        m.d.comb += Assert(waiting < ring.latency)
        return m


class RingRoomProof(Proof):
    """Writes that respect `room` and its `grace` never overrun the ring, for all time; rows leave only if closed."""

    def __init__(self):
        super().__init__({"write": 2, "valid": 1, "ready": 1})

    def elaborate(self, platform):
        m = Module()
        m.submodules.ring = ring = PageRing(8, 2, 8, 8, data.StructLayout({"tag": 1}))
        write = ring.write.payload
        keep, end = self.write
        lane = Signal()
        m.d.comb += [
            ring.write.valid.eq(self.valid),
            write.keep.eq(keep),
            write.lane.eq(lane),
            write.end.eq(end),
            write.wanted.eq(end),
            ring.o.ready.eq(self.ready),
        ]
        room = Signal(ring.grace)
        m.d.sync += room.eq(Cat(ring.room, room))
        with m.If(self.valid & keep):
            m.d.sync += lane.eq(~lane)
        used, closed = (ring.head - ring.tail)[:4], (ring.start - ring.tail)[:4]
        m.d.comb += [
            Assume(~self.valid | ring.room | room.any()),
            # Pages hold as many rows as they say: RingProof's part.
            Assume((closed <= used) & (closed <= 8)),
            Assert(used <= 8),
        ]
        return m


SMALL_PAGE = data.StructLayout({"data": 2, "first": 1, "last": 1, "tag": 2})


class OrderProof(Proof):
    """A kernel gets pages whole, from the channels its order names, one after the other; each beat goes to the kernel
    that its tag names, once and unchanged."""

    def __init__(self):
        size = SMALL_PAGE.size
        super().__init__({"valid": 2, "pages": 2 * size, "order_valid": 2, "order": 2, "ready": 2})

    def elaborate(self, platform):
        m = Module()
        m.submodules.order = order = PageOrder(2, 2, payload=SMALL_PAGE, tag_bits=2)
        size = SMALL_PAGE.size
        inside = Signal(2)
        moved = [lane.valid & lane.ready for lane in order.i]
        for n, lane in enumerate(order.i):
            producer(m, lane, self.valid[n], self.pages[n * size : (n + 1) * size])
            beat, tag = lane.payload, Signal(2, name=f"tag_{n}")
            with m.If(lane.valid):
                m.d.comb += [Assume(beat.first == ~inside[n]), Assume(~inside[n] | (beat.tag == tag))]
            with m.If(moved[n]):
                m.d.sync += [inside[n].eq(~beat.last), tag.eq(beat.tag)]
        for n, (port, out) in enumerate(zip(order.order, order.o)):
            producer(m, port, self.order_valid[n], self.order[n])
            m.d.comb += out.ready.eq(self.ready[n])
            have, source, under_way = (
                Signal(name=f"have_{n}"),
                Signal(name=f"from_{n}"),
                Signal(name=f"way_{n}"),
            )
            mine = [moved[c] & (order.i[c].payload.tag[1] == n) for c in range(2)]
            head = data.View(
                SMALL_PAGE, Mux(mine[1], Value.cast(order.i[1].payload), Value.cast(order.i[0].payload))
            )
            took = mine[0] | mine[1]
            m.d.comb += [Assert(~(mine[0] & mine[1]))]
            with m.If(took):
                # Only the channel that the oldest open entry of the order names, and whole pages of it.
                m.d.comb += [Assert(have), Assert(source == mine[1]), Assert(head.first == ~under_way)]
                m.d.sync += [under_way.eq(~head.last), have.eq(have & ~head.last)]
            with m.If(port.valid & port.ready):
                m.d.comb += Assert(~have | (took & head.last))
                m.d.sync += [have.eq(1), source.eq(port.payload)]
            last = Signal(size, name=f"last_{n}")
            held = Signal(name=f"held_{n}")
            with m.If(took):
                m.d.comb += Assert(~held | out.ready)
                m.d.sync += [last.eq(Value.cast(head)), held.eq(1)]
            with m.Elif(out.ready):
                m.d.sync += held.eq(0)
            m.d.comb += Assert(out.valid == held)
            with m.If(held):
                m.d.comb += Assert(Value.cast(out.payload) == last)
        return m
