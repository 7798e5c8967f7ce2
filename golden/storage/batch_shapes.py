"""Batches as a system model knows them: a shape, selections drawn for it, and their pages where the layout puts them.

`golden.storage.batch` times pages that are given. Here they are drawn: channels and tokens at random, or tokens in
runs, as the benchmarks' heads select them. The pages of unfinished groups are on flash too.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from golden.spec.storage import GROUP_TOKENS, PageKind
from golden.storage.batch import Batch, BatchJob, FlashTimes, Page, UnitTimes
from golden.storage.layout import PageMark, channel_marks, filtered_beats, place, token_marks

PROBED = 96
"""Jobs whose pages are followed; each further one takes what those after the first `FILLED` took on average."""
FILLED = 16


@dataclass(frozen=True)
class Shape:
    """Every job of a batch: dense without `r`; tokens are selected in runs of `run_tokens`, 0: one by one."""

    tokens: int
    head_size: int = 128
    r: int = 0
    k: int = 0
    m: int = 2
    window: int = 0
    run_tokens: int = 0
    queries: int = 1

    @property
    def digits(self) -> int:
        """That argtopk refines: real scores take 3 or 4; nothing is refined where all or only the window are in."""
        return 1 if self.k in (self.window, self.tokens) else 3


@dataclass(frozen=True)
class Arrays:
    """Flash behind the unit: channels, and arrays (dies, or planes that sense alone) of each."""

    channels: int = 8
    arrays: int = 32


def batch_cycles(
    shape: Shape,
    heads: int,
    times: UnitTimes,
    flash: FlashTimes,
    arrays: Arrays | None = None,
    *,
    seed: int = 1,
) -> float:
    """Cycles of `heads` jobs, first command to last completion; of many, `PROBED` are followed."""
    flash_arrays = arrays or Arrays()
    followed = _cycles(shape, min(heads, PROBED), times, flash, flash_arrays, seed)
    if heads <= PROBED:
        return followed
    filled = _cycles(shape, FILLED, times, flash, flash_arrays, seed)
    return followed + (heads - PROBED) * (followed - filled) / (PROBED - FILLED)


def _cycles(
    shape: Shape, heads: int, times: UnitTimes, flash: FlashTimes, arrays: Arrays, seed: int
) -> float:
    batch = Batch(
        times, flash, head_size=shape.head_size, channels=arrays.channels, m=shape.m, queries=shape.queries
    )
    return batch.cycles(typical_jobs(shape, heads, arrays, seed=seed))


def typical_jobs(shape: Shape, heads: int, arrays: Arrays | None = None, *, seed: int = 1) -> list[BatchJob]:
    """`heads` jobs of a shape, each with a selection of its own."""
    rng = np.random.default_rng(seed)
    return [_job(shape, head, arrays or Arrays(), rng) for head in range(heads)]


def _job(shape: Shape, head: int, arrays: Arrays, rng: np.random.Generator) -> BatchJob:
    def page(mark: PageMark) -> Page:
        where = place(
            mark.kind,
            head,
            mark.index,
            groups=shape.head_size // shape.m,
            channels=arrays.channels,
            arrays=arrays.arrays,
        )
        return Page(int(where[0]), int(where[1]), filtered_beats(mark, shape.head_size, shape.m))

    tokens = _selected_tokens(shape, rng) if shape.r else np.arange(shape.tokens)
    keys, values = (
        token_marks(kind, tokens.tolist(), shape.tokens, shape.head_size)
        for kind in (PageKind.K_TOKEN, PageKind.V_TOKEN)
    )
    exact = [(key.index, page(key), page(value)) for key, value in zip(keys, values)]
    if not shape.r:
        return BatchJob(shape.tokens, exact)
    blocks: dict[int, list[Page]] = defaultdict(list)
    channels = np.sort(rng.choice(shape.head_size, shape.r, replace=False))
    for mark in channel_marks(channels.tolist(), shape.tokens, shape.head_size, shape.m):
        blocks[mark.index // (shape.head_size // shape.m)].append(page(mark))
    groups = sorted({int(channel) // shape.m for channel in channels})
    rows = np.bincount(tokens // GROUP_TOKENS, minlength=-(-shape.tokens // GROUP_TOKENS))
    return BatchJob(shape.tokens, exact, list(blocks.values()), groups, rows.tolist(), shape.digits)


def _selected_tokens(shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """k tokens, ascending: the window, and others at random, or out of k / run_tokens runs that attract the query."""
    window = np.arange(shape.tokens - shape.window, shape.tokens)
    others = np.arange(shape.tokens - shape.window)
    if shape.run_tokens:
        runs = rng.permutation(-(-shape.tokens // shape.run_tokens))
        attract = (runs[:, None] * shape.run_tokens + np.arange(shape.run_tokens)).ravel()
        others = attract[attract < len(others)][: max(shape.k // shape.run_tokens, 1) * shape.run_tokens]
    count = shape.k - shape.window
    if len(others) < count:
        others = np.arange(shape.tokens - shape.window)
    return np.concatenate([np.sort(rng.choice(others, count, replace=False)), window])
