"""The in-storage unit as firmware drives it: pages in, outputs and softmax state out.

A unit sees page images alone, never a tensor: `HeadPages` reads them through the FTL's maps, so a wrong map, stripe
or layout shows in the output. SparF reads the channel pages that hold a marked channel and the token pages that
hold a selected token, nothing else; `pages_read` counts them per kind.

Where the channel copy of a segment is not there yet (its tail) or not any more, firmware serves the unit from token
pages instead: every page of that stretch is then read in the first round.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from golden.spec.storage import PageKind
from golden.storage import attention as golden
from golden.storage.attention import Softmax, check_shapes, exact, mean_value, sparf
from golden.storage.fp import to_fp16
from sw_stack.drive import shape as pages
from sw_stack.drive.ftl import UNMAPPED, Ftl


@dataclass(frozen=True)
class Job:
    """One KV head of one sequence: q float16 [G, dh], `tokens` to attend to; sparse with r, k and window."""

    q: np.ndarray
    tokens: int
    sparse: bool = False
    r: int = 0
    k: int = 0
    window: int = 0


@dataclass(frozen=True)
class Outcome:
    """Output float16 [G, dh]; softmax maximum int64 [G] in whole log2 units and sum int64 [G] in 2^-40."""

    output: np.ndarray
    maximum: np.ndarray
    sum: np.ndarray

    @classmethod
    def of(cls, output: np.ndarray, state: Softmax) -> Outcome:
        """With the state that the golden softmax ended in."""
        return cls(output, state.maximum, state.sum)


@dataclass
class HeadPages:
    """Pages of one KV head of one layer of one sequence."""

    ftl: Ftl
    task: int
    batch: int
    layer: int
    head: int
    pages_read: Counter[PageKind] = field(default_factory=Counter)

    @property
    def shape(self) -> pages.TaskShape:
        """Shape of the task."""
        return self.ftl.shape_of(self.task)

    def tokens_of(self, view: PageKind, groups: np.ndarray, tokens: int) -> np.ndarray:
        """float16 [tokens of the groups below `tokens`, dh] by token pages and, for the last group, the buffer."""
        sequence = self.ftl.existing(self.task, self.batch)
        per = self.shape.tokens_per_page
        held = int(sequence.tokens[self.layer])
        flash = groups[(groups + 1) * per <= held]
        self.pages_read[view] += len(flash)
        images = self.ftl.read(self.task, self.batch, self.layer, view, np.array([self.head]), flash)
        unpack = pages.k_from_token_pages if view is PageKind.K_TOKEN else pages.v_from_token_pages
        parts = [unpack(self.shape, images)[0]]
        if len(flash) < len(groups):
            tail = self.ftl.tail(self.task, self.batch, self.layer)
            assert tail is not None
            parts.append(tail[int(view), self.head])
        found = np.concatenate(parts)
        ends = np.minimum((groups + 1) * per, tokens)
        keep = np.concatenate([np.arange(per) < end - g * per for g, end in zip(groups, ends, strict=True)])
        return found[keep[: len(found)]].view(np.float16)

    def channels_of(self, channels: np.ndarray, tokens: int) -> np.ndarray:
        """K float16 [tokens, dh] with the marked channels filled in and nothing else."""
        shape = self.shape
        k = np.zeros((tokens, shape.head_size), np.float16)
        table = self.ftl.resolve(
            self.task, self.batch, self.layer, PageKind.K_CHANNEL, np.array([self.head]), slice(None)
        )[0]
        marked = np.unique(channels // shape.channels_per_page)
        for first in range(0, tokens, shape.segment_tokens):
            end = min(first + shape.segment_tokens, tokens)
            groups = first // shape.segment_tokens * shape.channel_groups + marked
            if (table[groups] != UNMAPPED).all():
                images = self._read(PageKind.K_CHANNEL, groups).view(np.float16)
                rows = images.reshape(len(marked), shape.channels_per_page, shape.segment_tokens)
                for group, row in zip(marked, rows, strict=True):
                    at = group * shape.channels_per_page
                    k[first:end, at : at + shape.channels_per_page] = row[:, : end - first].T
            else:
                token_groups = np.arange(first // shape.tokens_per_page, -(-end // shape.tokens_per_page))
                k[first:end] = self.tokens_of(PageKind.K_TOKEN, token_groups, end)
        other = np.setdiff1d(np.arange(shape.head_size), channels)
        k[:, other] = 0
        return k

    def _read(self, view: PageKind, groups: np.ndarray) -> np.ndarray:
        self.pages_read[view] += len(groups)
        return self.ftl.read(self.task, self.batch, self.layer, view, np.array([self.head]), groups)[0]

    def all_tokens(self, view: PageKind, tokens: int) -> np.ndarray:
        """float16 [tokens, dh]."""
        return self.tokens_of(view, np.arange(-(-tokens // self.shape.tokens_per_page)), tokens)


class AttentionUnit(Protocol):
    """What executes an attend job; the golden unit, or the RTL."""

    def attend(self, job: Job, source: HeadPages) -> Outcome:
        """One head's queries. Raises the drive's errors for pages that cannot be had."""
        ...


class GoldenUnit:
    """golden.storage.attention over pages."""

    def attend(self, job: Job, source: HeadPages) -> Outcome:
        """See AttentionUnit."""
        if job.sparse:
            return self._sparf(job, source)
        k, v = (source.all_tokens(view, job.tokens) for view in (PageKind.K_TOKEN, PageKind.V_TOKEN))
        check_shapes(job.q, k, v)
        y, state = exact(job.q, k, v, np.ones(job.tokens, bool))
        return Outcome.of(to_fp16(y), state)

    def _sparf(self, job: Job, source: HeadPages) -> Outcome:
        """Two rounds: the first knows the marked channels only, the second the selected tokens' rows as well."""
        channels = golden.largest(golden.channel_keys(job.q), job.r)
        approximate = source.channels_of(channels, job.tokens)
        mean = mean_value(source.all_tokens(PageKind.V_TOKEN, job.tokens))
        nothing = np.zeros_like(approximate)
        options = {"r": job.r, "top": job.k, "window": job.window}
        chosen = sparf(job.q, approximate, nothing, mean, **options).tokens
        groups = np.unique(chosen // source.shape.tokens_per_page)
        k, v = approximate.copy(), nothing
        for view, into in ((PageKind.K_TOKEN, k), (PageKind.V_TOKEN, v)):
            rows = source.tokens_of(view, groups, job.tokens)
            where = _token_numbers(groups, source.shape.tokens_per_page, job.tokens)
            wanted = np.isin(where, chosen)
            into[where[wanted]] = rows[wanted]
        trace = sparf(job.q, k, v, mean, **options)
        return Outcome.of(trace.output, trace.state)


def _token_numbers(groups: np.ndarray, per: int, tokens: int) -> np.ndarray:
    numbers = (groups[:, None] * per + np.arange(per)).ravel()
    return numbers[numbers < tokens]
