"""Batches of SparF jobs whose attended tokens cluster or scatter, with the pages that golden says they touch.

Selections are real: q, k and v are drawn, golden attention selects, and the cache holds all three kinds of pages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from golden.spec.storage import PAGE_BYTES, PageKind
from golden.storage import attention
from golden.storage.fp import F16
from golden.storage.layout import Geometry, PageMark, channel_marks, token_marks
from sw_stack.rtl.storage import Cache, Job

HEAD_SIZE = 128
RUN_TOKENS = 64
"""Tokens of one run of a clustered selection."""
SELECTED = 8
"""One token in so many is selected."""


@dataclass(frozen=True)
class Selection:
    """What SparF reads of a batch: r channels, m of them per page, one token in SELECTED, the `window` last always."""

    r: int = 16
    m: int = 2
    window: int = 64


@dataclass(frozen=True)
class Batch:
    """SparF jobs on a cache, and what golden decided for each."""

    cache: Cache
    jobs: list[Job]
    traces: list[attention.SparfTrace]

    def marks(self, number: int) -> tuple[list[PageMark], list[PageMark]]:
        """Channel pages and K token pages of one job in the order of reading; V is read where K is."""
        job, trace = self.jobs[number], self.traces[number]
        channel = channel_marks(trace.channels.tolist(), job.tokens, HEAD_SIZE, self.cache.m)
        return channel, token_marks(PageKind.K_TOKEN, trace.tokens.tolist(), job.tokens, HEAD_SIZE)

    @property
    def pages(self) -> int:
        """Pages that both rounds of all jobs touch."""
        marks = map(self.marks, range(len(self.jobs)))
        return sum(len(channel) + 2 * len(token) for channel, token in marks)

    @property
    def page_bytes(self) -> int:
        """Their size."""
        return self.pages * PAGE_BYTES

    def dense(self) -> list[Job]:
        """The same heads as dense jobs."""
        return [replace(job, r=0, k=0, window=0, mean=None) for job in self.jobs]


def head(rng: np.random.Generator, tokens: int, *, clustered: bool) -> tuple[F16, F16, F16]:
    """q [1, 128], k and v [S, 128] of one head; clustered: an eighth of the tokens, in runs of 64, attracts q."""
    q = rng.normal(size=(1, HEAD_SIZE))
    k, v = rng.normal(size=(tokens, HEAD_SIZE)), rng.normal(size=(tokens, HEAD_SIZE))
    if clustered:
        runs = rng.choice(tokens // RUN_TOKENS, tokens // (SELECTED * RUN_TOKENS), replace=False)
        hot = (runs[:, None] * RUN_TOKENS + np.arange(RUN_TOKENS)).ravel()
        k[hot] += 1.5 * q
    return q.astype(np.float16), k.astype(np.float16), v.astype(np.float16)


def batch(
    rng: np.random.Generator,
    heads: int,
    tokens: int,
    *,
    clustered: bool,
    selection: Selection | None = None,
    geometry: Geometry | None = None,
) -> Batch:
    """`heads` jobs of one sequence of `tokens` tokens, everything on flash."""
    chosen = selection or Selection()
    made = Batch(Cache(HEAD_SIZE, m=chosen.m, geometry=geometry or Geometry(), tail_in_dram=False), [], [])
    k_top, window = tokens // SELECTED, min(chosen.window, tokens // SELECTED)
    for number in range(heads):
        q, k, v = head(rng, tokens, clustered=clustered)
        mean = v.mean(0, dtype=np.float32).astype(np.float16)
        made.traces.append(attention.sparf(q, k, v, mean, r=chosen.r, top=k_top, window=window))
        made.cache.add(0, number, k, v)
        made.jobs.append(Job(0, number, q, tokens, chosen.r, k_top, window, mean))
    return made
