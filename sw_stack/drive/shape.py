"""Shape of a task on the drive, its derived page counts, DRAM needs and page images.

Letters: L layers, H KV heads, dh head size, m channels per channel page, g tokens per token page. A *segment* is
the tokens that one channel page spans (page elements / m); it holds dh / m token pages and dh / m channel pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from golden.spec.nvme import AddressMap
from golden.spec.storage import ELEMENT_BYTES, GROUP_TOKENS, PAGE_BYTES, PageKind
from sw_stack.drive.errors import InvalidField

VIEWS = len(PageKind)
MAP_ENTRY_BYTES = 4


@dataclass(frozen=True)
class TaskShape:
    """What `config` says about a task; InvalidField (detail = dword) for a shape that pages cannot hold."""

    layers: int
    q_heads: int
    kv_heads: int
    head_size: int
    channels_per_page: int
    max_tokens: int
    page_bytes: int = PAGE_BYTES

    def __post_init__(self) -> None:
        if not self.layers:
            raise InvalidField(10, f"a task has at least one layer; got {self.layers}")
        if not self.kv_heads or self.q_heads % self.kv_heads:
            raise InvalidField(
                11, f"query heads are a multiple of KV heads; got {self.q_heads} over {self.kv_heads}"
            )
        elements = self.page_bytes // ELEMENT_BYTES
        if not self.head_size or elements % self.head_size or elements // self.head_size % GROUP_TOKENS:
            raise InvalidField(
                12, f"a page of {elements} elements holds whole groups of {GROUP_TOKENS} tokens; "
                f"got head size {self.head_size}"
            )  # fmt: skip
        if not self.channels_per_page or self.head_size % self.channels_per_page:
            raise InvalidField(
                12, f"channels per page divide head size {self.head_size}; got {self.channels_per_page}"
            )
        if not self.max_tokens:
            raise InvalidField(13, f"a task holds at least one token; got {self.max_tokens}")

    @property
    def tokens_per_page(self) -> int:
        """g."""
        return self.page_bytes // ELEMENT_BYTES // self.head_size

    @property
    def channel_groups(self) -> int:
        """Channel pages, and token pages, of one segment of one head."""
        return self.head_size // self.channels_per_page

    @property
    def segment_tokens(self) -> int:
        """Tokens that a channel page spans."""
        return self.tokens_per_page * self.channel_groups

    @property
    def groups(self) -> int:
        """Pages per view of one head at the full context, whole segments."""
        segments = -(-self.max_tokens // self.segment_tokens)
        return segments * self.channel_groups

    @property
    def row_bytes(self) -> int:
        """Bytes of one K or V vector of one head."""
        return self.head_size * ELEMENT_BYTES

    @property
    def map_bytes(self) -> int:
        """DRAM of one sequence's logical-to-physical maps, all views."""
        return VIEWS * self.layers * self.kv_heads * self.groups * MAP_ENTRY_BYTES

    @property
    def buffer_bytes(self) -> int:
        """DRAM of one layer's group buffer of one sequence: a K and a V page per head."""
        return 2 * self.kv_heads * self.page_bytes

    @property
    def channel_tail_bytes(self) -> int:
        """DRAM that buffering the channel-indexed K tail of one layer of one sequence would take."""
        return self.kv_heads * self.segment_tokens * self.row_bytes

    def address_map(self, batch: int) -> AddressMap:
        """The narrowest address map for `batch` sequences of this shape."""
        return AddressMap.for_shape(batch, self.layers, self.kv_heads, self.groups)


# --- page images ------------------------------------------------------------------------------------
# Vectors arrive as uint16 [..., tokens, dh]; pages leave as uint8 [..., pages, page_bytes], tokens in order.


def k_token_pages(shape: TaskShape, k: np.ndarray) -> np.ndarray:
    """K by token: token-major. k uint16 [..., tokens, dh], tokens a multiple of g."""
    count = k.shape[-2] // shape.tokens_per_page
    return np.ascontiguousarray(k).view(np.uint8).reshape(*k.shape[:-2], count, shape.page_bytes)


def v_token_pages(shape: TaskShape, v: np.ndarray) -> np.ndarray:
    """V by token: dimension-major inside each group of 16 tokens, as the page format demands."""
    grouped = v.reshape(*v.shape[:-2], v.shape[-2] // GROUP_TOKENS, GROUP_TOKENS, shape.head_size)
    return k_token_pages(shape, np.swapaxes(grouped, -1, -2).reshape(v.shape))


def k_channel_pages(shape: TaskShape, k: np.ndarray) -> np.ndarray:
    """K by channel. k uint16 [..., tokens, dh] of whole segments; page index segment * channel groups + group."""
    segments = k.shape[-2] // shape.segment_tokens
    split = k.reshape(
        *k.shape[:-2], segments, shape.segment_tokens, shape.channel_groups, shape.channels_per_page
    )
    rows = np.ascontiguousarray(np.moveaxis(split, -3, -1))  # [..., segment, channel group, channel, token]
    return rows.view(np.uint8).reshape(*k.shape[:-2], segments * shape.channel_groups, shape.page_bytes)


def k_from_token_pages(shape: TaskShape, pages: np.ndarray) -> np.ndarray:
    """Inverse of `k_token_pages`: uint16 [..., tokens, dh]."""
    tokens = pages.shape[-2] * shape.tokens_per_page
    return pages.view(np.uint16).reshape(*pages.shape[:-2], tokens, shape.head_size)


def v_from_token_pages(shape: TaskShape, pages: np.ndarray) -> np.ndarray:
    """Inverse of `v_token_pages`."""
    tokens = pages.shape[-2] * shape.tokens_per_page
    grouped = pages.view(np.uint16).reshape(
        *pages.shape[:-2], tokens // GROUP_TOKENS, shape.head_size, GROUP_TOKENS
    )
    return np.swapaxes(grouped, -1, -2).reshape(*pages.shape[:-2], tokens, shape.head_size)


def k_from_channel_pages(shape: TaskShape, pages: np.ndarray) -> np.ndarray:
    """Inverse of `k_channel_pages`."""
    segments = pages.shape[-2] // shape.channel_groups
    rows = pages.view(np.uint16).reshape(
        *pages.shape[:-2], segments, shape.channel_groups, shape.channels_per_page, shape.segment_tokens
    )
    tokens = segments * shape.segment_tokens
    return np.moveaxis(rows, -1, -3).reshape(*pages.shape[:-2], tokens, shape.head_size)
