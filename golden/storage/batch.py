"""Cycles of a batch through the in-storage unit, page by page; held to the RTL by tests/rtl/test_storage_cycles.py.

The blocks' own times come as `UnitTimes`: from the hardware's closed forms (`hw.storage.timing.unit_times`), or from
the table that `kvstrata calibrate` writes, so that the system model computes the same batches.

A page is wanted, sensed by its array, moved by its channel and consumed by its kernel. Channels and kernels take
pages in the order of asking, so each of these times follows from those of earlier pages, and one pass over the pages
gives the time of the batch. Nothing is fitted: blocks take what their closed forms say, pages lie where the caller
says.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from golden.spec.storage import BEAT_ELEMENTS, GROUP_TOKENS, tokens_per_channel_page


@dataclass(frozen=True)
class UnitTimes:
    """Cycles of the unit's blocks, and what it holds at once."""

    slots: int
    """Jobs in the unit."""
    ahead: int
    """Approximate passes that may be asked for before the selection of the first has been."""
    ring_beats: int
    """Filtered beats that a channel's ring holds."""
    page_steps: int
    """Of a feeder, between two pages."""
    ask_steps: int
    """Between a page that a pass wants and its command."""
    filter: int
    """From a page's last raw beat to its first filtered one."""
    drain: int
    """From a block's last beat to its first score."""
    settled: int
    """Of quiet, after which an approximate pass counts as over."""
    score: int
    """From a token's turn to its key."""
    probability_64: int
    """From a K block's last beat to the V beat that may follow, head size 64."""
    probability_128: int
    total: int
    """From a head's last V beat to its sums."""
    normalise_query: int
    """Beside an element per cycle."""
    normalise_fixed: int
    alpha: int
    """From the last selected token to one query's alpha."""
    scale: int
    """Of one query's scale."""
    topk_scan: int
    """Of argtopk: one walk over the histogram."""
    topk_pass: int
    """Beside a row of keys per cycle: one pass over the keys."""
    topk_fixed: int
    channel_scan: int
    """The same for the selection of channels."""

    def probability(self, head_size: int) -> int:
        """From a K block's last beat to the V beat that may follow."""
        return self.probability_128 if head_size == 128 else self.probability_64

    def normalise(self, queries: int, head_size: int) -> int:
        """From a head's sums to its last output."""
        return queries * (self.normalise_query + head_size) + self.normalise_fixed

    def select(self, count: int, digits: int, scan: int) -> int:
        """From the last of `count` keys to the first row of marks."""
        rows = -(-count // GROUP_TOKENS)
        return digits * scan + (digits - 1) * (rows + self.topk_pass) + self.topk_fixed


class Page(NamedTuple):
    """A page to read: where it lies, and the beats that its filter passes."""

    channel: int
    array: int
    beats: int


@dataclass(frozen=True)
class BatchJob:
    """One job, dense when `blocks` is empty. `exact`: number, K page and V page of all token pages read, ascending.

    `blocks`: channel pages per block of tokens. `rows`: selected tokens of each 16-token group; `digits` that argtopk
    refines (`topk.timing.digits_used`).
    """

    tokens: int
    exact: Sequence[tuple[int, Page, Page]]
    blocks: Sequence[Sequence[Page]] = ()
    rows: Sequence[int] = ()
    digits: int = 0


@dataclass(frozen=True)
class FlashTimes:
    """Cycles: tR, command and decoder time, bus time of a page, firmware's answer.

    A channel senses ahead of its bus among `queue` pages; `outstanding` more wait for it inside the unit.
    """

    read: int
    command: int
    ecc: int
    page: float
    answer: int = 40
    cache_read: int = 1
    queue: int = 64
    outstanding: int = 64


@dataclass
class _Channel:
    done: float = 0.0
    moved: list[float] = field(default_factory=list)
    held: list[tuple[float, int]] = field(
        default_factory=list
    )  # pages given to kernels: (consumed at, beats)
    sensed: dict[int, float] = field(default_factory=dict)  # per array
    left: dict[int, list[float]] = field(default_factory=dict)  # per array, when its pages were moved


Pass = Generator[float, float, None]
"""Yields when it wants its next page, is sent when that page's turn has come."""


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
        self._times = times
        self._head_size, self._flash, self._queries = head_size, flash, queries
        self._span, self._groups = tokens_per_channel_page(m), head_size // m
        self._channels = [_Channel() for _ in range(channels)]
        self._asking = 0.0  # when the latest page was asked for
        self._kernel = [0.0, 0.0]  # when each may take its next beat
        self._selecting = 0.0  # until when argtopk is taken
        self._wanted: dict[int, list[float]] = {}  # per job: its pages of the exact pass
        self._weighed: dict[int, float] = {}
        self._prepared: float = (
            times.ask_steps + flash.answer
        )  # of the latest job: its command, operands and channels
        self._ready: dict[int, float] = {}  # when each may ask for its first page
        self._asked: dict[int, float] = {}  # first page of the exact pass
        self._completed: dict[int, float] = {}

    # --- one page
    def _move(self, page: Page, at: float) -> float:
        """When the page has passed its filter, wanted `at`."""
        c, f = self._channels[page.channel], self._flash
        if len(c.moved) >= f.queue + f.outstanding:
            at = max(at, c.moved[-f.queue - f.outstanding])
        self._asking = at
        before = c.left.setdefault(page.array, [])
        taken = max(at, c.moved[-f.queue]) if len(c.moved) >= f.queue else at
        start = max(taken + f.command, c.sensed.get(page.array, 0.0))
        if len(before) > f.cache_read:
            start = max(start, before[-1 - f.cache_read] + f.command)
        c.sensed[page.array] = start + f.read
        c.done = max(c.done, start + f.read + f.ecc, self._room(c, page)) + f.page
        before.append(c.done)
        c.moved.append(c.done)
        return c.done + self._times.filter

    def _room(self, channel: _Channel, page: Page) -> float:
        """When the channel's ring has room for the page."""
        used = page.beats - self._times.ring_beats
        for consumed, beats in reversed(channel.held):
            used += beats
            if used > 0:
                # rows are freed one by one, and needed one by one while the page comes in
                return consumed - min(used, beats) - self._flash.page * (1 - min(1.0, used / page.beats))
        return 0.0

    def _consume(self, kernel: int, page: Page, whole: float, after: float = 0.0) -> float:
        """When the kernel has taken the page's last beat."""
        held = self._channels[page.channel].held  # a ring gives its pages in order, whosever they are
        begin = max(self._kernel[kernel] + self._times.page_steps, whole, after, held[-1][0] if held else 0.0)
        self._kernel[kernel] = begin + page.beats
        held.append((begin + page.beats, page.beats))
        return begin + page.beats

    # --- passes of a job
    def _exact(self, number: int, job: BatchJob, kernel: int) -> Pass:
        slices = self._head_size // BEAT_ELEMENTS
        load = 2 + 2 * slices * (self._queries + bool(job.blocks))
        wanted = self._wanted.get(number, [self._ready[number]] * len(job.exact))
        scored: list[float] = []
        at = 0.0  # a pass takes two cycles to want a K page, one for a V page
        for index in range(len(job.exact) + 1):
            if index < len(job.exact):
                at = yield max(wanted[index], at + 2)
                whole = self._move(job.exact[index][1], at)
                if not index:
                    self._asked[number] = wanted[0]
                    # the pass starts with its first entry in the ledger, long before the page comes
                    start = max(self._kernel[kernel], self._weighed.get(number, 0.0), wanted[0])
                    self._kernel[kernel] = start + load
                end = self._consume(kernel, job.exact[index][1], whole)
                scored.append(end + self._times.probability(self._head_size))
            if index:
                value = job.exact[index - 1][2]
                at = yield max(wanted[min(index, len(wanted) - 1)], at + 1)
                self._consume(kernel, value, self._move(value, at), scored[index - 1])
        self._kernel[kernel] += self._times.total + self._times.normalise(self._queries, self._head_size)
        self._completed[number] = self._kernel[kernel]

    def _approximate(self, number: int, job: BatchJob) -> Pass:
        left, start = job.tokens, self._ready[number]
        self._kernel[0] = (
            max(self._kernel[0], start) + 2 + 2 * self._head_size // BEAT_ELEMENTS * self._queries
        )
        at = start
        for index, block in enumerate(job.blocks):
            for page in block:
                at = yield max(start, at + self._groups / len(block))  # a cycle for each group, marked or not
                self._consume(0, page, self._move(page, at))
            asked = self._kernel[0] if index else max(self._kernel[0], self._selecting)
            groups = -(-min(left, self._span) // GROUP_TOKENS)
            self._kernel[0] = asked + self._times.drain + GROUP_TOKENS * groups
            left -= self._span
        t = self._times
        first_row = self._kernel[0] + t.score + t.select(job.tokens, job.digits, t.topk_scan)
        self._kernel[0] += t.probability(self._head_size) + t.settled
        self._select(number, job, max(first_row, self._kernel[0]))

    def _select(self, number: int, job: BatchJob, at: float) -> None:
        """Rows of marks from `at` on, each as long as its selected tokens take; the pages they want, and alpha."""
        rows = []
        for tokens in job.rows:
            rows.append(at + self._times.ask_steps + self._flash.answer)
            at += 1 + tokens
        groups = 128 // self._head_size
        self._wanted[number] = [rows[min(len(rows), (page + 1) * groups) - 1] for page, _, _ in job.exact]
        self._weighed[number] = self._selecting = at + self._times.alpha * self._queries

    # --- the batch
    def cycles(self, jobs: Sequence[BatchJob]) -> float:
        """From the first command to the last completion, of jobs that are all dense or all SparF."""
        sparse = bool(jobs[0].blocks)
        if any(bool(job.blocks) != sparse for job in jobs):
            raise ValueError("a batch of the closed form is all dense or all SparF, not mixed")
        numbers = (
            [list(range(len(jobs)))] * 2
            if sparse
            else [list(range(1, len(jobs), 2)), list(range(0, len(jobs), 2))]
        )
        todo = [list(reversed(part)) for part in numbers]
        running: list[tuple[Pass, float] | None] = [None, None]
        turn = 0
        while todo[0] or todo[1] or any(running):
            for path in range(2):
                if (
                    running[path] is None
                    and todo[path]
                    and self._begin(todo[path][-1], sparse and not path, sparse)
                ):
                    number = todo[path].pop()
                    made = (
                        self._approximate(number, jobs[number])
                        if sparse and not path
                        else self._exact(number, jobs[number], path)
                    )
                    running[path] = made, next(made)
            ready = [max(entry[1], self._asking + 1) if entry else float("inf") for entry in running]
            path = turn if ready[0] == ready[1] else int(ready[1] < ready[0])
            turn = 1 - path
            chosen = running[path]
            assert chosen is not None, "a pass waits for one that cannot run"
            try:
                running[path] = chosen[0], chosen[0].send(ready[path])
            except StopIteration:
                running[path] = None
        return max(self._completed.values()) + 2

    def _begin(self, number: int, approximate: bool, sparse: bool) -> bool:
        """Whether the pass may be started, as far as earlier passes have got; notes when its job is ready."""
        if sparse and not approximate:
            return number in self._wanted
        if number and number - 1 not in self._ready:
            return False
        slot, asked = (
            self._completed.get(number - self._times.slots),
            self._asked.get(number - self._times.ahead),
        )
        if (number >= self._times.slots and slot is None) or (
            approximate and number >= self._times.ahead and asked is None
        ):
            return False
        operands = self._head_size // BEAT_ELEMENTS * (self._queries + sparse)
        prepare = self._prepare() if sparse else 0
        self._prepared = max(self._prepared, slot or 0.0) + 2 + operands + prepare
        self._ready[number] = max(self._prepared, asked or 0.0)
        return True

    def _prepare(self) -> int:
        """Channels and scale of a job: two walks over q, the selection, and a square root per query."""
        walk, times = self._queries * self._head_size, self._times
        return 2 * walk + times.select(self._head_size, 2, times.channel_scan) + times.scale * self._queries
