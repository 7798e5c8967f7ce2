"""SparF in the in-storage unit of this repository: the recurrence that tests hold to its RTL, on selections drawn here.

`golden.storage.batch` follows every page of a batch through the unit; its cycle counts are the table's "times", which
`make calibrate` takes from the hardware's closed forms. A job's selection is drawn as the scheme describes it: r
channels at random, and k tokens in a share of the token pages (SIM-SPARF-LOCALITY). Cost does not grow with the work:
of many jobs `MANY` to `MOST` are followed and the rest continue the line from `FEW`, contexts between those of
`CONTEXTS` are interpolated, and longer ones continue the last line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from golden.storage.batch import BatchJob

FEW, MANY, MOST, FOLLOWED_TOKENS = 8, 24, 64, 32_768
"""Jobs that fill the unit; the least and the most that are followed, and the tokens of those between."""
CONTEXTS = (128, 512, 1024, 2048)
ECC_US = 1.0
"""Decoder of a page, as the RTL's flash model has it (SIM-SPARF-UNIT)."""
QUICK_READ_US = 0.5
"""Array time of the calibration's runs: short, so that the unit and its channels bind."""


@dataclass(frozen=True)
class Selection:
    """What SparF reads of one KV head: r of `head_size` channels, m to a page; `share` of the tokens, which lie in
    `page_share` of the token pages; `queries` heads share it."""

    head_size: int
    r: int
    m: int
    share: float
    page_share: float
    queries: int = 1
    run_groups: int = 1
    """Groups of 16 tokens that are read one after the other, where selections come in runs."""


@dataclass(frozen=True)
class FlashBehind:
    """Flash of one drive in cycles of the unit's clock: array read, command, decoder, page on the channel."""

    channels: int
    arrays: int
    read: int
    command: int
    ecc: int
    page: float


def sparf_cycles(
    selection: Selection,
    tokens: float,
    jobs: float,
    flash: FlashBehind,
    times: tuple[tuple[str, int], ...],
) -> float:
    """Cycles of a batch of `jobs` (sequence, KV head) pairs with `tokens` cached tokens, first command to last end."""
    at = [n for n in CONTEXTS if n <= tokens][-1:] or [CONTEXTS[0]]
    low = min(at[0], CONTEXTS[-2])
    high = CONTEXTS[CONTEXTS.index(low) + 1]
    near, far = (_at(selection, n, jobs, flash, times) for n in (low, high))
    least = near * min(1.0, tokens / low) / 2
    return max(near + (far - near) * (tokens - low) / (high - low), least)


def _at(
    selection: Selection, tokens: int, jobs: float, flash: FlashBehind, times: tuple[tuple[str, int], ...]
) -> float:
    # Short jobs scatter more, and cost less to follow.
    most = max(MANY, min(MOST, FOLLOWED_TOKENS // tokens))
    if jobs <= most:
        return followed_cycles(selection, tokens, max(1, round(jobs)), flash, times)
    few, many = (followed_cycles(selection, tokens, n, flash, times) for n in (FEW, most))
    return many + (jobs - most) * (many - few) / (most - FEW)


@lru_cache(maxsize=4096)
def followed_cycles(
    selection: Selection,
    tokens: int,
    jobs: int,
    flash: FlashBehind,
    times: tuple[tuple[str, int], ...],
    seed: int = 0,
) -> float:
    """Cycles of a batch whose every page is followed."""
    import numpy as np

    from golden.storage.batch import Batch, FlashTimes, UnitTimes

    rng = np.random.default_rng(seed)
    waits = FlashTimes(read=flash.read, command=flash.command, ecc=flash.ecc, page=flash.page)
    sizes = {"head_size": selection.head_size, "m": selection.m, "queries": selection.queries}
    batch = Batch(UnitTimes(**dict(times)), waits, channels=flash.channels, **sizes)
    return float(batch.cycles([_job(selection, tokens, head, flash, rng) for head in range(jobs)]))


def _job(s: Selection, tokens: int, head: int, flash: FlashBehind, rng: np.random.Generator) -> BatchJob:
    """One job with a selection of its own, its pages where the layout puts them."""
    from golden.spec.storage import BEAT_ELEMENTS, PageKind, tokens_per_channel_page
    from golden.storage.batch import BatchJob, Page
    from golden.storage.layout import place

    counts = _tokens_by_group(s, tokens, rng)
    where = {"groups": s.head_size // s.m, "channels": flash.channels, "arrays": flash.arrays}

    def page(kind: PageKind, index: int, beats: int) -> Page:
        channel, array = place(kind, head, index, **where)
        return Page(int(channel), int(array), beats)

    groups = 128 // s.head_size
    exact = []
    for index in range(math.ceil(len(counts) / groups)):
        of_page = counts[index * groups : (index + 1) * groups]
        if any(of_page):
            key = page(PageKind.K_TOKEN, index, sum(of_page) * s.head_size // BEAT_ELEMENTS)
            value = page(PageKind.V_TOKEN, index, sum(map(bool, of_page)) * s.head_size)
            exact.append((index, key, value))
    marks: dict[int, int] = {}
    for channel in sorted(rng.choice(s.head_size, s.r, replace=False).tolist()):
        marks[channel // s.m] = marks.get(channel // s.m, 0) + 1
    span = tokens_per_channel_page(s.m)
    blocks = [
        [
            page(PageKind.K_CHANNEL, block * where["groups"] + group, marked * span // BEAT_ELEMENTS)
            for group, marked in marks.items()
        ]
        for block in range(math.ceil(tokens / span))
    ]
    return BatchJob(tokens, exact, blocks, list(marks), counts, DIGITS)


DIGITS = 3
"""That argtopk refines: real scores take 3 or 4 (SIM-SPARF-UNIT)."""


def _tokens_by_group(s: Selection, tokens: int, rng: np.random.Generator) -> Sequence[int]:
    """Selected tokens of each group of 16: the groups of a share of the pages hold one each, the rest lie at random."""
    import numpy as np

    from golden.spec.storage import GROUP_TOKENS

    groups, k = math.ceil(tokens / GROUP_TOKENS), max(1, round(s.share * tokens))
    read = min(max(round(s.page_share * groups), math.ceil(k / GROUP_TOKENS)), k, groups)
    runs = rng.permutation(math.ceil(groups / s.run_groups))[:, None] * s.run_groups
    places = (runs + np.arange(s.run_groups)).ravel()
    places = places[places < groups][:read]
    slots = rng.choice(read * (GROUP_TOKENS - 1), min(k - read, read * (GROUP_TOKENS - 1)), replace=False)
    counts = [0] * groups
    for place in places.tolist():
        counts[place] = 1
    for slot in slots.tolist():
        counts[int(places[slot // (GROUP_TOKENS - 1)])] += 1
    return counts
