"""Properties of the flash side: no marked entry lost, no other passed, order kept."""

from amaranth import Array, Cat, Const, Module, Mux, Signal, Value
from amaranth.hdl import Assert, Assume
from amaranth.lib import data

from golden.spec.storage import PageKind
from hw.storage.nfc.gate import GATED, PLACED, EntryGate
from hw.storage.nfc.layouts import CHANNEL
from hw.storage.nfc.order import PageOrder
from hw.storage.nfc.ring import PageRing
from tests.hw.formal.harness import Proof, producer, without_reset


class GateProof(Proof):
    """Each beat of each page is judged by the marks of the page's own descriptor, as the page formats place entries.

    The reference works on element numbers, as `golden.spec.storage` states them; framing is free, so that pages cut
    short or too long are covered: nothing of them passes once they went wrong, and they fail.
    """

    def __init__(self):
        super().__init__({"valid": 1, "beat": CHANNEL.size, "page": PLACED.size})

    def elaborate(self, platform):
        m = Module()
        m.submodules.gate = gate = EntryGate()
        m.d.comb += [
            gate.i.valid.eq(self.valid),
            Value.cast(gate.i.payload).eq(self.beat),
            Value.cast(gate.page).eq(self.page),
        ]
        given, inside, own = gate.page, Signal(), Signal(PLACED)
        m.d.comb += [
            Assume((given.kind != PageKind.K_CHANNEL) | (given.m_log2 != 0)),
            Assume(~inside | (Value.cast(given) == Value.cast(own))),
        ]
        with m.If(self.valid):
            m.d.sync += [inside.eq(~gate.i.payload.last), own.eq(given)]
        accept, beat, desc = Signal(), Signal(CHANNEL), Signal(PLACED)
        m.d.sync += [accept.eq(self.valid), beat.eq(gate.i.payload), desc.eq(given)]
        position, wrong = Signal(9), Signal()
        misplaced = (beat.first != (position == 0)) | (beat.last != (position == 511))
        with m.If(accept):
            m.d.sync += [
                position.eq(Mux(beat.last, 0, position + 1)),
                wrong.eq(~beat.last & (wrong | misplaced)),
            ]
        # Ties between the reference and the design, for the induction.
        m.d.comb += [
            Assert(gate.valid == accept),
            Assert(Value.cast(gate.beat) == Value.cast(beat)),
            Assert(Value.cast(gate.current) == Value.cast(desc)),
            Assert(gate.count == position),
            Assert(gate.broken == wrong),
        ]

        marks = desc.mask
        keep, elements = self._reference(m, desc, marks, position)
        expected, valid = [Signal(GATED, name=f"expected_{n}") for n in (0, 1)], Signal(2)
        m.d.sync += [
            valid.eq(Cat(accept, valid)),
            expected[1].eq(expected[0]),
            expected[0].data.eq(beat.data & Cat(bit.replicate(16) for bit in elements)),
            expected[0].keep.eq(keep & ~wrong & ~misplaced),
            expected[0].lane.eq(position[:2]),
            expected[0].begin.eq(position == 0),
            expected[0].end.eq(beat.last),
            expected[0].fail.eq(wrong | misplaced | beat.fail),
            expected[0].slot.eq(beat.slot),
            expected[0].kernel.eq(beat.kernel),
            expected[0].start.eq(desc.start),
        ]
        m.d.comb += Assert(gate.o.valid == valid[1])
        with m.If(valid[1]):
            for name, _ in GATED:
                m.d.comb += Assert(gate.o.payload[name] == expected[1][name])
        return m

    @staticmethod
    def _reference(m, desc, marks, position):
        """(beat is kept, the four elements that survive)."""
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
        return Mux(is_v, group, keeps[0]), [keep | ~is_v for keep in keeps]


class RingProof(Proof):
    """Pages come out in the order of their descriptors, each once and as it came, whatever order the granted ones come
    in; a failed page is one row of zeros; no page is ever overwritten. A freely chosen page and row are followed.

    A row is written by its last lane alone: the other lanes are the same memory under other enables.
    """

    SLOTS, DEPTH, ROWS = 4, 4, 2
    DESC = data.StructLayout({"last_row": 1, "tag": 1})
    BEAT = data.StructLayout({**dict(GATED.members), "data": 8, "lane": 1, "slot": 2, "start": 2})

    def __init__(self):
        super().__init__(
            {"wanted": 1, "size": 1, "tag": 1, "come": 1, "slot": 2, "bit": 1, "fail": 1, "ready": 1}
            | {"page": 3, "row": 1}
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.ring = ring = PageRing(
            self.DEPTH, slots=self.SLOTS, page_rows=self.ROWS, desc=self.DESC, beat=self.BEAT
        )
        without_reset(m)
        first, chosen = Signal(init=1), Signal(4)
        m.d.sync += [first.eq(0), chosen.eq(Cat(self.page, self.row))]
        with m.If(~first):
            m.d.comb += Assume(Cat(self.page, self.row) == chosen)
        self._describe(m, ring)
        value, failed = self._send(m, ring)
        self._check(m, ring, value, failed)
        return m

    def _describe(self, m, ring):
        """Descriptors, and which page each granted slot is for."""
        desc, granted = Signal(self.DESC), Signal(4)
        m.d.comb += [desc.last_row.eq(self.size), desc.tag.eq(self.tag)]
        producer(m, ring.desc, self.wanted, Value.cast(desc))
        self._granted, self._number = granted, [Signal(4, name=f"number_{n}") for n in range(self.SLOTS)]
        self._open = [Signal(name=f"open_{n}") for n in range(self.SLOTS)]
        self._last, self._tag = Signal(), Signal()
        with m.If(ring.grant.valid):
            m.d.comb += Assert(ring.desc.valid & ring.desc.ready)
            m.d.sync += granted.eq(granted + 1)
            with m.If(granted == self.page):
                m.d.sync += [self._last.eq(desc.last_row), self._tag.eq(desc.tag)]
            with m.Switch(ring.grant.payload):
                for n in range(self.SLOTS):
                    with m.Case(n):
                        m.d.comb += Assert(~self._open[n])
                        m.d.sync += [self._open[n].eq(1), self._number[n].eq(granted)]

    def _send(self, m, ring):
        """Granted pages come whole, in any order; what the followed row holds, and whether its page fails."""
        inside, slot, rows = Signal(), Signal(2), Signal(2)
        value, failed = Signal(), Signal()
        now = Mux(inside, slot, self.slot)
        write, last = ring.write.payload, ring.placed.last_row
        end = (rows == last) | self.fail
        open_, number = Array(self._open)[now], Array(self._number)[now]
        m.d.comb += [
            Assume(~self.come | open_),
            ring.slot.eq(now),
            ring.write.valid.eq(self.come),
            write.data.eq(self.bit),
            write.lane.eq(1),
            write.keep.eq(1),
            write.begin.eq(~inside),
            write.end.eq(end),
            write.fail.eq(self.fail),
            write.slot.eq(now),
            write.start.eq(ring.placed.start),
        ]
        with m.If(self.come):
            m.d.sync += [inside.eq(~end), slot.eq(now), rows.eq(Mux(end, 0, rows + 1))]
            with m.If(number == self.page):
                with m.If(rows == self.row):
                    m.d.sync += value.eq(self.bit)
                with m.If(end):
                    m.d.sync += failed.eq(self.fail)
            with m.If(end):
                for n in range(self.SLOTS):
                    with m.If(now == n):
                        m.d.sync += self._open[n].eq(0)
        return value, failed

    def _check(self, m, ring, value, failed):
        pages, rows, out = Signal(4), Signal(2), ring.o.payload
        m.d.comb += [ring.o.ready.eq(self.ready), Assert(ring.used <= self.DEPTH)]
        with m.If(ring.o.valid):
            m.d.comb += [Assert(pages < self._granted), Assert(out.first == (rows == 0))]
            with m.If(out.fail):
                m.d.comb += [Assert(out.row == 0), Assert(out.first & out.last)]
            with m.If(pages == self.page):
                m.d.comb += [Assert(out.fail == failed), Assert(out.desc.tag == self._tag)]
                m.d.comb += Assert(failed | (out.last == (rows == self._last)))
                with m.If((rows == self.row) & ~failed):
                    m.d.comb += Assert(out.row[8] == value)
            with m.If(self.ready):
                m.d.sync += [rows.eq(Mux(out.last, 0, rows + 1)), pages.eq(pages + out.last)]


SMALL_PAGE = data.StructLayout({"data": 2, "first": 1, "last": 1, "tag": 2})


class OrderProof(Proof):
    """A kernel gets pages whole, from the channels its order names, one after the other; each beat once, unchanged."""

    def __init__(self):
        super().__init__({"valid": 2, "pages": 2 * SMALL_PAGE.size, "order_valid": 1, "order": 1, "ready": 1})

    def elaborate(self, platform):
        m = Module()
        m.submodules.order = order = PageOrder(2, payload=SMALL_PAGE)
        size = SMALL_PAGE.size
        inside = Signal(2)
        moved = [lane.valid & lane.ready for lane in order.i]
        for n, lane in enumerate(order.i):
            producer(m, lane, self.valid[n], self.pages[n * size : (n + 1) * size])
            with m.If(lane.valid):
                m.d.comb += Assume(lane.payload.first == ~inside[n])
            with m.If(moved[n]):
                m.d.sync += inside[n].eq(~lane.payload.last)
        producer(m, order.order, self.order_valid, self.order)
        m.d.comb += order.o.ready.eq(self.ready)
        have, source, under_way, held = Signal(), Signal(), Signal(), Signal()
        head = data.View(
            SMALL_PAGE, Mux(moved[1], Value.cast(order.i[1].payload), Value.cast(order.i[0].payload))
        )
        took = moved[0] | moved[1]
        m.d.comb += Assert(~(moved[0] & moved[1]))
        with m.If(took):
            # Only the channel that the oldest open entry of the order names, and whole pages of it.
            m.d.comb += [Assert(have), Assert(source == moved[1]), Assert(head.first == ~under_way)]
            m.d.sync += [under_way.eq(~head.last), have.eq(have & ~head.last)]
        with m.If(order.order.valid & order.order.ready):
            m.d.comb += Assert(~have | (took & head.last))
            m.d.sync += [have.eq(1), source.eq(order.order.payload)]
        last = Signal(size)
        with m.If(took):
            m.d.comb += Assert(~held | self.ready)
            m.d.sync += [last.eq(Value.cast(head)), held.eq(1)]
        with m.Elif(self.ready):
            m.d.sync += held.eq(0)
        m.d.comb += Assert(order.o.valid == held)
        with m.If(held):
            m.d.comb += Assert(Value.cast(order.o.payload) == last)
        return m
