"""Cycles of a batch through the in-storage unit, page by page; held to the RTL by tests/rtl/test_storage_cycles.py.

A page is asked for, sensed by its array, granted room, moved by its channel and taken by its kernel
(`golden.storage.batch_flash`); passes ask for their pages and kernels take them in order. Nothing is fitted: blocks
take what their closed forms say, pages lie where the caller says. The blocks' own times come as `UnitTimes`: from the
hardware (`hw.storage.timing.unit_times`), or from the table that `kvstrata calibrate` writes, so that the system model
computes the same batches.
"""

from __future__ import annotations

from collections.abc import Sequence

from golden.spec.storage import BEAT_ELEMENTS, GROUP_TOKENS, tokens_per_channel_page
from golden.storage.batch_flash import Clock, FlashSide, Gate, Process, Read
from golden.storage.batch_types import BatchJob, FlashTimes, Page, UnitTimes

__all__ = ["Batch", "BatchJob", "FlashTimes", "Page", "UnitTimes"]


class _Run:
    """One job on its way: its pages, and what it has got to."""

    def __init__(self, job: BatchJob, kernel: int):
        self.job, self.kernel = job, kernel
        self.blocks = [[Read(page, 0) for page in block] for block in job.blocks]
        self.keys = [Read(key, kernel) for _, key, _ in job.exact]
        self.values = [Read(value, kernel) for _, _, value in job.exact]
        self.prepared, self.selected, self.asked, self.completed = Gate(), Gate(), Gate(), Gate()
        self.ready = 0.0
        self.wanted: list[float] = []
        """When each token page is known to be wanted."""
        self.weighed = 0.0
        """When alpha is known."""


class Batch:
    """Times of a batch of jobs of one shape; `cycles` may be called once."""

    def __init__(
        self,
        times: UnitTimes,
        flash: FlashTimes,
        *,
        head_size: int,
        channels: int,
        m: int = 2,
        queries: int = 1,
    ):
        self._times, self._flash = times, flash
        self._head_size, self._queries = head_size, queries
        self._span = tokens_per_channel_page(m)
        self._clock = Clock()
        self._side = FlashSide(self._clock, times, flash, channels)
        self._runs: list[_Run] = []
        self._selecting = 0.0  # until when argtopk is taken
        self._end = 0.0

    def cycles(self, jobs: Sequence[BatchJob]) -> float:
        """From the first command to the last completion, of jobs that are all dense or all SparF."""
        sparse = bool(jobs[0].blocks)
        if any(bool(job.blocks) != sparse for job in jobs):
            raise ValueError("a batch of the closed form is all dense or all SparF, not mixed")
        self._runs = [_Run(job, 1 if sparse else 1 - n % 2) for n, job in enumerate(jobs)]
        paths = [self._prepare(sparse)]
        if sparse:
            paths += [self._ask_channels(), self._score()]
        for kernel in range(2):
            mine = [run for run in self._runs if run.kernel == kernel]
            paths += [self._ask_tokens(mine, sparse), self._attend(mine, sparse)]
        for path in paths:
            self._clock.go_on(path)
        self._clock.run()
        assert all(run.completed.open for run in self._runs), "a pass waits for one that cannot run"
        return self._end + 2

    # --- a job's way to its pages
    def _prepare(self, sparse: bool) -> Process:
        """Commands, operands and channels of the jobs, one after the other, as slots are free."""
        step = 2 + self._head_size // BEAT_ELEMENTS * (self._queries + sparse)
        if sparse:
            # two walks over q, the selection, and a square root per query
            select = self._times.select(self._head_size, 2, self._times.channel_scan)
            step += 2 * self._queries * self._head_size + select + self._times.scale * self._queries
        yield float(self._times.ask_steps + self._flash.answer)
        for number, run in enumerate(self._runs):
            if number >= self._times.slots:
                yield self._runs[number - self._times.slots].completed
            yield self._clock.now + step
            run.ready = self._clock.now
            run.wanted = [run.ready] * len(run.keys)
            self._clock.open(run.prepared)

    def _ask_channels(self) -> Process:
        """Channel pages of the jobs, at most `ahead` passes before the oldest selection that is not asked for."""
        for number, run in enumerate(self._runs):
            yield run.prepared
            if number >= self._times.ahead:
                yield self._runs[number - self._times.ahead].asked
            for block in run.blocks:
                before = -1
                for read, group in zip(block, run.job.groups, strict=True):
                    yield self._clock.now + group - before  # a cycle for each group, marked or not
                    yield from self._side.ask(read)
                    before = group

    def _ask_tokens(self, runs: Sequence[_Run], sparse: bool) -> Process:
        """Token pages, K one ahead of V; a pass takes two cycles to want a K page, one for a V page."""
        for run in runs:
            yield run.selected if sparse else run.prepared
            for index in range(len(run.keys) + 1):
                yield run.wanted[min(index, len(run.keys) - 1)]
                if index < len(run.keys):
                    yield self._clock.now + 2
                    yield from self._side.ask(run.keys[index])
                    self._clock.open(run.asked)
                if index:
                    yield self._clock.now + 1
                    yield from self._side.ask(run.values[index - 1])

    # --- kernels
    def _take(self, read: Read, after: float = 0.0) -> Process:
        """A page through its kernel, from its last beat on."""
        yield self._clock.now + self._times.page_steps
        yield read.there
        yield after
        yield self._clock.now + read.page.beats
        self._side.taken(read)

    def _score(self) -> Process:
        """Approximate passes on kernel 0."""
        times = self._times
        for run in self._runs:
            yield run.prepared
            yield self._clock.now + 2 + 2 * self._head_size // BEAT_ELEMENTS * self._queries
            left = run.job.tokens
            for index, block in enumerate(run.blocks):
                for read in block:
                    yield from self._take(read)
                if not index:
                    yield self._selecting
                groups = -(-min(left, self._span) // GROUP_TOKENS)
                left -= self._span
                yield self._clock.now + times.drain + GROUP_TOKENS * groups
            first_row = self._clock.now + times.score
            first_row += times.select(run.job.tokens, run.job.digits, times.topk_scan)
            yield self._clock.now + times.probability(self._head_size) + times.settled
            self._select(run, max(first_row, self._clock.now))

    def _select(self, run: _Run, at: float) -> None:
        """Rows of marks from `at` on, each as long as its selected tokens take; the pages they want, and alpha."""
        rows = []
        for tokens in run.job.rows:
            rows.append(at + self._times.ask_steps + self._flash.answer)
            at += 1 + tokens
        groups = 128 // self._head_size
        run.wanted = [rows[min(len(rows), (page + 1) * groups) - 1] for page, _, _ in run.job.exact]
        run.weighed = self._selecting = at + self._times.alpha * self._queries
        self._clock.open(run.selected)

    def _attend(self, runs: Sequence[_Run], sparse: bool) -> Process:
        """Exact passes on one kernel: V waits for the probabilities of its K."""
        times, load = self._times, 2 + 2 * self._head_size // BEAT_ELEMENTS * (self._queries + sparse)
        for run in runs:
            yield run.asked
            yield run.weighed
            yield self._clock.now + load
            scored = 0.0
            for index in range(len(run.keys) + 1):
                before = scored
                if index < len(run.keys):
                    yield from self._take(run.keys[index])
                    scored = self._clock.now + times.probability(self._head_size)
                if index:
                    yield from self._take(run.values[index - 1], before)
            self._end = self._clock.now + times.total + times.normalise(self._queries, self._head_size)
            yield self._end
            self._clock.open(run.completed)
