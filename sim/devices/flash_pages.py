"""Page fidelity: every command, sense and data-out of a drive's flash as an event.

Two engines, both discrete-event with the bus of a channel and the registers of its dies as exclusive resources, and
both deterministic for a seed. They do what simpy processes would do for each page (a test runs the same reads as simpy
processes and requires equal times), with events batched per channel in a heap, because a process per page costs more
than the page.

- `stream`: a saturated sequential read striped over channels, dies and planes, as dense attention reads KV.
- `scattered`: the same for pages that a selection scattered, so that some dies have longer queues than others.
- `closed_loop`: single-page reads with a bounded number outstanding, for latency distributions.

Bus arbitration (`Flash.arbitration`): "pipelined" lets a die take its next command as soon as its data are out;
"transfer-first" serves every waiting data-out before any new command, so that dies fall into step.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
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
    """Read `pages` pages striped evenly over channels, dies and planes; all commands are queued from the start."""
    rng = random.Random(seed)
    latencies: list[float] = []
    fixed = not flash.read_spread_us and not flash.retry_rate
    ends: dict[int, float] = {}
    slowest = 0.0
    for number in range(flash.channels):
        own = pages // flash.channels + (number < pages % flash.channels)
        if fixed and own in ends:
            continue
        # A read smaller than a full stripe senses only the planes that it needs.
        together = max(1, min(planes(flash), own))
        ends[own] = _channel(
            flash, _even(-(-own // together), flash), together, sense_times_us(flash, rng), latencies
        )
        slowest = max(slowest, ends[own])
    return PageRun(pages, slowest * 1e-6, latencies)


def scattered(flash: Flash, pages: int, drives: int = 1, seed: int = 0) -> PageRun:
    """Read `pages` pages that lie where a selection put them: each command on a die drawn uniformly at random.

    Of `drives` drives that share the pages, the one with the longest queue on a die is simulated. Planes of a die are
    still sensed together: K and V of a token group are selected together.
    """
    import numpy as np

    p, dies = planes(flash), flash.channels * flash.dies_per_channel
    commands = -(-pages // p)
    draws = np.random.default_rng(seed).multinomial(commands, np.full(drives * dies, 1 / (drives * dies)))
    loads = draws.reshape(drives, flash.channels, flash.dies_per_channel)
    worst = loads[int(loads.max(axis=(1, 2)).argmax())].tolist()
    rng = random.Random(seed)
    latencies: list[float] = []
    ends = [_channel(flash, queues, p, sense_times_us(flash, rng), latencies) for queues in worst]
    return PageRun(sum(map(sum, worst)) * p, max(ends) * 1e-6, latencies)


def _even(commands: int, flash: Flash) -> list[int]:
    dies = flash.dies_per_channel
    return [commands // dies + (i < commands % dies) for i in range(dies)]


def _channel(
    flash: Flash, queues: list[int], p: int, sense: Callable[[], float], latencies: list[float]
) -> float:
    """One channel until the queue of each die (commands of `p` pages) is empty; returns the end in microseconds."""
    tcmd, out, cached = flash.command_us, p * transfer_us(flash), flash.cache_read
    commands_first = flash.arbitration == "pipelined"
    left, pending = list(queues), sum(queues)
    waiting = deque(die for die, queued in enumerate(left) if queued)
    asked, sensed = [0.0] * len(left), [0.0] * len(left)
    ready: list[tuple[float, int]] = []
    bus = 0.0
    push, pop, record = heapq.heappush, heapq.heappop, latencies.append
    while pending:
        if waiting and (commands_first or not (ready and ready[0][0] <= bus)):
            die = waiting.popleft()
            asked[die] = bus
            bus += tcmd
            at = bus + sense()
            # With cache reads the die senses its next page as soon as this one has moved to the cache register.
            sensed[die] = at + sense() if cached else 0.0
            push(ready, (at, die))
            continue
        at, die = pop(ready)
        bus = (at if at > bus else bus) + out
        record(bus - asked[die])
        pending -= 1
        left[die] -= 1
        if left[die] and cached:
            asked[die] = bus
            bus += tcmd
            moved = max(sensed[die], bus)
            sensed[die] = moved + sense()
            push(ready, (moved, die))
        elif left[die]:
            waiting.append(die)
    return bus


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
