"""Page fidelity: every command, sense and data-out of a drive's flash as an event.

Two engines, both discrete-event with the bus of a channel and the registers of its dies as exclusive resources, and
both deterministic for a seed. They do what simpy processes would do for each page (a test runs the same reads as simpy
processes and requires equal times), with events batched per channel in a heap, because a process per page costs more
than the page.

- `stream`: a saturated sequential read striped over channels, dies and planes, as dense attention reads KV.
- `scattered`: the same for pages that a selection scattered, so that some dies have longer queues than others.
- `mixed`: reads and programs that meet on the dies.
- `closed_loop`: short reads with a bounded number outstanding, for latency distributions.

Bus arbitration (`Flash.arbitration`): "pipelined" lets a die take its next command as soon as its data are out;
"transfer-first" serves every waiting data-out before any new command, so that dies fall into step.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sim.describe.devices import Flash
from sim.devices.flash import bus_of, partial_us, planes, sensing, transfer_us, units
from sim.devices.flash_channel import run_channel


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


def stream(flash: Flash, pages: int, seed: int = 0) -> PageRun:
    """Read `pages` pages striped evenly over channels, dies and planes; all commands are queued from the start."""
    rng = random.Random(seed)
    latencies: list[float] = []
    times = sensing(flash)
    ends: dict[int, float] = {}
    slowest = 0.0
    for number in range(flash.channels):
        own = pages // flash.channels + (number < pages % flash.channels)
        if times.fixed and own in ends:
            continue
        # A read smaller than a full stripe senses only the planes that it needs.
        together = max(1, min(planes(flash), own))
        commands = _even(-(-own // together), flash)
        ends[own] = run_channel(bus_of(flash, together), commands, times.times_us(rng), latencies)
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
    bus, sense = bus_of(flash, p), sensing(flash).times_us(rng)
    ends = [run_channel(bus, queues, sense, latencies) for queues in worst]
    return PageRun(sum(map(sum, worst)) * p, max(ends) * 1e-6, latencies)


def _even(commands: int, flash: Flash) -> list[int]:
    dies = flash.dies_per_channel
    return [commands // dies + (i < commands % dies) for i in range(dies)]


def mixed(flash: Flash, reads: int, programs: int, seed: int = 0) -> PageRun:
    """`reads` and `programs` pages striped evenly over channels and dies, in random order on each die.

    A program takes the bus for its command and data, then its die for tPROG, during which reads of that die wait;
    latencies are those of reads.
    """
    rng, p = random.Random(seed), planes(flash)
    dies = flash.channels * flash.dies_per_channel
    latencies: list[float] = []
    queues: list[deque[bool]] = []
    for die in range(dies):
        place = die % flash.dies_per_channel * flash.channels + die // flash.dies_per_channel
        counts = [-(-n // p) // dies + (place < -(-n // p) % dies) for n in (reads, programs)]
        order = [False] * counts[0] + [True] * counts[1]
        rng.shuffle(order)
        queues.append(deque(order))
    n = flash.dies_per_channel
    sense = sensing(flash).times_us(rng)
    ends = [
        _mixed_channel(flash, queues[c * n : (c + 1) * n], sense, latencies) for c in range(flash.channels)
    ]
    return PageRun(reads + programs, max(ends) * 1e-6, latencies)


def _mixed_channel(
    flash: Flash, queues: list[deque[bool]], sense: Callable[[], float], latencies: list[float]
) -> float:
    """One channel until every queue (True: a program) is empty; returns the end in microseconds."""
    tcmd, out = flash.command_us, planes(flash) * transfer_us(flash)
    waiting = deque(die for die, queue in enumerate(queues) if queue)
    asked = [0.0] * len(queues)
    busy: list[tuple[float, int, bool]] = []
    bus = 0.0
    while waiting or busy:
        if waiting and (flash.arbitration == "pipelined" or not (busy and busy[0][0] <= bus)):
            die = waiting.popleft()
            program = queues[die].popleft()
            bus += tcmd + (out if program else 0.0)
            heapq.heappush(busy, (bus + (flash.program_us if program else sense()), die, program))
            continue
        at, die, program = heapq.heappop(busy)
        bus = max(bus, at)
        if not program:
            bus += out
            latencies.append(bus - asked[die])
            asked[die] = bus
        if queues[die]:
            waiting.append(die)
    return bus


READY, FREE, SUBMIT, ARRIVE = 0, 1, 2, 3


@dataclass(slots=True)
class _Read:
    """One IO: the first of its pages' units, when it was submitted, pages not yet out."""

    unit: int
    submitted: float
    left: int


class _ClosedLoop:
    """State of a closed loop: FIFO per unit (die, or independent plane), bus per channel, `depth` IOs outstanding."""

    def __init__(
        self,
        flash: Flash,
        reads: int,
        depth: int,
        overhead_us: float,
        seed: int,
        size_bytes: int,
        gap_us: float,
    ) -> None:
        self.flash, self.left, self.overhead_us, self.gap_us = flash, reads, overhead_us, gap_us
        self.rng = random.Random(seed)
        self.sense = sensing(flash, size_bytes).times_us(self.rng)
        self.pages, self.out_us = -(-size_bytes // flash.page_bytes), partial_us(flash, size_bytes)
        count = units(flash)
        self.per_channel = count // flash.channels
        self.queues: list[deque[_Read]] = [deque() for _ in range(count)]
        self.current: list[_Read | None] = [None] * count
        self.commands: list[deque[int]] = [deque() for _ in range(flash.channels)]
        self.outs: list[deque[int]] = [deque() for _ in range(flash.channels)]
        self.bus_busy = [False] * flash.channels
        self.events: list[tuple[float, int, int, Any]] = []
        self.latencies: list[float] = []
        self.now = self.controller_free = 0.0
        self.order = 0
        for _ in range(min(depth, reads)):
            self.submit()

    def push(self, at: float, kind: int, what: Any) -> None:
        """Schedule an event; equal times keep the order in which they were scheduled."""
        self.order += 1
        heapq.heappush(self.events, (at, kind, self.order, what))

    def submit(self) -> None:
        """One more read, its pages striped from a uniformly random unit on; the controller takes one every `gap_us`."""
        if not self.left:
            return
        self.left -= 1
        read = _Read(int(self.rng.random() * len(self.queues)), self.now, self.pages)
        self.controller_free = max(self.controller_free, self.now) + self.gap_us
        if self.gap_us:
            self.push(self.controller_free, ARRIVE, read)
        else:
            self.arrive(read)

    def arrive(self, read: _Read) -> None:
        """Queue the read's pages, channel by channel."""
        channels, count = self.flash.channels, len(self.queues)
        for page in range(self.pages):
            # Neighbouring pages lie on neighbouring channels, then on the next unit of each.
            place = (read.unit + page) % count
            unit = place % channels * self.per_channel + place // channels
            self.queues[unit].append(read)
            if self.current[unit] is None:
                self.next_of(unit)

    def next_of(self, unit: int) -> None:
        """The unit takes the next page of its queue, and its command waits for the bus."""
        self.current[unit] = self.queues[unit].popleft() if self.queues[unit] else None
        if self.current[unit] is not None:
            channel = unit // self.per_channel
            self.commands[channel].append(unit)
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
        unit = (commands if command else outs).popleft()
        length = self.flash.command_us if command else self.out_us
        self.push(self.now + length, FREE, -unit - 1 if command else unit)

    def run(self) -> PageRun:
        """Until every read has completed."""
        while self.events:
            self.now, kind, _, what = heapq.heappop(self.events)
            if kind == SUBMIT:
                self.submit()
            elif kind == ARRIVE:
                self.arrive(what)
            elif kind == READY:
                channel = what // self.per_channel
                self.outs[channel].append(what)
                self.grant(channel)
            else:
                self._bus_freed(what)
        return PageRun(len(self.latencies) * self.pages, self.now * 1e-6, self.latencies)

    def _bus_freed(self, what: int) -> None:
        unit = what if what >= 0 else -what - 1
        channel = unit // self.per_channel
        self.bus_busy[channel] = False
        if what < 0:
            self.push(self.now + self.sense(), READY, unit)
        else:
            read = self.current[unit]
            assert read is not None
            read.left -= 1
            if not read.left:
                self.latencies.append(self.now - read.submitted + self.overhead_us)
                self.push(self.now + self.overhead_us, SUBMIT, None)
            self.next_of(unit)
        self.grant(channel)


def closed_loop(
    flash: Flash,
    reads: int,
    depth: int,
    overhead_us: float = 0.0,
    seed: int = 0,
    size_bytes: int | None = None,
    gap_us: float = 0.0,
) -> PageRun:
    """`reads` reads of `size_bytes` (default: a page) at uniformly random places with `depth` outstanding.

    `overhead_us` (firmware, link, host) adds to every latency and delays the read that takes its place; a controller
    that is rated for a number of reads per second takes one every `gap_us`.
    """
    return _ClosedLoop(flash, reads, depth, overhead_us, seed, size_bytes or flash.page_bytes, gap_us).run()
