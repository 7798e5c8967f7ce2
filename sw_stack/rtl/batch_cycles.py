"""What `golden.storage.batch` says of jobs on a cache: golden's selections and the cache's maps as pages in places."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from golden.spec.storage import GROUP_TOKENS, PPN, PageKind
from golden.storage.attention import SparfTrace
from golden.storage.batch import Batch, BatchJob, FlashTimes, Page, UnitTimes
from golden.storage.layout import PageMark, channel_marks, filtered_beats, token_marks
from hw.storage.flash_model import FlashParams
from hw.storage.nfc.timing import channel_cycles
from hw.storage.timing import unit_times
from hw.storage.topk.timing import digits_used
from sw_stack.rtl.storage import Cache, Job


def expected_cycles(
    cache: Cache, jobs: Sequence[Job], traces: Sequence[SparfTrace] = (), *, channels: int, **parameters: int
) -> float:
    """Cycles of the batch on a unit of `channels` channels: dense jobs without `traces`, else SparF with one for each.

    All pages are on flash; `parameters` are those of FlashParams.
    """
    p = FlashParams(**parameters)
    batch = Batch(
        unit_model(channels),
        flash_times(**parameters),
        head_size=cache.head_size,
        channels=channels,
        m=cache.m,
        queries=len(jobs[0].q),
    )
    if not traces:
        return batch.cycles([_dense(cache, job, p) for job in jobs])
    return batch.cycles([_sparf(cache, job, trace, p) for job, trace in zip(jobs, traces, strict=True)])


def unit_model(channels: int = 8) -> UnitTimes:
    """What the recurrence starts from, as the hardware's own closed forms say."""
    return UnitTimes(**unit_times(channels))


def flash_times(**parameters: int) -> FlashTimes:
    """The flash of a recurrence; `parameters` are those of FlashParams."""
    p = FlashParams(**parameters)
    return FlashTimes(
        p.cycles(p.read_ns),
        p.cycles(p.command_ns),
        p.cycles(p.ecc_ns),
        channel_cycles(1, clock_mhz=p.clock_mhz, channel_mb_per_s=p.channel_mb_per_s),
        cache_read=p.cache_read,
        queue=p.queue,
    )


def _page(cache: Cache, job: Job, mark: PageMark, params: FlashParams) -> Page:
    ppn = cache.page_of(kind=mark.kind, kv_head=job.kv_head, sequence=job.sequence, index=mark.index)
    return Page(PPN.unpack(ppn)["channel"], params.array(ppn), filtered_beats(mark, cache.head_size, cache.m))


def _token_pages(
    cache: Cache, job: Job, tokens: Sequence[int], p: FlashParams
) -> list[tuple[int, Page, Page]]:
    keys, values = (
        token_marks(kind, tokens, job.tokens, cache.head_size)
        for kind in (PageKind.K_TOKEN, PageKind.V_TOKEN)
    )
    return [(k.index, _page(cache, job, k, p), _page(cache, job, v, p)) for k, v in zip(keys, values)]


def _dense(cache: Cache, job: Job, p: FlashParams) -> BatchJob:
    return BatchJob(job.tokens, _token_pages(cache, job, range(job.tokens), p))


def _sparf(cache: Cache, job: Job, trace: SparfTrace, p: FlashParams) -> BatchJob:
    blocks: dict[int, list[Page]] = defaultdict(list)
    for mark in channel_marks(trace.channels.tolist(), job.tokens, cache.head_size, cache.m):
        blocks[mark.index // (cache.head_size // cache.m)].append(_page(cache, job, mark, p))
    groups = sorted({int(channel) // cache.m for channel in trace.channels})
    tokens = trace.tokens.tolist()
    rows = np.bincount(trace.tokens // GROUP_TOKENS, minlength=-(-job.tokens // GROUP_TOKENS)).tolist()
    digits = digits_used([int(key) + (1 << 31) for key in trace.scores], job.k, window=job.window)
    return BatchJob(
        job.tokens, _token_pages(cache, job, tokens, p), list(blocks.values()), groups, rows, digits
    )
