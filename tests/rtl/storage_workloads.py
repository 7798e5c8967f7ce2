"""SparF jobs whose selections scatter or cluster by construction, and the pages that they touch by golden."""

from dataclasses import replace

import numpy as np

from golden.spec.storage import PAGE_BYTES, PageKind
from golden.storage import attention
from golden.storage.layout import Geometry, channel_marks, token_marks
from sw_stack.rtl.storage import Cache, Job

RUN_TOKENS = 64
"""Tokens of one run of a clustered selection."""


def hot_tokens(rng, tokens, share, clustered):
    """A `share` of the tokens: in runs of RUN_TOKENS, or scattered."""
    unit = RUN_TOKENS if clustered else 1
    units = rng.choice(tokens // unit, int(tokens * share) // unit, replace=False)
    return (units[:, None] * unit + np.arange(unit)).ravel()


def workload(seed, heads, tokens, *, clustered, head_size=128, m=4, r=16, channels=8):
    """(cache, SparF jobs, [(k, v)]): each head's q has r large channels, along which the hot tokens' keys lie."""
    rng = np.random.default_rng(seed)
    cache = Cache(head_size, m=m, geometry=Geometry(channels=channels), tail_in_dram=False)
    jobs, data = [], []
    for head in range(heads):
        q = 0.1 * rng.normal(size=head_size)
        loud = rng.choice(head_size, r, replace=False)
        q[loud] = rng.choice((-3, 3), r) * rng.uniform(0.8, 1.2, r)
        k, v = rng.normal(size=(tokens, head_size)), rng.normal(size=(tokens, head_size)).astype(np.float16)
        k[np.ix_(hot_tokens(rng, tokens, 1 / 8, clustered), loud)] += np.sign(q[loud])
        k = k.astype(np.float16)
        cache.add(0, head, k, v)
        mean = v.mean(0, dtype=np.float32).astype(np.float16)
        jobs.append(
            Job(0, head, q[None].astype(np.float16), tokens, r=r, k=tokens // 8, window=16, mean=mean)
        )
        data.append((k, v))
    return cache, jobs, data


def dense(jobs):
    """The same heads as dense jobs."""
    return [replace(job, r=0, k=0, window=0, mean=None) for job in jobs]


def pages_touched(job, trace, m):
    """(channel pages, token pages of K and V together) that the golden selection of a job touches."""
    head_size = job.q.shape[1]
    channel = channel_marks(trace.channels.tolist(), job.tokens, head_size, m)
    token = token_marks(PageKind.K_TOKEN, trace.tokens.tolist(), job.tokens, head_size)
    return len(channel), 2 * len(token)


def bound_cycles(pages, channels=8, *, clock_mhz=285, channel_mb_per_s=1400):
    """The least time in which the channels stream that many pages, spread evenly."""
    return pages * PAGE_BYTES * clock_mhz / (channels * channel_mb_per_s)


def golden(job, k, v):
    """The golden trace of a SparF job."""
    return attention.sparf(job.q, k, v, job.mean, r=job.r, top=job.k, window=job.window)
