"""Entry-level decision of the page filter: which beats of a page are wanted, and which of their elements."""

from amaranth import Cat, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.spec.storage import (
    CHANNEL_BEAT_BYTES,
    ELEMENT_BYTES,
    GROUP_TOKENS,
    MASK_BITS,
    PAGE_CHANNEL_BEATS,
    PageKind,
)
from hw.storage.nfc.layouts import CHANNEL, DESCRIPTOR

BEAT_BITS = 8 * CHANNEL_BEAT_BYTES
ELEMENT_BITS = 8 * ELEMENT_BYTES
BEAT_TOKENS = CHANNEL_BEAT_BYTES // ELEMENT_BYTES
COUNT_BITS = (PAGE_CHANNEL_BEATS - 1).bit_length()
LANES = GROUP_TOKENS // BEAT_TOKENS
"""Channel beats of one beat towards the kernels."""

GATED = data.StructLayout(
    {
        "data": BEAT_BITS,
        "lane": range(LANES),
        "keep": 1,
        "end": 1,
        "fail": 1,
        "wanted": 1,
        "kind": 2,
        "mask": MASK_BITS,
        "tag": DESCRIPTOR["tag"].shape,
    }
)
"""A judged beat. `keep`: belongs to a marked entry; `end`: last beat of the page, where `fail` and `wanted`
(any entry of the page is marked) hold; elements of unmarked tokens of a V page are zero already."""


def entry_of(kind: Value, wide: Value, m_log2: Value, beat: Value) -> Value:
    """Entry that beat number `beat` belongs to: token of a K page, channel of a channel page (docs/flash-side.md)."""
    token = Mux(wide, beat[COUNT_BITS - 4 :], beat[COUNT_BITS - 5 :])
    channel = Mux(
        m_log2 == 3, beat[COUNT_BITS - 3 :], Mux(m_log2 == 2, beat[COUNT_BITS - 2 :], beat[COUNT_BITS - 1 :])
    )
    return Mux(kind == PageKind.K_CHANNEL, channel, token)


class EntryGate(wiring.Component):
    """Pair pages with their descriptors and judge a beat per cycle; judged beats leave `latency` cycles later.

    `i` is ready while a descriptor is held and `room` is set; the descriptor of the next page is taken with the last
    beat of the page before, so pages follow each other without a bubble. `o` is never refused: whoever grants `room`
    keeps space for the beats under way.

    A page whose `first` or `last` marks are not where a page of 4 KB has them fails, as one that ECC gave up.
    Marks of entries that the page does not have are ignored.
    """

    latency = 2

    def __init__(self):
        super().__init__(
            {
                "desc": In(stream.Signature(DESCRIPTOR)),
                "i": In(stream.Signature(CHANNEL)),
                "room": In(1),
                "o": Out(stream.Signature(GATED, always_ready=True)),
            }
        )

        # State that proofs refer to.
        self.held, self.current, self.wanted = Signal(), Signal(DESCRIPTOR), Signal()
        self.count, self.broken = Signal(COUNT_BITS), Signal()

    def elaborate(self, platform):
        m = Module()
        held, current, wanted = self.held, self.current, self.wanted
        beat = self.i.payload
        accept = Signal()
        m.d.comb += [
            self.i.ready.eq(held & self.room),
            accept.eq(self.i.valid & self.i.ready),
            self.desc.ready.eq(~held | (accept & beat.last)),
        ]
        with m.If(self.desc.ready):
            m.d.sync += [
                held.eq(self.desc.valid),
                current.eq(self.desc.payload),
                wanted.eq((self.desc.payload.mask & legal_marks(self.desc.payload)).any()),
            ]

        # --- stage 1: where in the page the beat lies
        count, broken = self.count, self.broken
        misplaced = (beat.first != (count == 0)) | (beat.last != (count == PAGE_CHANNEL_BEATS - 1))
        valid, entry, half = Signal(), Signal(5), Signal()
        judged, desc = Signal(GATED), Signal(DESCRIPTOR)
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
                judged.end.eq(beat.last),
                judged.fail.eq(broken | misplaced | beat.fail),
                judged.keep.eq(~broken & ~misplaced),
                judged.wanted.eq(wanted),
            ]

        # --- stage 2: what its marks say
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
            out.kind.eq(desc.kind),
            out.mask.eq(desc.mask),
            out.tag.eq(desc.tag),
        ]
        return m


def legal_marks(desc: data.View) -> Value:
    """Mask bits that a page of this kind has entries for."""
    channels = Mux(desc.m_log2 == 3, 0xFF, Mux(desc.m_log2 == 2, 0xF, 0x3))
    tokens = Mux(desc.wide_head, 0xFFFF, 0xFFFFFFFF)
    return Mux(desc.kind == PageKind.K_CHANNEL, channels, tokens)
