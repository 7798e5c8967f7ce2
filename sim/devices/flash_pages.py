"""Page fidelity: every command, sense and data-out of a drive's flash as an event.

Two engines, both discrete-event with the bus of a channel and the registers of its dies as exclusive resources, and
both deterministic for a seed. They do what simpy processes would do for each page (a test runs the same reads as simpy
processes and requires equal times), with events batched per channel in a heap, because a process per page costs more
than the page.

- `stream`: a saturated sequential read striped over channels, dies and planes, as attention reads KV.
- `closed_loop`: single-page reads with a bounded number outstanding, for latency distributions.

Bus arbitration (`Flash.arbitration`): "pipelined" lets a die take its next command as soon as its data are out;
"transfer-first" serves every waiting data-out before any new command, so that dies fall into step.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sim.describe.devices import Flash
from sim.devices.flash import planes, transfer_us


@dataclass(frozen=True)
class PageRun:
    """Outcome of a run: makespan, and per-command latencies from bus request to last byte (microseconds)."""

    pages: int
    seconds: float
    latencies_us: list[float]

    def gb_per_s(self, page_bytes: int) -> float:
        """Mean bandwidth including ramp-up and tail."""
        return self.pages * page_bytes / self.seconds / 1e9

    def percentile_us(self, share: float) -> float:
        """Latency below which `share` of the commands stay."""
        ordered = sorted(self.latencies_us)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def sense_times_us(flash: Flash, rng: random.Random) -> Callable[[], float]:
    """A generator of array times: mean +- spread by page type (lower, upper), plus whole re-reads on retry."""
    if not flash.read_spread_us and not flash.retry_rate:
        return lambda: flash.read_us
    chance = rng.random

    def draw() -> float:
        sense = flash.read_us + (flash.read_spread_us if chance() < 0.5 else -flash.read_spread_us)
        tries = 1
        while tries <= flash.retry_max and chance() < flash.retry_rate:
            tries += 1
        return sense * tries

    return draw


def stream(flash: Flash, pages: int, seed: int = 0) -> PageRun:
    """Read `pages` pages striped page by page over channels; all commands are queued from the start."""
    p = planes(flash)
    rng = random.Random(seed)
    channel = _cached_channel if flash.cache_read else _CHANNELS[flash.arbitration]
    latencies: list[float] = []
    slowest = 0.0
    fixed = not flash.read_spread_us and not flash.retry_rate
    ends: dict[int, float] = {}
    for number in range(flash.channels):
        own = pages // flash.channels + (number < pages % flash.channels)
        if fixed and own in ends:
            continue
        # A read smaller than a full stripe senses only the planes that it needs.
        together = max(1, min(p, own))
        ends[own] = channel(flash, -(-own // together), together, sense_times_us(flash, rng), latencies)
        slowest = max(slowest, ends[own])
    return PageRun(pages, slowest * 1e-6, latencies)


def _pipelined_channel(
    flash: Flash, commands: int, p: int, sense: Callable[[], float], latencies: list[float]
) -> float:
    """A die's next command follows its own data-out at once."""
    tcmd, out = flash.command_us, p * transfer_us(flash)
    dies = min(flash.dies_per_channel, commands)
    ready = [((i + 1) * tcmd + sense(), i * tcmd) for i in range(dies)]
    heapq.heapify(ready)
    bus, left = dies * tcmd, commands - dies
    replace, record = heapq.heapreplace, latencies.append
    while left:
        at, asked = ready[0]
        bus = (at if at > bus else bus) + out
        record(bus - asked)
        bus += tcmd
        replace(ready, (bus + sense(), bus - tcmd))
        left -= 1
    return _drain(ready, bus, out, latencies)


def _transfer_first_channel(
    flash: Flash, commands: int, p: int, sense: Callable[[], float], latencies: list[float]
) -> float:
    """Commands wait while any data-out waits."""
    tcmd, out = flash.command_us, p * transfer_us(flash)
    ready: list[tuple[float, float]] = []
    waiting = [0.0] * min(flash.dies_per_channel, commands)
    bus, left = 0.0, commands - len(waiting)
    while left or waiting:
        if waiting and not (ready and ready[0][0] <= bus):
            bus += tcmd
            heapq.heappush(ready, (bus + sense(), waiting.pop()))
            continue
        at, asked = heapq.heappop(ready)
        bus = max(at, bus) + out
        latencies.append(bus - asked)
        if left:
            waiting.append(bus)
            left -= 1
    return _drain(ready, bus, out, latencies)


def _cached_channel(
    flash: Flash, commands: int, p: int, sense: Callable[[], float], latencies: list[float]
) -> float:
    """The next page senses while one waits in the cache register or on the bus."""
    tcmd, out = flash.command_us, p * transfer_us(flash)
    dies = min(flash.dies_per_channel, commands)
    ready: list[tuple[float, float, float]] = []
    for i in range(dies):
        moved = (i + 1) * tcmd + sense()
        ready.append((moved, moved + sense(), i * tcmd))
    heapq.heapify(ready)
    bus, left = dies * tcmd, commands - dies
    while left:
        at, sensed, asked = ready[0]
        bus = max(at, bus) + out
        latencies.append(bus - asked)
        bus += tcmd
        moved = max(sensed, bus)
        heapq.heapreplace(ready, (moved, moved + sense(), at))
        left -= 1
    return _drain([(at, asked) for at, _, asked in ready], bus, out, latencies)


def _drain(ready: Sequence[tuple[float, float]], bus: float, out: float, latencies: list[float]) -> float:
    """Data-outs after the last command."""
    for at, asked in sorted(ready):
        bus = max(at, bus) + out
        latencies.append(bus - asked)
    return bus


_CHANNELS = {"pipelined": _pipelined_channel, "transfer-first": _transfer_first_channel}

READY, FREE, SUBMIT = 0, 1, 2


class _ClosedLoop:
    """State of a closed loop: FIFO per die, bus per channel, `depth` reads outstanding over random dies."""

    def __init__(self, flash: Flash, reads: int, depth: int, overhead_us: float, seed: int) -> None:
        self.flash, self.left, self.overhead_us = flash, reads, overhead_us
        self.rng = random.Random(seed)
        self.sense = sense_times_us(flash, self.rng)
        dies = flash.channels * flash.dies_per_channel
        self.queues: list[deque[float]] = [deque() for _ in range(dies)]
        self.busy = [False] * dies
        self.commands: list[deque[int]] = [deque() for _ in range(flash.channels)]
        self.outs: list[deque[int]] = [deque() for _ in range(flash.channels)]
        self.bus_busy = [False] * flash.channels
        self.events: list[tuple[float, int, int, int]] = []
        self.latencies: list[float] = []
        self.now = 0.0
        self.started = [0.0] * dies
        for _ in range(min(depth, reads)):
            self.submit()

    def submit(self) -> None:
        """One more read to a uniformly random die."""
        if not self.left:
            return
        self.left -= 1
        die = int(self.rng.random() * len(self.queues))
        self.queues[die].append(self.now)
        if not self.busy[die]:
            self.next_of(die)

    def next_of(self, die: int) -> None:
        """The die takes the next read of its queue, and its command waits for the bus."""
        self.busy[die] = bool(self.queues[die])
        if self.busy[die]:
            self.started[die] = self.queues[die].popleft()
            channel = die // self.flash.dies_per_channel
            self.commands[channel].append(die)
            self.grant(channel)

    def grant(self, channel: int) -> None:
        """Give an idle bus to a waiting command or data-out, in the order that the arbitration says."""
        if self.bus_busy[channel]:
            return
        commands, outs = self.commands[channel], self.outs[channel]
        command = bool(commands) and not (outs and self.flash.arbitration == "transfer-first")
        if not command and not outs:
            return
        self.bus_busy[channel] = True
        die = (commands if command else outs).popleft()
        length = self.flash.command_us if command else transfer_us(self.flash)
        heapq.heappush(self.events, (self.now + length, FREE, -die - 1 if command else die, channel))

    def run(self) -> PageRun:
        """Until every read has completed."""
        total = self.left + sum(map(len, self.queues)) + sum(self.busy)
        while self.events:
            self.now, kind, die, channel = heapq.heappop(self.events)
            if kind == SUBMIT:
                self.submit()
                continue
            if kind == READY:
                self.outs[channel].append(die)
            else:
                self.bus_busy[channel] = False
                if die < 0:
                    heapq.heappush(self.events, (self.now + self.sense(), READY, -die - 1, channel))
                else:
                    self.latencies.append(self.now - self.started[die] + self.overhead_us)
                    heapq.heappush(self.events, (self.now + self.overhead_us, SUBMIT, 0, 0))
                    self.next_of(die)
            self.grant(channel)
        return PageRun(total, self.now * 1e-6, self.latencies)


def closed_loop(flash: Flash, reads: int, depth: int, overhead_us: float = 0.0, seed: int = 0) -> PageRun:
    """`reads` single-page reads of uniformly random dies with `depth` outstanding.

    `overhead_us` (firmware, link, host) adds to every latency and delays the read that takes its place.
    """
    return _ClosedLoop(flash, reads, depth, overhead_us, seed).run()
