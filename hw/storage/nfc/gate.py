"""Entry-level decision of the page filter: which beats of a page are wanted, and which of their elements."""

from amaranth import Cat, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.storage import (
    CHANNEL_BEAT_BYTES,
    ELEMENT_BYTES,
    GROUP_TOKENS,
    PAGE_CHANNEL_BEATS,
    SLOT_BITS,
    PageKind,
)
from hw.storage.nfc.layouts import CHANNEL, DESCRIPTOR, flow

BEAT_BITS = 8 * CHANNEL_BEAT_BYTES
ELEMENT_BITS = 8 * ELEMENT_BYTES
BEAT_TOKENS = CHANNEL_BEAT_BYTES // ELEMENT_BYTES
COUNT_BITS = (PAGE_CHANNEL_BEATS - 1).bit_length()
LANES = GROUP_TOKENS // BEAT_TOKENS
"""Channel beats of one beat towards the kernels."""
START_BITS = 12
"""Of a row's number in a ring, whatever its depth."""

GATED = data.StructLayout(
    {
        "data": BEAT_BITS,
        "lane": range(LANES),
        "keep": 1,
        "begin": 1,
        "end": 1,
        "fail": 1,
        "slot": SLOT_BITS,
        "kernel": 1,
        "start": START_BITS,
    }
)
"""A judged beat. `keep`: belongs to a marked entry; `begin`, `end`: first and last of the page, with the latter whether
it fails; `start`: as its descriptor says; elements of unmarked tokens of a V page are zero already."""

PLACED = data.StructLayout({**dict(DESCRIPTOR.members), "start": START_BITS})
"""A page's descriptor and the row of its kernel's ring where its rows begin."""


def entry_of(kind: Value, wide: Value, m_log2: Value, beat: Value) -> Value:
    """Entry that beat number `beat` belongs to: token of a K page, channel of a channel page (docs/flash-side.md)."""
    token = Mux(wide, beat[COUNT_BITS - 4 :], beat[COUNT_BITS - 5 :])
    channel = Mux(
        m_log2 == 3, beat[COUNT_BITS - 3 :], Mux(m_log2 == 2, beat[COUNT_BITS - 2 :], beat[COUNT_BITS - 1 :])
    )
    return Mux(kind == PageKind.K_CHANNEL, channel, token)


class EntryGate(wiring.Component):
    """Judge a beat per cycle by the descriptor of its page; judged beats leave `latency` cycles later.

    Ports: `i` raw pages, each whole before the next; `page`, the descriptor of the page whose beat stands at `i`,
    in the same cycle; `o` judged beats. Nothing is ever refused: a page moves only when there is room for it.

    A page whose `first` or `last` marks are not where a page of 4 KB has them fails, as one that ECC gave up.
    Marks of entries that the page does not have are ignored.
    """

    latency = 3

    def __init__(self):
        super().__init__(
            {
                "i": In(flow(CHANNEL)),
                "page": In(PLACED),
                "o": Out(flow(GATED)),
            }
        )

        # State that proofs refer to.
        self.valid, self.beat, self.current = Signal(), Signal(CHANNEL), Signal(PLACED)
        self.count, self.broken = Signal(COUNT_BITS), Signal()

    def elaborate(self, platform):
        m = Module()
        # --- stage 1: the page that the beat belongs to
        accept, beat, current = self.valid, self.beat, self.current
        m.d.sync += [accept.eq(self.i.valid), beat.eq(self.i.payload), current.eq(self.page)]

        # --- stage 2: where in the page the beat lies
        count, broken = self.count, self.broken
        misplaced = (beat.first != (count == 0)) | (beat.last != (count == PAGE_CHANNEL_BEATS - 1))
        valid, entry, half = Signal(), Signal(5), Signal()
        judged, desc = Signal(GATED), Signal(PLACED)
        m.d.sync += valid.eq(accept)
        with m.If(accept):
            m.d.sync += [
                count.eq(Mux(beat.last, 0, count + 1)),
                broken.eq(~beat.last & (broken | misplaced)),
                entry.eq(entry_of(current.kind, current.wide_head, current.m_log2, count)),
                half.eq(~current.wide_head & count[-1]),
                desc.eq(current),
                judged.data.eq(beat.data),
                judged.lane.eq(count[: len(judged.lane)]),
                judged.begin.eq(count == 0),
                judged.end.eq(beat.last),
                judged.fail.eq(broken | misplaced | beat.fail),
                judged.keep.eq(~broken & ~misplaced),
                judged.slot.eq(beat.slot),
                judged.kernel.eq(beat.kernel),
                judged.start.eq(current.start),
            ]

        # --- stage 3: what its marks say
        by_dimension = desc.kind == PageKind.V_TOKEN
        group = Mux(half, desc.mask[GROUP_TOKENS:], desc.mask[:GROUP_TOKENS])
        marks = group.word_select(judged.lane, BEAT_TOKENS)
        keep = Mux(by_dimension, group.any(), desc.mask.bit_select(entry, 1))
        elements = Cat((marks[n] | ~by_dimension).replicate(ELEMENT_BITS) for n in range(BEAT_TOKENS))
        out = self.o.payload
        m.d.sync += [
            self.o.valid.eq(valid),
            out.eq(judged),
            out.data.eq(judged.data & elements),
            out.keep.eq(judged.keep & keep),
        ]
        return m


def legal_marks(desc: data.View) -> Value:
    """Mask bits that a page of this kind has entries for."""
    channels = Mux(desc.m_log2 == 3, 0xFF, Mux(desc.m_log2 == 2, 0xF, 0x3))
    tokens = Mux(desc.wide_head, 0xFFFF, 0xFFFFFFFF)
    return Mux(desc.kind == PageKind.K_CHANNEL, channels, tokens)
