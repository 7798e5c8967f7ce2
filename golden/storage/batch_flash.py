"""The flash side in the recurrence of a batch: reads wait, are sensed, granted room, moved, and taken by kernels."""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from itertools import count

from golden.storage.batch_types import FlashTimes, Page, UnitTimes


@dataclass(eq=False)
class Gate:
    """Something that happens once; processes wait for it."""

    open: bool = False
    waiting: list[Process] = field(default_factory=list)


Process = Generator["float | Gate", None, None]
"""Yields the time, or the gate, at which it goes on."""


class Clock:
    """Runs processes and calls in order of time; what falls on one time runs in the order in which it was asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._count = count()

    def at(self, time: float, call: Callable[[], None]) -> None:
        """Call at `time`, at once if that is past."""
        heapq.heappush(self._calls, (max(time, self.now), next(self._count), call))

    def go_on(self, process: Process) -> None:
        """Let a process run until it waits again."""
        for wish in process:
            if isinstance(wish, Gate):
                if wish.open:
                    continue
                wish.waiting.append(process)
            elif wish <= self.now:
                continue
            else:
                self.at(wish, lambda: self.go_on(process))
            return

    def open(self, gate: Gate) -> None:
        """It has happened."""
        gate.open = True
        for process in gate.waiting:
            self.at(self.now, lambda process=process: self.go_on(process))  # type: ignore[misc]
        gate.waiting.clear()

    def run(self) -> None:
        """Until nothing is left to happen."""
        while self._calls:
            self.now, _, call = heapq.heappop(self._calls)
            call()


@dataclass(eq=False)
class Read:
    """A page on its way to a kernel."""

    page: Page
    kernel: int
    granted: bool = False
    sensed: bool = False
    there: Gate = field(default_factory=Gate)
    """Its filter has passed it."""


class Channel:
    """One flash channel and its filter. `moved` is called whenever a read may have made room for another."""

    def __init__(self, clock: Clock, times: UnitTimes, flash: FlashTimes, moved: Callable[[], None]):
        self._clock, self._times, self._flash, self._moved = clock, times, flash, moved
        self._commands: deque[Read] = deque()
        self._reads: list[Read] = []  # in the channel, until they have been sent
        self._waiting: dict[int, deque[Read]] = defaultdict(deque)
        self._holding: dict[int, int] = defaultdict(int)
        self._sensed_at: dict[int, float] = defaultdict(float)
        self._ungranted: tuple[deque[Read], deque[Read]] = deque(), deque()
        self._used, self._slots = [0, 0], [0, 0]
        self._sending = False

    def has_room(self, kernel: int) -> bool:
        """Whether another read of the kernel can wait here."""
        return (
            len(self._commands) < self._times.commands
            and len(self._ungranted[kernel]) < self._times.descriptors
        )

    def take(self, read: Read) -> None:
        """A read for the channel."""
        self._commands.append(read)
        self._ungranted[read.kernel].append(read)
        self._grant(read.kernel)
        self._accept()

    def free(self, read: Read) -> None:
        """The kernel has taken the page."""
        self._used[read.kernel] -= read.page.beats
        self._slots[read.kernel] -= 1
        self._grant(read.kernel)
        self._choose()

    def _accept(self) -> None:
        while self._commands and len(self._reads) < self._flash.queue:
            read = self._commands.popleft()
            self._reads.append(read)
            self._waiting[read.page.array].append(read)
            self._sense(read.page.array)

    def _grant(self, kernel: int) -> None:
        """Room for the kernel's pages in order."""
        waiting = self._ungranted[kernel]
        while waiting and self._slots[kernel] < self._times.ring_slots:
            if self._used[kernel] + waiting[0].page.beats > self._times.ring_beats:
                return
            read = waiting.popleft()
            read.granted = True
            self._used[kernel] += read.page.beats
            self._slots[kernel] += 1

    def _sense(self, array: int) -> None:
        while self._waiting[array] and self._holding[array] <= self._flash.cache_read:
            read = self._waiting[array].popleft()
            self._holding[array] += 1
            begin = max(self._clock.now + self._flash.command, self._sensed_at[array])
            self._sensed_at[array] = begin + self._flash.read
            self._clock.at(begin + self._flash.read + self._flash.ecc, lambda read=read: self._ready(read))  # type: ignore[misc]

    def _ready(self, read: Read) -> None:
        read.sensed = True
        self._choose()

    def _choose(self) -> None:
        """Send the oldest of the granted pages that are ready."""
        read = next((read for read in self._reads if read.granted and read.sensed), None)
        if read and not self._sending:
            self._sending = True
            self._clock.at(self._clock.now + self._flash.page, lambda: self._sent(read))

    def _sent(self, read: Read) -> None:
        self._sending = False
        self._reads.remove(read)
        self._holding[read.page.array] -= 1
        self._sense(read.page.array)
        self._accept()
        self._clock.at(self._clock.now + self._times.filter, lambda: self._clock.open(read.there))
        self._choose()
        self._moved()


class FlashSide:
    """Reads in order of asking to the channels, as requester and front move them; kernels `take` the pages."""

    def __init__(self, clock: Clock, times: UnitTimes, flash: FlashTimes, channels: int):
        self._clock, self._times = clock, times
        self._channels = [Channel(clock, times, flash, self._move) for _ in range(channels)]
        self._pending: deque[Read] = deque()
        self._room: Gate = Gate()
        self._asked_at = -1.0
        self._queues: tuple[deque[Read], deque[Read]] = deque(), deque()
        self._open = [0, 0]  # per kernel, asked for and not taken
        self._turn = 0

    def ask(self, read: Read) -> Process:
        """Ask for a page: one per cycle, while there is room."""
        self._asked_at = max(self._clock.now, self._asked_at + 1)
        yield self._asked_at
        while len(self._pending) >= self._times.pending:
            yield self._room
        self._pending.append(read)
        self._move()

    def taken(self, read: Read) -> None:
        """A kernel has taken the page's last beat."""
        self._open[read.kernel] -= 1
        self._channels[read.page.channel].free(read)
        self._move()

    def _move(self) -> None:
        """The oldest asked page into its kernel's queue, and the queues' in turns to their channels."""
        while self._pending and self._open[self._pending[0].kernel] < self._times.ledger:
            read = self._pending.popleft()
            self._open[read.kernel] += 1
            self._queues[read.kernel].append(read)
            room, self._room = self._room, Gate()
            self._clock.open(room)
        while any(self._queues):
            kernel = self._turn if self._queues[self._turn] else 1 - self._turn
            read = self._queues[kernel][0]
            if not self._channels[read.page.channel].has_room(kernel):
                return
            self._queues[kernel].popleft()
            self._turn = 1 - kernel
            self._channels[read.page.channel].take(read)
