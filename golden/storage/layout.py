"""Flash pages of a KV cache, the pages and marks of a selection, and what the filter passes of a page.

Arrays are numpy, elements any 16-bit dtype (float16, or uint16 for bits that must survive untouched). Letters: S
tokens, dh head size, m channels per channel-indexed page. Page formats are those of `golden.spec.storage.PageKind`;
entries past S are zero. A selection is per KV head: a group of queries shares it, so GQA needs nothing of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from golden.spec import KVStrataError
from golden.spec.storage import (
    BEAT_ELEMENTS,
    ELEMENT_BYTES,
    GROUP_TOKENS,
    PAGE_BYTES,
    PAGE_ELEMENTS,
    PageKind,
    channel_pages,
    check_head_size,
    token_pages,
    tokens_per_channel_page,
    tokens_per_page,
)

Index = Any
"""An integer, or an integer array."""


@dataclass(frozen=True)
class PageMark:
    """One page to read and which of its entries are wanted: bit i of `mask` is token or channel i of the page."""

    kind: PageKind
    index: int
    mask: int


def _check_head(x: np.ndarray) -> tuple[int, int]:
    if x.ndim != 2 or x.dtype.itemsize != ELEMENT_BYTES or x.shape[0] < 1:
        raise KVStrataError(f"a head is [S >= 1, dh] of 16-bit elements, not {x.dtype} {x.shape}")
    check_head_size(x.shape[1])
    return x.shape[0], x.shape[1]


def _padded(x: np.ndarray, tokens: int) -> np.ndarray:
    return np.concatenate([x, np.zeros((tokens - x.shape[0], x.shape[1]), x.dtype)])


def pack(kind: PageKind, x: np.ndarray, m: int = 0) -> np.ndarray:
    """Pages of one K or V of one KV head: x [S, dh] -> [pages, 2048], same dtype. `m` for K_CHANNEL only."""
    tokens, dh = _check_head(x)
    if kind is PageKind.K_CHANNEL:
        span = tokens_per_channel_page(m)
        blocks = -(-tokens // span)
        full = _padded(x, blocks * span).reshape(blocks, span, dh)
        return full.transpose(0, 2, 1).reshape(channel_pages(tokens, dh, m), PAGE_ELEMENTS).copy()
    pages = token_pages(tokens, dh)
    full = _padded(x, pages * tokens_per_page(dh))
    if kind is PageKind.V_TOKEN:
        full = full.reshape(-1, GROUP_TOKENS, dh).transpose(0, 2, 1)
    return full.reshape(pages, PAGE_ELEMENTS).copy()


def unpack(kind: PageKind, pages: np.ndarray, tokens: int, head_size: int, m: int = 0) -> np.ndarray:
    """Inverse of `pack`: pages [n, 2048] -> [tokens, dh]. Raises KVStrataError for another number of pages."""
    expected = (
        channel_pages(tokens, head_size, m) if kind is PageKind.K_CHANNEL else token_pages(tokens, head_size)
    )
    if pages.shape != (expected, PAGE_ELEMENTS):
        raise KVStrataError(
            f"{tokens} tokens of head size {head_size} take [{expected}, {PAGE_ELEMENTS}] pages, not {pages.shape}"
        )
    if kind is PageKind.K_CHANNEL:
        full = pages.reshape(-1, head_size, tokens_per_channel_page(m)).transpose(0, 2, 1)
    elif kind is PageKind.V_TOKEN:
        full = pages.reshape(-1, head_size, GROUP_TOKENS).transpose(0, 2, 1)
    else:
        full = pages
    return full.reshape(-1, head_size)[:tokens].copy()


def _checked(selection: Iterable[int], limit: int, what: str) -> list[int]:
    items = [int(x) for x in selection]
    if any(a >= b for a, b in zip(items, items[1:])):
        raise KVStrataError(f"selected {what} are ascending and distinct, not {items[:8]}...")
    if items and not (items[0] >= 0 and items[-1] < limit):
        bad = items[0] if items[0] < 0 else items[-1]
        raise KVStrataError(f"selected {what} lie in 0..{limit - 1}, not {bad}")
    return items


def token_marks(kind: PageKind, selection: Iterable[int], tokens: int, head_size: int) -> list[PageMark]:
    """Token-indexed pages that hold a selected token, ascending, each with its marks; others are not read."""
    span = tokens_per_page(head_size)
    masks: dict[int, int] = {}
    for token in _checked(selection, tokens, "tokens"):
        masks[token // span] = masks.get(token // span, 0) | 1 << token % span
    return [PageMark(kind, index, mask) for index, mask in masks.items()]


def channel_marks(selection: Iterable[int], tokens: int, head_size: int, m: int) -> list[PageMark]:
    """Channel-indexed pages that hold a selected channel: all token blocks, channel groups ascending in each."""
    check_head_size(head_size)
    groups = head_size // m if m else 0
    blocks = -(-tokens // tokens_per_channel_page(m))
    masks: dict[int, int] = {}
    for channel in _checked(selection, head_size, "channels"):
        masks[channel // m] = masks.get(channel // m, 0) | 1 << channel % m
    return [
        PageMark(PageKind.K_CHANNEL, block * groups + group, mask)
        for block in range(blocks)
        for group, mask in masks.items()
    ]


def marked(mask: int) -> Iterator[int]:
    """Positions of the set bits, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def filtered(mark: PageMark, page: np.ndarray, head_size: int, m: int = 0) -> np.ndarray:
    """What the filter passes of a page: page [2048] -> beats [n, 16] in the order of `PAGE_BEAT`.

    K rows of marked entries only; of V every 16-token group with a marked token, unmarked tokens zero.
    """
    if mark.kind is PageKind.V_TOKEN:
        groups = page.reshape(-1, head_size, GROUP_TOKENS)
        bits = np.array([mark.mask >> t & 1 for t in range(groups.shape[0] * GROUP_TOKENS)], bool)
        keep = bits.reshape(-1, GROUP_TOKENS)
        passed = [
            np.where(keep[g], groups[g], 0).astype(page.dtype) for g in range(len(groups)) if keep[g].any()
        ]
        return np.concatenate(passed or [np.zeros((0, BEAT_ELEMENTS), page.dtype)])
    row = tokens_per_channel_page(m) if mark.kind is PageKind.K_CHANNEL else head_size
    return page.reshape(-1, row)[list(marked(mark.mask))].reshape(-1, BEAT_ELEMENTS)


def filtered_beats(mark: PageMark, head_size: int, m: int = 0) -> int:
    """Number of beats that `filtered` returns."""
    if mark.kind is PageKind.V_TOKEN:
        groups = {t // GROUP_TOKENS for t in marked(mark.mask)}
        return len(groups) * head_size
    row = tokens_per_channel_page(m) if mark.kind is PageKind.K_CHANNEL else head_size
    return mark.mask.bit_count() * (row // BEAT_ELEMENTS)


@dataclass(frozen=True)
class Traffic:
    """Bytes of a selection: what the channels carry (`page_bytes`) and what is wanted of it (`entry_bytes`)."""

    pages: int
    page_bytes: int
    entry_bytes: int


def traffic(marks: Iterable[PageMark], head_size: int, m: int = 0) -> Traffic:
    """Bytes touched at page level and at entry level by `marks`."""
    pages = entries = 0
    for mark in marks:
        pages += 1
        row = tokens_per_channel_page(m) if mark.kind is PageKind.K_CHANNEL else head_size
        entries += mark.mask.bit_count() * row * ELEMENT_BYTES
    return Traffic(pages, pages * PAGE_BYTES, entries)


@dataclass(frozen=True)
class Geometry:
    """Flash behind the unit; bounds of a physical page number."""

    channels: int = 8
    dies: int = 16
    planes: int = 4
    blocks: int = 64
    pages: int = 256

    @property
    def arrays(self) -> int:
        """Arrays of a channel."""
        return self.dies * self.planes

    @property
    def capacity_pages(self) -> int:
        """Pages of the device."""
        return self.channels * self.dies * self.planes * self.blocks * self.pages


def place(
    kind: PageKind, head: Index, index: Index, *, groups: int, channels: int, arrays: int
) -> tuple[Index, Index]:
    """Channel and array of a channel (a die, or a plane that senses alone) of page `index` of a KV head's `kind`.

    `head` numbers the heads in the order in which jobs come; `groups` is dh / m. Integers, or arrays that broadcast.

    Pages that are read together form rows: one page on every channel, all on the same array, so that a selection
    loads the channels alike and what one waits for, all wait for. A row holds half as many token groups as there are
    channels, K on one half of them and V on the other, or two channel groups over half as many blocks of tokens.
    Rows visit the arrays in turn; every sweep, every head and the channel-indexed copy start at a shifted array.
    """
    half = max(1, channels // 2)
    if kind is PageKind.K_CHANNEL:
        block, group = np.divmod(index, groups)
        band, part = np.divmod(block, half)
        pair = band * (-(-groups // 2)) + group // 2
        number, skew = pair * 2 * half + group % 2 + 2 * part, 2 * (group // 2) + band
    else:
        unit, column = np.divmod(index, half)
        number, skew = (2 * unit + (unit + (kind is PageKind.V_TOKEN)) % 2) * half + column, half * (head % 2)
    row = number // channels
    start = head * (3 * arrays // 8) + (arrays // 2 if kind is PageKind.K_CHANNEL else 0)
    return (number + skew) % channels, (row + row // arrays * (arrays // 3 | 1) + start) % arrays


class AppendOrder:
    """The next free page of every array of an append-only device, block after block."""

    def __init__(self, geometry: Geometry):
        self._geometry = geometry
        self._written: dict[tuple[int, int], int] = {}

    def take(self, channel: int, array: int) -> dict[str, int]:
        """Fields of `golden.spec.storage.PPN`. Raises KVStrataError when the array is full."""
        g = self._geometry
        number = self._written.get((channel, array), 0)
        if number == g.blocks * g.pages:
            raise KVStrataError(f"an array holds {number} pages; array {array} of channel {channel} is full")
        self._written[channel, array] = number + 1
        block, page = divmod(number, g.pages)
        die, plane = divmod(array, g.planes)
        return {"page": page, "block": block, "plane": plane, "die": die, "channel": channel}
