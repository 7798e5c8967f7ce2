"""The in-storage unit's resources as a sum of synthesised blocks, by the rows of the published table.

Rule: repeated blocks are synthesised once and counted; memories alone are counted by their shape. Not counted: the
sequencer's tables and state machines and the control of each kernel, and wiring between blocks.
"""

from dataclasses import replace
from functools import cache, partial

from golden.spec.storage import BEAT_ELEMENTS, GROUP_TOKENS
from hw.flow.synth import Part, Resources, resources
from hw.lib.streams import StreamFIFO
from hw.storage.approximate import AlphaUnit
from hw.storage.feeder import Feeder
from hw.storage.fp import Unpack16
from hw.storage.lane import QueryLane
from hw.storage.nfc.filter import PageFilter
from hw.storage.nfc.front import OUTSTANDING, READ, READ_QUEUE, PageSize
from hw.storage.nfc.layouts import COMMAND, DESCRIPTOR
from hw.storage.nfc.order import PageOrder
from hw.storage.normalise import Normaliser
from hw.storage.passes import AHEAD, ROW, SLOTS, AllPages, ChannelPass, Requester, SelectedPages, TokenPass
from hw.storage.query import QueryUnit
from hw.storage.topk.unit import TopK
from hw.storage.unit import ELEMENTS, KERNELS

FAMILY = "xc7"
ALPHA_TOKENS = 4096
"""Tokens at which the alpha unit is synthesised: its memories alone grow with them, and at 32,768 synthesis takes most
of an hour."""


def parts(lanes: int = 4, channels: int = 8, max_tokens: int = 32768) -> list[Part]:
    """The unit's logic, block by block; the group buffer counts as a channel."""
    ports, rows = channels + 1, (AHEAD + 1) * max_tokens // GROUP_TOKENS
    return [
        Part("query lane", 2 * lanes, partial(QueryLane)),
        Part("unpack", 2 * BEAT_ELEMENTS, partial(Unpack16)),
        Part("normaliser", 2, partial(Normaliser, lanes)),
        Part("feeder", 2, partial(Feeder)),
        Part("query unit", 1, partial(QueryUnit, lanes)),
        Part("alpha unit", 1, partial(AlphaUnit, ALPHA_TOKENS, lanes)),
        Part("requester", 1, partial(Requester, channels, ports * OUTSTANDING)),
        Part("passes", 2, partial(AllPages)),
        Part("token pass", 2, partial(TokenPass)),
        Part("channel pass", 1, partial(ChannelPass)),
        Part("selected pages", 1, partial(SelectedPages)),
        Part("selected rows", 1, partial(StreamFIFO, ROW, rows, kind="block")),
        Part("argtopk", 1, partial(TopK, max_tokens, lanes=GROUP_TOKENS, in_lanes=1)),
        Part("page filter", ports, partial(PageFilter)),
        Part("page order", 2, partial(PageOrder, ports)),
        Part("page sizes", 1, partial(PageSize)),
        Part("order queue", 2, partial(StreamFIFO, range(ports), ports * OUTSTANDING, kind="block")),
        Part("read queue", 2, partial(StreamFIFO, READ, READ_QUEUE, kind="block")),
        Part("descriptors", 2 * ports, partial(StreamFIFO, DESCRIPTOR, OUTSTANDING)),
        Part("commands", ports, partial(StreamFIFO, COMMAND, OUTSTANDING)),
    ]


@cache
def compose(lanes: int = 4, channels: int = 8, max_tokens: int = 32768) -> dict[str, tuple[Resources, int]]:
    """Each block of the unit beside the number of its copies."""
    found = {p.name: (resources(p.make, p.top, FAMILY), p.count) for p in parts(lanes, channels, max_tokens)}
    alpha, copies = found["alpha unit"]
    found["alpha unit"] = replace(alpha, bram=alpha.bram * max_tokens / ALPHA_TOKENS), copies
    # q and v-bar of all jobs: a memory alone, which Yosys refuses as a top; a block holds 72 bits of 512 words.
    blocks = (1 + KERNELS) * -(-ELEMENTS.size // 72) * SLOTS * 64 / 512
    return {**found, "operands": (Resources(0, 0, 0, blocks, 0, 0, 0), 1)}


GROUPS = {
    "argtopk": ("argtopk",),
    "NFC": (
        "page filter",
        "page order",
        "page sizes",
        "order queue",
        "read queue",
        "descriptors",
        "commands",
    ),
}
"""Rows of the published table and our blocks that do their work; all others are the attention kernels'."""


def resource_groups(lanes: int = 4) -> dict[str, Resources]:
    """Sums of `compose` by the rows of the published table, and of all of them."""
    zero = Resources(0, 0, 0, 0, 0, 0, 0)
    sums = {"Attention kernels": zero, **dict.fromkeys(GROUPS, zero), "sum": zero}
    for name, (part, count) in compose(lanes).items():
        row = next((row for row, names in GROUPS.items() if name in names), "Attention kernels")
        sums[row] += part.scaled(count)
        sums["sum"] += part.scaled(count)
    return sums
