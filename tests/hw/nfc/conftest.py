"""Pages, descriptors and expected beats for the flash side."""

import random
from dataclasses import dataclass

import numpy as np
import pytest

from golden.spec.storage import PageKind, tokens_per_page
from golden.storage.layout import PageMark, filtered, filtered_beats


@dataclass(frozen=True)
class RawPage:
    """A page on its way through a filter: contents, marks as the descriptor gives them, and whether ECC gives up."""

    kind: PageKind
    dh: int
    m: int
    mask: int
    fail: bool
    tag: int
    content: bytes

    @property
    def descriptor(self):
        m_log2 = self.m.bit_length() - 1 if self.m else 0
        return {
            "kind": self.kind,
            "wide_head": self.dh == 128,
            "m_log2": m_log2,
            "mask": self.mask,
            "tag": self.tag,
        }

    @property
    def legal(self):
        """Marks of entries that the page has."""
        return self.mask & ((1 << (self.m or tokens_per_page(self.dh))) - 1)

    @property
    def sized(self):
        """The descriptor with the number of the last beat that passes, as the flash front gives it to a filter."""
        return {
            **self.descriptor,
            "last_row": filtered_beats(PageMark(self.kind, 0, self.legal), self.dh, self.m) - 1,
        }

    @property
    def beats(self):
        for n in range(512):
            word = int.from_bytes(self.content[8 * n : 8 * n + 8], "little")
            yield {
                "data": word,
                "first": n == 0,
                "last": n == 511,
                "fail": self.fail if n == 511 else self.tag & 1,
            }

    @property
    def expected(self):
        """Golden `PAGE_BEAT`s; marks of entries that the page does not have are ignored."""
        legal = self.legal
        rows = filtered(
            PageMark(self.kind, 0, legal), np.frombuffer(self.content, np.uint16), self.dh, self.m
        )
        if self.fail and legal:
            rows = np.zeros((1, 16), np.uint16)
        return [
            {
                "data": int.from_bytes(row.tobytes(), "little"),
                "first": int(n == 0),
                "last": int(n == len(rows) - 1),
                "fail": int(self.fail),
                "kind": int(self.kind),
                "mask": self.mask,
                "tag": self.tag,
            }
            for n, row in enumerate(rows)
        ]


def random_pages(seed, count, *, fail=0.15, tag_bits=8):
    """Pages of every kind and head size with dense, sparse, single, empty and illegal marks."""
    rng = random.Random(seed)
    pages = []
    for n in range(count):
        kind = PageKind(rng.randrange(3))
        sparse = rng.getrandbits(32) & rng.getrandbits(32) & rng.getrandbits(32)
        mask = rng.choice([0, 0xFFFFFFFF, rng.getrandbits(32), sparse, 1 << rng.randrange(32), 1])
        m = rng.choice([2, 4, 8]) if kind is PageKind.K_CHANNEL else 0
        dh = rng.choice([64, 128])
        pages.append(
            RawPage(kind, dh, m, mask, rng.random() < fail, n % (1 << tag_bits), rng.randbytes(4096))
        )
    return pages


@pytest.fixture
def raw_pages():
    """Maker of random pages: `raw_pages(seed, count)`."""
    return random_pages
