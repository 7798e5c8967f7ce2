"""Properties of the page passes, for bounded model checking."""

from amaranth import Cat, Module, Mux, Signal, Value
from amaranth.hdl import Assert, Assume
from amaranth.lib import data

from golden.spec.storage import CONFIG, PPN, TOKEN_BITS, PageKind, Status
from hw.storage.feeder import Feeder
from hw.storage.kernel import Op
from hw.storage.nfc.layouts import layout_of
from hw.storage.passes import LEDGER, PAGE_STEP, WANT, WIDEST, ChannelPass, Requester, TokenPass
from tests.hw.formal.harness import Proof, past, producer, stable, without_reset


class TokenPassProof(Proof):
    """Every page with a mark gives its K and then its V once, with its own number and marks; K of the next page comes
    before V; `first` is with the pass's first K alone and `last` with its last V alone."""

    def __init__(self):
        super().__init__({"valid": 1, "step": PAGE_STEP.size, "ready": 1})

    def elaborate(self, platform):
        m = Module()
        m.submodules.dut = dut = TokenPass()
        producer(m, dut.i, self.valid, self.step)
        m.d.comb += dut.o.ready.eq(self.ready)
        stable(m, dut.o.valid, dut.o.ready, dut.o.payload)
        step, out = dut.i.p, dut.o.p
        key_due, begun, ended = Signal(), Signal(), Signal()  # of the page taken last
        taken = Signal(PAGE_STEP)
        older, newer = Signal(PAGE_STEP), Signal(PAGE_STEP)  # pages whose V is due
        older_due, newer_due = Signal(), Signal()
        left = dut.o.valid & dut.o.ready
        with m.If(dut.i.valid & dut.i.ready):
            m.d.comb += [Assert(~key_due), Assert(~ended | ~older_due)]
            # a pass without any marked page has nothing to say, and none is ever asked for: k is at least 1
            m.d.comb += Assume(step.mask.any() | ~step.last | older_due)
            m.d.sync += [taken.eq(dut.i.payload), key_due.eq(step.mask.any()), ended.eq(step.last)]
        with m.If(left & (out.kind == PageKind.K_TOKEN)):
            m.d.comb += [
                Assert(key_due),
                Assert(Value.cast(out.index) == taken.index),
                Assert(out.mask == taken.mask),
                Assert(out.first == ~begun),
                Assert(~out.last),
                Assert(~newer_due),
            ]
            m.d.sync += [key_due.eq(0), begun.eq(1)]
            with m.If(older_due):
                m.d.sync += [newer.eq(taken), newer_due.eq(1)]
            with m.Else():
                m.d.sync += [older.eq(taken), older_due.eq(1)]
        with m.If(left & (out.kind != PageKind.K_TOKEN)):
            final = ended & ~key_due & ~newer_due
            m.d.comb += [
                Assert(out.kind == PageKind.V_TOKEN),
                Assert(older_due),
                Assert(out.index == older.index),
                Assert(out.mask == older.mask),
                Assert(newer_due | ended),
                Assert(out.last == final),
                Assert(~out.first),
            ]
            m.d.sync += [older.eq(newer), older_due.eq(newer_due), newer_due.eq(0)]
            with m.If(final):
                m.d.sync += [begun.eq(0), ended.eq(0)]
        return m


class ChannelPassProof(Proof):
    """Every channel group with a mark gives its page once per block of tokens, in order, with its own marks and number;
    `block_end` is with the block's last such page, `first` and `last` with those of the pass.

    The reference asks the whole vector of marks at every group. Marks, head size, m and tokens are free and held.
    """

    def __init__(self):
        held = {"wide": 1, "m_log2": 2, "tokens": TOKEN_BITS + 1, "marks": 128}
        super().__init__({**held, "start": 1, "ready": 1})

    def elaborate(self, platform):
        m = Module()
        m.submodules.dut = dut = ChannelPass()
        held = [self.wide, self.m_log2, self.tokens, self.marks]
        live, before = past(m, *held)
        m.d.comb += [Assume(self.m_log2 != 0), Assume(self.marks.any()), Assume(self.tokens != 0)]
        m.d.comb += Assume(self.wide | ~self.marks[64:].any())
        with m.If(live):
            m.d.comb += [Assume(value == was) for value, was in zip(held, before)]
        m.d.comb += [
            *(getattr(dut, name).eq(getattr(self, name)) for name in ("wide", "m_log2", "tokens", "marks")),
            dut.start.eq(self.start),
            dut.o.ready.eq(self.ready),
        ]
        active, begun, group, base = Signal(), Signal(), Signal(6), Signal.like(Value.cast(dut.o.p.index))
        left, marks, out = Signal.like(self.tokens), Signal(128), dut.o.p
        size, span = Signal(4), Signal(11)
        m.d.comb += [
            marks.eq(self.marks >> (group << self.m_log2)),
            size.eq(1 << self.m_log2),
            span.eq(2048 >> self.m_log2),
        ]
        wanted = marks & ((1 << size) - 1)[:WIDEST]
        block_end = (marks >> size) == 0
        final = block_end & (left <= span)
        # Ties between the reference and the design, for the induction.
        m.d.comb += [Assert(dut.active == active), Assert(~active | (out.group == group))]
        with m.If(active):
            m.d.comb += [
                Assert(marks.any()),
                Assert(dut.rest == marks),
                Assert(dut.left == left),
                Assert(dut.beyond == marks[WIDEST:].any()),
                Assert(dut.o.valid == wanted.any()),
                Assert(Value.cast(out.index) == (base + group)[: len(base)]),
                Assert(out.mask == wanted),
                Assert(out.first == ~begun),
                Assert(out.block_end == block_end),
                Assert(out.last == final),
            ]
        with m.Else():
            m.d.comb += Assert(~dut.o.valid)
        with m.If(self.start):
            m.d.sync += [active.eq(1), begun.eq(0), group.eq(0), base.eq(0), left.eq(self.tokens)]
        with m.Elif(active & (self.ready | ~wanted.any())):
            m.d.sync += [begun.eq(begun | wanted.any()), group.eq(group + 1)]
            with m.If(block_end):
                m.d.sync += [group.eq(0), base.eq(base + (Mux(self.wide, 128, 64) >> self.m_log2)[:7])]
                m.d.sync += [left.eq(left - span), active.eq(~final)]
        return m


class FeederPageProof(Proof):
    """Each beat of a page says what it is: its operation, whether it begins or ends a block, whose marks, and which
    channel it belongs to. The reference counts beats and compares with the lengths of rows, tokens and groups; pages
    of any length, kind and marks follow each other."""

    def __init__(self):
        held = {"wide": 1, "m_log2": 2}
        page = {"page_valid": 1, "kind": 2, "mask": 32, "last": 1, "fail": 1}
        super().__init__({**held, **page, "valid": 1, "entry": LEDGER.size, "ready": 1})

    def elaborate(self, platform):
        m = Module()
        m.submodules.dut = dut = Feeder()
        page, out = dut.page.p, dut.o.p
        live, (wide, m_log2) = past(m, self.wide, self.m_log2)
        m.d.comb += [
            Assume(self.m_log2 != 0),
            Assume(self.kind != 3),
            Assume(~live | ((self.wide == wide) & (self.m_log2 == m_log2))),
            dut.wide.eq(self.wide),
            dut.m_log2.eq(self.m_log2),
            dut.o.ready.eq(self.ready),
        ]
        producer(m, dut.ledger, self.valid, self.entry)
        offered = Signal.like(page.as_value())
        m.d.comb += [
            data.View(page.shape(), offered)[name].eq(getattr(self, name))
            for name in ("kind", "mask", "last", "fail")
        ]
        producer(m, dut.page, self.page_valid, offered)
        inside, kind, mask = Signal(), Signal(2), Signal(32)  # the page has given a beat; what it is
        with m.If(inside):
            m.d.comb += Assume((page.kind == kind) & (page.mask == mask) & ~page.fail)
        moved = dut.page.valid & dut.page.ready
        with m.If(moved):
            m.d.sync += inside.eq(~page.last & ~page.fail)

        count, half, marks, length = Signal(7), Signal(), Signal(16), Signal(8)
        is_key, is_value = kind == PageKind.K_TOKEN, kind == PageKind.V_TOKEN
        with m.If(is_key):
            m.d.comb += length.eq(Mux(self.wide, 8, 4))
        with m.Elif(is_value):
            m.d.comb += length.eq(Mux(self.wide, 128, 64))
        with m.Else():
            m.d.comb += length.eq(128 >> self.m_log2)
        own = Mux(half, mask[16:], mask[:16])
        others = marks & (marks - 1)[:16]
        row_end, alone = count == length - 1, others == 0
        first = (count == 0) & (~is_key | (marks == own))
        passing = (out.op == Op.K) | (out.op == Op.V) | (out.op == Op.CHANNEL)
        # Ties between the reference and the design, for the induction.
        m.d.comb += [Assert(dut.passing == passing), Assert(~inside | passing)]
        with m.If(passing):
            m.d.comb += [
                Assert(inside | dut.page.valid),
                Assert(~dut.page.valid | ((page.kind == kind) & (page.mask == mask) & ~page.fail)),
                Assert(dut.count == count),
                Assert(dut.half == half),
                Assert(dut.marks == marks),
                Assert(dut.row_end == row_end),
                Assert(dut.first == first),
                Assert(count < length),
                Assert((marks & ~own) == 0),
            ]
        with m.If(dut.o.valid & passing):
            m.d.comb += [
                Assert(dut.page.valid),
                Assert((out.op == Op.K) == is_key),
                Assert((out.op == Op.V) == is_value),
                Assert(out.mask == own),
                Assert(out.first == first),
                Assert(out.last == (row_end & (~is_key | alone))),
            ]
            for n in range(8):
                with m.If(~is_key & ~is_value & ((marks ^ others) == 1 << n)):
                    m.d.comb += Assert(out.index == ((dut.ledger.p.group << self.m_log2) + n)[:7])
        with m.If(~passing & dut.page.valid):  # the cycle before the page's first beat is the last of these
            low = page.mask[:16].any()
            m.d.sync += [kind.eq(page.kind), mask.eq(page.mask), count.eq(0), half.eq(~low)]
            m.d.sync += marks.eq(Mux(low, page.mask[:16], page.mask[16:]))
        with m.Elif(moved):
            m.d.sync += count.eq(count + 1)
            with m.If(row_end):
                m.d.sync += [count.eq(0), marks.eq(others)]
                with m.If(is_value | alone):
                    m.d.sync += [half.eq(1), marks.eq(mask[16:])]
        return m


class RequesterProof(Proof):
    """One wanted page, picked freely: the firmware is asked for it unless it has a fault already; it is read once,
    where the answer says and with its own marks, if and only if nothing is wrong with it; its entry leaves its own
    kernel's ledger in its turn, with its own fields and the reason why it is not read."""

    CHANNELS, IN_FLIGHT = 2, 5

    def __init__(self):
        free = {
            "valid": 1,
            "want": WANT.size,
            "answer_valid": 1,
            "answer": 34,
            "limits": layout_of(CONFIG).size,
        }
        super().__init__({**free, "request_ready": 1, "read_ready": 1, "ledger_ready": 2, "pick": 1})

    def elaborate(self, platform):
        m = Module()
        without_reset(m)
        m.submodules.dut = dut = Requester(self.CHANNELS, ledger_depth=4, asked_depth=2)
        producer(m, dut.want, self.valid, self.want)
        producer(m, dut.descriptor, self.answer_valid, self.answer)
        limits, live = Signal.like(self.limits), Signal()
        m.d.sync += [limits.eq(self.limits), live.eq(1)]
        with m.If(live):
            m.d.comb += Assume(self.limits == limits)
        m.d.comb += [
            Value.cast(dut.config).eq(self.limits),
            dut.request.ready.eq(self.request_ready),
            dut.read.ready.eq(self.read_ready),
            *(dut.ledger[n].ready.eq(self.ledger_ready[n]) for n in range(2)),
        ]
        for port in (dut.request, dut.read, *dut.ledger):
            stable(m, port.valid, port.ready, port.payload)

        taken = dut.want.valid & dut.want.ready
        silent = dut.want.p.ledger.status != 0
        asked, answered = dut.request.valid & dut.request.ready, dut.descriptor.valid & dut.descriptor.ready
        read = dut.read.valid & dut.read.ready
        m.d.comb += Assert(asked == (taken & ~silent))
        watching, due, page = (
            Signal(),
            Signal(),
            Signal(WANT),
        )  # `due`: the watched page still waits for its answer
        status, known = Signal(4), Signal()
        requests, ahead = (
            Signal(range(16)),
            Signal(range(16)),
        )  # requests without an answer; those before the watched
        m.d.comb += Assume(~answered | (requests != 0) | asked)  # the firmware answers what it was asked
        m.d.sync += requests.eq(requests + asked - answered)
        entries = [Signal(range(16), name=f"entries_{n}") for n in range(2)]  # of a kernel, under way
        position = Signal(range(16))
        left = [port.valid & port.ready for port in dut.ledger]
        for n in range(2):
            m.d.sync += entries[n].eq(entries[n] + (taken & (dut.want.p.kernel == n)) - left[n])
        m.d.comb += [Assume(entries[n] <= self.IN_FLIGHT) for n in range(2)]
        mine = Mux(page.kernel, left[1], left[0])
        with m.If(taken & self.pick & ~watching):
            kernel = dut.want.p.kernel
            m.d.sync += [
                watching.eq(1),
                page.eq(dut.want.payload),
                due.eq(~silent),
                known.eq(silent),
                status.eq(dut.want.p.ledger.status),
                ahead.eq(requests - answered),
                position.eq(Mux(kernel, entries[1] - left[1], entries[0] - left[0])),
            ]
        with m.Elif(watching):
            with m.If(mine):
                m.d.sync += position.eq(position - 1)
                with m.If(position == 0):
                    m.d.comb += [Assert(known), Assert(~due)]
                    m.d.sync += watching.eq(0)
            with m.If(answered & due):
                m.d.sync += ahead.eq(ahead - 1)
                with m.If(ahead == 0):
                    answer = dut.descriptor.p
                    place = data.View(layout_of(PPN), answer.ppn)
                    config = dut.config
                    inside = (place.channel < config.channels) & (place.die < config.dies)
                    inside &= (place.block < config.blocks) & (place.page < config.pages)
                    good = answer.mapped & (answer.dram | inside)
                    m.d.sync += [due.eq(0), known.eq(1)]
                    m.d.sync += status.eq(
                        Mux(good, 0, Mux(answer.mapped, Status.OUTSIDE_DEVICE, Status.UNMAPPED_PAGE))
                    )
                    m.d.comb += Assert(read == good)
                    with m.If(read):
                        channel = Mux(answer.dram, self.CHANNELS, place.channel)
                        m.d.comb += [
                            Assert(dut.read.p.ppn.channel == channel),
                            Assert(Value.cast(dut.read.p.ppn)[:28] == answer.ppn[:28]),
                            Assert(dut.read.p.mask == page.mask),
                            Assert(dut.read.p.kind == page.ledger.kind),
                            Assert(dut.read.p.tag[-1] == page.kernel),
                        ]
        for n in range(2):
            with m.If(watching & (page.kernel == n) & (position == 0) & dut.ledger[n].valid):
                entry, wanted = dut.ledger[n].p, page.ledger
                same = [entry[name] == wanted[name] for name, _ in LEDGER if name != "status"]
                m.d.comb += [Assert(Cat(same).all()), Assert(known & (entry.status == status))]
        m.d.comb += Assert(~read | answered)
        return m
