"""Page requests: which pages a pass over a head reads, in the order in which a kernel takes them.

A pass is one walk over a head: channel pages of the approximate step, or token pages (all of them, or the selected
ones). Every page of a pass, read or not, has an entry in its kernel's ledger, in order, so that whatever goes wrong
with one page the passes stay aligned.
"""

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.storage import (
    CONFIG,
    GROUP_TOKENS,
    MASK_BITS,
    PAGE_DESCRIPTOR,
    PAGE_REQUEST,
    PPN,
    TAG_BITS,
    TOKEN_BITS,
    PageKind,
    Status,
)
from hw.lib.streams import StreamFIFO, connect
from hw.storage.nfc.front import READ
from hw.storage.nfc.layouts import layout_of

SLOTS = 8
"""Jobs in the unit at once: enough to hide the array time of both rounds of SparF behind other jobs' pages."""
CHANNELS = 8
"""Flash channels of the default unit."""
ASKED_DEPTH = 64
"""Pages that wait for the firmware's answers."""
AHEAD = 4
"""Approximate passes that may be asked for before the selection of the first has been: their pages stand in front of
the selected ones in the channels, so there must be room for all their selections."""

LEDGER = data.StructLayout(
    {
        "slot": range(SLOTS),
        "kind": 2,
        "first": 1,  # of the pass
        "last": 1,
        "block_end": 1,  # channel pages: the last of its block of tokens
        "group": 6,  # channel pages: the channel group
        "status": 4,  # not 0: no page comes, for this reason
        "index": TOKEN_BITS,
    }
)
"""One page of a pass as the feeder of its kernel sees it."""

WANT = data.StructLayout({"ledger": LEDGER, "mask": MASK_BITS, "kernel": 1, "sequence": 12, "kv_head": 8})
"""A page that a pass wants."""

PAGE_STEP = data.StructLayout({"index": TOKEN_BITS, "mask": MASK_BITS, "last": 1})
"""A token page of a pass, K and V: its number and marks. A page without marks is skipped."""

TOKEN_WANT = data.StructLayout({"kind": 2, "index": TOKEN_BITS, "mask": MASK_BITS, "first": 1, "last": 1})


class TokenPass(wiring.Component):
    """Pages of tokens into requests: K one page ahead of V, so that V streams while its K is scored."""

    i: In(stream.Signature(PAGE_STEP))
    o: Out(stream.Signature(TOKEN_WANT))

    def elaborate(self, platform):
        m = Module()
        current, previous = Signal(PAGE_STEP), Signal(PAGE_STEP)
        pending, started = Signal(), Signal()  # `previous` still lacks its V; the pass has begun
        o = self.o.p
        m.d.comb += [o.index.eq(current.index), o.mask.eq(current.mask), o.kind.eq(PageKind.K_TOKEN)]
        with m.FSM():
            with m.State("take"):
                m.d.comb += self.i.ready.eq(1)
                with m.If(self.i.valid):
                    m.d.sync += current.eq(self.i.payload)
                    with m.If(self.i.p.mask.any()):
                        m.next = "key"
                    with m.Elif(self.i.p.last):
                        m.next = "value"
            with m.State("key"):
                m.d.comb += [self.o.valid.eq(1), o.first.eq(~started)]
                with m.If(self.o.ready):
                    m.d.sync += started.eq(1)
                    m.next = "value"
            with m.State("value"):
                final = current.last & ~current.mask.any()
                m.d.comb += [
                    self.o.valid.eq(pending),
                    o.kind.eq(PageKind.V_TOKEN),
                    o.index.eq(previous.index),
                    o.mask.eq(previous.mask),
                    o.last.eq(final),
                ]
                with m.If(self.o.ready | ~pending):
                    m.d.sync += [previous.eq(current), pending.eq(current.mask.any())]
                    m.next = "take"
                    with m.If(final):
                        m.d.sync += [pending.eq(0), started.eq(0)]
                    with m.Elif(current.last):
                        m.next = "last value"
            with m.State("last value"):
                m.d.comb += [self.o.valid.eq(1), o.kind.eq(PageKind.V_TOKEN), o.last.eq(1)]
                with m.If(self.o.ready):
                    m.d.sync += [pending.eq(0), started.eq(0)]
                    m.next = "take"
        return m


class AllPages(wiring.Component):
    """Every token page of a head: `start` with `tokens`, `wide` held; the last page's marks end at the last token."""

    start: In(1)
    wide: In(1)
    tokens: In(TOKEN_BITS + 1)
    o: Out(stream.Signature(PAGE_STEP))

    def elaborate(self, platform):
        m = Module()
        left = Signal(TOKEN_BITS + 1)
        span = Mux(self.wide, 16, 32)
        m.d.comb += [
            self.o.valid.eq(left != 0),
            self.o.p.last.eq(left <= span),
            self.o.p.mask.eq(
                Mux(left < span, (Const(1, 33) << left[:5]) - 1, Mux(self.wide, 0xFFFF, 0xFFFF_FFFF))
            ),
        ]
        with m.If(self.start):
            m.d.sync += [left.eq(self.tokens), self.o.p.index.eq(0)]
        with m.Elif(self.o.valid & self.o.ready):
            m.d.sync += [left.eq(Mux(self.o.p.last, 0, left - span)), self.o.p.index.eq(self.o.p.index + 1)]
        return m


ROW = data.StructLayout({"mask": GROUP_TOKENS, "last": 1})
"""Marks of 16 tokens; rows come in order from token 0."""


class SelectedPages(wiring.Component):
    """Rows of marks into pages: two rows make a page at head size 64."""

    wide: In(1)
    i: In(stream.Signature(ROW))
    o: Out(stream.Signature(PAGE_STEP))

    def elaborate(self, platform):
        m = Module()
        low, row = Signal(16), Signal(TOKEN_BITS)
        odd = row[0]
        whole = self.wide | odd | self.i.p.last
        m.d.comb += [
            self.o.valid.eq(self.i.valid & whole),
            self.i.ready.eq(self.o.ready | ~whole),
            self.o.p.index.eq(Mux(self.wide, row, row >> 1)),
            self.o.p.mask.eq(Mux(odd & ~self.wide, Cat(low, self.i.p.mask), self.i.p.mask)),
            self.o.p.last.eq(self.i.p.last),
        ]
        with m.If(self.i.valid & self.i.ready):
            m.d.sync += [low.eq(self.i.p.mask), row.eq(Mux(self.i.p.last, 0, row + 1))]
        return m


WIDEST = 8
"""Channels of the widest group."""
CHANNEL_WANT = data.StructLayout(
    {"index": TOKEN_BITS, "mask": WIDEST, "group": 6, "first": 1, "last": 1, "block_end": 1}
)


class ChannelPass(wiring.Component):
    """Channel pages that hold a marked channel, block of tokens after block: `start` with the rest held."""

    start: In(1)
    wide: In(1)
    m_log2: In(2)
    tokens: In(TOKEN_BITS + 1)
    marks: In(128)
    o: Out(stream.Signature(CHANNEL_WANT))

    def __init__(self):
        super().__init__()
        # State that proofs refer to: marks of the block from the present group on, tokens from the present block on;
        # and whether marks lie beyond the widest group, known a cycle ahead, so that only eight are looked at in time.
        self.active, self.rest, self.left = Signal(), Signal(128), Signal(TOKEN_BITS + 1)
        self.beyond = Signal()

    def elaborate(self, platform):
        m = Module()
        active, rest, left, beyond = self.active, self.rest, self.left, self.beyond
        group, base, begun = Signal(6), Signal(TOKEN_BITS), Signal()
        here, after = Signal(WIDEST), Signal(128)
        span = Signal(11)
        near, still_beyond = Signal(), Signal()
        with m.Switch(self.m_log2):
            for log2 in (1, 2, 3):
                with m.Case(log2) if log2 < 3 else m.Default():
                    m.d.comb += [
                        here.eq(rest[: 1 << log2]),
                        near.eq(rest[1 << log2 : WIDEST].any()),
                        after.eq(rest >> (1 << log2)),
                        still_beyond.eq(rest[WIDEST + (1 << log2) :].any()),
                        span.eq(2048 >> log2),
                    ]
        marked_beyond = self.marks[WIDEST:].any()
        last_group = ~(near | beyond)
        last_block = left <= span
        groups = (Mux(self.wide, 128, 64) >> self.m_log2)[:7]
        m.d.comb += [
            self.o.valid.eq(active & here.any()),
            self.o.p.index.eq(base + group),
            self.o.p.mask.eq(here),
            self.o.p.group.eq(group),
            self.o.p.first.eq(~begun),
            self.o.p.block_end.eq(last_group),
            self.o.p.last.eq(last_group & last_block),
        ]
        with m.If(self.start):
            m.d.sync += [rest.eq(self.marks), left.eq(self.tokens), group.eq(0), base.eq(0)]
            m.d.sync += [active.eq(1), begun.eq(0), beyond.eq(marked_beyond)]
        with m.Elif(active & (self.o.ready | ~here.any())):
            m.d.sync += [rest.eq(after), group.eq(group + 1), beyond.eq(still_beyond)]
            with m.If(self.o.valid):
                m.d.sync += begun.eq(1)
            with m.If(last_group):
                m.d.sync += [rest.eq(self.marks), group.eq(0), base.eq(base + groups), left.eq(left - span)]
                m.d.sync += beyond.eq(marked_beyond)
                with m.If(last_block):
                    m.d.sync += active.eq(0)
        return m


class Requester(wiring.Component):
    """Wanted pages into reads: asks the firmware's maps, checks the answer, and enters every page into the ledger.

    Ports: `want` in order; `request` to the firmware, `descriptor` its answers in the same order; `read` to the flash
    side; `ledger` per kernel; `config` bounds. Up to `asked_depth` pages wait for their answers. A page whose want
    already has a status asks nobody. Group-buffer pages are read from the port behind the last flash channel.
    """

    def __init__(self, channels: int, ledger_depth: int = 512, *, asked_depth: int = ASKED_DEPTH):
        self._channels, self._depth, self._asked_depth = channels, ledger_depth, asked_depth
        super().__init__(
            {
                "config": In(layout_of(CONFIG)),
                "want": In(stream.Signature(WANT)),
                "request": Out(stream.Signature(layout_of(PAGE_REQUEST))),
                "descriptor": In(stream.Signature(layout_of(PAGE_DESCRIPTOR))),
                "read": Out(stream.Signature(READ)),
                "ledger": Out(stream.Signature(LEDGER)).array(2),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.pending = pending = StreamFIFO(WANT, self._asked_depth)
        want = self.want.p
        silent = want.ledger.status != 0
        m.d.comb += [
            self.request.p.kind.eq(want.ledger.kind),
            self.request.p.kv_head.eq(want.kv_head),
            self.request.p.sequence.eq(want.sequence),
            self.request.p.index.eq(want.ledger.index),
            self.request.p.mask.eq(want.mask),
            self.request.p.tag.eq(Cat(Const(0, TAG_BITS - 1), want.kernel)),
            self.request.valid.eq(self.want.valid & ~silent & pending.i.ready),
            pending.i.valid.eq(self.want.valid & (silent | self.request.ready)),
            pending.i.payload.eq(self.want.payload),
            self.want.ready.eq(pending.i.ready & (silent | self.request.ready)),
        ]

        asked = pending.o.p
        answer = self.descriptor.p
        page = data.View(layout_of(PPN), answer.ppn)
        status = Signal(4)
        # kept, so that synthesis builds the comparisons side by side and not one behind the other
        beyond = Signal(4, attrs={"keep": 1})
        m.d.comb += beyond.eq(
            Cat(
                page.channel >= self.config.channels,
                page.die >= self.config.dies,
                page.block >= self.config.blocks,
                page.page >= self.config.pages,
            )
        )
        outside = beyond.any() & ~answer.dram
        quiet = asked.ledger.status != 0
        with m.If(quiet):
            m.d.comb += status.eq(asked.ledger.status)
        with m.Elif(~answer.mapped):
            m.d.comb += status.eq(Status.UNMAPPED_PAGE)
        with m.Elif(outside):
            m.d.comb += status.eq(Status.OUTSIDE_DEVICE)
        good = Signal()
        m.d.comb += good.eq(~quiet & answer.mapped & ~outside)
        known = pending.o.valid & (quiet | self.descriptor.valid)
        # The comparison with the bounds is there last: each ledger joins it with the rest itself, not by way of `go`.
        able, taken, go = Signal(2), Signal(), Signal()
        for kernel in range(2):
            m.submodules[f"ledger_{kernel}"] = queue = StreamFIFO(LEDGER, self._depth, kind="block")
            connect(m, wiring.flipped(self.ledger[kernel]), queue.o)
            m.d.comb += queue.i.payload.eq(Cat(asked.ledger))
            m.d.comb += queue.i.p.status.eq(status)
            m.d.comb += able[kernel].eq(known & (asked.kernel == kernel) & queue.i.ready)
            m.d.comb += queue.i.valid.eq(able[kernel] & taken)
        m.d.comb += [
            taken.eq(self.read.ready | ~good),
            self.read.valid.eq(able.any() & good),
            go.eq(able.any() & taken),
            pending.o.ready.eq(go),
            self.descriptor.ready.eq(go & ~quiet),
            self.read.p.ppn.eq(answer.ppn),
            self.read.p.kind.eq(asked.ledger.kind),
            self.read.p.wide_head.eq(self.config.wide_head),
            self.read.p.m_log2.eq(self.config.m_log2),
            self.read.p.mask.eq(asked.mask),
            self.read.p.tag.eq(Cat(Const(0, TAG_BITS - 1), asked.kernel)),
        ]
        with m.If(answer.dram):
            m.d.comb += self.read.p.ppn.channel.eq(self._channels)
        return m
