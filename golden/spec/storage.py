"""The in-storage attention unit: page formats, descriptors, commands, completions and arithmetic constants.

docs/formats-storage.md explains the arithmetic. Letters: dh head size, S cached tokens, G queries that share one
KV head, m channels per channel-indexed page, r channels and k tokens that SparF selects.

Records are plain field lists, lowest bits first; the hardware builds its layouts from them, the firmware packs them.
What the host sees (NVMe opcodes, logical addresses) is golden.spec.nvme; the firmware turns it into these records.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from math import ceil, log2, sqrt

from golden.spec import KVStrataError

# --- pages ------------------------------------------------------------------------------------------
PAGE_BYTES = 4096
ELEMENT_BYTES = 2
PAGE_ELEMENTS = PAGE_BYTES // ELEMENT_BYTES
HEAD_SIZES = (64, 128)
GROUP_TOKENS = 16
"""Tokens of one softmax step; part of the format, since the running maximum moves once per group."""
CHANNELS_PER_PAGE = (2, 4, 8)
"""Legal m: a channel-indexed page holds m channels of PAGE_ELEMENTS / m consecutive tokens."""
CHANNEL_BEAT_BYTES = 8
"""What one flash channel delivers in a cycle, at most; four elements, element 0 in the low bits."""
BEAT_ELEMENTS = 16
"""Elements of one beat towards the attention kernels."""
PAGE_CHANNEL_BEATS = PAGE_BYTES // CHANNEL_BEAT_BYTES
PAGE_BEATS = PAGE_ELEMENTS // BEAT_ELEMENTS
MASK_BITS = 32
"""Marks of one page: bit i is token i of a token page (16 or 32 tokens) or channel i of a channel page (m)."""
TAG_BITS = 8
SLOT_BITS = 4
"""Names of pages that a channel may send: up to 16 for each kernel."""
MAX_TOKENS = 1 << 17
"""Longest sequence of the formats; a configuration of the unit may hold less."""
TOKEN_BITS = 17
MAX_GROUP_QUERIES = 8


class PageKind(IntEnum):
    """How the 2048 elements of a page are ordered (element index of an entry)."""

    K_TOKEN = 0
    """Token-indexed K: token t of the page, channel c at t * dh + c."""
    V_TOKEN = 1
    """Token-indexed V, dimension-major inside each group of 16 tokens: (t // 16) * 16 * dh + d * 16 + t % 16.
    One beat is one dimension of 16 tokens, so the dot-product tree of q.k also computes p.V, without a transposer."""
    K_CHANNEL = 2
    """Channel-indexed K, rows of PAGE_ELEMENTS / m tokens: channel c of m, token t at c * (PAGE_ELEMENTS // m) + t."""


def tokens_per_page(head_size: int) -> int:
    """Tokens of a token-indexed page: 16 at head size 128, 32 at 64."""
    check_head_size(head_size)
    return PAGE_ELEMENTS // head_size


def tokens_per_channel_page(m: int) -> int:
    """Tokens along the row of one channel of a channel-indexed page."""
    if m not in CHANNELS_PER_PAGE:
        raise KVStrataError(f"channels per page must be one of {CHANNELS_PER_PAGE}, not {m!r}")
    return PAGE_ELEMENTS // m


def check_head_size(head_size: int) -> None:
    """Raises KVStrataError for a head size the unit does not hold."""
    if head_size not in HEAD_SIZES:
        raise KVStrataError(f"head size must be one of {HEAD_SIZES}, not {head_size!r}")


def token_pages(tokens: int, head_size: int) -> int:
    """Token-indexed pages of one of K or V of one KV head."""
    return ceil(tokens / tokens_per_page(head_size))


def channel_pages(tokens: int, head_size: int, m: int) -> int:
    """Channel-indexed pages of K of one KV head: blocks of tokens times channel groups."""
    return ceil(tokens / tokens_per_channel_page(m)) * (head_size // m)


# --- widths of the softmax ------------------------------------------------------------------------------
SCORE_FRAC = 16
SCORE_BITS = 29
"""A score: signed, log2 units, Q16, saturating at +-4096. Eight of them add up in 32 bits."""
MAXIMUM_BITS = SCORE_BITS - SCORE_FRAC + 1
"""A running maximum: signed, whole log2 units."""
L_BITS = 58
"""Running softmax sum: unsigned, unit 2**-40, holds 2**17 tokens."""


# --- records ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Record:
    """A packed record: (name, bits) pairs, the first in the lowest bits."""

    name: str
    fields: tuple[tuple[str, int], ...]

    @property
    def bits(self) -> int:
        """Width of the packed record."""
        return sum(bits for _, bits in self.fields)

    def pack(self, values: Mapping[str, int]) -> int:
        """The record as an integer; absent fields are 0. Raises KVStrataError for an unknown field or a value that
        does not fit its bits."""
        if unknown := set(values) - {name for name, _ in self.fields}:
            raise KVStrataError(f"record {self.name} has no field {sorted(unknown)[0]!r}")
        word, at = 0, 0
        for name, bits in self.fields:
            value = int(values.get(name, 0))
            if not 0 <= value < 1 << bits:
                raise KVStrataError(f"field {self.name}.{name} holds {bits} unsigned bits, not {value}")
            word |= value << at
            at += bits
        return word

    def unpack(self, word: int) -> dict[str, int]:
        """Field values of a packed record."""
        values, at = {}, 0
        for name, bits in self.fields:
            values[name] = (word >> at) & ((1 << bits) - 1)
            at += bits
        return values


PPN = Record("ppn", (("page", 10), ("block", 12), ("plane", 2), ("die", 4), ("channel", 4)))
"""Physical page number: 32 bits, as the flash-side interface and the L2P maps store it."""

FLASH_READ = Record("flash_read", (("ppn", 32), ("kernel", 1)))
"""A page for a channel to sense. It moves once it is granted: grants name the reads of a kernel in their order by a
slot, and the channel sends whichever granted page is ready."""

PAGE_DESCRIPTOR = Record(
    "page_descriptor",
    (("ppn", 32), ("mapped", 1), ("dram", 1)),
)
"""Firmware's answer to a page request. `dram`: the page is still in the group buffer, at index `ppn`.
`mapped` = 0: the maps hold no such page."""

PAGE_REQUEST = Record(
    "page_request",
    (
        ("kind", 2),
        ("kv_head", 8),
        ("sequence", 12),
        ("index", TOKEN_BITS),
        ("mask", MASK_BITS),
        ("tag", TAG_BITS),
    ),
)
"""What the unit asks the firmware's maps for. `index`: the page's number along tokens for token pages; for channel
pages `block * (dh / m) + channel group`. `tag` names the kernel's slot and travels with the page."""

FILTER_DESCRIPTOR = Record(
    "filter_descriptor",
    (("kind", 2), ("wide_head", 1), ("m_log2", 2), ("mask", MASK_BITS), ("tag", TAG_BITS)),
)
"""One per page, in the order of a kernel's reads of a channel. `wide_head`: head size 128, else 64."""

CHANNEL_BEAT = Record(
    "channel_beat",
    (
        ("data", 8 * CHANNEL_BEAT_BYTES),
        ("first", 1),
        ("last", 1),
        ("fail", 1),
        ("slot", SLOT_BITS),
        ("kernel", 1),
    ),
)
"""A beat of a raw page after ECC; pages move whole. `fail` counts at `last` alone: the page is uncorrectable after all
retries. `slot` and `kernel` are those of the page's grant."""

PAGE_BEAT = Record(
    "page_beat",
    (
        ("data", 16 * BEAT_ELEMENTS),
        ("first", 1),
        ("last", 1),
        ("fail", 1),
        ("kind", 2),
        ("mask", MASK_BITS),
        ("tag", TAG_BITS),
    ),
)
"""A beat of a filtered page towards the kernels; `kind`, `mask`, `tag` and `fail` hold for every beat of the page.

- K_TOKEN: beats of the marked tokens only, ascending, dh / 16 beats each.
- V_TOKEN: of every 16-token group that has a marked token, all dh beats, elements of unmarked tokens zeroed.
- K_CHANNEL: rows of the marked channels only, ascending, PAGE_ELEMENTS / m / 16 beats each.
- A page whose mask is 0 produces nothing. A page that fails produces one beat: first, last and fail set, data 0.

A page is offered once it is complete, so its beats follow each other without a bubble; a kernel's pages of one channel
keep the order of their descriptors."""

TOPK_SCORE = Record("topk_score", (("index", TOKEN_BITS), ("key", 32), ("forced", 1), ("last", 1)))
"""One candidate of argtopk. `key`: signed; `forced`: selected whatever its key (local window)."""


class Status(IntEnum):
    """Completion codes."""

    OK = 0
    NOT_CONFIGURED = 2
    BUSY = 3
    BAD_FIELD = 4
    """`field` is the index of the offending field in the command's record."""
    UNMAPPED_PAGE = 5
    OUTSIDE_DEVICE = 6
    UNCORRECTABLE_PAGE = 7
    ABORTED = 8


class Mode(IntEnum):
    """What an attend command computes."""

    DENSE = 0
    SPARF = 1


CONFIG = Record(
    "config",
    (
        ("wide_head", 1),
        ("m_log2", 2),
        ("group_queries", 4),
        ("kv_heads", 8),
        ("channels", 4),
        ("dies", 5),
        ("blocks", 13),
        ("pages", 11),
    ),
)
"""Model shape, layout and device geometry. `channels`, `dies`, `blocks` and `pages` bound the physical page numbers."""

ATTEND = Record(
    "attend",
    (
        ("command_id", 16),
        ("mode", 1),
        ("sequence", 12),
        ("kv_head", 8),
        ("tokens", 18),
        ("r", 8),
        ("k", 18),
        ("window", 18),
        ("last", 1),
    ),
)
"""One job of a batch: one KV head of one sequence with its group of queries. A batch is a run of jobs that ends with
`last`. `tokens`: S, group-buffer tokens included. `window`: the most recent tokens, always selected."""

COMPLETION = Record(
    "completion",
    (
        ("command_id", 16),
        ("sequence", 12),
        ("kv_head", 8),
        ("status", 8),
        ("field", 8),
        ("index", TOKEN_BITS),
    ),
)
"""One per job. `index`: of the offending page, where one is to blame."""

SOFTMAX_STATE = Record("softmax_state", (("maximum", MAXIMUM_BITS), ("sum", L_BITS)))
"""What the softmax of a query ended in, beside every element of its output: the running maximum in whole log2 units
(signed) and the sum, unit 2^-40. Of SparF those of the approximate pass, which are over all tokens. Partials of
disjoint tokens merge by them (docs/nvme.md)."""

COUNTERS = ("cycles", "pages", "beats", "kernel_busy", "kernel_wait", "requests", "jobs", "failed_jobs")
"""Performance counters, 48 bits each, in the order of their register addresses; cleared by config."""

# --- arithmetic -------------------------------------------------------------------------------------
SCALE_BITS = 17
SCALE_FRAC = 19


def softmax_scale(head_size: int) -> int:
    """round(log2(e) / sqrt(dh) * 2**19), of any head size."""
    return round(2**SCALE_FRAC / sqrt(head_size) * log2(2.718281828459045))


SOFTMAX_SCALE = {dh: softmax_scale(dh) for dh in HEAD_SIZES}
"""Of the unit's head sizes: 17 bits, so that a 24-bit significand times it fits one DSP48E1."""
RATIO_FRAC = 24
"""Fraction bits of ||q||1 / ||q[i]||1 before its square root is taken."""
P_FRAC = 24
"""A probability is an fp16 number; every fp16 number is a multiple of 2**-24."""
L_EXTRA_FRAC = 16
RECIPROCAL_BITS = 17
ALPHA_FRAC = 16
EXP2_SEGMENTS_LOG2 = 6
EXP2_TABLE = tuple(round(2**15 * 2 ** (-k / 64)) for k in range(65))
"""2**-f in Q15 at f = k / 64; linear in between."""
F32_NAN = 0x7FC00000
F16_NAN = 0x7E00
